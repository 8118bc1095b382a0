"""What was measured for the recipe of the book's model: of the present recipe, and repeatable."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import reference_recipe
from slimlab.config import InputError, ModelConfig
from slimlab.text.corpus import corpus_from
from slimlab.train.recipe import RECIPE, Recipe
from slimlab.train.reference import reference_evidence, training_config

SMALL = Recipe(
    vocab_size=262,
    model={"seq_len": 12, "d_model": 16, "num_layers": 1, "num_heads": 2},
    training={"num_steps": 7, "batch_size": 3, "peak_lr": 1e-2},
)
WORDS = ["the", "cat", "and", "a", "dog", "sat", "or", "ran", "on", "under", "over", "our", "mat"]


@pytest.fixture
def corpus():
    texts = [" ".join(WORDS[(n * 7 + i * i) % 13] for i in range(60)) for n in range(6)]
    return corpus_from(texts, "words", held_out_fraction=0.2)


def test_the_evidence_is_that_of_the_present_recipe():
    evidence = reference_evidence()
    assert evidence["recipe_fingerprint"] == RECIPE.fingerprint()
    runs = {run["seed"]: run for run in evidence["full_runs"]}
    assert set(runs) >= {0, 1, 2}
    assert all(run["num_steps"] == RECIPE.training["num_steps"] for run in runs.values())
    # The bound of the book: 0.72 of gzip's 2.65 on the text of Python 3.11.
    assert max(run["bits_per_byte"] for run in runs.values()) < 0.72 * 2.646
    changes = {row["change"] for row in evidence["ablations"]}
    assert changes <= set(reference_recipe.CHANGES)
    assert {"GELU", "learned positions", "output projections drawn small"} <= changes


def test_every_change_of_the_evidence_makes_another_recipe_that_is_valid():
    seen = set()
    for change in reference_recipe.CHANGES.values():
        recipe = reference_recipe.changed(RECIPE, change, fraction=3)
        ModelConfig(vocab_size=recipe.vocab_size, **recipe.model)
        training_config(recipe)
        seen.add(recipe.fingerprint())
    assert len(seen) == len(reference_recipe.CHANGES)


def test_the_script_of_the_evidence_adds_rows_and_begins_anew_for_another_recipe(
    tmp_path, monkeypatch, corpus
):
    out = tmp_path / "evidence.json"
    monkeypatch.setattr(reference_recipe, "RECIPE", SMALL)
    monkeypatch.setattr(reference_recipe, "reference_corpus", lambda **_: corpus)
    threads = str(torch.get_num_threads())
    run = ["--out", str(out), "--threads", threads]
    reference_recipe.main([*run, "--seeds", "0", "1", "--changes", "GELU"])
    reference_recipe.main([*run, "--seeds", "1", "--time"])
    found = json.loads(out.read_text())
    assert [(one["seed"], one["quiet_wall_s"] is None) for one in found["full_runs"]] == [
        (0, True),
        (1, False),
    ]
    assert [(one["change"], one["num_steps"]) for one in found["ablations"]] == [("GELU", 2)]
    with pytest.raises(InputError, match="GELU"):
        reference_recipe.main([*run, "--changes", "gelu"])
    monkeypatch.setattr(reference_recipe, "RECIPE", replace(SMALL, vocab_size=263))
    reference_recipe.main([*run, "--seeds", "2"])
    found = json.loads(out.read_text())
    assert [one["seed"] for one in found["full_runs"]] == [2]
    assert found["ablations"] == []
