"""A student of the model of the book: alone, with smoothed labels, and with its teacher.

    python -m benchmarks.distillation --fix       write the setting down, before the first run
    python -m benchmarks.distillation --run       all arms and seeds; goes on where it stopped
    python -m benchmarks.distillation --report    the table, from what is stored
    python -m benchmarks.distillation --quick     a few steps, writes nothing

All arms of a seed begin with the same weights and see the same windows in the same order, save
"alone, windows anywhere". Whoever changes the setting starts a new file. Chapter 13 reads it.
"""

import argparse
import datetime
import functools
import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.common import environment
from slimlab.config import ModelConfig, TrainingConfig, require
from slimlab.model.build import build_model
from slimlab.model.initialise import initialise
from slimlab.plan.params import num_params
from slimlab.slim.distill_losses import smoothed_loss, soft_loss, soft_targets
from slimlab.slim.evidence import FOLDER, mean_interval
from slimlab.text.batches import text_ids
from slimlab.text.files import write_atomically
from slimlab.train.loop import train
from slimlab.train.metrics import evaluating, held_out_loss
from slimlab.train.objectives import token_loss
from slimlab.train.recipe import RECIPE
from slimlab.train.reference import reference_model
from slimlab.train.text_model import encode_documents

OUT = FOLDER / "distillation.json"
SETTING = {
    "seeds": [0, 1, 2, 3, 4],
    "student": {"d_model": 64, "num_layers": 2, "num_heads": 2, "feed_forward": "swiglu"},
    "seq_len": 64,
    "batch_size": 4,
    "num_steps": 400,
    "peak_lr": 3e-3,
    "weight_decay": 0.1,
    "small_text": 0.1,
    "small_teacher_steps": 200,
    "measured": "loss of all held-out tokens after the last step, in windows side by side",
    "question": "distilled minus alone and minus smoothed, paired by seed: mean, 95 % interval",
}
DISTILLED = {"distill_temperature": 1.0, "soft_weight": 0.9}
HOT = {"distill_temperature": 8.0, "soft_weight": 0.5}
SMALL = {"text": "small"}
# text: what the student reads. teacher: of the book, or one that read the small text alone.
ARMS = {
    "alone": {},
    "smoothed": {"smoothing": 0.1},
    "distilled": DISTILLED,
    "small text, alone": SMALL,
    "small text, smoothed": {**SMALL, "smoothing": 0.1},
    "small text, distilled": {**SMALL, **DISTILLED},
    "small text, teacher too": {**SMALL, "teacher": "small", **DISTILLED},
    "distilled, T 2": {**DISTILLED, "distill_temperature": 2.0},
    "distilled, T 8, w 0.5": HOT,
    "distilled, T 8, w 0.5, no T squared": {**HOT, "squared": False},
}
GROUPS = (list(ARMS)[:3], list(ARMS)[3:7], list(ARMS)[7:])  # the question first, for all seeds
# Asked after the runs above: are soft targets like a larger batch? Expected before it was run: at
# least half of the way from "alone" to "distilled". It reads four times as many tokens.
LATER = {"alone, batches of 16": {"training": {"batch_size": 16}}}
# By these runs, of seed 100, the setting was chosen: held-out loss in nats per token.
PILOT = [
    {"windows": "8 x 128", "num_steps": 240, "peak_lr": 4e-3, "arm": "alone", "loss": 5.198},
    {"windows": "8 x 128", "num_steps": 240, "peak_lr": 2e-3, "arm": "alone", "loss": 5.218},
    {"windows": "8 x 128", "num_steps": 240, "peak_lr": 4e-3, "arm": "T 1, w 0.9", "loss": 4.819},
    {"windows": "8 x 128", "num_steps": 240, "peak_lr": 4e-3, "arm": "T 1, w 0.5", "loss": 5.151},
    {"windows": "8 x 128", "num_steps": 240, "peak_lr": 4e-3, "arm": "T 2, w 0.9", "loss": 5.160},
    {"windows": "8 x 128", "num_steps": 240, "peak_lr": 4e-3, "arm": "T 4, w 0.9", "loss": 5.490},
    {"windows": "4 x 64", "num_steps": 600, "peak_lr": 2e-3, "arm": "alone", "loss": 4.889},
    {"windows": "4 x 64", "num_steps": 600, "peak_lr": 4e-3, "arm": "alone", "loss": 4.915},
    {"windows": "4 x 64", "num_steps": 600, "peak_lr": 8e-3, "arm": "alone", "loss": 5.136},
    {"windows": "4 x 64", "num_steps": 600, "peak_lr": 4e-3, "arm": "T 1, w 0.9", "loss": 4.307},
    {"windows": "4 x 64", "num_steps": 600, "peak_lr": 4e-3, "arm": "T 2, w 0.9", "loss": 4.911},
    {"windows": "4 x 64", "num_steps": 600, "peak_lr": 2e-3, "arm": "T 1, w 0.9", "loss": 4.356},
    {"windows": "4 x 64", "num_steps": 600, "peak_lr": 4e-3, "arm": "small, alone", "loss": 5.829},
]


class Shared:
    """What all runs share: texts, teachers, and what these say, kept when first asked for.

    setting  SETTING, or a smaller one
    """

    def __init__(self, setting: dict):
        self.setting, self.book = setting, reference_model(progress=False)
        corpus, tokenizer = self.book.corpus, self.book.tokenizer
        ids = text_ids(encode_documents(tokenizer, corpus.train), 1)
        self.held_out = text_ids(encode_documents(tokenizer, corpus.held_out), 1)
        self.texts = {"whole": ids, "small": ids[: int(setting["small_text"] * len(ids))]}
        self.bits_per_nat = (len(self.held_out) - 1) / math.log(2) / corpus.held_out_bytes
        self._teachers, self._measured, self._logits = {"book": self.book.model}, {}, {}

    def teacher(self, name: str) -> nn.Module:
        """Return the model of the book, or one of its size that read the small text alone."""
        if name not in self._teachers:
            sizes = {key: value for key, value in RECIPE.model.items() if key != "seq_len"}
            model = new_model(sizes, self.setting["seq_len"], seed=0)
            steps = {**self.setting, "num_steps": self.setting["small_teacher_steps"]}
            train(model, self.texts["small"], training_of(steps, RECIPE.training), show=False)
            self._teachers[name] = model.eval()
        return self._teachers[name]

    def measure_teachers(self) -> dict:
        """Return what measure says of each teacher that was asked for so far."""
        for name, model in self._teachers.items():
            if name not in self._measured:
                self._measured[name] = self.measure(model)
        return dict(self._measured)

    def logits(self, teacher: str, text: str) -> Tensor:
        """Return what a teacher says of the windows of a text, (W, T, V) in 16 bits."""
        if (teacher, text) not in self._logits:
            model = self.teacher(teacher)
            inputs, _ = side_by_side(self.texts[text], self.setting["seq_len"])
            with evaluating(model):
                said = [model(part).half() for part in inputs.split(16)]
            self._logits[teacher, text] = torch.cat(said)
        return self._logits[teacher, text]

    def measure(self, model: nn.Module) -> dict:
        """Return held_out_loss in nats per token, and bits_per_byte."""
        loss = held_out_loss(model, self.held_out, self.setting["seq_len"], 16)
        bits = loss * self.bits_per_nat
        return {"held_out_loss": round(loss, 5), "bits_per_byte": round(bits, 5)}


def new_model(sizes: dict, seq_len: int, seed: int) -> nn.Module:
    """Make a model of the book's form; sizes are those of ModelConfig."""
    config = ModelConfig(RECIPE.vocab_size, seq_len, **sizes)
    return initialise(build_model(config), seed=seed, residual=RECIPE.residual)


def training_of(setting: dict, changes: dict) -> TrainingConfig:
    """Return the settings of the loop; a learning rate or seed in changes goes before."""
    names = ("num_steps", "batch_size", "seq_len", "peak_lr", "weight_decay")
    kept = {name: changes[name] for name in ("peak_lr", "seed", "batch_size") if name in changes}
    return TrainingConfig(**{name: setting[name] for name in names} | kept, device="cpu")


def run_arm(arm: dict, seed: int, shared: Shared) -> dict:
    """Train one student and measure it.

    arm     from ARMS
    seed    of weights and windows
    shared  texts and teachers
    """
    setting = shared.setting
    student = new_model(setting["student"], setting["seq_len"], seed)
    training = training_of(setting, {"seed": seed, **arm.get("training", {})})
    text, soft = arm.get("text", "whole"), "distill_temperature" in arm
    logits = shared.logits(arm.get("teacher", "book"), text) if soft else None
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    if arm.get("anywhere"):
        history = train(student, shared.texts[text], training, show=False)
    else:
        windows = side_by_side(shared.texts[text], setting["seq_len"])
        data = functools.partial(_batch_at, windows, logits, training)
        objective = functools.partial(arm_objective, arm=arm)
        objective.__name__ = "arm_objective"
        history = train(student, data, training, objective=objective, show=False)
    return {
        "seed": seed,
        **shared.measure(student),
        "last_training_loss": round(statistics.fmean(history.losses[-20:]), 4),
        "cpu_s": round(time.process_time() - start_cpu_s, 1),
        "wall_s": round(time.perf_counter() - start_s, 1),
    }


def arm_objective(model: nn.Module, batch: tuple, arm: dict) -> tuple[Tensor, int]:
    """Return the loss sum of an arm, and the number of tokens.

    model  the student
    batch  inputs, targets and, where there is a teacher, its logits
    arm    from ARMS
    """
    inputs, targets, *teacher_logits = batch
    logits = model(inputs)
    if "smoothing" in arm:
        return smoothed_loss(logits, targets, smoothing=arm["smoothing"])
    hard_sum, num_tokens = token_loss(logits, targets)
    if not teacher_logits:
        return hard_sum, num_tokens
    temperature, weight = arm["distill_temperature"], arm["soft_weight"]
    said = teacher_logits[0].float()
    soft = soft_targets(said, distill_temperature=temperature, top_k=arm.get("top_k"))
    soft_sum, _ = soft_loss(logits, targets, soft, divergence=arm.get("divergence", "forward"))
    if not arm.get("squared", True):
        soft_sum = soft_sum / temperature**2
    return weight * soft_sum + (1 - weight) * hard_sum, num_tokens


def side_by_side(ids: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
    """Cut ids (N,) into windows and the tokens that follow, (W, T) each."""
    used = ids[: (len(ids) - 1) // seq_len * seq_len + 1]
    return used[:-1].view(-1, seq_len), used[1:].view(-1, seq_len)


def _batch_at(windows: tuple, logits: Tensor | None, config: TrainingConfig, step: int) -> tuple:
    digest = hashlib.sha256(f"{config.seed} {step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
    at = torch.randint(len(windows[0]), (config.batch_size,), generator=generator)
    kept = windows if logits is None else (*windows, logits)
    return tuple(one[at] for one in kept)


def compare(evidence: dict, arm: str, other: str) -> tuple[float, float, int]:
    """Return mean and half 95 % interval of held-out loss, arm minus other, and in how many seeds
    arm is lower; paired by seed.
    """
    by_arm = {name: {} for name in (arm, other)}
    for row in evidence["runs"]:
        if row["arm"] in by_arm:
            by_arm[row["arm"]][row["seed"]] = row["held_out_loss"]
    seeds = sorted(set(by_arm[arm]) & set(by_arm[other]))
    differences = [by_arm[arm][seed] - by_arm[other][seed] for seed in seeds]
    return *mean_interval(differences), sum(one < 0 for one in differences)


def report(evidence: dict) -> str:
    """Lay out what is stored: each arm, and its difference from the same student alone."""
    lines = [f"setting fixed {evidence['setting_fixed']}: {evidence['setting']}"]
    for arm in evidence["arms"] | evidence.get("arms_later", {}):
        found = [row["held_out_loss"] for row in evidence["runs"] if row["arm"] == arm]
        if len(found) < 2:
            continue
        line = f"{arm:34s} {statistics.fmean(found):.4f} nats per token, {len(found)} seeds"
        for other in ("alone", "smoothed") if arm.startswith("distilled") else ("alone",):
            base = f"small text, {other}" if arm.startswith("small") else other
            if arm != base and any(row["arm"] == base for row in evidence["runs"]):
                mean, half, lower = compare(evidence, arm, base)
                line += f"; minus {base} {mean:+.4f} ± {half:.4f} (lower in {lower})"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for; arguments: None for those of the process."""
    given = _parser().parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.quick:
        few = {**SETTING, "num_steps": 2, "small_teacher_steps": 2, "small_text": 0.02}
        shared = Shared(few)
        for name in ("small text, alone", "small text, teacher too"):
            print(name, run_arm(ARMS[name], 0, shared))
        return
    if given.fix:
        require(not os.path.exists(given.out), "a new file", given.out, "move it away first")
        _write(given.out, _begin(given))
    with open(given.out, encoding="utf-8") as file:
        evidence = json.load(file)
    same = (evidence["setting"], evidence["arms"]) == (SETTING, ARMS)
    require(same, "the setting that was fixed", "another", "take it back, or begin a new file")
    if given.run:
        shared = Shared(SETTING)
        evidence["arms_later"] = LATER
        done = {(row["arm"], row["seed"]) for row in evidence["runs"]}
        for seed, arm in _order():
            if (arm, seed) not in done:
                row = {"arm": arm, **run_arm((ARMS | LATER)[arm], seed, shared), "at": _now()}
                evidence["teachers"] |= shared.measure_teachers()
                print(row, flush=True)
                evidence["runs"].append(row)
                _write(given.out, evidence)
    print(report(evidence))


def _order() -> list[tuple[int, str]]:
    groups = (*GROUPS, list(LATER))
    return [(seed, arm) for arms in groups for seed in SETTING["seeds"] for arm in arms]


def _begin(given: argparse.Namespace) -> dict:
    given.clock = "process_time"
    shared = Shared(SETTING)
    student = new_model(SETTING["student"], SETTING["seq_len"], seed=0)
    return {
        "setting_fixed": _now(),
        "setting": SETTING,
        "arms": ARMS,
        "pilot": PILOT,
        "corpus_fingerprint": shared.book.corpus.fingerprint,
        "recipe_fingerprint": RECIPE.fingerprint(),
        "student_params": num_params(student.config),
        "teacher_params": num_params(shared.book.model.config),
        "tokens": {name: len(ids) for name, ids in shared.texts.items()},
        "environment": environment(given),
        "teachers": {},
        "runs": [],
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write(path: str, evidence: dict) -> None:
    write_atomically(path, (json.dumps(evidence, indent=1) + "\n").encode())


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--fix", action="store_true", help="begin the file: the setting, no runs")
    made.add_argument("--run", action="store_true", help="make the runs that the file lacks")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    made.add_argument("--out", default=str(OUT), help="the file")
    return made


if __name__ == "__main__":
    main()
