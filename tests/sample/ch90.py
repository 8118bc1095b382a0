"""A private registry of exercises, for the tests of the machinery alone."""

import torch

from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal, expect_raises

band = Exercise(
    "90.1",
    "A band of keys",
    requires=("band_mask",),
    stars=2,
    hints=("Which keys may query 0 see?", "Subtract the two indices."),
    instance=lambda rng: {"T": rng.randint(5, 9), "width": rng.randint(2, 4)},
)


@band.property("the shape is right", points=1, deadline_s=1.0)
def _(student, numbers):
    T = numbers["T"]
    mask = student.band_mask(T, numbers["width"])
    expect_equal(tuple(mask.shape), (T, T), "the shape", "the two sizes")


@band.property("every query sees its band and nothing else", points=2, deadline_s=1.0)
def _(student, numbers):
    T, width = numbers["T"], numbers["width"]
    mask = student.band_mask(T, width)
    expect_equal(mask.dtype, torch.bool, "the dtype", "what a comparison returns")
    for t in range(T):
        wanted = [max(0, t - width + 1) <= s <= t for s in range(T)]
        expect_equal(mask[t], wanted, f"row {t}", "the first and last key of the band")


@band.property("a width of 0 is refused", points=1, deadline_s=1.0)
def _(student, numbers):
    expect_raises(lambda: student.band_mask(4, 0), ValueError, "a width of 0", "the arguments")


mean = Exercise("90.2", "A mean", requires=("mean_of", "spread_of"))


@mean.property("the mean", points=1, deadline_s=1.0)
def _(student, numbers):
    saw = student.mean_of(torch.tensor([1.0, 2.0, 6.0]))
    expect_close(saw, 3.0, "the mean", "what the sum is divided by")


@mean.property("the spread", points=2, deadline_s=1.0)
def _(student, numbers):
    spread = student.spread_of(torch.tensor([1.0, 2.0, 6.0]))
    expect(bool(spread == 5.0), spread, 5.0, "greatest minus smallest")
