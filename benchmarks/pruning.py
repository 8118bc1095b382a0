"""What pruning costs the model of the book, with and without retraining, and what it gains.

    python -m benchmarks.pruning --one-shot              no retraining: criteria, sparsities
    python -m benchmarks.pruning --retrain 0 1 2 3 4     every arm, for these seeds
    python -m benchmarks.pruning --speed                 dense, masked, CSR, 2:4, removed; in turns
    python -m benchmarks.pruning --together              recipes of slim_checkpoint, with reports
    python -m benchmarks.pruning --report                the tables, from what is stored
    python -m benchmarks.pruning --quick                 a few steps, writes nothing

All arms of a seed see the same windows in the same order, equally many of them and with the same
learning rate; "dense" is the control, trained as long and not pruned. Results are added to
slimlab/slim/evidence/pruning.json, which chapter 15 reads; who changes the setting starts anew.
"""

import argparse
import copy
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.common import environment
from slimlab.config import TrainingConfig, require
from slimlab.slim.evidence import FOLDER, mean_interval
from slimlab.slim.prune_compensate import prune_compensated
from slimlab.slim.prune_masks import PruneMasks, two_four_mask
from slimlab.slim.prune_scores import magnitude_masks, prunable_weights
from slimlab.slim.prune_structure import (
    head_scores,
    neuron_scores,
    remove_heads,
    remove_layers,
    remove_neurons,
    weakest,
)
from slimlab.slim.prune_training import GradualMasks
from slimlab.slim.recipe import slim_checkpoint
from slimlab.slim.recipe_config import SlimConfig
from slimlab.text.batches import token_windows
from slimlab.text.files import write_atomically
from slimlab.train.loop import train
from slimlab.train.recipe import RECIPE
from slimlab.train.reference import ReferenceModel, reference_model
from slimlab.train.text_model import encode_documents, held_out_bits_per_byte

OUT = FOLDER / "pruning.json"
SETTING = {
    "num_steps": 40,
    "batch_size": 8,
    "peak_lr": 5e-4,
    "calibration_windows": 32,
    "rise_steps": 25,
    "rise_every": 5,
    "chosen": "peak_lr among 3e-4, 5e-4 and 1e-3, with a seed that is used for nothing else",
    "measured": "bits per byte of all held-out text, after the last step",
}
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# What is done to the model before it is trained on. Nothing: the control.
ARMS = {
    "dense": {},
    **{f"magnitude {s:g}": {"sparsity": s} for s in (0.3, 0.5, 0.7, 0.8, 0.9)},
    "2:4": {"pattern": "2:4"},
    "gradual 0.9": {"sparsity": 0.9, "gradual": True},
    "compensated 0.9": {"sparsity": 0.9, "compensated": True},
    "half the neurons": {"remove": {"neurons": 0.5}},
    "half the heads": {"remove": {"heads": 0.5}},
    "half of both": {"remove": {"heads": 0.5, "neurons": 0.5}},
    "one of four layers": {"remove": {"layers": [2]}},
}
TIMED = (
    *("dense", "magnitude 0.5", "magnitude 0.9", "half the neurons"),
    *("half of both", "one of four layers"),
)
ALL_THREE = {"distill": True, "prune": 0.5}
TOGETHER = {
    "8 bits": {"quantize": "int8"},
    "4 bits": {"quantize": "int4"},
    "all three, 8 bits": {**ALL_THREE, "quantize": "int8"},
    "all three, 4 bits": {**ALL_THREE, "quantize": "int4"},
    "pruned, 4 bits": {"prune": 0.5, "quantize": "int4"},
    "pruned, 8 bits": {"prune": 0.5, "quantize": "int8"},
    "distilled, 8 bits": {"distill": True, "quantize": "int8"},
    "a little of all, 4 bits": {
        **{"distill": True, "student_layers": 3, "prune": 0.25},
        **{"quantize": "int4", "aware_steps": 40},
    },
}
RECIPE_STEPS = {"distill_steps": 80, "prune_steps": 40, "seed": 0}


class Book:
    """The model of the book and its texts; `changed` of a copy is measured by `measure`."""

    def __init__(self):
        self.trained: ReferenceModel = reference_model(progress=False)
        self.model = self.trained.model
        ids = encode_documents(self.trained.tokenizer, self.trained.corpus.train)
        self.ids = torch.as_tensor(ids)
        seq_len, count = RECIPE.model["seq_len"], SETTING["calibration_windows"] // 8
        self.calibration = [x for x, _ in token_windows(self.ids, seq_len, 8, count, 0)]

    def measure(self, model: nn.Module) -> float:
        """Return bits per byte of the held-out text."""
        trained = self.trained
        return round(held_out_bits_per_byte(model, trained.tokenizer, trained.corpus), 5)


def pruned(book: Book, arm: dict) -> tuple[nn.Module, Callable | None]:
    """Prune a copy of the model; return it and what keeps it pruned while it trains.

    book  the model
    arm   from ARMS
    """
    model = copy.deepcopy(book.model)
    if "remove" in arm:
        return removed(model, arm["remove"], book.calibration), None
    if arm.get("gradual"):
        rise = {"num_steps": SETTING["rise_steps"], "every": SETTING["rise_every"]}
        return model, GradualMasks(model, final_sparsity=arm["sparsity"], **rise)
    weights = prunable_weights(model)
    pattern = arm.get("pattern", "free")
    if arm.get("compensated"):
        sparsity = arm.get("sparsity", 0.5)
        masks = prune_compensated(model, book.calibration, sparsity, pattern=pattern, in_turn=False)
    elif pattern == "2:4":
        masks = {name: two_four_mask(weight) for name, weight in weights.items()}
    elif "sparsity" in arm:
        masks = magnitude_masks(weights, arm["sparsity"], scope=arm.get("scope", "layer"))
    else:
        return model, None
    held = PruneMasks(model, masks)
    return model, lambda record: held.apply()


def removed(model: nn.Module, parts: dict, windows: list | None) -> nn.Module:
    """Remove parts for good: the given fraction of heads and neurons, and layers by number.

    windows  on which heads and neurons are judged by what they write; None: by norms of weights
    """
    if "layers" in parts:
        model = remove_layers(model, parts["layers"])
    if "heads" in parts:
        gone = round(parts["heads"] * model.config.num_heads)
        model = remove_heads(model, weakest(head_scores(model, windows), gone))
    if "neurons" in parts:
        gone = round(parts["neurons"] * model.config.d_ff)
        model = remove_neurons(model, weakest(neuron_scores(model, windows), gone))
    return model


def retrain(book: Book, arm: dict, seed: int, num_steps: int) -> dict:
    """Prune, measure, train on and measure again."""
    model, watch = pruned(book, arm)
    before = book.measure(model)
    config = TrainingConfig(
        num_steps,
        SETTING["batch_size"],
        RECIPE.model["seq_len"],
        peak_lr=SETTING["peak_lr"],
        seed=1000 + seed,  # other windows than those of the model's own training
        device="cpu",
    )
    start_s = time.process_time()
    train(model, book.ids, config, show=False, watch=watch)
    weights = prunable_weights(model).values()
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "seed": seed,
        "before": before,
        "bits_per_byte": book.measure(model),
        "num_params": sum(param.numel() for param in model.parameters()),
        "sparsity": round(zeros / sum(weight.numel() for weight in weights), 6),
        "cpu_s": round(time.process_time() - start_s, 1),
    }


def one_shot(book: Book) -> list[dict]:
    """Measure every criterion at every sparsity, without training."""
    rows = [{"method": "dense", "sparsity": 0.0, "bits_per_byte": book.measure(book.model)}]
    methods = {"magnitude": {}, "global magnitude": {"scope": "global"}}
    for name, more in (methods | {"compensated": {"compensated": True}}).items():
        for sparsity in SPARSITIES:
            model, _ = pruned(book, {"sparsity": sparsity, **more})
            rows.append(_shot(name, sparsity, book.measure(model)))
        model = pruned(book, {"pattern": "2:4", **more})[0]
        if name != "global magnitude":
            rows.append(_shot(f"{name}, 2:4", 0.5, book.measure(model)))
    for part in ("neurons", "heads"):
        for fraction in (0.25, 0.5, 0.75):
            for name, windows in ((part, book.calibration), (f"{part}, by norm", None)):
                model = removed(copy.deepcopy(book.model), {part: fraction}, windows)
                rows.append(_shot(name, fraction, book.measure(model)))
    for layer in range(book.model.config.num_layers):
        model = removed(copy.deepcopy(book.model), {"layers": [layer]}, None)
        rows.append(_shot(f"layer {layer}", 0.25, book.measure(model)))
    return rows


def _shot(method: str, sparsity: float, measured: float) -> dict:
    row = {"method": method, "sparsity": sparsity, "bits_per_byte": measured}
    print(row, flush=True)
    return row


def together(name: str, changes: dict, steps: dict) -> dict:
    """Make one small model by the recipe, and keep its report."""
    config = SlimConfig(**changes, **steps)
    with tempfile.TemporaryDirectory() as folder:
        report = slim_checkpoint("book", f"{folder}/small", config, show=False, say=lambda _: None)
    found = report.as_dict()
    found["source"], found["out"] = "book", name
    return {"name": name, **found}


def mean_over_seeds(evidence: dict, arm: str, minus: str | None = None) -> tuple[float, float, int]:
    """Return mean, half 95 % interval and number of seeds of an arm; minus another, by seed."""
    by_seed = {row["seed"]: row["bits_per_byte"] for row in evidence["runs"] if row["arm"] == arm}
    other = {
        row["seed"]: row["bits_per_byte"] for row in evidence["runs"] if row["arm"] == minus
    } or dict.fromkeys(by_seed, 0.0)
    values = [by_seed[seed] - other[seed] for seed in sorted(set(by_seed) & set(other))]
    return *mean_interval(values), len(values)


def report(evidence: dict) -> str:
    """Lay out what is stored."""
    lines = [f"{row['method']:24}{row['sparsity']:6.2f}  {row['bits_per_byte']:.4f}"
             for row in evidence["one_shot"]]  # fmt: skip
    for arm in evidence["arms"]:
        rows = [row for row in evidence["runs"] if row["arm"] == arm]
        if len(rows) >= 2:
            mean, half, count = mean_over_seeds(evidence, arm)
            more, wide, _ = mean_over_seeds(evidence, arm, "dense")
            lines.append(
                f"{arm:24}{statistics.fmean(r['before'] for r in rows):.4f} -> "
                f"{mean:.4f} ± {half:.4f}, minus dense {more:+.4f} ± {wide:.4f}, {count} seeds"
            )
    for row in evidence["speed"]:
        interval = " to ".join(f"{one:.2f}" for one in row["interval_95"] or ())
        lines.append(
            f"{row['task']:32}{row['rival']:26}{1e3 * row['median_s']:9.3f} ms "
            f"{row['ratio']:6.2f} ({interval})"
        )
    for row in evidence["together"]:
        ratio = row["reading_ratio"]["median"], row["writing_ratio"]["median"]
        lines.append(
            f"{row['name']:24}file {row['weights_ratio']:.3f}, {row['slim']['bits_per_byte']:.4f} "
            f"bits per byte ({row['price']:+.4f}), reads {ratio[0]:.2f}, writes {ratio[1]:.2f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; arguments: None for those of the process."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.report:
        print(report(_read_or_begin(given)))
        return
    book = Book()
    if given.quick:
        for arm in ("2:4", "gradual 0.9", "half of both"):
            print(arm, retrain(book, ARMS[arm], 0, 1))
        return
    if given.one_shot:
        _store(given, one_shot=one_shot(book))
    for seed in given.retrain:
        for arm in given.arms or ARMS:
            evidence = _read_or_begin(given)
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in evidence["runs"]):
                row = {"arm": arm, **retrain(book, ARMS[arm], seed, SETTING["num_steps"])}
                print(row, flush=True)
                _store(given, runs=[*evidence["runs"], row])
    if given.speed:
        from benchmarks.pruning_speed import speed, two_four_on_a_processor

        where = {"load_before_speed": [round(one, 2) for one in os.getloadavg()]}
        models = {arm: pruned(book, ARMS[arm])[0].eval() for arm in TIMED}
        found = speed(models, book.calibration[0], given.rounds)
        _store(given, speed=found, **where, two_four_says=two_four_on_a_processor())
    if given.together is not None:
        for name in given.together or TOGETHER:
            evidence = _read_or_begin(given)
            row = together(name, TOGETHER[name], RECIPE_STEPS)
            print(name, row["weights_ratio"], row["slim"]["bits_per_byte"], flush=True)
            others = [one for one in evidence["together"] if one["name"] != name]
            _store(given, together=[*others, row])
    print(report(_read_or_begin(given)))


def _store(given: argparse.Namespace, **found: object) -> None:
    evidence = {**_read_or_begin(given), **found}
    write_atomically(given.out, (json.dumps(evidence, indent=1) + "\n").encode())


def _read_or_begin(given: argparse.Namespace) -> dict:
    setting = {"setting": SETTING, "arms": ARMS, "recipe": RECIPE.fingerprint()}
    if os.path.exists(given.out):
        with open(given.out, encoding="utf-8") as file:
            evidence = json.load(file)
        same = json.dumps({name: evidence[name] for name in setting}) == json.dumps(setting)
        require(same, "the setting of the file", "another", "take it back, or move the file away")
        return evidence
    given.clock = "wall"
    empty = {name: [] for name in ("one_shot", "runs", "speed", "together")}
    about = {"date": datetime.date.today().isoformat(), "environment": environment(given)}
    return {**setting, **about, **empty}


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--one-shot", action="store_true", help="criteria without retraining")
    made.add_argument("--retrain", type=int, nargs="*", default=[], help="seeds")
    made.add_argument("--arms", nargs="*", choices=ARMS, help="names of arms, all if not given")
    made.add_argument("--speed", action="store_true", help="needs a quiet machine")
    made.add_argument("--together", nargs="*", help="names of recipes, none for all")
    made.add_argument("--report", action="store_true", help="the tables of what is stored")
    made.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    made.add_argument("--rounds", type=int, default=15)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", default=str(OUT), help="the file to add to")
    return made


if __name__ == "__main__":
    main()
