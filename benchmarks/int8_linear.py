"""A linear layer in int8 beside float32 and beside torch's own, one row at a time.

    python -m benchmarks.int8_linear --shapes 1024x4096 4096x4096 --rounds 21 --threads 1

The input is float32 and so is the output: rounding the input, finding its scale and multiplying by
both scales are inside the time. One row, as when a model writes one token at a time, reads each
weight once. `one layer` calls the same layer again and again, so that its weight may stay in a
cache; `many layers` goes through as many as fill --memory-mib in float32, as a model does. Before
the clock starts, outputs are compared.
"""

import argparse
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import Comparison, environment, parser, report, take_turns
from slimlab.config import require
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_layers import Int8Linear, QuantizedLinear, QuantizedWeight
from slimlab.slim.quantize_maps import quantize

SHAPES = ("1024x4096", "4096x1024", "4096x4096")
TOLERANCE = 0.03  # 8 bits on both sides move an output by about a hundredth
INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
FLOATS = "float32"
Layers = Mapping[str, list[Callable[[Tensor], Tensor]]]


def instruction_sets() -> str:
    """Name what torch uses, and what the processor has for products of bytes."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        words = set()
    own = [name for name in INSTRUCTIONS if name in words]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *own])


def make_layers(shape: tuple[int, int], count: int, rivals: tuple[str, ...]) -> Layers:
    """Make the same linear layers in several forms.

    shape    (O, I)
    count    how many different layers
    rivals   names of _FORMS
    returns  name -> layers, float32 first
    """
    torch.manual_seed(0)
    floats = [nn.Linear(shape[1], shape[0], bias=False) for _ in range(count)]
    sample = torch.randn(64, shape[1])
    return {FLOATS: floats} | {
        name: [_FORMS[name](one, sample) for one in floats] for name in rivals
    }


def _dynamic(linear: nn.Linear, sample: Tensor) -> nn.Module:
    return Int8Linear(QuantizedWeight(quantize(linear.weight, QuantScheme(8))))


def _static(linear: nn.Linear, sample: Tensor) -> nn.Module:
    ends = float(sample.min()), float(sample.max())
    return Int8Linear(QuantizedWeight(quantize(linear.weight, QuantScheme(8))), input_range=ends)


def _weight_only(linear: nn.Linear, sample: Tensor) -> nn.Module:
    return QuantizedLinear(QuantizedWeight(quantize(linear.weight, QuantScheme(8))))


def _torch_dynamic(linear: nn.Linear, sample: Tensor) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao tells of its successor, torchao
        whole = nn.Sequential(linear)
        return torch.ao.quantization.quantize_dynamic(whole, {nn.Linear}, torch.qint8)[0]


_FORMS = {
    "int8, dynamic": _dynamic,
    "int8, static": _static,
    "torch.ao dynamic": _torch_dynamic,
    "int8 weight only": _weight_only,
}


@torch.no_grad()
def check_outputs(layers: Layers, x: Tensor) -> None:
    """Refuse forms whose outputs are not those of float32, up to the rounding of 8 bits.

    layers  of make_layers
    x       (N, I)
    """
    for name, forms in layers.items():
        for floats, form in zip(layers[FLOATS], forms):
            true = floats(x)
            off = float((form(x) - true).norm() / true.norm())
            change = "do not compare their times"
            require(off < TOLERANCE, f"outputs of {name} near float32's", f"{off:.1%} off", change)


def measure(
    shape: tuple[int, int], count: int, rivals: tuple[str, ...], given: argparse.Namespace
) -> list[Comparison]:
    """Measure all forms of layers of one shape in turns, each beside float32.

    shape   (O, I)
    count   different layers that are called one after the other
    rivals  names of _FORMS
    given   options of parser, with batch_size and calls
    """
    layers = make_layers(shape, count, rivals)
    x = torch.randn(given.batch_size, shape[1])
    passes = max(1, given.calls // count)

    def prepare(name: str) -> Callable:
        def run() -> None:
            for _ in range(passes):
                for layer in layers[name]:
                    layer(x)

        return lambda: run

    with torch.no_grad():
        check_outputs(layers, x)
        times = take_turns({k: prepare(k) for k in layers}, given.rounds, clock=given.clock)
    which = "one layer" if count == 1 else f"{count} layers"
    task = f"{shape[0]} x {shape[1]}, {which}, {passes * count} calls"
    theirs = tuple(times[FLOATS][""])
    return [Comparison(f"{task}: {k}", k, FLOATS, tuple(times[k][""]), theirs) for k in rivals]


def parse_shape(text: str) -> tuple[int, int]:
    """Read "1024x4096", outputs by inputs."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: give outputs x inputs, such as 1024x4096")
    return int(found[1]), int(found[2])


def main(arguments: list[str] | None = None) -> None:
    """Measure and print.

    arguments  of the command line; None: sys.argv
    """
    options = parser(__doc__.splitlines()[0], rounds=21)
    default = [parse_shape(one) for one in SHAPES]
    options.add_argument("--shapes", type=parse_shape, nargs="+", default=default)
    options.add_argument("--batch-size", type=int, default=1, help="rows of the input (default 1)")
    options.add_argument("--calls", type=int, default=16, help="calls that are timed together")
    options.add_argument(
        "--memory-mib", type=int, default=256, help="float32 weights of `many layers`; 0: leave out"
    )
    options.add_argument("--rivals", nargs="+", choices=_FORMS, default=list(_FORMS)[:3])
    given = options.parse_args(arguments)
    torch.set_num_threads(given.threads)
    where = environment(given) | {"instructions": instruction_sets()}
    comparisons = []
    for shape in given.shapes:
        many = given.memory_mib * 2**20 // (4 * shape[0] * shape[1])
        for count in sorted({1, max(1, many)}):
            comparisons += measure(shape, count, tuple(given.rivals), given)
    settings = {"batch_size": given.batch_size, "bits": 8, "dtype of x": "float32"}
    report("int8_linear", settings, where, comparisons, given.json)


if __name__ == "__main__":
    main()
