"""Compressed gradients: bytes predicted, bits equal on all ranks, what is not sent is kept."""

import copy
import math

import comm_runtimes
import pytest
import torch
from parallel_cases import (
    NUM_STEPS,
    check_same_run,
    copy_of_grads,
    copy_of_weights,
    optimizer_of,
    serial_run,
    tiny_model,
    zero_gradient_names,
)
from test_parallel_data import my_part
from torch import nn

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.config import InputError
from slimlab.parallel.compression import Half, Sign, TopK, pack_bits, unpack_bits
from slimlab.parallel.compression_powersgd import PowerSGD, orthonormal
from slimlab.parallel.compression_runs import best_loss, compare_convergence, markov_chain
from slimlab.parallel.data import DataParallel
from slimlab.parallel.data_replicas import check_replicas
from slimlab.plan.compression import COMPRESSORS, predict_compressed_step, ring_bytes
from slimlab.train.objectives import IGNORE, causal_objective

# name -> how it is made, its name in the plan, its settings there
CASES = {
    "float16": (Half, "float16", {}),
    "bfloat16": (lambda **choice: Half(torch.bfloat16, **choice), "bfloat16", {}),
    "sign": (Sign, "sign", {}),
    "top-k": (lambda **choice: TopK(0.1, **choice), "top-k", {"density": 0.1}),
    "top-k, all": (lambda **choice: TopK(1.0, **choice), "top-k", {"density": 1.0}),
    "powersgd": (lambda **choice: PowerSGD(1, **choice), "powersgd", {"rank": 1}),
    "powersgd, full rank": (
        lambda **choice: PowerSGD(8, min_compression_rate=0, **choice),
        "powersgd",
        {"rank": 8, "min_compression_rate": 0},
    ),
}
EXACT = ["top-k, all", "powersgd, full rank"]


def made(name, **choice):
    return CASES[name][0](**choice)


def predicted(name, params, item_bytes, world_size, bucket_bytes):
    shapes = [param.shape for param in params]
    _, plan, settings = CASES[name]
    return predict_compressed_step(plan, shapes, item_bytes, world_size, bucket_bytes, **settings)


def two_steps(comm, name, bucket_bytes):
    model = tiny_model()
    replica = DataParallel(model, comm, bucket_bytes=bucket_bytes, compressor=made(name))
    found = []
    for step in range(2):
        before = len(comm.ledger.entries)
        replica.gradients(my_part(comm, step), causal_objective, micro_batch_size=1 + comm.rank)
        calls = tuple((entry.call, entry.n_bytes) for entry in comm.ledger.entries[before:])
        found.append((copy_of_grads(model), calls))
    return found


def check_two_steps(results, name, bucket_bytes):
    step = predicted(name, list(tiny_model().parameters()), 8, len(results), bucket_bytes)
    for found in results:
        for (grads, calls), (grads_0, _) in zip(found, results[0], strict=True):
            assert calls == step.calls
            assert grads.keys() == grads_0.keys()
            assert all(torch.equal(grads[one], grads_0[one]) for one in grads)
    assert step.num_calls == len(step.calls)
    assert step.payload_bytes == sum(n_bytes for _, n_bytes in step.calls)


@pytest.mark.parametrize("bucket_bytes", [None, 1500])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_calls_are_those_predicted_and_gradients_equal_on_all_ranks(name, world_size, bucket_bytes):
    results = run_ranks(two_steps, world_size, args=(name, bucket_bytes))
    check_two_steps(results, name, bucket_bytes)


@pytest.mark.parametrize("runtime", ["gloo", "mpich", "openmpi"])
def test_processes_send_what_is_predicted_and_have_equal_gradients(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)

    def program(comm):
        return {name: two_steps(comm, name, 1500) for name in CASES}

    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(program, 3, backend=backend)
    for name in CASES:
        check_two_steps([found[name] for found in results], name, 1500)


def test_without_a_compressor_the_plan_is_that_of_plain_sums():
    def program(comm):
        replica = DataParallel(tiny_model(), comm, bucket_bytes=1500)
        before = len(comm.ledger.entries)
        replica.gradients(my_part(comm, 0), causal_objective)
        return tuple((entry.call, entry.n_bytes) for entry in comm.ledger.entries[before:])

    shapes = [param.shape for param in tiny_model().parameters()]
    step = predict_compressed_step("none", shapes, 8, 2, 1500)
    assert run_ranks(program, 2) == [step.calls] * 2


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", EXACT)
def test_compressors_that_leave_nothing_out_equal_one_process(name, world_size, feedback):
    def program(comm):
        model = tiny_model(seed=comm.rank)
        compressor = made(name, error_feedback=feedback)
        replica = DataParallel(model, comm, bucket_bytes=1500, compressor=compressor)
        optimizer, losses, grads = optimizer_of(model), [], []
        for step in range(NUM_STEPS):
            losses.append(float(replica.gradients(my_part(comm, step), causal_objective, 2)[0]))
            grads.append(copy_of_grads(model))
            optimizer.step()
        check_replicas(model, comm)
        return losses, grads, copy_of_weights(model)

    model = tiny_model()
    expected = serial_run(model)
    for found in run_ranks(program, world_size):
        check_same_run(found, expected, zero_gradient_names(model))


SHAPES = [(6, 9), (9, 6), (5,), (2, 3, 4), ()]


def flats(world_size, num_steps, seed=0):
    """Gradients of all ranks and steps, sizes from 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(seed)
    num_elements = sum(math.prod(shape) for shape in SHAPES)
    shape = (num_steps, world_size, num_elements)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn * 10 ** torch.randint(-3, 4, shape, generator=generator)


def sums_of(comm, compressor, gradients):
    """The sums of all steps, one behind the other, and this rank's residual at the end."""
    compressor, shapes = copy.deepcopy(compressor), [torch.Size(shape) for shape in SHAPES]
    totals = []
    for step in gradients:
        flat = step[comm.rank].clone()
        compressor.begin_step()
        compressor.sum_over_ranks(0, flat, shapes, comm)
        compressor.finish_step(True)
        totals.append(flat)
    return torch.stack(totals), compressor.residuals.get(0)


@pytest.mark.parametrize("name", CASES)
def test_what_was_sent_and_what_is_left_add_up_to_all_gradients(name):
    gradients = flats(3, 5)
    results = run_ranks(sums_of, 3, args=(made(name), gradients))
    found = results[0][0].sum(0) + sum(residual for _, residual in results)
    # Each of the steps rounds, relative to the largest number that it handles; a sum of 16-bit
    # numbers once more after each addition, and no residual holds that.
    unit = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(name, 64 * 2.0**-53)
    largest = gradients.abs().sum((0, 1)) if unit > 1e-9 else gradients.abs().sum()
    assert bool(((found - gradients.sum((0, 1))).abs() <= 3 * unit * largest).all())
    if name not in EXACT:
        assert max(float(residual.abs().max()) for _, residual in results) > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_feedback_switched_off_keeps_nothing(name):
    gradients = flats(2, 1).repeat(3, 1, 1)
    for totals, residual in run_ranks(
        sums_of, 2, args=(made(name, error_feedback=False), gradients)
    ):
        assert residual is None
        if "powersgd" not in name:  # its factors get better from step to step
            assert torch.equal(totals[1], totals[0])
            assert torch.equal(totals[2], totals[0])


def test_a_warm_start_brings_powersgd_to_the_best_approximation_of_its_rank():
    """Of one matrix sent again and again; the best is that of its largest singular values."""
    generator = torch.Generator().manual_seed(0)
    u, v = (orthonormal(torch.randn(n, n, generator=generator).double()) for n in (6, 9))
    matrix = u @ torch.diag(torch.tensor([8.0, 4, 1, 0.5, 0.2, 0.1]).double()) @ v[:6]
    best = u[:, :2] @ torch.diag(torch.tensor([8.0, 4]).double()) @ v[:2]

    def program(comm):
        compressor, errors = PowerSGD(2, min_compression_rate=0, error_feedback=False), []
        for _ in range(12):
            flat = matrix.reshape(-1) / comm.world_size
            compressor.sum_over_ranks(0, flat, [matrix.shape], comm)
            compressor.finish_step(True)
            errors.append(float((flat.view_as(matrix) - best).norm()))
        return errors

    for errors in run_ranks(program, 2):
        # The part of the third direction falls by (1/4)^2 in each step.
        assert errors[0] > 0.1
        assert errors[-1] < 1e-9


class Point(nn.Module):
    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.tensor([3.0, 3.0], dtype=torch.float64))


def walk(comm, compressor, pull, num_steps=500, lr=0.012):
    """Walk to the minimum at 0 of |x|^2 / 2, while the ranks pull apart: what cancels is large."""
    model = Point()
    replica = DataParallel(model, comm, compressor=compressor)
    apart = torch.tensor(pull, dtype=torch.float64) * (-1) ** comm.rank
    for _ in range(num_steps):
        replica.backward((model.at**2 / 2).sum() + (apart * model.at).sum(), 1)
        with torch.no_grad():
            model.at -= lr * model.at.grad
    check_replicas(model, comm)
    return model.at.detach().norm()


@pytest.mark.parametrize(
    ("make", "pull"),
    [(Sign, (10, -10)), (lambda **choice: TopK(0.5, **choice), (10, 0))],
    ids=["sign", "top-k"],
)
def test_what_cancels_hides_the_way_but_not_with_feedback(make, pull):
    start = Point().at.detach().norm()
    for norm in run_ranks(walk, 2, args=(None, pull)):
        assert norm < start / 100
    for norm in run_ranks(walk, 2, args=(make(), pull)):
        assert norm < start / 20
    for norm in run_ranks(walk, 2, args=(make(error_feedback=False), pull)):
        assert norm > start / 2


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(dtype, value) for dtype in (torch.float16, torch.bfloat16) for value in (6e4, 1e30, 1e-20)]
    + [(torch.float16, 3e-41)],
)
def test_sums_of_sixteen_bits_neither_overflow_nor_vanish(dtype, value):
    def program(comm):
        flat = torch.tensor([value, -value / 2, 0.0])
        Half(dtype).sum_over_ranks(0, flat, [torch.Size([3])], comm)
        return flat

    expected = torch.tensor([value, -value / 2, 0.0]) * 5
    unit = 2.0**-8 if value > 1e-30 else 0.1  # float32 itself has few bits left there
    for found in run_ranks(program, 5):
        torch.testing.assert_close(found, expected, rtol=2 * unit, atol=0)


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_not_finite_changes_no_residual_on_any_rank(name, check_finite):
    bad = "blocks.1.feed_forward.up_proj.weight"

    def program(comm, with_bad_step):
        model = tiny_model()
        replica = DataParallel(
            model, comm, bucket_bytes=1500, check_finite=check_finite, compressor=made(name)
        )
        replica.gradients(my_part(comm, 0), causal_objective)
        if with_bad_step:
            factor = float("nan") if comm.rank == 1 else 1.0
            hook = model.get_parameter(bad).register_hook(lambda grad: grad * factor)
            if check_finite:
                with pytest.raises(InputError, match=f"rank 1: {bad}\n"):
                    replica.gradients(my_part(comm, 1), causal_objective)
            else:
                replica.gradients(my_part(comm, 1), causal_objective)
                assert not model.get_parameter(bad).grad.isfinite().all()
            hook.remove()
        replica.gradients(my_part(comm, 2), causal_objective)
        return copy_of_grads(model), replica.compressor.residuals

    for (grads, residuals), (true_grads, true_residuals) in zip(
        run_ranks(program, 2, args=(True,)), run_ranks(program, 2, args=(False,)), strict=True
    ):
        assert all(torch.equal(grads[one], true_grads[one]) for one in true_grads)
        assert all(torch.equal(residuals[one], true_residuals[one]) for one in true_residuals)
        assert residuals.keys() == true_residuals.keys() != set()


def test_a_batch_without_a_target_on_any_rank_changes_no_residual():
    def program(comm):
        replica = DataParallel(tiny_model(), comm, compressor=TopK(0.1))
        inputs, targets = my_part(comm, 0)
        replica.gradients((inputs, targets), causal_objective)
        before = {number: one.clone() for number, one in replica.compressor.residuals.items()}
        with pytest.raises(InputError, match="none on any of 2 ranks"):
            replica.gradients((inputs, torch.full_like(targets, IGNORE)), causal_objective)
        return all(torch.equal(before[one], replica.compressor.residuals[one]) for one in before)

    assert run_ranks(program, 2) == [True, True]


def test_a_rank_without_data_sends_what_it_still_has():
    def program(comm):
        model = Point()
        replica = DataParallel(model, comm, compressor=TopK(0.5))
        weights = torch.tensor([2.0, 1.0], dtype=torch.float64)
        replica.backward((weights * model.at).sum(), 1)
        first = model.at.grad.tolist()
        if comm.rank == 0:
            replica.backward(None, 0)
        else:
            replica.backward((weights * model.at).sum(), 1)
        return first, model.at.grad.tolist()

    # Rank 1 has 2 again, and only 1 + 1 in its residual and its gradient: the first 2 is sent.
    for first, second in run_ranks(program, 2):
        assert first == [2.0, 0.0]
        assert second == [2.0, 1.0]


def test_a_parameter_that_is_no_longer_used_gets_what_is_left_of_its_gradient_and_no_more():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("large", "small", "nobody"):
                setattr(self, name, nn.Parameter(torch.ones(1, dtype=torch.float64)))

    def program(comm, name):
        model, found = Parts(), []
        replica = DataParallel(model, comm, compressor=made(name))
        for step in range(3):
            loss = model.large.sum() * (5 if step == 0 else 0)
            replica.backward(loss + model.small.sum() if step == 0 else loss, 1)
            found.append([None if p.grad is None else float(p.grad) for p in model.parameters()])
        return found

    # One element of three is sent: the large one first, then what the residual has of the small.
    expected = [[5.0, 0.0, None], [0.0, 1.0, None], [0.0, None, None]]
    assert run_ranks(program, 2, args=("top-k",)) == [expected] * 2
    for found in run_ranks(program, 2, args=("sign",)):
        assert [row[2] for row in found] == [None] * 3


def test_ranks_that_are_threads_do_not_share_the_state_of_a_compressor():
    shared = TopK(0.1)

    def program(comm, compressor):
        replica = DataParallel(tiny_model(), comm, compressor=compressor)
        replica.gradients(my_part(comm, 0), causal_objective)
        return replica.compressor.residuals[0]

    one, two = run_ranks(program, 2, args=(shared,))
    assert not torch.equal(one, two)
    assert shared.residuals == {}


def test_a_scale_that_changes_takes_the_residuals_along():
    def program(comm):
        model = Point()
        replica = DataParallel(model, comm, compressor=TopK(0.5))
        weights = torch.tensor([2.0, 1.5], dtype=torch.float64)
        replica.backward((weights * model.at).sum(), 1)
        replica.compressor.scale_residuals(4.0)
        replica.backward((weights * model.at).sum(), 1, scale=lambda loss: loss * 4)
        return model.at.grad.tolist()

    assert run_ranks(program, 1) == [[0.0, 4 * 1.5 + 4 * 1.5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_other_dtypes_keep_theirs_and_the_bytes_are_predicted(name, dtype):
    def program(comm):
        model = nn.Linear(9, 10).to(dtype)
        replica = DataParallel(model, comm, compressor=made(name))
        before = len(comm.ledger.entries)
        inputs = torch.arange(18).view(2, 9).to(dtype) - 7 * comm.rank
        replica.backward(model(inputs).float().square().sum(), 2)
        check_replicas(model, comm)
        assert {param.grad.dtype for param in model.parameters()} == {dtype}
        return tuple((entry.call, entry.n_bytes) for entry in comm.ledger.entries[before:-1])

    params = list(nn.Linear(9, 10).parameters())
    assert run_ranks(program, 2) == [predicted(name, params, dtype.itemsize, 2, None).calls] * 2


@pytest.mark.parametrize("num_bits", [1, 7, 8, 9, 1000])
def test_bits_come_back_as_they_were_packed(num_bits):
    bits = torch.rand(num_bits, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(num_bits / 8)
    assert torch.equal(unpack_bits(packed, num_bits), bits)


@pytest.mark.parametrize("density", [0, -0.1, 1.01, 7, float("nan"), True, "all"])
def test_a_density_is_above_zero_and_at_most_one(density):
    with pytest.raises(InputError, match="density, a number above 0 and at most 1"):
        TopK(density)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_is_a_whole_number_of_at_least_one(rank):
    with pytest.raises(InputError, match="rank"):
        PowerSGD(rank)


@pytest.mark.parametrize(
    ("compressor", "message"),
    [
        (PowerSGD(9, min_compression_rate=0), "a rank from 1 to 8"),
        (PowerSGD(7), "a rank from 1 to 6"),  # 7 (8 + 32) numbers would be more than 8 x 32
        (PowerSGD(1, min_compression_rate=7), "0 compresses every matrix"),
    ],
)
def test_a_rank_that_no_matrix_has_is_refused_on_every_rank(compressor, message):
    def program(comm):
        with pytest.raises(InputError, match=message):
            DataParallel(tiny_model(), comm, compressor=compressor)
        return comm.ledger.num_calls("all_reduce")

    assert run_ranks(program, 2) == [0, 0]


def test_powersgd_of_a_model_of_vectors_alone_is_refused():
    with pytest.raises(RankError, match="at least two dims"):
        run_ranks(lambda comm: DataParallel(Point(), comm, compressor=PowerSGD(1)), 1)


def test_thirty_two_bits_are_not_half():
    with pytest.raises(InputError, match=r"torch.float16 or torch.bfloat16"):
        Half(torch.float32)


def linear_gradients(step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in [(6, 20), (8, 12), (7,)]]


class Linear(nn.Module):
    """Its loss is linear in its parameters, so its gradients are those that it is given."""

    def __init__(self):
        super().__init__()
        for number, grad in enumerate(linear_gradients(0, 0)):
            setattr(self, f"part_{number}", nn.Parameter(torch.zeros_like(grad)))

    def forward(self, grads):
        return sum((param * grad).sum() for param, grad in zip(self.parameters(), grads))


def hooked(comm, hook, state, steps):
    from torch.nn.parallel import DistributedDataParallel

    model = Linear()
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(state, hook)
    found = []
    for step in steps:
        model.zero_grad()
        wrapped(linear_gradients(step, comm.rank)).backward()
        found.append(copy_of_grads(model))
    return found


def ours(comm, compressor, steps):
    model, found = Linear(), []
    replica = DataParallel(model, comm, bucket_bytes=None, compressor=compressor)
    for step in steps:
        # A token on each rank: DistributedDataParallel's mean over ranks is the mean over tokens.
        replica.backward(model(linear_gradients(step, comm.rank)), 1)
        found.append(copy_of_grads(model))
    return found


def test_sixteen_bits_equal_those_of_distributed_data_parallel_bit_for_bit():
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)

    def program(comm):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        compressor = Half(error_feedback=False)
        return ours(comm, compressor, range(3)), hooked(comm, fp16_compress_hook, None, range(3))

    # Two ranks: torch halves before it adds, which loses nothing that is not tiny.
    for mine, theirs in run_ranks(program, 2, backend="gloo"):
        for grads, true in zip(mine, theirs, strict=True):
            assert all(torch.equal(grads[name], true[name]) for name in true)


@pytest.mark.parametrize("feedback", [True, False])
def test_powersgd_equals_that_of_distributed_data_parallel(feedback):
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)

    def program(comm):
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hooks

        state = hooks.PowerSGDState(
            None,
            matrix_approximation_rank=2,
            start_powerSGD_iter=2,
            min_compression_rate=1,
            use_error_feedback=feedback,
        )
        # Both begin with our first Q; torch would draw its own. Its two plain steps come first.
        own = PowerSGD(2, error_feedback=feedback)
        matrices = [grad for grad in linear_gradients(0, 0) if grad.dim() == 2]
        first = own._first_factors(0, matrices[::-1])
        state.q_memory_dict[0] = torch.cat([factor.reshape(-1) for factor in first])
        state.p_memory_dict[0] = torch.empty(sum(2 * len(matrix) for matrix in matrices))
        theirs = hooked(comm, hooks.powerSGD_hook, state, [8, 9, 0, 1, 2])
        return ours(comm, own, range(3)), theirs[2:]

    for mine, theirs in run_ranks(program, 2, backend="gloo"):
        for grads, true in zip(mine, theirs, strict=True):
            for name in true:
                # Float32, a few orthonormal bases and products of up to 20 terms.
                error = float((grads[name] - true[name]).norm() / true[name].norm())
                assert error < 1e-5, name


def test_feedback_helps_the_largest_elements_over_three_seeds():
    found = compare_convergence(
        {"plain": None, "feedback": TopK(0.01), "none": TopK(0.01, error_feedback=False)}
    )
    for one in found.values():
        assert len(one.losses) == 3
        assert [len(curve) for curve in one.curves] == [100] * 3
        assert min(one.losses) <= one.mean_loss <= max(one.losses) == min(one.losses) + one.spread
    for seed, losses in enumerate(zip(*(one.losses for one in found.values()))):
        plain, with_feedback, without = losses
        assert best_loss(markov_chain(16, seed)) < plain < with_feedback < without < math.log(16)
    assert found["feedback"].payload_bytes * 40 < found["plain"].payload_bytes
    assert found["plain"].ring_bytes == found["plain"].payload_bytes


def test_fewer_than_three_seeds_are_refused():
    with pytest.raises(InputError, match="at least three different seeds"):
        compare_convergence({"plain": None}, seeds=(1, 1, 2))


def test_signs_that_are_gathered_lose_their_lead_as_ranks_are_added():
    shape = [(1024, 1024)]
    plain = predict_compressed_step("none", shape, 4, 2, None).calls[:-1]
    sign = predict_compressed_step("sign", shape, 4, 2, None).calls[:-1]
    # 2 (w - 1) / w of 32 bits against w - 1 times 1 bit: equal at w = 64, but for the scale.
    assert ring_bytes(sign, 2) < ring_bytes(plain, 2) / 31
    assert ring_bytes(sign, 63) < ring_bytes(plain, 63)
    assert ring_bytes(sign, 64) > ring_bytes(plain, 64)


@pytest.mark.parametrize(
    "wrong",
    [
        {"compressor": "zip"},
        {"density": 0},
        {"rank": 0},
        {"item_bytes": 0},
        {"parameter_shapes": []},
    ],
)
def test_a_plan_refuses_numbers_that_do_not_fit(wrong):
    given = {
        "compressor": "top-k",
        "parameter_shapes": [(2, 3)],
        "item_bytes": 4,
        "world_size": 2,
        "bucket_bytes": None,
    }
    with pytest.raises(InputError):
        predict_compressed_step(**(given | wrong))
    with pytest.raises(InputError):
        ring_bytes([("broadcast", 8)], 2)


def test_every_compressor_has_a_plan():
    assert {plan for _, plan, _ in CASES.values()} | {"none"} == set(COMPRESSORS)
