"""What each choice in the recipe of the model of the book is worth, and how far seeds differ.

    python -m benchmarks.reference_recipe --seeds 0 1 2 --time   on a machine with nothing else
    python -m benchmarks.reference_recipe --changes              each change, a third of the steps
    python -m benchmarks.reference_recipe --quick                a few steps, writes nothing

Each change is made alone. Runs of one table see equally many tokens, except where a change is in
the work per token: those make fewer steps, so that processor seconds are about equal. The results
are added to slimlab/train/reference_evidence.json, which another recipe starts anew.
"""

import argparse
import datetime
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.common import environment
from slimlab.config import require
from slimlab.text.corpus import Corpus, reference_corpus
from slimlab.text.files import write_atomically
from slimlab.train.recipe import RECIPE, Recipe
from slimlab.train.reference import EVIDENCE, train_reference, training_config

STEPS, BATCH_SIZE = RECIPE.training["num_steps"], RECIPE.training["batch_size"]
CHANGES = {
    "the recipe": {},
    "learned positions": {"model": {"positions": "learned"}},
    "sinusoidal positions": {"model": {"positions": "sinusoidal"}},
    "no positions": {"model": {"positions": "none"}},
    "output projections drawn small": {"residual": "scaled"},
    "output projections drawn like the others": {"residual": "plain"},
    "GELU": {"model": {"feed_forward": "gelu"}},
    "LayerNorm": {"model": {"norm": "layer"}},
    "norm after the sum": {"model": {"norm_place": "post"}},
    "a table of its own for the output": {"model": {"tie_embeddings": False}},
    "batches half as large, twice as many": {
        "training": {"batch_size": BATCH_SIZE // 2, "num_steps": STEPS * 2}
    },
    "batches twice as large, half as many": {
        "training": {"batch_size": BATCH_SIZE * 2, "num_steps": STEPS // 2}
    },
    "learning rate halved": {"training": {"peak_lr": RECIPE.training["peak_lr"] / 2}},
    "learning rate times 2.5": {"training": {"peak_lr": RECIPE.training["peak_lr"] * 2.5}},
    "no weight decay": {"training": {"weight_decay": 0.0}},
    "ten times the weight decay": {"training": {"weight_decay": 1.0}},
    "no clipping": {"training": {"clip_norm": None}},
    "squares averaged over 1000 steps": {"training": {"betas": (0.9, 0.999)}},
    "dropout 0.1": {"model": {"dropout": 0.1}},
    "512 merges": {"vocab_size": 769},
    "1536 merges": {"vocab_size": 1793},
    "windows twice as long, half as many": {
        "model": {"seq_len": 256},
        "training": {"batch_size": BATCH_SIZE // 2},
    },
    "6 blocks, fewer steps": {
        "model": {"num_layers": 6},
        "training": {"num_steps": STEPS * 2 // 3},
    },
    "d_model 192, fewer steps": {
        "model": {"d_model": 192},
        "training": {"num_steps": STEPS * 3 // 5},
    },
}


def changed(recipe: Recipe, change: dict, fraction: int = 1) -> Recipe:
    """Apply a change of CHANGES, and divide the steps.

    recipe    to begin with
    change    values of its fields; of dicts, single entries
    fraction  a third of the steps: 3
    """
    merged = {
        name: {**getattr(recipe, name), **value} if isinstance(value, dict) else value
        for name, value in change.items()
    }
    made = replace(recipe, **merged)
    num_steps = max(made.training["num_steps"] // fraction, 1)
    return replace(made, training={**made.training, "num_steps": num_steps}, validate_every=None)


def measure(recipe: Recipe, corpus: Corpus, seed: int) -> dict:
    """Train once and say what came of it: bits per byte, processor seconds and wall seconds.

    recipe  changed or not
    corpus  the reference text
    seed    of weights and batches
    """
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    trained = train_reference(recipe, corpus, training_config(recipe, seed), progress=False)
    return {
        "seed": seed,
        "num_steps": recipe.training["num_steps"],
        "bits_per_byte": round(trained.bits_per_byte, 4),
        "cpu_s": round(time.process_time() - start_cpu_s, 1),
        "wall_s": round(time.perf_counter() - start_s, 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for.

    arguments  None: those of the process
    """
    given = _parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
    corpus = reference_corpus(held_out_fraction=RECIPE.held_out_fraction)
    if given.quick:
        for name in ("the recipe", "GELU"):
            print(name, measure(changed(RECIPE, CHANGES[name], STEPS // 2), corpus, 0))
        return
    unknown = sorted(set(given.changes or ()) - set(CHANGES))
    require(not unknown, "names of changes", f"{unknown}", f"choose from: {', '.join(CHANGES)}")
    for seed in given.seeds:
        load_before = _load()
        row = measure(changed(RECIPE, {}), corpus, seed)
        _add(
            "full_runs",
            {**row, "threads": given.threads, "load_before": load_before},
            given,
            corpus,
        )
    for name in CHANGES if given.changes == [] else given.changes or ():
        for seed in given.change_seeds:
            row = measure(changed(RECIPE, CHANGES[name], given.fraction), corpus, seed)
            _add("ablations", {"change": name, **row}, given, corpus)


def _add(table: str, row: dict, given: argparse.Namespace, corpus: Corpus) -> None:
    """Put a row into the file, in the place of that of the same change, seed and steps."""
    print(row, flush=True)
    evidence = _read_or_begin(given, corpus)
    keys = ("change", "seed", "num_steps")
    old = [r for r in evidence[table] if all(r.get(k) == row.get(k) for k in keys)]
    if table == "full_runs":
        earlier = {**old[0]} if old else {}
        row["quiet_wall_s"] = row["wall_s"] if given.time else earlier.get("quiet_wall_s")
    evidence[table] = [r for r in evidence[table] if r not in old] + [row]
    write_atomically(given.out, (json.dumps(evidence, indent=1) + "\n").encode())


def _read_or_begin(given: argparse.Namespace, corpus: Corpus) -> dict:
    fingerprint = RECIPE.fingerprint()
    if os.path.exists(given.out):
        with open(given.out, encoding="utf-8") as file:
            evidence = json.load(file)
        if evidence["recipe_fingerprint"] == fingerprint:
            return evidence
    given.clock = "process_time"
    return {
        "recipe_fingerprint": fingerprint,
        "corpus_fingerprint": corpus.fingerprint,
        "corpus": corpus.describe(),
        "date": datetime.date.today().isoformat(),
        "environment": environment(given),
        "full_runs": [],
        "ablations": [],
        "trials": [],
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--seeds", type=int, nargs="*", default=[], help="full runs of the recipe")
    made.add_argument("--time", action="store_true", help="the machine is quiet: keep wall times")
    made.add_argument("--changes", nargs="*", help="names of changes, none for all")
    made.add_argument("--change-seeds", type=int, nargs="*", default=[0], help="default 0")
    made.add_argument("--fraction", type=int, default=3, help="of the steps (default 3: a third)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    made.add_argument("--out", default=str(EVIDENCE), help="the file to add to")
    return made


if __name__ == "__main__":
    main()
