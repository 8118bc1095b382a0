"""What a student's code can do to the grader: nothing but lose its own points.

Deadlines are short here; each case says what the report must say, and that the next check works.
"""

import os
import threading
import time

import psutil
import pytest

from slimlab.classroom.process import Keeper

from classroom_cases import BAND, GOOD_BAND, GOOD_MEAN, MEAN, submit  # isort: skip


@pytest.fixture(scope="module")
def keeper():
    with Keeper() as keeper:
        yield keeper


@pytest.fixture
def check(keeper):
    """Check cells behind `import torch`; afterwards a right answer must still pass."""

    def run(source, exercise=BAND, **options):
        return keeper.check(exercise, submit("import torch", source, exercise=exercise), **options)

    yield run
    assert run(GOOD_BAND).score == 4


def inside(line):
    """The right answer to 90.1 with `line` at the head of its function."""
    return GOOD_BAND.replace("    if width < 1", f"    {line}\n    if width < 1")


def test_a_right_answer_gets_all_points_at_every_instance(check):
    for name in (None, "Ada", "Grace", "Emmy"):
        report = check(GOOD_BAND, name=name, seed=3)
        assert (report.score, report.max_score) == (4, 4), report.text()
        assert [one.kind for one in report.outcomes] == ["passed"] * 3


def test_each_property_earns_its_own_points(check):
    report = check(GOOD_BAND.replace("d < width", "d <= width"))
    assert [one.points for one in report.outcomes] == [1, 0, 1]
    assert report.first_message().startswith("every query sees its band and nothing else\nsaw: row")
    report = check(GOOD_BAND.replace("    if width < 1:\n        raise ValueError(width)\n", ""))
    assert [one.points for one in report.outcomes] == [1, 2, 0]


def test_a_check_may_end_at_the_first_property_that_does_not_hold(check):
    wrong = GOOD_BAND.replace("d < width", "d <= width")
    whole, part = check(wrong), check(wrong, until_failed=True)
    assert [one.kind for one in whole.outcomes] == ["passed", "failed", "passed"]
    assert [one.kind for one in part.outcomes] == ["passed", "failed", "not run"]
    assert part.first_message() == whole.first_message()
    assert "saw: row" in part.text()
    slow = GOOD_BAND.replace("        raise ValueError(width)", "        while True: pass")
    report = check(slow.replace("d >= 0", "d > 0"), until_failed=True)
    assert [one.kind for one in report.outcomes] == ["passed", "failed", "not run"]
    assert check(slow, until_failed=True).outcomes[2].kind == "stopped"
    assert check(GOOD_BAND, until_failed=True).score == 4


def test_only_one_check_waits_for_what_torch_imports_late(check):
    asks = "import sys\nprint([one for one in ('sympy', 'torch._dynamo') if one in sys.modules])\n"
    assert check(GOOD_BAND + asks + "import sympy, torch._dynamo\n").printed == "[]"
    assert check(GOOD_BAND + asks).printed == "['sympy', 'torch._dynamo']"


def test_reports_are_the_same_every_time(check):
    wrong = GOOD_BAND.replace("torch.arange(T)[None, :]", "torch.rand(1, T)")
    texts = {check(wrong).text() for _ in range(3)}
    assert len(texts) == 1


def test_an_exercise_that_is_not_written_gets_no_point_and_says_so(check):
    report = check("# exercise 90.1\ndef band_mask(T, width):\n    raise NotImplementedError()\n")
    assert report.score == 0
    assert report.outcomes[0].problem.saw == "a part that is not written yet"
    assert report.outcomes[0].problem.look == "line 3 of cell 2: raise NotImplementedError()"


def test_a_missing_function_costs_its_own_points_alone(check):
    source = GOOD_MEAN.replace("def spread_of", "def spraed_of")
    report = check(source, MEAN)
    assert [one.points for one in report.outcomes] == [1, 0]
    assert report.outcomes[1].problem.saw == "no name 'spread_of'"
    report = check("# exercise 90.2\nx = 1", MEAN)
    assert report.problem.saw == "your cells do not define mean_of, spread_of"


@pytest.mark.parametrize(
    ("source", "saw"),
    [
        ("def band_mask(T): return 1", "TypeError: band_mask() takes 1 positional argument but 2"),
        ("def band_mask(T, w): pass", "AttributeError: 'NoneType' object has no attribute"),
        ("band_mask = 3", "TypeError: 'int' object is not callable"),
        ("def band_mask(T, w): return band_mask(T, w)", "RecursionError"),
        ("def band_mask(T, w): return input()", "your code waits for input()"),
        ("def band_mask(T, w): raise SystemExit", "your code ends the program"),
        ("def band_mask(T, w): return torch.ones(2) @ torch.ones(3)", "RuntimeError"),
    ],
)
def test_errors_in_the_students_code_are_named(check, source, saw):
    report = check(f"# exercise 90.1\n{source}")
    assert report.score == 0
    assert report.outcomes[0].kind == "raised"
    assert report.outcomes[0].problem.saw.startswith(saw)


def test_the_line_of_an_error_is_named(check):
    report = check(inside("1 / 0"))
    assert report.outcomes[0].problem.look == "line 3 of cell 2: 1 / 0"


def test_an_error_outside_functions_is_said_once(check):
    report = check(GOOD_BAND + "print(undefined)\n")
    assert report.problem.saw == "NameError: name 'undefined' is not defined"
    assert report.problem.look == "line 7 of cell 2: print(undefined)"
    assert report.text().count("undefined' is not") == 1


def test_an_endless_loop_costs_its_property_and_the_rest_still_counts(check):
    started = time.monotonic()
    report = check(GOOD_BAND.replace("        raise ValueError(width)", "        while True: pass"))
    assert [one.points for one in report.outcomes] == [1, 2, 0]
    assert report.outcomes[2].problem.saw == "did not finish within 1 s"
    report = check(GOOD_MEAN.replace("return values.mean()", "while True: pass"), MEAN)
    assert [one.points for one in report.outcomes] == [0, 2]
    assert time.monotonic() - started < 60


def test_an_endless_loop_outside_functions_ends_at_its_deadline(check, monkeypatch):
    monkeypatch.setattr(BAND, "load_deadline_s", 0.5)
    report = check(GOOD_BAND + "while True: pass")
    assert report.problem.saw == "did not finish within 0.5 s"
    assert report.score == 0


def test_all_properties_together_have_a_deadline_too(check, monkeypatch):
    monkeypatch.setattr(BAND, "total_deadline_s", 1.5)
    report = check(inside("while True: pass"))
    assert [one.points for one in report.outcomes] == [0, 0, 0]
    assert "for all properties" in report.outcomes[1].problem.saw
    assert report.outcomes[2].problem.saw == "no time was left for it"


def test_a_memory_hog_is_ended_and_told_how_much_it_used(check, monkeypatch):
    monkeypatch.setattr(BAND, "memory_mib", 200)
    hog = "if T == 4: hog = [bytearray(2**20) for _ in range(10**5)]"
    report = check(inside(hog))
    assert [one.points for one in report.outcomes] == [1, 2, 0]
    used_mib = int(report.outcomes[2].problem.saw.split()[0])
    assert 200 < used_mib < 4000
    assert report.outcomes[2].problem.expected == "at most 200 MiB"


def test_memory_of_processes_that_it_starts_counts(check, monkeypatch):
    monkeypatch.setattr(BAND, "memory_mib", 200)
    hog = (
        "import os, time\n    if os.fork() == 0:\n"
        "        hog = [bytearray(2**20) for _ in range(600)]\n        time.sleep(30)"
    )
    report = check(f"# exercise 90.1\n{hog.replace(chr(10) + '    ', chr(10))}\ntime.sleep(5)\n")
    assert "MiB of memory used" in report.problem.saw


def test_a_flood_of_output_is_ended(check):
    report = check(inside("while T == 4: print('x' * 1000)"))
    assert [one.points for one in report.outcomes] == [1, 2, 0]
    assert report.outcomes[2].problem.saw == "a flood of output"
    assert len(report.printed) < 5000


def test_what_it_prints_is_shown_and_cut(check):
    report = check(GOOD_BAND + "for k in range(40): print('line', k)")
    assert report.score == 4
    lines = report.printed.splitlines()
    assert lines[0] == "line 0"
    assert lines[-1] == "... and 28 lines more"


@pytest.mark.parametrize(
    "line",
    [
        "import os; os._exit(0)",
        "import os; os.closerange(3, 200)",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import ctypes; ctypes.string_at(0)",
    ],
)
def test_ending_the_process_or_its_pipes_gives_no_points(check, line):
    report = check(inside(line))
    assert report.score == 0
    assert report.outcomes[0].problem.saw == "the process ended before the check did"
    assert check(f"{GOOD_BAND}{line}").score == 0


FORGED = '{"event": "done", "index": 0, "kind": "passed", "problem": null, "nonce": "0"}\\n'


def test_forged_results_are_ignored(check):
    forge = f"""# exercise 90.1
import os
for descriptor in range(1, 60):
    try:
        os.write(descriptor, b'{FORGED}')
    except OSError:
        pass
def band_mask(T, width):
    os._exit(0)
"""
    report = check(forge)
    assert report.score == 0
    assert [one.kind for one in report.outcomes] == ["stopped"] * 3


def test_a_copy_of_the_process_has_nothing_to_say(check):
    report = check(inside("import os; os.fork()"))
    assert report.score == 4
    report = check(inside("import os; os._exit(0) if os.fork() else None"))
    assert report.score == 0


@pytest.mark.parametrize(
    "line",
    [
        "import slimlab.classroom.grading as g; g.expect_equal = lambda *a: None",
        "import slimlab.classroom.grading as g; g.plain = lambda *a: 0",
        "import slimlab.classroom.grading as g; g._type = lambda x: None",
        "torch.Tensor.__eq__ = torch.Tensor.eq = lambda *a: torch.tensor(True)",
        "torch.eq = torch.le = torch.all = torch.allclose = lambda *a, **k: torch.tensor(True)",
        "import slimlab.classroom.worker as w; w.comparison_is_sound = lambda: False",
    ],
)
def test_weakening_the_comparison_gives_no_points_to_a_wrong_answer(check, line):
    wrong = "    return torch.zeros(T, T, dtype=torch.bool) if width else 1 / width"
    report = check(f"# exercise 90.1\n{line}\ndef band_mask(T, width):\n{wrong}\n")
    assert report.outcomes[1].points == 0
    assert report.outcomes[2].points == 0


def test_a_comparison_that_always_passes_is_named(check):
    line = "import slimlab.classroom.grading as g; g.plain = lambda *a: 0"
    report = check(f"# exercise 90.1\n{line}\n" + GOOD_BAND)
    assert report.outcomes[0].problem.saw == "the comparison itself was changed"


@pytest.mark.parametrize(
    "line",
    [
        "import slimlab.classroom.worker as w; w.run_property = lambda *a: ('passed', None)",
        "import slimlab.classroom.worker as w; w.comparison_is_sound = lambda: True\n"
        "import slimlab.classroom.grading as g; g.plain = lambda *a: 0",
        "import gc\nfor one in gc.get_objects():\n"
        "    if type(one).__name__ == 'Property': vars(one)['function'] = lambda *a: None",
        "import slimlab.classroom.grading as g; g.plain.__code__ = (lambda a, b, c: 0).__code__",
    ],
)
def test_replacing_parts_of_the_grader_gives_no_points(check, line):
    report = check(f"# exercise 90.1\n{line}\ndef band_mask(T, width): return 1\n")
    assert report.score == 0


def test_defaults_of_torch_that_a_cell_changes_do_not_reach_the_comparison(check):
    for line in ("set_default_device('meta')", "set_default_dtype(torch.float64)"):
        report = check(GOOD_BAND + f"torch.{line}\n")
        assert report.score == 4, report.text()


def test_an_allocation_that_cannot_be_is_told_in_gigabytes(check):
    report = check(inside("torch.ones(10**15)"))
    assert report.outcomes[0].problem.saw == "your code asks for 4e+06 GB at once"
    assert report.outcomes[0].problem.look == "line 3 of cell 2: torch.ones(10**15)"
    report = check(inside("bytearray(10**18)"))
    assert "more memory than there is" in report.outcomes[0].problem.saw


def test_syntax_that_only_a_notebook_knows_is_named_with_its_line(check):
    report = check(GOOD_BAND + "import asyncio\nawait asyncio.sleep(0)\n")
    assert report.problem.saw.startswith("SyntaxError: 'await' outside function")
    assert report.problem.look == "line 8 of cell 2"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("open('/dev/shm/of-a-test', 'w')", "write 'of-a-test'"),
        ("open('/dev/full', 'w')", "write 'full'"),
        ("import os; os.chmod('/dev/null', 0o666)", "os.chmod('null')"),
        ("import shutil; shutil.rmtree({folder!r})", "shutil.rmtree('keep')"),
        ("import os; os.remove({folder!r} + '/a.txt')", "os.remove('a.txt')"),
        ("import os; os.rename({folder!r}, 'stolen')", "os.rename('keep')"),
        ("open({folder!r} + '/a.txt', 'w')", "write 'a.txt'"),
        ("import pathlib; pathlib.Path({folder!r}, 'b.txt').write_text('')", "write 'b.txt'"),
        ("import os; os.mkdir({folder!r} + '/new')", "os.mkdir('new')"),
        ("import os; os.system('rm -r ' + {folder!r})", "os.system"),
        ("import subprocess; subprocess.run(['rm', {folder!r}])", "subprocess.Popen"),
        ("import os; os.kill(os.getppid(), 9)", "signal a process"),
        ("import os; os.kill(-1, 9)", "signal a process"),
    ],
)
def test_other_peoples_files_and_processes_are_safe(check, tmp_path, line, words):
    folder = tmp_path / "keep"
    folder.mkdir()
    (folder / "a.txt").write_text("precious")
    report = check(GOOD_BAND + line.format(folder=str(folder)))
    assert report.score == 0
    assert words in report.problem.saw
    assert str(tmp_path) not in report.problem.saw
    assert (folder / "a.txt").read_text() == "precious"
    assert os.listdir(folder) == ["a.txt"]


def test_files_of_its_own_may_come_and_go(check):
    own = """import os, shutil, tempfile
open("mine.txt", "w").write("x")
open("/dev/null", "w").write("x")
os.mkdir("d"); os.rename("mine.txt", "d/mine.txt"); shutil.rmtree("d")
with tempfile.TemporaryDirectory() as d:
    open(d + "/x", "w").write("y")
os.remove(tempfile.NamedTemporaryFile(delete=False).name)
torch.save(torch.ones(2), "t.pt")
os.makedirs(os.path.expanduser("~"), exist_ok=True)
import matplotlib.pyplot as plt
plt.plot([1, 2]); plt.savefig("figure.png")
shutil.rmtree(os.getcwd())
"""
    assert check(GOOD_BAND + own).score == 4


def left_over(mark):
    """Processes whose memory map or arguments carry the mark."""
    return [one for one in psutil.process_iter(["cmdline"]) if mark in str(one.info["cmdline"])]


def test_threads_and_processes_that_it_leaves_behind_are_ended(check, keeper):
    leave = """# exercise 90.1
import os, threading, time
threading.Thread(target=lambda: time.sleep(600)).start()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(600)
    os._exit(0)
"""
    started = time.monotonic()
    report = check(leave + GOOD_BAND)
    assert report.score == 4
    assert time.monotonic() - started < 60
    assert psutil.Process(keeper.process.pid).children(recursive=True) == []


def test_numbers_inside_the_cells_are_those_of_the_student(check, monkeypatch):
    monkeypatch.setenv("SLIMLAB_CHECKS", str(os.path.dirname(BAND.source)))
    source = GOOD_BAND + "from slimlab.classroom.check import numbers\nprint(numbers('90.1'))"
    with Keeper() as own:
        report = own.check(BAND, submit("import torch", source), name="Ada", seed=5)
    assert report.printed == str(BAND.numbers_for("Ada", 5))


def test_a_keeper_that_was_killed_is_started_again(keeper, check):
    check(GOOD_BAND)
    keeper.process.kill()
    keeper.process.wait()
    assert check(GOOD_BAND).score == 4


def test_a_keeper_killed_in_the_middle_gives_a_report_and_leaves_nothing(
    keeper, check, tmp_path, monkeypatch
):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    keeper.close()
    check(GOOD_BAND)
    threading.Timer(0.4, keeper.abort).start()
    report = check(inside("while True: pass"))
    assert report.score == 0
    assert "the process that runs the checks ended" in report.text()
    assert os.listdir(tmp_path) == []
    keeper.close()


def test_a_closed_keeper_leaves_no_process():
    with Keeper() as own:
        own.check(BAND, submit("import torch", GOOD_BAND))
        process = own.process
    assert process.poll() is not None
