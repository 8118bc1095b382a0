"""What a teacher says of a text, computed once and kept on disk, for many students and epochs.

    soft_targets.safetensors  log_probs (W, T, k), ids (W, T, k), log_rest (W, T) of W windows
    soft_targets.json         whose they are, of which text and temperature; size and SHA-256

The text is cut into windows side by side, since what a teacher says depends on where its window
begins; students then draw from these windows. A position costs 8 * k bytes and 4 for the rest, so
k far below the vocabulary is kept; the tokens left out count as one outcome (distill_losses.py).
The folder is written under a temporary name and then renamed. Chapter 13 weighs it.

Production keeps such files in shards, in 16 bits, and maps them into memory.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.config import InputError, check_choice, check_number, require
from slimlab.model.tensor_files import read_tensors, sync, write_tensors
from slimlab.model.transformer import device_of
from slimlab.slim.distill import fingerprint, join_logits
from slimlab.slim.distill_losses import (
    DIVERGENCES,
    SoftTargets,
    check_temperature,
    distillation_loss,
    soft_targets,
)
from slimlab.text.batches import consecutive_windows, text_ids
from slimlab.train.checkpoint_folder import list_files, problem_of_file, read_json, write_json
from slimlab.train.metrics import evaluating

FORMAT, VERSION = "slimlab soft targets", 1
TENSORS, TABLE = "soft_targets.safetensors", "soft_targets.json"


@dataclass(frozen=True)
class TeacherCache:
    """The windows of a text and what a teacher said of each of their tokens.

    about    teacher and text (fingerprints), seq_len, vocab_size, top_k, distill_temperature
    inputs   (W, T) token ids
    targets  (W, T) the tokens that follow
    soft     SoftTargets of (W, T, k)
    """

    about: dict
    inputs: Tensor = field(repr=False)
    targets: Tensor = field(repr=False)
    soft: SoftTargets = field(repr=False)

    def batches(self, batch_size: int, seed: int = 0) -> Callable[[int], tuple]:
        """Return what slimlab.train.loop.train takes as data: a function from a step to its batch.

        batch_size  B, windows drawn for a step, with repetition
        seed        determines them, with the number of the step
        returns     step -> inputs, targets and the tensors of the soft targets, each with dim 0 = B

        Raises InputError for numbers out of range.
        """
        check_number("batch_size", batch_size, int, 1, float("inf"))
        check_number("seed", seed, int, 0, 2**32 - 1)
        return partial(_batch_at, self, batch_size, seed)

    def objective(self, *, soft_weight: float, divergence: str = "forward") -> "CachedObjective":
        """Return the objective for these batches.

        soft_weight, divergence  as in slimlab.slim.distill.DistillationObjective

        Raises InputError as the objective does.
        """
        return CachedObjective(self.about, soft_weight=soft_weight, divergence=divergence)


class CachedObjective:
    """Match what a teacher said before; an objective as slimlab.train.objectives has them.

    about                    of the cache
    soft_weight, divergence  as in slimlab.slim.distill.DistillationObjective

    Raises InputError for a weight out of range or an unknown divergence.
    """

    def __init__(self, about: dict, *, soft_weight: float, divergence: str = "forward"):
        check_number("soft_weight", soft_weight, float, 0, 1)
        check_choice("divergence", divergence, DIVERGENCES)
        self.about, self.soft_weight, self.divergence = about, soft_weight, divergence
        self.__name__ = (
            f"distillation(teacher={about['teacher']}, T={about['distill_temperature']:g}, "
            f"soft_weight={soft_weight:g}, {divergence}, top_k={about['top_k']}, "
            f"text={about['text']})"
        )

    def __call__(self, model: nn.Module, batch: tuple) -> tuple[Tensor, int]:
        """Compare a student with the teacher on a batch of TeacherCache.batches.

        model    the student: inputs -> logits (B, T, V)
        batch    inputs, targets, log_probs, ids and, unless all tokens were kept, log_rest
        returns  loss sum in nats, number of targets

        Communicates: as DistillationObjective does.
        Raises InputError if the student has another vocabulary.
        """
        inputs, targets, *tensors = batch
        logits = join_logits(model, model(inputs))
        require(
            logits.shape[-1] == self.about["vocab_size"],
            "one vocabulary of student and teacher",
            f"the student's {logits.shape[-1]} tokens, the teacher's {self.about['vocab_size']}",
            "give both models one tokenizer; only texts carry over from one to another",
        )
        soft = SoftTargets(self.about["distill_temperature"], *tensors)
        return distillation_loss(
            logits, targets, soft, soft_weight=self.soft_weight, divergence=self.divergence
        )


def cache_teacher(
    folder: str | os.PathLike,
    teacher: nn.Module,
    ids: Sequence[int] | Tensor,
    *,
    seq_len: int,
    distill_temperature: float,
    top_k: int,
    batch_size: int = 16,
) -> TeacherCache:
    """Run a teacher over a text and write what it says into a new folder, whole or not at all.

    folder               made here; its parent must exist
    teacher              a Decoder, whole on this rank; its mode is as before afterwards
    ids                  (N,) token ids; what is left behind the last whole window is not used
    seq_len              T, tokens of a window
    distill_temperature  T of the softmax, above 0; students must use the same
    top_k                tokens kept per position, from 1 to V
    batch_size           windows at a time; changes rounding only
    returns              what load_teacher_cache returns

    Raises InputError if the folder is there already or cannot be written, for a text without one
    whole window, and as soft_targets does.
    """
    folder, tokens = Path(folder), text_ids(ids, seq_len, batch_size)
    check_temperature(distill_temperature)
    change = "read it with load_teacher_cache, or give a new name"
    require(not os.path.lexists(folder), "a folder that does not exist", str(folder), change)
    cut, change = hasattr(teacher, "tensor_parallel"), "run it before tensor_parallel cuts it"
    require(not cut, "a teacher whole on this rank", "one that is cut over ranks", change)
    tensors = {"log_probs": [], "ids": [], "log_rest": []}
    with evaluating(teacher):
        for inputs, _ in consecutive_windows(_whole_windows(tokens, seq_len), seq_len, batch_size):
            logits = teacher(inputs.to(device_of(teacher)))
            soft = soft_targets(logits, distill_temperature=distill_temperature, top_k=top_k)
            for name, kept in tensors.items():
                one = getattr(soft, name)
                if one is not None:
                    kept.append((one.int() if name == "ids" else one).cpu())
    about = {
        "teacher": fingerprint(teacher),
        "text": _text_fingerprint(tokens),
        "seq_len": seq_len,
        "vocab_size": logits.shape[-1],
        "top_k": top_k,
        "distill_temperature": distill_temperature,
    }
    joined = {name: torch.cat(parts) for name, parts in tensors.items() if parts}
    _write(folder, joined, about)
    return _cache_of(about, tokens, joined)


def load_teacher_cache(
    folder: str | os.PathLike, ids: Sequence[int] | Tensor, teacher: nn.Module | None = None
) -> TeacherCache:
    """Read what cache_teacher wrote.

    folder   its folder
    ids      (N,) token ids of the same text
    teacher  compared with the one that spoke; None: it is not at hand, and not compared
    returns  a TeacherCache

    Raises InputError for the cache of another text or teacher, and for files that are missing, cut
    off, changed or of another form.
    """
    folder, tokens = Path(folder), text_ids(ids, 1)
    table = read_json(folder / TABLE)
    change = "copy the folder again, or make it anew with cache_teacher"
    form = (table.get("format"), table.get("version"))
    asked = f"soft targets, version {VERSION}"
    require(form == (FORMAT, VERSION), asked, f"{folder}: {form[0]!r}, version {form[1]!r}", change)
    try:
        about, written = dict(table["about"]), table["files"][TENSORS]
        problem = problem_of_file(folder / TENSORS, written["bytes"], written["sha256"])
        for name in ("seq_len", "top_k", "vocab_size"):
            check_number(name, about[name], int, 1, float("inf"))
        check_temperature(about["distill_temperature"])
        shape = ((len(tokens) - 1) // about["seq_len"], about["seq_len"], about["top_k"])
        named = {"text": about["text"], "teacher": about["teacher"]}
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        given = f"{folder}: {TABLE} is damaged: {type(error).__name__}: {error}"
        raise InputError("a whole table", given, change) from error
    require(problem is None, "whole soft targets", f"{folder}: {TENSORS} {problem}", change)
    found = {"text": _text_fingerprint(tokens)}
    if teacher is not None:
        found["teacher"] = fingerprint(teacher)
    for name, one in found.items():
        require(
            one == named[name],
            f"soft targets of this {name}, {one}",
            f"{folder}: those of {name} {named[name]}",
            "make them anew with cache_teacher, in another folder",
        )
    tensors = read_tensors(folder / TENSORS)
    shapes = {name: tuple(one.shape) for name, one in tensors.items()}
    wanted = {"log_probs": shape, "ids": shape}
    if about["top_k"] < about["vocab_size"]:
        wanted["log_rest"] = shape[:-1]
    require(shapes == wanted, f"{wanted}", f"{folder}: {shapes}", change)
    return _cache_of(about, tokens, tensors)


def _cache_of(about: dict, tokens: Tensor, tensors: dict[str, Tensor]) -> TeacherCache:
    used, seq_len = _whole_windows(tokens, about["seq_len"]), about["seq_len"]
    inputs, targets = (used[at : len(used) - 1 + at].view(-1, seq_len) for at in (0, 1))
    soft = SoftTargets(about["distill_temperature"], **tensors)
    return TeacherCache(about, inputs, targets, soft)


def _whole_windows(tokens: Tensor, seq_len: int) -> Tensor:
    return tokens[: (len(tokens) - 1) // seq_len * seq_len + 1]


def _text_fingerprint(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.cpu().contiguous().numpy()).hexdigest()[:16]


def _batch_at(cache: TeacherCache, batch_size: int, seed: int, step: int) -> tuple:
    # As slimlab.train.run.window_batch does: neighbouring seeds must not give neighbouring draws.
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    at = torch.randint(len(cache.inputs), (batch_size,), generator=generator)
    kept = [one for one in cache.soft[1:] if one is not None]
    return tuple(one[at] for one in (cache.inputs, cache.targets, *kept))


def _write(folder: Path, tensors: dict[str, Tensor], about: dict) -> None:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    table = {"format": FORMAT, "version": VERSION, "about": about}
    try:
        temporary.mkdir()
        write_tensors(temporary / TENSORS, tensors, {"format": FORMAT})
        write_json(temporary / TABLE, {**table, "files": list_files(temporary)})
        sync(temporary)
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError as error:
        given = f"{folder}: {error.strerror or error}"
        change = "make room on the disk, or choose a folder that you may write to"
        raise InputError("a folder that can be written", given, change) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
