"""Graders of the exercises of chapter 15, pruning.

15.1, N of M, stands here; 15.2, a retraining in which pruned weights come back, in
ch15_retrain.py and 15.3, neurons removed for good, in ch15_smaller.py. The oracle of 15.1 sorts one
group after the other in plain Python, and a product is compared with that of the dense matrix;
tensors that are made on the way are seen by PyTorch's dispatcher.

Production has 2:4 alone, in kernels that read values and places as they lie.
"""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimlab.classroom.checks.ch02_forms import form_of, function_of
from slimlab.classroom.checks.ch09_runs import drawn
from slimlab.classroom.checks.ch15_retrain import retrained
from slimlab.classroom.checks.ch15_smaller import smaller
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal

__all__ = ["retrained", "several_of", "smaller"]

ROUNDING = {"atol": 1e-10, "rtol": 1e-10, "reason": "float64 rounding"}
EXACTLY = {"rtol": 0.0, "reason": "whole numbers"}
BY_HAND = {"rtol": 0.005, "reason": "you may round"}
PATTERNS = ((2, 4), (1, 4), (4, 8), (1, 2), (3, 4))
ODD_PATTERNS = ((2, 6), (3, 5), (1, 3), (5, 16), (2, 7))

several_of = Exercise(
    "15.1",
    "N of M",
    requires=("my_prediction", "nm_mask", "pack", "multiply"),
    stars=2,
    instance=lambda rng: dict(
        zip(("n", "m"), rng.choice([(2, 6), (3, 6), (4, 8), (2, 10), (4, 12), (5, 10)])),
        item_bytes=rng.choice([2, 4]),
    ),
    hints=(
        "Groups are rows of weight.reshape(-1, m): m neighbours in each.",
        "Sort the groups by absolute value, largest first and stable, and take n places.",
        "pack: a group with fewer than n numbers that are not 0 has n places all the same.",
        "Bits of numbers: (numbers[:, None] >> torch.arange(b)) & 1, one row each. Eight bits in a "
        "row make a byte; fill up at the end.",
        "multiply: each value has a column. Which numbers of x does a row of the matrix need?",
        "least: how many ways are there to choose n of m?",
    ),
)


class Largest(TorchDispatchMode):
    """Remember the largest tensor of floats that an operation makes while it is entered."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation of PyTorch and look at what it gives."""
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else (found,):
            dense = isinstance(one, Tensor) and one.layout == torch.strided
            if dense and one.is_floating_point():
                held = one.untyped_storage().nbytes() // one.element_size()  # a view makes nothing
                self.most = max(self.most, held)
        return found


def true_mask(weight: Tensor, n: int, m: int) -> Tensor:
    """Sort one group after the other; weight, n and m as in the exercise."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for r, row in enumerate(weight.tolist()):
        for first in range(0, len(row), m):
            order = sorted(range(first, first + m), key=lambda c: (-abs(row[c]), c))
            mask[r, order[:n]] = True
    return mask


def expect_unchanged(given: Tensor, before: Tensor, what: str) -> None:
    """Fail unless what was given to the student's function is as it was before; what names it."""
    same = torch.equal(given, before)
    expect(same, f"{what} changed its argument", "it as it was", "lines in place")


def check_mask(student, weight: Tensor, n: int, m: int, what: str, look: str) -> None:
    """Compare the student's mask of `weight`, n of m, with the oracle's.

    what, look  for the message
    """
    given = weight.clone()
    saw = function_of(student, "nm_mask")(given, n, m)
    what = f"nm_mask of {what}, {n} of {m}"
    fits = isinstance(saw, Tensor) and saw.dtype == torch.bool
    expect(fits, f"{what}: {form_of(saw)}", "a tensor of bool", "the return line")
    wanted = true_mask(weight, n, m)
    expect_equal(tuple(saw.shape), tuple(wanted.shape), f"{what}: shape", look)
    counts = saw.reshape(-1, m).sum(1)
    expect_close(counts, torch.full_like(counts, n), f"{what}: kept in each group", look, **EXACTLY)
    expect_close(saw.int(), wanted.int(), what, look, **EXACTLY)
    expect(
        torch.equal(given, weight), f"{what} changed its argument", "it as it was", "lines in place"
    )


@several_of.property("masks of n of m", points=2)
def _(student, numbers):
    look = "along which dim the neighbours lie, and absolute values"
    for k, (n, m) in enumerate((*PATTERNS, *ODD_PATTERNS)):
        weight = drawn(k, 4, 3 * m)
        check_mask(student, weight, n, m, f"a matrix {tuple(weight.shape)}", look)
    equal = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]).double()
    look = "which of equal ones stay, and zeros: a stable sort, and no threshold"
    check_mask(student, equal, 2, 4, "equal numbers", look)


def packed_by(student, weight: Tensor, n: int, m: int) -> dict:
    """Return what the student's pack stores of `weight`, n of m; fail if it is no dictionary."""
    given = weight.clone()
    saw = function_of(student, "pack")(given, n, m)
    fits = isinstance(saw, dict) and all(isinstance(one, Tensor) for one in saw.values())
    what = f"pack of a matrix {tuple(weight.shape)}, {n} of {m}"
    expect(fits, f"{what}: {form_of(saw)}", "a dictionary of tensors", "the return line")
    expect(
        torch.equal(given, weight), f"{what} changed its argument", "it as it was", "lines in place"
    )
    return {
        name: one.detach().clone(memory_format=torch.contiguous_format) for name, one in saw.items()
    }


def pruned(seed: int, rows: int, columns: int, n: int, m: int) -> Tensor:
    """Draw a matrix (rows, columns) from `seed` and prune it to n of m."""
    weight = drawn(seed, rows, columns)
    return weight * true_mask(weight, n, m)


def check_product(student, weight: Tensor, n: int, m: int, num_rows: int, look: str) -> None:
    """Let `student` pack `weight`, n of m, and multiply; compare with the dense product.

    num_rows  of x
    look      where to look
    """
    stored = packed_by(student, weight, n, m)
    x = drawn(50, num_rows, weight.shape[1]).to(weight.dtype)
    saw = function_of(student, "multiply")(stored, x.clone(), n, m)
    what = f"multiply for a matrix {tuple(weight.shape)}, {n} of {m}, {num_rows} rows of x"
    near = ROUNDING if weight.dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
    expect_close(saw, x @ weight.T, what, look, **near)


@several_of.property("packed, and multiplied", points=3)
def _(student, numbers):
    look = "which value has which column, and the order in which bits are written and read"
    for k, (n, m) in enumerate(PATTERNS):
        for num_rows in (1, 3):
            check_product(student, pruned(k, 5, 2 * m, n, m), n, m, num_rows, look)


@several_of.property("packed where m is no power of two, and where bytes do not come out", points=2)
def _(student, numbers):
    look = "the bits of a place, and bytes that hold parts of two places"
    for k, (n, m) in enumerate(ODD_PATTERNS):
        check_product(student, pruned(k, 3, 3 * m, n, m), n, m, 2, look)


@several_of.property("groups with fewer numbers than n", points=2)
def _(student, numbers):
    look = "how many places a group of zeros has"
    for n, m in ((2, 4), (3, 5)):
        weight = pruned(9, 4, 2 * m, n, m)
        weight[0, :m] = 0.0
        weight[2] = 0.0
        weight[1, weight[1].nonzero()[0]] = 0.0
        check_product(student, weight, n, m, 2, look)


@several_of.property("bytes as the formula has them", points=2)
def _(student, numbers):
    for n, m in (*PATTERNS, *ODD_PATTERNS):
        for dtype in (torch.float32, torch.float64):
            weight = pruned(11, 5, 3 * m, n, m).to(dtype)
            stored = packed_by(student, weight, n, m)
            saw = sum(one.numel() * one.element_size() for one in stored.values())
            num_values, num_bits = 15 * n, math.ceil(math.log2(m))
            wanted = num_values * weight.element_size() + math.ceil(num_values * num_bits / 8)
            what = f"bytes of all tensors of a matrix {tuple(weight.shape)}, {n} of {m}"
            look = "the type of the values, bits for each place, and whether bytes have gaps"
            expect_equal(saw, wanted, what, look)
            check_product(student, weight, n, m, 1, "how the matrix is read back")


@several_of.property("multiplied without the dense matrix", points=2)
def _(student, numbers):
    for n, m in ((2, 4), (1, 4), (3, 8)):
        weight = pruned(13, 24, 4 * m, n, m)
        stored, x = packed_by(student, weight, n, m), drawn(14, 1, 4 * m)
        with torch.no_grad(), Largest() as seen:
            saw = function_of(student, "multiply")(stored, x, n, m)
        what = f"multiply for a matrix {tuple(weight.shape)}, {n} of {m}"
        expect_close(saw, x @ weight.T, what, "the product itself", **ROUNDING)
        fits = seen.most < weight.numel()
        saw = f"{what}: a tensor of {seen.most} floats on the way"
        look = "what is as large as the dense matrix; which numbers of x are needed?"
        expect(fits, saw, f"fewer than {weight.numel()}", look)


@several_of.property("your prediction by hand was right", points=1)
def _(student, numbers):
    saw = function_of(student, "my_prediction")()
    n, m, item_bytes = (numbers[name] for name in ("n", "m", "item_bytes"))
    bits, choices = 0, math.factorial(m) // math.factorial(n) // math.factorial(m - n)
    while 2**bits < choices:
        bits += 1
    looks = {
        "places": (n * math.ceil(math.log2(m)), "bits of a place, and how many places a group has"),
        "bitmap": (m, "one bit for each neighbour, kept or not"),
        "least": (bits, "how many groups there are, as choices of n among m, and bits for them"),
    }
    fine = isinstance(saw, dict) and set(looks) <= set(saw)
    asked = f"a dictionary with {', '.join(looks)}"
    expect(fine, f"my_prediction(): {form_of(saw)}", asked, "the return line")
    for name, (extra, look) in looks.items():
        wanted = (8 * item_bytes * n + extra) / (8 * item_bytes * m)
        expect_close(saw[name], wanted, f"my_prediction()[{name!r}]", look, **BY_HAND)
