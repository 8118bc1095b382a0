"""Pruning in one go, without retraining: the weights that stay make up for those that go.

compensated_pruning does one matrix, prune_compensated the linear layers of a model. Chapter 15
compares them with magnitude at equal sparsity, 2:4 included.

Frantar and Alistarh 2023 (arXiv:2301.00774, SparseGPT); Hassibi and Stork 1993 (optimal brain
surgeon) for what one weight costs and how the others should move.

Production does the same on a GPU for matrices of 10,000 columns and more, and can round the weights
that stay in the same pass.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from slimlab.config import check_choice, check_size, require
from slimlab.slim.prune_masks import two_four_mask
from slimlab.slim.prune_scores import check_sparsity, check_weights, prunable_weights
from slimlab.slim.quantize_calibrate import record_inputs
from slimlab.slim.quantize_compensate import check_squares, inverse_factor, pass_error_on

PATTERNS = ("free", "2:4")


def compensated_pruning(
    weight: Tensor,
    squares: Tensor,
    sparsity: float = 0.5,
    *,
    pattern: str = "free",
    block_size: int = 8,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Prune a matrix from left to right, and let the columns to come make up for what goes.

    The aim is the least |W X - Q X|^2 for the inputs X that were seen. With H = X X^T and
    H^-1 = U^T U, to lose w_j costs (w_j / U_jj)^2 once the columns before it are settled and those
    after it have moved; that is the score by which weights of a block of columns go.

    weight      (O, I), left as it is
    squares     (I, I) the sum of x x^T, of calibration
    sparsity    part of the weights that goes, from 0 up to, not including, 1: round(sparsity O I)
                of them; 0.5 for "2:4"
    pattern     "free"; or "2:4": two of every four neighbours of a row
    block_size  columns whose weights are ranked together, over all rows; each block loses the same
                part, to the nearest whole number. Read by "free" alone. A score expects all later
                columns to make up for a loss, so one block of all columns would take too much from
                the first ones; the paper's 128 is for matrices many times as wide
    damping     as in slimlab.slim.quantize_compensate.inverse_factor
    returns     the pruned weight, of its dtype, and its prune_mask (bool, True: stays)

    Raises InputError for shapes that do not fit, numbers that are not finite, a sparsity that is
    out of range or leaves nothing, and what two_four_mask refuses.
    Frantar and Alistarh 2023, algorithm 1.
    """
    check_choice("pattern", pattern, PATTERNS)
    check_weights({"weight": weight})
    check_squares(weight, squares)
    check_sparsity(sparsity)
    check_size("block_size", block_size)
    _check_pattern(weight, sparsity, pattern)
    work = weight.detach().double().clone()
    unused = squares.diagonal() == 0
    factor = inverse_factor(squares, damping)
    mask = torch.ones(weight.shape, dtype=torch.bool)
    width = 4 if pattern == "2:4" else block_size
    for start in range(0, work.shape[1], width):
        block = slice(start, min(start + width, work.shape[1]))
        scores = (work[:, block] / factor.diagonal()[block]).abs()
        scores[:, unused[block]] = 0.0  # no input, so nothing is lost
        mask[:, block] = _block_mask(scores, sparsity, pattern, block.stop, mask)
        for column in range(block.start, block.stop):
            kept = work[:, column : column + 1] * mask[:, column : column + 1]
            pass_error_on(work, factor, column, kept)
    return work.to(weight.dtype).masked_fill_(~mask, 0.0), mask


def _check_pattern(weight: Tensor, sparsity: float, pattern: str) -> None:
    rows, columns = weight.shape
    if pattern == "2:4":
        two_four_mask(weight)  # refuses what cannot have the pattern
        require(
            sparsity == 0.5,
            'sparsity = 0.5 for the pattern "2:4"',
            f"sparsity = {sparsity}",
            'give 0.5, or pattern="free"',
        )
    require(
        round(sparsity * rows * columns) < rows * columns,
        "a sparsity that leaves something of the weight",
        f"sparsity = {sparsity:g}, all {rows * columns} would go",
        "give less",
    )


def _block_mask(scores: Tensor, sparsity: float, pattern: str, stop: int, mask: Tensor) -> Tensor:
    """Choose what stays of a block, so that all columns before `stop` have lost their part."""
    if pattern == "2:4":
        return two_four_mask(scores)
    num_pruned = round(sparsity * len(mask) * stop) - int((~mask).sum())
    kept = torch.ones(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort(stable=True)[:num_pruned]] = False
    return kept.view(scores.shape)


def prune_compensated(
    model: nn.Module,
    batches: Iterable,
    sparsity: float = 0.5,
    *,
    pattern: str = "free",
    in_turn: bool = True,
    run: Callable[[nn.Module, object], object] | None = None,
    damping: float = 0.01,
) -> dict[str, Tensor]:
    """Prune the linear layers of a model by what goes into them.

    model     changed in place, if no layer is refused; copy it first to keep it
    batches   of token ids to calibrate on, walked through once per layer
    sparsity, pattern, damping  as in compensated_pruning, for every layer
    in_turn   record the inputs of a layer when all before it are pruned, so that it makes up for
              their errors too; False: record them once, of the whole model, which is faster
    run       as in slimlab.slim.quantize_calibrate.record_inputs
    returns   name -> prune_mask of the layers of prunable_weights, ready for PruneMasks

    Raises InputError as compensated_pruning and record_inputs do, and for a layer into which
    nothing went.
    """
    weights, batches = prunable_weights(model), list(batches)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    masks: dict[str, Tensor] = {}
    records = None
    try:
        for name, weight in weights.items():
            if records is None or in_turn:
                records = record_inputs(model, batches, max_rows=1, squares=True, run=run)
            layer = name.removesuffix(".weight") if name != "weight" else ""
            require(
                layer in records,
                "inputs of every linear layer",
                f"none of {layer or 'the layer'}",
                "give batches that reach it",
            )
            pruned, masks[name] = compensated_pruning(
                weight, records[layer].squares, sparsity, pattern=pattern, damping=damping
            )
            with torch.no_grad():
                weight.copy_(pruned)
    except BaseException:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(before[name])
        raise
    return masks
