"""What the demo of a slim model compares besides its training: messages, and quantized layers.

Production test suites compare logits of quantized models with bounds that they have found by
trying; here one is derived, and sums of integers need none.
"""

from collections.abc import Mapping
from math import gcd, prod

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import ModelConfig
from slimlab.demos.measure import from_all_ranks, num_wrong
from slimlab.demos.report import Report
from slimlab.demos.training import ITEM_BYTES, Batch, counting, held_bytes, make_model
from slimlab.parallel.data import BUCKET_BYTES, DataParallel
from slimlab.parallel.tensor import tensor_parallel, whole_logits
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.plan.data_parallel import predict_broadcast, shard_sizes
from slimlab.plan.data_parallel import predict_step as predict_data_step
from slimlab.plan.params import param_shapes
from slimlab.plan.quantized_parallel import (
    local_quantized_bytes,
    predict_forward,
    predict_logits,
)
from slimlab.plan.quantized_size import QuantScheme
from slimlab.plan.tensor_parallel import local_param_shapes, predict_step
from slimlab.slim.quantize import INT8, quantize_model
from slimlab.slim.quantize_parallel import data_parallel_logits, quantized_tensor_parallel
from slimlab.train.accumulate import accumulate_gradients
from slimlab.train.objectives import causal_objective

FLOAT_BYTES = 4
UNIT = 2.0**-24  # what rounds in a float32
MAX_GROUP = 32


def data_calls(config: ModelConfig, world_size: int, num_steps: int) -> list[tuple[str, int]]:
    """Predict the calls of replicas: the broadcast of the model, then some steps.

    config      of the model
    world_size  number of ranks
    num_steps   may be 0
    """
    sizes = [prod(shape) for shape in param_shapes(config).values()]
    step = predict_data_step(sizes, ITEM_BYTES, world_size, BUCKET_BYTES)
    reduced = [("all_reduce", one) for one in (*step.bucket_bytes, step.report_bytes)]
    n_bytes = [size * ITEM_BYTES for size in sizes]
    return [*predict_broadcast(n_bytes, world_size, BUCKET_BYTES), *reduced * num_steps]


def beside(
    report: Report, comm: Communicator, batch: Batch, configs: Mapping[str, ModelConfig]
) -> None:
    """Count what one ordinary step of each model sends and holds, and set them beside each other.

    report   takes the checks and a table
    comm     the communicator of all ranks
    batch    whole
    configs  name -> configuration

    Communicates: a step of replicas and one of ranks that share the model, for each.
    """
    rows, w = [], comm.world_size
    names = ("data parallel", "tensor parallel", "weights")
    for name, config in configs.items():
        step = predict_step(config, *batch[0].shape, w, ITEM_BYTES)
        sent = data_calls(config, w, 1)[len(data_calls(config, w, 0)) :]
        held = sum(map(prod, local_param_shapes(config, w).values())) * ITEM_BYTES
        predicted = (sum(n_bytes for _, n_bytes in sent), step.payload_bytes, held)
        counted = _one_step(comm, config, batch)
        columns = zip(*from_all_ranks(comm, counted))
        for what, value, found in zip(names, predicted, columns):
            report.check(f"{name}, {what}: bytes", [value] * w, list(found))
        pairs = zip(predicted, counted)
        rows.append((name, *(f"{one:,}" for pair in pairs for one in pair)))
    headers = ["", *(one for name in names for one in (name, "counted"))]
    title = "an ordinary step of both; bytes that rank 0 sends, and holds of weights cut over ranks"
    report.table(title, headers, rows)


def _one_step(comm: Communicator, config: ModelConfig, batch: Batch) -> list[int]:
    """Return the bytes that replicas send, that ranks with parts send, and that a part has."""
    sizes = shard_sizes(len(batch[0]), comm.world_size)
    rows = slice(sum(sizes[: comm.rank]), sum(sizes[: comm.rank + 1]))
    of_data, of_tensor = [], []
    replica = DataParallel(make_model(config, 0, comm.device), comm, broadcast=False)
    with counting(comm.ledger, of_data):
        replica.gradients(tuple(one[rows] for one in batch), causal_objective)
    model = tensor_parallel(make_model(config, 0, comm.device), comm, broadcast=False)
    with counting(comm.ledger, of_tensor):
        accumulate_gradients(model, batch, tensor_parallel_objective)
    sent = [sum(one.n_bytes for one in entries) for entries in (of_data, of_tensor)]
    return [*sent, held_bytes(model.parameters())]


def check_quantized(report: Report, comm: Communicator, model: nn.Module, ids: Tensor) -> None:
    """Quantize a model and run it on all ranks: in 8 bits, and in 4 bits in groups.

    With 8 bits, activations included, no logit may differ from one process. With weights alone sums
    are of floats, and in another order a sum of n products moves by at most 2 n u of the sum of
    their sizes. The bound adds up what the layers whose columns are cut can do; it holds to first
    order, as long as no layer enlarges the error of what it is given.

    report  takes the checks and a table
    comm    the communicator of all ranks
    model   in float32, the same on every rank
    ids     (B, T) the whole batch

    Communicates: forward passes of replicas and of ranks that share the model.
    """
    config, w = model.config, comm.world_size
    widths = (config.num_heads * config.d_head, config.d_ff)
    size = gcd(MAX_GROUP, config.d_model, *(width // w for width in widths))
    groups = QuantScheme(4, True, "group", size, "bfloat16")
    small, smallest = (
        quantize_model(model, INT8, activations="dynamic"),
        quantize_model(model, groups),
    )
    alone, other = small(ids).detach(), smallest(ids).detach()
    rows = []

    entries: list = []
    with counting(comm.ledger, entries):
        logits = data_parallel_logits(small, ids, comm)
    sizes = shard_sizes(len(ids), w)
    predicted = [predict_logits(config, some, ids.shape[1])[0][1] for some in sizes]
    sent = _check_bytes(report, comm, "int8, data parallel: bytes", predicted, entries)
    wrong = _check_equal(report, comm, "int8, data parallel", logits, alone)
    rows.append(("8 bits, data parallel", f"{wrong:,} differ", *sent, "-", "-"))

    logits, numbers = _run_parts(report, comm, "int8, tensor parallel", small, ids, INT8, "dynamic")
    wrong = _check_equal(report, comm, "int8, tensor parallel", logits, alone)
    rows.append(("8 bits, tensor parallel", f"{wrong:,} differ", *numbers))

    what = "4 bits, tensor parallel"
    logits, numbers = _run_parts(report, comm, what, smallest, ids, groups, "none")
    bound = 2 * UNIT * sum(widths) * config.num_layers
    errors = _from_all(comm, float((logits - other).norm() / other.norm()))
    agrees = all(one < bound for one in errors)
    report.check(f"{what}: error of logits", f"< {bound:.1e}", errors, agrees=agrees)
    rows.append((what, f"error {errors[0]:.1e}", *numbers))
    headers = ("student", "logits", "sends", "counted", "holds", "counted")
    report.table("quantized, a forward pass; bytes of rank 0, predicted and counted", headers, rows)


def _run_parts(
    report: Report,
    comm: Communicator,
    what: str,
    model: nn.Module,
    ids: Tensor,
    scheme: QuantScheme,
    activations: str,
) -> tuple[Tensor, tuple[str, ...]]:
    """Cut a model and run it; return the logits, and bytes sent and held, for a table."""
    config, w = model.config, comm.world_size
    entries: list = []
    with counting(comm.ledger, entries), torch.no_grad():
        model = quantized_tensor_parallel(model, comm, broadcast=False)
        logits = whole_logits(model, ids)
    calls = [("all_gather", 8)]
    calls += predict_forward(config, *ids.shape, w, activations=activations)
    if w > 1:
        calls.append(("all_gather", ids.numel() * config.vocab_size // w * FLOAT_BYTES))
    report.check(f"{what}: calls", [len(calls)] * w, _from_all(comm, len(entries)))
    total = sum(n_bytes for _, n_bytes in calls)
    sent = _check_bytes(report, comm, f"{what}: bytes", [total] * w, entries)
    held = sum(local_quantized_bytes(config, w, scheme, activations=activations).values())
    counted = _from_all(comm, held_bytes([*model.parameters(), *model.buffers()]))
    report.check(f"{what}: bytes of weights", [held] * w, counted)
    return logits, (*sent, f"{held:,}", f"{counted[0]:,}")


def _check_equal(
    report: Report, comm: Communicator, what: str, found: Tensor, expected: Tensor
) -> int:
    wrong = _from_all(comm, num_wrong(found, expected))
    report.check(f"{what}: logits that differ", [0] * comm.world_size, wrong)
    return wrong[0]


def _check_bytes(
    report: Report, comm: Communicator, what: str, predicted: list[int], entries: list
) -> tuple[str, str]:
    counted = _from_all(comm, sum(one.n_bytes for one in entries))
    report.check(what, predicted, counted)
    return f"{predicted[0]:,}", f"{counted[0]:,}"


def _from_all(comm: Communicator, number: float) -> list:
    return [one for (one,) in from_all_ranks(comm, [number])]
