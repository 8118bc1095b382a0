"""Stored runs are found by name, and their means come with the interval that Student gives."""

import math

import pytest

from slimlab.config import InputError
from slimlab.slim.evidence import mean_interval, stored_evidence


def test_the_interval_is_students():
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    # stdev sqrt(2.5), over sqrt(5), times 2.776 for four degrees of freedom
    assert half == pytest.approx(2.776 * math.sqrt(0.5), rel=1e-12)


def test_the_interval_shrinks_by_more_than_the_root_of_the_count():
    _, two = mean_interval([0.0, 1.0])
    assert two == pytest.approx(12.706 / 2, rel=1e-12)
    _, eight = mean_interval([0.0, 1.0] * 4)
    assert eight < two / 2


def test_one_value_has_no_interval():
    with pytest.raises(InputError, match="more seeds"):
        mean_interval([1.0])


def test_unknown_evidence_names_what_there_is():
    with pytest.raises(InputError, match="distillation"):
        stored_evidence("distilation")


def test_every_run_of_distillation_came_after_its_setting_was_fixed():
    found = stored_evidence("distillation")
    assert found["runs"]
    assert all(row["at"] > found["setting_fixed"] for row in found["runs"])
    assert {row["seed"] for row in found["runs"]} <= set(found["setting"]["seeds"])
    arms = found["arms"] | found["arms_later"]
    assert {row["arm"] for row in found["runs"]} == set(arms)
    for arm in arms:
        seeds = [row["seed"] for row in found["runs"] if row["arm"] == arm]
        assert sorted(seeds) == found["setting"]["seeds"]
