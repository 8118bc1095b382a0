"""The benchmark of pruning: rivals compute the same, stored runs are those of the program."""

import json
import math

import pytest
import torch

from benchmarks import pruning, pruning_speed
from slimlab.config import InputError, ModelConfig
from slimlab.model.transformer import Decoder
from slimlab.slim.evidence import stored_evidence
from slimlab.slim.prune_masks import is_two_four
from slimlab.slim.prune_scores import prunable_weights
from slimlab.slim.report import SlimReport
from slimlab.train.recipe import RECIPE


class SmallBook:
    """A decoder in place of the model of the book."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = Decoder(ModelConfig(24, 16, 16, 4, 4, feed_forward="swiglu", d_ff=24))
        self.calibration = [torch.randint(24, (4, 16)) for _ in range(2)]


def test_rivals_multiply_what_they_say():
    rivals = pruning_speed.layer_rivals(3, 16, 8)
    with torch.no_grad():
        found = {name: run() for name, run in rivals.items()}
    assert torch.equal(found["2:4, unpacked"], found["2:4, zeros in place"])
    assert torch.allclose(found["half the rows removed"], found["dense"][:, :4], atol=1e-6)
    for sparsity in ("0.5", "0.9"):
        masked, csr = found[f"masked {sparsity}"], found[f"CSR {sparsity}"]
        assert torch.allclose(csr, masked, atol=1e-5)
        assert not torch.allclose(masked, found["dense"], atol=1e-2)


def test_times_are_ratios_to_the_dense_rival_of_the_same_round(monkeypatch):
    monkeypatch.setattr(pruning_speed, "SHAPES", ((2, 8, 8),))
    book = SmallBook()
    book.model = Decoder(ModelConfig(24, 64, 16, 2, 2)).eval()
    windows = torch.randint(24, (1, 32))
    rows = pruning_speed.speed({"dense": book.model}, windows, rounds=2)
    assert {row["ratio"] for row in rows if row["rival"] == "dense"} == {1.0}
    assert all(row["median_s"] > 0 and row["rounds"] == 2 for row in rows)


@pytest.mark.parametrize("arm", pruning.ARMS)
def test_every_arm_prunes_what_it_names_and_leaves_the_original(arm):
    book = SmallBook()
    before = {name: value.clone() for name, value in book.model.state_dict().items()}
    choice = pruning.ARMS[arm]
    model, watch = pruning.pruned(book, choice)
    assert all(torch.equal(before[name], one) for name, one in book.model.state_dict().items())
    weights = prunable_weights(model).values()
    zeros = sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)
    if "remove" in choice:
        assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in before.values())
    elif choice.get("gradual") or not choice:
        assert zeros == 0
    else:
        assert math.isclose(zeros, choice.get("sparsity", 0.5), abs_tol=0.01)
        assert choice.get("pattern") != "2:4" or all(map(is_two_four, weights))
    assert (watch is None) == (not choice or "remove" in choice)


def test_the_watcher_of_an_arm_holds_its_zeros():
    model, watch = pruning.pruned(SmallBook(), {"sparsity": 0.5})
    weight = next(iter(prunable_weights(model).values()))
    zeros = weight == 0
    with torch.no_grad():
        weight += 1
    watch({"step": 1})
    assert torch.equal(weight == 0, zeros)


def test_stored_runs_are_of_the_present_program_and_recipe():
    evidence = stored_evidence("pruning")
    setting = json.loads(json.dumps({"setting": pruning.SETTING, "arms": pruning.ARMS}))
    assert {name: evidence[name] for name in setting} == setting
    assert evidence["recipe"] == RECIPE.fingerprint()
    assert evidence["date"]
    assert evidence["environment"]["torch"]
    pairs = [(run["arm"], run["seed"]) for run in evidence["runs"]]
    assert len(pairs) == len(set(pairs))
    for run in evidence["runs"]:
        wanted = pruning.ARMS[run["arm"]].get("sparsity", 0.5 if run["arm"] == "2:4" else 0.0)
        assert abs(run["sparsity"] - wanted) < 1e-4
    for row in evidence["together"]:
        report = SlimReport.from_dict(row)
        assert report.weights_ratio == row["weights_ratio"]


def test_differences_are_paired_by_seed_and_the_report_names_every_arm():
    runs = [
        {"arm": arm, "seed": seed, "bits_per_byte": value, "before": 2.0}
        for arm, values in (("dense", (1.0, 2.0)), ("magnitude 0.5", (1.5, 2.5)))
        for seed, value in enumerate(values)
    ]
    evidence = {"runs": runs, "arms": pruning.ARMS, "one_shot": [], "speed": [], "together": []}
    mean, half, count = pruning.mean_over_seeds(evidence, "magnitude 0.5", "dense")
    assert (mean, half, count) == (0.5, 0.0, 2)
    assert "magnitude 0.5" in pruning.report(evidence)


def test_another_setting_than_that_of_the_file_is_refused(tmp_path, monkeypatch):
    out = tmp_path / "pruning.json"
    given = pruning._parser().parse_args(["--out", str(out)])
    pruning._store(given, runs=[])
    pruning._store(given, speed=[1])
    assert json.loads(out.read_text())["speed"] == [1]
    monkeypatch.setitem(pruning.SETTING, "num_steps", 1)
    with pytest.raises(InputError, match="setting"):
        pruning._store(given, runs=[])
