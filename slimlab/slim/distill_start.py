"""A student that starts from some of its teacher's layers instead of from random weights.

Chapter 13 compares both. Residual blocks change the stream a little each, so a model that lacks
some of them still speaks, badly; it has less to learn than one that starts from nothing.

Sanh et al. 2019 (arXiv:1910.01108), section 3: DistilBERT takes every second layer of BERT.

Production also starts narrower students, from slices of the teacher's matrices.
"""

from collections.abc import Sequence

from slimlab.config import check_number, require
from slimlab.model.transformer import Decoder
from slimlab.slim.prune_structure import remove_layers


def student_from_layers(teacher: Decoder, layers: Sequence[int]) -> Decoder:
    """Copy a teacher with some of its blocks; tables, norms and head come along.

    teacher  left as it is
    layers   numbers, from 0, of the blocks that the student gets, ascending; see spread_layers
    returns  a model with its own weights and its own config, ready to be trained even if the
             teacher is frozen

    Raises InputError for layers that do not exist, or are not ascending, and as remove_layers does.
    """
    num_layers = getattr(getattr(teacher, "config", None), "num_layers", 0)
    kept = list(layers) if isinstance(layers, Sequence) else [layers]
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in kept)
    require(
        whole and kept and kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < num_layers,
        f"layers of the teacher, ascending, each once, from 0 to {num_layers - 1}",
        f"layers = {layers!r}",
        "give spread_layers(teacher.config.num_layers, num_student_layers)",
    )
    student = remove_layers(teacher, [number for number in range(num_layers) if number not in kept])
    return student.requires_grad_(True).train()


def spread_layers(num_teacher_layers: int, num_student_layers: int) -> list[int]:
    """Choose layers evenly over the depth, the first and the last among them.

    num_teacher_layers  to choose from
    num_student_layers  to be chosen; of one, the first
    returns             numbers from 0, ascending

    Raises InputError for more layers than the teacher has.
    """
    check_number("num_teacher_layers", num_teacher_layers, int, 1, float("inf"))
    check_number("num_student_layers", num_student_layers, int, 1, num_teacher_layers)
    steps = max(num_student_layers - 1, 1)
    return [
        (number * (num_teacher_layers - 1) + steps // 2) // steps
        for number in range(num_student_layers)
    ]
