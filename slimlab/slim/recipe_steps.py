"""The steps of slim_checkpoint, one function each, and how the result is written.

Chapter 15 puts them together by calling recipe.py. Every training here is the ordinary loop with
the objective of slimlab.slim.distill; every removal is for good, so the model after a step is an
ordinary model with a configuration of its own.

Production runs the steps as jobs of their own, days apart, with an evaluation between.
"""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.config import TrainingConfig, require
from slimlab.model.tensor_files import state_of
from slimlab.model.transformer import Decoder
from slimlab.plan.quantized_size import QuantScheme, safetensors_bytes
from slimlab.slim.distill import DistillationObjective, freeze
from slimlab.slim.distill_start import spread_layers, student_from_layers
from slimlab.slim.prune_structure import (
    head_scores,
    neuron_scores,
    remove_heads,
    remove_neurons,
    weakest,
)
from slimlab.slim.quantize import quantize_model
from slimlab.slim.quantize_file import save_quantized_model
from slimlab.slim.quantize_pack import METADATA
from slimlab.slim.quantize_training import FakeQuantizedEmbedding, FakeQuantizedLinear
from slimlab.slim.recipe_config import SlimConfig
from slimlab.slim.report import Stage, count_numbers
from slimlab.text.batches import token_windows
from slimlab.text.progress import progress_bar
from slimlab.text.tokenizer import Tokenizer
from slimlab.train.checkpoint import save_checkpoint
from slimlab.train.checkpoint_folder import FORMAT
from slimlab.train.loop import train

GROUP_SIZE, LEAST_GROUP = 32, 16
CALIBRATION_BATCHES, CALIBRATION_WINDOWS = 8, 8


@dataclass(frozen=True)
class Work:
    """What every step needs.

    teacher  the original
    ids      (N,) of the text to learn from
    measure  model -> bits per byte of the held-out text
    config   a SlimConfig
    show     draw bars
    say      told what is being done
    """

    teacher: Decoder = field(repr=False)
    ids: Tensor = field(repr=False)
    measure: Callable[[nn.Module], float]
    config: SlimConfig
    show: bool
    say: Callable[[str], None]


def check_steps(model: Decoder, config: SlimConfig) -> None:
    """Refuse sizes that the model has not, before anything is trained.

    model   the original, left as it is
    config  what is to be done with it

    Raises InputError with the nearest size that there is.
    """
    sizes = model.config
    num_layers = _student_layers(sizes.num_layers, config)
    given = f"student_layers = {num_layers}"
    asked, change = f"at most {sizes.num_layers} layers, as the original has", "take fewer"
    require(num_layers <= sizes.num_layers, asked, given, change)
    d_ff = sizes.d_ff
    if config.prune is not None:
        for name, (count, step) in _prunable(model, config).items():
            gone = _num_removed(config.prune, count, step)
            most = (count - step) / count
            require(
                gone < count,
                f"a sparsity that leaves something of the {count} {name} of a layer",
                f"prune = {config.prune:g}, all {count} would go",
                f"give at most {int(1000 * most) / 1000:g}",
            )
            if name == "neurons":
                d_ff -= gone
    if config.quantize is not None:
        for width in (sizes.d_model, d_ff, sizes.num_heads * sizes.d_head):
            _scheme_of(config, width).scale_shape((1, width))


def run_steps(work: Work) -> tuple[list[Stage], nn.Module]:
    """Take the steps that are asked for, one after the other.

    work     what they need
    returns  a Stage for the original and for each step, and the model after the last

    Raises InputError as the steps do, and if a training diverges.
    """
    config, model = work.config, work.teacher
    freeze(work.teacher)
    stages = [_stage("original", model, work, time.perf_counter())]
    steps = (
        ("distilled", _distil, config.distill),
        ("pruned", _prune, config.prune is not None),
        ("quantized", _quantize, config.quantize is not None),
    )
    for name, step, asked in steps:
        if asked:
            start_s = time.perf_counter()
            model = step(model, work)
            stages.append(_stage(name, model, work, start_s))
            done = stages[-1]
            work.say(
                f"{name}: {done.num_params:,} numbers, {done.weights_bytes:,} bytes, "
                f"{done.bits_per_byte:.4f} bits per byte, {done.seconds:.0f} s"
            )
    return stages, model.eval()


def _stage(name: str, model: nn.Module, work: Work, start_s: float) -> Stage:
    seconds = time.perf_counter() - start_s
    return Stage(name, count_numbers(model), _file_bytes(model), work.measure(model), seconds)


def _file_bytes(model: nn.Module) -> int:
    """Predict the file that a model would be saved in; a test compares it with the one on disk."""
    kinds = {torch.float32: "F32", torch.int8: "I8", torch.uint8: "U8", torch.bfloat16: "BF16"}
    tensors = {
        name.replace(".table.", ".weight."): (kinds[one.dtype], tuple(one.shape))
        for name, one in state_of(model).items()
    }
    whole = any(isinstance(one, nn.Linear) for one in model.modules())
    return safetensors_bytes(tensors, {"format": FORMAT} if whole else METADATA)


def _distil(model: Decoder, work: Work) -> Decoder:
    config = work.config
    count = _student_layers(model.config.num_layers, config)
    student = student_from_layers(model, spread_layers(model.config.num_layers, count))
    return _learn(student, work, config.distill_steps)


def _prune(model: Decoder, work: Work) -> Decoder:
    config, smaller = work.config, copy.deepcopy(model)
    prunable = _prunable(model, config)
    if "heads" in prunable:
        count, step = prunable["heads"]
        gone = _num_removed(config.prune, count, step)
        heads = weakest(head_scores(smaller), gone, num_groups=step)
        smaller = remove_heads(smaller, heads) if gone else smaller
    if "neurons" in prunable:
        gone = _num_removed(config.prune, *prunable["neurons"])
        smaller = remove_neurons(smaller, weakest(neuron_scores(smaller), gone))
    return _learn(smaller, work, config.prune_steps)


def _quantize(model: Decoder, work: Work) -> nn.Module:
    """Layers of one width at a time, since the size of their groups depends on it."""
    config, small = work.config, model
    if config.aware_steps:
        small = _learn(_pretending(copy.deepcopy(small), config), work, config.aware_steps)
    below = config.quantize != "int8"
    rounding = config.rounding or ("compensated" if below else "nearest")
    layers = _layers(small)
    schemes = {name: _scheme_of(config, one.weight.shape[1]) for name, one in layers.items()}
    batches = _calibration(work) if rounding == "compensated" else None
    for scheme in dict.fromkeys(schemes.values()):
        small = quantize_model(
            small,
            scheme,
            activations=config.activations,
            rounding=rounding,
            batches=batches,
            skip=[
                name for name, one in schemes.items() if one != scheme and name in _layers(small)
            ],
        )
    return small


def _in_turn(schemes: Iterable[QuantScheme], show: bool) -> Iterator[QuantScheme]:
    different = list(dict.fromkeys(schemes))
    with progress_bar("quantizing", len(different), shown=show) as bar:
        for scheme in different:
            yield scheme
            bar.update()


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: one
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear | nn.Embedding)
    }


def _pretending(model: Decoder, config: SlimConfig) -> Decoder:
    for name, one in _layers(model).items():
        scheme = _scheme_of(config, one.weight.shape[1])
        if isinstance(one, nn.Linear):
            layer = FakeQuantizedLinear(one, scheme, config.activations != "none")
        else:
            layer = FakeQuantizedEmbedding(one, scheme)
        model.set_submodule(name, layer)
    return model


def _calibration(work: Work) -> list[Tensor]:
    seq_len = work.teacher.config.seq_len
    drawn = token_windows(
        work.ids, seq_len, CALIBRATION_WINDOWS, CALIBRATION_BATCHES, work.config.seed
    )
    return [inputs for inputs, _ in drawn]


def _learn(model: Decoder, work: Work, num_steps: int) -> Decoder:
    """Train by text and original together."""
    config = work.config
    if not num_steps:
        return model
    settings = TrainingConfig(
        num_steps=num_steps,
        batch_size=config.batch_size,
        seq_len=model.config.seq_len,
        peak_lr=config.peak_lr,
        seed=config.seed,
        device="cpu",
    )
    objective = DistillationObjective(
        work.teacher,
        distill_temperature=config.distill_temperature,
        soft_weight=config.soft_weight,
        divergence=config.divergence,
    )
    model.requires_grad_(True)
    train(model, work.ids, settings, objective=objective, show=work.show, say=work.say)
    return model.eval()


def _student_layers(num_layers: int, config: SlimConfig) -> int:
    if not config.distill:
        return num_layers
    return config.student_layers or max(1, num_layers // 2)


def _prunable(model: Decoder, config: SlimConfig) -> dict[str, tuple[int, int]]:
    """What is removed: name -> how many a layer has, and the number that must go together."""
    sizes = model.config
    parts = {"neurons": (sizes.d_ff, 1), "heads": (sizes.num_heads, sizes.num_kv_heads)}
    if sizes.num_kv_heads == sizes.num_heads:
        parts["heads"] = (sizes.num_heads, 1)
    return parts if config.prune_what == "both" else {config.prune_what: parts[config.prune_what]}


def _num_removed(sparsity: float, count: int, step: int) -> int:
    return step * round(sparsity * count / step)


def _scheme_of(config: SlimConfig, width: int) -> QuantScheme:
    """How a matrix of so many columns becomes integers."""
    num_bits = int(config.quantize.removeprefix("int"))
    if num_bits == 8:
        return QuantScheme(8)
    size = config.quant_group_size
    if size is None:
        fitting = [n for n in range(LEAST_GROUP, width + 1) if width % n == 0]
        size = min(fitting or [width], key=lambda n: abs(n - GROUP_SIZE))
    return QuantScheme(num_bits, granularity="group", quant_group_size=size, scale_dtype="bfloat16")


def write_model(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, config: dict, text: str
) -> Path:
    """Write what the last step left.

    folder     made here
    model      of integers or floats
    tokenizer  its own, which is written beside it
    config     of the recipe
    text       fingerprint of the corpus
    returns    the folder in which the weights lie

    Raises InputError or OSError if it cannot be written.
    """
    about = {"slim": config, "text": text}
    if any(isinstance(one, nn.Linear) for one in model.modules()):
        folder.mkdir()
        steps = config["distill_steps"] * config["distill"]
        steps += config["prune_steps"] * (config["prune"] is not None)
        stored = {"model": model.config, "notes": about}
        place = save_checkpoint(folder, model=model, step=steps, config=stored)
    else:
        place = save_quantized_model(folder, model, about)
    tokenizer.save(folder / "tokenizer.json")
    return place
