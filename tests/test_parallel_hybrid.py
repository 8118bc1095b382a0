"""All axes at once equal one process; layouts that cannot be are refused with the nearest."""

import pytest
import torch
from hybrid_cases import GPT, LLAMA, make_hybrid, train, whole_batch, zero_names
from parallel_cases import check_same_run, serial_run, tiny_model

from slimlab.comm.launch import run_ranks
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective
from slimlab.train.optimizer import clip_gradients

LAYOUTS = {
    "data x tensor": {"data": 2, "tensor": 2},
    "data x tensor, ZeRO 1": {"data": 2, "tensor": 2, "zero_stage": 1},
    "data x tensor, ZeRO 2": {"data": 2, "tensor": 2, "zero_stage": 2},
    "data x tensor, ZeRO 3": {"data": 2, "tensor": 2, "zero_stage": 3},
    "data x tensor and sequence, ZeRO 1": {
        "data": 2, "tensor": 2, "sequence_parallel": True, "zero_stage": 1,
    },
    "tensor and sequence": {"tensor": 4, "sequence_parallel": True},
    "data x pipeline": {"data": 2, "pipeline": 2},
    "data x pipeline, ZeRO 1, GPipe": {
        "data": 2, "pipeline": 2, "zero_stage": 1, "schedule": "gpipe",
    },
    "tensor x pipeline": {"tensor": 2, "pipeline": 2},
    "tensor and sequence x pipeline": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def expected():
    found = {}
    for choices in (GPT, LLAMA):
        found[id(choices)] = serial_run(tiny_model(**choices), batch_of=whole_batch)
    return lambda choices: found[id(choices)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_gradients_and_weights_equal_one_process(name, expected):
    parallel = LAYOUTS[name] | {"micro_batch_size": 2}
    for found in run_ranks(train, 4, args=(parallel,)):
        check_same_run(found, expected(GPT), zero_names(GPT))


def clip_once(comm, parallel, choices):
    hybrid = make_hybrid(comm, parallel, choices)
    hybrid.gradients(hybrid.share_of(whole_batch(0)))
    norm = hybrid.clip(0.25)
    return float(norm), hybrid.full_gradients()


@pytest.mark.parametrize("choices", [GPT, LLAMA], ids=["gpt", "key heads copied"])
@pytest.mark.parametrize(
    "parallel",
    [
        {"data": 2, "tensor": 2, "zero_stage": 1},
        {"data": 2, "tensor": 2, "sequence_parallel": True},
        {"tensor": 4, "zero_stage": 3},
        {"pipeline": 2, "tensor": 2, "sequence_parallel": True},
        {"data": 2, "pipeline": 2, "zero_stage": 1},
    ],
)
def test_clipping_counts_every_parameter_once(parallel, choices):
    model = tiny_model(**choices)
    accumulate_gradients(model, whole_batch(0), causal_objective)
    true = float(clip_gradients(model.named_parameters(), 0.25))
    assert true > 0.25
    for norm, grads in run_ranks(clip_once, 4, args=(parallel, choices)):
        assert norm == pytest.approx(true, rel=1e-13)
        for name, param in model.named_parameters():
            assert torch.allclose(grads[name], param.grad, rtol=1e-11, atol=1e-14)
