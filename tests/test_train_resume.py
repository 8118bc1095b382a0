"""kill -9, wherever it strikes: the run that goes on ends with the weights of the one that did not.

Children are forked, which is quick; one test starts programs of their own instead.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import HELD_OUT, TEXT, quiet, same, small_model, small_run, weights

from slimlab.train import checkpoint, checkpoint_folder, history, run
from slimlab.train.checkpoint_folder import checkpoints_in, latest, problem_of
from slimlab.train.history import read_history

ROOT = Path(__file__).resolve().parents[1]
CONFIG = small_run(save_every=4, validate_every=3, keep_checkpoints=1)


def train_small(folder, config=CONFIG, seed=0, **options):
    model = small_model(seed=seed, dropout=0.3)
    records = quiet(model, TEXT, config, held_out=HELD_OUT, run_folder=folder, **options)
    return weights(model), records


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train_small(tmp_path_factory.mktemp("undisturbed"))


def start(work):
    """Fork a child that does the work; more threads than one would hang behind a fork."""

    def body():
        torch.set_num_threads(1)
        work()

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    return child


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module, name, number, replacement):
    """In the child: from the call of that number on, call `replacement` with the old function."""
    old, calls = getattr(module, name), []

    def counting(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            replacement(old, *arguments, **options)
        return old(*arguments, **options)

    setattr(module, name, counting)


def half_a_file(old, path, *_):
    old(path, *_)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    die()


def torn_update(old, self):
    for param in self.model.parameters():
        param.data.add_(1)
    die()


def then_die(old, *arguments, **options):
    old(*arguments, **options)
    die()


def die_first(*_, **__):
    die()


def after_history(old, self, record):
    self._file.write('{"step": 8, "los')
    self._file.flush()
    die()


# Steps 0, 4, 8 and 12 are saved: three tensor files, then config.json and state.json each.
MOMENTS = {
    "in the checkpoint of the first weights": (checkpoint, "write_tensors", 1, half_a_file),
    "before the history gets its name": (os, "replace", 1, die_first),
    "in the first step": (run.Run, "update", 1, torn_update),
    "before the first checkpoint after it": (checkpoint, "write_tensors", 4, die_first),
    "in the middle of a step": (run.Run, "update", 7, torn_update),
    "in the middle of a line of the history": (history.HistoryFile, "append", 8, after_history),
    "before a save": (run.Run, "save", 3, die_first),
    "before the weights": (checkpoint, "write_tensors", 7, die_first),
    "in the middle of the weights": (checkpoint, "write_tensors", 7, half_a_file),
    "in the middle of the optimizer": (checkpoint, "write_tensors", 9, half_a_file),
    "in the middle of state.json": (checkpoint, "write_json", 6, half_a_file),
    "before the folder gets its name": (os, "rename", 4, die_first),
    "after the folder got its name": (os, "rename", 4, then_die),
    "when the old one has lost its name": (os, "rename", 5, then_die),
    "when half of the old one is removed": (shutil, "rmtree", 99, die_first),
    "in the last save": (checkpoint, "write_tensors", 11, half_a_file),
    "after the last step": (run.Run, "save", 4, then_die),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_killed_goes_on_to_the_same_weights(tmp_path, undisturbed, moment):
    module, name, number, replacement = MOMENTS[moment]

    def work():
        if moment == "when half of the old one is removed":
            at_call(checkpoint_folder, "remove", 2, remove_half)
        else:
            at_call(module, name, number, replacement)
        train_small(tmp_path)

    child = start(work)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    there = checkpoints_in(tmp_path)
    assert all(problem_of(path) is None for path in there)
    # Weights to begin with are lost only if the very first checkpoint was not finished.
    is_first = moment == "in the checkpoint of the first weights"
    assert bool(there) != is_first

    found, records = train_small(tmp_path, seed=0 if is_first else 5)
    assert torch.equal(found, undisturbed[0])
    assert same(records, undisturbed[1])
    assert same(read_history(tmp_path), undisturbed[1])
    assert sorted(os.listdir(tmp_path)) == [".lock", "history.jsonl", "step_00000012"]


def remove_half(old, path):
    doomed = path.with_name(f".{path.name}.removed.tmp")
    os.rename(path, doomed)
    (doomed / "model.safetensors").unlink()
    die()


def test_the_moments_differ_in_what_they_leave_behind(tmp_path):
    """The kills above strike where they say: a folder under a temporary name is there, or not."""

    def work():
        at_call(checkpoint, "write_json", 6, half_a_file)
        train_small(tmp_path)

    child = start(work)
    child.join(60)
    names = sorted(os.listdir(tmp_path))
    half = [name for name in names if name.startswith(".step_00000008")]
    assert len(half) == 1
    files = {path.name: path.stat().st_size for path in (tmp_path / half[0]).iterdir()}
    assert len(files) == 5
    assert read_history(tmp_path).steps[-1] == 8
    assert latest(tmp_path).name == "step_00000004"


def test_kills_at_random_moments_change_nothing(tmp_path):
    config = small_run(save_every=1, num_steps=40, keep_checkpoints=2)
    expected, records = train_small(tmp_path / "undisturbed", config)
    folder, kills, places = tmp_path / "killed", 0, set()
    draw = random.Random(0)
    child = start(lambda: train_small(folder, config))
    while child.is_alive() and kills < 30:
        # Longer and longer, so that a busy machine gets somewhere too.
        child.join(draw.uniform(0.02, 0.15) * (1 + kills / 8))
        if child.is_alive():
            child.kill()
            child.join()
            kills += 1
            places.add(latest(folder))
            child = start(lambda: train_small(folder, config))
    child.join(60)
    found, again = train_small(folder, config, seed=5)
    assert torch.equal(found, expected)
    assert same(again, records)
    assert kills >= 3
    assert len(places) >= 2


PROGRAM = """
import sys, time
sys.path[:0] = ["tests"]
import torch
from training_cases import *
from slimlab.train import checkpoint
write, count = checkpoint.write_json, []
def slow(path, content):
    count.append(path)
    if len(count) == 5:  # config.json of the third save
        print("saving", flush=True)
        time.sleep(60)
    write(path, content)
checkpoint.write_json = slow
torch.set_num_threads(1)
model = small_model(dropout=0.3)
config = small_run(save_every=4, validate_every=3, keep_checkpoints=1)
train(model, TEXT, config, held_out=HELD_OUT, run_folder=sys.argv[1])
"""


def test_a_program_killed_from_outside_while_it_saves_goes_on(tmp_path, undisturbed):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    environment = {**os.environ, "SLIMLAB_BATCH": "1", "PYTHONPATH": str(ROOT)}
    places = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **places) as program:
        assert program.stdout.readline() == b"saving\n"
        half = sorted(tmp_path.glob(".step_00000008.*.tmp"))
        program.kill()
    assert program.returncode == -signal.SIGKILL
    assert len(half) == 1
    assert half[0].exists()
    assert latest(tmp_path).name == "step_00000004"
    said = []
    found, records = train_small(tmp_path, seed=5, say=said.append)
    assert said == [f"going on from {tmp_path}/step_00000004"]
    assert not half[0].exists()
    assert torch.equal(found, undisturbed[0])
    assert same(records, undisturbed[1])
    assert same(read_history(tmp_path), undisturbed[1])
