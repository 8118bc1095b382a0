"""What goes into every linear layer, seen on a few batches, and the range to round it in.

record_inputs watches a model; choose_range turns what was seen into a range: all of it (min-max),
all but a few numbers (percentile), or the range of the least squared error. Chapter 14 compares
them on inputs with outliers.

Production calibrates on some hundreds of texts of the kind that will be asked for, and keeps
histograms; here a sample of rows is kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from slimlab.config import check_choice, check_number, check_size, require
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_maps import check_finite, find_map, from_integers, to_integers

METHODS = ("min_max", "percentile", "mse")
NUM_TRIALS = 90
LEAST_PART = 0.1


@dataclass
class InputRecord:
    """What went into a layer.

    low, high   the least and the greatest number
    column_max  (I,) the greatest absolute value of every feature
    num_rows    rows that were seen
    rows        (at most max_rows, I) float32, the first ones of every batch
    squares     (I, I) float64, the sum of x x^T over all rows, or None if it was not asked for
    """

    low: float
    high: float
    column_max: Tensor
    num_rows: int
    rows: Tensor
    squares: Tensor | None


def record_inputs(
    model: nn.Module,
    batches: Iterable,
    *,
    max_rows: int = 1024,
    squares: bool = False,
    run: Callable[[nn.Module, object], object] | None = None,
) -> dict[str, InputRecord]:
    """Run a model on some batches and record what goes into its linear layers.

    model    any module; put into eval mode for this, and back
    batches  each is given to the model, at least one
    max_rows rows kept of every layer, shared out evenly over the batches
    squares  sum x x^T too, which error-compensated rounding needs: I^2 numbers for each layer
    run      called with model and batch; None calls model(batch)
    returns  name of the nn.Linear -> InputRecord; layers that saw nothing are left out

    Raises InputError without batches, and for inputs that are not finite.
    """
    check_size("max_rows", max_rows)
    batches = list(batches)
    asked, change = "at least one batch to calibrate on", "give some token ids of held-out text"
    require(len(batches) > 0, asked, "none", change)
    records, was_training = {}, model.training
    per_batch = -(-max_rows // len(batches))
    hooks = [
        module.register_forward_pre_hook(
            partial(_record, records, name, per_batch, max_rows, squares)
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                model(batch) if run is None else run(model, batch)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return records


def _record(records, name, per_batch, max_rows, squares, module, inputs) -> None:
    rows = inputs[0].detach().float().reshape(-1, module.in_features)
    if len(rows) == 0:
        return
    check_finite(rows, f"the input of {name or 'the layer'}")
    low, high = (float(one) for one in torch.aminmax(rows))
    new = InputRecord(low, high, rows.abs().amax(dim=0), len(rows), rows[:per_batch].clone(), None)
    if squares:
        wide = rows.double()
        new.squares = wide.t() @ wide
    old = records.get(name)
    records[name] = new if old is None else _joined(old, new, max_rows)


def _joined(old: InputRecord, new: InputRecord, max_rows: int) -> InputRecord:
    return InputRecord(
        min(old.low, new.low),
        max(old.high, new.high),
        torch.maximum(old.column_max, new.column_max),
        old.num_rows + new.num_rows,
        torch.cat([old.rows, new.rows])[:max_rows],
        None if old.squares is None else old.squares + new.squares,
    )


def choose_range(
    values: Tensor, method: str, scheme: QuantScheme, *, percentile: float = 99.9
) -> tuple[float, float]:
    """Choose the range in which numbers are rounded; what lies outside will be clipped.

    values      any shape, not empty
    method      "min_max": all of them; "percentile": all but so many on both sides together;
                "mse": the part of the range, of 90 parts from all of it down to a tenth, with the
                least mean squared error
    scheme      the map; read by "mse" alone, of granularity "tensor"
    percentile  above 50 and at most 100; read by "percentile" alone
    returns     low, high

    Raises InputError for another method, an empty tensor, or numbers that are not finite.
    """
    check_choice("method", method, METHODS)
    require(values.numel() > 0, "numbers to calibrate on", "none", "give a larger sample")
    check_finite(values, "the sample")
    low, high = (float(one) for one in torch.aminmax(values))
    if method == "min_max":
        return low, high
    if method == "percentile":
        check_number("percentile", percentile, float, 50, 100, above=True)
        return _percentiles(values.flatten().float(), percentile)
    granularity = scheme.granularity
    given = f"granularity = {granularity!r}"
    asked, change = 'granularity "tensor" for a range of the least error', "give such a scheme"
    require(granularity == "tensor", asked, given, change)
    return _least_error(values.flatten().float(), low, high, scheme)


def _percentiles(values: Tensor, percentile: float) -> tuple[float, float]:
    # Sorted by hand: torch.quantile refuses more than 16 million numbers.
    ordered = values.sort().values
    last = len(ordered) - 1
    skipped = round(last * (100 - percentile) / 200)
    return float(ordered[skipped]), float(ordered[last - skipped])


def _least_error(values: Tensor, low: float, high: float, scheme: QuantScheme):
    best = None
    for part in torch.linspace(1, LEAST_PART, NUM_TRIALS).tolist():
        ends = torch.tensor([part * low]), torch.tensor([part * high])
        scale, zero_point = find_map(*ends, scheme)
        found = from_integers(to_integers(values, scale, zero_point, scheme), scale, zero_point)
        error = float((found - values).square().mean(dtype=torch.float64))
        if best is None or error < best[0]:
            best = error, part * low, part * high
    return best[1], best[2]
