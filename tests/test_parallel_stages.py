"""Stages of a pipeline: how layers are divided, what a run holds and when, and what is refused."""

import itertools

import comm_runtimes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parallel_cases import BATCH_SIZE, CHOICES, SIZES, tiny_batch, tiny_model
from pipeline_cases import NAMES, choices_for, schedule_of
from torch.utils.flop_counter import FlopCounterMode

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.parallel.data import DataParallel
from slimlab.parallel.pipeline import Pipeline
from slimlab.parallel.pipeline_passes import ChunkPass
from slimlab.parallel.schedule_checks import timeline_problems
from slimlab.parallel.stage_costs import LayerCosts, measure_costs
from slimlab.parallel.stages import balanced_layers, check_layers, even_layers, stage_of
from slimlab.parallel.zero import Zero
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.layout_memory import held_micro_batches
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.plan.pipeline_memory import chunk_bytes, peak_bytes
from slimlab.plan.pipeline_schedule import peak_activations, read_schedule
from slimlab.plan.pipeline_simulator import simulate
from slimlab.plan.stage_times import StageTimes
from slimlab.train.objectives import IGNORE, causal_objective, token_loss

COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=8)


def cost_of(layers, costs, first, last):
    """The largest and the sum of squares of a division's costs."""
    found, start = [], 0
    for place, number in enumerate(layers):
        cost = sum(costs[start : start + number]) + first * (place == 0)
        found.append(cost + last * (place == len(layers) - 1))
        start += number
    return max(found), sum(one**2 for one in found)


@given(COSTS, st.integers(1, 8), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_no_division_of_layers_has_a_smaller_maximum(costs, num_stages, first, last):
    if len(costs) < num_stages:
        with pytest.raises(InputError, match=f"at most {len(costs)}"):
            balanced_layers(costs, num_stages)
        return
    layers = balanced_layers(costs, num_stages, first=first, last=last)
    assert len(layers) == num_stages
    assert sum(layers) == len(costs)
    assert min(layers) >= 1
    best = min(
        cost_of([b - a for a, b in itertools.pairwise([0, *cuts, len(costs)])], costs, first, last)
        for cuts in itertools.combinations(range(1, len(costs)), num_stages - 1)
    )
    assert cost_of(layers, costs, first, last) == best


def test_even_layers_differ_by_one_and_the_ends_have_fewer():
    assert even_layers(8, 4) == [2, 2, 2, 2]
    assert even_layers(4, 3) == [1, 2, 1]
    assert even_layers(10, 4) == [2, 3, 3, 2]
    for num_layers, cuts in itertools.product(range(1, 13), range(1, 7)):
        if num_layers >= cuts:
            layers = even_layers(num_layers, cuts)
            assert sum(layers) == num_layers
            assert max(layers) - min(layers) <= 1


def test_costs_are_measured_part_by_part_and_a_dear_head_gets_fewer_layers():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20_000, "seq_len": 16, "d_model": 32, "num_layers": 4, "num_heads": 2}
    model = build_model(ModelConfig(**sizes))
    ids = torch.randint(20_000, (4, 17))
    costs = measure_costs(model, (ids[:, :-1], ids[:, 1:]), 2)
    assert len(costs.layers_s) == 4
    assert min(costs.layers_s) > 0
    assert costs.embedding_s > 0
    # 1.3 million weights in the head, 12 thousand in a layer: no noise turns that round.
    assert costs.head_s > max(costs.layers_s)
    assert all(param.grad is None for param in model.parameters())
    assert LayerCosts(0.0, (1.0,) * 7, 3.0).balanced(3) == [3, 3, 1]


def test_stages_have_the_names_of_the_whole_model_and_every_part_once():
    for name, tied in itertools.product(NAMES, (True, False)):
        schedule, choices = schedule_of(name, 3), choices_for(name, 3, tie_embeddings=tied)
        stages = [stage_of(tiny_model(**choices), schedule, number) for number in range(3)]
        whole = dict(tiny_model(**choices).named_parameters())
        named = [pair for stage in stages for pair in stage.named_parameters()]
        assert {param_name for param_name, _ in named} == set(whole)
        for param_name, param in named:
            assert torch.equal(param, whole[param_name])
        copies = tied and schedule.place_of(schedule.num_virtual_stages - 1)[0] != 0
        assert len(named) == len(whole) + copies


def watched(comm, name, times, recompute="none", num_micro_batches=6):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES | CHOICES | {"num_layers": 8}))
    model.recompute = recompute
    schedule = schedule_of(name, comm.world_size, num_micro_batches)
    pipeline = Pipeline(model, comm, schedule)
    record = pipeline.watch(times or "wall", count_bytes=True)
    for step in range(2):  # the second one is recorded
        pipeline.gradients(tiny_batch(step), causal_objective)
    return record.timeline(), pipeline.peak_passes, record.peak_bytes, pipeline.stage.layers


@pytest.mark.parametrize("message", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_idle_slots_counted_in_a_run_are_those_of_the_simulator(name, message):
    schedule = schedule_of(name, 4, 6)
    times = StageTimes(2, 2, 2, message_s=message).in_chunks(schedule.num_chunks)
    results = run_ranks(watched, 4, args=(name, times))
    ideal = simulate(schedule, times)
    for timeline, *_ in results:
        assert timeline.slots == ideal.slots
        assert timeline.idle_slots() == ideal.idle_slots()
        assert set(timeline.messages) == set(ideal.messages)
    assert tuple(result[1] for result in results) == peak_activations(schedule)


def test_a_slow_stage_is_counted_too():
    times = StageTimes([1, 3, 1], [1, 3, 1], [1, 3, 1])
    timeline = run_ranks(watched, 3, args=("1f1b", times))[0][0]
    assert timeline.slots == simulate(schedule_of("1f1b", 3, 6), times).slots
    assert timeline.computing_s[1] == 3 * timeline.computing_s[0]


def held_and_predicted(name, recompute="none"):
    schedule = schedule_of(name, 4, 6)
    results = run_ranks(watched, 4, args=(name, StageTimes(1, 1, 1), recompute))
    config = ModelConfig(**SIZES | CHOICES | {"num_layers": 8})
    sizes, layers = shard_sizes(BATCH_SIZE, 6), results[0][3]
    predicted = peak_bytes(config, schedule, layers, sizes, recompute=recompute)
    return [result[2] for result in results], list(predicted)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [(name, "none") for name in NAMES] + [("gpipe", "block"), ("interleaved", "block")],
)
def test_what_is_held_for_backward_passes_is_predicted(name, recompute):
    held, predicted = held_and_predicted(name, recompute)
    assert held[:3] == predicted[:3]
    # Each loss keeps its number of targets besides.
    assert 0 <= held[3] - predicted[3] <= 4 * 6


def test_parted_backward_passes_hold_more_bytes_than_their_micro_batches_say():
    schedules = [schedule_of(name, 4, 6) for name in ("zb_h1", "1f1b")]
    assert peak_activations(schedules[0])[0] == peak_activations(schedules[1])[0]
    parted, whole = (held_and_predicted(name)[0] for name in ("zb_h1", "1f1b"))
    assert parted[0] > 1.1 * whole[0]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved"])
def test_the_planner_counts_the_micro_batches_that_a_run_holds(name):
    num_chunks = 2 if name == "interleaved" else 1
    kind = "gpipe" if name == "gpipe" else "1f1b"
    parallel = ParallelConfig(pipeline=4, num_chunks=num_chunks, schedule=kind)
    # Four stages, four micro-batches: a whole round, as the planner counts interleaving.
    results = run_ranks(watched, 4, args=(name, StageTimes(1, 1, 1), "none", 4))
    planned = [held_micro_batches(parallel, 4, stage) for stage in range(4)]
    assert [result[1] / num_chunks for result in results] == planned


def test_a_chunk_keeps_what_the_whole_model_keeps_of_its_layers():
    config = ModelConfig(**SIZES | CHOICES | {"num_layers": 4})
    ends = chunk_bytes(config, 1, 3, first=True), chunk_bytes(config, 1, 3, last=True)
    whole = chunk_bytes(config, 4, 3, first=True, last=True)
    assert whole == sum(ends) + 2 * chunk_bytes(config, 1, 3)


def test_a_run_of_processes_is_a_timeline_in_the_order_of_its_schedule():
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)
    results = run_ranks(watched, 2, backend="gloo", args=("1f1b", None))
    timeline = results[0][0]
    assert results[1][0] == timeline
    # Clocks of processes on one host are one; what is left is the clock's own grain.
    assert timeline_problems(schedule_of("1f1b", 2, 6), timeline, tolerance_s=1e-6) == []
    assert 0 < timeline.bubble_fraction < 1
    assert timeline.peak_activations == (2, 1)


def test_the_parted_backward_pass_makes_no_product_twice():
    def flop(function):
        with FlopCounterMode(display=False) as counter:
            result = function()
        return counter.get_total_flops(), result

    def run_it(back_propagate):
        back_propagate()

    schedule = schedule_of("zb_h1", 3)
    model = tiny_model(**choices_for("zb_h1", 3))
    stage = stage_of(model, schedule, 1)
    batch, hidden = tiny_batch(0), torch.randn(BATCH_SIZE, 5, 8, dtype=torch.float64)
    found = {}
    for splits in (True, False):
        one = ChunkPass(stage, 0, hidden, splits)
        found["forward"], result = flop(lambda one=one: one.forward(causal_objective, batch, 1.0))
        grad = torch.ones_like(result)
        if splits:
            found["input"], _ = flop(lambda one=one, grad=grad: one.input_gradient(grad))
            assert all(param.grad is None for param in stage.parameters())
            assert one.owed_bytes > 0
            found["weight"], _ = flop(lambda one=one: one.weight_gradient(run_it))
            assert one.owed_bytes == 0
        else:
            found["whole"], _ = flop(
                lambda one=one, grad=grad: one.backward(grad, lambda run: run())
            )
    assert found["input"] + found["weight"] == found["whole"]
    # Products of activations with each other have two input gradients and no weight gradient.
    linear = 2 * BATCH_SIZE * 5 * sum(p.numel() for p in stage.parameters() if p.dim() == 2)
    assert found["weight"] == linear
    assert found["input"] >= linear


def test_what_was_sent_is_let_go_when_it_has_arrived():
    def program(comm):
        most = [0]
        pipeline = Pipeline(tiny_model(num_layers=2), comm, schedule_of("1f1b", 2, 7))
        take = pipeline._mail.take

        def counted(product):
            tensor = take(product)
            most[0] = max(most[0], len(pipeline._mail._leaving))
            return tensor

        pipeline._mail.take = counted
        pipeline.gradients(tiny_batch(0), causal_objective)
        return most[0], len(pipeline._mail._leaving)

    # Of seven micro-batches, one is on its way when the next message has come; none is in the end.
    assert run_ranks(program, 2) == [(1, 0), (1, 0)]


def pipeline_of(comm, name="1f1b", num_stages=None, num_micro_batches=4, **more):
    schedule = schedule_of(name, num_stages or comm.world_size, num_micro_batches)
    layers = more.pop("layers", None)
    return Pipeline(tiny_model(**CHOICES | more), comm, schedule, layers=layers)


def check_refused_alike(program, world_size, *words):
    """The same message on every rank, and no rank is left waiting."""

    def caught(comm):
        try:
            program(comm)
        except InputError as error:
            return str(error)
        return "nothing was refused"

    messages = run_ranks(caught, world_size)
    assert len(set(messages)) == 1
    for word in words:
        assert word in messages[0]


def test_sizes_that_do_not_fit_are_refused_with_the_nearest_that_do():
    check_refused_alike(lambda comm: pipeline_of(comm, num_stages=3), 2, "2 stages", "1f1b of 3")
    check_refused_alike(
        lambda comm: pipeline_of(comm, "interleaved"), 2, "2 layers for 4 chunks", "at most 2"
    )
    check_refused_alike(
        lambda comm: pipeline_of(comm, layers=[2, 0]), 2, "[2, 0]: none in 1", "[1, 1]"
    )
    check_refused_alike(
        lambda comm: pipeline_of(comm, num_layers=6, layers=[2, 2]), 2, "4 in all", "[3, 3]"
    )

    def too_few(comm):
        pipeline_of(comm, num_micro_batches=8).gradients(tiny_batch(0), causal_objective)

    check_refused_alike(too_few, 2, "a batch of 7", "at most 7 micro-batches")
    with pytest.raises(InputError, match="one number for each of 3"):
        check_layers([3, 2], 5, 3)


def test_batches_that_differ_and_batches_without_targets_are_refused_on_every_rank():
    def differ(comm):
        pipeline_of(comm).gradients(tiny_batch(comm.rank), causal_objective)

    check_refused_alike(differ, 2, "another on stage 1 than on stage 0")

    def lengths_differ(comm):
        batch = tiny_batch(0)
        if comm.rank == 1:
            batch = tuple(one[:6] for one in batch)
        pipeline_of(comm, num_micro_batches=2).gradients(batch, causal_objective)

    with pytest.raises(RankError, match="the same batch on every stage"):
        run_ranks(lengths_differ, 2)

    def without(comm):
        inputs, targets = tiny_batch(0)
        batch = inputs, torch.full_like(targets, IGNORE)
        pipeline_of(comm).gradients(batch, causal_objective)

    check_refused_alike(without, 2, "at least one target token")


def test_a_pipeline_goes_on_after_a_batch_that_was_refused():
    def program(comm):
        pipeline, fresh = pipeline_of(comm), pipeline_of(comm)
        with pytest.raises(InputError):
            pipeline.gradients(tiny_batch(comm.rank), causal_objective)
        found = pipeline.gradients(tiny_batch(2), causal_objective)
        return found == fresh.gradients(tiny_batch(2), causal_objective)

    assert run_ranks(program, 2) == [True, True]


def test_schedules_that_cannot_be_run_and_recomputation_of_half_a_pass_are_refused():
    def deadlock(comm):
        Pipeline(tiny_model(), comm, read_schedule(["F0 B0 F1 B1", "F1 F0 B0 B1"]))

    check_refused_alike(deadlock, 2, "F1")

    def recomputed(comm):
        model = tiny_model()
        model.recompute = "block"
        Pipeline(model, comm, schedule_of("zb_h1", 2))

    check_refused_alike(recomputed, 2, 'recompute = "none"', "1f1b")

    def blocking(comm):
        pipeline_of(comm).watch(StageTimes(1, 1, 1, messages="block"))

    check_refused_alike(blocking, 2, 'messages = "overlap"')
    check_refused_alike(lambda comm: pipeline_of(comm).watch("cpu"), 2, "wall")


def test_objectives_that_call_their_model_twice_or_never_are_refused():
    def twice(model, batch):
        model(batch[0])
        return causal_objective(model, batch)

    def never(model, batch):
        return token_loss(torch.zeros(*batch[1].shape, 11, requires_grad=True), batch[1])

    for objective, number in ((twice, 2), (never, 0)):
        with pytest.raises(RankError, match=f"{number} calls"):
            run_ranks(
                lambda comm, one=objective: pipeline_of(comm).gradients(tiny_batch(0), one), 1
            )


def test_replicas_of_something_else_and_sharded_gradients_are_refused():
    def others(comm):
        pipeline_of(comm).join(DataParallel(tiny_model(), comm))

    check_refused_alike(others, 1, "a replica of this pipeline's stage")

    def sharded(comm):
        pipeline = pipeline_of(comm)
        pipeline.join(Zero(pipeline.stage, comm, stage=2, lr=1e-3))

    check_refused_alike(sharded, 1, "stage = 2", "take stage=1")
    check_refused_alike(
        lambda comm: stage_of(torch.nn.Linear(2, 2), schedule_of("1f1b", 1), 0), 1, "whole Decoder"
    )


def test_another_schedule_can_be_followed_if_stages_stay_where_they_are():
    def program(comm):
        pipeline, fresh = pipeline_of(comm, "gpipe"), pipeline_of(comm, "1f1b", None, 3)
        pipeline.follow(schedule_of("1f1b", 2, 3))
        found = pipeline.gradients(tiny_batch(0), causal_objective)
        assert found == fresh.gradients(tiny_batch(0), causal_objective)
        pipeline.follow(schedule_of("interleaved", 2))

    check_refused_alike(program, 2, "1 chunks, placement loop", "2 chunks")
