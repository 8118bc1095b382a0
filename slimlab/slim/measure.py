"""What a model weighs, how well it predicts and how fast it is, beside the model it came from.

slim_checkpoint measures both sides with it; chapter 15 explains the numbers. Times are taken in
turns, the original and the small model one after the other in each round, so that a busy machine
disturbs both; the ratio of a round is more certain than either time.

Production measures on the machine that will serve, under its load, and keeps latencies of the
slowest hundredth as well.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.config import require
from slimlab.model.generation import generate
from slimlab.slim.load import folder_bytes, weight_files
from slimlab.slim.quantize_layers import QuantizedWeight
from slimlab.slim.report import Measured, Spread
from slimlab.text.batches import consecutive_windows
from slimlab.text.progress import progress_bar
from slimlab.train.metrics import total_loss
from slimlab.train.objectives import bits_per_byte

ROUNDS = 5
MEASURED_WINDOWS = 16
READ_WINDOWS, WRITTEN_TOKENS = 8, 16


def held_bytes(model: nn.Module) -> int:
    """Count the bytes of the tensors that a model holds, shared ones once.

    model  any
    """
    held = [*model.parameters(), *model.buffers()]
    own = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in held}
    return sum(own.values())


def count_numbers(model: nn.Module) -> int:
    """Count the numbers that a model was trained to have, whether floats or integers.

    model  parameters, quantized weights and their biases count, scales do not
    """
    tables = [one for one in model.modules() if isinstance(one, QuantizedWeight)]
    integers = sum(one.shape[0] * one.shape[1] for one in tables)
    # Layers of integers hold their bias as a buffer, in floats.
    biases = [one for name, one in model.named_buffers() if name.split(".")[-1] == "bias"]
    floats = [*model.parameters(), *biases]
    return integers + sum(one.numel() for one in floats)


def measure_quality(model: nn.Module, ids: Tensor, num_bytes: int, show: bool = True) -> float:
    """Measure the bits that a model needs for a byte of held-out text, with a bar.

    model      a decoder
    ids        (N,) of the text, as slimlab.train.text_model.encode_documents makes them
    num_bytes  of the text in UTF-8
    show       draw a bar
    returns    bits per byte, those of slimlab.train.text_model.held_out_bits_per_byte

    Raises InputError if they are not finite.
    """
    seq_len = min(model.config.seq_len, len(ids) - 1)
    windows = list(consecutive_windows(ids, seq_len, MEASURED_WINDOWS))
    with progress_bar("measuring bits per byte", len(windows), shown=show) as bar:
        loss_sum, _ = total_loss(model, _counted(windows, bar))
    asked, given = "a model that predicts the held-out text", f"a loss of {loss_sum}"
    change = "look for numbers that are too large; in float16 they end at 65,504"
    require(math.isfinite(loss_sum), asked, given, change)
    # Multiplied and divided as there, so that the two agree in the last bit.
    mean = loss_sum / (len(ids) - 1)
    return bits_per_byte(mean * (len(ids) - 1), num_bytes)


def _counted(windows: list, bar) -> Iterator:
    for window in windows:
        yield window
        bar.update()


def measure_speed(
    original: nn.Module, small: nn.Module, ids: Tensor, show: bool = True
) -> dict[str, tuple[Spread, Spread, Spread]]:
    """Time two models in turns.

    original, small  decoders in evaluation mode, on one device
    ids              (N,) of a text, to read
    show             draw a bar
    returns          "reading" and "writing": tokens per second of the original, of the small one,
                     and the ratios small / original of the rounds
    """
    seq_len = min(original.config.seq_len, len(ids))
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)[:READ_WINDOWS]
    prompt = windows[:1, : max(1, seq_len // 4)]
    num_new = max(1, min(WRITTEN_TOKENS, seq_len - prompt.shape[1]))
    tasks = {
        "reading": (lambda model: _read(model, windows), windows.numel()),
        "writing": (lambda model: generate(model, prompt, num_new), num_new),
    }
    found = {}
    with progress_bar("measuring speed", len(tasks) * ROUNDS, shown=show) as bar:
        for name, (task, num_tokens) in tasks.items():
            found[name] = _take_turns(task, num_tokens, (original, small), bar)
    return found


@torch.no_grad()
def _read(model: nn.Module, windows: Tensor) -> None:
    model(windows)


def _take_turns(task: Callable, num_tokens: int, models: tuple, bar) -> tuple:
    seconds = ([], [])
    for model in models:
        task(model)
    for number in range(ROUNDS):
        for place in (0, 1) if number % 2 == 0 else (1, 0):
            start_s = time.perf_counter()
            task(models[place])
            seconds[place].append(time.perf_counter() - start_s)
        bar.update()
    ratios = [old / new for old, new in zip(*seconds, strict=True)]
    speeds = [Spread.of([num_tokens / one for one in taken]) for taken in seconds]
    return (*speeds, Spread.of(ratios))


def measured(
    model: nn.Module, folder: Path, bits_per_byte: float, reading: Spread, writing: Spread
) -> Measured:
    """Put together what was measured of one model.

    model          loaded from the folder
    folder         of its weights
    bits_per_byte  of the held-out text
    reading, writing  tokens per second
    returns        Measured, with sizes read from the disk
    """
    return Measured(
        num_params=count_numbers(model),
        weights_bytes=sum(one.stat().st_size for one in weight_files(folder)),
        folder_bytes=folder_bytes(folder),
        memory_bytes=held_bytes(model),
        bits_per_byte=bits_per_byte,
        reading_per_s=reading,
        writing_per_s=writing,
    )
