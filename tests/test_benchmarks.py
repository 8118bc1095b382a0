"""The benchmarks run, compare equal things and report in their form; times are never judged."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    collectives,
    common,
    int8_linear,
    parallel_rivals,
    parallel_steps,
    start_up,
    tokenizer,
    training_step,
)
from benchmarks.common import Comparison, compare, median_interval, quartiles, table, take_turns
from slimlab.comm import launch
from slimlab.comm.report import RankError
from slimlab.config import InputError

ROOT = Path(__file__).resolve().parents[1]
ROW = {
    "task", "rounds", "ours", "theirs", "ours_s", "theirs_s", "ours_median_s", "theirs_median_s",
    "ratio_median", "ratio_quartiles", "ratio_interval_95", "ratio_range",
}  # fmt: skip


def run(module, *options):
    """Run a benchmark as a reader would, in a process of its own: it sets threads."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def check_form(report, benchmark, tasks, rounds):
    assert set(report) == {"benchmark", "settings", "environment", "results"}
    assert report["benchmark"] == benchmark
    assert {"threads", "clock", "cores", "load_before", "python"} <= set(report["environment"])
    assert [row["task"] for row in report["results"]] == tasks
    for row in report["results"]:
        assert set(row) == ROW
        assert row["rounds"] == len(row["ours_s"]) == len(row["theirs_s"]) == rounds
        assert all(seconds > 0 for seconds in row["ours_s"] + row["theirs_s"])
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio_median"] <= high


def test_the_tokenizer_benchmark_reports_in_its_form():
    pytest.importorskip("tokenizers")
    report = json.loads(run("tokenizer", "--rounds", "1", "--merges", "4", "--json"))
    check_form(report, "tokenizer", ["train", "encode", "encode, new", "decode"], rounds=1)
    assert report["settings"]["merges"] == 4


def test_the_training_step_benchmark_reports_in_its_form(capsys):
    pytest.importorskip("transformers")
    options = ["--shape", "tiny", "--rounds", "2", "--batch-size", "2", "--seq-len", "8"]
    threads = torch.get_num_threads()
    try:  # here and not in a process: importing transformers again would take most of the time
        training_step.main([*options, "--vocab-size", "50", "--json"])
    finally:
        torch.set_num_threads(threads)
    report = json.loads(capsys.readouterr().out)
    tasks = ["step", "step: forward", "step: backward", "step: update"]
    check_form(report, "training_step", tasks, rounds=2)
    for row_of_parts in zip(*(row["ours_s"] for row in report["results"])):
        whole, *parts = row_of_parts
        assert sum(parts) <= whole


@pytest.mark.parametrize("runtime", ["mpi", "gloo"])
def test_the_benchmark_of_collectives_reports_in_its_form(runtime, capsys):
    if runtime == "mpi" and (reason := launch.why_not("mpi")):
        pytest.skip(reason)
    options = ["--runtime", runtime, "--allocator", "keeps", "--sizes", "1024"]
    collectives.main([*options, "--rounds", "2", "--json"])  # the ranks are processes anyway
    report = json.loads(capsys.readouterr().out)
    allocator = "keeps" if runtime == "mpi" else "default"
    tasks = [
        f"{runtime}, {allocator}, 1 KiB {name}, {messages}"
        for messages in ("bare", "communicator")
        for name in ("ring", "Rabenseifner", "doubling")
    ]
    check_form(report, "collectives", tasks, rounds=2)
    assert report["settings"]["ranks"] == 2
    assert "MALLOC_MMAP_THRESHOLD_=" in report["settings"]["keeps"]


@pytest.mark.skipif(launch.why_not("mpi", 2) is not None, reason="no MPI")
def test_the_benchmark_of_starting_ranks_reports_in_its_form(capsys):
    start_up.main(["--quick", "--ranks", "2", "--rounds", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    check_form(found, "start_up", [f"run_ranks, {name}" for name in ("threads", "gloo", "mpi")], 1)


@pytest.mark.skipif(launch.why_not("mpi", 2) is not None, reason="no MPI")
def test_the_benchmark_of_split_steps_reports_in_its_form(capsys):
    options = ["--shape", "tiny", "--rounds", "1", "--batch-size", "2", "--seq-len", "8"]
    parallel_steps.main([*options, "--vocab-size", "50", "--json"])
    found = json.loads(capsys.readouterr().out)
    rivals = {"data": ["DDP"], "zero": ["fully_shard"]}
    rivals["tensor"] = [f"DTensor {plan}" for plan in ("linears", "shared", "vocabulary")]
    rivals["pipeline"] = ["Schedule1F1B"]
    tasks = [
        f"{scheme}: ours, {transport} beside {rival}"
        for scheme, names in rivals.items()
        for transport in ("gloo", "mpi")
        for rival in names
    ]
    check_form(found, "parallel_steps", tasks, 1)
    assert found["settings"]["optimizer"] == "fused AdamW on every side"


def test_split_steps_that_differ_are_refused_before_any_time_is_taken(monkeypatch):
    def measured(comm):
        def doubled(task):
            step = parallel_rivals.our_data(task, comm)
            return lambda: 2 * step()

        rivals = (parallel_rivals.our_data, {"doubled": doubled})
        monkeypatch.setitem(parallel_steps.SCHEMES, "data", rivals)
        task = parallel_rivals.Task("tiny", 2, 8, 50)
        return parallel_steps.measure("data", task, {"gloo": comm}, rounds=1)

    with pytest.raises(RankError, match="doubled: the losses of 3 steps"):
        launch.run_ranks(measured, 1)


def test_both_models_have_the_same_parameters_and_stay_equal_while_they_learn():
    pytest.importorskip("transformers")
    config = training_step.config_of("tiny", seq_len=8, vocab_size=50)
    steps = training_step.make_steps(config, 2, "cpu", torch.float32)
    ours, theirs = (
        sum(p.numel() for group in step.optimizer.param_groups for p in group["params"])
        for step in steps.values()
    )
    assert ours == theirs
    before = float(steps["slimlab"].loss)
    for _ in range(20):
        for step in steps.values():
            step.run()
    losses = [float(step.loss) for step in steps.values()]
    # AdamW makes a rounding difference of a gradient near zero as large as a step.
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0] < before - 0.3


def test_models_that_differ_are_refused_before_any_time_is_taken(monkeypatch):
    pytest.importorskip("transformers")
    original = training_step.their_model

    def spoiled(ours):
        theirs = original(ours)
        with torch.no_grad():
            theirs.model.layers[0].mlp.up_proj.weight.mul_(40)
        return theirs

    monkeypatch.setattr(training_step, "their_model", spoiled)
    config = training_step.config_of("tiny", seq_len=8, vocab_size=50)
    with pytest.raises(InputError, match="same loss"):
        training_step.make_steps(config, 2, "cpu", torch.float32)


def test_tokenizers_that_differ_are_refused_before_any_time_is_taken(monkeypatch):
    pytest.importorskip("tokenizers")
    corpus = tokenizer.Corpus("tiny", ("a rose is a rose is a rose",), (" is a rose",), "0")
    copied = tokenizer.their_copy
    for task in tokenizer.TASKS.values():
        times = take_turns(task(corpus, 5), rounds=1)
        assert list(times) == ["slimlab", "tokenizers"]

    def copy_without_the_last_merge(ours):
        return copied(tokenizer.Tokenizer(ours.merges[:-1]))

    monkeypatch.setattr(tokenizer, "their_copy", copy_without_the_last_merge)
    with pytest.raises(InputError, match="the same ids"):
        tokenizer.Pair(corpus, 5)


def test_the_benchmark_of_int8_layers_reports_in_its_form_with_the_instructions(capsys):
    options = ["--shapes", "8x16", "--rounds", "2", "--calls", "2", "--memory-mib", "0"]
    int8_linear.main([*options, "--json", "--rivals", *int8_linear._FORMS])
    found = json.loads(capsys.readouterr().out)
    tasks = [f"8 x 16, one layer, 2 calls: {name}" for name in int8_linear._FORMS]
    check_form(found, "int8_linear", tasks, rounds=2)
    named = found["environment"]["instructions"].split()
    assert named[0] == torch.backends.cpu.get_cpu_capability()
    assert len({tuple(row["theirs_s"]) for row in found["results"]}) == 1  # one run of float32


def test_int8_layers_that_compute_something_else_are_refused_before_any_time_is_taken(monkeypatch):
    def halved(linear, sample):
        return lambda x: linear(x) / 2

    monkeypatch.setitem(int8_linear._FORMS, "int8, dynamic", halved)
    layers = int8_linear.make_layers((8, 16), 2, ("int8, dynamic",))
    with pytest.raises(InputError, match="50.0% off"):
        int8_linear.check_outputs(layers, torch.randn(1, 16))


def test_rivals_take_turns_in_alternating_order_after_the_warm_up():
    calls = []

    def rival(name):
        def prepare():
            calls.append(f"prepare {name}")
            return lambda: calls.append(name)

        return prepare

    times = take_turns({"a": rival("a"), "b": rival("b")}, rounds=3, warm_up=2)
    assert [name for name in calls if len(name) == 1] == list("abbaabbaab")
    assert calls[:4] == ["prepare a", "a", "prepare b", "b"]
    assert {name: len(parts[""]) for name, parts in times.items()} == {"a": 3, "b": 3}


def test_ratios_pair_the_times_of_one_round(monkeypatch):
    # a clock that each rival advances; the machine becomes ten times slower in the second half
    clock = [0.0]
    monkeypatch.setitem(common.CLOCKS, "wall", lambda: clock[0])
    calls = {"ours": 0, "theirs": 0}

    def rival(name, seconds):
        def run():
            slow = 10 if calls[name] >= 4 else 1
            calls[name] += 1
            clock[0] += seconds * slow
            return {"part": seconds * slow / 2}

        return lambda: run

    whole, part = compare(
        "work", {"ours": rival("ours", 2.0), "theirs": rival("theirs", 4.0)}, rounds=8, warm_up=0
    )
    assert (whole.task, part.task) == ("work", "work: part")
    assert whole.ours_s == (2.0,) * 4 + (20.0,) * 4
    assert whole.ratios == part.ratios == [0.5] * 8


@pytest.mark.parametrize("count", [5, 6, 9, 21])
def test_the_interval_of_the_median_is_the_one_of_the_binomial_distribution(count):
    values = [float(i) for i in range(count)][::-1]
    interval = median_interval(values)
    if count < 6:
        assert interval is None
        return
    # Chance that the true median lies outside: as few heads or tails as the rank, of all throws
    rank = int(interval[0])
    assert interval[1] == count - 1 - rank

    def outside(rank):
        return 2 * sum(math.comb(count, k) for k in range(rank + 1)) / 2**count

    assert outside(rank) <= 0.05 < outside(rank + 1)


def test_quartiles_and_table_show_what_was_measured():
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == [2.0, 4.0]
    assert quartiles([7.0]) == [7.0, 7.0]
    comparison = Comparison("work", "ours", "theirs", (0.002, 0.004, 0.006), (0.004, 0.004, 0.004))
    head, row = table([comparison]).splitlines()
    assert head.split()[:4] == ["task", "ours", "theirs", "ratio"]
    assert row.split("  ")[0] == "work"
    assert "4 ms" in row
    assert "1.000" in row
    assert "0.750 to 1.250" in row
    assert "too few rounds" in row


def test_a_comparison_needs_two_rivals_and_a_round():
    with pytest.raises(InputError, match="two rivals"):
        compare("work", {"one": lambda: lambda: None}, 1)
    with pytest.raises(InputError, match="rounds = 0"):
        take_turns({}, 0)
