"""ZeRO equals one process, fully_shard and ZeroRedundancyOptimizer; its bytes are predicted."""

from contextlib import nullcontext

import comm_runtimes
import pytest
import torch
from parallel_cases import (
    BATCH_SIZE,
    BOUND,
    CHOICES,
    LR,
    NUM_STEPS,
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
from slimlab.comm.report import RankError
from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.parallel.data_shards import until_all_end
from slimlab.parallel.mesh import Mesh, MeshShape
from slimlab.parallel.zero import Zero
from slimlab.parallel.zero_units import units_of
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.zero import zero_held_bytes, zero_step_calls
from slimlab.plan.zero_units import zero_units
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import IGNORE, MaskedBatch, causal_objective, masked_pair_objective
from slimlab.train.optimizer import clip_gradients, make_optimizer, parameter_groups

STAGES = [1, 2, 3]
LLAMA = {"positions": "rotary", "tie_embeddings": False, "feed_forward": "swiglu"}
FROZEN = ["embedding.tokens.weight", "blocks.0.attention.k_proj.weight"]


def my_part(comm, step):
    sizes = shard_sizes(BATCH_SIZE, comm.world_size)
    start = sum(sizes[: comm.rank])
    return tuple(one[start : start + sizes[comm.rank]] for one in tiny_batch(step))


def train(comm, stage, micro_batch_size=None, recompute="none", choices=CHOICES, **options):
    model = tiny_model(seed=comm.rank, **choices)  # other weights than rank 0 has, until it says
    model.recompute = recompute
    sharded = Zero(model, comm, stage=stage, lr=LR, **options)
    losses, grads = [], []
    for step in range(NUM_STEPS):
        part = my_part(comm, step)
        loss, num_tokens = sharded.gradients(part, causal_objective, micro_batch_size)
        assert num_tokens == int((tiny_batch(step)[1] != IGNORE).sum())
        losses.append(float(loss))
        grads.append(sharded.full_gradients())
        sharded.step()
    return losses, grads, sharded.full_weights()


def train_all_stages(comm):
    return [train(comm, stage) for stage in STAGES]


def check_runs(results, choices=CHOICES):
    model = tiny_model(**choices)
    expected = serial_run(model)
    for found in results:
        check_same_run(found, expected, zero_gradient_names(model))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_losses_gradients_and_weights_equal_one_process(world_size, stage):
    assert world_size < 8 or 0 in shard_sizes(BATCH_SIZE, world_size)  # one rank has no data
    check_runs(run_ranks(train, world_size, args=(stage,)))


@pytest.mark.parametrize(
    ("runtime", "world_size"),
    [(runtime, n) for runtime in ("gloo", "mpich") for n in (1, 2, 3, 4)] + [("openmpi", 2)],
)
def test_processes_equal_one_process(runtime, world_size):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(train_all_stages, world_size, backend=backend)
    check_runs([found for stages in results for found in stages])


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_recomputation_and_another_family_equal_one_process(stage):
    def program(comm, choices):
        # 7 sequences on 3 ranks: two, two and one piece of 2.
        return train(comm, stage, 2, "block", choices, prefetch=False)

    for choices in (CHOICES, LLAMA):
        check_runs(run_ranks(program, 3, args=(choices,)), choices)


@pytest.mark.parametrize("stage", STAGES)
def test_a_mesh_axis_shares_the_model_and_another_axis_does_not_mix(stage):
    def program(comm):
        group = Mesh(comm, MeshShape(data=2, tensor=2)).group("data")
        return train(group, stage)

    check_runs(run_ranks(program, 4))


def full(named):
    return {name: tensor.full_tensor() for name, tensor in named.items()}


def train_fully_shard(comm):
    """Torch's own, its mean of means made right by weights: its gradients are averages."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = tiny_model(), init_device_mesh("cpu", (comm.world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    return train_torchs(comm, model, model, optimizer, full)


def train_zero_redundancy(comm):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = tiny_model()
    optimizer = ZeroRedundancyOptimizer(
        parameter_groups(model, 0.1), torch.optim.AdamW, lr=LR, betas=(0.9, 0.95)
    )
    return train_torchs(comm, model, DistributedDataParallel(model), optimizer, lambda named: named)


def train_torchs(comm, model, wrapped, optimizer, whole):
    losses, grads = [], []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        loss_sum, num_tokens = causal_objective(wrapped, my_part(comm, step))
        counts = comm.all_reduce(
            torch.tensor([float(loss_sum.detach()), num_tokens], dtype=torch.float64)
        )
        (loss_sum * comm.world_size / counts[1]).backward()
        losses.append(float(counts[0] / counts[1]))
        grads.append(whole(copy_of_grads(model)))
        optimizer.step()
    return losses, grads, whole(copy_of_weights(model))


def test_ours_equals_fully_shard_and_zero_redundancy_optimizer_and_all_equal_one_process():
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)

    def program(comm):
        theirs = train_fully_shard(comm), train_zero_redundancy(comm)
        return train(comm, 3), train(comm, 1), *theirs

    names = zero_gradient_names(tiny_model())
    for ours_3, ours_1, theirs_3, theirs_1 in run_ranks(program, 2, backend="gloo"):
        check_runs([ours_3, ours_1, theirs_3, theirs_1])
        check_same_run(ours_3, theirs_3, names)
        check_same_run(ours_1, theirs_1, names)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("options", [{"optimizer": "adamw_own"}, {"optimizer": "sgd"}, {}])
def test_settings_of_the_optimizer_reach_the_shards(stage, options):
    settings = {"lr": LR, "weight_decay": 0.3, "betas": (0.8, 0.9), "eps": 1e-6, "momentum": 0.5}
    settings["decay_embeddings"] = False

    def program(comm):
        model = tiny_model(**LLAMA)
        sharded = Zero(model, comm, stage=stage, **options, **settings)
        for step in range(2):
            sharded.gradients(my_part(comm, step), causal_objective)
            sharded.step()
            for group in sharded.optimizer.param_groups:
                group["lr"] /= 2
        return sharded.full_weights()

    model = tiny_model(**LLAMA)
    optimizer = make_optimizer(options.get("optimizer", "adamw"), model, **settings)
    for step in range(2):
        accumulate_gradients(model, tiny_batch(step), causal_objective)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] /= 2
    for found in run_ranks(program, 3):
        for name, weight in copy_of_weights(model).items():
            assert float((found[name] - weight).abs().max()) < BOUND, name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("max_norm", [0.1, 1e3, torch.inf])
def test_clipping_across_shards_equals_clipping_in_one_process(stage, max_norm):
    def program(comm):
        sharded = Zero(tiny_model(), comm, stage=stage, lr=LR)
        sharded.gradients(my_part(comm, 0), causal_objective)
        return float(sharded.clip(max_norm)), sharded.full_gradients()

    model = tiny_model()
    accumulate_gradients(model, tiny_batch(0), causal_objective)
    norm = float(clip_gradients(model.parameters(), max_norm))
    assert 0.1 < norm < 1e3
    for found_norm, grads in run_ranks(program, 3):
        assert abs(found_norm - norm) < BOUND * norm
        for name, grad in copy_of_grads(model).items():
            assert float((grads[name] - grad).abs().max()) < BOUND, name


def freeze(model, frozen):
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


def counted(comm, stage, frozen, choices, num_sequences, prefetch):
    """Calls of the second step, and what is held after it."""
    model = freeze(tiny_model(**choices), frozen)
    sharded = Zero(model, comm, stage=stage, lr=LR, prefetch=prefetch)
    for step in range(2):
        before = len(comm.ledger.entries)
        sharded.gradients(my_part(comm, step), causal_objective, num_sequences)
        sharded.clip(1.0)
        sharded.step()
    calls = [(entry.call, entry.n_bytes) for entry in comm.ledger.entries[before:]]
    return calls, sharded.held_bytes(), [unit.name for unit in sharded.units]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("frozen", [[], FROZEN], ids=["all trained", "some frozen"])
@pytest.mark.parametrize("choices", [CHOICES, LLAMA, {"norm_place": "post"}], ids=str)
def test_calls_payload_and_held_bytes_are_those_predicted(choices, frozen, stage):
    units = zero_units(tiny_model(**choices).config, frozen=frozen)
    pieces = {1: 4, 3: 2}  # of 2 sequences, of 7 on one rank, or 3, 2 and 2
    for world_size, size, prefetch in [(1, 2, True), (3, None, False), (3, 2, True)]:
        found = run_ranks(counted, world_size, args=(stage, frozen, choices, size, prefetch))
        calls = zero_step_calls(
            units,
            world_size,
            stage,
            item_bytes=8,
            num_pieces=size and pieces[world_size],
            clip=True,
            prefetch=prefetch,
        )
        for rank, (its_calls, held, names) in enumerate(found):
            assert its_calls == list(calls)
            assert names == [unit.name for unit in units]
            assert held == zero_held_bytes(
                units, world_size, rank, stage, item_bytes=8, prefetch=prefetch
            )


def test_whole_weights_of_few_units_exist_at_a_time_and_of_none_between_steps():
    config = ModelConfig(vocab_size=11, seq_len=5, d_model=8, num_layers=6, num_heads=2)
    inputs, targets = tiny_batch(0)

    def program(comm, prefetch):
        torch.manual_seed(0)
        model, seen = build_model(config), []
        sharded = Zero(model, comm, stage=3, lr=LR, prefetch=prefetch)

        def look(module, given, output):
            rows = [row.whole.untyped_storage().nbytes() > 0 for row in sharded.rows]
            seen.append([unit.name for unit, there in zip(sharded.units, rows) if there])

        model.blocks[2].register_forward_hook(look)
        assert all(param.isnan().all() for param in model.parameters())
        sharded.gradients((inputs, targets), causal_objective)
        assert all(param.isnan().all() for param in model.parameters())
        held = sharded.held_bytes()
        assert held["gathered"] == held["unreduced"] == 0
        return seen, held["gathered_peak"]

    whole_bytes = sum(4 * param.numel() for param in build_model(config).parameters())
    for prefetch, there in ((True, ["blocks.2", "blocks.3"]), (False, ["blocks.2"])):
        for seen, peak_bytes in run_ranks(program, 2, args=(prefetch,)):
            # The table of the tokens waits for the head, to which it is tied.
            assert seen == [["embedding", *there]]
            assert peak_bytes < whole_bytes * (len(there) + 0.5) / 6


@pytest.mark.parametrize("stage", STAGES)
def test_nan_in_one_ranks_gradient_is_named_on_every_rank_and_no_weight_changes(stage):
    bad = "blocks.1.feed_forward.up_proj.weight"

    def program(comm):
        model = tiny_model()
        sharded = Zero(model, comm, stage=stage, lr=LR)
        before = sharded.full_weights()
        hook = None
        if comm.rank == 1:
            hook = model.get_parameter(bad).register_hook(lambda grad: grad * float("nan"))
        with pytest.raises(InputError) as caught:
            sharded.gradients(my_part(comm, 0), causal_objective)
        with pytest.raises(InputError, match=r"gradients before step\(\)"):
            sharded.step()
        after = sharded.full_weights()
        assert all(bool((before[name] == after[name]).all()) for name in before)
        if hook is not None:
            hook.remove()
        return str(caught.value), float(sharded.gradients(my_part(comm, 0), causal_objective)[0])

    results = run_ranks(program, 3)
    assert len(set(results)) == 1
    assert f"rank 1: {bad}\n" in results[0][0]
    assert results[0][1] == results[0][1]


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_run_out_of_data_take_part_with_nothing_until_all_have(stage):
    numbers = [3, 1, 2]  # batches of each rank

    def program(comm):
        sharded, seen = Zero(tiny_model(), comm, stage=stage, lr=LR), []
        batches = [my_part(comm, step) for step in range(numbers[comm.rank])]
        for batch in until_all_end(comm, batches):
            seen.append(sharded.gradients(batch, causal_objective, 1)[1])
            sharded.step()
        return seen, sharded.full_weights()

    results = run_ranks(program, 3)
    for seen, weights in results:
        assert seen == results[0][0]
        assert len(seen) == 3
        assert all(bool((weights[name] == one).all()) for name, one in results[0][1].items())


@pytest.mark.parametrize("stage", STAGES)
def test_no_sync_sends_no_gradient_in_stage_1_and_adds_up_in_all(stage):
    def program(comm):
        sharded = Zero(tiny_model(), comm, stage=stage, lr=LR)
        part = tuple(one[:2] for one in my_part(comm, 0))
        for row in range(2):
            before = comm.ledger.num_calls("reduce_scatter")
            with nullcontext() if row else sharded.no_sync():
                piece = tuple(one[row : row + 1] for one in part)
                result = sharded.backward(*causal_objective(sharded.model, piece))
            sent = comm.ledger.num_calls("reduce_scatter") - before
            assert sent == (0 if stage == 1 and not row else len(sharded.rows))
            assert (result is None) == (not row)
        summed = sharded.full_gradients()
        sharded.gradients(part, causal_objective)
        for name, whole in sharded.full_gradients().items():
            torch.testing.assert_close(summed[name], whole, rtol=0, atol=BOUND)
        return True

    assert run_ranks(program, 2) == [True, True]


def test_an_encoder_trains_in_every_stage_and_evaluates_without_gradients():
    sizes = {"vocab_size": 11, "seq_len": 5, "d_model": 8, "num_layers": 2, "num_heads": 2}
    config = ModelConfig(**sizes, kind="encoder", num_segments=2)
    inputs, targets = tiny_batch(0)
    batch = MaskedBatch(inputs, targets, None, torch.zeros_like(inputs), torch.ones(7).long())

    def program(comm):
        rows = slice(comm.rank, None, comm.world_size)
        part = MaskedBatch(*(one if one is None else one[rows] for one in batch))
        found = []
        for stage in STAGES:
            torch.manual_seed(0)
            model = build_model(config).double()
            sharded = Zero(model, comm, stage=stage, lr=LR)
            sharded.gradients(part, masked_pair_objective)
            grads = sharded.full_gradients()
            sharded.step()
            with torch.no_grad():
                masked_pair_objective(model, part)
            assert sharded.held_bytes()["gathered"] == 0
            found.append(grads)
        return found

    torch.manual_seed(0)
    model = build_model(config).double()
    _, num_tokens = masked_pair_objective(model, batch)
    for stages in run_ranks(program, 1):
        loss_sum, _ = masked_pair_objective(model, batch)
        (loss_sum / num_tokens).backward()
        for grads in stages:
            for name, grad in copy_of_grads(model).items():
                assert float((grads[name] - grad).abs().max()) < BOUND, name
    assert units_of(model)[-1].params["token_bias"] is model.token_bias
    assert len(run_ranks(program, 2)) == 2


def test_units_that_are_used_in_another_order_are_refused_in_stage_3_alone():
    sizes = {"vocab_size": 11, "seq_len": 5, "d_model": 8, "num_layers": 1, "num_heads": 2}
    config = ModelConfig(**sizes, kind="encoder_decoder")  # it embeds two texts
    inputs, _ = tiny_batch(0)

    def objective(model, ids):
        return model(ids, ids).square().sum(), ids.numel()

    def program(comm, stage):
        sharded = Zero(build_model(config), comm, stage=stage, lr=LR)
        sharded.gradients(inputs, objective)

    for stage in (1, 2):
        run_ranks(program, 2, args=(stage,))
    with pytest.raises(RankError, match=r"comes encoder_blocks\.0\ngiven: blocks\.0"):
        run_ranks(program, 2, args=(3,))


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_that_no_rank_used_is_named_on_every_rank(stage):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(2, 2) for _ in range(3))

        def forward(self, x, second):
            return self.third(self.second(self.first(x)) if second else self.first(x))

    def program(comm):
        sharded = Zero(Branches(), comm, stage=stage, lr=LR)
        used = sharded.model(torch.ones(1, 2), comm.rank == 1)
        sharded.backward(used.sum(), 1)  # one rank is enough
        with pytest.raises(InputError) as caught:
            sharded.backward(sharded.model(torch.ones(1, 2), False).sum(), 1)
        return str(caught.value)

    for text in run_ranks(program, 2):
        assert "none on any rank for second.weight, second.bias\n" in text


def test_a_batch_without_a_target_on_any_rank_is_refused_on_every_rank():
    def program(comm):
        sharded = Zero(tiny_model(), comm, stage=3, lr=LR)
        inputs, targets = my_part(comm, 0)
        with pytest.raises(InputError, match="none on any of 2 ranks"):
            sharded.gradients((inputs, torch.full_like(targets, IGNORE)), causal_objective)
        return sharded.gradients(my_part(comm, 0), causal_objective)[1]

    assert min(run_ranks(program, 2)) > 0


def test_a_backward_pass_that_goes_around_zero_is_refused_in_stage_3():
    def program(comm):
        sharded = Zero(tiny_model(), comm, stage=3, lr=LR)
        loss_sum, _ = causal_objective(sharded.model, my_part(comm, 0))
        with pytest.raises(InputError, match=r"begun by Zero\.backward"):
            loss_sum.backward()
        hidden = sharded.model.embedding(torch.zeros(1, 2).long(), torch.arange(2))
        with pytest.raises(InputError, match="one that came to embedding"):
            sharded.backward(hidden.sum(), 1)
        return sharded.gradients(my_part(comm, 0), causal_objective)[1]

    assert min(run_ranks(program, 2)) > 0


def test_a_step_that_was_given_up_leaves_nothing_behind():
    def program(comm, stage):
        calls = []

        def fails_once(model, piece):
            calls.append(piece)
            result = causal_objective(model, piece)
            if len(calls) == 2:
                raise InterruptedError
            return result

        sharded = Zero(tiny_model(), comm, stage=stage, lr=LR)
        with pytest.raises(InterruptedError):
            sharded.gradients(my_part(comm, 0), fails_once, 2)
        held = sharded.held_bytes()
        assert held["gathered"] == held["unreduced"] == 0
        sharded.gradients(my_part(comm, 0), fails_once, 2)
        return sharded.full_gradients()

    model = tiny_model()
    accumulate_gradients(model, tiny_batch(0), causal_objective)
    for stage in STAGES:
        for grads in run_ranks(program, 2, args=(stage,)):
            for name, grad in copy_of_grads(model).items():
                assert float((grads[name] - grad).abs().max()) < BOUND, (stage, name)


def test_a_model_that_is_closed_is_whole_and_computes_alone():
    def program(comm, stage):
        sharded = Zero(tiny_model(), comm, stage=stage, lr=LR)
        sharded.gradients(my_part(comm, 0), causal_objective)
        sharded.step()
        weights = sharded.full_weights()
        sharded.close()
        model, before = sharded.model, comm.ledger.num_calls()
        loss_sum, _ = causal_objective(model, tiny_batch(1))
        loss_sum.backward()
        assert all(param.grad is not None for param in model.parameters())
        for call in (
            lambda: sharded.gradients(my_part(comm, 0), causal_objective),
            sharded.step,
            lambda: sharded.clip(1.0),
            lambda: sharded.save("nowhere", 1),
            lambda: sharded.load("nowhere"),
        ):
            with pytest.raises(InputError, match=r"after close\(\)"):
                call()
        assert comm.ledger.num_calls() == before
        return all(bool((weights[n] == p).all()) for n, p in model.named_parameters())

    for stage in STAGES:
        assert run_ranks(program, 2, args=(stage,)) == [True, True]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stage": 4}, "stage = 4"),
        ({"stage": True}, "stage = True"),
        ({"stage": 1, "lr": -1.0}, "lr"),
        ({"stage": 1, "optimizer": "adam"}, "adamw"),
        ({"stage": 1, "weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_sent(options, text):
    def program(comm):
        with pytest.raises(InputError, match=text):
            Zero(tiny_model(), comm, **{"lr": LR, **options})
        return comm.ledger.num_calls()

    assert run_ranks(program, 2) == [0, 0]


def test_a_max_norm_of_nothing_is_refused():
    def program(comm):
        sharded = Zero(tiny_model(), comm, stage=2, lr=LR)
        sharded.gradients(my_part(comm, 0), causal_objective)
        with pytest.raises(InputError, match="max_norm"):
            sharded.clip(0.0)

    run_ranks(program, 1)
