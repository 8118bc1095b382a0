"""Runs that end early: how they go on, bit for bit, and what stops them with which words."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from training_cases import HELD_OUT, TEXT, quiet, same, small_disk, small_model, small_run, weights

from slimlab.config import InputError
from slimlab.train import checkpoint, interrupts, run
from slimlab.train.checkpoint_folder import checkpoints_in, latest
from slimlab.train.history import read_history
from slimlab.train.loop import train
from slimlab.train.objectives import causal_objective, masked_objective
from slimlab.train.run import window_batch

ROOT = Path(__file__).resolve().parents[1]


# Going on


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_own", "sgd"])
def test_a_run_that_is_cut_in_two_is_the_run_in_one(tmp_path, optimizer, precision, monkeypatch):
    config = small_run(
        optimizer=optimizer, precision=precision, save_every=5, validate_every=4, seed=3
    )
    whole = small_model(dropout=0.3)
    expected = quiet(whole, TEXT, config, held_out=HELD_OUT, run_folder=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "update", stop_before(8, run.Run.update))
        with pytest.raises(ZeroDivisionError):
            quiet(small_model(dropout=0.3), TEXT, config, run_folder=tmp_path / "cut")
    other = small_model(seed=9, dropout=0.3)  # its weights come from the checkpoint
    torch.rand(7)
    said = []
    found = train(
        other, TEXT, config, held_out=HELD_OUT, run_folder=tmp_path / "cut", say=said.append
    )
    assert torch.equal(weights(other), weights(whole))
    assert said == [f"going on from {tmp_path / 'cut' / 'step_00000005'}"]
    # the first part measured nothing
    assert found.losses == expected.losses
    assert found.validation == expected.validation[1:]
    assert same(read_history(tmp_path / "cut"), found)
    assert same(read_history(tmp_path / "whole"), expected)


def test_the_scale_of_float16_gradients_is_kept(tmp_path, monkeypatch):
    def objective(model, batch):
        calls.append(1)
        loss, count = causal_objective(model, batch)
        return loss * (1e30 if len(calls) == 2 else 1), count

    calls, config = [], small_run(precision="float16", save_every=5)
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "update", stop_before(8, run.Run.update))
        with pytest.raises(ZeroDivisionError):
            quiet(small_model(), TEXT, config, objective=objective, run_folder=tmp_path)
    quiet(small_model(), TEXT, config, objective=objective, run_folder=tmp_path)
    scaler = checkpoint.load_checkpoint(tmp_path).extra["scaler"]
    assert scaler["scale"] == 2.0**15  # halved once, before the checkpoint
    assert scaler["_growth_tracker"] == 10


def stop_before(step, update):
    def stopping(self):
        if self.step == step:
            raise ZeroDivisionError
        return update(self)

    return stopping


def test_without_the_random_state_dropout_would_go_on_differently(tmp_path, monkeypatch):
    config = small_run(save_every=5)
    whole, cut = small_model(dropout=0.3), small_model(dropout=0.3)
    quiet(whole, TEXT, config)
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "update", stop_before(8, run.Run.update))
        with pytest.raises(ZeroDivisionError):
            quiet(cut, TEXT, config, run_folder=tmp_path)
    monkeypatch.setattr(run, "set_random_state", lambda *_: True)
    quiet(cut, TEXT, config, run_folder=tmp_path)
    assert not torch.equal(weights(cut), weights(whole))


def test_a_finished_run_is_read_and_not_repeated(tmp_path):
    model = small_model()
    first = quiet(model, TEXT, small_run(), run_folder=tmp_path)
    before = weights(model)
    again = small_model(seed=4)
    assert same(quiet(again, TEXT, small_run(), run_folder=tmp_path), first)
    assert torch.equal(weights(again), before)


def test_what_decides_the_result_may_not_change_and_is_named(tmp_path):
    quiet(small_model(), TEXT, small_run(), run_folder=tmp_path, notes={"text": "abc"})
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(InputError) as caught:
        quiet(
            small_model(dropout=0.1),
            TEXT[:-1],
            small_run(num_steps=13, peak_lr=0.02, betas=(0.9, 0.9)),
            run_folder=tmp_path,
            notes={"text": "abd"},
        )
    for words in (
        "training.num_steps = 12 there, 13 now",
        "training.peak_lr = 0.01 there, 0.02 now",
        "training.betas = [0.9, 0.95] there, [0.9, 0.9] now",
        "model.dropout = 0.0 there, 0.1 now",
        "notes.text = 'abc' there, 'abd' now",
        "data = ",
    ):
        assert words in caught.value.given
    assert "seed" not in caught.value.given
    with pytest.raises(InputError, match="objective = 'causal_objective' there, 'masked_obj"):
        quiet(
            small_model(),
            TEXT,
            small_run(),
            run_folder=tmp_path,
            notes={"text": "abc"},
            objective=masked_objective,
        )
    with pytest.raises(InputError, match="resume=False"):
        quiet(small_model(), TEXT, small_run(), run_folder=tmp_path, resume=False)
    assert {f: f.read_bytes() for f in before if f.name != ".lock"} == {
        f: old for f, old in before.items() if f.name != ".lock"
    }


def test_settings_may_change_when_asked_and_go_on_with_the_weights_of_the_checkpoint(tmp_path):
    """The oracle has the same weights and averages, and was never saved."""
    begun = small_run(num_steps=8, warmup_steps=2, weight_decay=0.5)
    changed = small_run(num_steps=14, warmup_steps=1, weight_decay=0.0, peak_lr=0.003, batch_size=5)
    model, said = small_model(), []
    quiet(model, TEXT, begun, run_folder=tmp_path)
    oracle = run.Run(small_model(), TEXT, begun, causal_objective)
    for _ in range(8):
        oracle.update()
    oracle.config = changed
    oracle.batch_at = lambda step: window_batch(TEXT, changed, step)
    for group in oracle.optimizer.param_groups:
        group["weight_decay"] = 0.0
    for _ in range(6):
        oracle.update()

    with pytest.raises(InputError, match="peak_lr = 0.01 there.*\n.*new_settings=True"):
        quiet(small_model(), TEXT, changed, run_folder=tmp_path)
    found = quiet(model, TEXT, changed, run_folder=tmp_path, new_settings=True, say=said.append)
    assert torch.equal(weights(model), weights(oracle.model))
    assert found.steps == list(range(1, 15))
    assert "from step 8 on, other settings: training.num_steps = 8 there, 14 now" in said[0]
    # From then on these are the settings of the run.
    assert quiet(small_model(seed=9), TEXT, changed, run_folder=tmp_path).steps == found.steps


@pytest.mark.parametrize(
    ("changes", "choices", "words"),
    [
        ({"peak_lr": 0.5, "seed": 3}, {}, "training.seed = 0 there, 3 now$"),
        ({}, {"dropout": 0.1}, "model.dropout = 0.0 there, 0.1 now$"),
        ({"num_steps": 5}, {}, "num_steps = 5$"),
    ],
)
def test_what_makes_another_run_may_not_change_even_when_asked(tmp_path, changes, choices, words):
    quiet(small_model(), TEXT, small_run(), run_folder=tmp_path)
    with pytest.raises(InputError) as caught:
        quiet(
            small_model(**choices),
            TEXT,
            small_run(**changes),
            run_folder=tmp_path,
            new_settings=True,
        )
    assert re.search(words, caught.value.given)


def test_a_run_that_diverged_goes_on_from_its_last_checkpoint_with_a_lower_rate(tmp_path):
    model, poisoned = small_model(), poison(5, "final_norm.weight")
    poisoned.__name__ = causal_objective.__name__  # the same run, but for one step
    with pytest.raises(InputError) as caught:
        quiet(model, TEXT, small_run(save_every=2), objective=poisoned, run_folder=tmp_path)
    assert "new_settings=True goes on from the last good checkpoint" in caught.value.change
    assert "clip_norm" not in caught.value.change  # it clips already
    gentle = small_run(save_every=2, peak_lr=0.001)
    found = quiet(model, TEXT, gentle, run_folder=tmp_path, new_settings=True)
    assert found.steps == list(range(1, 13))
    assert found.lrs[3] > 0.005 > found.lrs[4]


def test_what_decides_pace_and_memory_may_change(tmp_path, monkeypatch):
    whole, cut = small_model(), small_model()
    quiet(whole, TEXT, small_run())
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "update", stop_before(7, run.Run.update))
        with pytest.raises(ZeroDivisionError):
            quiet(cut, TEXT, small_run(save_every=6), run_folder=tmp_path)
    config = small_run(save_every=1, keep_checkpoints=4, recompute="block", device="auto")
    quiet(cut, TEXT, config, run_folder=tmp_path)
    assert torch.equal(weights(cut), weights(whole))
    assert [path.name[-2:] for path in checkpoints_in(tmp_path)] == ["09", "10", "11", "12"]


def test_a_damaged_newest_checkpoint_is_passed_over_and_written_again(tmp_path):
    whole, again = small_model(), small_model(seed=8)
    quiet(whole, TEXT, small_run(save_every=4), run_folder=tmp_path)
    (tmp_path / "step_00000012" / "optimizer.safetensors").write_bytes(b"half")
    said = []
    train(again, TEXT, small_run(save_every=4), run_folder=tmp_path, say=said.append)
    assert "skipped the damaged checkpoint" in said[0]
    assert said[1].endswith("step_00000008")
    assert torch.equal(weights(again), weights(whole))
    assert latest(tmp_path).name == "step_00000012"


def test_lines_of_steps_that_no_checkpoint_knows_are_removed_from_the_history(tmp_path):
    config = small_run(save_every=6)
    expected = quiet(small_model(), TEXT, config, run_folder=tmp_path)
    path = tmp_path / "history.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 12
    checkpoint.remove(tmp_path / "step_00000012")
    path.write_text("".join(lines[:9]) + '{"step": 10, "lo')
    assert read_history(tmp_path).steps == list(range(1, 10))
    again = quiet(small_model(), TEXT, config, run_folder=tmp_path)
    assert same(again, expected)
    assert same(read_history(path), expected)
    path.unlink()
    assert quiet(small_model(), TEXT, config, run_folder=tmp_path).records == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(tmp_path, number, capsys):
    config = small_run(save_every=10)
    whole, cut = small_model(dropout=0.3), small_model(dropout=0.3)
    quiet(whole, TEXT, config)
    before = signal.getsignal(number)

    def data(step, at=4):
        if step == at:
            os.kill(os.getpid(), number)
        return window_batch(TEXT, config, step)

    with pytest.raises(interrupts.Interrupted) as caught:
        quiet(cut, data, config, run_folder=tmp_path)
    assert f"{number.name} after step 5 of 12" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert signal.getsignal(number) == before
    assert latest(tmp_path).name == "step_00000005"
    quiet(cut, lambda step: data(step, at=None), config, run_folder=tmp_path)
    assert torch.equal(weights(cut), weights(whole))


def test_a_second_signal_acts_at_once(tmp_path):
    def data(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return window_batch(TEXT, small_run(), step)

    with pytest.raises(KeyboardInterrupt) as caught:
        quiet(small_model(), data, small_run(save_every=1), run_folder=tmp_path)
    assert not isinstance(caught.value, interrupts.Interrupted)
    assert latest(tmp_path).name == "step_00000002"


def test_without_a_folder_a_signal_acts_at_once():
    def data(step):
        os.kill(os.getpid(), signal.SIGINT)
        return window_batch(TEXT, small_run(), step)

    with pytest.raises(KeyboardInterrupt):
        quiet(small_model(), data, small_run())


# What stops a run


def poison(step_of_poison, name):
    """An objective whose gradient is NaN for one parameter and those before it in one step."""
    calls = []

    def objective(model, batch):
        calls.append(1)
        loss, count = causal_objective(model, batch)
        if len(calls) == step_of_poison:
            param = dict(model.named_parameters())[name]
            loss = loss + (param.sum() - param.sum().detach()).abs().sqrt()  # slope of sqrt at 0
        return loss, count

    return objective


def test_gradients_that_are_not_finite_stop_the_run_with_its_numbers(tmp_path):
    model = small_model()
    seen = []

    def data(step):
        seen.append(weights(model).clone())
        return window_batch(TEXT, small_run(), step)

    name = "blocks.1.feed_forward.up_proj.weight"
    with pytest.raises(InputError) as caught:
        quiet(
            model,
            data,
            small_run(save_every=3),
            objective=poison(6, name),
            run_folder=tmp_path,
        )
    given = caught.value.given
    assert "step 6: loss 2." in given
    assert "learning rate 0.0" in given
    assert "gradient norm nan" in given
    assert f"first not finite in {name}" in given
    assert f"the last good checkpoint is {tmp_path / 'step_00000003'}" in given
    assert "lower peak_lr" in caught.value.change
    assert torch.equal(weights(model), seen[5])
    assert read_history(tmp_path).steps == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_loss_that_is_not_finite_stops_the_run_before_weights_change(precision):
    model = small_model()
    before = weights(model)

    def objective(model, batch):
        loss, count = causal_objective(model, batch)
        return loss * math.inf, count

    with pytest.raises(InputError, match="step 1: loss inf") as caught:
        quiet(model, TEXT, small_run(precision=precision), objective=objective)
    assert "no run_folder, so no checkpoint" in caught.value.given
    assert torch.equal(weights(model), before)


def test_a_learning_rate_far_too_high_ends_in_that_message():
    with pytest.raises(InputError, match="lower peak_lr"):
        quiet(
            small_model(),
            TEXT,
            small_run(peak_lr=1e30, optimizer="sgd", clip_norm=None, num_steps=50),
        )


def test_a_disk_that_fills_up_stops_the_run_and_leaves_the_last_good_checkpoint(
    tmp_path, monkeypatch
):
    def full(path, *_):
        if "step_00000008" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *_)

    write = checkpoint.write_tensors
    whole, cut = small_model(), small_model()
    quiet(whole, TEXT, small_run())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", full)
        with pytest.raises(InputError, match="No space left") as caught:
            quiet(cut, TEXT, small_run(save_every=4), run_folder=tmp_path)
    assert f"last good checkpoint is {tmp_path / 'step_00000004'}" in caught.value.given
    quiet(cut, TEXT, small_run(save_every=4), run_folder=tmp_path)
    assert torch.equal(weights(cut), weights(whole))


@pytest.mark.parametrize("size", ["60k", "100k", "200k"])
def test_a_disk_that_is_really_full_stops_the_run_and_it_goes_on_elsewhere(tmp_path, size):
    whole, cut, again = small_model(), small_model(), small_model(seed=3)
    config = small_run(save_every=1, keep_checkpoints=3)
    quiet(whole, TEXT, config)
    with small_disk(tmp_path, size) as disk:
        with pytest.raises(InputError, match="No space left .*; the last good"):
            quiet(cut, TEXT, config, run_folder=disk / "run")
        shutil.copytree(disk / "run", tmp_path / "moved")
    quiet(again, TEXT, config, run_folder=tmp_path / "moved")
    assert torch.equal(weights(again), weights(whole))


def test_a_disk_that_fills_up_between_checkpoints_stops_the_run_with_a_message(tmp_path):
    def fill(record):
        if record["step"] == 3:
            with (disk / "filler").open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass

    config = small_run(num_steps=60)  # so many lines do not fit into the block that the file has
    with small_disk(tmp_path, "200k") as disk:
        with pytest.raises(InputError, match="history.jsonl: No space left.*checkpoints are"):
            quiet(small_model(), TEXT, config, run_folder=disk / "run", watch=fill)
        assert latest(disk / "run").name == "step_00000000"
        assert 3 < len(read_history(disk / "run").steps) < 60


def test_two_processes_cannot_train_into_one_folder(tmp_path):
    program = (
        "import pathlib, sys\n"
        "from slimlab.train.run_folder import only_writer\n"
        "with only_writer(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=f"in use by process {other.pid}"):
            quiet(small_model(), TEXT, small_run(), run_folder=tmp_path)
        other.kill()
        other.wait()
    quiet(small_model(), TEXT, small_run(), run_folder=tmp_path)


@pytest.mark.parametrize(
    ("data", "changes", "options", "words"),
    [
        (torch.tensor([3, 11] * 9), {}, {}, "from 0 to 10.*9 ids outside it, the first of them"),
        (torch.tensor([3, -1] * 9), {}, {}, "9 ids outside it"),
        (TEXT[:7], {}, {}, "at least seq_len"),
        (TEXT, {"seq_len": 9}, {}, None),
        (TEXT, {"device": "cuda:77"}, {}, "install a PyTorch built for that device"),
        (TEXT, {"device": "fast"}, {}, 'give device="auto"'),
        (TEXT, {}, {"held_out": [1, 2, 12]}, "1 ids outside"),
        (TEXT, {}, {"held_out": [1]}, "at least seq_len"),
        (TEXT, {}, {"run_folder": "/dev/null/run"}, "a folder for the run"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(data, changes, options, words):
    model = small_model(**({} if words else {"positions": "learned"}))
    before = weights(model)
    with pytest.raises(InputError, match=f"(?s){words or 'seq_len|positions'}"):
        quiet(model, data, small_run(**changes), **options)
    assert torch.equal(weights(model), before)


def test_a_model_of_16_bits_or_without_recomputation_is_refused():
    with pytest.raises(InputError, match="16 bits or fewer in embedding"):
        quiet(small_model().bfloat16(), TEXT, small_run())
    bare = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 11))
    with pytest.raises(InputError, match='give recompute="none"'):
        quiet(bare, TEXT, small_run(recompute="block"))
    assert len(quiet(bare, TEXT, small_run()).records) == 12


def test_history_json_lines_can_be_read_by_any_program(tmp_path):
    quiet(small_model(), TEXT, small_run(), held_out=HELD_OUT, run_folder=tmp_path)
    last = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
    assert set(last) == {
        "step", "loss", "lr", "grad_norm", "num_tokens", "seconds", "validation_loss",
    }  # fmt: skip
