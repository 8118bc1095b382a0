"""A run goes on in any layout and in one process; what cannot be loaded is refused by all ranks."""

import json

import pytest
import torch
from hybrid_cases import GPT, LLAMA, make_hybrid, whole_batch, zero_names
from parallel_cases import check_same_run, optimizer_of, serial_run, tiny_model

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.parallel.hybrid_checkpoint import load_hybrid, save_hybrid
from slimlab.parallel.zero import Zero
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.checkpoint import load_checkpoint, save_checkpoint
from slimlab.train.objectives import causal_objective

CHAIN = [
    {"data": 2, "tensor": 2, "zero_stage": 1},
    {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "micro_batch_size": 2},
    {"data": 4, "zero_stage": 3},
    {"data": 2, "pipeline": 2, "zero_stage": 1, "micro_batch_size": 2},
    {"tensor": 4},
]


def one_more_step(comm, parallel, choices, folder):
    """Go on from the newest checkpoint, if there is one, make a step, and save."""
    hybrid = make_hybrid(comm, parallel, choices)
    step = load_hybrid(hybrid, folder).data_position if any(folder.iterdir()) else 0
    loss, _ = hybrid.gradients(hybrid.share_of(whole_batch(step)))
    grads = hybrid.full_gradients()
    hybrid.step()
    path = save_hybrid(hybrid, folder, step + 1)
    return float(loss), grads, str(path), hybrid.optimizer.param_groups[0]["lr"]


def continue_alone(choices, folder, step):
    model = tiny_model(seed=9, **choices)
    optimizer = optimizer_of(model)
    found = load_checkpoint(folder, model, optimizer)
    assert found.data_position == step
    loss, _ = accumulate_gradients(model, whole_batch(step), causal_objective)
    grads = {name: param.grad.clone() for name, param in model.named_parameters()}
    optimizer.step()
    save_checkpoint(folder, model=model, optimizer=optimizer, step=step + 1)
    return float(loss), grads, model


@pytest.mark.parametrize("choices", [GPT, LLAMA], ids=["gpt", "key heads copied"])
def test_a_run_goes_on_under_other_layouts_and_in_one_process(choices, tmp_path):
    losses, grads = [], []
    for step, parallel in enumerate(CHAIN):
        results = run_ranks(one_more_step, 4, args=(parallel, choices, tmp_path))
        assert {loss for loss, *_ in results} == {results[0][0]}
        assert {path for *_, path, _ in results} == {str(tmp_path / f"step_{step + 1:08d}")}
        losses.append(results[0][0])
        grads.append(results[0][1])
    loss, last, model = continue_alone(choices, tmp_path, len(CHAIN))
    weights = {name: param.detach() for name, param in model.named_parameters()}
    expected = serial_run(tiny_model(**choices), num_steps=len(CHAIN) + 1, batch_of=whole_batch)
    found = [*losses, loss], [*grads, last], weights
    check_same_run(found, expected, zero_names(choices))


@pytest.mark.parametrize("parallel", [CHAIN[0], CHAIN[1]], ids=["ZeRO 1", "pipeline"])
def test_a_checkpoint_of_one_process_is_cut(parallel, tmp_path):
    model = tiny_model(**GPT)
    optimizer = optimizer_of(model)
    for step in range(2):
        accumulate_gradients(model, whole_batch(step), causal_objective)
        optimizer.step()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.5
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=2)
    expected = continue_alone(GPT, tmp_path, 2)
    (tmp_path / "step_00000003").rename(tmp_path / "later")
    for loss, grads, _, lr in run_ranks(one_more_step, 4, args=(parallel, GPT, tmp_path)):
        assert loss == pytest.approx(expected[0], rel=1e-13)
        assert lr == 0.5
        for name, true in expected[1].items():
            assert torch.allclose(grads[name], true, rtol=1e-11, atol=1e-14)


def save_shards(comm, folder):
    zero = Zero(tiny_model(**GPT), comm, stage=2, lr=1e-2)
    batch = whole_batch(0)
    zero.gradients(tuple(one[comm.rank :: comm.world_size] for one in batch), causal_objective)
    zero.step()
    zero.save(folder, 1)


def test_shards_of_zero_are_loaded_into_a_mesh(tmp_path):
    run_ranks(save_shards, 3, args=(tmp_path,))
    expected = serial_run(tiny_model(**GPT), num_steps=2, batch_of=whole_batch)
    parallel = {"tensor": 2, "pipeline": 2}
    for loss, grads, *_ in run_ranks(one_more_step, 4, args=(parallel, GPT, tmp_path)):
        found = [expected[0][0], loss], [expected[1][0], grads], expected[2]
        check_same_run(found, expected, zero_names())


def refuse(comm, parallel, choices, folder):
    hybrid = make_hybrid(comm, parallel, choices)
    before = hybrid.full_weights()
    with pytest.raises(Exception) as caught:
        load_hybrid(hybrid, folder)
    after = hybrid.full_weights()
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


def saved(comm, folder):
    hybrid = make_hybrid(comm, CHAIN[0])
    hybrid.gradients(hybrid.share_of(whole_batch(0)))
    hybrid.step()
    return str(save_hybrid(hybrid, folder, 1, config={"notes": {"text": "abc"}}))


@pytest.mark.parametrize("parallel", CHAIN[:2], ids=["ZeRO 1", "pipeline"])
def test_another_model_is_refused_with_names_and_nothing_changed(parallel, tmp_path):
    run_ranks(saved, 4, args=(tmp_path,))
    for text, same in run_ranks(refuse, 4, args=(parallel, LLAMA, tmp_path)):
        assert "left over blocks.0.attention_norm.bias" in text or "missing blocks.0" in text
        assert same
    wider = GPT | {"d_ff": 48}
    for text, same in run_ranks(refuse, 4, args=(parallel, wider, tmp_path)):
        assert "blocks.0.feed_forward.up_proj.weight (48, 24)" in text
        assert same


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_taken(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        run_ranks(saved, 4, args=(folder,))
    path = tmp_path / "a" / "step_00000001"
    file = path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    for text, same in run_ranks(refuse, 4, args=(CHAIN[1], GPT, path)):
        assert "optimizer.safetensors has" in text
        assert same
    (tmp_path / "b" / "step_00000002").mkdir()
    results = run_ranks(one_more_step, 4, args=(CHAIN[1], GPT, tmp_path / "b"))
    assert results[0][2].endswith("step_00000002")


def save_twice(comm, folder):
    hybrid = make_hybrid(comm, CHAIN[0])
    save_hybrid(hybrid, folder, 0)
    save_hybrid(hybrid, folder, 0)


def test_a_step_that_is_saved_already_is_refused_on_every_rank(tmp_path):
    with pytest.raises(RankError, match="a step that is not saved yet"):
        run_ranks(save_twice, 4, args=(tmp_path,))
    assert [one.name for one in tmp_path.iterdir()] == ["step_00000000"]


def test_a_checkpoint_is_that_of_one_process_with_its_place_in_the_data(tmp_path):
    path = run_ranks(saved, 4, args=(tmp_path,))[0]
    found = load_checkpoint(path, tiny_model(seed=3, **GPT))
    assert (found.step, found.data_position, found.config["notes"]) == (1, 1, {"text": "abc"})
    groups = json.loads((tmp_path / "step_00000001" / "state.json").read_text())["optimizer"]
    assert [one["settings"]["weight_decay"] for one in groups["groups"]] == [0.1, 0.0]
