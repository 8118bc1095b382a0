"""The three forms of attention against each other and against PyTorch; tolerances are derived in
attention_cases.py."""

import itertools

import pytest
import torch
from attention_cases import LAYOUTS, MASKS, assert_equal, bounds, draw, make_mask, run
from torch.nn import functional as F

from slimlab.config import InputError
from slimlab.model.attention import FORMS, attention_weights, scaled_dot_product_attention
from slimlab.model.tiled import tiled_attention


def sizes_for(mask):
    # Plain causal has as many keys as queries; 7 and 11 keys are no multiple of a tile of 4.
    return {"T": 7, "S": 7} if mask == "causal" else {"T": 3, "S": 11}


def in_form(form, tile_size=4):
    if form == "tiled":
        return lambda q, k, v, m: tiled_attention(q, k, v, m, q.shape[-1] ** -0.5, tile_size)
    return lambda q, k, v, m: scaled_dot_product_attention(q, k, v, m, form=form)


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_forms_give_the_result_and_gradients_of_torch(layout, mask_kind):
    num_heads, num_kv_heads = LAYOUTS[layout]
    query, key, value = draw(num_heads, num_kv_heads, **sizes_for(mask_kind))
    mask = make_mask(mask_kind, *query.shape[:3], key.shape[-2])
    expected = run(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, enable_gqa=True),
        query, key, value, mask,
    )  # fmt: skip
    bound = bounds(query, key, value, mask)
    for form in FORMS:
        assert_equal(run(in_form(form), query, key, value, mask), expected, bound)


@pytest.mark.parametrize(("form", "S"), itertools.product(FORMS, (1, 3, 4, 5, 13)))
def test_no_length_is_special_to_a_form(form, S):
    query, key, value = draw(4, 2, T=S, S=S)
    mask = make_mask("causal", 2, 4, S, S)
    expected = run(
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        query, key, value, mask,
    )  # fmt: skip
    found = run(in_form(form), query, key, value, mask)
    assert_equal(found, expected, bounds(query, key, value, mask))


@pytest.mark.parametrize("form", FORMS)
def test_one_query_row_is_the_formula_written_with_plain_numbers(form):
    # The oracle here is arithmetic in Python floats: 2 keys of 4 features, scale 1/sqrt(4).
    from math import exp

    query = torch.tensor([[1.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    key = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 5.0]], dtype=torch.float64)
    value = torch.tensor([[10.0], [20.0]], dtype=torch.float64)
    first, second = exp(1 / 2), exp(2 / 2)
    expected = (10 * first + 20 * second) / (first + second)
    found = scaled_dot_product_attention(query, key, value, form=form)
    # About ten operations on numbers up to 20, each rounded to 2**-53.
    assert abs(found.item() - expected) <= 10 * 20 * 2.0**-53


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (5, 2, 3)])
def test_dims_before_the_heads_are_a_batch(form, leading):
    single = [x[:1].detach() for x in draw(4, 2, S=7)]
    query, key, value = (x[0].expand(*leading, *x.shape[1:]) for x in single)
    mask = make_mask("causal, T < S", 1, 1, 3, 7)
    expected = F.scaled_dot_product_attention(*single, mask, enable_gqa=True)[0]
    found = scaled_dot_product_attention(query, key, value, mask, form=form)
    assert found.shape == (*leading, 4, 3, 6)
    assert (found - expected).abs().max() <= bounds(query, key, value, mask)["output"]


@pytest.mark.parametrize("form", FORMS)
def test_one_sequence_without_heads_is_one_head(form):
    query, key, value = (x[0, 0].detach() for x in draw(1, 1, S=7))
    mask = make_mask("causal, T < S", 1, 1, 3, 7)
    with_head = F.scaled_dot_product_attention(query[None], key[None], value[None], mask)[0]
    found = scaled_dot_product_attention(query, key, value, mask, form=form)
    bound = bounds(query[None], key[None], value[None], mask)["output"]
    assert (found - with_head).abs().max() <= bound


@pytest.mark.parametrize("form", FORMS)
def test_a_scale_of_ones_own_replaces_one_over_the_root(form):
    query, key, value = draw(4, 2)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    found = scaled_dot_product_attention(query, key, value, scale=0.3, form=form)
    assert (found - expected).abs().max() <= bounds(query, key, value, None, scale=0.3)["output"]
    default = scaled_dot_product_attention(query, key, value, form=form)
    assert (found - default).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_scores_of_a_thousand_do_not_overflow(form):
    query, key, value = (x.detach() for x in draw(4, 2))
    found = scaled_dot_product_attention(query * 1e3, key, value, form=form)
    expected = F.scaled_dot_product_attention(query * 1e3, key, value, enable_gqa=True)
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= bounds(query * 1e3, key, value, None)["output"]


def test_the_weights_are_a_softmax_over_the_keys():
    query, key, value = (x.detach() for x in draw(4, 2))
    mask = make_mask("random boolean", 2, 4, 3, 5)
    weights = attention_weights(query, key, mask)
    assert weights.shape == (2, 4, 3, 5)
    assert (weights[~mask] == 0).all()
    assert (weights[mask] > 0).all()
    # Five terms that sum to one, each rounded.
    assert (weights.sum(-1) - 1).abs().max() <= 8 * 2.0**-53
    expected = F.scaled_dot_product_attention(
        query, key, torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5), mask, enable_gqa=True
    )
    assert (weights - expected).abs().max() <= bounds(query, key, value, mask)["output"]


# What attention refuses: the same error from every form, before anything is computed.


def good():
    return {name: x.detach() for name, x in zip(("query", "key", "value"), draw(4, 2))}


BAD_INPUT = {
    "features of query and key differ": (
        lambda a: {**a, "key": a["key"][..., :7]}, "same number of features",
    ),
    "heads that do not divide": (
        lambda a: {**a, "query": a["query"][:, :3]}, "3 query, 2 key and 2 value heads",
    ),
    "more key heads than query heads": (
        lambda a: {**a, "query": a["query"][:, :1]}, "1 query, 2 key",
    ),
    "other heads for keys than for values": (
        lambda a: {**a, "key": a["key"][:, :1]}, "1 key and 2 value",
    ),
    "fewer values than keys": (lambda a: {**a, "value": a["value"][:, :, :4]}, "every key"),
    "no keys": (
        lambda a: {**a, "key": a["key"][:, :, :0], "value": a["value"][:, :, :0]},
        "at least one key",
    ),
    "other batch": (lambda a: {**a, "query": a["query"][:1]}, "with the same B"),
    "other number of dims": (lambda a: {**a, "query": a["query"][0]}, "number of dims"),
    "one dim": (lambda a: {**a, "query": a["query"][0, 0, 0]}, "at least two dims"),
    "whole numbers": (lambda a: {**a, "key": a["key"].long()}, "key: a floating tensor"),
    "complex numbers": (lambda a: {**a, "key": a["key"].cfloat()}, "key: a floating tensor"),
    "a list": (lambda a: {**a, "value": a["value"].tolist()}, "given: a list"),
    "two dtypes": (lambda a: {**a, "value": a["value"].float()}, "one dtype"),
    "two devices": (lambda a: {**a, "value": a["value"].to("meta")}, "one device"),
    "a sparse key": (lambda a: {**a, "key": a["key"].to_sparse()}, "layout torch.sparse_coo"),
    "eight bits": (
        lambda a: {name: x.to(torch.float8_e4m3fn) for name, x in a.items()}, "float8_e4m3fn",
    ),
    "a mask on another device": (
        lambda a: {**a, "mask": torch.ones(3, 5, dtype=torch.bool, device="meta")}, "one device",
    ),
    "a scale that is no number": (lambda a: {**a, "scale": float("nan")}, "scale = nan"),
    "a mask of another dtype": (lambda a: {**a, "mask": torch.zeros(3, 5)}, "float32"),
    "a mask of another shape": (
        lambda a: {**a, "mask": torch.ones(5, 3, dtype=torch.bool)}, "shape (5, 3)",
    ),
    "a query that may attend nowhere": (
        lambda a: {**a, "mask": torch.tensor([[True] * 5, [False] * 5, [True] * 5])},
        "mask[1] allows none of its 5 keys (1 such rows of 3)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", BAD_INPUT)
def test_bad_input_gets_the_same_error_from_every_form(form, fault):
    spoil, message = BAD_INPUT[fault]
    with pytest.raises(InputError) as error:
        scaled_dot_product_attention(**spoil(good()), form=form)
    assert message in str(error.value)
    assert error.value.change


def test_the_input_that_the_faults_start_from_is_accepted():
    for form in FORMS:
        assert scaled_dot_product_attention(**good(), form=form).shape == (2, 4, 3, 6)


def test_an_unknown_form_is_refused_with_the_names_of_the_forms():
    with pytest.raises(InputError, match="explicit, tiled, fused"):
        scaled_dot_product_attention(**good(), form="flash")


def test_weights_refuse_a_query_that_may_attend_nowhere():
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[2] = False
    with pytest.raises(InputError, match=r"mask\[2\]"):
        attention_weights(torch.ones(3, 8), torch.ones(5, 8), mask)


@pytest.mark.parametrize("form", FORMS)
def test_tensors_without_values_give_the_shape_of_the_result(form):
    # torch.device("meta") serves to plan memory; a mask there has no values to check.
    inputs = {name: x.to("meta") for name, x in good().items()}
    mask = torch.ones(3, 5, dtype=torch.bool, device="meta")
    assert scaled_dot_product_attention(**inputs, mask=mask, form=form).shape == (2, 4, 3, 6)
