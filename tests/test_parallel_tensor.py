"""Tensor parallelism equals one process and DTensor; its calls and its bytes are predicted."""

import comm_runtimes
import pytest
import torch
from parallel_cases import (
    BOUND,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    tiny_model,
    zero_gradient_names,
)
from tensor_cases import (
    FIRST,
    GPT,
    LLAMA,
    MULTI_QUERY,
    SIZES,
    adjoint_errors,
    batch_of,
    counted,
    one_step,
    serial,
    train,
)

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.config import InputError, ModelConfig
from slimlab.parallel.data import DataParallel
from slimlab.parallel.layout import SEQUENCE_PARALLEL, Layout
from slimlab.parallel.mesh import Mesh, MeshShape
from slimlab.parallel.tensor import tensor_parallel, whole_logits
from slimlab.parallel.tensor_loss import tensor_parallel_objective, vocabulary_parallel_loss
from slimlab.parallel.tensor_state import (
    clip_whole_gradients,
    gather_state,
    gather_whole,
    load_state,
)
from slimlab.plan.tensor_parallel import (
    local_param_shapes,
    local_state_bytes,
    predict_clip,
    predict_start,
    predict_step,
)
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective, token_loss
from slimlab.train.optimizer import clip_gradients

MODES = {"activations replicated": {}, "sequence cut": {"sequence_parallel": True}}
HEADS = (("heads", "tensor"), ("kv_heads", "tensor"))
LAYOUTS = {
    "heads": (HEADS, ("heads",)),
    "feed_forward": ((("feed_forward", "tensor"),), ("feed_forward",)),
    "vocabulary": ((("vocabulary", "tensor"),), ("vocabulary",)),
    "blocks": ((*HEADS, ("feed_forward", "tensor")), ("heads", "feed_forward")),
}


def check_runs(results, choices):
    expected = serial(choices)
    for found in results:
        check_same_run(found, expected, zero_gradient_names(tiny_model(**choices)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("world_size", "choices"),
    [(1, GPT), (2, GPT), (3, GPT), (4, GPT), (2, LLAMA), (4, LLAMA), (3, MULTI_QUERY), (2, FIRST)],
)
def test_losses_gradients_and_weights_equal_one_process(world_size, choices, mode):
    check_runs(run_ranks(train, world_size, args=(choices, MODES[mode])), choices)


def test_eight_ranks_of_which_four_share_a_key_head_equal_one_process():
    sizes = {"vocab_size": 16, "d_model": 16, "num_heads": 8, "d_ff": 16, "num_layers": 1}
    choices = {**LLAMA, **sizes}
    check_runs(run_ranks(train, 8, args=(choices, {})), choices)


def train_in_groups(comm):
    """Adjoints and trainings in groups of 4, of 3 and 1, and of 2 ranks."""
    found = []
    for color in (0, comm.rank // 3, comm.rank // 2):
        group = comm.split(color)
        errors = adjoint_errors(group)
        runs = [
            (choices, train(group, choices, options))
            for choices in ([GPT] if group.world_size == 3 else [GPT, LLAMA])
            for options in MODES.values()
        ]
        found.append((group.world_size, errors, runs))
    return found


@pytest.mark.parametrize("runtime", ["gloo", "mpich", "openmpi"])
def test_processes_equal_one_process_in_groups_of_one_two_three_and_four(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(train_in_groups, 4, backend=backend)
    expected = {id(choices): serial(choices) for choices in (GPT, LLAMA)}
    sizes = set()
    for groups in results:
        for world_size, errors, runs in groups:
            sizes.add(world_size)
            assert max(errors.values()) < 1e-14, errors
            for choices, found in runs:
                one = GPT if choices == GPT else LLAMA
                check_same_run(found, expected[id(one)], zero_gradient_names(tiny_model(**one)))
    assert sizes == {1, 2, 3, 4}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_collective_is_the_transpose_of_its_backward_pass(world_size):
    for errors in run_ranks(adjoint_errors, world_size):
        assert max(errors.values()) < 1e-14, errors
