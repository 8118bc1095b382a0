"""Losses of distillation: hand values, torch's own divergence, temperature, and what is refused."""

import math

import pytest
import torch
from distill_cases import numbers
from torch.nn import functional as F

from slimlab.config import InputError
from slimlab.slim.distill_losses import (
    SoftTargets,
    distillation_loss,
    smoothed_loss,
    soft_loss,
    soft_targets,
)
from slimlab.train.objectives import IGNORE, token_loss

ROWS, VOCAB = (2, 3), 7
TARGETS = torch.tensor([[1, IGNORE, 6], [0, 3, IGNORE]])
COUNTS = TARGETS != IGNORE


def logits_of(*probs):
    return torch.tensor([probs], dtype=torch.float64).log()


def both(seed=0):
    return numbers(*ROWS, VOCAB, seed=seed), numbers(*ROWS, VOCAB, seed=seed + 100)


def test_the_divergence_of_two_coins_is_what_the_formula_says():
    teacher, student, one = logits_of(0.5, 0.5), logits_of(0.25, 0.75), torch.zeros(1).long()
    soft = soft_targets(teacher, distill_temperature=1)
    forward, count = soft_loss(student, one, soft)
    assert count == 1
    assert float(forward) == pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    reverse, _ = soft_loss(student, one, soft, divergence="reverse")
    assert float(reverse) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


def test_a_temperature_of_two_takes_the_square_root_of_odds():
    # Odds of 9 to 1 and 1 to 4 become 3 to 1 and 1 to 2.
    soft = soft_targets(logits_of(0.9, 0.1), distill_temperature=2)
    assert torch.allclose(soft.log_probs.exp(), logits_of(0.75, 0.25).exp())
    found, _ = soft_loss(logits_of(0.2, 0.8), torch.zeros(1).long(), soft)
    by_hand = 0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3 / 2)
    assert float(found) == pytest.approx(2**2 * by_hand)


@pytest.mark.parametrize("temperature", [0.5, 1, 4])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_it_equals_the_divergence_of_torch(divergence, temperature):
    student, teacher = both()
    soft = soft_targets(teacher, distill_temperature=temperature)
    found, count = soft_loss(student, TARGETS, soft, divergence=divergence)
    logs = [F.log_softmax(one[COUNTS] / temperature, dim=-1) for one in (student, teacher)]
    if divergence == "reverse":
        logs.reverse()
    # kl_div(input, target) is KL(target || input).
    expected = F.kl_div(*logs, reduction="sum", log_target=True) * temperature**2
    assert torch.allclose(found, expected, rtol=1e-12)
    assert count == 4


def test_the_divergence_is_the_cross_entropy_less_the_entropy_so_its_gradient_is_the_same():
    student, teacher = both()
    student.requires_grad_()
    soft = soft_targets(teacher, distill_temperature=3)
    (mine,) = torch.autograd.grad(soft_loss(student, TARGETS, soft)[0], student)
    probs = F.softmax(teacher / 3, dim=-1)[COUNTS]
    cross = -(probs * F.log_softmax(student[COUNTS] / 3, dim=-1)).sum() * 3**2
    assert torch.allclose(mine, torch.autograd.grad(cross, student)[0], atol=1e-12)


def gradient(student, teacher, temperature):
    student = student.clone().requires_grad_()
    soft = soft_targets(teacher, distill_temperature=temperature)
    return torch.autograd.grad(soft_loss(student, TARGETS, soft)[0], student)[0]


def test_with_a_large_temperature_the_gradient_is_that_of_matching_logits():
    student, teacher = both()
    distance = student - teacher
    limit = (distance - distance.mean(dim=-1, keepdim=True)) / VOCAB
    limit[~COUNTS] = 0
    errors = [float((gradient(student, teacher, t) - limit).abs().max()) for t in (1e3, 1e4)]
    assert errors[0] < 0.02
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.05)  # what is left falls as 1 / T


def test_without_the_factor_the_gradient_shrinks_as_the_square_of_the_temperature():
    student, teacher = both()
    norms = {t: float(gradient(student, teacher, t).norm()) for t in (1, 50, 100)}
    bare = {t: norm / t**2 for t, norm in norms.items()}
    assert bare[50] / bare[100] == pytest.approx(4, rel=0.03)
    assert norms[50] == pytest.approx(norms[100], rel=0.03)


def test_a_number_added_to_all_logits_changes_nothing():
    student, teacher = both()
    soft = soft_targets(teacher, distill_temperature=2)
    moved = soft_targets(teacher - 50, distill_temperature=2)
    first, second = soft_loss(student, TARGETS, soft)[0], soft_loss(student + 9, TARGETS, moved)[0]
    assert torch.allclose(first, second, rtol=1e-12)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_a_student_equal_to_its_teacher_has_neither_loss_nor_gradient(divergence):
    _, teacher = both()
    student = teacher.clone().requires_grad_()
    soft = soft_targets(teacher, distill_temperature=2)
    loss, _ = soft_loss(student, TARGETS, soft, divergence=divergence)
    assert abs(loss.item()) < 1e-14
    assert float(torch.autograd.grad(loss, student)[0].abs().max()) < 1e-14


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
@pytest.mark.parametrize("top_k", [VOCAB, VOCAB - 1, None])
def test_all_tokens_or_all_but_one_give_the_whole_divergence_and_its_gradient(top_k, divergence):
    student, teacher = both()
    student.requires_grad_()
    results = []
    for kept in (None, top_k):
        soft = soft_targets(teacher, distill_temperature=2, top_k=kept)
        loss, _ = soft_loss(student, TARGETS, soft, divergence=divergence)
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-12)


def test_the_fewer_tokens_are_kept_the_less_of_the_divergence_is_seen():
    student, teacher = both()
    seen = []
    for top_k in range(1, VOCAB + 1):
        soft = soft_targets(teacher, distill_temperature=2, top_k=top_k)
        total = soft.log_probs.exp().sum(dim=-1)
        if soft.log_rest is not None:
            total = total + soft.log_rest.exp()
        assert torch.allclose(total, torch.ones(ROWS, dtype=torch.float64))
        seen.append(float(soft_loss(student, TARGETS, soft)[0]))
    assert all(0 <= fewer <= more + 1e-12 for fewer, more in zip(seen, seen[1:]))
    assert seen[0] < 0.9 * seen[-1]


def test_positions_that_do_not_count_add_nothing_whatever_stands_there():
    student, teacher = both()
    student[~COUNTS] = math.nan
    student.requires_grad_()
    soft = soft_targets(teacher, distill_temperature=2)
    loss, count = distillation_loss(student, TARGETS, soft, soft_weight=1.0)
    (grad,) = torch.autograd.grad(loss, student)
    assert count == 4
    assert bool(loss.isfinite())
    assert bool(grad.isfinite().all())
    assert not bool(grad[~COUNTS].any())


def test_a_batch_in_which_nothing_counts_adds_zero_to_both():
    student, teacher = both()
    soft = soft_targets(teacher, distill_temperature=2, top_k=3)
    nothing = torch.full(ROWS, IGNORE)
    for loss, count in (
        distillation_loss(student, nothing, soft, soft_weight=0.5),
        smoothed_loss(student, nothing, smoothing=0.1),
    ):
        assert (float(loss), count) == (0, 0)


def test_both_terms_are_weighed():
    student, teacher = both()
    soft = soft_targets(teacher, distill_temperature=2)
    terms = soft_loss(student, TARGETS, soft)[0], token_loss(student, TARGETS)[0]
    for weight in (0, 0.3, 1):
        found, _ = distillation_loss(student, TARGETS, soft, soft_weight=weight)
        assert torch.allclose(found, weight * terms[0] + (1 - weight) * terms[1], rtol=1e-14)


@pytest.mark.parametrize("smoothing", [0, 0.1, 0.9])
def test_label_smoothing_equals_that_of_torch(smoothing):
    student, _ = both()
    found, count = smoothed_loss(student, TARGETS, smoothing=smoothing)
    expected = F.cross_entropy(
        student.flatten(0, 1), TARGETS.flatten(), label_smoothing=smoothing, reduction="sum"
    )
    assert torch.allclose(found, expected, rtol=1e-12)
    assert count == 4


def test_half_precision_is_added_up_in_32_bits():
    student, teacher = (one.bfloat16() for one in both())
    soft = soft_targets(teacher, distill_temperature=2)
    found, _ = distillation_loss(student, TARGETS, soft, soft_weight=0.5)
    wide = soft_targets(teacher.float(), distill_temperature=2)
    expected, _ = distillation_loss(student.float(), TARGETS, wide, soft_weight=0.5)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("temperature", [0, -1, math.nan, math.inf, "2", None, True])
def test_a_temperature_that_no_logit_can_be_divided_by_is_refused(temperature):
    with pytest.raises(InputError, match="distill_temperature, a number above 0"):
        soft_targets(both()[1], distill_temperature=temperature)


@pytest.mark.parametrize(
    ("temperature", "limit"), [(1e-40, 0.001), (10_001, 10_000), (1e200, 10_000)]
)
def test_a_temperature_that_leaves_only_rounding_is_refused_with_the_limit(temperature, limit):
    with pytest.raises(InputError, match=f"give {limit}, which is the limit"):
        soft_targets(both()[1], distill_temperature=temperature)
    soft_targets(both()[1], distill_temperature=limit)


@pytest.mark.parametrize("weight", [-0.1, 1.1, math.nan, "half"])
def test_weights_and_smoothings_outside_0_to_1_are_refused(weight):
    student, teacher = both()
    soft = soft_targets(teacher, distill_temperature=2)
    with pytest.raises(InputError, match="soft_weight"):
        distillation_loss(student, TARGETS, soft, soft_weight=weight)
    with pytest.raises(InputError, match="smoothing"):
        smoothed_loss(student, TARGETS, smoothing=weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_teacher_that_is_not_finite_is_refused_with_the_place(bad):
    _, teacher = both()
    teacher[1, 2, 3] = bad
    with pytest.raises(InputError, match=r"teacher_logits\[1, 2, 3\] = -?(nan|inf) \(1 such"):
        soft_targets(teacher, distill_temperature=2)


@pytest.mark.parametrize("top_k", [0, VOCAB + 1, 1.5])
def test_more_tokens_than_there_are_cannot_be_kept(top_k):
    with pytest.raises(InputError, match="top_k"):
        soft_targets(both()[1], distill_temperature=2, top_k=top_k)


@pytest.mark.parametrize("top_k", [None, 3, VOCAB])
def test_another_vocabulary_is_refused_with_both_sizes(top_k):
    student, teacher = both()
    soft = soft_targets(teacher, distill_temperature=2, top_k=top_k)
    narrow = student[..., :2]
    with pytest.raises(InputError, match="one vocabulary of student and teacher"):
        soft_loss(narrow, TARGETS.clamp(max=1), soft)


def test_other_positions_and_unknown_divergences_are_refused():
    student, teacher = both()
    soft = soft_targets(teacher, distill_temperature=2)
    with pytest.raises(InputError, match=r"positions \(2, 2\), \(2, 3\), \(2, 3\)"):
        soft_loss(student[:, :2], TARGETS, soft)
    with pytest.raises(InputError, match="forward, reverse"):
        soft_loss(student, TARGETS, soft, divergence="sideways")


def test_soft_targets_carry_no_gradient_to_the_teacher():
    _, teacher = both()
    soft = soft_targets(teacher.requires_grad_(), distill_temperature=2, top_k=3)
    assert isinstance(soft, SoftTargets)
    assert not any(one.requires_grad for one in soft[1:])
