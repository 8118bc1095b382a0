"""The tiled form: its gradients by finite differences, and what it keeps in memory."""

import pytest
import torch
from attention_cases import draw, make_mask
from torch.utils._python_dispatch import TorchDispatchMode

from slimlab.config import InputError
from slimlab.model.attention import explicit_attention, scaled_dot_product_attention
from slimlab.model.tiled import tiled_attention, tiles

MASKS = ("none", "causal, T < S", "padding", "finite bias", "bias per head", "bias per query")


@pytest.mark.parametrize("mask_kind", MASKS)
def test_gradients_agree_with_finite_differences(mask_kind):
    query, key, value = draw(4, 2, B=2, T=2, S=5, E=3, Ev=2)
    mask = make_mask(mask_kind, 2, 4, 2, 5)

    # gradcheck's defaults: central differences with step 1e-6 have an error of about 1e-12 from
    # the step and 1e-10 from rounding; it allows 1e-5 and 0.1 % of the value.
    def attend(q, k, v, m):
        return tiled_attention(q, k, v, m, 0.6, tile_size=2)

    assert torch.autograd.gradcheck(attend, (query, key, value, mask))


def test_a_bias_with_minus_infinity_has_no_gradient_where_it_hides():
    query, key, value = draw(4, 2)
    mask = make_mask("bias with -inf", 2, 4, 3, 5)
    (grad,) = torch.autograd.grad(tiled_attention(query, key, value, mask, 0.3, 2).sum(), mask)
    assert (grad[mask == -torch.inf] == 0).all()
    assert (grad[mask > -torch.inf] != 0).any()


@pytest.mark.parametrize("tile_size", [1, 2, 3, 5, 100])
def test_a_whole_tile_may_be_hidden_from_a_query(tile_size):
    # The first tiles hide everything from every query: a naive running maximum gives NaN here.
    query, key, value = (x.detach() for x in draw(4, 2, S=7))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 6] = True
    found = tiled_attention(query, key, value, mask, 0.3, tile_size)
    only_last = value[:, :, 6:].repeat_interleave(2, dim=1).expand_as(found)
    # One weight of exp(0) = 1 divided by itself: exact.
    assert torch.equal(found, only_last)


def saved_by(attend, *inputs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        attend(*inputs)
    return saved


def test_the_backward_pass_keeps_output_and_logsumexp_and_no_scores():
    T, S = 37, 41
    query, key, value = draw(4, 2, T=T, S=S)
    inputs = {x.data_ptr() for x in (query, key, value)}

    def added(attend):
        saved = saved_by(lambda q, k, v: attend(q, k, v, None, 0.3), query, key, value)
        return sorted(tuple(x.shape) for x in saved if x.data_ptr() not in inputs)

    assert added(tiled_attention) == [(2, 4, T, 1), (2, 4, T, 6)]
    # The check can fail: the explicit form does keep a tensor with T*S elements per head.
    assert any(shape[-2:] == (T, S) for shape in added(explicit_attention))


class LargestTensor(TorchDispatchMode):
    """Remember the largest number of elements that any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_pass_ever_makes_the_score_matrix():
    T, S, tile_size = 37, 410, 5
    query, key, value = (x[:, :1].detach().requires_grad_() for x in draw(1, 1, B=1, T=T, S=S))
    largest = {}
    for attend in (tiled_attention, explicit_attention):
        sizes = (tile_size,) if attend is tiled_attention else ()
        with LargestTensor() as seen:
            attend(query, key, value, None, 0.3, *sizes).sum().backward()
        largest[attend] = seen.elements
    # The largest are key and its gradient, S*E = 410*8 elements; scores would be 37*410.
    assert largest[tiled_attention] == S * 8
    assert largest[explicit_attention] >= T * S


def test_tiles_cover_every_key_once():
    for num_keys in (1, 4, 5, 8, 13):
        covered = [s for tile in tiles(num_keys, 4) for s in range(num_keys)[tile]]
        assert covered == list(range(num_keys))


@pytest.mark.parametrize("tile_size", [0, -1, 2.0])
def test_a_tile_holds_a_whole_number_of_keys(tile_size):
    with pytest.raises(InputError, match="tile_size"):
        tiled_attention(*draw(1, 1), None, 0.3, tile_size)


def test_a_gradient_of_the_gradient_is_refused_even_where_the_output_gradient_is_constant():
    query, key, value = draw(4, 2)
    weight = torch.eye(8, dtype=torch.float64, requires_grad=True)
    output = tiled_attention(query @ weight, key, value, None, 0.3)
    # The sum's gradient is constant; the gradient of query would still depend on weight.
    with pytest.raises(InputError, match="explicit"):
        torch.autograd.grad(output.sum(), query, create_graph=True)


def test_many_equal_keys_in_float16_do_not_overflow_the_sums():
    # 70,000 terms of exp(0): more than float16's greatest number, 65,504.
    zeros = torch.zeros(1, 70_000, 4, dtype=torch.float16)
    value = torch.full_like(zeros, 100.0).requires_grad_()
    found = tiled_attention(zeros[:, :3], zeros, value, None, 0.5)
    assert found.dtype == torch.float16
    # A mean of equal numbers, within the rounding of float16.
    assert (found - 100).abs().max() <= 100 * 2**-10
    (grad,) = torch.autograd.grad(found.sum(), value)
    assert grad.dtype == torch.float16
    assert grad.isfinite().all()


def test_autocast_leaves_forward_and_backward_with_the_same_weights():
    inputs = [x.detach().float().requires_grad_() for x in draw(4, 2, S=41)]
    inputs[0].data *= 30  # scores of which bfloat16 keeps no digit behind the point

    def gradients(enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = scaled_dot_product_attention(*inputs, form="tiled")
        return torch.autograd.grad(output.square().sum(), inputs)

    for found, expected in zip(gradients(True), gradients(False)):
        assert torch.equal(found, expected)
