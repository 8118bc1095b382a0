"""From a config.json of `transformers` to ModelConfig and back, by the tables of pretrained_names.

Chapter 03 uses it through slimlab.model.pretrained. A key is known and translated, known to leave
the logits as they are, known for one value only, or refused: a setting that is passed over in
silence would give other logits than its authors', and nobody would see it.

Production warns of unknown keys at most; it has the code that their authors ran.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from slimlab.config import InputError, ModelConfig, check_choice, require
from slimlab.model.families import FAMILIES
from slimlab.model.pretrained_names import EVERYWHERE, READ, REQUIRED, FamilyFiles

_ROPE = ("rope_parameters", "rope_scaling")


def family_of(theirs: dict, source: str) -> str:
    """Return the kind of model that a configuration of `transformers` is of.

    theirs   the content of config.json
    source   where it comes from, for messages
    returns  a key of READ

    Raises InputError for a model_type that is not read here.
    """
    given = theirs.get("model_type")
    require(
        isinstance(given, str) and given in READ,
        f"a model_type that is read here: {', '.join(READ)}",
        f"{source}: model_type = {given!r}",
        "choose a checkpoint of one of these, or load this one with `transformers`",
    )
    return given


def read_config(theirs: dict, source: str, ignore: Sequence[str] = ()) -> ModelConfig:
    """Translate a configuration of `transformers`.

    theirs   the content of config.json
    source   where it comes from, for messages
    ignore   patterns of unknown keys to pass over
    returns  the configuration

    Raises InputError for an unknown model_type or key, for a setting that changes the computation
    to one that is not here, for a size that is missing, and for sizes that contradict each other.
    """
    name = family_of(theirs, source)
    family = READ[name]
    theirs = _flat_rope(theirs, source) if name == "llama" else dict(theirs)
    _check_keys(family, theirs, source, ignore)
    values = {}
    for row in family.fields:
        value = theirs.get(row.theirs)
        value = row.default if value is None else value
        require(
            value is not REQUIRED,
            f"{row.theirs} ({row.ours} in this book)",
            f"{source}: no such key",
            "take config.json from the same place as the weights",
        )
        if row.values:
            check_choice(f"{row.theirs} of {source}", value, tuple(row.values))
            value = row.values[value]
        if value is not None and (value or row.ours not in values):
            values[row.ours] = value
    try:
        return ModelConfig(**{**FAMILIES[name], **values})
    except InputError as error:
        raise in_their_words(error, name, source) from error


def _flat_rope(theirs: dict, source: str) -> dict:
    # Version 5 of transformers writes the base of the frequencies into a dict, 4 beside it.
    flat = {key: value for key, value in theirs.items() if key not in _ROPE}
    for key in _ROPE:
        given = theirs.get(key)
        if given is None:
            continue
        given = dict(given) if isinstance(given, dict) else {"": given}
        kinds = [given.pop("rope_type", "default"), given.pop("type", "default")]
        base, part = given.pop("rope_theta", None), given.pop("partial_rotary_factor", None)
        require(
            kinds == ["default", "default"] and part in (None, 1.0) and not given,
            f'{key} with "rope_type": "default", or null',
            f"{source}: {key} = {theirs[key]}",
            "choose a checkpoint whose rotary positions are not stretched: the rules for that "
            "(llama3, yarn, linear, dynamic, longrope) are not in this book",
        )
        beside = flat.get("rope_theta")
        require(
            base is None or beside in (None, base),
            "one rope_theta",
            f"{source}: rope_theta = {beside}, but {base} in {key}",
            "keep the one that the weights were trained with",
        )
        flat["rope_theta"] = beside if base is None else base
    return flat


def _check_keys(family: FamilyFiles, theirs: dict, source: str, ignore: Sequence[str]) -> None:
    for key, known in family.only.items():
        given = theirs.get(key)
        require(
            given is None or given == known,
            f"{key} = {known!r}, or no such key: the computation that is known here",
            f"{source}: {key} = {given!r}"[:300],
            "choose a checkpoint without it, or load this one with `transformers`",
        )
    known = {*family.harmless, *family.only, *(row.theirs for row in family.fields)}
    # What is null is not in use, whatever it would be.
    unknown = {key: value for key, value in theirs.items() if key not in known}
    unknown = {key: value for key, value in unknown.items() if value is not None}
    left = [key for key in unknown if not any(fnmatchcase(key, pattern) for pattern in ignore)]
    require(
        not left,
        "keys of config.json whose effect on the logits is known",
        f"{source}: " + ", ".join(f"{key} = {unknown[key]!r:.60}" for key in left[:8]),
        f"if they leave the logits as they are, give from_pretrained(..., ignore={left[:8]})",
    )


def in_their_words(error: InputError, name: str, source: str) -> InputError:
    """Return an error about our settings with the file and the keys that they came from.

    error   names fields of ModelConfig
    name    a key of READ
    source  where the settings come from
    """
    family = READ[name]
    said = f"{error.asked} {error.given}"
    keys = [f"{r.ours} is {r.theirs}" for r in family.fields if re.search(rf"\b{r.ours}\b", said)]
    change = f"{error.change}; in that file {', '.join(keys)}" if keys else error.change
    return InputError(error.asked, f"{source}: {error.given}", change)


def family_to_write(config: ModelConfig, family: str | None = None) -> str:
    """Find the kind of model of `transformers` that can hold a configuration.

    config   what is to be written
    family   a key of READ to insist on
    returns  that, or the first that fits

    Raises InputError that says what does not fit which.
    """
    if family is not None:
        check_choice("family", family, tuple(READ))
    differences = {name: _differences(config, name) for name in READ if family in (None, name)}
    fitting = [name for name, found in differences.items() if not found]
    require(
        bool(fitting),
        f"a model of the form {', '.join(differences)}, which `transformers` has",
        "; ".join(f"not {name}: {', '.join(found[:4])}" for name, found in differences.items()),
        "make the model with family_config(...), or save a checkpoint of this book's own form",
    )
    return fitting[0]


def _differences(config: ModelConfig, name: str) -> list[str]:
    family, choices = READ[name], dict(FAMILIES[name])
    # Another order of rotary features can be turned into theirs.
    choices.pop("rotary_layout", None)
    for row in family.fields:
        choices.pop(row.ours, None)
    found = [
        f"{key} = {getattr(config, key)!r} instead of {value!r}"
        for key, value in choices.items()
        if getattr(config, key) != value
    ]
    for row in family.fields:
        value = getattr(config, row.ours)
        if row.values and value not in row.values.values():
            words = " or ".join(sorted({repr(one) for one in row.values.values()}))
            found.append(f"{row.ours} = {value!r} instead of {words}")
    if config.d_model % config.num_heads:
        found.append(f"d_model = {config.d_model} is no multiple of num_heads = {config.num_heads}")
    written = {row.ours for row in family.fields}
    if "num_kv_heads" not in written and config.num_kv_heads != config.num_heads:
        found.append(f"num_kv_heads = {config.num_kv_heads} instead of {config.num_heads}")
    if "d_head" not in written and config.d_head * config.num_heads != config.d_model:
        found.append(f"d_head = {config.d_head} instead of d_model / num_heads")
    if "num_segments" in written and not config.num_segments:
        found.append("num_segments = 0 instead of at least 1")
    return found


def write_config(config: ModelConfig, name: str, dtype: torch.dtype) -> dict:
    """Write a configuration as `transformers` reads it, versions 4 and 5.

    config   what is to be written; family_to_write has found that it fits
    name     a key of READ
    dtype    of the weights
    returns  the content of config.json
    """
    family = READ[name]
    theirs = {"architectures": [family.architecture], "model_type": name}
    for row in family.fields:
        value = getattr(config, row.ours)
        words = [word for word, ours in row.values.items() if ours == value]
        theirs[row.theirs] = words[0] if words else value
    fixed = {key: value for key, value in family.only.items() if key not in EVERYWHERE}
    # Their default numbers of special tokens would lie outside a small vocabulary.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    written = {**fixed, **family.written, **special, "torch_dtype": str(dtype).split(".")[1]}
    return {**theirs, **written}
