"""A cluster made of what was measured here: ranks of this machine as the planner's GPUs.

Chapter 11 plans a step on the laptop with it, then runs it. slimlab.train.machine measures products
and copies, slimlab.comm.calibrate messages. Nothing is fitted: shares are 1, since the rates were
measured. Ranks that share cores must share their rates: measure with as many threads as each rank
will have, on as many cores as there are ranks.

A processor's caches make the rates of small products differ by factors, so a step is predicted
within a factor of about two and order is what can be trusted: which layout is faster, and which
part of a step grows. Production planners measure every shape of product that a model has.
"""

from slimlab.config import check_number, check_size
from slimlab.plan.alpha_beta import Link
from slimlab.plan.hardware import Cluster, Constants, Gpu

# What PyTorch takes on a CPU to start an operation, with autograd's part of it.
OPERATION_S = 10e-6


def own_cluster(
    peak_flop_per_s: float,
    memory_bytes_per_s: float,
    memory_bytes: float,
    link: Link,
    num_ranks: int,
) -> tuple[Cluster, Constants]:
    """Describe the ranks of one machine as a cluster of one host.

    peak_flop_per_s     of one rank's matrix products, measured for matrices of the model's sizes
    memory_bytes_per_s  read and written by one rank's long copies, measured
    memory_bytes        of one rank
    link                what a message between two ranks costs, measured
    num_ranks           on the machine
    returns             the cluster, and constants whose latencies are the link's

    Raises InputError for numbers that are not above 0, and for a link that is infinitely fast.
    """
    check_size("num_ranks", num_ranks)
    check_number("beta_s_per_byte of link", link.beta_s_per_byte, float, 0, 1, above=True)
    source = "measured on this machine"
    name = f"a rank of {num_ranks} here"
    gpu = Gpu(name, peak_flop_per_s, memory_bytes, memory_bytes_per_s, 1.0, source)
    rate = 1 / link.beta_s_per_byte
    alpha = max(link.alpha_s, 1e-9)
    constants = Constants(
        matmul_efficiency=1.0, memory_efficiency=1.0, attention_efficiency=1.0,
        network_efficiency=1.0, memory_share=0.95, kernel_s=OPERATION_S, message_s=alpha,
        collective_s=alpha, host_step_s=alpha, network_step_s=alpha, tree_step_s=alpha,
    )  # fmt: skip
    return Cluster(gpu, num_ranks, rate, rate, source), constants
