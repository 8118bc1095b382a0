"""The demos: right on every runtime and under every launcher, and honest when something differs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from comm_runtimes import MPIRUN, started_by, why_not

from slimlab.cli import main
from slimlab.comm.calibrate import Calibration, Fit, save_calibration
from slimlab.commands.communication import DEMOS, line_about
from slimlab.demos import collectives as collectives_demo
from slimlab.demos import (
    common,
    data_parallel,
    dialled_network,
    hello,
    hybrid,
    ping_pong,
    pipeline,
    ring_all_reduce,
    slim,
    tensor_parallel,
    zero,
)
from slimlab.demos.common import load_demo
from slimlab.demos.measure import num_wrong, spread_text
from slimlab.demos.report import Report, short, size_text, time_text
from slimlab.demos.training import Run
from slimlab.demos.training_checks import largest_errors

ROOT = Path(__file__).resolve().parents[1]
# Short, and without a limit on seconds where they are measured.
SMALL = {
    "hello": [],
    "ping_pong": ["--max-bytes", "4096", "--trips", "2"],
    "ring_all_reduce": ["--elements", "11", "--repeats", "1"],
    "collectives": ["--elements", "7"],
    "dialled_network": ["--elements", "50", "--repeats", "1", "--slack", "1e6"],
    "data_parallel": ["--batch", "3"],
    "zero": ["--batch", "3"],
    "tensor_parallel": ["--batch", "2"],
    "pipeline": ["--batch", "3", "--micro-batches", "2", "--schedule", "zb_v"],
    "hybrid": ["--batch", "4"],
    "slim": ["--batch", "3"],
}
LEAST = {"ping_pong": 2}
TRAINING = {
    "data_parallel": data_parallel,
    "zero": zero,
    "tensor_parallel": tensor_parallel,
    "pipeline": pipeline,
    "hybrid": hybrid,
    "slim": slim,
}
LAUNCHERS = {
    "mpirun": [str(MPIRUN["mpich"]), "-n", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMLAB_CACHE", str(tmp_path / "cache"))


def invoke(name, *arguments):
    return CliRunner().invoke(load_demo(name), [*SMALL[name], *map(str, arguments)])


def last_line(output):
    return json.loads(output.splitlines()[-1])


def test_there_is_a_demo_for_every_module_and_a_name_for_every_demo():
    folder = ROOT / "slimlab" / "demos"
    helpers = {"__init__", "common", "measure", "report", "training", "training_checks"}
    helpers |= {"slim_checks"}
    assert {path.stem for path in folder.glob("*.py")} - helpers == set(DEMOS)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", DEMOS)
def test_every_demo_agrees_with_its_prediction_on_threads(name, world_size):
    result = invoke(name, "--ranks", world_size, "--json")
    if world_size < LEAST.get(name, 1):
        assert result.exit_code == 2
        assert "at least 2 ranks" in result.output
        return
    assert result.exit_code == 0, result.output
    found = last_line(result.output)
    assert (found["demo"], found["backend"]) == (name, "threads")
    assert (found["world_size"], found["agrees"]) == (world_size, True)
    assert len(found["checks"]) >= 4
    assert all(check["agrees"] for check in found["checks"])


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
@pytest.mark.parametrize("name", DEMOS)
def test_every_demo_agrees_with_its_prediction_on_processes(name, runtime):
    if reason := why_not(runtime):
        pytest.skip(reason)
    with started_by(runtime) as backend:
        result = invoke(name, "--ranks", 2, "--backend", backend, "--json")
    assert result.exit_code == 0, result.output
    found = last_line(result.output)
    assert (found["backend"], found["world_size"]) == (backend, 2)
    assert found["agrees"]


def launch(launcher, *program):
    """Start two processes of `program` and return what they printed."""
    if launcher == "mpirun" and (reason := why_not("mpich")):
        pytest.skip(reason)
    result = subprocess.run(
        [*LAUNCHERS[launcher], *program],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def check_launched(name, launcher, printed):
    lines = printed.splitlines()
    assert sum(line.startswith(f"{name}: 2 ranks") for line in lines) == 1
    found = last_line(printed)
    assert found["backend"] == {"mpirun": "mpi", "torchrun": "gloo"}[launcher]
    assert (found["demo"], found["world_size"], found["agrees"]) == (name, 2, True)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_demo_runs_unchanged_under_a_launcher(launcher):
    printed = launch(launcher, "-m", "slimlab.demos.hello", "--ranks", "2", "--json")
    check_launched("hello", launcher, printed)


# Each start of processes takes seconds, so one start runs several; and all demos start in the same
# way: not all pairs.
@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ("mpirun", ["ring_all_reduce", "tensor_parallel", "hybrid"]),
        ("torchrun", ["data_parallel", "zero", "pipeline", "slim"]),
    ],
)
def test_demos_run_one_after_another_under_a_launcher(launcher, names):
    chosen = {name: [*SMALL[name], "--ranks", "2", "--json"] for name in names}
    printed = launch(launcher, "tests/demo_runs.py", json.dumps(chosen))
    for name in names:
        check_launched(name, launcher, of_demo(name, printed))


def of_demo(name, printed):
    """Return the lines of one demo: a heading, a report, a line of JSON."""
    lines = printed.splitlines()
    first = [k for k, line in enumerate(lines) if line.startswith(f"{name}: ")]
    last = [k for k, line in enumerate(lines) if line.startswith(f'{{"demo": "{name}"')]
    assert len(first) == len(last) == 1, printed
    return "\n".join(lines[first[0] : last[0] + 1])


def more_traffic(real):
    return lambda algorithm, world_size, num_elements, item_bytes, **options: real(
        algorithm, world_size, num_elements + 2 * world_size, item_bytes, **options
    )


SABOTAGE = {
    "hello": (hello, "greeting_bytes", lambda real: lambda world_size: [9] * world_size),
    "ping_pong": (ping_pong, "predicted_traffic", lambda real: lambda sizes, trips: (1, 2)),
    "ring_all_reduce": (ring_all_reduce, "messages_of", more_traffic),
    "collectives": (collectives_demo, "messages_of", more_traffic),
    "dialled_network": (dialled_network, "alpha_beta_s", lambda real: lambda *_: 1.0),
    "data_parallel": (data_parallel, "num_params", lambda real: lambda config: real(config) + 1),
    "zero": (zero, "predict_broadcast", lambda real: lambda *_: ()),
    "tensor_parallel": (tensor_parallel, "predict_start", lambda real: lambda *_: ()),
    "pipeline": (pipeline, "peak_activations", lambda real: lambda plan: [7] * plan.num_stages),
    "hybrid": (hybrid, "stage_shapes", lambda real: lambda *args: {"lm_head.weight": (3, 5)}),
    "slim": (slim, "predict_start", lambda real: lambda *_: ()),
}


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_whose_prediction_is_wrong_ends_with_exit_code_1(name, monkeypatch):
    module, attribute, wrong = SABOTAGE[name]
    monkeypatch.setattr(module, attribute, wrong(getattr(module, attribute)))
    result = invoke(name, "--ranks", 2, "--json")
    assert result.exit_code == 1, result.output
    assert "DISAGREE" in result.output
    found = last_line(result.output)
    assert found["agrees"] is False
    assert not all(check["agrees"] for check in found["checks"])


def test_a_demo_whose_result_is_wrong_on_one_rank_ends_with_exit_code_1(monkeypatch):
    real = ring_all_reduce.ring_all_reduce

    def wrong(comm, tensor, **options):
        total = real(comm, tensor, **options)
        return total + 1 if comm.rank == 1 else total

    monkeypatch.setattr(ring_all_reduce, "ring_all_reduce", wrong)
    result = invoke("ring_all_reduce", "--ranks", 3, "--json")
    assert result.exit_code == 1
    unlike = last_line(result.output)["checks"][0]
    assert unlike["measured"] == [0, 11, 0]


@pytest.mark.parametrize("name", TRAINING)
def test_a_run_unlike_that_of_one_process_ends_with_exit_code_1(name, monkeypatch):
    real = TRAINING[name].train_alone

    def other(*args):
        run = real(*args)
        first = next(iter(run.weights))
        run.weights[first] = run.weights[first] * (1 + 1e-9)
        return run

    monkeypatch.setattr(TRAINING[name], "train_alone", other)
    result = invoke(name, "--ranks", 2, "--json")
    assert result.exit_code == 1
    wrong = [one["what"] for one in last_line(result.output)["checks"] if not one["agrees"]]
    assert wrong
    assert all(what.endswith("error of weights") for what in wrong)


@pytest.mark.parametrize("name", TRAINING)
def test_a_timeline_has_the_calls_of_every_rank(name, tmp_path):
    path = tmp_path / "steps.json"
    result = invoke(name, "--ranks", 2, "--timeline", path, "--json")
    assert result.exit_code == 0, result.output
    assert last_line(result.output)["timeline"] == str(path)
    bars = [one for one in json.loads(path.read_text())["traceEvents"] if one["ph"] == "X"]
    assert {bar["pid"] for bar in bars} == {0, 1}
    assert "all_reduce" in {bar["name"] for bar in bars}
    assert len(bars) > 6


def test_a_timeline_can_be_a_figure(tmp_path):
    path = tmp_path / "steps.svg"
    assert invoke("data_parallel", "--ranks", 2, "--timeline", path).exit_code == 0
    assert "</svg>" in path.read_text()


def test_every_schedule_agrees_with_its_simulation():
    result = invoke("pipeline", "--ranks", 3, "--schedule", "all", "--json")
    assert result.exit_code == 0, result.output
    assert len(last_line(result.output)["checks"]) == 6 * 7


def test_a_step_of_a_pipeline_is_drawn_beside_the_ideal_one(tmp_path):
    path = tmp_path / "step.svg"
    arguments = ("--schedule", "1f1b", "--ranks", 2, "--timeline", path)
    assert invoke("pipeline", *arguments).exit_code == 0
    text = path.read_text()
    assert "measured" in text
    assert "ideal" in text


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("hybrid", ["--layout", "2x1x1"], "data 2 x pipeline 1 x tensor 1 = 2"),
        ("hybrid", ["--layout", "1x4x1"], "2 layers, 4 stages"),
        ("hybrid", ["--layout", "4x1"], "give --layout 2x1x2"),
        ("hybrid", ["--layout", "4x1x1", "--batch", "6"], "batch_size = 6, data = 4"),
        ("pipeline", ["--micro-batches", "4"], "give --micro-batches 3, or --batch 4"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_before_any_rank_starts(name, arguments, words):
    result = invoke(name, "--ranks", 4, *arguments)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.parametrize("path", ["no/such/folder.json", "steps"])
def test_a_timeline_that_cannot_be_written_is_refused_before_anything_starts(path):
    result = invoke("data_parallel", "--timeline", path)
    assert result.exit_code == 2
    assert path in result.output


def test_errors_that_are_no_numbers_are_not_small():
    true = Run([1.0], [{"w": torch.ones(2)}], {"w": torch.ones(2)})
    assert largest_errors(true, true) == [0.0, 0.0, 0.0]
    bad = Run([float("nan")], [{"w": torch.tensor([1.0, float("nan")])}], {"w": torch.zeros(2)})
    losses, gradients, weights = largest_errors(bad, true)
    assert losses != losses
    assert gradients != gradients
    assert weights == 1.0


def test_ranks_that_do_not_divide_the_heads_are_refused_before_any_starts(monkeypatch):
    result = invoke("tensor_parallel", "--ranks", 5)
    assert result.exit_code == 2
    assert "choose world_size from 1, 2, 3, 4, 6, 12" in result.output
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "3")
    result = invoke("tensor_parallel", "--size", "book")
    assert result.exit_code == 2
    assert "world_size = 3, num_heads = 4" in result.output


def test_sequence_parallelism_agrees_too():
    result = invoke("tensor_parallel", "--ranks", 2, "--sequence-parallel", "--json")
    assert result.exit_code == 0, result.output
    assert "calls of reduce_scatter" in result.output


@pytest.mark.parametrize(
    ("environment", "arguments", "given"),
    [
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["--ranks", "3"], "has started 2"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, ["--ranks", "2"], "started 4"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, ["--backend", "gloo"], "connects ranks by mpi"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["--ranks", "4"], "torchrun has started 2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["--backend", "threads"], "by gloo or nccl"),
    ],
)
def test_other_ranks_than_the_launcher_started_are_refused(
    environment, arguments, given, monkeypatch
):
    if "RANK" in environment:
        environment = environment | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = invoke("hello", *arguments)
    assert result.exit_code == 2
    assert given in result.output
    assert f"asked for: {' '.join(arguments)}" in result.output


def test_only_the_first_rank_says_why_it_is_refused(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(common, "LEAVE_LATER_S", 0.0)
    result = invoke("hello", "--ranks", 3)
    assert (result.exit_code, result.output) == (2, "")


@pytest.mark.parametrize(
    "arguments",
    [["--ranks", "0"], ["--ranks", "1000"], ["--timeout", "0"], ["--timeout", "nan"],
     ["--backend", "smoke"], ["--ranks", "two"]],
)  # fmt: skip
def test_bad_options_end_with_exit_code_2(arguments):
    assert invoke("hello", *arguments).exit_code == 2


def test_a_program_that_raises_ends_with_exit_code_1_and_its_rank(monkeypatch):
    def broken(world_size):
        raise RuntimeError("no prediction today")

    monkeypatch.setattr(hello, "greeting_bytes", broken)
    result = invoke("hello", "--ranks", 2)
    assert result.exit_code == 1
    assert "raised RuntimeError: no prediction today" in result.output


@pytest.mark.parametrize("name", DEMOS)
def test_help_has_a_command_line_for_every_launcher(name):
    result = CliRunner().invoke(main, ["demo", name, "--help"])
    assert result.exit_code == 0
    for line in (
        f"slimlab demo {name} ",
        f"mpirun -n {2 if name == 'ping_pong' else 4} python -m slimlab.demos.{name}",
        f"torchrun --nproc-per-node {2 if name == 'ping_pong' else 4} -m slimlab.demos.{name}",
    ):
        assert f"\n      {line}" in result.output
    assert max(map(len, result.output.splitlines())) <= 100


def test_every_option_of_a_demo_is_explained():
    for name in DEMOS:
        assert all(one.help for one in load_demo(name).params)


def test_demo_alone_lists_all_of_them_in_a_line_each():
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split()[0] for line in lines] == list(DEMOS)
    assert all(line_about(name) in line for name, line in zip(DEMOS, lines))
    assert max(map(len, lines)) <= 100


def test_an_unknown_demo_lists_those_there_are():
    result = CliRunner().invoke(main, ["demo", "farewell"])
    assert result.exit_code == 2
    assert all(name in result.output for name in DEMOS)


def test_slimlab_demo_passes_options_and_exit_code_on(monkeypatch):
    result = CliRunner().invoke(main, ["demo", "hello", "--ranks", "3", "--json"])
    assert (result.exit_code, last_line(result.output)["world_size"]) == (0, 3)
    monkeypatch.setattr(hello, "greeting_bytes", lambda world_size: [])
    assert CliRunner().invoke(main, ["demo", "hello"]).exit_code == 1
    assert CliRunner().invoke(main, ["demo", "ping_pong", "--ranks", "1"]).exit_code == 2


def test_seconds_are_predicted_once_the_machine_is_calibrated():
    assert "slimlab calibrate lets" in invoke("ring_all_reduce").output
    line = Fit(1e-3, 1e-9, (0.5, 2.0))
    save_calibration(
        Calibration(
            backend="threads", alpha_s=1e-3, beta_s_per_byte=1e-9, gamma_s_per_byte=0.0,
            band=(0.5, 2.0), exchange=line, combine_band=(1.0, 1.0), sizes_bytes=(8,),
            seconds=(1e-3,), library="threads", machine={"host": "here", "cores": 2},
            versions={}, date="2030-01-02T03:04:05+00:00",
        )
    )  # fmt: skip
    result = invoke("ring_all_reduce", "--ranks", 2, "--elements", 0, "--json")
    assert "kept on 2030-01-02" in result.output
    # Two steps of alpha, no bytes.
    assert "2 ms (1 ms to 4 ms)" in result.output
    assert last_line(result.output)["predicted_s"] == pytest.approx(2e-3)


def test_the_model_is_a_band_on_processes_and_a_number_on_threads():
    ring = ("ring_all_reduce",)
    low, high = dialled_network.band_of(1.0, ring, 4, None)
    assert low < 1.0 < high < 1.0 + 1e-8
    assert low > 1.0 - 1e-8
    doubling = ("recursive_doubling_all_reduce",)
    assert dialled_network.band_of(1.0, doubling, 3, None)[0] == 0.0
    low, high = dialled_network.band_of(1.0, ring, 4, 0.5)
    assert 0.99 < low < 1.0
    assert high > 1.5


def test_a_report_without_checks_does_not_agree():
    report = Report("none", "threads", 1)
    assert not report.agrees
    report.check("numbers", [1, 2], [1, 2])
    assert report.agrees
    report.check("words", "ring", "tree")
    assert not report.agrees
    assert "1 of 2 checks DISAGREE: words" in report.text()
    assert json.loads(report.json())["checks"][1]["measured"] == "tree"


def test_many_checks_are_shown_only_where_they_disagree():
    report = Report("many", "threads", 1)
    for number in range(20):
        report.check(f"number {number}", number, number if number != 7 else 8)
    assert "number 7  7" in report.text()
    assert "number 8" not in report.text()


def test_numbers_are_written_as_people_read_them():
    assert short([3, 3, 3]) == "3 on each rank"
    assert short([1, 2, 3, 4, 5]) == "1, 2, 3, 4, ..."
    assert (short([7]), short([]), short(12345), short("ring")) == ("7", "none", "12,345", "ring")
    assert [time_text(s) for s in (0, 1e-6, 9.996e-4, 0.25, 61.2)] == [
        "0 µs", "1 µs", "1 ms", "250 ms", "61.2 s",
    ]  # fmt: skip
    assert [size_text(n) for n in (8, 1024, 1025, 2**22)] == ["8 B", "1 KiB", "1,025 B", "4 MiB"]
    assert spread_text([1.0, 2.0, 3.0, 4.0, 100.0]) == "3 s (2 s to 4 s)"
    assert spread_text([0.5]) == "500 ms"


def test_every_element_of_a_tensor_of_another_shape_is_wrong():
    x = torch.arange(4.0)
    assert num_wrong(x, x.clone()) == 0
    assert num_wrong(x, torch.tensor([0.0, 1.0, 2.0, 4.0])) == 1
    assert num_wrong(x, torch.arange(3.0)) == 4
    assert num_wrong(x, x.double()) == 4
    assert (num_wrong(None, None), num_wrong(None, x), num_wrong(x, None)) == (0, 1, 1)
