"""Every operation on every runtime: one launch per runtime and world size runs all cases.

Each case is then reported by its name. A case that hangs ends its run; what comes after it is run
in a second launch.
"""

import json
from pathlib import Path

import pytest
from comm_cases import CASES, run_cases
from comm_checks import (
    MODES,
    check_all_gather,
    check_all_reduce,
    check_all_to_all,
    check_broadcast,
    check_gather,
    check_messages,
    check_reduce,
    check_reduce_scatter,
    check_scatter,
    ops_of,
    part,
)
from comm_runtimes import BACKENDS, started_by, why_not
from hypothesis import given, settings
from hypothesis import strategies as st

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import CommunicationError
from slimlab.comm.wire import DTYPES

WORLD_SIZES = (1, 2, 3, 4, 5)
TIMEOUT_S = 60.0
MAX_LAUNCHES = 3
END = "the run ends with nothing left over"


def outcomes(runtime: str, world_size: int, directory: Path, names: list[str]) -> dict[str, str]:
    """Run cases; of each, and of END, how it failed, an empty text if it did not."""
    found, left, ends = {}, names, []
    for launch in range(MAX_LAUNCHES):
        place = directory / str(launch)
        place.mkdir(parents=True)
        try:
            with started_by(runtime) as backend:
                results = run_ranks(
                    run_cases,
                    world_size,
                    backend=backend,
                    timeout_s=TIMEOUT_S,
                    args=(left, str(place)),
                )
            ends.append("" if results == [(r, world_size) for r in range(world_size)] else results)
        except CommunicationError as error:
            ends.append(f"{type(error).__name__}: {error}")
        told = [read(place / str(rank)) for rank in range(world_size)]
        done = left[: min(map(len, told))]
        for name in done:
            failed = [f"rank {rank}: {one[name]}" for rank, one in enumerate(told) if one[name]]
            found[name] = "\n".join(failed)
        if done == left:
            found[END] = ends[-1]
            return found
        found[left[len(done)]] = f"the run ended in this case: {ends[-1]}"
        left = left[len(done) + 1 :]
    return found | dict.fromkeys(
        [*left, END], f"not run, since {MAX_LAUNCHES} runs ended before it"
    )


def read(path: Path) -> dict[str, str]:
    return dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}


@pytest.fixture(scope="module", params=[(r, n) for r in BACKENDS for n in WORLD_SIZES],
                ids=lambda param: f"{param[0]}-{param[1]}")  # fmt: skip
def world(request, tmp_path_factory):
    runtime, world_size = request.param
    reason = why_not(runtime)
    if reason is not None:
        pytest.skip(reason)
    return outcomes(runtime, world_size, tmp_path_factory.mktemp("world"), list(CASES))


@pytest.mark.parametrize("name", [*CASES, END])
def test_an_operation_gives_what_a_plain_computation_gives(world, name):
    assert world[name] == "", world[name]


@pytest.mark.parametrize("runtime", ["threads", "gloo"])
def test_a_case_that_fails_or_waits_for_ever_leaves_the_others_alone(
    runtime, tmp_path, monkeypatch
):
    def fails(comm):
        assert comm.rank != 1, "wrong on one rank"

    def waits(comm):
        if comm.rank == 1:
            comm.recv(0)

    def leaves(comm):
        if comm.rank == 1:
            comm.isend(part(0, (3,)), 0)

    for case in (fails, waits, leaves):
        monkeypatch.setitem(CASES, case.__name__, case)
    names = ["fails", "barriers", "waits", "evens and odds", "leaves", "broadcast of int8"]
    found = outcomes(runtime, 2, tmp_path, names)
    assert found["fails"].startswith("rank 1: AssertionError: wrong on one rank")
    assert found["waits"].startswith("the run ended in this case: DeadlockError: deadlock")
    assert "waits in recv(src=0, tag=0)  line" in found["waits"] or runtime != "threads"
    assert [found[name] for name in names[1::2]] == [""] * 3
    assert found["leaves"] == ""
    assert found[END].startswith("UnreceivedError: all ranks have finished")


def test_a_suite_that_always_hangs_comes_to_an_end(tmp_path, monkeypatch):
    names = [f"waits {number}" for number in range(MAX_LAUNCHES)]
    for name in names:
        monkeypatch.setitem(CASES, name, lambda comm: comm.recv(1) if comm.rank == 0 else None)
    found = outcomes("threads", 2, tmp_path, [*names, "barriers"])
    assert found["barriers"] == found[END] == f"not run, since {MAX_LAUNCHES} runs ended before it"


NUMBERS = st.sampled_from([dtype for dtype in DTYPES if ops_of(dtype)])
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple) | st.tuples(st.integers(0, 50))
MORE = st.lists(st.integers(0, 3), max_size=2).map(tuple)
SIZES = st.one_of(st.integers(0, 10), st.just(0), st.integers(0, 50))


@st.composite
def calls(draw):
    """A world size, and calls as (check, arguments) that all its ranks are to make."""
    world_size = draw(st.integers(1, 5))
    root = st.integers(0, world_size - 1)
    dtype = st.sampled_from(DTYPES)
    sizes = st.lists(SIZES, min_size=world_size, max_size=world_size)
    table = st.lists(sizes, min_size=world_size, max_size=world_size)
    number_and_op = NUMBERS.flatmap(
        lambda one: st.tuples(st.just(one), st.sampled_from(ops_of(one)))
    )
    kinds = {
        check_broadcast: (SHAPES, dtype, root),
        check_reduce: (SHAPES, number_and_op, root),
        check_all_reduce: (SHAPES, number_and_op),
        check_reduce_scatter: (sizes, MORE, number_and_op),
        check_all_gather: (sizes, MORE, dtype),
        check_gather: (sizes, MORE, dtype, root),
        check_scatter: (sizes, MORE, dtype, root),
        check_all_to_all: (table, MORE, dtype),
        check_messages: (sizes, MORE, dtype),
    }
    chosen = draw(st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=4))
    return world_size, [(check, *(draw(kind) for kind in kinds[check])) for check in chosen]


def program(comm, drawn):
    for seed, (check, *arguments) in enumerate(drawn):
        flat = []
        for argument in arguments:
            is_pair = isinstance(argument, tuple) and argument and argument[0] in DTYPES
            flat += argument if is_pair else [argument]
        if check is check_messages:
            sizes, more, dtype = flat
            check(comm, [part(r, (n, *more), dtype, seed) for r, n in enumerate(sizes)], tag=seed)
        else:
            check(comm, *flat, seed=seed, mode=MODES[seed % 2])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_any_calls_with_any_sizes_give_what_a_plain_computation_gives(drawn):
    world_size, calls_of_all = drawn
    run_ranks(program, world_size, args=(calls_of_all,))
