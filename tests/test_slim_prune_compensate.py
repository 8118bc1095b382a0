"""Compensated pruning: hand values, least squares, exact masks, less error than magnitude."""

import copy
import math

import pytest
import torch
from torch import nn

from slimlab.config import InputError, ModelConfig
from slimlab.model.initialise import initialise
from slimlab.model.transformer import Decoder
from slimlab.slim.prune_compensate import compensated_pruning, prune_compensated
from slimlab.slim.prune_masks import PruneMasks, is_two_four, two_four_mask
from slimlab.slim.prune_scores import magnitude_masks, prunable_weights, sparsity_of
from slimlab.slim.quantize_calibrate import record_inputs
from slimlab.slim.quantize_compensate import output_error


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares_of(x):
    return x.double().t() @ x.double()


def correlated(rows, columns, seed=0):
    return numbers(rows, columns, seed=seed) @ numbers(columns, columns, seed=seed + 1)


def small_decoder(seed=0):
    config = ModelConfig(32, 16, 16, 2, 2, feed_forward="swiglu")
    return initialise(Decoder(config), seed=seed)


def some_batches(count=4):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(32, (4, 16), generator=generator) for _ in range(count)]


def refused(call, *expected):
    with pytest.raises(InputError) as caught:
        call()
    for text in expected:
        assert text in str(caught.value), str(caught.value)


def test_two_columns_by_hand():
    # H = [[2, 1], [1, 2]], H^-1 = [[2, -1], [-1, 2]] / 3. Losing w_0 = 1 costs 1 / (2/3) and moves
    # w_1 by -w_0 (-1/3) / (2/3) = +1/2; losing w_1 = 1.2 later costs 1.44 / (1/2).
    squares = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    found, mask = compensated_pruning(torch.tensor([[1.0, 1.2]]), squares, 0.5, damping=1e-12)
    assert mask.tolist() == [[False, True]]
    assert found[0, 1].item() == pytest.approx(1.2 + 0.5)
    moved = torch.tensor([[1.0, 1.2]]) - found
    assert ((moved @ squares) @ moved.t()).item() == pytest.approx(1 / (2 / 3))


def test_the_score_is_the_cost_and_not_the_magnitude():
    squares = torch.diag(torch.tensor([100.0, 1.0]))  # the first input is loud
    weight = torch.tensor([[0.5, 2.0]])
    assert magnitude_masks({"w": weight}, 0.5)["w"].tolist() == [[False, True]]
    found, mask = compensated_pruning(weight, squares, 0.5)
    assert mask.tolist() == [[True, False]]
    assert found.tolist() == [[0.5, 0.0]]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("block_size", [1, 7, 16, 128])
def test_exactly_so_many_weights_go(sparsity, block_size):
    weight, squares = numbers(11, 32), squares_of(correlated(80, 32))
    found, mask = compensated_pruning(weight, squares, sparsity, block_size=block_size)
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    assert torch.equal(found != 0, mask)
    for stop in range(block_size, 32, block_size):
        assert int((~mask[:, :stop]).sum()) == round(sparsity * 11 * stop)


def test_inputs_without_correlation_leave_pruning_by_magnitude():
    weight = numbers(6, 12)
    found, mask = compensated_pruning(weight, torch.eye(12), 0.5)
    assert torch.equal(found, weight * mask)
    _, whole = compensated_pruning(weight, torch.eye(12), 0.5, block_size=12)
    assert torch.equal(whole, magnitude_masks({"w": weight}, 0.5)["w"])
    _, fours = compensated_pruning(weight, torch.eye(12), pattern="2:4")
    assert torch.equal(fours, two_four_mask(weight))


def test_each_column_moves_the_later_ones_to_their_best_values():
    # After each column the rest is the least-squares answer, given what the past has become.
    weight, squares = numbers(1, 6), squares_of(correlated(50, 6, seed=4))
    found, mask = compensated_pruning(weight, squares, 0.5, damping=1e-12)
    target, done = weight.double(), []
    for column in range(6):
        past = torch.tensor(done, dtype=torch.float64) - target[0, :column]
        rest = squares[column:, column:]
        best = target[0, column:] - torch.linalg.solve(rest, squares[column:, :column] @ past)
        done.append(best[0].item() if mask[0, column] else 0.0)
    assert found[0].tolist() == pytest.approx(done)


@pytest.mark.parametrize("pattern", ["free", "2:4"])
@pytest.mark.parametrize("shape", [(24, 48), (48, 24), (8, 260)])
@pytest.mark.parametrize("seed", range(3))
def test_less_of_the_output_is_lost_than_by_magnitude(pattern, shape, seed):
    weight = numbers(*shape, seed=seed)
    squares = squares_of(correlated(300, shape[1], seed=seed + 2))
    found, mask = compensated_pruning(weight, squares, pattern=pattern)
    by_size = magnitude_masks({"w": weight}, 0.5)["w"]
    by_size = two_four_mask(weight) if pattern == "2:4" else by_size
    assert sparsity_of({"w": mask}) == sparsity_of({"w": by_size}) == 0.5
    lost = output_error(weight, found, squares)
    assert lost < 0.9 * output_error(weight, weight * by_size, squares)
    assert lost < output_error(weight, weight * mask, squares)  # not the choice alone


def test_two_of_four_everywhere():
    found, mask = compensated_pruning(
        numbers(16, 40), squares_of(correlated(90, 40)), pattern="2:4", block_size=3
    )
    assert is_two_four(found)
    assert (mask.reshape(-1, 4).sum(1) == 2).all()


def test_columns_that_were_never_used_go_first_and_move_nothing():
    x = correlated(40, 8, seed=3)
    x[:, [2, 5]] = 0
    weight = numbers(4, 8)
    found, mask = compensated_pruning(weight, squares_of(x), 0.25)
    assert not mask[:, [2, 5]].any()
    assert int((~mask).sum()) == 8
    assert torch.allclose(found[:, mask[0]], weight[:, mask[0]])


def test_the_weight_and_its_dtype_stay():
    weight = numbers(4, 8).to(torch.bfloat16)
    kept = weight.clone()
    found, _ = compensated_pruning(weight, squares_of(correlated(40, 8)), 0.5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(weight, kept)


@pytest.mark.parametrize("pattern", ["free", "2:4"])
def test_every_layer_of_a_decoder_loses_less_than_by_magnitude(pattern):
    model, batches = small_decoder(), some_batches()
    whole = {name: weight.detach().clone() for name, weight in prunable_weights(model).items()}
    records = record_inputs(model, batches, squares=True)
    masks = prune_compensated(model, batches, pattern=pattern, in_turn=False)
    assert masks.keys() == whole.keys()
    for name, weight in prunable_weights(model).items():
        by_size = magnitude_masks({name: whole[name]}, 0.5)[name]
        by_size = two_four_mask(whole[name]) if pattern == "2:4" else by_size
        squares = records[name.removesuffix(".weight")].squares
        rival = output_error(whole[name], whole[name] * by_size, squares)
        assert output_error(whole[name], weight, squares) < rival, name
        assert torch.equal(weight != 0, masks[name])
        assert pattern == "free" or is_two_four(weight)


def test_the_masks_hold_while_training_and_the_first_layers_do_not_depend_on_the_order():
    together, in_turn = small_decoder(), small_decoder()
    prune_compensated(together, some_batches(), 0.5, in_turn=False)
    masks = prune_compensated(in_turn, some_batches(), 0.5)
    first, last = (next(iter(masks)), list(masks)[-1])
    one, other = dict(together.named_parameters()), dict(in_turn.named_parameters())
    assert torch.equal(one[first], other[first])
    assert not torch.equal(one[last], other[last])
    before = copy.deepcopy(in_turn.state_dict())
    PruneMasks(in_turn, masks).finish()  # they fit, and remove nothing more
    assert all(torch.equal(value, before[name]) for name, value in in_turn.state_dict().items())


def test_a_single_layer_is_a_model_too():
    layer = nn.Linear(8, 4)
    masks = prune_compensated(layer, [correlated(40, 8)], 0.5)
    assert list(masks) == ["weight"]
    assert torch.equal(layer.weight != 0, masks["weight"])


def test_what_does_not_fit_is_refused():
    weight, squares = numbers(4, 8), squares_of(correlated(40, 8))
    refused(lambda: compensated_pruning(weight, squares, 1.0), "all 32 would go")
    refused(lambda: compensated_pruning(weight, squares, -0.1), "sparsity")
    refused(lambda: compensated_pruning(weight, squares, 0.6, pattern="2:4"), "0.5", "0.6")
    refused(lambda: compensated_pruning(numbers(4, 6), torch.eye(6), pattern="2:4"), "4 or 8")
    refused(lambda: compensated_pruning(weight, squares, pattern="1:2"), "pattern")
    refused(lambda: compensated_pruning(weight, squares[:6, :6]), "squares (8, 8)", "(6, 6)")
    refused(lambda: compensated_pruning(weight, squares * math.nan), "finite")
    refused(lambda: compensated_pruning(weight.fill_(math.nan), squares), "NaN")
    refused(lambda: compensated_pruning(numbers(4, 8), squares, block_size=0), "block_size")
    refused(lambda: compensated_pruning(numbers(4, 8), squares, damping=0.0), "damping")


def test_a_model_that_is_refused_stays_as_it_was():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = Half()
    before = copy.deepcopy(model.state_dict())
    refused(lambda: prune_compensated(model, [numbers(9, 8)], 0.5), "unused", "batches that reach")
    refused(lambda: prune_compensated(model, [], 0.5), "at least one batch")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
