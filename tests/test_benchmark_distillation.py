"""The arms of the distillation benchmark are the library's losses, and are compared by seed."""

import pytest
import torch

from benchmarks import distillation
from slimlab.config import ModelConfig
from slimlab.model.build import build_model
from slimlab.slim.distill import DistillationObjective, smoothed_objective
from slimlab.slim.evidence import mean_interval, stored_evidence
from slimlab.train.objectives import causal_objective

SIZES = ModelConfig(vocab_size=11, seq_len=6, d_model=8, num_layers=1, num_heads=2)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return [build_model(SIZES).double() for _ in range(2)]


@pytest.fixture
def batch():
    ids = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def loss_of(student, teacher, batch, name):
    logits = teacher(batch[0]).detach()
    given = (*batch, logits) if "distill_temperature" in distillation.ARMS[name] else batch
    return distillation.arm_objective(student, given, distillation.ARMS[name])


@pytest.mark.parametrize("name", ["distilled", "distilled, T 2", "distilled, T 8, w 0.5"])
def test_a_distilled_arm_is_the_library_objective(pair, batch, name):
    student, teacher = pair
    arm = distillation.ARMS[name]
    objective = DistillationObjective(
        teacher,
        distill_temperature=arm["distill_temperature"],
        soft_weight=arm["soft_weight"],
    )
    loss, count = loss_of(student, teacher, batch, name)
    right, right_count = objective(student, batch)
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=0)  # the arm's logits become 32 bits
    assert count == right_count == 18


def test_the_arms_without_a_teacher_are_cross_entropy_and_smoothing(pair, batch):
    student, teacher = pair
    torch.testing.assert_close(
        loss_of(student, teacher, batch, "alone")[0], causal_objective(student, batch)[0]
    )
    torch.testing.assert_close(
        loss_of(student, teacher, batch, "smoothed")[0],
        smoothed_objective(student, batch, smoothing=0.1)[0],
    )


def test_without_t_squared_the_teacher_counts_a_sixty_fourth(pair, batch):
    student, teacher = pair
    hard, _ = loss_of(student, teacher, batch, "alone")
    right, _ = loss_of(student, teacher, batch, "distilled, T 8, w 0.5")
    wrong, _ = loss_of(student, teacher, batch, "distilled, T 8, w 0.5, no T squared")
    torch.testing.assert_close(wrong - hard / 2, (right - hard / 2) / 64, rtol=1e-4, atol=1e-9)


def test_all_arms_of_a_seed_read_the_same_windows():
    windows = distillation.side_by_side(torch.arange(65), 4)
    assert torch.equal(windows[1], windows[0] + 1)
    config = distillation.training_of(distillation.SETTING, {"seed": 3})
    logits = torch.arange(16.0)[:, None]
    alone = distillation._batch_at(windows, None, config, 5)
    taught = distillation._batch_at(windows, logits, config, 5)
    assert all(torch.equal(one, other) for one, other in zip(alone, taught))
    assert torch.equal(taught[2][:, 0] * 4, taught[0][:, 0].float())


def test_arms_are_compared_within_a_seed():
    rows = [("alone", 0, 5.0), ("alone", 1, 7.0), ("distilled", 1, 6.5), ("distilled", 0, 4.0)]
    runs = [{"arm": arm, "seed": seed, "held_out_loss": loss} for arm, seed, loss in rows]
    mean, half, lower = distillation.compare({"runs": runs}, "distilled", "alone")
    assert (mean, half) == mean_interval([-1.0, -0.5])
    assert lower == 2


def test_the_stored_setting_and_arms_are_those_of_the_program():
    stored = stored_evidence("distillation")
    assert stored["setting"] == distillation.SETTING
    assert stored["arms"] == distillation.ARMS
