"""Rates, bounds and utilisation, with a clock that the tests set."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slimlab.config import InputError
from slimlab.train import machine
from slimlab.train.machine import (
    Machine,
    copy_bytes_per_s,
    matmul_flop_per_s,
    measure_machine,
    median_duration_s,
    mfu,
    roofline,
)

KNOWN = Machine("cpu", "float32", 2, {256: 50e9, 512: 80e9, 1024: 75e9}, 10e9)


def set_clock(monkeypatch, durations_s):
    """Let the calls take these times, one after the other; the clock is read before and after."""
    readings, now = [], 0.0
    for duration_s in durations_s:
        readings += [now, now + duration_s]
        now += duration_s + 100  # time between calls must not count
    clock = SimpleNamespace(perf_counter=iter(readings).__next__)
    monkeypatch.setattr(machine, "time", clock)


def test_the_median_counts_and_the_first_call_does_not(monkeypatch):
    set_clock(monkeypatch, [50, 3, 1, 9, 2, 8])
    calls = []
    assert median_duration_s(lambda: calls.append(1), repeats=5) == 3
    assert len(calls) == 6


def test_rates_are_work_over_time(monkeypatch):
    set_clock(monkeypatch, [7, 0.5, 0.5, 0.5])
    assert matmul_flop_per_s(16, repeats=3) == 2 * 16**3 / 0.5
    set_clock(monkeypatch, [7, 0.25])
    # Every byte is read once and written once.
    assert copy_bytes_per_s(1000, repeats=1) == 2 * 1000 / 0.25


def test_what_is_timed_is_what_is_counted(monkeypatch):
    monkeypatch.setattr(machine, "median_duration_s", lambda function, *_: function() is None or 1)
    with FlopCounterMode(display=False) as counter:
        rate = matmul_flop_per_s(24)
    assert rate == counter.get_total_flops() == 2 * 24**3


def test_a_machine_is_measured_in_the_kind_of_number_asked_for():
    found = measure_machine(sizes=(16, 24), num_bytes=4096, repeats=1, dtype=torch.bfloat16)
    assert (found.device, found.dtype) == ("cpu", "bfloat16")
    assert found.num_threads == torch.get_num_threads()
    assert set(found.rates_flop_per_s) == {16, 24}
    assert found.peak_flop_per_s == max(found.rates_flop_per_s.values())
    assert found.bandwidth_bytes_per_s > 0


def test_the_longer_of_both_times_bounds_from_below():
    assert KNOWN.peak_flop_per_s == 80e9
    assert KNOWN.ridge_flop_per_byte == 8
    assert roofline(160e9, 10e9, KNOWN) == 2  # 16 FLOP per byte: arithmetic is the limit
    assert roofline(160e9, 40e9, KNOWN) == 4  # 4 FLOP per byte: memory is
    assert roofline(8e9, 1e9, KNOWN) == 8e9 / 80e9 == 1e9 / 10e9  # at the ridge both are
    assert roofline(0, 5e9, KNOWN) == 0.5


def test_utilisation_is_the_share_of_the_peak():
    assert mfu(240e9, 6.0, 80e9) == 0.5


def test_the_published_utilisation_of_palm_follows():
    # Chowdhery et al. 2022, appendix B: 540 billion parameters, 118 layers, 48 heads of 256
    # features, 2048 tokens; 238.3 thousand tokens per second on 6144 chips of 275 TFLOP/s: 46.2 %.
    flop_per_token = 6 * 540.35e9 + 12 * 118 * 48 * 256 * 2048
    assert mfu(238.3e3 * flop_per_token, 1.0, 6144 * 275e12) == pytest.approx(0.462, abs=5e-4)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: measure_machine(sizes=()),
        lambda: measure_machine(sizes=(0,)),
        lambda: measure_machine("abacus"),
        lambda: copy_bytes_per_s(1.5),
        lambda: median_duration_s(lambda: None, repeats=0),
        lambda: roofline(-1.0, 1.0, KNOWN),
        lambda: roofline(1.0, float("nan"), KNOWN),
        lambda: mfu(1e9, 0.0, 1e9),
        lambda: mfu(1e9, 1.0, float("inf")),
    ],
)
def test_bad_input_is_refused(bad):
    with pytest.raises(InputError, match="given"):
        bad()
