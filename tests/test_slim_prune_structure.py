"""Heads, neurons and layers removed: the output is that of masking, the model is smaller."""

import copy

import pytest
import torch
from parallel_cases import optimizer_of, tiny_batch, tiny_model
from torch.nn.utils import prune

from slimlab.config import InputError
from slimlab.model.build import build_model
from slimlab.model.cache import KVCache
from slimlab.plan.params import num_params, param_shapes
from slimlab.slim.prune_structure import (
    head_scores,
    neuron_scores,
    remove_heads,
    remove_layers,
    remove_neurons,
    weakest,
)
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective

MODELS = {
    "biases": {"num_heads": 4, "positions": "learned", "norm": "layer", "bias": True},
    "grouped": {"num_heads": 4, "num_kv_heads": 2, "feed_forward": "swiglu"},
    "multi-query": {"num_heads": 4, "num_kv_heads": 1, "tie_embeddings": False},
    "post": {"num_heads": 4, "norm_place": "post", "norm": "layer", "bias": True},
}
# model, heads of layers 0 and 1 that go, heads and groups left
HEADS = [
    ("biases", [[1], [3]], 3, 3),
    ("biases", [[0, 1, 3], [2, 3, 1]], 1, 1),
    ("grouped", [[0, 3], [1, 2]], 2, 2),
    ("grouped", [[0, 1], [2, 3]], 2, 1),
    ("grouped", [[0, 1, 3], [1, 2, 3]], 1, 1),
    ("multi-query", [[2], [0]], 3, 1),
    ("post", [[0, 2], [1, 2]], 2, 2),
]
IDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(7))


def model_of(name):
    return tiny_model(**MODELS[name])


def mask_inputs(linear, numbers, width):
    """Mask input features with torch's pruning: whole heads of some width, or neurons."""
    mask = torch.ones_like(linear.weight)
    for number in numbers:
        mask[:, number * width : (number + 1) * width] = 0
    prune.custom_from_mask(linear, "weight", mask)


def check_whole(smaller):
    """The model is the one that its configuration describes, in every shape."""
    shapes = {name: tuple(param.shape) for name, param in smaller.named_parameters()}
    assert shapes == param_shapes(smaller.config)
    again = build_model(smaller.config).double()
    again.load_state_dict(smaller.state_dict())
    assert torch.equal(again(IDS), smaller(IDS))


def check_untouched(model, before, smaller):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    theirs = {param.data_ptr() for param in model.parameters()}
    assert not theirs & {param.data_ptr() for param in smaller.parameters()}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def refused(call, *expected):
    with pytest.raises(InputError) as caught:
        call()
    for text in expected:
        assert text in str(caught.value), str(caught.value)


@pytest.mark.parametrize(("name", "heads", "num_heads", "num_kv_heads"), HEADS)
def test_removed_heads_give_the_output_of_masked_ones(name, heads, num_heads, num_kv_heads):
    model = model_of(name)
    before = copy.deepcopy(model.state_dict())
    smaller = remove_heads(model, heads)
    check_untouched(model, before, smaller)
    config = smaller.config
    assert (config.num_heads, config.num_kv_heads, config.d_head) == (num_heads, num_kv_heads, 2)
    check_whole(smaller)
    for block, gone in zip(model.blocks, heads, strict=True):
        mask_inputs(block.attention.out_proj, gone, 2)
    close(smaller(IDS), model(IDS))
    assert not torch.allclose(smaller(IDS), model_of(name)(IDS))


@pytest.mark.parametrize("name", list(MODELS))
def test_removed_neurons_give_the_output_of_masked_ones(name):
    model = model_of(name)
    before = copy.deepcopy(model.state_dict())
    d_ff = model.config.d_ff
    neurons = [[0, d_ff - 1, 5], [7, 3, 8]]
    smaller = remove_neurons(model, neurons)
    check_untouched(model, before, smaller)
    assert smaller.config.d_ff == d_ff - 3
    check_whole(smaller)
    for block, gone in zip(model.blocks, neurons, strict=True):
        mask_inputs(block.feed_forward.down_proj, gone, 1)
    close(smaller(IDS), model(IDS))
    assert not torch.allclose(smaller(IDS), model_of(name)(IDS))


@pytest.mark.parametrize("name", ["biases", "grouped"])
def test_a_removed_layer_gives_the_output_of_one_that_writes_nothing(name):
    model = model_of(name)
    before = copy.deepcopy(model.state_dict())
    smaller = remove_layers(model, [0])
    check_untouched(model, before, smaller)
    check_whole(smaller)
    with torch.no_grad():
        for linear in (model.blocks[0].attention.out_proj, model.blocks[0].feed_forward.down_proj):
            for param in linear.parameters():
                param.zero_()
    close(smaller(IDS), model(IDS))


def test_all_three_together_leave_as_many_parameters_as_the_plan_counts():
    model = model_of("grouped")
    smaller = remove_layers(model, [1])
    smaller = remove_heads(smaller, weakest(head_scores(smaller), 2, num_groups=2))
    smaller = remove_neurons(smaller, weakest(neuron_scores(smaller), 12))
    check_whole(smaller)
    assert sum(p.numel() for p in smaller.parameters()) == num_params(smaller.config)
    # D = 8, E = 2: a block, two heads' q and out, twelve neurons' three matrices go
    gone = num_params(model.config) - num_params(smaller.config)
    block = 2 * 8 * 8 + 2 * 4 * 8 + 3 * 24 * 8 + 2 * 8
    assert gone == block + 2 * (2 * 2 * 8) + 12 * 3 * 8


def test_a_smaller_model_generates_with_its_cache_and_trains():
    smaller = remove_heads(model_of("grouped"), [[0, 1], [2, 3]])
    cache = KVCache(smaller.config, 3, dtype=torch.float64)
    parts = [smaller(IDS[:, :3], cache=cache), smaller(IDS[:, 3:], cache=cache)]
    close(torch.cat(parts, dim=1), smaller(IDS))
    optimizer, losses = optimizer_of(smaller), []
    for _ in range(4):
        losses.append(float(accumulate_gradients(smaller, tiny_batch(0), causal_objective)[0]))
        optimizer.step()
    assert losses[-1] < losses[0]


def test_a_tied_table_stays_tied():
    smaller = remove_neurons(model_of("biases"), [[0], [1]])
    assert smaller.lm_head.weight is smaller.embedding.tokens.weight


def test_removing_nothing_changes_nothing():
    model = model_of("grouped")
    for smaller in (
        remove_heads(model, [[], []]),
        remove_neurons(model, [[], []]),
        remove_layers(model, []),
    ):
        assert smaller.config == model.config
        assert torch.equal(smaller(IDS), model(IDS))


def test_scores_find_what_writes_nothing_and_do_not_see_scale():
    model = model_of("biases")
    before = head_scores(model), neuron_scores(model)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.v_proj.weight.mul_(4)
            block.attention.out_proj.weight.div_(4)
    close(head_scores(model), before[0])
    with torch.no_grad():
        model.blocks[0].attention.out_proj.weight[:, 4:6] = 0
        model.blocks[1].attention.v_proj.weight[0:2] = 0
        model.blocks[0].feed_forward.down_proj.weight[:, 9] = 0
        model.blocks[1].feed_forward.up_proj.weight[3] = 0
    assert weakest(head_scores(model), 1) == [[2], [0]]
    assert weakest(neuron_scores(model), 1) == [[9], [3]]


@pytest.mark.parametrize("kind", ["biases", "grouped"])
def test_measured_scores_are_the_sizes_of_what_parts_add_to_the_output(kind):
    model, seen = model_of(kind), {}
    block = model.blocks[1]
    for name, layer in (("heads", block.attention.out_proj), ("up", block.feed_forward.down_proj)):
        layer.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0].detach()}))
    measured = head_scores(model, [IDS[:1], IDS[1:]]), neuron_scores(model, [IDS])
    model(IDS)
    d_head = model.config.d_head
    for head in range(model.config.num_heads):
        part = slice(head * d_head, (head + 1) * d_head)
        adds = seen["heads"][..., part] @ block.attention.out_proj.weight[:, part].T
        by_hand = adds.square().sum(-1).mean().sqrt().item()
        assert measured[0][1, head].item() == pytest.approx(by_hand, rel=1e-5)
    adds = seen["up"][..., 3:4] @ block.feed_forward.down_proj.weight[:, 3:4].T
    by_hand = adds.square().sum(-1).mean().sqrt().item()
    assert measured[1][1, 3].item() == pytest.approx(by_hand, rel=1e-5)


def test_a_neuron_that_is_never_awake_has_large_weights_and_a_small_measured_score():
    model = model_of("biases")
    with torch.no_grad():
        for block in model.blocks:
            block.feed_forward.up_proj.weight[5] *= 100
            block.feed_forward.down_proj.weight[:, 5] *= 100
            block.feed_forward.up_proj.bias[5] = -1e6
    assert 5 not in weakest(neuron_scores(model), 4)[0]
    assert 5 in weakest(neuron_scores(model, [IDS]), 4)[0]


def test_scores_by_hand():
    model = model_of("grouped")
    attention = model.blocks[1].attention
    by_hand = attention.v_proj.weight[2:4].norm() * attention.out_proj.weight[:, 4:6].norm()
    assert head_scores(model)[1, 2].item() == pytest.approx(by_hand.item())


def test_the_weakest_are_taken_from_each_group_alike():
    scores = torch.tensor([[1.0, 2.0, 8.0, 7.0], [4.0, 3.0, 1.0, 1.0]])
    assert weakest(scores, 2) == [[0, 1], [2, 3]]
    assert weakest(scores, 2, num_groups=2) == [[0, 3], [1, 2]]
    assert weakest(scores, 0) == [[], []]
    refused(lambda: weakest(scores, 1, num_groups=2), "num_removed = 1", "remove 0 or 2")
    refused(lambda: weakest(scores, 3, num_groups=2), "remove 2, equally")
    refused(lambda: weakest(scores, 4), "at most 3")
    refused(lambda: weakest(scores * float("nan"), 1), "8 of 8")


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ([[4], [0]], ("heads of layer 0 from 0 to 3", "nearest that exists is 3")),
        ([[0], [-1]], ("heads of layer 1", "nearest that exists is 0")),
        ([[0.5], [0]], ("0.5",)),
        ([[0, 0], [0, 1]], ("each once", "[0]")),
        ([[0, 1, 2, 3]] * 2, ("at least one stays", "at most 3")),
        ([[0, 1]], ("one list for each of 2 layers",)),
        ([[0, 2], [0, 2, 1]], ("2, 3", "remove 2 or 3 from each")),
        ([[0], [0]], ("1, 2 left in groups of 2", "a multiple of 2")),
        ([[0, 1], [0, 2]], ("1, 2 left", "every layer alike")),
        (3, ("one list for each",)),
    ],
)
def test_heads_that_cannot_be_removed_are_refused(heads, expected):
    model = model_of("grouped")
    before = copy.deepcopy(model.state_dict())
    refused(lambda: remove_heads(model, heads), *expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_neurons_and_layers_that_cannot_be_removed_are_refused():
    model = model_of("grouped")
    refused(lambda: remove_neurons(model, [[24], [0]]), "from 0 to 23", "exists is 23")
    refused(lambda: remove_neurons(model, [list(range(24))] * 2), "at most 23")
    refused(lambda: remove_layers(model, [2]), "layers from 0 to 1", "exists is 1")
    refused(lambda: remove_layers(model, [0, 1]), "all 2", "at most 1")
    refused(lambda: remove_layers(model.blocks, [0]), "ModuleList")
    model.config = remove_heads(model, [[0, 1]] * 2).config
    refused(lambda: remove_layers(model, [0]), "4 heads", "gather")
