"""The doctor: what it finds, what it says when things are missing, and that it always answers."""

import json
import os
import subprocess
import sys
from collections import namedtuple

import pytest
from click.testing import CliRunner

from slimlab import doctor
from slimlab.cli import main
from slimlab.doctor import Finding, examine, is_healthy, mpi_family, table


@pytest.fixture(scope="module")
def findings():
    return {one.name: one for one in examine()}


def test_this_machine_is_looked_at_from_python_to_chapters(findings):
    expected = ["python", "packages", "torch", "mpi", "cores", "memory", "disk", "network"]
    expected += ["fonts", "jupyter", "chapters"]
    assert [name for name in findings if name != "mpirun"] == expected
    assert all(one.state in ("ok", "note", "missing") for one in findings.values())
    assert all(one.detail for one in findings.values())


def test_what_runs_these_tests_has_what_the_book_needs(findings):
    assert is_healthy(list(findings.values())), table(list(findings.values()))
    assert findings["torch"].detail.split(",")[0] == _torch_version()


def _torch_version():
    import torch

    return torch.__version__


def test_whatever_is_missing_comes_with_the_line_that_mends_it(findings):
    assert all(one.mend for one in findings.values() if one.state == "missing")


def test_mpi_is_never_initialised_in_this_process(findings):
    assert "mpi4py.MPI" not in sys.modules


def test_the_table_puts_the_mending_line_below_its_problem():
    text = table([Finding("a", "ok", "fine"), Finding("b", "missing", "gone", "install b")])
    assert text.splitlines() == [
        "✓ a          fine",
        "✗ b          gone",
        "             mend: install b",
        "1 missing",
    ]


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("Open MPI v5.0.11, package: ...", "Open MPI"),
        ("mpirun (Open MPI) 4.1.4", "Open MPI"),
        ("mpirun (OpenRTE) 2.1.1", "Open MPI"),
        ("MPICH Version: 5.0.2", "MPICH"),
        ("HYDRA build details:", "MPICH"),
        ("Intel(R) MPI Library", ""),
    ],
)
def test_both_families_of_mpi_are_told_apart(text, family):
    assert mpi_family(text) == family


def answers(monkeypatch, **by_word):
    """Answer the doctor's questions: a text, or a pair of nothing and what went wrong."""

    def ask(command):
        shown = " ".join(command)
        for word, answer in by_word.items():
            if word in shown:
                return answer if isinstance(answer, tuple) else (answer, "")
        return "", "No such file"

    monkeypatch.setattr(doctor, "_ask", ask)


def test_an_mpirun_of_another_mpi_is_named(monkeypatch):
    answers(monkeypatch, get_library="", mpi4py="4.1 | MPICH Version: 5", version="Open MPI 5.0")
    monkeypatch.setattr(doctor, "find_mpirun", lambda: "mpirun")
    answers(monkeypatch, mpi4py="4.1 | MPICH Version: 5", version="mpirun (Open MPI) 5.0")
    mpi, mpirun = doctor.look_at_mpi()
    assert (mpi.state, mpirun.state) == ("ok", "note")
    assert "every rank would be rank 0 of 1" in mpirun.detail
    assert mpirun.mend


def test_without_mpi_the_book_still_works(monkeypatch):
    answers(monkeypatch)
    (mpi,) = doctor.look_at_mpi()
    assert (mpi.state, mpi.mend) == ("note", "python -m pip install mpi4py mpich")
    answers(monkeypatch, mpi4py="4.1 | MPICH Version: 5")
    monkeypatch.setattr(doctor, "find_mpirun", lambda: None)
    assert doctor.look_at_mpi()[1].detail.startswith("not found")


def test_without_torch_or_a_kernel_it_does_not(monkeypatch):
    answers(monkeypatch)
    for look in (doctor.look_at_torch, doctor.look_at_kernel, doctor.look_at_fonts):
        finding = look()
        assert finding.state == "missing"
        assert finding.mend.startswith("python -m pip install ")


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ('{"kernelspecs": {"python3": {"spec": {"argv": ["python3"]}}}}', "ok"),
        ('warning\n{"kernelspecs": {"python3": {"spec": {"argv": ["/other/python"]}}}}', "note"),
        ('{"kernelspecs": {"ir": {}}}', "missing"),
        ("nothing", "missing"),
    ],
)
def test_the_kernel_must_be_there_and_should_be_this_python(monkeypatch, answer, state):
    answers(monkeypatch, kernelspec=answer)
    finding = doctor.look_at_kernel()
    assert finding.state == state
    assert bool(finding.mend) == (state != "ok")


def test_gpus_are_listed(monkeypatch):
    answers(monkeypatch, torch="2.13.0 | NVIDIA H200, NVIDIA H200")
    assert doctor.look_at_torch().detail == "2.13.0, NVIDIA H200, NVIDIA H200"
    answers(monkeypatch, torch="2.13.0 |")
    assert doctor.look_at_torch().detail == "2.13.0, no GPU; none is needed"


def test_a_font_with_chinese_is_found(monkeypatch):
    answers(monkeypatch, font="DejaVu Sans\nNoto Sans CJK SC")
    assert doctor.look_at_fonts().detail == "2, Chinese: Noto Sans CJK SC"
    answers(monkeypatch, font="DejaVu Sans")
    assert doctor.look_at_fonts().state == "note"


def test_too_many_threads_and_too_little_memory_or_disk_are_noted(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "9999")
    assert doctor.look_at_cores().mend.startswith("export OMP_NUM_THREADS=")
    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory(2**29, 2**33))
    assert doctor.look_at_memory().detail == "0.5 GiB free of 8.0"
    assert doctor.look_at_memory().state == "note"
    disk = namedtuple("disk", "free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: disk(2**28))
    assert doctor.look_at_disk().mend.startswith("make clean")


def test_folders_that_cannot_be_written_are_missing_and_the_line_mends_it(monkeypatch, tmp_path):
    assert doctor.look_at_folders() == []
    monkeypatch.setenv("HOME", "/proc")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    home, temporary = doctor.look_at_folders()
    assert (home.state, temporary.state) == ("missing", "missing")
    assert "/proc cannot be written" in home.detail
    for finding, name in ((home, "HOME"), (temporary, "TMPDIR")):
        line = f"{finding.mend} && touch ${name}/x && echo ${name}"
        environment = {"PATH": os.environ["PATH"]}
        done = subprocess.run(
            ["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=environment
        )
        monkeypatch.setenv(name, done.stdout.strip())
    assert doctor.look_at_folders() == []


def test_a_home_that_jupyter_cannot_use_is_no_reason_to_install_it(monkeypatch):
    said = "PermissionError: [Errno 13] Permission denied: '/.local'"
    monkeypatch.setattr(doctor, "_ask", lambda command: ("", said))
    assert doctor.look_at_kernel().mend.startswith("export HOME=")


def test_a_host_that_does_not_know_its_name_is_noted(monkeypatch):
    monkeypatch.setattr(doctor.socket, "gethostname", lambda: "no-such-host.invalid")
    finding = doctor.look_at_network()
    assert finding.state == "note"
    assert "GLOO_SOCKET_IFNAME" in finding.mend


def test_a_question_that_is_never_answered_ends_at_its_deadline(monkeypatch):
    monkeypatch.setattr(doctor, "ASK_DEADLINE_S", 0.2)
    said, trouble = doctor._ask([sys.executable, "-c", "import time; time.sleep(60)"])
    assert (said, trouble) == ("", "no answer within 0 s")
    monkeypatch.undo()
    assert doctor._ask(["no-such-program"])[1]
    assert (
        doctor._ask([sys.executable, "-c", "raise SystemExit('no MPI here')"])[1] == "no MPI here"
    )


def test_one_look_that_breaks_hides_no_other(monkeypatch):
    def look_at_disk():
        raise RuntimeError("odd machine")

    monkeypatch.setattr(doctor, "look_at_disk", look_at_disk)
    answers(monkeypatch)
    found = {one.name: one for one in examine()}
    assert found["disk"].detail == "could not be looked at: RuntimeError: odd machine"
    assert found["memory"].state in ("ok", "note")


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("note", 0), ("missing", 1)])
def test_the_command_gives_json_and_exit_code_1_if_something_is_missing(monkeypatch, state, code):
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("torch", state, "x", "mend it")])
    result = CliRunner().invoke(main, ["doctor", "--json"])
    expected = [{"name": "torch", "state": state, "detail": "x", "mend": "mend it"}]
    assert json.loads(result.output) == expected
    assert result.exit_code == code
    assert CliRunner().invoke(main, ["doctor"]).exit_code == code


def test_the_doctor_needs_no_torch_of_its_own():
    program = "import sys, slimlab.doctor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False"
