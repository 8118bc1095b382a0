"""What this machine can do: its arithmetic and its memory, measured, and the bounds they set.

A computation needs at least as long as its FLOP take at the machine's best rate, and at least as
long as its bytes take at the memory's: the roofline. Chapter 05 predicts from both, measures a
training step, and reports what part of the machine it used (MFU).

Williams, Waterman and Patterson 2009 (doi:10.1145/1498765.1498785) for the roofline; Chowdhery et
al. 2022 (arXiv:2204.02311), appendix B, for MFU, which counts the model's own FLOP and not what was
computed twice.

Production takes the peak from the data sheet, where it is a promise about the largest matrices at
the highest clock, and reads counters of the hardware. Here both limits are what a matrix product
and a copy really reach through PyTorch, in float32 if nothing else is asked for: the numbers change
with load, clock and number of threads, and caches make small copies faster than memory is.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from slimlab.config import check_number, check_size, require
from slimlab.train.device import choose_device


@dataclass(frozen=True)
class Machine:
    """What was measured on one device.

    device           PyTorch's name
    dtype            of the matrices multiplied, for instance "float32"
    num_threads      that PyTorch computes with on a CPU
    rates_flop_per_s  size of square matrices -> FLOP per second of their product, medians
    bandwidth_bytes_per_s  bytes read and written per second by a long copy, median
    """

    device: str
    dtype: str
    num_threads: int
    rates_flop_per_s: dict[int, float]
    bandwidth_bytes_per_s: float

    @property
    def peak_flop_per_s(self) -> float:
        """The best rate of all sizes."""
        return max(self.rates_flop_per_s.values())

    @property
    def ridge_flop_per_byte(self) -> float:
        """FLOP per byte above which arithmetic is the limit, below which memory is."""
        return self.peak_flop_per_s / self.bandwidth_bytes_per_s


def measure_machine(
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    sizes: Sequence[int] = (256, 512, 1024),
    num_bytes: int = 2**27,
    repeats: int = 7,
) -> Machine:
    """Measure matrix products of several sizes and a copy, about a second on two cores.

    device     as in slimlab.train.device.choose_device
    dtype      of the matrices
    sizes      of the square matrices; add 4096 and 8192 for a GPU
    num_bytes  of the tensor copied; more than all caches hold
    repeats    measurements of each kind, of which the median counts

    Raises InputError for sizes that are not positive whole numbers and a device that is not there.
    """
    chosen = choose_device(device)
    require(len(sizes) > 0, "at least one size", f"sizes = {sizes!r}", "give sizes=(256, 512)")
    rates = {
        size: matmul_flop_per_s(size, device=chosen, dtype=dtype, repeats=repeats) for size in sizes
    }
    bandwidth = copy_bytes_per_s(num_bytes, device=chosen, repeats=repeats)
    return Machine(
        str(chosen), str(dtype).removeprefix("torch."), torch.get_num_threads(), rates, bandwidth
    )


def matmul_flop_per_s(
    size: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 7,
) -> float:
    """Measure how fast two square matrices are multiplied.

    size     rows and columns
    device   where
    dtype    of both
    repeats  measurements
    returns  2 size^3 FLOP over the median time

    Raises InputError for sizes that are not positive whole numbers.
    """
    check_size("size", size)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    duration_s = median_duration_s(lambda: torch.mm(left, right, out=out), repeats, device)
    return 2 * size**3 / duration_s


def copy_bytes_per_s(
    num_bytes: int, *, device: torch.device | str = "cpu", repeats: int = 7
) -> float:
    """Measure how fast memory is read and written.

    num_bytes  of the tensor copied
    device     where
    repeats    measurements
    returns    2 num_bytes, each read once and written once, over the median time

    Raises InputError for sizes that are not positive whole numbers.
    """
    check_size("num_bytes", num_bytes)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    duration_s = median_duration_s(lambda: target.copy_(source), repeats, device)
    return 2 * num_bytes / duration_s


def median_duration_s(
    function: Callable[[], object], repeats: int = 7, device: torch.device | str = "cpu"
) -> float:
    """Call a function several times and return the median time of a call.

    function  called once more beforehand, unmeasured: the first call allocates and chooses kernels
    repeats   measured calls
    device    whose queue is emptied before the clock is read
    returns   seconds

    Raises InputError if repeats is no positive whole number.
    """
    check_size("repeats", repeats)
    durations_s = []
    for _ in range(repeats + 1):
        _wait(device)
        start_s = time.perf_counter()
        function()
        _wait(device)
        durations_s.append(time.perf_counter() - start_s)
    return statistics.median(durations_s[1:])


def roofline(flop: float, num_bytes: float, machine: Machine) -> float:
    """Bound from below how long a computation takes.

    flop       of its matrix products
    num_bytes  that it must read and write
    machine    from measure_machine
    returns    seconds: the longer of both times, as if one hid the other entirely

    Raises InputError for numbers that are negative or not finite.
    """
    for name, value in {"flop": flop, "num_bytes": num_bytes}.items():
        check_number(name, value, float, 0, float("inf"))
    return max(flop / machine.peak_flop_per_s, num_bytes / machine.bandwidth_bytes_per_s)


def mfu(flop: float, duration_s: float, peak_flop_per_s: float) -> float:
    """Compute the model FLOP utilisation: the part of the machine's arithmetic that was put to use.

    flop             of one training step, without recomputation: training_step_flop of
                     slimlab.plan.training_flop. With what was computed twice it is the hardware's
                     utilisation
    duration_s       of the step
    peak_flop_per_s  of the machine, in the precision of the step
    returns          a fraction; above 1 only if the peak was measured too low

    Raises InputError for numbers that are not positive.
    """
    given = {"flop": flop, "duration_s": duration_s, "peak_flop_per_s": peak_flop_per_s}
    for name, value in given.items():
        check_number(name, value, float, 0, float("inf"), above=True)
    return flop / duration_s / peak_flop_per_s


def _wait(device: torch.device | str) -> None:
    """Wait for what was started: an accelerator works on while the program goes on."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
