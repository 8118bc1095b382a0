"""Losses of a student that learns from a teacher: how far its probabilities are from the teacher's.

Chapter 13 explains them. Divergences compare probabilities, never logits: logits may be negative
and mean the same after any number is added to all. A temperature above 1 flattens both sides, so
that the student sees how the teacher ranks what it holds unlikely. The gradient of flattened
probabilities shrinks as 1 / T^2, which the factor T^2 undoes; with a large temperature the student
then learns the teacher's logits up to a constant.

Sums and counts, never means, as in slimlab.train.objectives; positions whose target is IGNORE do
not count here either, whatever stands in their logits.

Hinton et al. 2015 (arXiv:1503.02531), sections 2 and 2.1; Gu et al. 2023 (arXiv:2306.08543) for the
reverse divergence; Szegedy et al. 2015 (arXiv:1512.00567), section 7, for label smoothing.

Production fuses softmax and divergence over slices of the vocabulary, on the device of both models.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlab.config import check_choice, check_number, check_size, require
from slimlab.train.objectives import IGNORE, token_loss

DIVERGENCES = ("forward", "reverse")
# In 32 bits and with 500 tokens the loss is off by 1 % at T = 1,000 and by 20 % at 10,000, its
# gradient by 0.01 % and 0.1 %. At 1e6 the loss is nothing but rounding; below 1e-22 it is 0.
TEMPERATURES = (0.001, 10_000)


class SoftTargets(NamedTuple):
    """What a teacher says of the next token, at a temperature.

    distill_temperature  T, by which the logits were divided
    log_probs            (..., k) logarithms of probabilities
    ids                  (..., k) the tokens they belong to; None: all V of them, in order
    log_rest             (...) logarithm of the probability of all other tokens together; None
                         where there are no others
    """

    distill_temperature: float
    log_probs: Tensor
    ids: Tensor | None = None
    log_rest: Tensor | None = None


def soft_targets(
    teacher_logits: Tensor, *, distill_temperature: float, top_k: int | None = None
) -> SoftTargets:
    """Turn a teacher's logits into what a student is to match.

    teacher_logits       (..., V)
    distill_temperature  T, above 0; 1 leaves the probabilities as they are
    top_k                keep the k likeliest tokens and the sum of the others; None: keep all
    returns              SoftTargets without gradient, at least in 32 bits

    Raises InputError for a temperature that is no number above 0, top_k that is not from 1 to V,
    and logits that are not finite.
    Hinton et al. 2015, equation 1.
    """
    check_temperature(distill_temperature)
    check_logits("teacher_logits", teacher_logits)
    logits = _wide(teacher_logits.detach())
    log_probs = F.log_softmax(logits / distill_temperature, dim=-1)
    if top_k is None:
        return SoftTargets(distill_temperature, log_probs)
    check_size("top_k", top_k)
    check_number("top_k", top_k, int, 1, logits.shape[-1])
    kept, ids = log_probs.topk(top_k, dim=-1)
    log_rest = _log_rest(log_probs, ids) if top_k < logits.shape[-1] else None
    return SoftTargets(distill_temperature, kept, ids, log_rest)


def soft_loss(
    student_logits: Tensor, targets: Tensor, soft: SoftTargets, *, divergence: str = "forward"
) -> tuple[Tensor, int]:
    """Add up T^2 times the divergence between teacher and student at all positions that count.

    student_logits  (..., V)
    targets         (...) IGNORE where a position does not count; what else they are is not read
    soft            the teacher's, for the same positions
    divergence      "forward", KL(teacher || student), asks the student to cover all that the
                    teacher holds possible; "reverse", KL(student || teacher), to put nothing where
                    the teacher has nothing
    returns         () the sum in nats, times T^2, and the number of positions that count

    Of top-k soft targets the tokens that were not kept count as one outcome; the divergence is
    then at most that of all tokens, and equal to it if all, or all but one, are kept.
    Raises InputError if shapes or vocabularies do not fit, or for an unknown divergence.
    Hinton et al. 2015, section 2.
    """
    check_choice("divergence", divergence, DIVERGENCES)
    _check_fit(student_logits, targets, soft)
    counts = targets != IGNORE
    # Chosen before the softmax: infinity times a gradient of 0 would be NaN.
    logits = _wide(student_logits[counts])
    teacher, ids, rest = (None if one is None else one[counts] for one in soft[1:])
    log_probs = F.log_softmax(logits / soft.distill_temperature, dim=-1)
    student = log_probs if ids is None else log_probs.gather(-1, ids.long())
    if rest is not None:
        student = torch.cat((student, _log_rest(log_probs, ids.long())[:, None]), dim=-1)
        teacher = torch.cat((teacher, rest[:, None]), dim=-1)
    teacher = teacher.to(student.dtype)
    first, second = (teacher, student) if divergence == "forward" else (student, teacher)
    loss_sum = (first.exp() * (first - second)).sum()
    return loss_sum * soft.distill_temperature**2, int(counts.sum())


def distillation_loss(
    student_logits: Tensor,
    targets: Tensor,
    soft: SoftTargets,
    *,
    soft_weight: float,
    divergence: str = "forward",
) -> tuple[Tensor, int]:
    """Weigh what the teacher says against the true token.

    student_logits  (..., V)
    targets         (...) true ids, IGNORE where a position does not count
    soft            the teacher's, for the same positions
    soft_weight     w from 0, the true tokens alone, to 1, the teacher alone
    divergence      as in soft_loss
    returns         () w * T^2 * divergence + (1 - w) * cross-entropy, added up in nats, and the
                    number of positions that count

    Raises InputError for a weight that is not from 0 to 1, and as soft_loss and token_loss do.
    Hinton et al. 2015, section 2.
    """
    check_number("soft_weight", soft_weight, float, 0, 1)
    soft_sum, num_tokens = soft_loss(student_logits, targets, soft, divergence=divergence)
    if soft_weight == 1:
        return soft_sum, num_tokens
    hard_sum, _ = token_loss(student_logits, targets)
    return soft_weight * soft_sum + (1 - soft_weight) * hard_sum, num_tokens


def smoothed_loss(logits: Tensor, targets: Tensor, *, smoothing: float) -> tuple[Tensor, int]:
    """Add up the cross-entropy with targets that are a little uncertain: no teacher, no knowledge.

    logits     (..., V)
    targets    (...) true ids, or IGNORE
    smoothing  e from 0, the true token alone, to below 1: it gets 1 - e, and e is spread evenly
               over all V tokens
    returns    () the sum in nats, and the number of positions that count

    A student that gains no more than this from its teacher learned nothing from it.
    Raises InputError for a smoothing out of range, and as token_loss does.
    Szegedy et al. 2015, section 7.
    """
    check_number("smoothing", smoothing, float, 0, math.nextafter(1, 0))
    hard_sum, num_tokens = token_loss(logits, targets)
    log_probs = F.log_softmax(_wide(logits[targets != IGNORE]), dim=-1)
    even_sum = -log_probs.mean(dim=-1).sum()
    return (1 - smoothing) * hard_sum + smoothing * even_sum, num_tokens


def check_temperature(distill_temperature: float) -> None:
    """Refuse what no logit can be divided by, and what leaves nothing but rounding.

    distill_temperature  a number above 0, from 0.001 to 10,000

    Raises InputError.
    """
    number = isinstance(distill_temperature, int | float)
    require(
        number and not isinstance(distill_temperature, bool) and 0 < distill_temperature < math.inf,
        "distill_temperature, a number above 0",
        f"distill_temperature = {distill_temperature!r}",
        "give 1 for the probabilities as they are, 2 to 4 to flatten them; for the likeliest token "
        "alone train on the texts that the teacher writes",
    )
    lowest, highest = TEMPERATURES
    require(
        lowest <= distill_temperature <= highest,
        f"distill_temperature from {lowest:g} to {highest:,}: beyond, 32 bits hold no differences",
        f"distill_temperature = {distill_temperature!r}",
        f"give {highest if distill_temperature > 1 else lowest:g}, which is the limit already",
    )


def check_logits(name: str, logits: Tensor) -> None:
    """Refuse logits that are not finite.

    name    what they are called, for the message
    logits  (..., V)

    Raises InputError that names the first place.
    """
    finite = logits.isfinite()
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        require(
            False,
            f"{name}: finite numbers",
            f"{name}{list(place)} = {float(logits[place])} ({int((~finite).sum())} such numbers)",
            "look for NaN in the weights of the teacher; load its checkpoint again",
        )


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _log_rest(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Add up the probabilities of the tokens that were not kept; 1 minus the others would round."""
    return log_probs.scatter(-1, ids, -math.inf).logsumexp(dim=-1)


def _check_fit(student_logits: Tensor, targets: Tensor, soft: SoftTargets) -> None:
    vocab_size, kept = student_logits.shape[-1], soft.log_probs.shape[-1]
    change = "give both models one tokenizer; only texts carry over from one to another"
    if soft.ids is None:
        given = f"the student's {vocab_size}, the teacher's {kept}"
        require(vocab_size == kept, "one vocabulary of student and teacher", given, change)
    else:
        largest = int(soft.ids.max()) if soft.ids.numel() else 0
        given = f"the student's {vocab_size} tokens, a teacher's token {largest}"
        fits = largest < vocab_size and kept + (soft.log_rest is not None) <= vocab_size
        require(fits, "one vocabulary of student and teacher", given, change)
    shapes = [tuple(student_logits.shape[:-1]), tuple(targets.shape)]
    shapes.append(tuple(soft.log_probs.shape[:-1]))
    require(
        len(set(shapes)) == 1,
        "logits of the student, targets and soft targets for the same positions",
        f"positions {', '.join(map(str, shapes))}",
        "run teacher and student on the same batch",
    )
