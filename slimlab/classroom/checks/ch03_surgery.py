"""Graders of exercises 3.3 and 3.5 of chapter 03: weights in another order, two layers in one.

The oracles are the old model itself, and the formula with its parts called one after the other.

Tools that convert checkpoints between Meta's files and the rest of the world do what 3.3 asks for;
models such as PaLM are trained in the form of 3.5 from the start.
"""

import copy

import torch
from torch import Tensor, nn

from slimlab.classroom.checks.ch02_forms import (
    FLOAT64,
    expect_module,
    expect_same_weights,
    function_of,
    weights_of,
)
from slimlab.classroom.exercise import Exercise
from slimlab.classroom.grading import expect, expect_close, expect_equal
from slimlab.config import ModelConfig
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.build import build_model
from slimlab.model.cache import KVCache
from slimlab.model.initialise import initialise
from slimlab.model.layers import FeedForward, LayerNorm, RMSNorm
from slimlab.model.masks import causal_mask
from slimlab.model.transformer import Decoder

layouts = Exercise(
    "3.3",
    "From one rotary layout to the other",
    requires=("to_half",),
    stars=2,
    hints=(
        "Write down, for d_head = 6, which features are partners in each layout.",
        "nn.Linear keeps one row for each feature of its result. Which rows of which projections "
        "make features that are turned?",
        "Cut the rows into heads first: weight.unflatten(0, (-1, d_head)). The order is the same "
        "in each head.",
        "dataclasses.replace(model.config, ...) makes the new configuration. load_state_dict takes "
        "tied tables too.",
    ),
)


def interleaved_model(seed: int, **choices) -> nn.Module:
    """Make a float64 decoder with interleaved rotary pairs and `choices`, drawn with `seed`."""
    sizes = {"vocab_size": 13, "seq_len": 12, "d_model": 24, "num_layers": 2, "num_heads": 4}
    config = ModelConfig(**{**sizes, "rotary_layout": "interleaved", **choices})
    model = initialise(build_model(config).double(), std=0.5, seed=seed).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


DIGITS = "the dtype of the new model at the moment when it gets its numbers"


def half_model(student, model: nn.Module) -> nn.Module:
    """Return student.to_half(model); fail if it is no decoder in the half layout."""
    made = function_of(student, "to_half")(model)
    made = expect_module(made, "to_half(model)", "a new Decoder")
    kind, look = type(made).__name__, "build_model, or a deep copy of the old model"
    expect(isinstance(made, Decoder), f"a {kind}", "a Decoder", look)
    expect_equal(made.config.rotary_layout, "half", "config.rotary_layout of the new model",
                 "which configuration the new model was built from")  # fmt: skip
    kinds = {getattr(block.attention, "rotary_layout", None) for block in made.blocks}
    look = "build a new model from the new configuration"
    expect_equal(sorted(map(str, kinds)), ["half"], "rotary_layout of its attention layers", look)
    return made


def check_conversion(student, model: nn.Module, look: str) -> nn.Module:
    """Compare the logits of student.to_half(model) with those of `model`; `look` is the hint."""
    before = copy.deepcopy(model.state_dict())
    made = half_model(student, model)
    expect_same_weights(model, before, "the old model's {}", "what you write to: copy first")
    ids = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        saw, wanted = made(ids), model(ids)
    expect_equal(str(saw.dtype), "torch.float64", "the dtype of the logits", DIGITS)
    if saw.shape == wanted.shape and (saw - wanted).abs().max() < 1e-3:
        look = DIGITS
    expect_close(saw, wanted, "the logits", look, **FLOAT64)
    return made


@layouts.property("the same logits, d_head 6, as many key heads as heads", points=2)
def _(student, numbers):
    look = "which rows change places, and in which direction"
    check_conversion(student, interleaved_model(51), look)


@layouts.property("grouped queries", points=2)
def _(student, numbers):
    look = "how many heads k_proj has, and whether each head is reordered by itself"
    check_conversion(student, interleaved_model(52, num_kv_heads=2), look)
    check_conversion(student, interleaved_model(53, num_kv_heads=1, d_head=12), look)


@layouts.property("biases", points=1)
def _(student, numbers):
    look = "what else has one entry for each feature of a query or of a key"
    check_conversion(student, interleaved_model(54, bias=True, norm="layer"), look)


@layouts.property("everything else stays as it was, tied tables tied", points=2)
def _(student, numbers):
    for tied in (True, False):
        model = interleaved_model(55, tie_embeddings=tied, feed_forward="swiglu")
        made, held = half_model(student, model), model.state_dict()
        now = made.state_dict()
        for name, weight in held.items():
            expect(name in now, f"no {name} in the new model", "all names of the old one", name)
            if not name.endswith(("q_proj.weight", "k_proj.weight")):
                look = "only what makes queries and keys is turned"
                expect_close(now[name], weight, name, look, **FLOAT64)
            rows, look = sorted(now[name].tolist()), "rows may change places, never their numbers"
            expect_close(rows, sorted(weight.tolist()), f"the rows of {name}", look, **FLOAT64)
        query = "blocks.0.attention.q_proj.weight"
        still = bool((now[query] == held[query]).all())
        asked = f"the rows of {query} in another order"
        expect(not still, "the old order", asked, "which rows are turned")
        shared = made.lm_head.weight is made.embedding.tokens.weight
        expect_equal(shared, tied, f"lm_head and embedding share a table (tied: {tied})", "tying")
        expect_equal(str(now["final_norm.weight"].dtype), "torch.float64", "the dtype", "the dtype")
    single = half_model(student, interleaved_model(58).float())
    what = "the dtype of a model made from one in torch.float32"
    expect_equal(str(single.embedding.tokens.weight.dtype), "torch.float32", what, DIGITS)


@layouts.property(
    "the new model owns its numbers, reads in pieces, and may be given in half", points=2
)
def _(student, numbers):
    model = interleaved_model(56, num_kv_heads=2)
    before, made = copy.deepcopy(model.state_dict()), half_model(student, model)
    ids = torch.randint(13, (1, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = KVCache(made.config, 1, dtype=torch.float64)
        pieces = torch.cat([made(part, cache=cache) for part in ids.split(3, dim=1)], dim=1)
        expect_close(pieces, model(ids), "the logits in pieces", "the layers", **FLOAT64)
        for parameter in made.parameters():
            parameter.add_(1.0)
    what, look = "the old model's {} after 1 was added to the new one's", "do they share memory?"
    expect_same_weights(model, before, what, look)
    half = interleaved_model(57, rotary_layout="half")
    look = "a model that is in the half layout already: nothing to reorder"
    check_conversion(student, half, look)


parallel = Exercise(
    "3.5",
    "Side by side, in two matrix products",
    requires=("Parallel",),
    stars=3,
    hints=(
        "All of W^Q, W^K, W^V and the feed-forward layer's first matrices are multiplied from the "
        "same n = norm(x). Matrices beside each other are one matrix: torch.cat over rows of "
        "nn.Linear's weights.",
        "A sum of two products, Z W^O + h W_2, is one product of (Z, h), side by side, with the "
        "two matrices one above the other. nn.Linear keeps its matrix transposed.",
        "x + ... once: there is one sum around both.",
        "Swiglu has a gate: three widths in the feed-forward part, not two.",
    ),
)


def drawn_parts(
    seed: int, D: int, heads: tuple, F: int, kind: str, norm: nn.Module
) -> list[nn.Module]:
    """Draw with `seed`: norm, attention of D and heads, a feed-forward layer of F and kind."""
    torch.manual_seed(seed)
    made = [norm, MultiHeadAttention(D, *heads), FeedForward(D, F, kind)]
    for module in made:
        for parameter in module.double().parameters():
            nn.init.normal_(parameter, std=0.5)
    return made


def by_formula(made: list[nn.Module], x: Tensor, mask: Tensor | None) -> Tensor:
    """Return x + attention(n) + feed_forward(n) with n = norm(x), under `mask`, from `made`."""
    norm, attention, feed_forward = made
    n = norm(x)
    return x + attention(n, mask=mask) + feed_forward(n)


def check_parallel(student, made: list[nn.Module], look: str) -> nn.Module:
    """Compare student.Parallel(*made) with the formula, both ways; `look` is the hint."""
    before = [copy.deepcopy(module.state_dict()) for module in made]
    layer = function_of(student, "Parallel")(*made)
    layer = expect_module(layer, "Parallel(norm, attention, feed_forward)", "a module")
    D = made[1].out_proj.out_features
    x, upstream = torch.randn(2, 2, 5, D, dtype=torch.float64)
    for name, mask in (("", None), (" under a causal mask", causal_mask(5))):
        leaf, wanted_leaf = (x.clone().requires_grad_() for _ in range(2))
        saw, wanted = layer(leaf, mask=mask), by_formula(made, wanted_leaf, mask)
        form = "what forward returns"
        place = look if mask is None else "the mask"
        expect_close(saw, wanted, f"the output{name}", place, form=form, **FLOAT64)
        (slope,) = torch.autograd.grad((saw * upstream).sum(), leaf)
        (wanted_slope,) = torch.autograd.grad((wanted * upstream).sum(), wanted_leaf)
        what = f"the gradient of x{name}"
        expect_close(slope, wanted_slope, what, "detach or no_grad in forward", **FLOAT64)
    for module, old in zip(made, before):
        expect_same_weights(module, old, "the old {}", "copies: you may not write to the parts")
    return layer


@parallel.property("as the formula says: one head, gelu", points=2)
def _(student, numbers):
    look = "what each part reads, the activation, and the sum at the end"
    check_parallel(student, drawn_parts(61, 8, (1,), 12, "gelu", RMSNorm(8)), look)


@parallel.property(
    "several heads, relu, LayerNorm, d_head that is not d_model / num_heads", points=2
)
def _(student, numbers):
    look = "cutting the one product into its pieces, heads before places, the scale"
    check_parallel(student, drawn_parts(62, 12, (3,), 20, "relu", RMSNorm(12)), look)
    check_parallel(student, drawn_parts(63, 10, (4, 4, 3), 7, "relu", LayerNorm(10)), look)


@parallel.property("grouped queries", points=1)
def _(student, numbers):
    look = "the widths of keys and values, and which query heads share a key head"
    check_parallel(student, drawn_parts(64, 12, (6, 2, 4), 16, "gelu", RMSNorm(12)), look)


@parallel.property("swiglu and gelu_tanh", points=2)
def _(student, numbers):
    check_parallel(student, drawn_parts(65, 8, (2,), 12, "swiglu", RMSNorm(8)), "the gate")
    check_parallel(
        student, drawn_parts(66, 8, (2,), 12, "gelu_tanh", RMSNorm(8)), "feed_forward.kind"
    )


@parallel.property("two matrices, no number more than the parts have, all trained", points=3)
def _(student, numbers):
    for kind in ("gelu", "swiglu"):
        made = drawn_parts(67, 12, (6, 2, 4), 16, kind, RMSNorm(12))
        layer = check_parallel(student, made, "the output, which other checks look at first")
        matrices = sum(weight.dim() >= 2 for weight in weights_of(layer))
        expect_equal(matrices, 2, f"matrices in the layer ({kind})",
                     "one for what is read from n, one for what is written to x")  # fmt: skip
        held = sum(parameter.numel() for parameter in layer.parameters())
        wanted = sum(parameter.numel() for module in made for parameter in module.parameters())
        expect_equal(
            held, wanted, f"parameters ({kind})", "nn.Parameter or nn.Linear, and the norm"
        )
        layer(torch.randn(2, 3, 12, dtype=torch.float64)).square().sum().backward()
        dead = [name for name, one in layer.named_parameters() if one.grad is None]
        expect_equal(dead, [], "parameters without a gradient", "detach inside forward")


@parallel.property("the new layer owns its numbers", points=1)
def _(student, numbers):
    made = drawn_parts(68, 8, (2,), 12, "gelu", RMSNorm(8))
    before = [copy.deepcopy(module.state_dict()) for module in made]
    layer = check_parallel(student, made, "the output, which other checks look at first")
    with torch.no_grad():
        for weight in weights_of(layer):
            weight.add_(1.0)
    what, look = "the old {} after 1 was added to the new numbers", "do they share memory?"
    for module, old in zip(made, before):
        expect_same_weights(module, old, what, look)
