"""ZeRO's formulas against the paper's table 1; units and shards of this book's models."""

import math

import pytest
from parallel_cases import tiny_model

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.parallel.zero_units import units_of
from slimlab.plan.params import num_params
from slimlab.plan.training_memory import bytes_per_param
from slimlab.plan.zero import zero_bytes_per_rank, zero_held_bytes, zero_step_calls
from slimlab.plan.zero_units import shard_size, zero_units

# Rajbhandari et al. 2020 (arXiv:1910.02054), table 1: GB on each of DP devices, for stages 1, 2
# and 3. Most were cut off behind the last digit, where 41.25 became 41.3 and 1.875 became 1.88.
TABLE_1 = """
DP    7.5B            128B            1T
1     120 120 120     2048 2048 2048  16000 16000 16000
4     52.5 41.3 30    896 704 512     7000 5500 4000
16    35.6 21.6 7.5   608 368 128     4750 2875 1000
64    31.4 16.6 1.88  536 284 32      4187 2218 250
256   30.4 15.4 0.47  518 263 8       4046 2054 62.5
1024  30.1 15.1 0.12  513 257 2       4011 2013 15.6
"""
NUM_PARAMS = (7.5e9, 128e9, 1e12)


def cells():
    for line in TABLE_1.strip().splitlines()[1:]:
        world_size, *printed = line.split()
        for number, one in enumerate(printed):
            yield int(world_size), NUM_PARAMS[number // 3], number % 3 + 1, one


def test_the_formulas_meet_table_1_of_the_paper_within_one_unit_of_its_last_digit():
    found = list(cells())
    assert len(found) == 54
    for world_size, params, stage, printed in found:
        unit = 10.0 ** -len(printed.partition(".")[2])
        exact_gb = zero_bytes_per_rank(params, world_size, stage) / 1e9
        assert abs(exact_gb - float(printed)) < unit * (1 + 1e-9), (world_size, params, stage)


def test_table_1_is_more_often_cut_off_than_rounded():
    rounded = cut = 0
    for world_size, params, stage, printed in cells():
        scale = 10.0 ** len(printed.partition(".")[2])
        units = zero_bytes_per_rank(params, world_size, stage) / 1e9 * scale
        rounded += abs(round(units) - float(printed) * scale) < 1e-6
        cut += abs(math.floor(units + 1e-9) - float(printed) * scale) < 1e-6
    assert cut > rounded
    assert rounded < len(list(cells()))


def test_stage_0_and_one_rank_are_what_training_needs_anyway():
    for stage in range(4):
        expected = 1000 * bytes_per_param("mixed")
        assert zero_bytes_per_rank(1000, 1, stage) == expected
        assert zero_bytes_per_rank(1000, 64, 0) == expected
    without_masters = {"weight_bytes": 4, "gradient_bytes": 4, "optimizer_bytes": 8}
    assert zero_bytes_per_rank(1000, 4, 3, **without_masters) == 4000


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"tie_embeddings": False, "positions": "rotary"},
        {"kind": "encoder", "num_segments": 2},
        {"kind": "encoder", "norm_place": "post", "tie_embeddings": False},
        {"kind": "encoder_decoder"},
        {"norm_place": "post", "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_units_of_a_configuration_are_those_of_the_model(choices, decay_embeddings):
    config = ModelConfig(vocab_size=11, seq_len=5, d_model=8, num_layers=2, num_heads=2, **choices)
    found = units_of(build_model(config))
    units = zero_units(config, decay_embeddings=decay_embeddings)
    assert [unit.name for unit in units] == [unit.name for unit in found]
    assert [unit.needs for unit in units] == [unit.needs for unit in found]
    assert [unit.lookup_only for unit in units] == [unit.lookup_only for unit in found]
    for unit, one in zip(units, found):
        assert unit.trained == sum(param.numel() for param in one.params.values())
        assert unit.num_trained == len(one.params)
        assert unit.others == sum(
            param.numel()
            for name, param in one.params.items()
            if param.dim() < 2 or (name.startswith("embedding.") and not decay_embeddings)
        )
    assert sum(unit.trained for unit in units) == num_params(config)


def test_shards_are_equal_and_hold_everything():
    for num_elements in range(20):
        for world_size in range(1, 9):
            size = shard_size(num_elements, world_size)
            assert num_elements <= size * world_size < num_elements + world_size


def test_what_is_held_comes_close_to_the_formula_and_the_rest_is_zeros_and_counts():
    config = ModelConfig(vocab_size=1000, seq_len=64, d_model=64, num_layers=4, num_heads=4)
    units, params = zero_units(config), num_params(config)
    for stage in (1, 2, 3):
        for world_size in (1, 2, 3, 8):
            exact = zero_bytes_per_rank(
                params, world_size, stage, weight_bytes=4, gradient_bytes=4, optimizer_bytes=8
            )
            held = [zero_held_bytes(units, world_size, rank, stage) for rank in range(world_size)]
            for one in held:
                kept = one["weights"] + one["gradients"] + one["optimizer"]
                assert abs(kept - exact) <= 16 * world_size * len(units)
                assert one["optimizer_steps"] <= 4 * 2 * len(units)
            # Zeros behind a row have no optimizer state: over all ranks there is 8 per parameter.
            assert sum(one["optimizer"] for one in held) == 8 * params


def test_stage_3_sends_half_as_much_again_and_micro_batches_send_again():
    config = ModelConfig(vocab_size=1000, seq_len=64, d_model=64, num_layers=4, num_heads=4)
    units = zero_units(config)

    def elements(stage, name, **choices):
        calls = zero_step_calls(units, 1, stage, item_bytes=1, **choices)
        return sum(n_bytes for call, n_bytes in calls if call == name)

    params, blocks = num_params(config), sum(u.trained for u in units if "blocks" in u.name)
    for stage in (1, 2):
        assert elements(stage, "reduce_scatter") == elements(stage, "all_gather") == params
    # Neither the head, with which the backward pass begins, nor the table is gathered again.
    assert elements(3, "all_gather") == params + blocks
    assert elements(3, "reduce_scatter") == params
    assert elements(1, "reduce_scatter", num_pieces=4) == params
    assert elements(2, "reduce_scatter", num_pieces=4) == 4 * params
    assert elements(3, "all_gather", num_pieces=4) == 4 * (params + blocks)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda units: zero_bytes_per_rank(1e9, 4, 4), "stage = 4"),
        (lambda units: zero_bytes_per_rank(0, 4, 1), "num_params"),
        (lambda units: zero_bytes_per_rank(1e9, 0, 1), "world_size"),
        (lambda units: zero_held_bytes(units, 2, 2, 1), "rank: 0 to 1"),
        (lambda units: zero_held_bytes(units, 2, 0, 0), "stage = 0"),
        (lambda units: zero_held_bytes(units, 2, 0, 1, optimizer="adam"), "optimizer"),
        (lambda units: zero_step_calls(units, 2, True), "stage = True"),
        (lambda units: zero_units(tiny_model().config, frozen=["head"]), "head"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(call, text):
    with pytest.raises(InputError, match=text):
        call(zero_units(tiny_model().config))
