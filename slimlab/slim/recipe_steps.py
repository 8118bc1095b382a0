"""The steps of slim_checkpoint, one function each, and how the result is written.

Chapter 15 puts them together by calling recipe.py. Every training here is the ordinary loop with
the objective of slimlab.slim.distill; every removal is for good, so the model after a step is an
ordinary model with a configuration of its own.

Production runs the steps as jobs of their own, days apart, with an evaluation between.
"""

import time
from dataclasses import asdict
from math import gcd
from pathlib import Path

import torch
from torch import nn

from slimlab.config import require
from slimlab.model.tensor_files import state_of
from slimlab.model.transformer import Decoder
from slimlab.plan.quantized_size import safetensors_bytes
from slimlab.slim import prune_file, quantize_pack
from slimlab.slim.distill import freeze
from slimlab.slim.distill_start import spread_layers, student_from_layers
from slimlab.slim.measure import count_numbers
from slimlab.slim.prune_file import packed_state, save_sparse_model
from slimlab.slim.quantize_file import save_quantized_model
from slimlab.slim.recipe_config import MASKED, SlimConfig
from slimlab.slim.recipe_prune import prune_step, sizes_left
from slimlab.slim.recipe_quantize import quantize_step
from slimlab.slim.recipe_work import Work, learn
from slimlab.slim.report import Stage
from slimlab.text.tokenizer import Tokenizer
from slimlab.train.checkpoint import save_checkpoint
from slimlab.train.checkpoint_folder import FORMAT


def check_steps(model: Decoder, config: SlimConfig) -> None:
    """Refuse sizes that the model has not, before anything is trained.

    model   the original, left as it is
    config  what is to be done with it

    Raises InputError with the nearest size that there is.
    """
    sizes = model.config
    num_layers = _student_layers(sizes.num_layers, config)
    halved = config.distill and config.student_layers is None
    asked, change = "an original of at least 2 layers to halve", "prune instead: prune=0.5"
    require(not halved or sizes.num_layers > 1, asked, "1 layer", f"{change}; or student_layers=1")
    given = f"student_layers = {num_layers}"
    asked, change = f"at most {sizes.num_layers} layers, as the original has", "take fewer"
    require(num_layers <= sizes.num_layers, asked, given, change)
    left = sizes_left(model, config)
    if config.quantize is not None and config.quant_group_size is not None:
        widths = sorted({sizes.d_model, left["neurons"], left["heads"] * sizes.d_head})
        size, common = config.quant_group_size, gcd(*widths)
        fitting = [n for n in range(1, common + 1) if common % n == 0]
        require(
            common % size == 0,
            f"a quant_group_size that divides every width, {', '.join(map(str, widths))}",
            f"quant_group_size = {size}",
            "leave quant_group_size out, and each width gets its own; the nearest that divides all "
            f"is {min(fitting, key=lambda n: abs(n - size))}",
        )


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
        ("pruned", prune_step, config.prune is not None),
        ("quantized", quantize_step, config.quantize is not None),
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
    size = _file_bytes(model, name == "pruned" and work.config.prune_what in MASKED)
    return Stage(name, count_numbers(model), size, work.measure(model), seconds)


def _file_bytes(model: nn.Module, packed: bool) -> int:
    """Predict the file that a model would be saved in; a test compares it with the one on disk."""
    kinds = {torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16"}
    kinds |= {torch.int8: "I8", torch.uint8: "U8"}
    tensors, metadata = packed_state(model)[0] if packed else state_of(model), {"format": FORMAT}
    if packed:
        metadata = prune_file.METADATA
    elif not _is_whole(model):
        metadata = quantize_pack.METADATA
        tensors = {name.replace(".table.", ".weight."): one for name, one in tensors.items()}
    shapes = {name: (kinds[one.dtype], tuple(one.shape)) for name, one in tensors.items()}
    return safetensors_bytes(shapes, metadata)


def _is_whole(model: nn.Module) -> bool:
    """Tell whether linear layers have 32 bits: an ordinary checkpoint can hold the model."""
    layers = [one for one in model.modules() if isinstance(one, nn.Linear)]
    return any(one.weight.dtype == torch.float32 for one in layers)


def _distil(model: Decoder, work: Work) -> Decoder:
    config = work.config
    count = _student_layers(model.config.num_layers, config)
    student = student_from_layers(model, spread_layers(model.config.num_layers, count))
    return learn(student, work, config.distill_steps)


def _student_layers(num_layers: int, config: SlimConfig) -> int:
    if not config.distill:
        return num_layers
    return config.student_layers or max(1, num_layers // 2)


def write_model(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, config: SlimConfig, text: str
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
    about = {"slim": asdict(config), "text": text}
    if not _is_whole(model):
        place = save_quantized_model(folder, model, about)
    elif config.prune is not None and config.prune_what in MASKED:
        place = save_sparse_model(folder, model, about)
    else:
        folder.mkdir()
        steps = config.distill_steps if config.distill else 0
        steps += config.prune_steps if config.prune is not None else 0
        stored = {"model": model.config, "notes": about}
        place = save_checkpoint(folder, model=model, step=steps, config=stored)
    tokenizer.save(folder / "tokenizer.json")
    return place
