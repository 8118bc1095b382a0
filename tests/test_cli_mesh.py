"""`slimlab train` on many ranks: started by itself, by mpirun and by torchrun; what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from comm_runtimes import MPIRUN, why_not

from slimlab.cli import main
from slimlab.comm.launch import BACKENDS
from slimlab.commands import mesh
from slimlab.demos import common
from slimlab.train.history import read_history
from slimlab.train.text_model import load_text_model

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    *("--d-model", 16, "--num-layers", 2, "--num-heads", 2, "--seq-len", 12, "--vocab-size", 290),
    *("--batch-size", 8, "--save-every", 4, "--validate-every", 4, "--device", "cpu"),
]
WORDS = ["the", "cat", "and", "a", "dog", "sat", "or", "ran", "on", "under", "over", "our", "mat"]
LAUNCHERS = {
    "mpirun": [str(MPIRUN["mpich"]), "-n", "2", sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name in range(6):
        chosen = [[WORDS[(name * 7 + i * i + j * 3 * i) % 13] for j in range(12)] for i in range(9)]
        (folder / f"{name}.txt").write_text("\n\n".join(" ".join(some) for some in chosen))
    return folder


def run(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, [*arguments, *SMALL])])


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """Losses of eight steps in one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    assert run(text, "--out", out, "--steps", 8).exit_code == 0
    return read_history(out)


def test_a_run_goes_on_under_other_layouts_from_the_command_line(text, alone, tmp_path):
    out = tmp_path / "run"
    first = run(text, "--out", out, "--steps", 8, "--dp", 2, "--tp", 2, "--zero", 1, "--json")
    assert first.exit_code == 0, first.output
    found = json.loads(first.stdout)
    assert (found["steps"], found["vocab_size"], found["device"]) == (8, 290, "cpu")
    assert found["loss"] == read_history(out).losses[-1]
    assert first.stderr.count("step 4: loss") == 1
    assert read_history(out).losses == pytest.approx(alone.losses, rel=1e-5)
    more = ("--steps", 10, "--new-settings", "--pp", 2, "--tp", 2, "--sequence-parallel")
    second = run(text, "--out", out, *more)
    assert second.exit_code == 0, second.output
    assert "saved by tensor 2, pipeline 1, data 2, micro-batch 4, ZeRO 1" in second.stderr
    assert "10 steps on cpu" in second.stdout
    assert read_history(out).steps == list(range(1, 11))
    last = run(text, "--out", out, "--steps", 11, "--new-settings")
    assert last.exit_code == 0, last.output
    assert f"going on from {out / 'step_00000010'}" in last.stderr
    assert load_text_model(out, "cpu").model.config.num_layers == 2


@pytest.mark.parametrize(
    ("launcher", "layout"), [("mpirun", ("--pp", "2")), ("torchrun", ("--dp", "2", "--zero", "2"))]
)
def test_the_same_command_trains_under_a_launcher(launcher, layout, text, alone, tmp_path):
    if launcher == "mpirun" and (reason := why_not("mpich")):
        pytest.skip(reason)
    command = [*LAUNCHERS[launcher], "-m", "slimlab", "train", text, "--out", tmp_path / "run"]
    result = subprocess.run(
        list(map(str, [*command, *SMALL, "--steps", 8, *layout])),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("8 steps on cpu") == 1
    assert result.stderr.count("step 4: loss") == 1
    assert read_history(tmp_path / "run").losses == pytest.approx(alone.losses, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dp", 3], ["batch_size = 8, data = 3", "choose --batch-size from 6, 12"]),
        (["--pp", 3], ["num_layers = 2, pipeline = 3", "give --pp 2 at most"]),
        (["--tp", 3], ["3 ranks for num_heads = 2", "take --tp 2"]),
        (["--tp", 2, "--vocab-size", 291], ["vocab_size = 291", "--vocab-size 290 or 292"]),
        (["--pp", 2, "--zero", 3], ["zero_stage = 3, pipeline = 2", "give --zero 1"]),
        (["--dp", 2, "--micro-batch-size", 3], ["micro_batch_size = 3", "--batch-size from 6, 12"]),
        (["--dp", 2, "--precision", "float16"], ["float16", "--precision bfloat16"]),
        (["--dp", 2, "--backend", "nccl"], ["backend"]),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_in_the_words_of_the_command(
    arguments, words, text, tmp_path
):
    out = tmp_path / "run"
    result = CliRunner().invoke(
        main, list(map(str, ["train", text, "--out", out, "--steps", 2, *SMALL, *arguments]))
    )
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words), result.output
    assert not out.exists() or not list(out.glob("step_*"))


def test_a_mesh_of_other_ranks_than_a_launcher_started_is_refused_by_the_first_alone(
    text, tmp_path, monkeypatch
):
    monkeypatch.setattr(mesh, "LEAVE_LATER_S", 0.0)
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "0")
    first = run(text, "--out", tmp_path, "--steps", 2, "--dp", 2)
    assert first.exit_code == 2
    assert "2 x 1 x 1 = 2" in first.output
    assert "give --dp 4, --pp 1, --tp 1, or start 2 ranks" in first.output
    monkeypatch.setenv("PMI_RANK", "1")
    other = run(text, "--out", tmp_path, "--steps", 2)
    assert (other.exit_code, other.output) == (2, "")


def test_a_run_that_is_stopped_says_where_it_will_go_on(text, tmp_path, monkeypatch):
    train = common.run_demo

    def stopped(*args, **options):
        if "trained" in str(args):
            train(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "run_demo", stopped)
    for name, words in (("none", "before the first checkpoint"), ("trained", "step_00000004, and")):
        result = run(text, "--out", tmp_path / name, "--steps", 4, "--dp", 2)
        assert result.exit_code == 130
        assert result.output.count("slimlab: stopped") == 1
        assert words in result.output


def test_the_backends_are_those_of_run_ranks():
    assert set(mesh.BACKENDS) == set(BACKENDS)
