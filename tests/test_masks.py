"""Masks: what they allow, and which masks are refused."""

import math

import pytest
import torch

from slimlab.config import InputError
from slimlab.model.masks import apply_mask, causal_mask, check_mask, padding_mask, to_additive

SCORES = (2, 4, 3, 5)  # B, H, T, S


@pytest.mark.parametrize(("T", "S"), [(1, 1), (4, 4), (3, 5), (1, 6)])
def test_a_causal_mask_allows_what_is_not_later(T, S):
    mask = causal_mask(T, S)
    assert mask.dtype == torch.bool
    expected = [[s <= t + S - T for s in range(S)] for t in range(T)]
    assert mask.tolist() == expected


def test_a_causal_mask_is_square_unless_told_otherwise():
    assert torch.equal(causal_mask(4), causal_mask(4, 4))


def test_a_causal_mask_has_no_query_before_every_key():
    with pytest.raises(InputError, match="the first 2 would attend nowhere"):
        causal_mask(5, 3)


@pytest.mark.parametrize("T", [0, -1, 2.0, "4", True])
def test_a_causal_mask_needs_a_whole_number_of_queries(T):
    with pytest.raises(InputError, match="T"):
        causal_mask(T)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_padding_mask_allows_the_true_tokens(as_tensor):
    lengths = [3, 1, 5]
    mask = padding_mask(torch.tensor(lengths) if as_tensor else lengths, 5)
    assert mask.shape == (3, 1, 1, 5)
    assert mask.dtype == torch.bool
    assert mask.sum(-1).flatten().tolist() == lengths
    assert mask[0].flatten().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("lengths", [[0, 2], [6], [], [1.5], [[2]], [True]])
def test_a_padding_mask_needs_lengths_from_one_to_s(lengths):
    with pytest.raises(InputError, match="lengths"):
        padding_mask(lengths, 5)


def test_an_additive_mask_has_the_weights_of_the_boolean_one():
    mask = causal_mask(3, 5)
    additive = to_additive(mask, torch.float64)
    assert additive.dtype == torch.float64
    assert (additive[mask] == 0).all()
    assert (additive[~mask] == -math.inf).all()
    scores = torch.arange(15.0, dtype=torch.float64).view(3, 5)
    assert torch.equal(apply_mask(scores, mask), apply_mask(scores, additive))
    assert apply_mask(scores, None) is scores
    assert to_additive(additive, torch.float32).dtype == torch.float32


def test_a_mask_is_never_changed():
    mask, scores = causal_mask(3, 5), torch.zeros(SCORES)
    apply_mask(scores, mask)
    to_additive(mask)
    assert torch.equal(mask, causal_mask(3, 5))
    assert (scores == 0).all()


GOOD = {
    "one for all": causal_mask(3, 5),
    "per sequence": torch.ones(2, 1, 3, 5, dtype=torch.bool),
    "per head": torch.ones(1, 4, 3, 5, dtype=torch.bool),
    "padding": padding_mask([5, 2], 5),
    "one row for all": torch.ones(1, 5, dtype=torch.bool),
    "additive": to_additive(causal_mask(3, 5)),
    "additive that hides nothing": torch.zeros(3, 5),
    "a bias of 0 and -1": -torch.eye(3, 5),
    "half precision": torch.full((3, 5), -2.0, dtype=torch.float16),
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_mask_is_accepted(kind):
    check_mask(GOOD[kind], SCORES)


def hide_row(mask, *row):
    mask = mask.clone()
    mask[row] = -math.inf if mask.is_floating_point() else False
    return mask


BAD = {
    "floats that are 0 and 1": (causal_mask(3, 5).float(), "holds only 0 and 1"),
    "floats that are all 1": (torch.ones(3, 5), "holds only 0 and 1"),
    "whole numbers": (causal_mask(3, 5).long(), "dtype torch.int64"),
    "bytes": (causal_mask(3, 5).to(torch.uint8), "dtype torch.uint8"),
    "complex": (torch.zeros(3, 5, dtype=torch.cfloat), "dtype torch.complex64"),
    "a list": ([[True]], "given: a list"),
    "NaN": ((1 - causal_mask(3, 5).float()) * -math.inf, "NaN"),
    "plus infinity": (torch.full((3, 5), math.inf), "15 +inf"),
    "transposed": (causal_mask(3, 5).T, "shape (5, 3)"),
    "sparse": (causal_mask(3, 5).to_sparse(), "layout torch.sparse_coo"),
    "three dims": (torch.ones(4, 3, 5, dtype=torch.bool), "(1, H, T, S) for one per head"),
    "one dim": (torch.ones(5, dtype=torch.bool), "shape (5,)"),
    "other batch": (torch.ones(3, 1, 3, 5, dtype=torch.bool), "shape (3, 1, 3, 5)"),
    "an empty row": (hide_row(causal_mask(3, 5), 2), "mask[2] allows none of its 5 keys"),
    "an empty row of one head": (
        hide_row(torch.ones(2, 4, 3, 5, dtype=torch.bool), 1, 2, 0), "mask[1, 2, 0]",
    ),
    "an empty additive row": (hide_row(torch.zeros(3, 5), 1), "mask[1] allows none"),
    "a column that is hidden from all": (
        torch.tensor([[True], [False], [True]]), "mask[1] allows none",
    ),
    "the other sense": (~causal_mask(3, 3), "give ~mask"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_a_mask_with_a_fault_is_refused_with_its_reason(fault):
    mask, message = BAD[fault]
    shape = (*SCORES[:3], 3) if fault == "the other sense" else SCORES
    with pytest.raises(InputError) as error:
        check_mask(mask, shape)
    assert message in str(error.value)


def test_the_first_of_several_empty_rows_is_named():
    mask = hide_row(hide_row(torch.ones(3, 5, dtype=torch.bool), 1), 2)
    with pytest.raises(InputError) as error:
        check_mask(mask, SCORES)
    assert "mask[1]" in error.value.given
    assert "2 such rows of 3" in error.value.given


@pytest.mark.parametrize("lengths", [[1, "two"], None, [[1], [2, 3]], [2**70], 3, [0], [1.0]])
def test_lengths_that_are_no_whole_numbers_from_one_to_S_are_refused(lengths):
    with pytest.raises(InputError, match="one whole number from 1 to S = 5"):
        padding_mask(lengths, 5)


def test_only_a_mask_becomes_additive_and_only_in_a_type_with_minus_infinity():
    with pytest.raises(InputError, match="int64"):
        to_additive(torch.ones(3, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="a list"):
        to_additive([[True]])
    with pytest.raises(InputError, match="dtype = torch.int32"):
        to_additive(causal_mask(3), torch.int32)
