"""The folder hosts/: scripts that take every number from Slurm; page and recipe fit the project."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOSTS = ROOT / "hosts"
DEADLINE_S = 60.0
# Each notes how it was called; scontrol and python answer as the script needs it.
STUB = """#!/bin/sh
case "${0##*/} $1" in
"scontrol show") printf '%s\\n' first second third ;;
"python -c") echo "$OPEN_MPI" ;;
"python -") exec "$REAL_PYTHON" "$@" ;;
*) printf '%s\\n' "${0##*/}" "$@" "OMP_NUM_THREADS=$OMP_NUM_THREADS" "IN=$PWD" > "$NOTE" ;;
esac
"""
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "first,second,third",
    "SLURM_NTASKS_PER_NODE": "5",
    "SLURM_CPUS_PER_TASK": "7",
}


@pytest.fixture
def slurm(tmp_path):
    """Runs a script of hosts/ as sbatch would; returns what it said, and what it started."""
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    stubs, note = tmp_path / "stubs", tmp_path / "note"
    stubs.mkdir()
    for name in ("srun", "mpirun", "scontrol", "python", "torchrun"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    env |= SLURM | {"SLURM_SUBMIT_DIR": str(tmp_path), "NOTE": str(note)}
    env |= {"PATH": f"{stubs}:/usr/bin:/bin", "REAL_PYTHON": sys.executable, "OPEN_MPI": "False"}

    def start(script, *words, **changed):
        note.unlink(missing_ok=True)
        left = {name: value for name, value in (env | changed).items() if value is not None}
        done = subprocess.run(
            ["bash", str(HOSTS / script), *words],
            env=left,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        return done, note.read_text(encoding="utf-8").splitlines() if note.exists() else []

    return start


SCRIPTS = sorted(path.name for path in HOSTS.glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_is_valid_bash_and_asks_slurm_for_no_number(script):
    done = subprocess.run(["bash", "-n", str(HOSTS / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (HOSTS / script).read_text(encoding="utf-8").splitlines()
    asked = [line for line in lines if line.startswith("#SBATCH")]
    assert asked == ["#SBATCH --job-name=slimlab", "#SBATCH --output=%x-%j.out"]
    assert os.access(HOSTS / script, os.X_OK)


def test_mpirun_starts_as_many_ranks_as_slurm_has_given_tasks(slurm, tmp_path):
    done, started = slurm("slurm_mpirun.sh", "hello", "--json")
    assert done.returncode == 0, done.stderr
    program = ["python", "-m", "slimlab.demos.hello", "--json"]
    tail = ["OMP_NUM_THREADS=7", f"IN={tmp_path}"]
    assert started == ["mpirun", *["-n", "15", "-ppn", "5", "-bind-to", "core:7"], *program, *tail]
    _, started = slurm("slurm_mpirun.sh", "hello", OPEN_MPI="True")
    mapped = ["-n", "15", "--map-by", "ppr:5:node:PE=7", "--bind-to", "core"]
    passed = ["-x", "PATH", "-x", "OMP_NUM_THREADS"]
    assert started == ["mpirun", *mapped, *passed, *program[:3], *tail]


@pytest.mark.parametrize(("open_mpi", "pmi"), [("False", "pmi2"), ("True", "pmix")])
def test_srun_speaks_the_pmi_that_the_library_understands(slurm, open_mpi, pmi):
    _, started = slurm("slurm_mpirun.sh", "ping_pong", LAUNCHER="srun", OPEN_MPI=open_mpi)
    assert started[:2] == ["srun", f"--mpi={pmi}"]
    counts = ["--nodes=3", "--ntasks=15", "--ntasks-per-node=5", "--cpus-per-task=7"]
    assert set(counts) <= set(started)
    assert started[-5:-2] == ["python", "-m", "slimlab.demos.ping_pong"]


def test_torchrun_starts_once_per_host_and_meets_on_the_first(slurm):
    done, started = slurm("slurm_torchrun.sh", "collectives", "--json")
    assert done.returncode == 0, done.stderr
    assert started[0] == "srun"
    counts = ["--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--cpus-per-task=35"]
    assert set(counts) <= set(started)
    torchrun = started[started.index("torchrun") + 1 : -2]
    options = dict(zip(torchrun[:10:2], torchrun[1:10:2], strict=True))
    host, port = options.pop("--rdzv-endpoint").split(":")
    assert options == {
        "--nnodes": "3",
        "--nproc-per-node": "5",
        "--rdzv-backend": "c10d",
        "--rdzv-id": "4711",
    }
    assert host == "first"
    assert 20_000 <= int(port) < 30_000
    assert torchrun[10:] == ["-m", "slimlab.demos.collectives", "--json"]
    assert started[-2] == "OMP_NUM_THREADS=7"


def test_a_rendezvous_port_that_is_taken_is_passed_over(slurm):
    for port in range(20_000, 30_000):
        with socket.socket() as taken:
            try:
                taken.bind(("", port))
            except OSError:
                continue
            taken.listen()
            _, started = slurm("slurm_torchrun.sh", "hello", SLURM_JOB_ID=str(port + 70_000))
        chosen = int(started[started.index("--rdzv-endpoint") + 1].split(":")[1])
        assert port < chosen < 30_000
        return
    pytest.fail("no port from 20000 to 29999 is free")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_refuses_what_cannot_run_and_says_what_to_ask_for(slurm, script):
    for words, changed, says in (
        ([], {}, "no demo named"),
        (["hello"], {"SLURM_JOB_ID": None}, "start it with sbatch"),
        (["hello"], {"SLURM_NTASKS_PER_NODE": None}, "--ntasks-per-node"),
        (["hello"], {"SLURM_GPUS_PER_TASK": "1"}, "--gpus-per-node"),
        (["hello"], {"SLURM_GPUS_ON_NODE": "4"}, "5 ranks per host but 4 GPUs"),
    ):
        done, started = slurm(script, *words, **changed)
        assert (done.returncode, started) == (2, []), says
        assert says in done.stderr
    _, started = slurm(script, "hello", SLURM_GPUS_ON_NODE="5")
    assert started


def test_the_page_names_every_file_beside_it_and_only_what_exists():
    page = (HOSTS / "README.md").read_text(encoding="utf-8")
    for path in HOSTS.iterdir():
        assert path.name == "README.md" or f"({path.name})" in page, path.name
    demos = {path.stem for path in (ROOT / "slimlab" / "demos").glob("*.py")}
    texts = [path.read_text(encoding="utf-8") for path in HOSTS.iterdir()]
    named = {name for text in texts for name in re.findall(r"slimlab\.demos\.([a-z_]+)", text)}
    assert named
    assert named <= demos


def test_the_recipe_copies_what_exists_and_does_not_run_as_root():
    recipe = (HOSTS / "Containerfile").read_text(encoding="utf-8")
    copied = [line.split()[1:-1] for line in recipe.splitlines() if line.startswith("COPY")]
    assert all((ROOT / name).exists() for names in copied for name in names)
    needed = {"pyproject.toml", "README.md", "LICENSE", "LICENSE-TEXT", "slimlab"}
    assert {name for names in copied for name in names} == needed
    users = [line.split()[1] for line in recipe.splitlines() if line.startswith("USER")]
    assert users
    assert users[-1] not in ("root", "0")
