"""Inputs for the attention tests, and error bounds derived from the inputs.

The bounds are first-order rounding bounds for float64 (unit roundoff u = 2**-53), doubled because
both sides of a comparison round. A dot product of n terms is off by at most n*u times the sum of
the absolute products. With |q|, |k|, |v|, |g| the largest absolute entries of query, key, value
and the output's gradient:

* a score is off by  ds = (E + 3) u (E |scale q k| + |bias|)
* a weight, relative to itself, by  dw = 2 ds + (S + 8) u  (exponentials, their sum, a division;
  the tiled form rescales the sums at most S times more, hence S twice)
* an output, a weighted mean of values, by  (dw + 2 S u) |v|
* a gradient of a score is w (g.v - mean): at most 2 w Ev |g| |v|, and off by (dw + (Ev + 3 S) u)
  of that
* the gradients of query, key, value and bias are sums of those, over S, over T and the heads of a
  group, and over whatever the bias was broadcast to; the weights of a row sum to 1
"""

import math

import torch

U = 2.0**-53
LAYOUTS = {"multi-head": (4, 4), "grouped-query": (4, 2), "multi-query": (4, 1), "one head": (1, 1)}
MASKS = (
    "none", "causal", "causal, T < S", "padding", "random boolean", "finite bias",
    "bias with -inf", "bias per head", "bias per query", "bias per key",
)  # fmt: skip


def draw(num_heads, num_kv_heads, B=2, T=3, S=5, E=8, Ev=6, seed=0):
    """Query (B,H,T,E), key (B,K,S,E), value (B,K,S,Ev) in float64, all sizes different."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        return x.requires_grad_()

    return (
        normal(B, num_heads, T, E), normal(B, num_kv_heads, S, E), normal(B, num_kv_heads, S, Ev)
    )  # fmt: skip


def make_mask(kind, B, H, T, S, seed=1):
    """The mask called `kind`; written without slimlab, so that it can judge slimlab."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    if kind == "none":
        return None
    if kind.startswith("causal"):
        return torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if kind == "padding":
        return torch.tensor([[[[s < S - b for s in range(S)]]] for b in range(B)])
    allowed = torch.rand(B, H, T, S, generator=generator) < 0.5
    allowed[..., S // 2] = True
    if kind == "random boolean":
        return allowed
    if kind == "bias with -inf":
        bias = normal(B, H, T, S).masked_fill(~allowed, -math.inf)
    else:
        sizes = {
            "finite bias": (T, S), "bias per head": (1, H, 1, S),
            "bias per query": (B, 1, T, 1), "bias per key": (1, S),
        }  # fmt: skip
        bias = normal(*sizes[kind])
    return bias.requires_grad_()


def run(attend, query, key, value, mask):
    """Output and gradients of query, key, value and (if additive) mask, as a dict."""
    output = attend(query, key, value, mask)
    inputs = {"query": query, "key": key, "value": value}
    if mask is not None and mask.requires_grad:
        inputs["mask"] = mask
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(output.shape, dtype=output.dtype, generator=generator)
    grads = torch.autograd.grad(output, list(inputs.values()), weight)
    return {"output": output.detach(), **dict(zip(inputs, grads))}


def bounds(query, key, value, mask, scale=None, largest_grad=5.0):
    """The derived bound for every entry of `run`; largest_grad bounds the drawn weights."""
    with torch.no_grad():
        H, T, E = query.shape[-3:]
        S, Ev, group = key.shape[-2], value.shape[-1], H // key.shape[-3]
        q, k, v = (float(x.abs().max()) for x in (query, key, value))
        scale = 1 / math.sqrt(E) if scale is None else scale
        bias = 0.0
        if mask is not None and mask.is_floating_point():
            bias = float(mask[mask > -math.inf].abs().max())
        d_score = (E + 3) * U * (E * scale * q * k + bias)
        d_weight = 2 * d_score + (S + 8) * U
        grad_score = 2 * Ev * largest_grad * v
        d_grad_score = grad_score * (d_weight + (Ev + 3 * S) * U)
        one_sided = {
            "output": (d_weight + 2 * S * U) * v,
            "query": scale * k * (d_grad_score + S * U * grad_score),
            "key": scale * q * T * group * (d_grad_score + T * group * U * grad_score),
            "value": T * group * largest_grad * (d_weight + T * group * U),
            "mask": query.shape[:-1].numel() * (d_grad_score + query.numel() * U * grad_score),
        }
    return {name: 2 * bound for name, bound in one_sided.items()}


def assert_equal(found, expected, bound):
    """Compare the two dicts of `run` within `bounds`, and say by how much they differ."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape
        error = float((value - expected[name]).abs().max())
        assert error <= bound[name], f"{name}: off by {error:.1e}, bound {bound[name]:.1e}"
        assert bound[name] < 1e-9, f"{name}: a bound of {bound[name]:.1e} would hide mistakes"
