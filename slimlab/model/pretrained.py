"""Read and write models as `transformers` keeps them: GPT-2, LLaMA and BERT.

Chapter 03 loads a model that `transformers` has made, finds the same logits, and sends one back.
The tables are in pretrained_names.py; pretrained_config.py translates settings,
pretrained_tensors.py matches tensors, pretrained_files.py reads files, pretrained_folder.py writes.

Production reads hundreds of kinds of model, quantized files and adapters, spreads tensors over
devices while it reads, and keeps the tokenizer in the same folder.
"""

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimlab.config import InputError, ModelConfig, check_size, require
from slimlab.model.build import build_model
from slimlab.model.checks import FLOATS
from slimlab.model.encoder import Encoder
from slimlab.model.pretrained_config import (
    family_of,
    family_to_write,
    in_their_words,
    read_config,
    write_config,
)
from slimlab.model.pretrained_files import (
    CONFIG,
    StoredTensor,
    find_tensors,
    read_config_json,
    read_tensor,
)
from slimlab.model.pretrained_folder import json_bytes, whole_folder, write_shards
from slimlab.model.pretrained_names import READ
from slimlab.model.pretrained_tensors import (
    FORMS,
    MatchedTensors,
    check_tied,
    match_tensors,
    rows_of,
    their_tensor,
)
from slimlab.model.transformer import Decoder
from slimlab.text.files import write_atomically

_STORED = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def from_pretrained(
    folder: str | os.PathLike,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    ignore: Sequence[str] = (),
) -> Decoder | Encoder:
    """Make the model that a folder of `transformers` holds.

    folder   config.json beside model.safetensors, or beside its index and shards
    device   where the model is made; one tensor at a time passes through the CPU's memory
    dtype    of the weights: as stored if not given
    ignore   patterns ("classifier.*") of unknown keys of config.json and of unknown tensors that
             may be passed over
    returns  a Decoder (GPT-2, LLaMA) or an Encoder (BERT), in evaluation mode. Heads of an encoder
             that the folder lacks are drawn anew, and a warning names them; where a LLaMA has
             biases in one kind of layer only, those of the other are zero

    Nothing is unpickled. Raises InputError if the folder is incomplete or damaged, for models and
    settings that are not read here, and if settings and tensors contradict each other.
    """
    device = _checked_device(device)
    # Letter by letter, "classifier.*" would let everything pass, for its star.
    listed = isinstance(ignore, list | tuple) and all(isinstance(one, str) for one in ignore)
    require(listed, "ignore, a list of patterns", f"ignore = {ignore!r}", 'give ["classifier.*"]')
    require(
        dtype is None or dtype in FLOATS,
        f"dtype, one of {', '.join(map(str, FLOATS))}, or None",
        f"dtype = {dtype!r}",
        "leave dtype out to keep what is stored",
    )
    theirs = read_config_json(folder)
    source = os.path.join(folder, CONFIG)
    name = family_of(theirs, source)
    family, config = READ[name], read_config(theirs, source, ignore)
    try:
        with torch.device("meta"):  # shapes without numbers: none is drawn to be replaced at once
            model = build_model(config)
    except InputError as error:
        raise in_their_words(error, name, source) from error
    stored = find_tensors(folder)
    rows = rows_of(family, config, theirs)
    matched = match_tensors(family, rows, model, stored, str(folder), ignore)
    dtype = _checked_dtype(matched, stored, folder, dtype)
    check_tied(family, matched, stored, str(folder))
    state = _read_state(matched, stored, device, dtype)
    _fill_gaps(model, state, device, dtype)
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.embedding.tokens.weight
    if matched.untrained:
        warnings.warn(
            f"{folder} has nothing for {', '.join(matched.untrained)}: drawn at random, to be "
            "trained before their results mean anything",
            stacklevel=2,
        )
    return model.eval()


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0][:120]
        given = f"device = {device!r}: {reason}"
        raise InputError("a device of this machine", given, 'give device="cpu"') from error


def _checked_dtype(
    matched: MatchedTensors,
    stored: dict[str, StoredTensor],
    folder: str | os.PathLike,
    dtype: torch.dtype | None,
) -> torch.dtype:
    kinds = {}
    for name in matched.rows:
        if name in matched.names:
            kinds.setdefault(stored[matched.names[name]].dtype, []).append(matched.names[name])
    counted = ", ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in kinds.items())
    require(
        set(kinds) <= set(_STORED),
        f"weights of dtype {', '.join(_STORED)}",
        f"{folder}: {counted}",
        "choose a checkpoint that is not quantized",
    )
    require(
        len(kinds) == 1 or dtype is not None,
        "weights of one dtype, or a dtype to convert them to",
        f"{folder}: {counted}",
        "give from_pretrained(..., dtype=torch.float32)",
    )
    return dtype or _STORED[next(iter(kinds))]


def _read_state(
    matched: MatchedTensors,
    stored: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    state = {}
    for name, row in matched.rows.items():
        if name not in matched.names:
            continue
        tensor = read_tensor(stored[matched.names[name]], matched.names[name])
        ours = row.ours.split()
        for our_name, part in zip(ours, FORMS[row.form].read(tensor, len(ours))):
            # A copy: what was read may be the file itself, mapped into memory.
            state[our_name] = part.to(
                device, dtype, copy=True, memory_format=torch.contiguous_format
            )
    return state


def _fill_gaps(
    model: nn.Module, state: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    if model.config.tie_embeddings:
        state["lm_head.weight"] = state["embedding.tokens.weight"]
    for name, tensor in model.state_dict().items():
        if name not in state:
            new = torch.zeros(tensor.shape, device=device, dtype=dtype)
            if new.dim() == 2:
                new.normal_(0.0, 0.02)
            elif name.endswith(".weight"):
                new.fill_(1.0)  # the gain of a norm
            state[name] = new


def save_pretrained(
    model: Decoder | Encoder,
    folder: str | os.PathLike,
    *,
    family: str | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a model so that `transformers` reads it.

    model            a Decoder or Encoder of choices that GPT-2, LLaMA or BERT has; interleaved
                     rotary features are put in the order that is read there
    folder           new, empty, or a folder of a model, which is replaced; a tokenizer's files stay
    family           "gpt2", "llama" or "bert"; found from the configuration if not given
    max_shard_bytes  largest safetensors file, unless one tensor is larger; one file if not given

    The folder gets its name when it is complete. Raises InputError if no family has these choices
    or the model is not as its configuration says, and if the folder cannot be written.
    """
    config = getattr(model, "config", None)
    require(
        isinstance(config, ModelConfig) and not hasattr(model, "_orig_mod"),
        "a model of this book",
        f"a {type(model).__name__}",
        "give the Decoder or Encoder itself, not what wraps it (torch.compile keeps it as "
        "model._orig_mod, DistributedDataParallel as model.module)",
    )
    if max_shard_bytes is not None:
        check_size("max_shard_bytes", max_shard_bytes)
    name = family_to_write(config, family)
    state = _checked_state(model)
    theirs = write_config(config, name, next(iter(state.values())).dtype)
    rows = rows_of(READ[name], config, theirs)
    sizes = {one: sum(state[ours].nbytes for ours in row.ours.split()) for one, row in rows.items()}
    with whole_folder(folder) as temporary:
        write_shards(temporary, sizes, lambda one: their_tensor(rows[one], state), max_shard_bytes)
        write_atomically(temporary / CONFIG, json_bytes(theirs))


def _checked_state(model: nn.Module) -> dict[str, Tensor]:
    with torch.device("meta"):
        wanted = build_model(model.config).state_dict()
    state = model.state_dict()
    odd = [name for name in {**wanted, **state} if name not in wanted or name not in state]
    odd += [n for n in wanted if n in state and wanted[n].shape != state[n].shape]
    require(
        not odd,
        f"the {len(wanted)} tensors of a {type(model).__name__} of this configuration",
        f"missing, left over or of another shape: {', '.join(odd[:6])}",
        "save what was quantized, sliced or given adapters in this book's own form",
    )
    dtypes = sorted({str(tensor.dtype) for tensor in state.values()})
    floating = all(tensor.is_floating_point() for tensor in state.values())
    change = "convert it: model.to(torch.float32)"
    require(floating and len(dtypes) == 1, "a model of one dtype", ", ".join(dtypes), change)
    if model.config.tie_embeddings:
        require(
            torch.equal(state["lm_head.weight"], state["embedding.tokens.weight"]),
            "lm_head.weight equal to the tokens' table, as tie_embeddings says",
            "two different tensors",
            "make the model with tie_embeddings=False",
        )
    if model.config.rotary_layout == "interleaved" and model.config.positions == "rotary":
        for name in [n for n in state if ".q_proj." in n or ".k_proj." in n]:
            state[name] = _halved(state[name], model.config.d_head)
    return state


def _halved(x: Tensor, d_head: int) -> Tensor:
    # Rows 0, 2, 4, ... of every head, then 1, 3, 5, ...: pair i stands at i and i + d_head/2.
    return x.unflatten(0, (-1, d_head // 2, 2)).transpose(1, 2).flatten(0, 2)
