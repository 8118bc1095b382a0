"""Sharded checkpoints: other ranks, other stages, one process; what is damaged or of others."""

import json
import multiprocessing
import os
import re

import comm_runtimes
import pytest
import torch
from parallel_cases import (
    BATCH_SIZE,
    CHOICES,
    LR,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    serial_run,
    tiny_batch,
    tiny_model,
    zero_gradient_names,
)
from torch import nn

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError
from slimlab.model.tensor_files import read_tensors
from slimlab.parallel import zero_checkpoint
from slimlab.parallel.zero import Zero
from slimlab.parallel.zero_checkpoint import load_whole
from slimlab.plan.data_parallel import shard_sizes
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.checkpoint import save_checkpoint
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import make_optimizer


def my_part(comm, step):
    sizes = shard_sizes(BATCH_SIZE, comm.world_size)
    start = sum(sizes[: comm.rank])
    return tuple(one[start : start + sizes[comm.rank]] for one in tiny_batch(step))


def sharded_model(comm, stage=3, frozen=(), **options):
    model = tiny_model(seed=comm.rank)
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return Zero(model, comm, stage=stage, **{"lr": LR, **options})


def one_step(zero, step):
    loss, _ = zero.gradients(my_part(zero.comm, step), causal_objective)
    grads = zero.full_gradients()
    zero.step()
    return float(loss), grads


def save_run(comm, stage, folder, num_steps=2, options=None):
    zero = sharded_model(comm, stage, **(options or {}))
    for step in range(num_steps):
        one_step(zero, step)
    return zero.save(folder, num_steps, extra={"epoch": 7})


def go_on(comm, stage, path, options=None):
    """The third step, from a checkpoint of two; the settings come from there."""
    zero = sharded_model(comm, stage, **{"lr": 1.0, "weight_decay": 0.5, **(options or {})})
    found = zero.load(path)
    loss, grads = one_step(zero, 2)
    return found, ([loss], [grads], zero.full_weights())


def third_step():
    losses, grads, weights = serial_run(tiny_model())
    return losses[2:], grads[2:], weights


def check_third_step(found):
    check_same_run(found, third_step(), zero_gradient_names(tiny_model()))


def plain_run(folder):
    """A checkpoint of one process after two steps."""
    model = tiny_model()
    optimizer = optimizer_of(model)
    for step in range(2):
        accumulate_gradients(model, tiny_batch(step), causal_objective)
        optimizer.step()
    return save_checkpoint(folder, model=model, optimizer=optimizer, step=2, extra={"epoch": 7})


CHANGES = [(1, 2, 3, 3), (3, 3, 2, 1), (3, 4, 2, 8), (2, 3, 1, 2), (1, 4, 3, 1)]


@pytest.mark.parametrize(("stage", "world_size", "next_stage", "next_size"), CHANGES)
def test_a_run_goes_on_with_other_ranks_in_another_stage(
    stage, world_size, next_stage, next_size, tmp_path
):
    paths = run_ranks(save_run, world_size, args=(stage, tmp_path))
    assert set(paths) == {tmp_path / "step_00000002"}
    for found, run in run_ranks(go_on, next_size, args=(next_stage, tmp_path)):
        assert found == (2, {"epoch": 7})
        check_third_step(run)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_of_one_process_goes_on_in_shards(stage, tmp_path):
    plain_run(tmp_path)
    for found, run in run_ranks(go_on, 3, args=(stage, tmp_path)):
        assert found == (2, {"epoch": 7})
        check_third_step(run)


@pytest.mark.parametrize(("stage", "world_size"), [(1, 3), (3, 2), (2, 1)])
def test_a_sharded_checkpoint_goes_on_in_one_process(stage, world_size, tmp_path):
    run_ranks(save_run, world_size, args=(stage, tmp_path))
    model = tiny_model(seed=9)
    optimizer = make_optimizer("adamw", model, lr=1.0)
    assert load_whole(tmp_path, model, optimizer) == (2, {"epoch": 7})
    loss, _ = accumulate_gradients(model, tiny_batch(2), causal_objective)
    grads = copy_of_grads(model)
    optimizer.step()
    check_third_step(([float(loss)], [grads], copy_of_weights(model)))


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_processes_write_and_read_shards(runtime, tmp_path):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        run_ranks(save_run, 3, backend=backend, args=(3, tmp_path))
        for _, run in run_ranks(go_on, 2, backend=backend, args=(3, tmp_path)):
            check_third_step(run)


@pytest.mark.parametrize(
    "options",
    [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}, {"optimizer": "adamw_own"}],
    ids=str,
)
def test_every_optimizer_goes_on_as_if_it_had_not_stopped(options, tmp_path):
    def program(comm, start):
        zero = sharded_model(comm, 2, **options)
        if start:
            zero.load(start)
        for step in range(2 if start else 0, 3):
            if step == 2 and not start:
                zero.save(tmp_path, 2)
            one_step(zero, step)
        return zero.full_weights()

    (whole,) = run_ranks(program, 1, args=(None,))
    for weights in run_ranks(program, 3, args=(tmp_path,)):
        for name in weights.keys() - set(zero_gradient_names(tiny_model())):
            assert float((weights[name] - whole[name]).abs().max()) < 1e-12, name


def test_frozen_parameters_and_a_run_that_has_not_begun_are_kept(tmp_path):
    frozen = ["embedding.tokens.weight", "blocks.1.attention.q_proj.bias"]

    def program(comm, stage, saves):
        zero = sharded_model(comm, stage, frozen)
        if saves:
            zero.save(tmp_path, 0)
        else:
            zero.load(tmp_path)
            one_step(zero, 0)
        return zero.full_weights()

    before = run_ranks(program, 2, args=(1, True))[0]
    for stage in (2, 3):
        after = run_ranks(program, 3, args=(stage, False))[0]
        changed = [name for name in before if not bool((before[name] == after[name]).all())]
        assert len(changed) == len(before) - len(frozen)
        assert not set(frozen) & set(changed)


def test_every_rank_writes_its_shard_and_no_more(tmp_path):
    (path, *_) = run_ranks(save_run, 4, args=(3, tmp_path))
    names = sorted(os.listdir(path))
    assert names == [*(f"shard_{rank:05d}_of_00004.safetensors" for rank in range(4)), "state.json"]
    counts = [sum(t.numel() for t in read_tensors(path / name).values()) for name in names[:4]]
    num_params = sum(param.numel() for param in tiny_model().parameters())
    assert len(set(counts)) == 1
    assert 3 * num_params <= sum(counts) < 3 * (num_params + 4 * 4)


def test_only_the_newest_checkpoints_stay(tmp_path):
    def program(comm):
        zero = sharded_model(comm)
        return [zero.save(tmp_path, step, keep=2).name for step in (3, 5, 8)]

    run_ranks(program, 2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000005", "step_00000008"]


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_cannot_write_is_named_on_all_and_the_last_good_checkpoint_stays(
    failing, tmp_path, monkeypatch
):
    run_ranks(save_run, 3, args=(3, tmp_path))
    write = zero_checkpoint.write_tensors

    def full_disk(path, tensors):
        if path.name.startswith(f"shard_{failing:05d}") and "00000003" in str(path):
            raise OSError(28, "No space left on device", str(path))
        write(path, tensors)

    monkeypatch.setattr(zero_checkpoint, "write_tensors", full_disk)

    def program(comm):
        zero = sharded_model(comm)
        zero.load(tmp_path)
        with pytest.raises(InputError) as caught:
            zero.save(tmp_path, 3)
        assert os.listdir(tmp_path) == ["step_00000002"] or comm.rank  # rank 0 removes the rest
        zero.save(tmp_path, 4)
        return str(caught.value)

    (text,) = set(run_ranks(program, 3))
    assert "No space left on device" in text
    assert f"(rank {failing})" in text
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000004"]


def test_a_save_that_is_killed_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    run_ranks(save_run, 1, args=(3, tmp_path))

    def killed():
        zero_checkpoint.os.rename = lambda *paths: os._exit(9)
        run_ranks(lambda comm: sharded_model(comm).save(tmp_path, 3), 1)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert sorted(os.listdir(tmp_path)) == [".step_00000003.shards.tmp", "step_00000002"]
    ((found, run),) = run_ranks(go_on, 1, args=(3, tmp_path))
    assert found[0] == 2
    check_third_step(run)
    run_ranks(lambda comm: sharded_model(comm).save(tmp_path, 3), 2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000003"]


def test_a_whole_checkpoint_of_the_step_is_not_written_over_and_a_damaged_one_is(tmp_path):
    def program(comm, refused):
        zero = sharded_model(comm)
        if not refused:
            return zero.save(tmp_path, 2)
        with pytest.raises(InputError, match="a step that is not saved yet"):
            zero.save(tmp_path, 2)

    run_ranks(save_run, 2, args=(3, tmp_path))
    run_ranks(program, 2, args=(True,))
    damage(tmp_path / "step_00000002")
    run_ranks(program, 3, args=(False,))
    assert len(os.listdir(tmp_path / "step_00000002")) == 4


def damage(path):
    shard = sorted(path.glob("shard_00001*"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_or_refused_by_name(tmp_path):
    def program(comm, path, said):
        zero = sharded_model(comm)
        return zero.load(path, said.append)

    def saves(comm):
        zero = sharded_model(comm)
        return [zero.save(tmp_path, step) for step in (2, 5)]

    newest = run_ranks(saves, 2)[0][1]
    damage(newest)
    said = []
    assert run_ranks(program, 3, args=(tmp_path, said)) == [(2, {})] * 3
    assert len(said) == 1
    assert "shard_00001_of_00002.safetensors has the right size, but not its SHA-256" in said[0]

    def refused(comm):
        with pytest.raises(InputError) as caught:
            sharded_model(comm).load(newest)
        return str(caught.value)

    (text,) = set(run_ranks(refused, 2))
    assert f"{newest}: shard_00001" in text
    (newest / "shard_00000_of_00002.safetensors").unlink()
    (text,) = set(run_ranks(refused, 2))
    assert "shard_00000_of_00002.safetensors is missing" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"files": {}}, "state.json does not list shard_00000_of_00002"),
        ({"files": None}, "state.json has no files"),
        ({"step": "5"}, "state.json has no step"),
        ({"groups": None}, "state.json has no groups"),
        ({"world_size": 0}, "state.json does not list shard_00000_of_00000"),
        ({"world_size": 3}, "state.json does not list shard_00000_of_00003"),
    ],
)
def test_a_checkpoint_whose_state_lacks_something_is_passed_over(changes, text, tmp_path):
    def saves(comm):
        zero = sharded_model(comm)
        return [zero.save(tmp_path, step) for step in (2, 5)]

    file = run_ranks(saves, 2)[0][1] / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    said = []
    steps = run_ranks(lambda comm: sharded_model(comm).load(tmp_path, said.append)[0], 2)
    assert steps == [2, 2]
    assert len(said) == 1
    assert text in said[0]


def refusal(comm, path, make):
    """What a rank is told, and whether its weights stayed."""
    zero = make(comm)
    before = zero.full_weights()
    with pytest.raises(InputError) as caught:
        zero.load(path)
    after = zero.full_weights()
    assert all(bool((before[name] == after[name]).all()) for name in before)
    return str(caught.value)


OTHERS = {
    "names": (
        lambda comm: Zero(nn.Linear(2, 2), comm, stage=3, lr=LR),
        r"missing weight, bias; left over (\w+\.\S+, ){3}\w+\.\S+ and 32 more \(rank 0\)",
    ),
    "shapes": (
        lambda comm: Zero(tiny_model(**CHOICES, d_ff=12), comm, stage=1, lr=LR),
        r"blocks\.0\.feed_forward\.up_proj\.weight \(12, 8\) torch\.float64\ngiven: .*\(32, 8\)",
    ),
    "dtypes": (
        lambda comm: Zero(tiny_model().float(), comm, stage=2, lr=LR),
        r"embedding\.tokens\.weight \(11, 8\) torch\.float32\ngiven: .*float64",
    ),
    "optimizer": (
        lambda comm: sharded_model(comm, optimizer="sgd"),
        r"a state of momentum_buffer\ngiven: .*exp_avg, exp_avg_sq",
    ),
    "groups": (
        lambda comm: sharded_model(comm, frozen=["embedding.tokens.weight"]),
        r"an optimizer state of \d+ parameters in 2 groups",
    ),
    "decaying tables": (
        lambda comm: sharded_model(comm, decay_embeddings=False),
        r"give decay_embeddings as in the run that saved",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("plain", [False, True], ids=["sharded", "of one process"])
def test_a_checkpoint_of_another_model_is_refused_with_the_names(other, plain, tmp_path):
    make, pattern = OTHERS[other]
    if plain:
        plain_run(tmp_path)
    else:
        run_ranks(save_run, 2, args=(3, tmp_path))
    (text,) = set(run_ranks(refusal, 2, args=(tmp_path, make)))
    assert re.search(pattern, text), text


def test_one_process_refuses_a_checkpoint_of_another_model_and_stays_as_it_was(tmp_path):
    run_ranks(save_run, 2, args=(3, tmp_path))
    model = nn.Linear(2, 2)
    before = copy_of_weights(model)
    with pytest.raises(InputError, match="missing weight, bias; left over embedding"):
        load_whole(tmp_path, model)
    assert all(bool((before[name] == one).all()) for name, one in copy_of_weights(model).items())
    frozen = tiny_model()
    frozen.get_parameter("embedding.tokens.weight").requires_grad_(False)
    with pytest.raises(InputError, match="an optimizer state of"):
        load_whole(tmp_path, frozen, optimizer_of(frozen))


def test_an_optimizer_that_updated_parts_of_a_model_more_often_is_refused(tmp_path):
    model = tiny_model()
    optimizer = optimizer_of(model)
    for step in range(2):
        accumulate_gradients(model, tiny_batch(step), causal_objective)
        if step:
            model.final_norm.bias.grad = None
        optimizer.step()
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=2)
    (text,) = set(run_ranks(refusal, 2, args=(tmp_path, sharded_model)))
    assert "fewer steps for final_norm.bias" in text


def test_a_folder_without_a_checkpoint_is_refused_on_every_rank(tmp_path):
    (text,) = set(run_ranks(refusal, 2, args=(tmp_path, sharded_model)))
    assert "which holds nothing (rank 0)" in text
    (text,) = set(run_ranks(refusal, 2, args=(tmp_path / "none", sharded_model)))
    assert "which does not exist (rank 0)" in text


@pytest.mark.parametrize(("step", "keep"), [(-1, 2), (2, 0), (1.5, 2)])
def test_numbers_that_do_not_fit_are_refused_before_anything_is_sent(step, keep, tmp_path):
    def program(comm):
        zero = sharded_model(comm)
        before = comm.ledger.num_calls()
        with pytest.raises(InputError):
            zero.save(tmp_path, step, keep=keep)
        return comm.ledger.num_calls() - before

    assert run_ranks(program, 2) == [0, 0]
    assert os.listdir(tmp_path) == []


def test_loading_leaves_the_memory_of_a_stage_as_it_was(tmp_path):
    run_ranks(save_run, 2, args=(1, tmp_path))

    def program(comm):
        zero = sharded_model(comm)
        zero.load(tmp_path)
        held = zero.held_bytes()
        assert held["gathered_peak"] == 0
        assert held["optimizer"] <= 2 * held["weights"]
        return all(param.isnan().all() for param in zero.model.parameters())

    assert run_ranks(program, 3) == [True] * 3
    assert torch.is_grad_enabled()
