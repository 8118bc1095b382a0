"""Layouts: what is legal, what a rank holds and sends, what a search finds, `slimlab plan`."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlab.cli import main
from slimlab.commands import planning
from slimlab.config import InputError, ModelConfig
from slimlab.parallel.schedules import gpipe, interleaved, one_forward_one_backward
from slimlab.plan.hardware import find_cluster
from slimlab.plan.known_models import MODELS, find_model
from slimlab.plan.layout_bytes import axis_bytes, step_transfers
from slimlab.plan.layout_memory import (
    all_stage_bytes,
    block_kept_bytes,
    held_micro_batches,
    rank_bytes,
    stage_params,
)
from slimlab.plan.parallel_config import (
    ParallelConfig,
    check_parallel,
    legal_chunks,
    num_micro_batches,
    padded_vocab_size,
    stage_layers,
)
from slimlab.plan.params import num_params
from slimlab.plan.pipeline_schedule import peak_activations
from slimlab.plan.planner import Choices, look_at, plan_layouts
from slimlab.plan.published_runs import (
    RECOMPUTED_FULL,
    RECOMPUTED_SELECTIVE,
    SC21_TABLE_1,
    SC21_TABLE_2,
    gpt_config,
)
from slimlab.plan.software import Software, find_software
from slimlab.plan.zero import zero_bytes_per_rank

A100 = find_cluster("a100-80gb")
OLD = find_software("megatron-2021")
GPT_22B = gpt_config(48, 6144, 64)
GPT_175B = gpt_config(96, 12288, 96)
S, B, H, A, V, L = 2048, 4, 6144, 64, 51200, 48
SMALL = ModelConfig(384, 32, 24, 6, 6, 2, d_ff=36, feed_forward="swiglu", tie_embeddings=False)
LIMIT = 76e9


# Korthikanti et al. 2022 (arXiv:2205.05198), table 2, for t = 8.
@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"tensor": 1}, S * B * H * (34 + 5 * A * S / H)),
        ({}, S * B * H * (10 + 24 / 8 + 5 * A * S / (8 * H))),
        ({"sequence_parallel": True}, S * B * H / 8 * (34 + 5 * A * S / H)),
        ({"recompute": "selective"}, S * B * H * (10 + 24 / 8)),
        ({"recompute": "selective", "sequence_parallel": True}, S * B * H * 34 / 8),
        ({"recompute": "full"}, 2 * S * B * H),
    ],
)
def test_activations_of_a_block_are_those_of_the_paper(sizes, expected):
    parallel = ParallelConfig(**{"tensor": 8, "micro_batch_size": B, **sizes})
    assert block_kept_bytes(GPT_22B, parallel, OLD) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pipeline", [1, 2, 8])
@pytest.mark.parametrize("chunks", [1, 3])
def test_activations_of_the_first_stage_are_those_of_the_paper(pipeline, chunks):
    """Equation 5, section 4.2.3 and section 4.3: sbhL/t (34 + 5as/h), and the ends."""
    if pipeline == 1 and chunks > 1:
        return
    parallel = ParallelConfig(1, pipeline, 8, B, chunks, sequence_parallel=True)
    items = all_stage_bytes(GPT_22B, parallel, 64 * B, OLD)[0]
    cut = 1 + (pipeline - 1) / (pipeline * chunks) if chunks > 1 else 1
    blocks = S * B * H * L / 8 * (34 + 5 * A * S / H) * cut
    ends = S * B * H * L / 8 * pipeline / L * cut
    if pipeline == 1:
        ends += S * B * H / 8 * 4 * (1 + V / H)
    found = items["activations"] + items.get("logits", 0)
    assert found == pytest.approx(blocks + ends, rel=1e-12)


def test_selective_recomputation_with_sequence_parallelism_keeps_a_fifth():
    """Korthikanti et al. 2022, abstract: five times less; figure 1: without, nothing fits 80 GB."""
    for full in RECOMPUTED_FULL:
        none = replace(full.parallel, recompute="none")
        both = replace(none, recompute="selective", sequence_parallel=True)
        before, after = (rank_bytes(full.config, x, full.batch_size, OLD) for x in (none, both))
        assert 4.5 < before["activations"] / after["activations"] < 6.5
        assert sum(after.values()) < LIMIT
        for one in (none, replace(none, sequence_parallel=True)):
            assert sum(rank_bytes(full.config, one, full.batch_size, OLD).values()) > 80e9


@pytest.mark.parametrize("step", [*SC21_TABLE_1, *SC21_TABLE_2, *RECOMPUTED_SELECTIVE])
def test_published_layouts_fit_their_gpus(step):
    items = rank_bytes(step.config, step.parallel, step.batch_size, find_software(step.software))
    assert 30e9 < sum(items.values()) < LIMIT


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_held_micro_batches_are_those_of_the_schedules(stages, micro_batches, chunks):
    if stages == 1:
        chunks = 1
    if chunks > 1:
        micro_batches *= stages
    cases = {"1f1b": one_forward_one_backward, "gpipe": gpipe}
    for name, make in cases.items():
        if chunks > 1:
            schedule = interleaved(stages, micro_batches, chunks)
        else:
            schedule = make(stages, micro_batches)
        parallel = ParallelConfig(1, stages, num_chunks=chunks, schedule=name)
        if chunks > 1 and name == "gpipe":
            continue
        for stage, peak in enumerate(peak_activations(schedule)):
            assert held_micro_batches(parallel, micro_batches, stage) * chunks == peak


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_model_states_are_those_of_the_zero_paper(zero_stage):
    parallel = ParallelConfig(64, 2, 8, zero_stage=zero_stage)
    for stage, items in enumerate(all_stage_bytes(GPT_22B, parallel, 64, OLD)):
        found = sum(items[name] for name in ("weights", "gradients", "optimizer"))
        count = stage_params(GPT_22B, parallel, stage)
        assert found == pytest.approx(zero_bytes_per_rank(count, 64, zero_stage))
        assert ("gathered" in items) == (zero_stage == 3)


@pytest.mark.parametrize("config", [SMALL, GPT_22B, replace(SMALL, tie_embeddings=True)])
@pytest.mark.parametrize("pipeline", [1, 2, 3])
def test_stages_hold_the_model_once_and_a_tied_table_twice(config, pipeline):
    parallel = ParallelConfig(1, pipeline)
    held = sum(stage_params(config, parallel, stage) for stage in range(pipeline))
    twice = config.vocab_size * config.d_model if config.tie_embeddings and pipeline > 1 else 0
    assert held == num_params(config) + twice


def test_the_fullest_stage_is_the_fullest_of_all():
    shorter = replace(GPT_22B, num_layers=46)
    for config, pipeline, chunks in ((GPT_22B, 6, 1), (GPT_22B, 6, 4), (shorter, 8, 1)):
        for recompute in ("none", "full"):
            parallel = ParallelConfig(1, pipeline, 8, 1, chunks, recompute=recompute)
            totals = [sum(x.values()) for x in all_stage_bytes(config, parallel, 24, OLD)]
            assert sum(rank_bytes(config, parallel, 24, OLD).values()) == max(totals)


def test_fused_attention_keeps_no_scores_and_gated_layers_keep_three_tensors():
    parallel, config = ParallelConfig(micro_batch_size=3), replace(SMALL, seq_len=64)
    fused = block_kept_bytes(config, parallel, Software(attention="fused"))
    explicit = block_kept_bytes(config, parallel, Software(attention="explicit"))
    assert explicit - fused == 3 * 64 * 6 * (2 * 64 - 4)
    # Two norms and two inputs, then queries, keys, values and their average, gate, up, product.
    assert fused == 3 * 64 * (4 * 24 * 2 + (2 * 24 + 2 * 8) * 2 + 3 * 36 * 2 + 6 * 4)


def transfers(parallel, batch_size=64, stage=0, software=OLD, config=GPT_22B):
    found = step_transfers(config, parallel, batch_size, software, stage=stage)
    return {(one.axis, one.purpose, one.name): one for one in found}


@pytest.mark.parametrize(("recompute", "passes"), [("none", 4), ("selective", 4), ("full", 6)])
def test_a_block_makes_two_all_reduces_there_and_two_back(recompute, passes):
    parallel = ParallelConfig(2, 2, 8, 4, recompute=recompute)
    one = transfers(parallel)["tensor", "activations", "all_reduce"]
    micro_batches, layers = 8, 24
    assert one.calls == micro_batches * (passes * layers + 1)
    assert one.n_bytes == 2 * B * S * H
    assert one.sent_bytes == one.calls * one.n_bytes * 2 * 7 / 8


def test_sequence_parallelism_sends_as_much_but_for_two_gathers_going_back():
    plain = ParallelConfig(2, 2, 8, 4)
    shared = replace(plain, sequence_parallel=True)
    whole = transfers(plain)["tensor", "activations", "all_reduce"]
    found = transfers(shared)
    gather = found["tensor", "activations", "all_gather"]
    scatter = found["tensor", "activations", "reduce_scatter"]
    assert scatter.calls == whole.calls
    assert gather.calls == whole.calls + 2 * 8 * 24
    extra = gather.sent_bytes + scatter.sent_bytes - whole.sent_bytes
    assert extra == pytest.approx(2 * 8 * 24 * 2 * B * S * H * 7 / 8)


@pytest.mark.parametrize("chunks", [1, 3])
def test_messages_pass_every_cut_once_there_and_once_back(chunks):
    parallel = ParallelConfig(2, 4, 8, 4, chunks)
    calls = {"activations": 0, "gradients": 0}
    for stage in range(4):
        for (axis, purpose, name), one in transfers(parallel, stage=stage).items():
            if (axis, name) == ("pipeline", "send"):
                calls[purpose] += one.calls
                assert one.n_bytes == 2 * B * S * H / 8
    assert calls == {"activations": 8 * (4 * chunks - 1), "gradients": 8 * (4 * chunks - 1)}
    found = transfers(parallel, software=replace(OLD, split_messages=False))
    assert found["pipeline", "activations", "send"].n_bytes == 2 * B * S * H


@pytest.mark.parametrize(("zero_stage", "volume"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_replicas_send_two_or_three_times_the_model(zero_stage, volume):
    """Rajbhandari et al. 2020 (arXiv:1910.02054), section 7, for one micro-batch."""
    parallel = ParallelConfig(16, 1, 8, 4, zero_stage=zero_stage)
    sent = axis_bytes(GPT_22B, parallel, 64, OLD)
    held = 2 * stage_params(GPT_22B, parallel, 0)
    assert sent["data"] == pytest.approx(volume * held * 15 / 16)
    assert sent["pipeline"] == 0


def test_a_tied_table_is_summed_over_the_first_and_the_last_stage():
    parallel = ParallelConfig(1, 3, 8)
    for stage, there in ((0, True), (1, False), (2, True)):
        found = transfers(parallel, stage=stage).get(("pipeline", "tied table", "all_reduce"))
        assert (found is not None) == there
        assert found is None or found.n_bytes == 2 * V * H / 8
    untied = replace(GPT_22B, tie_embeddings=False)
    assert ("pipeline", "tied table", "all_reduce") not in transfers(parallel, config=untied)


def test_layers_divide_evenly_or_with_one_less_on_both_ends():
    assert stage_layers(96, 8, 3) == (12,) * 8
    assert stage_layers(70, 12) == (5, *[6] * 10, 5)  # BLOOM
    assert stage_layers(126, 16, 8) == (7, *[8] * 14, 7)  # Llama 3
    assert legal_chunks(96, 8) == (1, 2, 3, 4, 6, 12)
    with pytest.raises(InputError, match="choose pipeline from 7, 8, 12, 14") as error:
        stage_layers(96, 10)
    assert "96 layers, 10 stages" in str(error.value)
    with pytest.raises(InputError):
        stage_layers(4, 6)  # no stage without layers
    assert padded_vocab_size(50257, 8) == 51200


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 7}, "choose tensor from 4, 6, 8"),
        ({"data": 5}, "choose batch_size from 60, 65"),
        ({"data": 4, "num_chunks": 4, "pipeline": 6}, "a batch of 12 or 18 micro-batches"),
        ({"num_chunks": 2}, "give num_chunks=1"),
        ({"num_chunks": 2, "pipeline": 4, "schedule": "gpipe"}, "give num_chunks=1"),
        ({"pipeline": 50}, "choose pipeline from 48, 49, 96, or"),
        ({"pipeline": 9}, "choose pipeline from 7, 8, 12, 14"),
    ],
)
def test_layouts_that_cannot_be_name_the_nearest(sizes, message):
    config = gpt_config(96, 12288, 24)
    with pytest.raises(InputError, match=message):
        check_parallel(config, ParallelConfig(**sizes), 64)


def test_axes_must_multiply_to_the_gpus_and_words_be_known():
    with pytest.raises(InputError, match="give data=2, for 128 GPUs"):
        check_parallel(GPT_175B, ParallelConfig(3, 8, 8), 66, num_gpus=128)
    odd = replace(GPT_175B, seq_len=2050)
    with pytest.raises(InputError, match="seq_len = 2050, tensor = 4"):
        check_parallel(odd, ParallelConfig(tensor=4, sequence_parallel=True), 8)
    with pytest.raises(InputError, match="a decoder"):
        check_parallel(replace(SMALL, kind="encoder"), ParallelConfig(), 8)
    for sizes in ({"zero_stage": 4}, {"recompute": "block"}, {"schedule": "naive"}, {"data": 0}):
        with pytest.raises(InputError):
            ParallelConfig(**sizes)
    with pytest.raises(InputError, match="sequence_parallel"):
        ParallelConfig(sequence_parallel=1)


def published_choices(step):
    own = step.parallel
    return Choices(
        recompute=(own.recompute,),
        sequence_parallel=(own.sequence_parallel,),
        zero_stage=(own.zero_stage,),
    )


@pytest.mark.parametrize("step", [*SC21_TABLE_1[5:], *SC21_TABLE_2[3:], *RECOMPUTED_SELECTIVE[1:]])
def test_the_search_finds_published_layouts_or_some_a_few_per_cent_better(step):
    software = find_software(step.software)
    number, own = step.parallel.world_size, step.parallel
    choices = published_choices(step)
    found = plan_layouts(
        step.config, A100, number, step.batch_size, software=software, choices=choices
    )  # fmt: skip
    times = {one.parallel: one.time.total_s for one in found.best}
    assert own in times
    assert times[own] < 1.10 * found.best[0].time.total_s
    assert list(times).index(own) < 15
    # Replicas leave tensor parallelism inside a host; without them it may reach for a second one.
    best = found.best[0].parallel
    assert best.tensor in ((4, 8) if own.data > 1 else (4, 8, 16))
    assert best.pipeline > 1


def test_the_search_gives_small_models_to_replicas_alone():
    step = SC21_TABLE_1[0]
    found = plan_layouts(
        step.config, A100, 32, 512, software=OLD, choices=published_choices(step)
    )  # fmt: skip
    assert found.best[0].parallel == step.parallel


def test_every_layout_that_is_offered_is_legal_fits_and_is_timed():
    model = find_model("gpt3-13b")
    found = plan_layouts(model.config, A100, 64, 256, choices=Choices(zero_stage=(0, 1)))
    times = [one.time.total_s for one in found.best]
    assert times == sorted(times)
    assert len(set(map(str, (one.parallel for one in found.best)))) == len(times) > 20
    for one in found.best[:: len(times) // 20]:
        check_parallel(model.config, one.parallel, 256, num_gpus=64)
        assert one.memory_bytes <= found.limit_bytes == LIMIT
        again = look_at(model.config, A100, one.parallel, 256)
        assert (again.items, again.time) == (one.items, one.time)
    refused = {one.reason: one.count for one in found.refused}
    assert refused["more memory than 76.0 GB"] == found.num_layouts - len(found.best)
    assert found.smallest.memory_bytes <= min(one.memory_bytes for one in found.best)


def test_an_exhaustive_search_by_hand_finds_no_better_layout():
    config, best = gpt_config(8, 1024, 16), None
    for tensor in (1, 2, 4, 8, 16):
        for pipeline in (1, 2, 4, 8):
            for data in (1, 2, 4, 8, 16):
                for micro in (1, 2, 4, 8, 16, 32):
                    for chunks in (1, 2, 4, 8):
                        parallel = ParallelConfig(data, pipeline, tensor, micro, chunks)
                        try:
                            check_parallel(config, parallel, 64, num_gpus=16)
                        except InputError:
                            continue
                        one = look_at(config, A100, parallel, 64)
                        if best is None or one.time.total_s < best.time.total_s:
                            best = one
    choices = Choices(recompute=("none",), sequence_parallel=(False,), zero_stage=(0,))
    found = plan_layouts(config, A100, 16, 64, choices=choices)
    assert found.best[0].time.total_s == best.time.total_s


def test_a_model_that_fits_no_layout_is_told_how_many_gpus_would_do():
    with pytest.raises(InputError, match="8 GPUs; the smallest layout needs 394.2 GB") as error:
        plan_layouts(GPT_175B, A100, 8, 1536)
    number = int(error.value.change.split("num_gpus=")[1].split(",")[0])
    assert plan_layouts(GPT_175B, A100, number, 1536).best
    assert number > 8
    with pytest.raises(InputError, match="1 GPU; the smallest layout needs"):
        plan_layouts(GPT_175B, A100, 1, 1536)
    for axis in ("tensor", "pipeline", "data"):
        with pytest.raises(InputError, match=f"given: {axis} = 0"):
            plan_layouts(GPT_175B, A100, 64, 1536, choices=Choices(**{axis: (0,)}))
    with pytest.raises(InputError, match="tensor 2, 4, 8"):
        plan_layouts(GPT_175B, A100, 64, 1536, choices=Choices(tensor=(5,)))
    with pytest.raises(InputError, match="batch_size"):
        plan_layouts(GPT_175B, A100, 64, 5, choices=Choices(tensor=(1,), data=(2,)))
    with pytest.raises(InputError, match="num_gpus"):
        plan_layouts(GPT_175B, A100, 0, 1536)
    with pytest.raises(InputError, match="a decoder"):
        plan_layouts(replace(SMALL, kind="encoder"), A100, 8, 8)
    with pytest.raises(InputError, match="a ModelConfig"):
        plan_layouts("gpt3-175b", A100, 8, 8)


@pytest.mark.parametrize("name", MODELS)
def test_known_models_have_the_size_that_their_names_say(name):
    size = num_params(find_model(name).config)
    said = float(name.split("-")[-1][:-1]) * {"b": 1e9, "t": 1e12}[name[-1]]
    assert size == pytest.approx(said, rel=0.05)


def plan(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_the_command_lists_layouts_and_says_why_others_fail():
    result = plan("--model", "gpt3-13b", "--gpus", 64, "--hardware", "a100-80gb", "--tokens", 3e11)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert "13.0 billion parameters" in lines[0] or "12.9 billion parameters" in lines[0]
    assert lines[3].startswith("tensor  pipeline  data  micro  chunks  recompute  sequence  ZeRO")
    assert lines[3].endswith("days")
    assert "more memory than 76.0 GB" in result.output
    assert "others fail" in result.output


def test_the_command_prints_json_that_is_the_planner_s():
    sizes = ("--tensor", 8, "--pipeline", 12, "--data", 4, "--micro-batch-size", 1)
    rest = ("--num-chunks", 1, "--recompute", "full", "--no-sequence-parallel", "--zero-stage", 0)
    result = plan("--gpus", 384, *sizes, *rest, "--software", "megatron-2021", "--json")
    found = json.loads(result.output)
    (layout,) = found["layouts"]
    step = SC21_TABLE_2[0]
    assert layout["step_s"] == pytest.approx(step.step_s, rel=0.05)
    assert sum(layout["parts_s"].values()) == pytest.approx(layout["step_s"])
    assert sum(layout["memory"].values()) == pytest.approx(layout["memory_bytes"])
    assert layout["sent_bytes_first_stage"]["tensor"] > layout["sent_bytes_first_stage"]["data"]
    assert (found["num_layouts"], found["num_fitting"], found["refused"]) == (1, 1, [])


def test_the_command_draws_a_step(tmp_path):
    path = tmp_path / "step.svg"
    sizes = ("--tensor", 8, "--pipeline", 4, "--num-chunks", 2, "--micro-batch-size", 1)
    result = plan("--model", "gpt3-13b", "--gpus", 64, *sizes, "--timeline", path)
    assert result.exit_code == 0, result.output
    assert path.read_text().count("<path") > 4 * 2 * 2 * 8  # a bar for each instruction
    result = plan("--timeline", tmp_path / "step.txt")
    assert result.exit_code == 2
    assert "one of .svg, .png, .pdf" in result.output


def test_a_figure_in_a_folder_that_is_none_is_refused_before_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "_search", None)
    result = plan("--timeline", tmp_path / "none" / "step.svg")
    assert result.exit_code == 2
    assert f"{tmp_path / 'none'}, none" in result.output


def test_the_command_lists_constants_with_their_sources():
    result = plan("--constants")
    assert "matmul_efficiency = 0.95" in result.output
    assert "fitted on table 1" in result.output
    assert {row["unit"] for row in json.loads(plan("--constants", "--json").output)} == {"1", "s"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "abacus"), "model: one of gpt2-1.5b"),
        (("--hardware", "abacus"), "hardware: one of v100-32gb"),
        (("--software", "mine"), "software: one of megatron-2021"),
        (("--gpus", 0), "give --gpus a positive whole number"),
        (("--gpus", 8), "take --gpus 64"),
        (("--tensor", 7), "tensor 2, 4, 8"),
        (("--batch-size", -3), "batch_size = -3"),
        (("--top", 0), "top"),
        (("--seq-len", 0), "seq_len = 0"),
        (("--zero-stage", 5), "zero_stage: 0, 1, 2 or 3"),
        (("--tokens", 0), "tokens"),
    ],
)
def test_the_command_refuses_what_cannot_be(arguments, message):
    result = plan(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_micro_batches_are_counted_per_replica():
    assert num_micro_batches(ParallelConfig(4, micro_batch_size=2), 64) == 8
