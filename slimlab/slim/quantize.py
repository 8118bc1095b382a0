"""A model made of integers: every linear layer and every table quantized, in a copy.

quantize_model is the way through the modules beside this one: calibrate, smooth, set outliers
apart, round, and put the layers in place. Chapter 14 goes it step by step.

Production quantizes one block after the other and calibrates each on what the quantized ones
before it put out; here all are calibrated on the model as it came.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from slimlab.config import check_choice, require
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_calibrate import (
    METHODS,
    InputRecord,
    choose_range,
    record_inputs,
)
from slimlab.slim.quantize_compensate import (
    compensated_rounding,
    outlier_columns,
    smoothing_factors,
)
from slimlab.slim.quantize_layers import (
    WHOLE,
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from slimlab.slim.quantize_maps import check_finite, quantize

ACTIVATIONS = ("none", "dynamic", "static")
ROUNDINGS = ("nearest", "compensated")
INT8 = QuantScheme(8, symmetric=True, granularity="channel")


def quantize_model(
    model: nn.Module,
    scheme: QuantScheme = INT8,
    *,
    table_scheme: QuantScheme | None = None,
    activations: str = "none",
    rounding: str = "nearest",
    batches: Iterable | None = None,
    range_method: str = "min_max",
    smoothing: float | None = None,
    outlier_threshold: float | None = None,
    skip: Iterable[str] = (),
    fit_groups: bool = False,
) -> nn.Module:
    """Return a copy of a model whose linear layers and embeddings are quantized.

    model              any module; stays as it is, its weights too
    scheme             of the linear layers
    table_scheme       of the embeddings and of linear layers that share their table; None: scheme
    activations        "none": weights only; "dynamic": inputs in 8 bits by a range per row, found
                       in each call; "static": by one range per layer, found on the batches
    rounding           "nearest", or "compensated" for all linear layers that share no table
    batches            what the model is called with to calibrate; needed for "static",
                       "compensated", smoothing and outliers
    range_method       for "static", see choose_range; of a sample of rows, but for "min_max"
                       without smoothing and outliers
    smoothing          the strength, see smoothing_factors; None: no smoothing
    outlier_threshold  see outlier_columns; None: no outliers apart
    skip               names of modules that stay in floats
    fit_groups         where groups do not divide a layer's rows: QuantScheme.fitted, no error
    returns            the copy, in eval mode

    A layer with a shared table is rounded to the nearest and neither smoothed nor has outliers,
    since the other user of the table would notice.

    Raises InputError for weights that are not finite or not float32, groups that do not divide,
    options that contradict each other, a name in skip that there is not, and a model
    without anything to quantize.
    """
    table_scheme = table_scheme or scheme
    options = {"activations": activations, "rounding": rounding, "range_method": range_method}
    options |= {"smoothing": smoothing, "outlier_threshold": outlier_threshold}
    needs = _check_options(scheme, table_scheme, options, batches is not None)
    targets = _targets(model, tuple(skip))
    tables = {id(one.weight) for one in targets.values() if isinstance(one, nn.Embedding)}
    schemes = _schemes(targets, tables, scheme, table_scheme, fit_groups)
    _check_weights(targets, lambda weight: schemes[id(weight)])
    records = record_inputs(model, batches, squares=rounding == "compensated") if needs else {}
    small = copy.deepcopy(model)
    shared: dict[int, QuantizedWeight] = {}
    for name, module in targets.items():
        key = id(module.weight)
        if key in tables:
            if key not in shared:
                shared[key] = QuantizedWeight(quantize(module.weight, schemes[key]))
            layer = _with_table(module, shared[key], records.get(name), options)
        else:
            layer = _linear(name, module, schemes[key], records.get(name), options)
        small.set_submodule(name, layer)
    return small.eval()


def _check_options(scheme, table_scheme, options: dict, has_batches: bool) -> bool:
    """Refuse options that contradict each other; return whether inputs must be recorded."""
    for name, names in {"activations": ACTIVATIONS, "rounding": ROUNDINGS}.items():
        check_choice(name, options[name], names)
    check_choice("range_method", options["range_method"], METHODS)
    integers = options["activations"] != "none"
    both = integers and any(
        one.num_bits != 8 or not one.symmetric or one.granularity == "group"
        for one in (scheme, table_scheme)
    )
    change = 'use QuantScheme(8), or activations="none"'
    asked = "symmetric weights of 8 bits, per channel or tensor, with activations in 8 bits"
    require(not both, asked, f"scheme = {scheme}, table_scheme = {table_scheme}", change)
    apart = [one for one in ("smoothing", "outlier_threshold") if options[one] is not None]
    asked, change = "activations in 8 bits", 'give activations="dynamic" or "static"'
    require(integers or not apart, asked, f"activations 'none' with {', '.join(apart)}", change)
    needs = options["activations"] == "static" or options["rounding"] == "compensated"
    needs = needs or bool(apart)
    asked, change = "batches to calibrate on", "give batches=[token ids, ...]"
    require(has_batches or not needs, asked, "batches = None", change)
    return needs


def _targets(model: nn.Module, skip: tuple[str, ...]) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    unknown = [name for name in skip if name not in modules]
    asked, change = "names of modules to skip", "see dict(model.named_modules())"
    require(not unknown, asked, f"skip = {unknown}", change)
    kept = {id(one) for name in skip for one in modules[name].modules()}
    found = {
        name: one
        for name, one in modules.items()
        if isinstance(one, nn.Linear | nn.Embedding) and id(one) not in kept
    }
    given = f"a {type(model).__name__} with {len(modules)} modules, {len(skip)} of them skipped"
    change = "give a model that has some inside it; skip fewer"
    require(found and "" not in found, "linear layers or embeddings to quantize", given, change)
    return found


def _schemes(targets, tables, scheme, table_scheme, fit_groups: bool) -> dict[int, QuantScheme]:
    """Choose the scheme of every weight, by its id, since tied layers have one."""
    schemes = {}
    for module in targets.values():
        own = table_scheme if id(module.weight) in tables else scheme
        schemes[id(module.weight)] = own.fitted(module.weight.shape[1]) if fit_groups else own
    return schemes


def _check_weights(
    targets: dict[str, nn.Module], scheme_of: Callable[[Tensor], QuantScheme]
) -> None:
    """Refuse weights that cannot be quantized, before anything is computed."""
    for name, module in targets.items():
        given, change = f"{name}.weight of {module.weight.dtype}", "convert it: model.float()"
        require(module.weight.dtype == torch.float32, "a model in float32", given, change)
        check_finite(module.weight, f"{name}.weight")
        scheme_of(module.weight).scale_shape(tuple(module.weight.shape))


def _with_table(module, table: QuantizedWeight, record: InputRecord | None, options) -> nn.Module:
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding(table)
    if options["activations"] == "none":
        return QuantizedLinear(table, module.bias)
    found = _input_range(record, record.rows if record else None, options)
    return Int8Linear(table, module.bias, input_range=found)


def _linear(name, module: nn.Linear, scheme, record: InputRecord | None, options) -> nn.Module:
    weight = module.weight.detach().float()
    extras, rows, column_max = {}, None, None
    if record is not None:
        rows, column_max = record.rows, record.column_max
    elif options["rounding"] == "compensated" or options["smoothing"] is not None:
        given, change = f"{name} saw none", "give batches that reach every layer, or skip it"
        require(False, "inputs of every layer", given, change)
    factors = torch.ones(module.in_features)
    if options["smoothing"] is not None:
        factors = smoothing_factors(column_max, weight, strength=options["smoothing"])
        extras["smoothing"] = factors
        weight, rows, column_max = weight * factors, rows / factors, column_max / factors
    if options["outlier_threshold"] is not None and column_max is not None:
        places = outlier_columns(column_max, threshold=options["outlier_threshold"])
        if len(places):
            extras |= {"outliers": places, "outlier_weight": weight[:, places].clone()}
            weight, rows = weight.index_fill(1, places, 0), rows.index_fill(1, places, 0)
    if options["rounding"] == "compensated":
        squares = record.squares / torch.outer(factors, factors).double()
        squares = _without(squares, extras.get("outliers"))
        quantized = compensated_rounding(weight, squares, scheme)
    else:
        quantized = quantize(weight, scheme)
    table = QuantizedWeight(quantized)
    if options["activations"] == "none":
        return QuantizedLinear(table, module.bias)
    found = _input_range(record, rows, options)
    return Int8Linear(table, module.bias, input_range=found, **extras)


def _without(squares: Tensor, places: Tensor | None) -> Tensor:
    """Leave out columns that are multiplied elsewhere: they are 0 and must stay 0."""
    if places is None:
        return squares
    return squares.index_fill(0, places, 0).index_fill(1, places, 0)


def _input_range(record, rows, options) -> tuple[float, float] | None:
    if options["activations"] != "static":
        return None
    given, change = "a layer that saw none", "give batches that reach every layer, or skip it"
    require(record is not None, "inputs of every layer", given, change)
    method = options["range_method"]
    if method == "min_max" and options["smoothing"] is options["outlier_threshold"] is None:
        return record.low, record.high  # of all rows, not of the sample
    return choose_range(rows, method, WHOLE)
