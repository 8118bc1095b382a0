"""A small model, a small text and a small run, for the tests of training."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch

from slimlab.config import ModelConfig, TrainingConfig
from slimlab.model.build import build_model
from slimlab.train.loop import train

# The next id is 3 more, but 4 more after every ninth: something to learn, and never a loss of 0.
TEXT = torch.tensor([(3 * i + i // 9) % 11 for i in range(400)])
HELD_OUT = TEXT[-90:]
SIZES = {"vocab_size": 11, "seq_len": 7, "d_model": 12, "num_layers": 2, "num_heads": 3}


def small_model(seed=0, **choices):
    torch.manual_seed(seed)
    return build_model(ModelConfig(**SIZES, **choices))


def small_run(**changes):
    return TrainingConfig(
        **{"num_steps": 12, "batch_size": 6, "seq_len": 7, "peak_lr": 0.01, "device": "cpu"}
        | changes
    )


def quiet(*arguments, **options):
    return train(*arguments, **{"say": lambda _: None} | options)


@contextmanager
def small_disk(folder, size):
    """A disk that is soon full; skips where the user may not mount one."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same(left, right):
    """Two runs' records apart from their seconds."""
    strip = [[{**record, "seconds": 0} for record in one.records] for one in (left, right)]
    return strip[0] == strip[1]
