"""Cases of slimlab.comm for every runtime: messages between two ranks."""

import torch
from comm_checks import (
    LENGTHS,
    SHAPES,
    case,
    check_messages,
    for_dtypes,
    neighbours,
    noted,
    others,
    part,
    same,
)


@for_dtypes
def messages(comm, dtype):
    check_messages(comm, [part(rank, (3, 2), dtype) for rank in range(comm.world_size)])


@case
def messages_of_every_shape(comm):
    for tag, shape in enumerate(SHAPES):
        check_messages(comm, [part(rank, shape) for rank in range(comm.world_size)], tag)
    check_messages(comm, [part(rank, (rank, 2)) for rank in range(comm.world_size)])


@case
def messages_of_every_length(comm):
    for length in LENGTHS:
        check_messages(comm, [part(rank, (length,)) for rank in range(comm.world_size)])


@case
def messages_into_a_buffer(comm):
    for shape in ((), (0, 3), (5,), (70_000,)):
        check_messages(comm, [part(rank, shape) for rank in range(comm.world_size)], 2, "out")


@case
def messages_from_views(comm):
    for view in (
        lambda x: x.T,
        lambda x: x[:, 1],
        lambda x: x[::2, ::3],
        lambda x: x[1:],
        lambda x: x[:1, :1].expand(4, 3),
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.complex(x, x).conj(),
    ):
        check_messages(comm, [view(part(rank, (4, 6))) for rank in range(comm.world_size)])


@case
def a_message_into_a_piece_of_a_buffer(comm):
    if comm.world_size == 1:
        return
    dst, src = neighbours(comm)
    whole = torch.zeros(10, device=comm.device)
    comm.sendrecv(part(comm.rank, (4,)).to(comm.device), dst, src, out=whole[3:7])
    expected = torch.zeros(10)
    expected[3:7] = part(src, (4,))
    same(whole, expected, "a buffer of which elements 3 to 6 were received")


@case
def sendrecv_around_a_ring(comm):
    if comm.world_size == 1:
        return
    dst, src = neighbours(comm)
    for tag, length in enumerate((0, 1, 77, 300_001)):
        mine, theirs = (part(r, (length,), seed=tag) for r in (comm.rank, src))
        with noted(comm, ("send", mine, dst), ("recv", theirs, src)):
            found = comm.sendrecv(mine.to(comm.device), dst, src, tag)
        same(found, theirs, f"sendrecv of {length}")


@case
def sendrecv_with_one_partner_and_other_shapes_each_way(comm):
    partner = comm.rank ^ 1
    if partner >= comm.world_size:
        return
    mine, theirs = (part(r, (2 + r, 3), torch.float64) for r in (comm.rank, partner))
    with noted(comm, ("send", mine, partner), ("recv", theirs, partner)):
        found = comm.sendrecv(mine.to(comm.device), partner, partner, 5)
    same(found, theirs, "sendrecv")


@case
def all_pairs_at_once(comm):
    receives = {src: comm.irecv(src) for src in others(comm)}
    sends = [comm.isend(part(comm.rank, (dst + 1,)).to(comm.device), dst) for dst in others(comm)]
    for src, handle in receives.items():
        same(handle.wait(), part(src, (comm.rank + 1,)), f"irecv({src})")
    assert [handle.wait() for handle in sends] == [None] * len(sends)


@case
def tags_tell_messages_apart(comm):
    if comm.world_size == 1:
        return
    dst, src = neighbours(comm)
    tags = (0, 2**20, 7, 1)
    sends = [comm.isend(part(comm.rank, (3,), seed=tag).to(comm.device), dst, tag) for tag in tags]
    for tag in reversed(tags):
        same(comm.recv(src, tag), part(src, (3,), seed=tag), f"the message with tag {tag}")
    for handle in sends:
        handle.wait()


@case
def messages_of_one_tag_keep_their_order(comm):
    if comm.world_size == 1:
        return
    dst, src = neighbours(comm)
    # Small and large ones, whose payloads a runtime may send by different ways.
    lengths = (1, 50_000, 2, 20_000, 3)
    sends = [comm.isend(part(comm.rank, (n,)).to(comm.device), dst) for n in lengths]
    for number, n in enumerate(lengths):
        same(comm.recv(src), part(src, (n,)), f"message {number} of one tag")
    for handle in sends:
        handle.wait()


@case
def the_first_irecv_gets_the_first_message(comm):
    if comm.world_size == 1:
        return
    dst, src = neighbours(comm)
    first, second = comm.irecv(src), comm.irecv(src)
    sends = [comm.isend(part(comm.rank, (n,)).to(comm.device), dst) for n in (1, 20_000, 3)]
    same(comm.recv(src), part(src, (3,)), "a recv after two irecv")
    same(second.wait(), part(src, (20_000,)), "the second irecv, waited for first")
    same(first.wait(), part(src, (1,)), "the first irecv")
    same(first.wait(), part(src, (1,)), "the first irecv, waited for again")
    for handle in sends:
        handle.wait()


@case
def irecv_into_a_buffer(comm):
    if comm.world_size == 1:
        return
    dst, src = neighbours(comm)
    for length in (0, 3, 40_000):
        out, mine = torch.ones(length, device=comm.device), part(comm.rank, (length,))
        handle = comm.irecv(src, 3, out=out)
        with noted(comm, ("send", mine, dst)):
            sent = comm.isend(mine.to(comm.device), dst, 3)
        with noted(comm, ("recv", mine, src)):
            assert handle.wait() is out
        same(out, part(src, (length,)), f"irecv of {length}")
        sent.wait()


@case
def a_sender_may_reuse_its_tensor(comm):
    if comm.world_size == 1:
        return
    dst, src = neighbours(comm)
    for length in (3, 300_001):
        expected, mine = part(src, (length,)), part(comm.rank, (length,)).to(comm.device)
        handle = comm.irecv(src)
        sent = comm.isend(mine, dst)
        sent.wait()
        mine.zero_()
        comm.barrier()
        found = handle.wait()
        found += 1  # must not reach the sender
        comm.barrier()
        same(found, expected + 1, "what was sent before the tensor changed")
        assert not mine.any(), "a change by the receiver reached the sender"
