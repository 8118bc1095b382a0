"""Quantized models on disk: which layer is of which kind, beside the tensors of quantize_pack.

Chapter 14 writes one, weighs it, and reads it back: the logits are the same to the last bit.
Production keeps the same two things: integers with scales, and a JSON text that says how to use
them.
"""

import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.config import InputError, ModelConfig, require
from slimlab.model.build import build_model
from slimlab.model.tensor_files import fill, state_of
from slimlab.slim.quantize_cast import CASTS, cast_of
from slimlab.slim.quantize_layers import (
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from slimlab.slim.quantize_maps import Quantized
from slimlab.slim.quantize_pack import load_quantized, save_quantized

_KINDS = {
    "embedding": QuantizedEmbedding,
    "weight_only": QuantizedLinear,
    "int8": Int8Linear,
}
_EXTRAS = ("bias", "smoothing", "outliers", "outlier_weight")


def save_quantized_model(
    folder: str | os.PathLike, model: nn.Module, extra: dict | None = None
) -> Path:
    """Write a model that quantize_model or cast_model returned, whole or not at all.

    folder   made here
    model    with its configuration in model.config
    extra    more to keep beside it, for JSON
    returns  the folder

    Raises InputError for a model without a configuration, or one neither quantized nor cast, and
    as save_quantized does.
    """
    config, layers, cast = getattr(model, "config", None), _layers_of(model), cast_of(model)
    change = "give what quantize_model or cast_model returned for a model of build_model"
    asked, given = "a quantized model with a configuration", type(model).__name__
    require(isinstance(config, ModelConfig) and bool(layers or cast), asked, given, change)
    given, change = "the part of one rank", "save the whole model, before it is cut"
    require(not hasattr(model, "tensor_parallel"), asked, given, change)
    tensors, table, owner = {}, {}, {}
    for name, layer in layers.items():
        held = owner.setdefault(id(layer.table), name)
        if held == name:
            tensors[f"{name}.weight"] = layer.table.quantized()
        kind = next(kind for kind, one in _KINDS.items() if type(layer) is one)
        table[name] = {"kind": kind, "table": held}
        if isinstance(layer, Int8Linear) and layer.input_range is not None:
            table[name]["input_range"] = list(layer.input_range)
        extras = {one: getattr(layer, one, None) for one in _EXTRAS}
        tensors |= {f"{name}.{one}": kept for one, kept in extras.items() if kept is not None}
    tensors |= _rest_of(model, layers)
    stored = {"model": asdict(config), "layers": table, "cast": cast, "extra": extra or {}}
    return save_quantized(folder, tensors, stored)


def load_quantized_model(folder: str | os.PathLike) -> tuple[nn.Module, dict]:
    """Read a model that save_quantized_model wrote.

    folder   its folder
    returns  the model, in eval mode, and extra

    Raises InputError as load_quantized does, and for a folder whose tensors are not those of the
    model that it names.
    """
    stored = load_quantized(folder)
    tensors = dict(stored.tensors)
    asked, change = "a whole quantized model", "copy the folder again"
    try:
        config = ModelConfig(**stored.config["model"])
        with torch.random.fork_rng(devices=[]):  # weights are drawn here, and thrown away
            model = build_model(config).to(_dtype_of(stored.config.get("cast")))
        tables: dict[str, QuantizedWeight] = {}
        for name, about in stored.config["layers"].items():
            layer = _read_layer(name, about, tensors, tables)
            shapes = tuple(model.get_submodule(name).weight.shape), layer.table.shape
            require(shapes[0] == shapes[1], f"{name} {shapes[0]}", f"{shapes[1]}", change)
            old = model.get_submodule(name)
            fits = isinstance(old, nn.Embedding) == isinstance(layer, QuantizedEmbedding)
            require(fits, f"{name} in place of {type(old).__name__}", about["kind"], change)
            model.set_submodule(name, layer, strict=True)
        extra = stored.config["extra"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        given = f"{folder}: {type(error).__name__}: {error}"
        raise InputError(asked, given, change) from error
    rest = nn.Module()
    for number, tensor in enumerate(_rest_of(model, _layers_of(model)).values()):
        rest.register_buffer(str(number), tensor)
    names = list(_rest_of(model, _layers_of(model)))
    plain = {name for name, one in tensors.items() if isinstance(one, Tensor)}
    missing, left = set(names) - plain, set(tensors) - (plain & set(names))
    given = f"{folder}: missing {sorted(missing)[:4]}, left over {sorted(left)[:4]}"
    require(not missing and not left, asked, given, change)
    fill(rest, {str(number): tensors[name] for number, name in enumerate(names)}, str(folder))
    return model.eval(), extra


def _dtype_of(cast: str | None) -> torch.dtype:
    asked = f"a cast that is known: {', '.join(CASTS)}, or none"
    require(cast is None or cast in CASTS, asked, repr(cast), "copy the folder again")
    return torch.float32 if cast is None else CASTS[cast]


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    kinds = tuple(_KINDS.values())
    return {name: one for name, one in model.named_modules() if isinstance(one, kinds)}


def _rest_of(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Return what belongs to no quantized layer: norms, and layers that were skipped."""
    starts = tuple(f"{name}." for name in layers)
    return {name: one for name, one in state_of(model).items() if not name.startswith(starts)}


def _read_layer(name: str, about: dict, tensors: dict, tables: dict) -> nn.Module:
    held = about["table"]
    if held not in tables:
        found = tensors.pop(f"{held}.weight")
        asked, given = f"{held}.weight as integers", type(found).__name__
        require(isinstance(found, Quantized), asked, given, "copy the folder again")
        tables[held] = QuantizedWeight(found)
    extras = {one: tensors.pop(f"{name}.{one}", None) for one in _EXTRAS}
    if about["kind"] == "embedding":
        return QuantizedEmbedding(tables[held])
    if about["kind"] == "weight_only":
        return QuantizedLinear(tables[held], extras["bias"])
    ends = about.get("input_range")
    return _KINDS[about["kind"]](tables[held], input_range=ends and tuple(ends), **extras)
