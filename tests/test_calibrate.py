"""The costs of messages: fitted so that a few odd measurements do no harm, kept whole or not."""

import json
import math
import socket
from dataclasses import asdict, replace

import pytest
from click.testing import CliRunner

from slimlab.cli import main
from slimlab.comm import calibrate as module
from slimlab.comm.calibrate import (
    SIZES_BYTES,
    Fit,
    calibrate,
    calibration_path,
    fit_line,
    load_calibration,
    save_calibration,
)
from slimlab.config import InputError

SIZES = (8, 64, 512, 4096, 32768)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SLIMLAB_BATCH", "1")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMLAB_BATCH", "1")
        return calibrate("threads", rounds=1)


def test_a_line_is_found_again():
    seconds = [3e-5 + 2e-9 * n for n in SIZES]
    fit = fit_line(SIZES, seconds)
    assert fit.alpha_s == pytest.approx(3e-5)
    assert fit.beta_s_per_byte == pytest.approx(2e-9)
    assert fit.band == pytest.approx((1.0, 1.0))
    assert fit.predicted_s(1000) == pytest.approx(3.2e-5)


def test_one_measurement_that_was_disturbed_moves_no_line_but_the_band():
    seconds = [3e-5 + 2e-9 * n for n in SIZES]
    seconds[2] *= 50
    fit = fit_line(SIZES, seconds)
    assert (fit.alpha_s, fit.beta_s_per_byte) == pytest.approx((3e-5, 2e-9))
    assert fit.band == pytest.approx((1.0, 50.0))


def test_short_messages_count_as_much_as_long_ones():
    # Least squares of the seconds would give an alpha of about 1 ms, the long ones' error.
    seconds = [1e-6, 1e-6, 1e-6, 1e-3, 2.5e-3]
    fit = fit_line((1, 2, 4, 2**20, 2**21), seconds)
    assert fit.alpha_s == pytest.approx(1e-6, rel=0.05)


@pytest.mark.parametrize("seconds", [[5e-6, 4e-6, 3e-6], [1e-9, 1e-7, 1e-3]])
def test_neither_alpha_nor_beta_is_negative(seconds):
    fit = fit_line((8, 800, 80_000), seconds)
    assert fit.alpha_s >= 0
    assert fit.beta_s_per_byte >= 0
    assert 0 < fit.band[0] <= 1 <= fit.band[1]


def test_the_best_line_is_better_than_its_neighbours():
    sizes, seconds = (8, 100, 1000, 9000), (2.0, 3.0, 4.0, 20.0)
    fit = fit_line(sizes, seconds)

    def error(alpha, beta):
        return sum(abs(alpha + beta * n - s) / s for n, s in zip(sizes, seconds))

    least = error(fit.alpha_s, fit.beta_s_per_byte)
    for alpha in (0.9, 0.99, 1.0, 1.01, 1.1):
        for beta in (0.9, 0.99, 1.0, 1.01, 1.1):
            assert error(alpha * fit.alpha_s, beta * fit.beta_s_per_byte) >= least - 1e-12


@pytest.mark.parametrize(
    ("sizes", "seconds"), [((8,), (1.0,)), ((8, 8), (1.0, 2.0)), ((8, 9), (1.0,)), ((8, 9), (0, 1))]
)
def test_what_no_line_passes_through_is_refused(sizes, seconds):
    with pytest.raises(InputError, match="fit_line"):
        fit_line(sizes, seconds)


def test_a_calibration_holds_all_that_a_prediction_needs(measured):
    assert measured.backend == "threads"
    assert measured.sizes_bytes == SIZES_BYTES
    assert len(measured.seconds) == len(SIZES_BYTES)
    assert min(measured.seconds) > 0
    assert measured.alpha_s > 0
    assert measured.gamma_s_per_byte > 0
    for low, high in (measured.band, measured.exchange.band, measured.combine_band):
        assert 0 < low <= 1 <= high < math.inf
    assert measured.machine["host"] == socket.gethostname()
    assert measured.library.startswith("threads of Python")
    assert set(measured.versions) == {"python", "torch", "slimlab"}
    assert measured.date.endswith("+00:00")


def test_processes_are_calibrated_too():
    found = calibrate("gloo", rounds=1)
    assert found.library.startswith("gloo of torch")
    assert found.alpha_s > 0


def test_what_was_kept_is_loaded_again_and_nothing_else_lies_there(measured, cache):
    assert load_calibration("threads") is None
    path = save_calibration(measured)
    assert load_calibration("threads") == measured
    assert load_calibration("gloo") is None
    assert list((cache / "calibration").iterdir()) == [path]
    newer = replace(measured, alpha_s=1.0)
    assert save_calibration(newer) == path
    assert load_calibration("threads") == newer
    assert isinstance(load_calibration("threads").exchange, Fit)


def test_machines_that_share_a_cache_keep_their_own(measured, monkeypatch):
    save_calibration(measured)
    monkeypatch.setattr(socket, "gethostname", lambda: "node/7")
    assert load_calibration("threads") is None
    assert calibration_path("threads").name == "threads-node_7.json"


@pytest.mark.parametrize(
    "damage",
    [
        lambda kept: "{",
        lambda kept: "[]",
        lambda kept: json.dumps({"alpha_s": 1.0}),
        lambda kept: json.dumps(kept | {"backend": "gloo"}),
        lambda kept: json.dumps(kept | {"alpha_s": -1.0}),
        lambda kept: json.dumps(kept | {"alpha_s": "fast"}),
        lambda kept: json.dumps(kept | {"exchange": None}),
        lambda kept: json.dumps(kept | {"band": 3}),
        lambda kept: json.dumps(kept | {"another": 3}),
    ],
)
def test_a_file_that_is_damaged_is_as_good_as_none(measured, damage):
    path = save_calibration(measured)
    path.write_text(damage(asdict(measured)))
    assert load_calibration("threads") is None


def test_a_cache_that_cannot_be_written_is_refused(measured, cache):
    cache.write_text("a file where a folder should be")
    with pytest.raises(InputError, match="can be written"):
        save_calibration(measured)


@pytest.mark.parametrize("rounds", [0, 1.5, True])
def test_rounds_are_a_whole_number(rounds):
    with pytest.raises(InputError, match="rounds"):
        calibrate("threads", rounds=rounds)


def test_a_bar_shows_the_rounds_unless_outputs_are_kept(monkeypatch, capsys):
    found = {name: [1e-5 + 1e-9 * n for n in SIZES_BYTES] for name in ("messages_s", "exchanges_s")}
    found |= {"combined_s": [1e-9 * n for n in module.COMBINED_BYTES], "library": "none"}
    monkeypatch.setattr(module, "run_ranks", lambda *_, **__: [found])
    calibrate("threads", rounds=2)
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("SLIMLAB_BATCH")
    calibrate("threads", rounds=2)
    assert "calibrating threads: 100%" in capsys.readouterr().err


def test_the_command_measures_keeps_and_shows(monkeypatch, measured):
    monkeypatch.setattr(module, "calibrate", lambda backend, rounds: measured)
    result = CliRunner().invoke(main, ["calibrate", "--backend", "threads"])
    assert result.exit_code == 0, result.output
    for words in ("message", "exchange", "addition", "measured / line", "kept in"):
        assert words in result.output
    assert load_calibration("threads") == measured
    result = CliRunner().invoke(main, ["calibrate", "--backend", "threads", "--json"])
    (found,) = json.loads(result.stdout)
    assert found["alpha_s"] == measured.alpha_s
    assert found["file"] == str(calibration_path("threads"))


def test_backends_that_the_machine_lacks_are_left_out_and_said(monkeypatch, measured):
    def why_not(backend, world_size):
        return None if backend == "threads" else f"no {backend} here"

    monkeypatch.setattr("slimlab.comm.launch.why_not", why_not)
    monkeypatch.setattr(module, "calibrate", lambda backend, rounds: measured)
    result = CliRunner().invoke(main, ["calibrate", "--json"])
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)) == 1
    assert "mpi is left out: no mpi here" in result.stderr


def test_a_backend_that_was_asked_for_and_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr("slimlab.comm.launch.why_not", lambda *_: "no GPU")
    result = CliRunner().invoke(main, ["calibrate", "--backend", "nccl"])
    assert result.exit_code == 2
    assert "no GPU" in result.output
