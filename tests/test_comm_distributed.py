"""What is special to ranks that torch.distributed connects; what all runtimes share is elsewhere.

One launched world runs all cases over gloo; each is then reported by its name.
"""

import json
import os
import sys
import traceback
import warnings
from dataclasses import replace

import comm_checks
import pytest
import torch
import torch.distributed as dist
from comm_cases import run_cases
from comm_checks import part, same

from slimlab.comm.calls import Call
from slimlab.comm.distributed import TorchCommunicator, init_torch
from slimlab.comm.gloo_messages import INLINE_BYTES
from slimlab.comm.launch import run_ranks
from slimlab.comm.report import CommunicationError, MismatchError, RanksTimeoutError
from slimlab.comm.torch_carriers import in_words
from slimlab.config import InputError

WORLD_SIZE = 3
# In elements of 4 bytes: with the header, in a message of its own, and much more than sockets keep.
SMALL, LARGE, HUGE = INLINE_BYTES // 4, INLINE_BYTES // 4 + 1, 3_000_000
NUM_GPUS = torch.cuda.device_count() if dist.is_nccl_available() else 0
CASES = {}


def case(function):
    CASES[function.__name__.replace("_", " ")] = function
    return function


def run_all(comm):
    """Run every case; of each, how it failed on this rank, an empty text if it did not."""
    warnings.simplefilter("error")
    found = {}
    for name, function in CASES.items():
        try:
            function(comm)
            found[name] = ""
        except BaseException as error:  # what pytest raises is no Exception
            found[name] = f"{error!r}\n{traceback.format_exc()}"
    return found


def ring(comm):
    return (comm.rank + 1) % comm.world_size, (comm.rank - 1) % comm.world_size


def apart(comm, name, timeout_s=20.0, check=True):
    """Connect all ranks but the last once more, for calls that fail and are not to end the run."""
    comm.barrier()  # so that they come at the same time, also where it is short
    if comm.rank == comm.world_size - 1:
        return None
    link = replace(comm._carriers.link, timeout_s=timeout_s)
    return TorchCommunicator(link.to_group(name, comm.rank, comm.world_size - 1), check=check)


@case
def receives_of_one_tag_keep_their_order_however_long_their_messages_are(comm):
    dst, src = ring(comm)
    lengths = (3, LARGE, SMALL, HUGE, 0, LARGE)
    sent = [comm.isend(part(comm.rank, (n,), seed=i), dst, 5) for i, n in enumerate(lengths)]
    asked = [comm.irecv(src, 5) for _ in lengths[:-1]]
    last = comm.recv(src, 5)
    found = [handle.wait() for handle in asked[::-1]][::-1] + [last]
    for handle in sent:
        handle.wait()
    for i, (tensor, n) in enumerate(zip(found, lengths)):
        same(tensor, part(src, (n,), seed=i), f"message {i} of {n}")


@case
def started_receives_go_on_while_their_rank_waits_in_a_send(comm):
    dst, src = ring(comm)
    asked = [comm.irecv(src, tag) for tag in (0, 1)]
    for tag in (1, 0):
        comm.send(part(comm.rank, (HUGE,), seed=tag), dst, tag)
    for tag in (1, 0):
        same(asked[tag].wait(), part(src, (HUGE,), seed=tag), f"tag {tag}")


@case
def started_receives_go_on_while_their_rank_waits_in_collectives(comm):
    if comm.rank == 0:
        asked = [comm.irecv(src, src) for src in range(1, comm.world_size)]
        handle = comm.all_reduce(torch.ones(2), async_op=True)
        assert handle.wait().tolist() == [comm.world_size] * 2
        comm.barrier()
        for src, one in enumerate(asked, 1):
            same(one.wait(), part(src, (HUGE,)), f"from {src}")
    else:
        comm.send(part(comm.rank, (HUGE,)), 0, comm.rank)
        comm.all_reduce(torch.ones(2), async_op=True).wait()
        comm.barrier()


@case
def started_receives_go_on_while_their_rank_waits_for_another_receive(comm):
    dst, src = ring(comm)
    early = comm.irecv(src, 1)
    if comm.rank == 0:
        comm.send(part(0, (HUGE,)), dst, 1)
        comm.send(torch.ones(1), dst, 2)
        comm.recv(src, 2)
    else:
        late = comm.irecv(src, 2)
        late.wait()
        comm.send(part(comm.rank, (HUGE,)), dst, 1)
        comm.send(torch.ones(1), dst, 2)
    same(early.wait(), part(src, (HUGE,)), "what was asked for first")


@case
def a_message_that_does_not_fit_is_taken_and_the_next_one_is_whole(comm):
    pair = apart(comm, "fits")
    if pair is None:
        return
    other = 1 - pair.rank
    for n in (3, LARGE):
        sent = [pair.isend(part(pair.rank, (n,), seed=i), other) for i in range(2)]
        out = torch.zeros(n + 1)
        with pytest.raises(InputError, match=rf"from rank {other} with tag 0, float32 \({n},"):
            pair.irecv(other, out=out).wait()
        assert not out.any()
        same(pair.recv(other), part(other, (n,), seed=1), "the next")
        for handle in sent:
            handle.wait()


@case
def a_payload_goes_straight_into_out_and_into_a_parameter(comm):
    dst, src = ring(comm)
    for n in (SMALL, HUGE):
        out = torch.nn.Parameter(torch.zeros(n))
        sent = comm.isend(part(comm.rank, (n,)), dst)
        assert comm.recv(src, out=out) is out
        sent.wait()
        same(out.detach(), part(src, (n,)), f"{n}")
        assert comm.all_reduce(out.detach(), "max", out=out) is out
        assert out.requires_grad


@case
def views_are_sent_as_what_they_show(comm):
    dst, src = ring(comm)
    shown = [
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(5, -1),
        lambda x: torch.complex(x, x + 1).conj(),
        lambda x: torch.complex(x, x + 1).conj().imag,
    ]
    for show in shown:
        mine, its = (show(part(rank, (4, 6))) for rank in (comm.rank, src))
        same(comm.sendrecv(mine, dst, src), its.resolve_conj().resolve_neg().contiguous(), "sent")
        all_ = [show(part(rank, (4, 6))) for rank in range(comm.world_size)]
        same(comm.all_reduce(mine), sum(all_[1:], all_[0]).contiguous(), "all_reduce")
        whole = torch.cat(all_)
        same(comm.all_gather(mine), whole.resolve_conj().resolve_neg(), "all_gather")


@case
def int16_is_combined_as_torch_does_it_also_beyond_its_range(comm):
    mine = torch.tensor([20_000, -30_000, comm.rank], dtype=torch.int16)
    all_ = [torch.tensor([20_000, -30_000, r], dtype=torch.int16) for r in range(comm.world_size)]
    same(comm.all_reduce(mine), sum(all_[1:], all_[0]), "all_reduce")
    found = comm.reduce_scatter(mine.repeat(comm.world_size))
    same(found, sum(all_[1:], all_[0]), "reduce_scatter")
    same(comm.all_reduce(mine, "max", async_op=True).wait(), all_[-1], "max")


@case
def a_dtype_that_nothing_combines_is_refused_before_anybody_waits(comm):
    for call in (comm.all_reduce, comm.reduce, comm.reduce_scatter):
        with pytest.raises(InputError, match="gloo and NCCL can combine"):
            call(torch.ones(comm.world_size, dtype=torch.uint16))
    same(
        comm.all_gather(torch.full((1,), comm.rank, dtype=torch.uint16)),
        torch.arange(comm.world_size).to(torch.uint16),
        "moved it is",
    )


@case
def reduce_scatter_combines_in_the_order_of_the_ranks(comm):
    parts = [torch.tensor([1e8, 1.0, -1e8]).roll(rank) for rank in range(comm.world_size)]
    total = parts[0] + parts[1] + parts[2]
    found = comm.reduce_scatter(parts[comm.rank])
    assert found.item() == total[comm.rank].item()


@case
def started_collectives_may_be_waited_for_in_any_order(comm):
    started = [
        comm.all_reduce(part(comm.rank, (n,), seed=i), async_op=True)
        for i, n in enumerate((HUGE, 1, 0, LARGE))
    ]
    comm.barrier()
    whole = comm.broadcast(part(comm.rank, (5,)), 1)
    same(whole, part(1, (5,)), "a collective in between")
    for i, n in ((3, LARGE), (0, HUGE), (2, 0), (1, 1)):
        parts = [part(rank, (n,), seed=i) for rank in range(comm.world_size)]
        same(started[i].wait(), sum(parts), f"the one of {n}")


@case
def a_started_collective_does_not_wait_for_the_others_to_come(comm):
    if comm.rank == 0:
        handle = comm.all_reduce(torch.ones(1), async_op=True)
        for dst in range(1, comm.world_size):
            comm.send(torch.ones(1), dst)
    else:
        comm.recv(0)
        handle = comm.all_reduce(torch.ones(1), async_op=True)
    assert handle.wait().item() == comm.world_size


@case
def groups_are_split_again_and_their_messages_do_not_mix(comm):
    pair = comm.split(0 if comm.rank < 2 else None, key=-comm.rank)
    twin = comm.split(0)
    if comm.rank == 2:
        assert pair is None
    else:
        assert pair.ranks == (1, 0)
        again, alone = pair.split(0), pair.split(pair.rank)
        other = 1 - pair.rank
        sent = [one.isend(torch.tensor(float(i)), other) for i, one in enumerate((again, pair))]
        assert [one.recv(other).item() for one in (pair, again)] == [1.0, 0.0]
        for handle in sent:
            handle.wait()
        assert again.all_reduce(torch.tensor([pair.rank])).tolist() == [1]
        assert alone.all_gather(torch.ones(2)).tolist() == [1.0, 1.0]
    assert twin.all_reduce(torch.ones(1)).item() == comm.world_size


@case
def calls_that_differ_are_named_with_the_line_that_started_them(comm):
    pair = apart(comm, "differ")
    if pair is None:
        return
    handle = pair.all_reduce(torch.ones(2 + pair.rank), async_op=True)  # this line
    with pytest.raises(MismatchError) as caught:
        handle.wait()
    text = str(caught.value)
    assert "different arguments" in text
    assert text.count("# this line") == 2
    assert [f"all_reduce(float32 ({n},), op=sum, async)" in text for n in (2, 3)] == [True] * 2


@case
def a_started_call_that_differs_stops_the_next_collective(comm):
    pair = apart(comm, "differ next")
    if pair is None:
        return
    started = pair.all_reduce(torch.ones(1), async_op=True) if pair.rank == 0 else None
    with pytest.raises(MismatchError) as caught:
        pair.broadcast(torch.ones(1))
    assert "all_reduce(float32 (1,), op=sum, async)" in str(caught.value)
    assert "broadcast(float32 (1,), src=0)" in str(caught.value)
    assert list(pair.progress.started) == [started] * (pair.rank == 0)


@case
def a_skipped_collective_is_found_by_the_end(comm):
    pair = apart(comm, "skipped")
    if pair is None:
        return
    if pair.rank == 0:
        pair.all_reduce(torch.ones(1), async_op=True)
    with pytest.raises(MismatchError, match="unequal numbers of collectives") as caught:
        pair._finish()
    assert "1     has finished" in str(caught.value)


@case
def a_call_gives_up_and_says_for_whom_it_waited(comm):
    for text, whom, call in (
        ("wait(irecv(src=1, tag=3))", "rank 1", lambda pair: pair.irecv(1, 3).wait()),
        ("barrier()", "another rank", lambda pair: pair.barrier()),
    ):
        pair = apart(comm, text, timeout_s=1.0)
        if comm.rank == 0:
            with pytest.raises(RanksTimeoutError) as caught:
                call(pair)
            assert f"rank 0 was in {text} and gave up after 1 s" in str(caught.value)
            assert f"{whom} is in another call" in str(caught.value)
        comm.barrier()


@case
def what_a_watcher_counts_is_right_after_started_collectives(comm):
    come, gone = (kind[None] for kind in (comm.progress.counts.come, comm.progress.counts.gone))
    handle = comm.all_reduce(torch.ones(1), async_op=True)
    comm.barrier()
    counts = comm.progress.counts
    assert (counts.come[None] - come, counts.gone[None] - gone) == (2, 1)
    handle.wait()
    assert (counts.come[None] - come, counts.gone[None] - gone) == (2, 2)


@case
def without_the_comparison_a_started_collective_starts_at_once(comm):
    pair = apart(comm, "unchecked", check=False)
    if pair is None:
        return
    handle = pair.all_reduce(torch.ones(2), "mean", async_op=True)
    pair.barrier()
    assert handle.wait().tolist() == [1.0, 1.0]
    assert pair.reduce_scatter(torch.ones(2)).tolist() == [2.0]
    assert pair.split(0).broadcast(torch.tensor(pair.rank), 1).item() == 1


@case
def the_threads_that_read_sockets_displace_nobody(comm):
    if not hasattr(os, "SCHED_BATCH"):
        return
    comm.split(0)
    found = []
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/comm") as file:
            if file.read().strip() == "gloo_tcp_loop":
                found.append(os.sched_getscheduler(int(thread)))
    assert len(found) >= 2
    assert set(found) == {os.SCHED_BATCH}


@case
def torch_itself_can_be_called_too(comm):
    assert (dist.get_rank(), dist.get_world_size()) == (comm.rank, comm.world_size)
    tensor = torch.ones(3)
    dist.all_reduce(tensor)
    assert tensor.tolist() == [comm.world_size] * 3
    with pytest.raises(InputError, match="is not connected yet"):
        init_torch("gloo", comm.rank, comm.world_size, comm._carriers.link.store)
    assert sys.excepthook is sys.__excepthook__ or "torch" not in sys.excepthook.__module__


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(run_all, WORLD_SIZE, backend="gloo", timeout_s=60.0)


@pytest.mark.parametrize("name", CASES)
def test_over_gloo(outcomes, name):
    failures = [f"rank {rank}: {one[name]}" for rank, one in enumerate(outcomes) if one[name]]
    assert not failures, "\n".join(failures)


@pytest.mark.skipif(not NUM_GPUS, reason="no GPU that NCCL can use")
def test_all_operations_over_nccl(tmp_path):
    world_size = min(NUM_GPUS, 4)
    run_ranks(run_cases, world_size, backend="nccl", args=(list(comm_checks.CASES), str(tmp_path)))
    for rank in range(world_size):
        lines = [json.loads(line) for line in (tmp_path / str(rank)).read_text().splitlines()]
        assert [name for name, _ in lines] == list(comm_checks.CASES)
        assert [f"{name}: {failure}" for name, failure in lines if failure] == []


def test_ranks_over_gloo_end_without_a_word(capfd):
    def program(comm):
        comm.all_reduce(torch.ones(2), async_op=True).wait()
        comm.split(comm.rank % 2).barrier()

    run_ranks(program, 2, backend="gloo")
    assert capfd.readouterr() == ("", "")


def test_a_rank_whose_others_never_come_says_so(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 2)
    with pytest.raises(CommunicationError, match="rank 0 of 2 did not reach the others within 0.5"):
        init_torch("gloo", 0, 2, store, 0.5)
    assert not dist.is_initialized()


def test_a_backend_that_is_not_there_is_refused(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    with pytest.raises(InputError, match="backend: gloo, or nccl"):
        init_torch("mpi", 0, 1, store)
    with pytest.raises(InputError, match="nccl: a GPU for each rank"):
        init_torch("nccl", 0, 1, store, local_rank=10_000)


@pytest.mark.parametrize(
    ("said", "kind", "expected"),
    [
        ("Timed out waiting 4000ms for recv operation", RanksTimeoutError, "gave up after 4 s"),
        ("Application timeout caused pair closure", RanksTimeoutError, "rank 2 is in another call"),
        ("Connection closed by peer [127.0.0.1]:5509", CommunicationError, "to rank 2 was lost"),
        ("Read error [127.0.0.1]:5: Connection reset by peer", CommunicationError, "killed"),
        ("something unheard of", CommunicationError, "failed: something unheard of"),
    ],
)
def test_what_torch_says_is_said_again_with_rank_and_call(said, kind, expected):
    call = Call("recv", "src=2, tag=0", source=(2, 0))
    error = in_words(RuntimeError(said), 1, call, 4.0)
    assert type(error) is kind
    assert str(error).startswith("rank 1 was in recv(src=2, tag=0)")
    assert expected in str(error)
    assert "had started a collective" in str(in_words(RuntimeError(said), 1, None, 4.0))


def names_of_threads():
    found = []
    for thread in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{thread}/comm") as file:
            found.append(file.read().strip())
    return [name for name in found if "gloo" in name]


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc that lists threads")
def test_a_closed_communicator_leaves_no_thread_and_says_that_it_is_closed():
    def program(comm):
        group = comm.split(0, comm.rank)
        group.split(0, comm.rank).all_reduce(torch.ones(2))
        group.all_reduce(torch.ones(2), async_op=True).wait()
        before = len(names_of_threads())
        comm.close()
        said = []
        for one in (comm, group):
            with pytest.raises(CommunicationError, match="that is closed") as error:
                one.all_reduce(torch.ones(2))
            said.append(str(error.value))
        return before, names_of_threads(), said[0]

    for rank, (before, after, said) in enumerate(run_ranks(program, 2, backend="gloo")):
        assert before > 0
        assert after == []
        assert said.startswith(f"rank {rank} uses a communicator")
