"""What tensor parallelism sends and holds is what slimlab.plan.tensor_parallel says, exactly."""

import pytest
from parallel_cases import tiny_model
from tensor_cases import FIRST, GPT, LLAMA, MULTI_QUERY, counted, one_step

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError, ModelConfig
from slimlab.parallel.layout import Layout
from slimlab.parallel.tensor import tensor_parallel
from slimlab.plan.tensor_parallel import (
    local_param_shapes,
    local_state_bytes,
    predict_start,
    predict_step,
)
from slimlab.plan.training_memory import state_bytes

SIZE = {"batch_size": 5, "seq_len": 12, "item_bytes": 8}
HEADS = (("heads", "tensor"), ("kv_heads", "tensor"))
RULES = {"heads": HEADS, "feed_forward": (("feed_forward", "tensor"),)}
RULES["vocabulary"] = (("vocabulary", "tensor"),)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    ("world_size", "choices"), [(1, GPT), (2, GPT), (3, MULTI_QUERY), (4, LLAMA), (2, FIRST)]
)
def test_calls_and_bytes_of_a_step_are_those_predicted(
    world_size, choices, sequence_parallel, recompute
):
    options = {"sequence_parallel": sequence_parallel}
    config = ModelConfig(**choices)
    step = predict_step(config, world_size=world_size, recompute=recompute, **options, **SIZE)
    held = local_state_bytes(config, world_size)
    # The plan's precision has 4 bytes per element, here are 8; steps are counted in 4 bytes always.
    held = {name: n if name == "optimizer_steps" else 2 * n for name, n in held.items()}
    for start, forward, backward, found in run_ranks(
        one_step, world_size, args=(choices, options, recompute)
    ):
        if config.positions != "sinusoidal":
            assert start == list(predict_start(config, 8))
        assert forward == list(step.forward)
        assert counted(backward) == counted(step.backward + step.gradients)
        if not step.gradients:
            assert backward == list(step.backward)
        assert found == held
    assert step.num_calls == len(step.forward) + len(step.backward) + len(step.gradients)
    assert step.payload_bytes == sum(n for _, n in (*forward, *backward))


@pytest.mark.parametrize(
    "cut", [("heads",), ("feed_forward",), ("vocabulary",), ("heads", "feed_forward"), ()]
)
def test_parts_that_are_cut_alone_are_predicted_too(cut):
    layout = Layout(tuple(rule for part in cut for rule in RULES[part]))
    step = predict_step(ModelConfig(**GPT), world_size=2, cut=cut, **SIZE)
    shapes = local_param_shapes(ModelConfig(**GPT), 2, cut=cut)

    def program(comm):
        found = one_step(comm, GPT, {"layout": layout})[1:3]
        model = tensor_parallel(tiny_model(**GPT), comm, layout=layout)
        return found, {name: tuple(p.shape) for name, p in model.named_parameters()}

    for found, names in run_ranks(program, 2):
        assert found == (list(step.forward), list(step.backward))
        assert names == shapes
        assert list(names) == list(shapes)


def test_a_block_sends_two_sums_each_way_whatever_the_number_of_ranks():
    config = ModelConfig(vocab_size=50257, seq_len=1024, d_model=768, num_layers=12, num_heads=12)
    sizes = {"batch_size": 8, "seq_len": 1024, "item_bytes": 2, "cut": ("heads", "feed_forward")}
    for world_size in (2, 3, 4, 6, 12):
        step = predict_step(config, world_size=world_size, **sizes)
        assert step.forward == step.backward == (("all_reduce", 8 * 1024 * 768 * 2),) * 24


def test_sequence_parallelism_moves_as_many_bytes_over_a_ring():
    # A ring's all_reduce sends 2 (w - 1) / w of its payload, a reduce_scatter (w - 1) / w of it,
    # an all_gather (w - 1) times the part: Korthikanti et al. 2022, section 4.2.2.
    config, sizes = ModelConfig(**GPT), {"cut": ("heads", "feed_forward"), **SIZE}
    for w in (2, 3, 4):
        sent = {"all_reduce": 2 * (w - 1) / w, "reduce_scatter": (w - 1) / w, "all_gather": w - 1}
        whole = predict_step(config, world_size=w, **sizes)
        cut = predict_step(config, world_size=w, sequence_parallel=True, **sizes)
        by_ring = [
            sum(sent[name] * n for name, n in calls)
            for calls in (whole.forward, cut.forward[:-1], whole.backward, cut.backward[:-1])
        ]
        assert by_ring[0] == pytest.approx(by_ring[1], rel=1e-12)
        assert by_ring[2] == pytest.approx(by_ring[3], rel=1e-12)


def test_parts_of_all_ranks_make_the_whole_but_for_what_is_replicated():
    config = ModelConfig(**GPT)
    whole = state_bytes(config)["weights"]
    for world_size in (1, 2, 3, 4, 6, 12):
        shapes = local_param_shapes(config, world_size)
        replicated = [name for name in shapes if "norm" in name or "positions" in name]
        replicated += [n for n in shapes if n.endswith(("out_proj.bias", "down_proj.bias"))]
        twice = sum(4 * _size(shapes[name]) for name in replicated)
        own = local_state_bytes(config, world_size)["weights"]
        assert world_size * own - (world_size - 1) * twice == whole


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"world_size": 5}, "choose world_size from 1, 2, 3, 4, 6, 12"),
        ({"sequence_parallel": True, "seq_len": 11}, "seq_len = 11"),
        ({"cut": ("rows",)}, "each of cut"),
        ({"recompute": "all"}, "recompute"),
        ({"config": ModelConfig(**{**LLAMA}), "world_size": 3}, "num_kv_heads = 2"),
        ({"config": ModelConfig(**{**GPT, "kind": "encoder"})}, "kind = 'encoder'"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, expected):
    given = {"config": ModelConfig(**GPT), "world_size": 2, **SIZE, **change}
    with pytest.raises(InputError, match=expected):
        predict_step(**given)


def _size(shape):
    product = 1
    for one in shape:
        product *= one
    return product
