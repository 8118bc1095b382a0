"""A run on a mesh: it goes on in other layouts with the loss curve joined, measures and stops."""

from dataclasses import replace

import pytest
import torch
from hybrid_cases import GPT
from parallel_cases import tiny_model

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.config import TrainingConfig
from slimlab.model.tensor_files import read_tensors
from slimlab.parallel.hybrid_loop import train_on_mesh
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.train.history import read_history
from slimlab.train.loop import train
from slimlab.train.run import window_batch

CONFIG = TrainingConfig(
    num_steps=10, batch_size=8, seq_len=12, peak_lr=1e-2, save_every=2, validate_every=5,
    keep_checkpoints=3, device="cpu",
)  # fmt: skip
LAYOUTS = [
    {"data": 2, "tensor": 2, "zero_stage": 1, "micro_batch_size": 2},
    {"pipeline": 2, "tensor": 2, "sequence_parallel": True, "micro_batch_size": 4},
    {"data": 4, "zero_stage": 3},
    {"data": 2, "pipeline": 2, "micro_batch_size": 2},
]
IDS = torch.randint(12, (400,), generator=torch.Generator().manual_seed(5))
HELD_OUT = IDS[:53]


class Killed(Exception):
    """Stands for whatever ends a run between two steps."""


class Text:
    """Batches of the text, until the run is killed at a step."""

    def __init__(self, end):
        self.end = end

    def __call__(self, step):
        if step == self.end:
            raise Killed
        return window_batch(IDS, CONFIG, step)


def train_until(comm, parallel, end, folder, config=CONFIG, **options):
    said = []
    run, history = train_on_mesh(
        tiny_model(seed=comm.rank, **GPT), Text(end), config, comm, ParallelConfig(**parallel),
        held_out=HELD_OUT, run_folder=folder, show=False, say=said.append, **options,
    )  # fmt: skip
    return history.losses, history.validation, said, run.hybrid.full_weights()


def train_with_dropout(comm, parallel, end, folder):
    train_on_mesh(
        tiny_model(**GPT | {"dropout": 0.2}), Text(end), replace(CONFIG, num_steps=4), comm,
        ParallelConfig(**parallel), run_folder=folder, show=False, say=lambda _: None,
    )  # fmt: skip


def train_alone(folder, end=None, say=print):
    model = tiny_model(**GPT)
    history = train(
        model, Text(end), CONFIG, held_out=HELD_OUT, run_folder=folder, show=False, say=say
    )
    return model, history


@pytest.fixture(scope="module")
def true():
    """The run of one process that nobody has stopped."""
    return train_alone(None)


def test_a_run_goes_on_under_other_layouts_and_in_one_process_with_its_curve_joined(true, tmp_path):
    for number, parallel in enumerate(LAYOUTS[:3], start=1):
        # It is killed one step after a checkpoint: that step is made again by the next.
        with pytest.raises(RankError) as caught:
            run_ranks(train_until, 4, args=(parallel, 2 * number + 1, tmp_path))
        assert isinstance(caught.value.__cause__, Killed)
    with pytest.raises(Killed):
        train_alone(tmp_path, end=9)
    results = run_ranks(train_until, 4, args=(LAYOUTS[3], None, tmp_path))
    said = results[0][2]
    assert "going on from" in said[-1]
    assert [one[2] for one in results[1:]] == [[], [], []]
    model, history = true
    found = read_history(tmp_path)
    assert found.steps == list(range(1, 11))
    assert found.losses == pytest.approx(history.losses, rel=1e-12)
    assert found.grad_norms == pytest.approx(history.grad_norms, rel=1e-11)
    assert found.num_tokens == history.num_tokens
    assert found.lrs == history.lrs
    assert dict(found.validation) == pytest.approx(dict(history.validation), rel=1e-12)
    for name, param in model.named_parameters():
        if name.endswith("k_proj.bias"):
            continue  # without a gradient but for rounding
        assert torch.allclose(results[0][3][name], param, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("parallel", LAYOUTS[:2], ids=["ZeRO 1", "sequence and pipeline"])
def test_a_run_with_dropout_that_was_killed_goes_on_bit_for_bit_in_its_layout(parallel, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_ranks(train_with_dropout, 4, args=(parallel, None, whole))
    with pytest.raises(RankError):
        run_ranks(train_with_dropout, 4, args=(parallel, 3, killed))
    run_ranks(train_with_dropout, 4, args=(parallel, None, killed))
    assert read_history(killed).losses == read_history(whole).losses
    left, right = (read_tensors(one / "step_00000004/model.safetensors") for one in (whole, killed))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_run_names_the_layout_that_saved_it_and_is_refused_with_other_settings(tmp_path):
    with pytest.raises(RankError):
        run_ranks(train_until, 4, args=(LAYOUTS[0], 3, tmp_path))
    config = replace(CONFIG, peak_lr=0.5)
    with pytest.raises(RankError, match=r"training.peak_lr = 0.01 there, 0.5 now"):
        run_ranks(train_until, 4, args=(LAYOUTS[1], None, tmp_path, config))
    with pytest.raises(RankError, match="without checkpoints, since resume=False"):
        run_ranks(lambda comm: train_until(comm, LAYOUTS[1], 4, tmp_path, resume=False), 4)
    said = []

    def go_on(comm):
        train_on_mesh(
            tiny_model(**GPT), Text(None), replace(CONFIG, num_steps=3), comm,
            ParallelConfig(tensor=2), run_folder=tmp_path, new_settings=True, show=False,
            say=said.append,
        )  # fmt: skip

    run_ranks(go_on, 2)
    assert "saved by tensor 2, pipeline 1, data 2, micro-batch 2, ZeRO 1" in " ".join(said)
    assert "training.num_steps = 10 there, 3 now" in " ".join(said)


def test_a_loss_that_is_not_finite_ends_the_run_on_every_rank_with_the_last_good(tmp_path):
    config = replace(CONFIG, peak_lr=1e200, warmup_steps=0, clip_norm=None)
    with pytest.raises(RankError) as caught:
        run_ranks(train_until, 4, args=(LAYOUTS[0], None, tmp_path, config))
    text = str(caught.value)
    assert "a finite loss and finite gradients" in text
    assert "the last good checkpoint is" in text
    assert "(data 0, pipeline 0, tensor 0)" in text
