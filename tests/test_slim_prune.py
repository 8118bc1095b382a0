"""Pruning against torch.nn.utils.prune, hand values, and the properties that masks promise."""

import copy

import pytest
import torch
from parallel_cases import optimizer_of, tiny_batch, tiny_model
from torch import nn
from torch.nn.utils import prune

from slimlab.config import InputError
from slimlab.slim.prune_masks import PruneMasks, gradual_sparsity, is_two_four, two_four_mask
from slimlab.slim.prune_scores import (
    group_mask,
    group_norms,
    magnitude_masks,
    prunable_weights,
    sparsity_of,
)
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective

W = torch.tensor([[3.0, -4.0, 0.0], [-1.0, 1.0, 6.0], [2.0, 2.0, -0.5]])
SPARSITIES = (0.0, 0.1, 1 / 3, 0.5, 0.75, 0.9)


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 12), nn.Linear(12, 9, bias=False), nn.Linear(9, 4))


def refused(call, *expected):
    with pytest.raises(InputError) as caught:
        call()
    for text in expected:
        assert text in str(caught.value), str(caught.value)


def test_the_smallest_weights_go_by_hand():
    masks = magnitude_masks({"w": W}, 3 / 9)
    assert masks["w"].tolist() == [[True, True, False], [False, True, True], [True, True, False]]
    assert sparsity_of(masks) == 3 / 9


def test_norms_of_rows_and_columns_by_hand():
    assert group_norms(W, 0, norm=1).tolist() == [7.0, 8.0, 4.5]
    assert group_norms(W, 1, norm=1).tolist() == [6.0, 7.0, 6.5]
    assert group_norms(W, 0)[0].item() == 5.0


def test_one_and_two_norm_may_choose_different_rows():
    weight = torch.tensor([[3.0, 3.0], [0.0, 5.0]])  # sums 6 and 5, roots 4.24 and 5
    assert group_mask(weight, 0.5, norm=1)[:, 0].tolist() == [True, False]
    assert group_mask(weight, 0.5, norm=2)[:, 0].tolist() == [False, True]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_masks_per_layer_are_those_of_torch(sparsity):
    model = layers()
    masks = magnitude_masks(prunable_weights(model), sparsity)
    for number, layer in enumerate(model):
        n_pruned = round(sparsity * layer.weight.numel())
        prune.l1_unstructured(layer, "weight", amount=n_pruned)
        assert torch.equal(masks[f"{number}.weight"], layer.weight_mask.bool())
        assert int((~masks[f"{number}.weight"]).sum()) == n_pruned


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_global_masks_are_those_of_torch(sparsity):
    model = layers(1)
    masks = magnitude_masks(prunable_weights(model), sparsity, scope="global")
    pairs = [(layer, "weight") for layer in model]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=sparsity)
    for number, layer in enumerate(model):
        assert torch.equal(masks[f"{number}.weight"], layer.weight_mask.bool())
    n_all = sum(mask.numel() for mask in masks.values())
    assert sum(int((~mask).sum()) for mask in masks.values()) == round(sparsity * n_all)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("norm", [1, 2])
def test_masks_of_groups_are_those_of_torch(dim, norm):
    layer = layers(2)[0]
    mask = group_mask(layer.weight, 0.4, dim, norm=norm)
    prune.ln_structured(layer, "weight", amount=0.4, n=norm, dim=dim)
    assert torch.equal(mask, layer.weight_mask.bool())


def test_pruning_half_and_three_quarters_of_gaussian_weights_takes_27_and_53_percent_of_the_norm():
    weight = torch.randn(400, 500, generator=torch.Generator().manual_seed(0))
    for sparsity, lost in ((0.5, 0.27), (0.75, 0.53)):
        (mask,) = magnitude_masks({"w": weight}, sparsity).values()
        assert (weight * ~mask).norm() / weight.norm() == pytest.approx(lost, abs=0.005)


def test_equal_weights_are_pruned_to_the_count_too():
    (mask,) = magnitude_masks({"w": torch.ones(5, 4)}, 0.35).values()
    assert int((~mask).sum()) == 7
    assert not mask.flatten()[:7].any()


def test_a_tied_head_is_no_weight_to_prune():
    names = prunable_weights(tiny_model())
    assert "lm_head.weight" not in names
    assert len(names) == 2 * 6


def test_an_untied_head_is_one():
    assert "lm_head.weight" in prunable_weights(tiny_model(tie_embeddings=False))


def test_pruned_weights_stay_zero_while_training_and_others_move():
    model = tiny_model()
    optimizer = optimizer_of(model)
    accumulate_gradients(model, tiny_batch(0), causal_objective)
    optimizer.step()  # momentum from before pruning
    masks = magnitude_masks(prunable_weights(model), 0.5)
    held = PruneMasks(model, masks)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for step in (1, 2):
        accumulate_gradients(model, tiny_batch(step), causal_objective)
        for name, mask in masks.items():
            assert (dict(model.named_parameters())[name].grad[~mask] == 0).all()
        optimizer.step()
        held.apply()
    for name, weight in prunable_weights(model).items():
        assert (weight[~masks[name]] == 0).all()
        assert (weight[masks[name]] != before[name][masks[name]]).all()


def test_without_apply_old_momentum_moves_pruned_weights():
    model = tiny_model()
    optimizer = optimizer_of(model)
    accumulate_gradients(model, tiny_batch(0), causal_objective)
    optimizer.step()
    masks = magnitude_masks(prunable_weights(model), 0.5)
    PruneMasks(model, masks)
    accumulate_gradients(model, tiny_batch(1), causal_objective)
    optimizer.step()
    assert any((weight[~masks[n]] != 0).any() for n, weight in prunable_weights(model).items())


def test_finished_masks_leave_ordinary_weights_with_zeros():
    model = tiny_model()
    names = list(model.state_dict())
    masks = magnitude_masks(prunable_weights(model), 0.5)
    held = PruneMasks(model, masks)
    held.finish()
    assert list(model.state_dict()) == names
    accumulate_gradients(model, tiny_batch(0), causal_objective)
    for name, weight in prunable_weights(model).items():
        assert (weight[~masks[name]] == 0).all()
        assert (weight.grad[~masks[name]] != 0).any()


def test_a_gradual_run_only_ever_prunes_more():
    model = tiny_model()
    held, masks = PruneMasks(model, {}), None
    for step in range(5):
        sparsity = gradual_sparsity(step, final_sparsity=0.8, num_steps=4)
        old, masks = masks, magnitude_masks(prunable_weights(model), sparsity)
        held.replace(masks)
        if old is not None:
            assert all((old[name] | ~masks[name]).all() for name in masks)
    zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(model).values())
    assert zeros == sum(round(0.8 * w.numel()) for w in prunable_weights(model).values())


def test_the_schedule_follows_the_cube_by_hand():
    values = [gradual_sparsity(t, final_sparsity=0.8, num_steps=4, start_step=2) for t in range(8)]
    assert values == pytest.approx([0, 0, 0, 0.8 * 37 / 64, 0.7, 0.8 * 63 / 64, 0.8, 0.8])
    steps = [gradual_sparsity(t, final_sparsity=0.8, num_steps=4, every=2) for t in range(6)]
    assert steps == pytest.approx([0, 0, 0.7, 0.7, 0.8, 0.8])


def test_two_of_four_by_hand():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 0.0, 0.0, 0.0, 7.0]])
    expected = [[False, True, True, False, True, False, False, True]]
    assert two_four_mask(weight).tolist() == expected


def test_every_four_keep_exactly_their_two_largest():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(3))
    mask = two_four_mask(weight)
    fours, kept = weight.abs().view(-1, 4), mask.view(-1, 4)
    assert (kept.sum(1) == 2).all()
    for four, keep in zip(fours, kept, strict=True):
        assert four[keep].min() >= four[~keep].max()
    assert is_two_four(weight * mask)
    assert not is_two_four(weight)
    assert not is_two_four(weight[:, :6])


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), True, "half"])
def test_a_sparsity_outside_0_to_1_is_refused(sparsity):
    for call in (magnitude_masks, lambda w, s: group_mask(w["w"], s)):
        refused(lambda: call({"w": W}, sparsity), "sparsity", "at most 1")  # noqa: B023


def test_a_sparsity_that_empties_a_layer_is_refused_with_the_largest_that_does_not():
    refused(lambda: magnitude_masks({"w": W}, 1.0), "all 9 would go", "at most 0.8888")
    refused(lambda: group_mask(W, 0.9), "all 3 would go", "at most 0.6666")
    weights = {"large": torch.arange(1.0, 11), "small": torch.full((4,), 0.1)}
    refused(lambda: magnitude_masks(weights, 0.5, scope="global"), "all 4 of small", "0.2142")
    assert magnitude_masks(weights, 0.2142, scope="global")["small"].sum() == 1


def test_weights_that_are_not_finite_are_refused_and_the_model_is_left():
    model = tiny_model()
    masks = magnitude_masks(prunable_weights(model), 0.5)
    name, weight = list(prunable_weights(model).items())[-1]
    with torch.no_grad():
        weight[0, :2] = float("nan")
    before = copy.deepcopy(model.state_dict())
    message = f"{name}: 2 of {weight.numel()} are NaN"
    refused(lambda: magnitude_masks(prunable_weights(model), 0.5), message)
    refused(lambda: PruneMasks(model, masks), message)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


def test_other_bad_input_is_refused():
    model, mask = layers(), torch.ones(12, 7, dtype=torch.bool)
    refused(lambda: PruneMasks(model, {"5.weight": mask}), "a mask of 5.weight")
    refused(lambda: PruneMasks(model, {"0.weight": mask.T}), "(12, 7)", "(7, 12)")
    refused(lambda: PruneMasks(model, {"0.weight": mask.float()}), "torch.float32")
    refused(lambda: PruneMasks(model, {"0.weight": ~mask}), "prunes all 84")
    refused(lambda: two_four_mask(torch.ones(2, 7)), "(2, 7)", "I = 4 or 8")
    refused(lambda: two_four_mask(torch.ones(8)), "(8,)")
    refused(lambda: magnitude_masks({"w": W}, 0.5, scope="row"), "layer, global")
    refused(lambda: magnitude_masks({"w": W.int()}, 0.5), "torch.int32")
    refused(lambda: magnitude_masks({}, 0.5), "none")
    refused(lambda: group_norms(W, 2), "dim = 2")
    refused(lambda: group_norms(W, norm=3), "norm = 3")
    refused(lambda: prunable_weights(nn.LayerNorm(3)), "LayerNorm")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"final_sparsity": 1.0}, "final_sparsity = 1.0"),
        ({"start_sparsity": 0.9}, "start_sparsity = 0.9"),
        ({"every": 3}, "num_steps = 9"),
        ({"num_steps": 0}, "num_steps = 0"),
        ({"final_sparsity": -1}, "= -1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(change, expected):
    settings = {"final_sparsity": 0.8, "num_steps": 10} | change
    refused(lambda: gradual_sparsity(0, **settings), expected)
