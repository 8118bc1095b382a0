"""What the demos that train share: a small model, its data, three steps in one process, a timeline.

Every rank also trains the whole model on the whole batch by itself, to compare with that
(slimlab.demos.training_checks); it can, since the model is small. Everything is float64: what
differs after three steps is then an error and not rounding. Production programs compare the losses
of a few steps with those of a run on fewer ranks, since no rank has room for the whole.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.comm.ledger import LedgerEntry, PayloadLedger
from slimlab.comm.trace import TracedCommunicator, gather_trace
from slimlab.config import ModelConfig
from slimlab.demos.common import number
from slimlab.demos.report import Report
from slimlab.model.build import build_model
from slimlab.train.accumulate import Objective, accumulate_gradients
from slimlab.train.objectives import IGNORE, causal_objective
from slimlab.train.optimizer import make_optimizer
from slimlab.train.recipe import MODEL, VOCAB_SIZE

NUM_STEPS, LR = 3, 1e-2
ITEM_BYTES = 8
# Gradients of up to 1e-1 round at 1e-17 or so. AdamW divides each element by its own size: one that
# is almost zero would turn that rounding into a step. With this eps it is 1e-12 of a step at most.
EPS = 1e-5
BOUND = 1e-12
SIZES = {
    # The model of the book, made small; two, three, four, six and twelve divide what is cut.
    "tiny": MODEL | {
        "vocab_size": 96, "seq_len": 24, "d_model": 48, "num_layers": 2, "num_heads": 12, "d_ff": 96
    },
    "book": MODEL | {"vocab_size": VOCAB_SIZE},
}  # fmt: skip
FIGURES = (".svg", ".png", ".pdf")

Batch = tuple[Tensor, Tensor]


class Run(NamedTuple):
    """What came of the steps.

    losses     of each step, nats per token
    gradients  of each step, by the names of the parameters, whole
    weights    after the last step, whole
    """

    losses: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def make_model(config: ModelConfig, seed: int, device: torch.device) -> nn.Module:
    """Make a model whose weights are all different from zero, so that all gradients are too.

    config  of the model
    seed    of the weights
    device  where they lie; they are drawn on the processor, the same for every device
    """
    torch.manual_seed(seed)
    model = build_model(config).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, dtype=param.dtype), alpha=0.05)
    return model.to(device)


def make_batches(
    config: ModelConfig, batch_size: int, seed: int, device: torch.device
) -> list[Batch]:
    """Draw the batches of all steps, the same on every rank; sequences end at different places.

    config      of the model
    batch_size  B, sequences of the whole batch
    seed        of the draw
    device      where they lie
    returns     inputs (B, T) and targets (B, T) of each step
    """
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(NUM_STEPS):
        shape = (batch_size, config.seq_len + 1)
        ids = torch.randint(config.vocab_size, shape, generator=generator)
        inputs, targets = ids[:, :-1].clone(), ids[:, 1:].clone()
        # A token that can attend to itself alone gives queries and keys no gradient to compare.
        least, most = config.seq_len // 2, config.seq_len
        lengths = torch.randint(least, most + 1, (batch_size, 1), generator=generator)
        targets[torch.arange(config.seq_len) >= lengths] = IGNORE
        batches.append((inputs.to(device), targets.to(device)))
    return batches


def train_alone(
    model: nn.Module, batches: Sequence[Batch], objective: Objective = causal_objective
) -> Run:
    """Train in this process, on whole batches.

    model      changed in place
    batches    one per step
    objective  what is to be learned
    """
    optimizer, losses, gradients = make_optimizer("adamw", model, lr=LR, eps=EPS), [], []
    for batch in batches:
        loss, _ = accumulate_gradients(model, batch, objective)
        losses.append(float(loss))
        gradients.append({name: param.grad.clone() for name, param in model.named_parameters()})
        optimizer.step()
    return Run(losses, gradients, copy_of_weights(model))


def copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the parameters of a model, by name.

    model  any
    """
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def count_targets(batch: Batch) -> int:
    """Count the tokens of a batch that are to be predicted.

    batch  inputs and targets
    """
    return int((batch[1] != IGNORE).sum())


@contextmanager
def counting(ledger: PayloadLedger, entries: list[LedgerEntry]) -> Iterator[None]:
    """Note the calls inside of a with block.

    ledger   of this rank
    entries  takes them
    """
    before = len(ledger.entries)
    yield
    entries += ledger.entries[before:]


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Add up the bytes of the storages of tensors, each storage once.

    tensors  any
    """
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count what AdamW keeps for its parameters, but not the numbers of their steps.

    optimizer  after its first step
    """
    states = optimizer.state.values()
    return held_bytes(one for state in states for key, one in state.items() if key != "step")


def traced_if(comm: Communicator, path: str | None) -> Communicator:
    """Trace the calls of a communicator if somebody wants to see them.

    comm  the communicator of all ranks
    path  where the timeline is to go; None: nobody does
    """
    return comm if path is None else TracedCommunicator(comm)


def write_timeline(report: Report, comm: Communicator, path: str | None) -> None:
    """Write when each rank was in which call: a figure, or a file for ui.perfetto.dev.

    report  says where it is
    comm    as traced_if returned it
    path    of an image (.svg, .png, .pdf), or of a JSON file; None: nothing is written

    Communicates: what gather_trace does.
    Raises InputError, on rank 0, if it cannot be written.
    """
    if path is None:
        return
    trace = gather_trace(comm)
    if trace is not None:
        if Path(path).suffix in FIGURES:
            from slimlab.show.timeline import timeline_figure

            timeline_figure(trace, report.demo).savefig(path)
        else:
            trace.to_chrome(path)
    report.numbers["timeline"] = str(path)


def training_options() -> list[Callable]:
    """Make the options that all demos that train have."""
    return [
        click.option("--size", type=click.Choice(list(SIZES)), default="tiny", show_default=True,
                     help="Of the model: that of the book, or one made small."),
        number("--batch", click.IntRange(1, 4096), 8, "Sequences, of all ranks together.",
               "batch_size"),
        number("--seed", click.IntRange(0, 2**31), 0, "Of weights and data."),
        click.option("--timeline", "timeline", callback=_check_path, metavar="PATH",
                     help="Write when each rank was in which call: .json for ui.perfetto.dev, "
                     "or .svg, .png, .pdf."),
    ]  # fmt: skip


def _check_path(ctx: click.Context, param: click.Parameter, path: str | None) -> str | None:
    if path is not None and (not Path(path).suffix or not Path(path).absolute().parent.is_dir()):
        raise click.BadParameter(
            f"a file with an ending in a folder that exists, not {path!r}: give out.json, or make "
            "the folder first"
        )
    return path
