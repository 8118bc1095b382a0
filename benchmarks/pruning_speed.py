"""Dense, masked, CSR, 2:4 and removed: one linear layer and the model of the book, in turns.

`python -m benchmarks.pruning --speed` calls it; what it measures is read by chapter 15.
"""

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import median_interval, take_turns
from slimlab.model.generation import generate
from slimlab.slim.prune_masks import two_four_mask
from slimlab.slim.prune_pack import pack_sparse, unpack_sparse
from slimlab.slim.prune_scores import magnitude_masks

SHAPES = ((1, 1024, 4096), (64, 1024, 4096))  # rows, inputs, outputs
CALLS = 10  # of a layer in one lap


def layer_rivals(rows: int, inputs: int, outputs: int) -> dict[str, Callable]:
    """One linear layer, pruned in several ways; each calls what multiplies it.

    rows     of the input
    inputs   I
    outputs  O
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    masks = {s: magnitude_masks({"w": weight}, s)["w"] for s in (0.5, 0.9, 0.99)}
    fours = weight * two_four_mask(weight)
    packed = pack_sparse(fours, "2:4")
    half = weight[: outputs // 2].contiguous()
    transposed = x.t().contiguous()
    made = {
        "dense": lambda: F.linear(x, weight),
        "half the rows removed": lambda: F.linear(x, half),
        "2:4, zeros in place": lambda: F.linear(x, fours),
        "2:4, unpacked": lambda: F.linear(x, unpack_sparse(packed, "2:4", weight.shape)),
    }
    for sparsity, mask in masks.items():
        masked = weight * mask
        made[f"masked {sparsity:g}"] = lambda masked=masked: F.linear(x, masked)
        sparse = masked.to_sparse_csr()
        made[f"CSR {sparsity:g}"] = lambda sparse=sparse: (sparse @ transposed).t()
    return made


@torch.no_grad()
def speed(models: Mapping[str, nn.Module], windows: Tensor, rounds: int) -> list[dict]:
    """Take turns, and divide each time by that of the dense rival in the same round.

    models   name -> model in evaluation mode; "dense" is one of them
    windows  (B, T) ids: all are read, and the first is gone on with
    rounds   laps of each rival
    """
    tasks = {
        f"linear {rows} x {inputs} -> {outputs}": (CALLS, layer_rivals(rows, inputs, outputs))
        for rows, inputs, outputs in SHAPES
    }
    reads = {name: partial(model, windows) for name, model in models.items()}
    prompt = windows[:1, :32]
    writes = {name: partial(generate, model, prompt, 24) for name, model in models.items()}
    tasks |= {"model of the book, reads": (1, reads), "model of the book, writes": (1, writes)}
    rows = []
    for task, (calls, rivals) in tasks.items():
        laps = {name: partial(partial, _repeat, run, calls) for name, run in rivals.items()}
        times = {name: taken[""] for name, taken in take_turns(laps, rounds).items()}
        for name, taken in times.items():
            ratios = [one / base for one, base in zip(taken, times["dense"], strict=True)]
            rows.append({
                "task": task,
                "rival": name,
                "median_s": statistics.median(taken) / calls,
                "ratio": round(statistics.median(ratios), 4),
                "interval_95": median_interval(ratios),
                "rounds": rounds,
            })  # fmt: skip
    return rows


def _repeat(run: Callable, calls: int) -> None:
    for _ in range(calls):
        run()


def two_four_on_a_processor() -> str:
    """What PyTorch says when the 2:4 kernel is asked for without an accelerator."""
    weight = torch.randn(64, 64)
    try:
        torch.sparse.to_sparse_semi_structured(weight * two_four_mask(weight))
    except (RuntimeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return "it works"
