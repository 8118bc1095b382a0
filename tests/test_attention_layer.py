"""MultiHeadAttention against nn.MultiheadAttention with the same weights."""

import pytest
import torch
from torch import nn

from slimlab.config import InputError
from slimlab.model.attention import FORMS, MultiHeadAttention
from slimlab.model.heads import merge_heads, split_heads
from slimlab.model.masks import causal_mask, padding_mask

B, T, S, D, H, CONTEXT = 2, 3, 5, 8, 4, 6

# Both layers do the same sums of at most 8*5 products in float64, in another order, with numbers
# below 10 in size: 40 * 10**2 * 2**-53 = 4.4e-13; sums over B*T in the parameters' gradients add
# a factor of 6.
TOLERANCE = 6 * 40 * 10**2 * 2.0**-53


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return MultiHeadAttention(D, H, **options).double()


def reference(ours, d_context=None):
    """PyTorch's layer with our weights; it keeps query, key and value weights in one matrix."""
    bias = ours.q_proj.bias is not None
    theirs = nn.MultiheadAttention(
        D, H, bias=bias, kdim=d_context, vdim=d_context, batch_first=True, dtype=torch.float64
    )
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        if d_context is None:
            theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        else:
            for name, projection in zip("qkv", projections):
                getattr(theirs, f"{name}_proj_weight").copy_(projection.weight)
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
            theirs.out_proj.bias.copy_(ours.out_proj.bias)
    return theirs


def close(found, expected):
    return found.shape == expected.shape and (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", ["not", "causal", "padding"])
def test_self_attention_equals_torch_with_the_same_weights(form, bias, masked):
    ours = layer(form=form, bias=bias)
    theirs = reference(ours)
    x = normal(B, T, D).requires_grad_()
    mask, theirs_mask = None, {}
    if masked == "causal":
        mask = causal_mask(T)
        theirs_mask = {"attn_mask": ~mask}  # True means hidden there
    elif masked == "padding":
        mask = padding_mask([3, 2], T)
        theirs_mask = {"key_padding_mask": ~mask[:, 0, 0]}
    found, weights = ours(x, mask=mask, return_weights=True)
    expected, expected_weights = theirs(x, x, x, average_attn_weights=False, **theirs_mask)
    assert close(found, expected)
    assert close(weights, expected_weights)

    (found_grad,) = torch.autograd.grad(found, x, normal(B, T, D, seed=1), retain_graph=True)
    (expected_grad,) = torch.autograd.grad(expected, x, normal(B, T, D, seed=1), retain_graph=True)
    assert close(found_grad, expected_grad)
    found.backward(normal(B, T, D, seed=1))
    expected.backward(normal(B, T, D, seed=1))
    projections = (ours.q_proj, ours.k_proj, ours.v_proj)
    assert close(torch.cat([p.weight.grad for p in projections]), theirs.in_proj_weight.grad)
    assert close(ours.out_proj.weight.grad, theirs.out_proj.weight.grad)
    if bias:
        assert close(torch.cat([p.bias.grad for p in projections]), theirs.in_proj_bias.grad)
        assert close(ours.out_proj.bias.grad, theirs.out_proj.bias.grad)


@pytest.mark.parametrize("form", FORMS)
def test_cross_attention_equals_torch_with_the_same_weights(form):
    ours = layer(form=form, d_context=CONTEXT)
    theirs = reference(ours, d_context=CONTEXT)
    x, context = normal(B, T, D), normal(B, S, CONTEXT, seed=3)
    found = ours(x, context)
    expected, _ = theirs(x, context, context)
    assert close(found, expected)
    found.backward(normal(B, T, D, seed=1))
    expected.backward(normal(B, T, D, seed=1))
    for name in "qkv":
        found_grad = getattr(ours, f"{name}_proj").weight.grad
        assert close(found_grad, getattr(theirs, f"{name}_proj_weight").grad)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_queries_are_multi_head_with_repeated_key_and_value_weights(form, num_kv_heads):
    grouped = layer(num_kv_heads=num_kv_heads, form=form)
    full = layer(form="explicit")
    with torch.no_grad():
        for name in ("q_proj", "out_proj"):
            getattr(full, name).weight.copy_(getattr(grouped, name).weight)
        for name in ("k_proj", "v_proj"):
            heads = getattr(grouped, name).weight.view(num_kv_heads, D // H, D)
            repeated = heads.repeat_interleave(H // num_kv_heads, dim=0)
            getattr(full, name).weight.copy_(repeated.reshape(D, D))
    x = normal(B, T, D)
    assert close(grouped(x, mask=causal_mask(T)), full(x, mask=causal_mask(T)))


def test_a_slice_of_the_heads_gives_its_part_of_the_sum():
    # The output projection of side-by-side heads is the sum of every head's own projection.
    whole = layer()
    x = normal(B, T, D)
    parts = torch.zeros(B, T, D, dtype=torch.float64)
    for head in range(H):
        part = layer()
        rows = slice(head * D // H, (head + 1) * D // H)
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(part, name).weight = nn.Parameter(getattr(whole, name).weight[rows])
        part.out_proj.weight = nn.Parameter(whole.out_proj.weight[:, rows])
        parts += part(x).detach()
    assert close(parts, whole(x))


def test_splitting_and_merging_heads_are_inverse():
    x = torch.arange(2 * 3 * 8).view(2, 3, 8)
    heads = split_heads(x, 2)
    assert heads.shape == (2, 4, 3, 2)
    assert heads[1, 2, 0].tolist() == x[1, 0, 4:6].tolist()
    assert torch.equal(merge_heads(heads), x)


@pytest.mark.parametrize(("num_kv_heads", "d_head"), [(None, None), (2, None), (1, 3)])
def test_the_projections_have_the_widths_that_the_heads_need(num_kv_heads, d_head):
    attention = MultiHeadAttention(D, H, num_kv_heads, d_head, bias=True)
    e, k = d_head or D // H, num_kv_heads or H
    assert attention.q_proj.weight.shape == (H * e, D)
    assert attention.k_proj.weight.shape == attention.v_proj.weight.shape == (k * e, D)
    assert attention.out_proj.weight.shape == (D, H * e)
    assert attention(torch.zeros(B, T, D)).shape == (B, T, D)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 3}, "num_heads that divides d_model"),
        ({"num_kv_heads": 3}, "num_kv_heads that divides num_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"d_model": -8}, "d_model"),
        ({"d_head": 2.5}, "d_head"),
        ({"form": "sparse"}, "explicit, tiled, fused"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        MultiHeadAttention(**{"d_model": D, "num_heads": H, **sizes})


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        (torch.zeros(B, T, 7), None, r"x \(2, 3, 7\)"),
        (torch.zeros(T, D), None, r"x\[None\]"),
        (torch.zeros(B, T, D, dtype=torch.long), None, "int64"),
        ([[1.0]], None, "list"),
        (torch.zeros(B, T, D), torch.zeros(B, S, 7), r"context \(2, 5, 7\)"),
        (torch.zeros(B, T, D), torch.zeros(3, S, D), "same B"),
    ],
)
def test_input_of_another_width_is_refused(x, context, message):
    with pytest.raises(InputError, match=message):
        MultiHeadAttention(D, H)(x, context)


def test_input_of_another_dtype_is_refused_except_under_autocast():
    layer, x = MultiHeadAttention(D, H), torch.zeros(B, T, D)
    with pytest.raises(InputError, match=r"x\.to\(torch\.float32\)"):
        layer(x.double())
    with pytest.raises(InputError, match="context of dtype torch.bfloat16"):
        layer(x, x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
