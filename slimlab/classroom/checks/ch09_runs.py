"""Cut tensors for ranks, put their parts together again, and compare gradients with one process.

The graders of chapter 09's exercises use it. What is cut lies in parts on the ranks, and the parts
together are compared; what is not cut is whole on every rank, and each rank's is compared. Programs
run as in slimlab.classroom.checks.ch07_runs.

Production test suites compare DTensor.full_tensor() with one process, which does the same.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slimlab.classroom.checks.ch02_forms import form_of
from slimlab.classroom.grading import CheckFailed, expect, expect_close
from slimlab.comm.ledger import PayloadLedger

WORLDS = (2, 4, 3, 1)
ROUNDING = {"atol": 1e-10, "rtol": 1e-10, "reason": "float64 rounding"}


def ranks_text(world_size: int) -> str:
    """Write "1 rank" or "4 ranks" for this world_size."""
    return f"{world_size} rank{'s' * (world_size > 1)}"


def drawn(seed: int, *shape: int) -> Tensor:
    """Draw a tensor of this shape in float64; the same seed always gives the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def part_of(whole: Tensor, dim: int | None, rank: int, world_size: int) -> Tensor:
    """Copy a rank's part, where the first parts are one longer if the dim does not divide.

    whole             the tensor that is cut
    dim               the dim that is cut; None: every rank has all
    rank, world_size  which part, of how many
    """
    if dim is None:
        return whole.clone()
    return whole.tensor_split(world_size, dim)[rank].clone(memory_format=torch.contiguous_format)


def own_leaves(wholes: Mapping[str, Tensor], cut: Mapping, rank: int, world_size: int) -> dict:
    """Give a rank its parts as leaves, whose gradients autograd will keep.

    wholes            name -> whole tensor
    cut               name -> the dim that is cut, or None
    rank, world_size  which part, of how many
    """
    return {
        name: part_of(whole, cut[name], rank, world_size).requires_grad_()
        for name, whole in wholes.items()
    }


def expect_tensor(found: object, shape: Sequence[int], what: str, look: str) -> Tensor:
    """Return `found`; fail unless it is a tensor of this shape.

    shape       that it must have
    what, look  what it is, and where to look, for the message
    """
    asked = f"a tensor of shape {tuple(shape)}"
    same = isinstance(found, Tensor) and tuple(found.shape) == tuple(shape)
    expect(same, f"{what}: {form_of(found)}", asked, look)
    return found


def expect_parts(
    found: Sequence, whole: Tensor, dim: int | None, what: str, look: str, tolerance=ROUNDING
) -> None:
    """Compare what the ranks have with what one process has.

    found       of each rank, its part, or all of it where dim is None
    whole       what one process has
    dim         the dim that is cut, or None
    what, look  what it is, and where to look, for the message
    tolerance   as expect_close takes it
    """
    world_size = len(found)
    for rank, one in enumerate(found):
        true = part_of(whole, dim, rank, world_size)
        label = f"{what} on rank {rank}"
        if one is None and true.numel() == 0:
            continue
        if one is None:
            look = "where autograd lost it: a call of comm passes no gradients on"
            raise CheckFailed(f"{label}: None", f"a tensor of shape {tuple(true.shape)}", look)
        one = expect_tensor(one, true.shape, label, look)
        factor = _factor(one, true)
        hint = f"{look} (it is {factor} times what it should be)" if factor else look
        expect_close(one, true, label, hint, **tolerance)


def _factor(found: Tensor, true: Tensor) -> str:
    """Write the factor between two tensors that are multiples of each other, else nothing."""
    found, true = found.detach().double(), true.detach().double()
    scale = (true * true).sum()
    if true.numel() < 2 or not bool(scale > 0):
        return ""
    factor = ((found * true).sum() / scale).item()
    near = bool((found - factor * true).abs().max() <= 1e-8 * true.abs().max())
    return f"{factor:.4g}" if near and abs(factor - 1) > 1e-6 else ""


def expect_calls(
    ledger: PayloadLedger, most: Sequence[tuple[str, int]], what: str, look: str
) -> None:
    """Fail if a rank made other calls than these, or gave them more bytes.

    ledger      of one rank
    most        (call, bytes), in any order; each may be made once, with at most so many bytes
    what, look  what ran, and where to look, for the message
    """
    left = sorted(most, key=lambda pair: pair[1])
    allowed = ", ".join(f"one {call} of {n_bytes} bytes" for call, n_bytes in most) or "no call"
    for entry in ledger.entries:
        fits = [one for one in left if one[0] == entry.call and entry.n_bytes <= one[1]]
        if not fits:
            listed = ", ".join(f"{one.call} of {one.n_bytes}" for one in ledger.entries[:6])
            saw = f"{what}: a rank calls {listed} bytes"
            raise CheckFailed(saw, f"at most {allowed}", look)
        left.remove(fits[0])


def payload_of(ledger: PayloadLedger) -> int:
    """Add up the payload in bytes of all calls in the `ledger` of a rank."""
    return sum(entry.n_bytes for entry in ledger.entries)
