"""Distillation: a small student learns from what a large, frozen teacher says of each next token.

Chapter 13 uses it. An objective takes the place of the ordinary one, so everything that trains a
model trains a student too: slimlab.train.loop.train, accumulate_gradients and DataParallel, whose
ranks each run the whole teacher on their own part of the batch. A teacher or a student that
tensor_parallel has cut works as well; the ranks that share it must then be given the same batch.

Four steps: the teacher's logits without gradient, the student's with, the divergence between them
(distill_losses.py), and the gradient of the student alone.

Hinton et al. 2015 (arXiv:1503.02531); distill_match.py has what others add.

Production runs the teacher on devices of its own, or once, ahead of time (distill_cache.py).
"""

import hashlib
import json
from dataclasses import asdict, is_dataclass

import torch
from torch import Tensor, nn

from slimlab.config import check_choice, check_number, require
from slimlab.model.masks import packed_mask, packed_positions
from slimlab.model.tensor_files import state_of
from slimlab.parallel.tensor_collectives import gather_from_ranks
from slimlab.slim.distill_losses import (
    DIVERGENCES,
    check_temperature,
    distillation_loss,
    smoothed_loss,
    soft_targets,
)
from slimlab.slim.distill_match import attention_loss, hidden_loss, run_model


class DistillationObjective:
    """Match a teacher that reads the same batch; an objective as slimlab.train.objectives has them.

    teacher              inputs -> logits (..., V); frozen here, see freeze
    distill_temperature  T, above 0
    soft_weight          from 0, the true tokens alone, to 1, the teacher alone
    divergence           "forward" or "reverse", see soft_loss
    hidden_weight        of the distance between the last blocks' states, see hidden_loss; both
                         models must be Decoders of equal d_model
    attention_weight     of the divergence between the last blocks' attention, see attention_loss;
                         both models must be Decoders with equally many heads

    Its `__name__` says all this and the teacher's fingerprint, so that a run does not go on with
    another teacher or setting unnoticed.
    Raises InputError for a number out of range or an unknown divergence.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        distill_temperature: float,
        soft_weight: float,
        divergence: str = "forward",
        hidden_weight: float = 0.0,
        attention_weight: float = 0.0,
    ):
        check_temperature(distill_temperature)
        check_number("soft_weight", soft_weight, float, 0, 1)
        check_choice("divergence", divergence, DIVERGENCES)
        check_number("hidden_weight", hidden_weight, float, 0, float("inf"))
        check_number("attention_weight", attention_weight, float, 0, float("inf"))
        self.teacher = freeze(teacher)
        self.distill_temperature, self.soft_weight = distill_temperature, soft_weight
        self.divergence = divergence
        self.hidden_weight, self.attention_weight = hidden_weight, attention_weight
        self.__name__ = (
            f"distillation(teacher={fingerprint(teacher)}, T={distill_temperature:g}, "
            f"soft_weight={soft_weight:g}, {divergence}, hidden_weight={hidden_weight:g}, "
            f"attention_weight={attention_weight:g})"
        )

    def __call__(self, model: nn.Module, batch: tuple) -> tuple[Tensor, int]:
        """Compare both models on a batch.

        model    the student: inputs -> logits (..., V)
        batch    inputs and targets; optionally document_ids, as in causal_objective
        returns  loss sum in nats, number of targets; the same on all ranks that share a model

        Communicates: nothing for whole models; for each that tensor_parallel has cut what its
        layers do, and one all_gather of the logits.
        Raises InputError if the vocabularies differ, the student shares weights with the teacher,
        the teacher's logits are not finite, and as distillation_loss does.
        """
        check_pair(model, self.teacher)
        inputs, targets, *document_ids = batch
        given = {}
        if document_ids:
            given["mask"] = packed_mask(document_ids[0])
            given["positions"] = packed_positions(document_ids[0])
        wanted = {"hidden": self.hidden_weight > 0, "attention": self.attention_weight > 0}
        with torch.no_grad():
            said = run_model(self.teacher, inputs, given, **wanted)
            teacher_logits = join_logits(self.teacher, said.logits)
        soft = soft_targets(teacher_logits, distill_temperature=self.distill_temperature)
        found = run_model(model, inputs, given, **wanted)
        loss_sum, num_tokens = distillation_loss(
            join_logits(model, found.logits),
            targets,
            soft,
            soft_weight=self.soft_weight,
            divergence=self.divergence,
        )
        if wanted["hidden"]:
            distance = hidden_loss(found.hidden, said.hidden, targets)
            loss_sum = loss_sum + self.hidden_weight * distance
        if wanted["attention"]:
            distance = attention_loss(found.attention, said.attention, targets)
            loss_sum = loss_sum + self.attention_weight * distance
        return loss_sum, num_tokens


def smoothed_objective(
    model: nn.Module, batch: tuple, *, smoothing: float = 0.1
) -> tuple[Tensor, int]:
    """Train without a teacher, on smoothed targets: what a distilled student must beat.

    model      inputs -> logits (..., V)
    batch      inputs and targets
    smoothing  as in smoothed_loss
    returns    loss sum in nats, number of targets

    Raises InputError as smoothed_loss does.
    """
    inputs, targets = batch
    return smoothed_loss(model(inputs), targets, smoothing=smoothing)


def freeze(teacher: nn.Module) -> nn.Module:
    """Stop a model from learning: no gradients, no dropout.

    teacher  changed in place, its weights are not
    returns  the teacher
    """
    return teacher.eval().requires_grad_(False)


def fingerprint(model: nn.Module) -> str:
    """Name a model by its weights and its configuration.

    model    any module; of one cut over ranks each rank names its own part
    returns  16 hexadecimal digits, others as soon as one bit differs
    """
    config = getattr(model, "config", None)
    described = asdict(config) if is_dataclass(config) else type(model).__name__
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(state_of(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse models of different vocabularies, and a student that is the teacher in part.

    student, teacher  models; those without a configuration are compared by their logits later

    Raises InputError.
    """
    sizes = [getattr(getattr(m, "config", None), "vocab_size", None) for m in (student, teacher)]
    require(
        None in sizes or sizes[0] == sizes[1],
        "one vocabulary of student and teacher",
        f"the student's {sizes[0]} tokens, the teacher's {sizes[1]}",
        "give both models one tokenizer; only texts carry over from one to another",
    )
    owned = {id(param) for param in teacher.parameters()}
    shared = [name for name, param in student.named_parameters() if id(param) in owned]
    require(
        not shared,
        "a student with weights of its own",
        f"{len(shared)} shared with the teacher, the first of them {shared[:1]}",
        "start it with slimlab.slim.distill_start.student_from_layers, or copy.deepcopy",
    )


def join_logits(model: nn.Module, logits: Tensor) -> Tensor:
    """Put the parts of the logits together where ranks share a model's vocabulary.

    model    whole, or one that tensor_parallel has cut
    logits   (..., V), or this rank's part of them
    returns  (..., V), the same on every rank

    Communicates: one all_gather if there are parts.
    """
    shared = getattr(model, "tensor_parallel", None)
    if shared is None or logits.shape[-1] == model.config.vocab_size:
        return logits
    return gather_from_ranks(logits, shared.group, dim=-1)
