"""Soft targets on disk: they teach as the teacher does, and only what they were made for."""

import json
import os

import pytest
import torch
from distill_cases import TEXT, V, student, teacher
from parallel_cases import copy_of_grads
from safetensors.torch import load_file

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError, TrainingConfig
from slimlab.parallel.data import DataParallel
from slimlab.parallel.tensor import tensor_parallel
from slimlab.slim.distill import DistillationObjective
from slimlab.slim.distill_cache import TABLE, TENSORS, cache_teacher, load_teacher_cache
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.loop import train

SETTINGS = {"seq_len": 5, "distill_temperature": 2.0}
NUM_WINDOWS = (len(TEXT) - 1) // 5


def cached(folder, top_k=V, big=None, **changes):
    return cache_teacher(folder / "soft", big or teacher(), TEXT, top_k=top_k, **SETTINGS | changes)


def same(first, second):
    parts = zip(
        (first.inputs, first.targets, *first.soft[1:]),
        (second.inputs, second.targets, *second.soft[1:]),
    )
    return first.about == second.about and all(
        (a is None and b is None) or (torch.equal(a, b) and a.dtype == b.dtype) for a, b in parts
    )


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("top_k", [V, V - 1])
def test_all_tokens_kept_teach_as_the_teacher_on_the_fly(tmp_path, top_k, divergence):
    cache = cached(tmp_path, top_k)
    choices = {"soft_weight": 0.7, "divergence": divergence}
    live = DistillationObjective(teacher(), distill_temperature=2, **choices)
    for step in range(2):
        batch, results = cache.batches(4)(step), []
        for objective, part in ((live, batch[:2]), (cache.objective(**choices), batch)):
            small = student()
            loss, count = accumulate_gradients(small, part, objective, 3)
            assert count == 4 * 5
            results.append((loss, copy_of_grads(small)))
        (first, grads), (second, others) = results
        assert torch.allclose(first, second, rtol=1e-12)
        assert all(torch.allclose(grads[n], others[n], rtol=1e-9, atol=1e-13) for n in grads)


def test_fewer_tokens_give_another_loss_of_at_most_the_same_size(tmp_path):
    found = []
    for top_k in (2, V):
        (tmp_path / str(top_k)).mkdir()
        cache = cached(tmp_path / str(top_k), top_k)
        found.append(cache.objective(soft_weight=1)(student(), cache.batches(6)(0))[0].item())
    assert 0 < found[0] < found[1]


@pytest.mark.parametrize("top_k", [1, 3, V])
def test_what_is_read_is_what_was_made_bit_for_bit(tmp_path, top_k):
    made = cached(tmp_path, top_k)
    assert same(made, load_teacher_cache(tmp_path / "soft", TEXT.tolist(), teacher()))
    assert same(made, load_teacher_cache(tmp_path / "soft", TEXT))
    assert made.soft.log_probs.shape == (NUM_WINDOWS, 5, top_k)
    assert sorted(os.listdir(tmp_path)) == ["soft"]
    assert sorted(os.listdir(tmp_path / "soft")) == [TABLE, TENSORS]


def test_a_position_costs_8_bytes_per_token_that_is_kept_and_4_for_the_rest(tmp_path):
    cached(tmp_path, 3, big=teacher().float())
    tensors = load_file(tmp_path / "soft" / TENSORS)
    found = sum(one.numel() * one.itemsize for one in tensors.values())
    assert found == NUM_WINDOWS * 5 * (8 * 3 + 4)
    header = 8 + int.from_bytes((tmp_path / "soft" / TENSORS).read_bytes()[:8], "little")
    assert os.path.getsize(tmp_path / "soft" / TENSORS) == header + found


def test_the_batch_size_of_the_teacher_changes_nothing_but_rounding(tmp_path):
    (tmp_path / "one").mkdir()
    first, second = cached(tmp_path), cached(tmp_path / "one", batch_size=1)
    assert torch.allclose(first.soft.log_probs, second.soft.log_probs, rtol=1e-12)
    assert torch.equal(first.soft.ids, second.soft.ids)


def test_windows_lie_side_by_side_and_targets_are_one_later(tmp_path):
    cache = cached(tmp_path)
    assert torch.equal(cache.inputs.flatten(), TEXT[: NUM_WINDOWS * 5])
    assert torch.equal(cache.targets.flatten(), TEXT[1 : NUM_WINDOWS * 5 + 1])


def test_the_teacher_is_in_its_mode_afterwards_and_drew_no_dropout(tmp_path):
    big = teacher(dropout=0.5)
    made = cached(tmp_path, big=big)
    assert big.training
    assert all(p.requires_grad for p in big.parameters())
    (tmp_path / "again").mkdir()
    assert same(made, cached(tmp_path / "again", big=big))


def test_a_step_always_draws_the_same_windows_and_another_draws_others(tmp_path):
    cache = cached(tmp_path)
    drawn = [cache.batches(6, seed)(step)[0] for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_a_student_is_trained_without_the_teacher_at_hand(tmp_path):
    cached(tmp_path, 4)
    cache = load_teacher_cache(tmp_path / "soft", TEXT)
    config = TrainingConfig(num_steps=30, batch_size=6, seq_len=5, peak_lr=0.02, device="cpu")
    objective = cache.objective(soft_weight=0.5)
    history = train(student(), cache.batches(6), config, objective=objective, show=False)
    losses = [record["loss"] for record in history.records]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert cache.about["teacher"] in objective.__name__
    assert "T=2" in objective.__name__


def test_the_cache_of_another_text_or_teacher_is_refused_and_named(tmp_path):
    cached(tmp_path)
    other = TEXT.clone()
    other[-1] += 1
    for ids in (other, TEXT[:-1]):
        with pytest.raises(InputError, match="of this text"):
            load_teacher_cache(tmp_path / "soft", ids, teacher())
    with pytest.raises(InputError, match="of this teacher"):
        load_teacher_cache(tmp_path / "soft", TEXT, student())


def with_replicas(comm, cache):
    model, batch = student(seed=1 + comm.rank), cache.batches(5)(0)
    part = tuple(one[:2] if comm.rank == 0 else one[2:] for one in batch)
    loss, count = DataParallel(model, comm).gradients(part, cache.objective(soft_weight=0.7))
    return float(loss), count, copy_of_grads(model)


def test_replicas_share_a_cache_and_equal_one_process(tmp_path):
    cache, model = cached(tmp_path, 4), student()
    objective = cache.objective(soft_weight=0.7)
    expected, _ = accumulate_gradients(model, cache.batches(5)(0), objective)
    for loss, count, grads in run_ranks(with_replicas, 2, args=(cache,)):
        assert (loss, count) == (pytest.approx(float(expected), rel=1e-12), 25)
        for name, grad in copy_of_grads(model).items():
            assert torch.allclose(grads[name], grad, rtol=1e-9, atol=1e-14), name


def with_cut_student(comm, cache):
    model = tensor_parallel(student(vocab_size=12), comm)
    return float(cache.objective(soft_weight=0.7)(model, cache.batches(3)(0))[0])


def test_a_student_cut_over_ranks_reads_the_cache_too(tmp_path):
    cache = cached(tmp_path, 4, big=teacher(vocab_size=12))
    whole = cache.objective(soft_weight=0.7)(student(vocab_size=12), cache.batches(3)(0))
    for loss in run_ranks(with_cut_student, 2, args=(cache,)):
        assert loss == pytest.approx(float(whole[0]), rel=1e-12)


def cache_of_cut_teacher(comm, folder):
    with pytest.raises(InputError, match="whole on this rank"):
        cached(folder, 2, big=tensor_parallel(teacher(vocab_size=12, num_heads=2), comm))


def test_a_teacher_cut_over_ranks_is_not_cached_in_parts(tmp_path):
    run_ranks(cache_of_cut_teacher, 2, args=(tmp_path,))
    assert os.listdir(tmp_path) == []


def test_a_student_with_another_vocabulary_is_refused(tmp_path):
    cache = cached(tmp_path, 3)
    with pytest.raises(InputError, match="the student's 13 tokens, the teacher's 11"):
        cache.objective(soft_weight=1)(student(vocab_size=13), cache.batches(2)(0))


def test_a_folder_that_is_there_is_not_touched(tmp_path):
    (tmp_path / "soft").mkdir()
    (tmp_path / "soft" / "mine").write_text("keep")
    with pytest.raises(InputError, match="load_teacher_cache"):
        cached(tmp_path)
    assert os.listdir(tmp_path / "soft") == ["mine"]


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 12},
        {"top_k": 0},
        {"distill_temperature": 0},
        {"seq_len": 64},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_bad_settings_leave_nothing_behind(tmp_path, change):
    with pytest.raises(InputError):
        cached(tmp_path, **change)
    assert os.listdir(tmp_path) == []


def test_a_teacher_that_is_not_finite_leaves_nothing_behind(tmp_path):
    big = teacher()
    with torch.no_grad():
        big.lm_head.weight[3] = float("nan")
    with pytest.raises(InputError, match="teacher_logits"):
        cached(tmp_path, big=big)
    assert os.listdir(tmp_path) == []


def test_a_disk_that_cannot_be_written_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slimlab.slim.distill_cache.write_tensors", full)
    with pytest.raises(InputError, match="No space left"):
        cached(tmp_path)
    assert os.listdir(tmp_path) == []


def damaged(folder, how):
    table, tensors = folder / TABLE, folder / TENSORS
    content = json.loads(table.read_text())
    if how == "cut off":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif how == "changed":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    elif how == "missing":
        tensors.unlink()
    elif how == "no table":
        table.unlink()
    elif how == "newer":
        table.write_text(json.dumps({**content, "version": 2}))
    elif how == "no settings":
        table.write_text(json.dumps({**content, "about": {}}))
    else:
        name, value = how
        content["about"][name] = value
        table.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "bytes instead of"),
        ("changed", "SHA-256"),
        ("missing", "is missing"),
        ("no table", "is missing"),
        ("newer", "version 2"),
        ("no settings", "KeyError"),
        (("top_k", 2), "log_rest|log_probs"),
        (("top_k", "3"), "top_k = '3'"),
        (("seq_len", 8.0), "seq_len = 8.0"),
        (("vocab_size", None), "vocab_size = None"),
        (("distill_temperature", 0), "distill_temperature = 0"),
        (("distill_temperature", -1.0), "distill_temperature = -1"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, how, message):
    cached(tmp_path, 3)
    damaged(tmp_path / "soft", how)
    with pytest.raises(InputError, match=message):
        load_teacher_cache(tmp_path / "soft", TEXT)
