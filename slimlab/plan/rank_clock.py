"""Seconds of single operations on a rank: products, element-wise kernels, collectives.

Matrix products: their FLOP at the rate of the fastest, and after it the bytes of the three matrices
at the memory's rate, as if reading and computing never overlapped: a small product is slow by as
much as it does little with what it reads. Element-wise kernels: the bytes that they read and write.
Collectives: the steps of a ring, and its bytes. slimlab.plan.block_time adds them up; chapter 11
shows how far each is from its peak.

Kernels of one kind differ by tens of per cent between shapes, which only measuring would show.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2

from slimlab.config import check_choice
from slimlab.plan.alpha_beta import cost_of
from slimlab.plan.hardware import Cluster, Constants
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.plan.software import Software

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Kernels:
    """Element-wise kernels that follow each other: bytes per element of 16 bits, how many they are.

    A backward pass reads the gradient and what was kept, writes a gradient, and sums the gradients
    of biases and gains.

    forward_bytes, backward_bytes  read and written per element
    forward, backward              number of kernels
    """

    forward_bytes: int
    backward_bytes: int
    forward: int
    backward: int


NORM = Kernels(4, 10, 1, 2)
# Behind each half of a block, by (fused_kernels, dropout): bias, dropout and the residual sum.
ADD = {
    (True, True): Kernels(7, 13, 1, 3),
    (False, True): Kernels(15, 13, 3, 3),
    (True, False): Kernels(6, 8, 1, 2),
    (False, False): Kernels(10, 8, 2, 2),
}
# By fused_kernels: bias and GELU or ReLU; gate and up into their product.
ACTIVATE = {True: Kernels(4, 8, 1, 2), False: Kernels(8, 8, 2, 2)}
GATE = {True: Kernels(6, 10, 1, 1), False: Kernels(10, 18, 2, 3)}
ROTATE = Kernels(4, 4, 1, 1)
MERGE_HEADS = Kernels(4, 4, 1, 1)
QKV_BIAS = Kernels(0, 2, 0, 1)
# Scale, mask and softmax in one kernel, or each alone in 32 bits with conversions around them.
SOFTMAX = {True: Kernels(4, 6, 1, 1), False: Kernels(37, 41, 5, 5)}
DROP_SCORES = Kernels(5, 5, 1, 1)
# Logits to 32 bits, maximum, difference, exponential, sum, quotient; then the gradient, 16 bits.
LOSS = Kernels(38, 14, 6, 2)
# Rows of tokens and positions, their sum, dropout; then the gradients' way back into the tables.
TABLES = Kernels(15, 11, 3, 2)


@dataclass(frozen=True)
class Clock:
    """What seconds are computed from.

    cluster    its rates
    parallel   where ranks stand
    software   what a program does to save time
    constants  shares and latencies
    """

    cluster: Cluster
    parallel: ParallelConfig
    software: Software
    constants: Constants

    def product_s(self, m: int, k: int, n: int, count: int = 1) -> float:
        """Return the seconds of products of an (m, k) and a (k, n) matrix.

        m, k, n  sizes
        count    products of these sizes in one kernel
        """
        gpu = self.cluster.gpu
        rate = gpu.best_flop_per_s * self.constants.matmul_efficiency
        # In 16 bits 2 (m k + k n + m n) bytes for 2 m k n FLOP: 1/n + 1/m + 1/k bytes per FLOP.
        bytes_per_flop = self.software.item_bytes / 2 * (1 / m + 1 / k + 1 / n)
        slowed = 1 + gpu.flop_per_byte * bytes_per_flop
        return 2 * count * m * k * n / rate * slowed

    def memory_s(self, num_bytes: float) -> float:
        """Return the seconds in which element-wise kernels read and write bytes.

        num_bytes  read and written
        """
        return num_bytes / (self.cluster.gpu.memory_bytes_per_s * self.constants.memory_efficiency)

    def collective_s(self, name: str, axis: str, n_bytes: float) -> float:
        """Return the seconds of a collective along an axis, all groups of that axis at once.

        name     "all_reduce", "all_gather" or "reduce_scatter": a ring; for an all_reduce with
                 the steps of a tree where these take less time
        axis     "tensor", "data" or "pipeline"
        n_bytes  of the whole tensor

        Raises InputError for other names.
        """
        check_choice("name", name, COLLECTIVES)
        size = getattr(self.parallel, axis)
        if size == 1:
            return 0.0
        steps, share = _ring(name, size)
        per_host = self.parallel.ranks_per_host(axis, self.cluster.gpus_per_host)
        hosts, passes = ceil(size / per_host), 2 if name == "all_reduce" else 1
        fixed, between = self.constants, passes * (hosts - 1)
        steps_s = (steps - between) * fixed.host_step_s + between * fixed.network_step_s
        if name == "all_reduce":
            up_s = (per_host - 1) * fixed.host_step_s + ceil(log2(hosts)) * fixed.tree_step_s
            steps_s = min(steps_s, 2 * up_s)
        moved_s = share * n_bytes / self.group_bytes_per_s(axis)
        return fixed.collective_s + steps_s + moved_s

    def group_bytes_per_s(self, axis: str) -> float:
        """Return the rate at which a ring along an axis moves bytes.

        axis     "tensor", "data" or "pipeline"
        returns  bytes per second: a group inside one host moves at its GPUs' links; one on several
                 hosts moves out of each of them at the adapters of all its ranks there
        """
        per_host = self.parallel.ranks_per_host(axis, self.cluster.gpus_per_host)
        rate = self.cluster.host_bytes_per_s
        if per_host < getattr(self.parallel, axis):
            rate = min(rate, per_host * self.cluster.network_bytes_per_s)
        return rate * self.constants.network_efficiency

    def kernels_s(self, kernels: Kernels, num_elements: float) -> tuple[float, float]:
        """Return the seconds of element-wise kernels, forward and backward.

        kernels       which
        num_elements  on this rank
        """
        launch, wider = self.constants.kernel_s, self.software.item_bytes / 2
        there_s = self.memory_s(wider * kernels.forward_bytes * num_elements)
        back_s = self.memory_s(wider * kernels.backward_bytes * num_elements)
        return there_s + kernels.forward * launch, back_s + kernels.backward * launch


@lru_cache(maxsize=1024)
def _ring(name: str, size: int) -> tuple[int, float]:
    """Steps of a ring, and how many times the tensor it sends."""
    cost = cost_of(f"ring_{name}", size)
    return cost.alphas, float(cost.betas)
