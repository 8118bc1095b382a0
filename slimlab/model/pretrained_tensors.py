"""Match the tensors of a folder with those of a model, by the rows of pretrained_names.

Chapter 03 uses it through slimlab.model.pretrained. Names and shapes are compared before a number
is read; every tensor of the files has a use here or is known to have none.

Production passes over tensors that it does not know, with a warning, and so can be used to take the
body of a model for another task.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimlab.config import ModelConfig, require
from slimlab.model.pretrained_files import StoredTensor, read_tensor
from slimlab.model.pretrained_names import FamilyFiles, TensorRow


class TensorForm(NamedTuple):
    """How a tensor of theirs becomes one or several of ours, and back.

    read   of their tensor and the number of ours
    write  of ours
    """

    read: Callable[[Tensor, int], Sequence[Tensor]]
    write: Callable[[Sequence[Tensor]], Tensor]


def _transposed(x: Tensor) -> Tensor:
    return x.T if x.dim() == 2 else x  # a bias has no other side


FORMS = {
    "same": TensorForm(lambda x, count: [x], lambda parts: parts[0]),
    # GPT-2 keeps matrices (in, out), as its "Conv1D" multiplies; nn.Linear has (out, in).
    "transposed": TensorForm(
        lambda x, count: [_transposed(x)], lambda parts: _transposed(parts[0])
    ),
    # One matrix (D, 3D) computes queries, keys and values.
    "side by side": TensorForm(
        lambda x, count: [_transposed(part) for part in x.chunk(count, dim=-1)],
        lambda parts: torch.cat([_transposed(part) for part in parts], dim=-1),
    ),
    "reversed": TensorForm(lambda x, count: [x.flip(0)], lambda parts: parts[0].flip(0)),
}


class MatchedTensors(NamedTuple):
    """What was found.

    rows       their names, and the row of each
    names      their names, and what the files call them
    untrained  names of ours that the files have nothing for
    """

    rows: dict[str, TensorRow]
    names: dict[str, str]
    untrained: list[str]


def rows_of(family: FamilyFiles, config: ModelConfig, theirs: Mapping) -> dict[str, TensorRow]:
    """List the tensors that a folder of this configuration holds.

    family   the tables
    config   num_layers and tie_embeddings are read
    theirs   the content of config.json, for its switches
    returns  their names, and the row of each with its number filled in
    """
    on = {"", *(key for key, value in theirs.items() if value is True)}
    on |= set() if config.tie_embeddings else {"untied"}
    found = {}
    for row in family.tensors:
        if row.only in on:
            numbers = range(config.num_layers) if "{n}" in row.theirs else [0]
            for n in numbers:
                ours, name = row.ours.replace("{n}", str(n)), row.theirs.replace("{n}", str(n))
                found[name] = row._replace(ours=ours, theirs=name)
    return found


def their_tensor(row: TensorRow, ours: Mapping[str, Tensor]) -> Tensor:
    """Make a tensor of theirs from ours; of tensors on "meta", only its shape.

    row   says which and how
    ours  our names and tensors
    """
    return FORMS[row.form].write([ours[name] for name in row.ours.split()])


def match_tensors(
    family: FamilyFiles,
    rows: dict[str, TensorRow],
    model: nn.Module,
    stored: Mapping[str, StoredTensor],
    source: str,
    ignore: Sequence[str] = (),
) -> MatchedTensors:
    """Find every tensor that a model needs among those of a folder.

    family   the tables
    rows     from rows_of
    model    of the right shapes; may be on "meta"
    stored   what the files hold
    source   the folder, for messages
    ignore   patterns of names that may be left over

    Raises InputError that lists what is missing, unknown, double or of another shape.
    """
    tied = family.tied if model.config.tie_embeddings else {}
    names = _their_names(family, {*rows, *tied}, stored, source)
    for copy, original in tied.items():
        if copy in names and original not in names:
            names[original] = names[copy]  # some tools keep the last of two equal tensors
    parts = {rows[name].part for name in rows if name in names} | {"body"}
    missing = [name for name, row in rows.items() if row.part in parts and name not in names]
    unknown = {
        canonical: name
        for canonical, name in names.items()
        if canonical not in rows
        and canonical not in tied
        and not canonical.endswith(family.buffers)
        and not any(fnmatchcase(name, pattern) for pattern in ignore)
    }
    ours = model.state_dict()
    shapes = {name: tuple(their_tensor(row, ours).shape) for name, row in rows.items()}
    odd = [name for name in rows if name in names and stored[names[name]].shape != shapes[name]]
    found = {
        "missing": missing,
        "unknown": list(unknown.values()),
        "of another shape": [
            f"{names[name]} {stored[names[name]].shape} instead of {shapes[name]}" for name in odd
        ],
    }
    require(
        not missing and not unknown and not odd,
        f"the {len(rows)} tensors that {source}/config.json describes",
        "; ".join(f"{len(some)} {kind}: {_listed(some)}" for kind, some in found.items() if some),
        _advice(bool(missing or odd), unknown, rows, odd, stored, names),
    )
    untrained = [row.ours for row in rows.values() if row.part not in parts]
    return MatchedTensors(rows, names, untrained)


def _their_names(
    family: FamilyFiles, known: set[str], stored: Mapping[str, StoredTensor], source: str
) -> dict[str, str]:
    names = {}
    for name in stored:
        canonical = name
        for old, new in family.renamed.items():
            if canonical.endswith(old):
                canonical = canonical.removesuffix(old) + new
        if canonical not in known and family.prefix + canonical in known:
            canonical = family.prefix + canonical
        require(
            canonical not in names,
            "every tensor once",
            f"{source}: {name} and {names.get(canonical)}, which are two names of one",
            "remove one of the two, or fetch the folder again",
        )
        names[canonical] = name
    return names


def _advice(
    incomplete: bool,
    unknown: Mapping[str, str],
    rows: dict[str, TensorRow],
    odd: Sequence[str],
    stored: Mapping[str, StoredTensor],
    names: Mapping[str, str],
) -> str:
    for name in odd:
        if rows[name].ours == "embedding.tokens.weight":
            num_rows = stored[names[name]].shape[0]
            return f"config.json and weights are of different models: the table has {num_rows} rows"
    more_blocks = any(re.sub(r"\.\d+\.", ".0.", name) in rows for name in unknown)
    if incomplete or more_blocks:
        return "config.json and weights are of different models: fetch the whole folder again"
    return (
        "if the model is right without them (another task's head), give "
        f"from_pretrained(..., ignore={list(unknown.values())[:4]})"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def check_tied(
    family: FamilyFiles,
    matched: MatchedTensors,
    stored: Mapping[str, StoredTensor],
    source: str,
) -> None:
    """Refuse two different tensors where the configuration says that they are one.

    family   the tables
    matched  from match_tensors
    stored   what the files hold
    source   the folder, for messages
    """
    names = matched.names
    for copy, original in family.tied.items():
        if copy in matched.rows or copy not in names or original not in names:
            continue
        first, second = (read_tensor(stored[names[n]], names[n]) for n in (copy, original))
        same = first.shape == second.shape
        gap = (first.double() - second.double()).abs().max().item() if same else 0.0
        require(
            same and gap == 0.0,
            f"{names[copy]} equal to {names[original]}, or absent: tie_word_embeddings is true",
            f"{source}: shapes {tuple(first.shape)} and {tuple(second.shape)}"
            + (f", which differ by up to {gap:.3g}" if same else ""),
            'if the model was trained untied, write "tie_word_embeddings": false to config.json',
        )
