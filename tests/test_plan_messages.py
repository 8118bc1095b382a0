"""The model of the collectives: what it says of known cases, its bounds, its seconds."""

from fractions import Fraction
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlab.comm.collectives import ALGORITHMS as WRITTEN
from slimlab.config import InputError
from slimlab.plan.messages import (
    ALGORITHMS,
    Link,
    alpha_beta_s,
    cost_of,
    crossover_bytes,
    lower_bound_bytes,
    lower_bound_steps,
    messages_of,
    phases_of,
)
from slimlab.plan.phases import PHASES

ALL_REDUCES = [name for name in ALGORITHMS if name.endswith("all_reduce")]
SLOW = Link(alpha_s=1e-3, beta_s_per_byte=1e-6)


def test_every_collective_that_is_written_is_predicted():
    assert set(ALGORITHMS) == set(WRITTEN) == set(PHASES)


def test_a_ring_of_three_sends_what_chapter_seven_draws():
    # 7 elements: parts of 2, 2 and 3. A rank sends every part but its own, then all but the next's.
    traffic = messages_of("ring_all_reduce", 3, 7, 4)
    assert traffic.messages == ((0, 4, 0), (0, 0, 4), (4, 0, 0))
    assert traffic.n_bytes == ((0, 4 * (5 + 5), 0), (0, 0, 4 * (5 + 4)), (4 * (4 + 5), 0, 0))
    assert traffic.num_steps == 4
    assert traffic.bytes_sent == (40, 36, 36)
    assert traffic.bytes_received == (36, 40, 36)
    assert traffic.messages_sent == traffic.messages_received == (4, 4, 4)


def test_a_tree_from_rank_one_of_five():
    # Places 0 1 2 3 4 are ranks 1 2 3 4 0; place 3 hangs under place 1, the others under the root.
    traffic = messages_of("binomial_broadcast", 5, 10, 4, root=1)
    sent = {
        (src, dst)
        for src, row in enumerate(traffic.messages)
        for dst, count in enumerate(row)
        if count
    }
    assert sent == {(1, 2), (1, 3), (1, 0), (2, 4)}
    assert traffic.bytes_sent == (0, 120, 40, 0, 0)
    assert traffic.num_steps == 3
    back = messages_of("binomial_reduce", 5, 10, 4, root=1)
    assert back.n_bytes == tuple(zip(*traffic.n_bytes))


def test_rabenseifner_halves_and_doubles():
    traffic = messages_of("rabenseifner_all_reduce", 4, 16, 1)
    # Rank 0 sends 8 to rank 2 and 4 to rank 1; then 4 to rank 1 and 8 to rank 2.
    assert traffic.n_bytes[0] == (0, 8, 16, 0)
    assert traffic.messages[0] == (0, 2, 2, 0)
    assert traffic.num_steps == 4


@pytest.mark.parametrize("world_size", range(1, 17))
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_sent_is_received_and_no_rank_writes_to_itself(algorithm, world_size):
    for num_elements in (0, 1, world_size - 1, 3 * world_size + 1):
        traffic = messages_of(algorithm, world_size, num_elements, 8, ranks_per_host=1)
        assert sum(traffic.bytes_sent) == sum(traffic.bytes_received)
        assert all(traffic.messages[rank][rank] == 0 for rank in range(world_size))
        assert all(
            n_bytes == 0 or count > 0
            for counts, row in zip(traffic.messages, traffic.n_bytes)
            for count, n_bytes in zip(counts, row)
        )
        assert (traffic.num_steps == 0) == (world_size == 1)


@given(st.sampled_from(ALL_REDUCES), st.integers(1, 40), st.integers(0, 500), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_no_all_reduce_sends_less_than_the_lower_bound(
    algorithm, world_size, num_elements, item_bytes
):
    per_host = world_size // 2 or 1
    traffic = messages_of(algorithm, world_size, num_elements, item_bytes, ranks_per_host=per_host)
    bound = lower_bound_bytes(world_size, num_elements * item_bytes)
    assert max(traffic.bytes_sent) >= bound - 1e-6
    assert sum(traffic.bytes_sent) >= world_size * bound - 1e-6
    assert traffic.num_steps >= lower_bound_steps(world_size)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8])
def test_the_ring_meets_the_lower_bound_when_its_parts_are_equal(world_size):
    n_bytes = 4 * 6 * world_size
    bound = lower_bound_bytes(world_size, n_bytes)
    assert bound == 2 * (world_size - 1) * n_bytes / world_size
    ring = messages_of("ring_all_reduce", world_size, 6 * world_size, 4)
    assert set(ring.bytes_sent) == {bound}
    doubling = messages_of("recursive_doubling_all_reduce", world_size, 6 * world_size, 4)
    assert doubling.num_steps == (1 if world_size == 2 else ceil(log2(world_size))) + (
        world_size in (3, 5)
    )
    assert min(doubling.bytes_sent) >= n_bytes
    if world_size in (2, 4, 8):
        halving = messages_of("rabenseifner_all_reduce", world_size, 6 * world_size, 4)
        assert set(halving.bytes_sent) == {bound}
        assert halving.num_steps == 2 * lower_bound_steps(world_size)
        assert doubling.num_steps == lower_bound_steps(world_size)


def test_two_levels_send_no_more_out_of_a_host_than_is_needed_and_in_fewer_steps():
    n = 4 * 2 * 3 * 10
    two_level = messages_of("two_level_all_reduce", 8, n, 4, ranks_per_host=4)
    ring = messages_of("ring_all_reduce", 8, n, 4)
    doubling = messages_of("recursive_doubling_all_reduce", 8, n, 4)
    bound = lower_bound_bytes(2, 4 * n)
    assert two_level.bytes_leaving_hosts(4) == (bound, bound)
    assert ring.bytes_leaving_hosts(4) == (lower_bound_bytes(8, 4 * n),) * 2
    assert doubling.bytes_leaving_hosts(4) == (4 * 4 * n,) * 2
    assert two_level.num_steps == 2 * 3 + 2 * 1
    assert ring.num_steps == 14
    assert ring.bytes_leaving_hosts(8) == (0,)
    # The third host is not full: its one rank's tensor goes to the first host and back.
    assert messages_of("two_level_all_reduce", 5, 8, 1, ranks_per_host=2).bytes_leaving_hosts(
        2
    ) == (8 + 8, 8, 8)


def test_parts_of_given_sizes():
    traffic = messages_of("ring_reduce_scatter", 3, 6, 4, sizes=[5, 0, 1])
    assert traffic.bytes_sent == (4 * 1, 4 * 6, 4 * 5)
    assert messages_of("ring_all_gather", 3, 6, 4, sizes=[5, 0, 1]).bytes_sent == (24, 20, 4)


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 7, 8, 16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_seconds_are_alpha_per_step_and_beta_and_gamma_per_byte(algorithm, world_size):
    per_host = 2 if world_size % 2 == 0 else 1
    options = {"ranks_per_host": per_host}
    cost = cost_of(algorithm, world_size, **options)
    alphas = cost.alphas + cost.host_alphas
    betas = cost.betas + cost.host_betas
    count = 48 * 7
    n_bytes = 4 * count
    found = alpha_beta_s(algorithm, world_size, count, 4, SLOW, gamma_s_per_byte=3e-7, **options)
    by_terms = 1e-3 * alphas + 1e-6 * float(betas) * n_bytes + 3e-7 * float(cost.gammas) * n_bytes
    assert found == pytest.approx(by_terms, rel=1e-12)
    assert alphas == messages_of(algorithm, world_size, 1, 1, **options).num_steps


def test_the_terms_are_those_of_the_paper():
    w = 8
    terms = {name: cost_of(name, w, ranks_per_host=4) for name in ALGORITHMS}
    almost = Fraction(w - 1, w)
    assert (terms["ring_all_reduce"].alphas, terms["ring_all_reduce"].betas) == (14, 2 * almost)
    assert terms["ring_all_reduce"].gammas == terms["rabenseifner_all_reduce"].gammas == almost
    halving = terms["rabenseifner_all_reduce"]
    assert (halving.alphas, halving.betas) == (6, 2 * almost)
    doubling = terms["recursive_doubling_all_reduce"]
    assert (doubling.alphas, doubling.betas, doubling.gammas) == (3, 3, 3)
    tree, long = terms["binomial_broadcast"], terms["scatter_ring_broadcast"]
    assert (tree.alphas, tree.betas, tree.gammas) == (3, 3, 0)
    assert (long.alphas, long.betas) == (3 + 7, 2 * almost)
    two_level = terms["two_level_all_reduce"]
    assert (two_level.alphas, two_level.betas) == (2, Fraction(1, 4))
    assert (two_level.host_alphas, two_level.host_betas) == (6, Fraction(3, 2))
    folded = cost_of("rabenseifner_all_reduce", 6)
    assert (folded.alphas, folded.betas, folded.gammas) == (6, Fraction(3, 2) + 2, Fraction(7, 4))


@pytest.mark.parametrize("world_size", range(1, 18))
def test_a_long_broadcast_sends_all_but_its_own_part_twice_one_after_the_other(world_size):
    cost = cost_of("scatter_ring_broadcast", world_size)
    assert cost.betas == 2 * Fraction(world_size - 1, world_size)
    assert cost.alphas == lower_bound_steps(world_size) + world_size - 1


def test_a_step_lasts_as_long_as_its_largest_message():
    # 7 elements on 3 ranks: parts of 2, 2 and 3
    link = Link(0.0, 1.0)
    assert alpha_beta_s("ring_all_reduce", 3, 7, 1, link) == 4 * 3
    assert alpha_beta_s("ring_all_reduce", 1, 7, 1, link) == 0


def test_the_inside_of_a_host_has_a_link_of_its_own():
    arguments = ("two_level_all_reduce", 8, 800, 1, Link(1.0, 0.0))
    far = alpha_beta_s(*arguments, ranks_per_host=4)
    near = alpha_beta_s(*arguments, ranks_per_host=4, host_link=Link(0.0, 0.0))
    assert (far, near) == (8.0, 2.0)


@pytest.mark.parametrize("world_size", [4, 8, 64])
@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("recursive_doubling_all_reduce", "rabenseifner_all_reduce"),
        ("recursive_doubling_all_reduce", "ring_all_reduce"),
        ("binomial_broadcast", "scatter_ring_broadcast"),
    ],
)
def test_above_the_crossover_the_other_algorithm_is_faster(short, long, world_size):
    link = Link(2e-5, 1e-9)
    n_bytes = crossover_bytes(short, long, world_size, link, gamma_s_per_byte=1e-10)
    assert n_bytes == crossover_bytes(long, short, world_size, link, gamma_s_per_byte=1e-10)

    def seconds(algorithm, factor):
        count = round(n_bytes * factor)
        return alpha_beta_s(algorithm, world_size, count, 1, link, gamma_s_per_byte=1e-10)

    assert seconds(short, 0.9) < seconds(long, 0.9)
    assert seconds(short, 1.1) > seconds(long, 1.1)
    assert seconds(short, 1.0) == pytest.approx(seconds(long, 1.0), rel=1e-3)


def test_the_crossover_of_recursive_doubling_and_the_ring_on_four_ranks():
    # 2 alpha + 2 beta n = 6 alpha + 6/4 beta n, at n = 8 alpha / beta
    link = Link(1e-5, 1e-9)
    found = crossover_bytes("recursive_doubling_all_reduce", "ring_all_reduce", 4, link)
    assert found == pytest.approx(8 * 1e-5 / 1e-9)


def test_where_one_is_never_slower_there_is_no_crossover():
    assert crossover_bytes("ring_all_reduce", "rabenseifner_all_reduce", 8, SLOW) is None
    assert crossover_bytes("ring_all_reduce", "rabenseifner_all_reduce", 2, SLOW) is None
    assert crossover_bytes("ring_all_reduce", "ring_all_reduce", 8, SLOW) is None


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: messages_of("ring", 2, 3, 4), "algorithm: one of ring_all_reduce"),
        (lambda: messages_of("ring_all_reduce", 0, 3, 4), "world_size"),
        (lambda: messages_of("ring_all_reduce", 2, -1, 4), "num_elements"),
        (lambda: messages_of("ring_all_reduce", 2, 3, 0), "item_bytes"),
        (lambda: messages_of("binomial_reduce", 2, 3, 4, root=2), "root"),
        (lambda: messages_of("two_level_all_reduce", 4, 3, 4), "ranks_per_host"),
        (lambda: messages_of("two_level_all_reduce", 4, 3, 4, ranks_per_host=5), "from 1 to 4"),
        (lambda: messages_of("ring_all_gather", 2, 3, 4, sizes=[1, 1]), "together 3 elements"),
        (lambda: messages_of("ring_all_reduce", 2, 3, 4, sizes=[1, 2]), "algorithm with sizes"),
        (lambda: phases_of("two_level_all_reduce", 4), "ranks_per_host"),
        (lambda: alpha_beta_s("ring_all_reduce", 2, 3, 4, SLOW, gamma_s_per_byte=-1), "gamma"),
        (lambda: Link(-1.0, 0.0), "alpha_s"),
        (lambda: Link(0.0, float("nan")), "beta_s_per_byte"),
        (lambda: lower_bound_bytes(0, 4), "world_size"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(call, expected):
    with pytest.raises(InputError, match=expected):
        call()
