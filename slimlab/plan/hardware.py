"""Clusters, and the constants of the step-time model: each with its meaning, unit and source.

Nothing here is measured on this machine, and nothing belongs to one published run. Two constants
are fitted, on one table (tools/fit_planner.py does it again and prints them); all others were
stated beforehand. Chapter 11 changes them one by one.

Production planners measure: every shape of matrix product, every collective at every size, on the
very hosts that will be used.
"""

from dataclasses import dataclass, field, fields
from math import inf

from slimlab.config import check_choice, check_number, check_size


@dataclass(frozen=True)
class Gpu:
    """What one accelerator can do at most, from its data sheet.

    name                the maker's
    peak_flop_per_s     of dense products of 16-bit matrices, summed in 32 bits
    memory_bytes        nominal; GB is 1e9 bytes
    memory_bytes_per_s  between its memory and its cores
    best_share          share of the peak that the fastest of many measured products reaches: under
                        its power limit a GPU cannot keep the clock that the peak is stated for
    source              where the numbers stand

    Raises InputError for numbers that are not above 0, or a share above 1.
    """

    name: str
    peak_flop_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float
    best_share: float
    source: str

    def __post_init__(self):
        for name in ("peak_flop_per_s", "memory_bytes", "memory_bytes_per_s"):
            check_number(name, getattr(self, name), float, 0, inf, above=True)
        check_number("best_share", self.best_share, float, 0, 1, above=True)

    @property
    def best_flop_per_s(self) -> float:
        """FLOP per second of its fastest matrix product."""
        return self.peak_flop_per_s * self.best_share

    @property
    def flop_per_byte(self) -> float:
        """FLOP that it can do at best while it moves one byte, the ridge of its roofline."""
        return self.peak_flop_per_s / self.memory_bytes_per_s


@dataclass(frozen=True)
class Cluster:
    """Hosts of equal GPUs.

    gpu                  of which kind
    gpus_per_host        that reach each other without leaving the host
    host_bytes_per_s     of each GPU inside its host, in one direction
    network_bytes_per_s  of each GPU to other hosts, in one direction: the host's adapters, divided
    source               where the numbers stand

    Raises InputError for sizes and rates that are none.
    """

    gpu: Gpu
    gpus_per_host: int
    host_bytes_per_s: float
    network_bytes_per_s: float
    source: str

    def __post_init__(self):
        check_size("gpus_per_host", self.gpus_per_host)
        for name in ("host_bytes_per_s", "network_bytes_per_s"):
            check_number(name, getattr(self, name), float, 0, inf, above=True)


def _constant(value: float, unit: str, meaning: str, source: str):
    return field(default=value, metadata={"unit": unit, "meaning": meaning, "source": source})


NCCL = "NVIDIA/nccl, src/graph/tuning.cc, its own model of latencies, protocol Simple"
FITTED = "fitted on table 1 of Narayanan et al. 2021 (arXiv:2104.04473), tools/fit_planner.py"


@dataclass(frozen=True)
class Constants:
    """The constants of the step-time model; constant_table says what each means, and whence it is.

    matmul_efficiency, memory_efficiency, attention_efficiency, network_efficiency  shares of a rate
    kernel_s, message_s, collective_s, host_step_s, network_step_s, tree_step_s  seconds
    memory_share                                              share of the nominal memory

    Raises InputError for a number that is not above 0, or a share above 1.
    """

    matmul_efficiency: float = _constant(
        0.950,
        "1",
        "share of the fastest product's rate that a step's largest products keep up",
        FITTED,
    )
    memory_efficiency: float = _constant(
        0.809, "1", "share of the memory's rate that element-wise kernels reach", FITTED
    )
    attention_efficiency: float = _constant(
        0.50, "1", "share of the peak that fused attention reaches, over tiles that are not hidden",
        "Dao 2023 (arXiv:2307.08691): 50 to 73 % of an A100's; less backward and on an H100",
    )  # fmt: skip
    network_efficiency: float = _constant(
        0.75, "1", "share of a link's nominal rate that a long message reaches",
        "nccl-tests on 8 A100 with NVLink: 200 to 235 of 300 GB/s (NVIDIA/nccl-tests, 149 and 178)",
    )  # fmt: skip
    kernel_s: float = _constant(
        8e-6, "s", "of each kernel beyond its work: to start, to fill and to drain the GPU",
        "a launch is 5 to 10 microseconds (NVIDIA's guides on CUDA graphs)",
    )  # fmt: skip
    message_s: float = _constant(
        50e-6, "s", "of each exchange between stages beyond its bytes: two processors that wait",
        "assumed: several launches, and a synchronisation on each side",
    )  # fmt: skip
    collective_s: float = _constant(8.4e-6, "s", "of each collective, however short", NCCL)
    host_step_s: float = _constant(3.4e-6, "s", "of each step of a ring inside a host", NCCL)
    network_step_s: float = _constant(14e-6, "s", "of each step of a ring between hosts", NCCL)
    tree_step_s: float = _constant(28e-6, "s", "of each step of a tree between hosts", NCCL)
    memory_share: float = _constant(
        0.95, "1", "share of the nominal memory that tensors may fill",
        "assumed: the rest is lost between tensors; context and buffers of communication fit into "
        "what a GPU of 80 GB has beyond 80e9 bytes",
    )  # fmt: skip

    def __post_init__(self):
        for one in fields(self):
            high = inf if one.name.endswith("_s") else 1
            check_number(one.name, getattr(self, one.name), float, 0, high, above=True)


def constant_table(constants: Constants | None = None) -> list[dict]:
    """List the constants with all that is known of them.

    constants  those of Constants() if not given
    returns    rows with name, value, unit, meaning and source
    """
    constants = constants or Constants()
    return [
        {"name": one.name, "value": getattr(constants, one.name), **one.metadata}
        for one in fields(constants)
    ]


def find_cluster(name: str) -> Cluster:
    """Return a cluster of CLUSTERS.

    name  its key

    Raises InputError that lists all names.
    """
    check_choice("hardware", name, tuple(CLUSTERS))
    return CLUSTERS[name]


MEGATRON = "Narayanan et al. 2021 (arXiv:2104.04473), section 5"
FASTEST = "fastest product: stas00/ml-engineering, compute/accelerator, bfloat16"
ASSUMED = "fastest product: assumed as an A100's"
V100 = Gpu("V100 SXM3 32 GB", 125e12, 32e9, 900e9, 0.859, f"NVIDIA data sheet; {ASSUMED}")
A100_40 = Gpu("A100 SXM 40 GB", 312e12, 40e9, 1555e9, 0.859, f"NVIDIA data sheet; {FASTEST}")
A100_80 = Gpu("A100 SXM 80 GB", 312e12, 80e9, 2039e9, 0.859, f"NVIDIA data sheet; {FASTEST}")
H100 = Gpu("H100 SXM 80 GB", 989e12, 80e9, 3350e9, 0.803, f"NVIDIA data sheet; {FASTEST}")
H200 = Gpu("H200 SXM 141 GB", 989e12, 141e9, 4800e9, 0.803, f"NVIDIA data sheet; {FASTEST}")
B200 = Gpu("B200 SXM 180 GB", 2250e12, 180e9, 8000e9, 0.776, f"NVIDIA data sheet; {FASTEST}")
TPU = "Jouppi et al. 2023 (arXiv:2304.01433)"
TPU_V4 = Gpu("TPU v4", 275e12, 32e9, 1228e9, 0.859, f"{TPU}, table 4; {ASSUMED}")

CLUSTERS = {
    # 16 GPUs behind NVSwitch, 8 adapters of 100 Gbit/s
    "v100-32gb": Cluster(V100, 16, 150e9, 6.25e9, "NVIDIA DGX-2; Shoeybi et al. 2019, section 5"),
    "a100-40gb": Cluster(A100_40, 8, 300e9, 25e9, "NVIDIA DGX A100 data sheet"),
    "a100-80gb": Cluster(A100_80, 8, 300e9, 25e9, f"{MEGATRON}: 8 adapters of 200 Gbit/s a host"),
    # 4 adapters of 100 Gbit/s for 8 GPUs
    "a100-80gb-omnipath": Cluster(A100_80, 8, 300e9, 6.25e9, "Jean Zay, bigscience tr11 README"),
    "h100-80gb": Cluster(H100, 8, 450e9, 50e9, "NVIDIA DGX H100 data sheet"),
    "h200-141gb": Cluster(H200, 8, 450e9, 50e9, "NVIDIA DGX H200 data sheet"),
    "b200-180gb": Cluster(B200, 8, 900e9, 50e9, "NVIDIA DGX B200 data sheet"),
    # A pod is the host: its chips reach each other by the torus, here over the two links of one
    # axis; pods talk over the data centre's network, which gave 6144 chips 81 Tbit/s.
    "tpu-v4": Cluster(
        TPU_V4,
        4096,
        100e9,
        1.65e9,
        f"{TPU}: 6 links of 50 GB/s; Chowdhery et al. 2022 (arXiv:2204.02311), section 4",
    ),  # fmt: skip
}
