"""`slimlab train` on many ranks: its options, and how the ranks are started.

Chapter 11 uses it. Without a launcher the command starts the ranks itself; under mpirun, srun or
torchrun every rank runs the command, and rank 0 speaks. Production trainers know one launcher.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from slimlab.comm.launchers import launcher_of
from slimlab.commands.communication import BACKENDS
from slimlab.config import InputError, ModelConfig, TrainingConfig
from slimlab.plan.parallel_config import ParallelConfig, num_micro_batches

if TYPE_CHECKING:
    from slimlab.comm.base import Communicator
    from slimlab.text.corpus import Corpus

LEAVE_LATER_S = 3.0
# Of a whole run; under a launcher, of one call that waits for the other ranks.
TIMEOUT_S, WAIT_S = 30 * 86_400.0, 3_600.0
NAMES = ("data", "tensor", "pipeline", "zero_stage", "sequence_parallel", "schedule", "backend")


def mesh_options(command: Callable) -> Callable:
    """Give a command the options of a layout.

    command  takes them by the names in NAMES
    """
    count = click.IntRange(1, 1_000_000)
    options = [
        click.option("--dp", "data", type=count, default=1, show_default=True,
                     help="Replicas, each with its part of a batch."),
        click.option("--tp", "tensor", type=count, default=1, show_default=True,
                     help="Ranks that share each layer."),
        click.option("--pp", "pipeline", type=count, default=1, show_default=True,
                     help="Stages, each with some of the layers."),
        click.option("--zero", "zero_stage", type=click.IntRange(0, 3), default=0,
                     show_default=True,
                     help="Replicas share 1 optimizer's state, 2 gradients, 3 weights too."),
        click.option("--sequence-parallel", is_flag=True,
                     help="Cut activations between shared layers along positions."),
        click.option("--schedule", type=click.Choice(["1f1b", "gpipe"]), default="1f1b",
                     show_default=True, help="Of the pipeline."),
        click.option("--backend", type=click.Choice(BACKENDS),
                     help="Of the ranks; default: threads, or what the launcher connects."),
    ]  # fmt: skip
    for one in reversed(options):
        command = one(command)
    return command


def needs_ranks(given: dict) -> bool:
    """Tell whether a command is to run on several ranks, or a launcher runs it on several.

    given  its options
    """
    several = given["data"] * given["tensor"] * given["pipeline"] > 1
    return several or given["backend"] is not None or launcher_of(os.environ).kind != "alone"


def layout_of(given: dict, batch_size: int) -> ParallelConfig:
    """Make the layout that the options ask for.

    given       options by name; micro_batch_size None: all of a replica's sequences, or, with a
                pipeline, as many as leave each stage two micro-batches
    batch_size  sequences of an update

    Raises InputError if the batch does not divide.
    """
    size = given["micro_batch_size"]
    if size is None:
        share, fewest = batch_size // given["data"], 2 * given["pipeline"]
        fitting = [n for n in range(1, share + 1) if share % n == 0 and share // n >= fewest]
        size = share if given["pipeline"] == 1 else max(fitting, default=1)
    axes = ("data", "tensor", "pipeline", "zero_stage", "sequence_parallel", "schedule")
    parallel = ParallelConfig(
        micro_batch_size=max(1, size),
        recompute="full" if given["recompute"] == "block" else "none",
        **{name: given[name] for name in axes},
    )
    num_micro_batches(parallel, batch_size)
    return parallel


def train_by_layout(
    given: dict,
    corpus: "Corpus",
    out: Path,
    config: TrainingConfig,
    options: dict,
) -> tuple[dict, bool]:
    """Train on all ranks, whoever starts them.

    given    options of the layout, by name
    corpus   to train on
    out      folder of the run
    config   of the training
    options  of slimlab.parallel.hybrid_text.train_text_on_mesh
    returns  its result on rank 0, and whether this process is to print it

    Raises what run_ranks, connect and train_text_on_mesh raise; an InputError of a rank as it is.
    Ctrl-C ends the process, with exit code 130, after a line that says where the run will go on.
    """
    from slimlab.comm.report import RankError
    from slimlab.demos.common import run_demo

    parallel = layout_of(given, config.batch_size)
    launcher, args = launcher_of(os.environ), (parallel, corpus, out, config, options)
    launched = launcher.kind != "alone"
    if launched and launcher.world_size is not None:
        _check(launcher.world_size, *args)
    try:
        return run_demo(
            _program,
            args,
            world_size=None,
            backend=given["backend"],
            timeout_s=WAIT_S if launched else TIMEOUT_S,
            default=parallel.world_size,
            check=_check,
        )
    except RankError as error:
        if isinstance(error.__cause__, InputError):
            raise error.__cause__ from error
        raise
    except KeyboardInterrupt:
        if not launched_rank():
            click.echo(f"slimlab: {_stopped(out)}", err=True)
        sys.exit(128 + signal.SIGINT)


def _stopped(out: Path) -> str:
    """Say what a run that Ctrl-C has ended left behind."""
    from slimlab.train.checkpoint_folder import latest

    found = latest(out, partial(click.echo, err=True)) if out.is_dir() else None
    if found is None:
        return "stopped before the first checkpoint"
    return f"stopped; the last checkpoint is {found}, and the same command goes on with it"


@contextmanager
def first_rank_speaks() -> Iterator[None]:
    """Let an InputError inside be shown by the first rank alone, since all ranks have the same.

    Other ranks of a launcher end later, without a word, with exit code 2.
    """
    try:
        yield
    except InputError:
        if launched_rank():
            # A launcher ends all ranks when one has ended: the first must have spoken before.
            time.sleep(LEAVE_LATER_S)
            sys.exit(2)
        raise


def _program(
    comm: "Communicator",
    parallel: ParallelConfig,
    corpus: "Corpus",
    out: Path,
    config: TrainingConfig,
    options: dict,
) -> dict:
    from slimlab.parallel.hybrid_text import train_text_on_mesh

    return train_text_on_mesh(comm, parallel, corpus, out, config, **options)


def _check(
    world_size: int,
    parallel: ParallelConfig,
    corpus: "Corpus",
    out: Path,
    config: TrainingConfig,
    options: dict,
) -> None:
    """Refuse what is known before a rank is started: sizes of the mesh, layers, heads."""
    import torch

    from slimlab.model.build import build_model
    from slimlab.parallel.hybrid_checks import check_hybrid

    # The vocabulary is learned later; of a short text it may be smaller.
    sizes = {"vocab_size": options["vocab_size"], "seq_len": config.seq_len, **options["sizes"]}
    with torch.device("meta"):
        model = build_model(ModelConfig(**sizes))
    check_hybrid(model, parallel, world_size)


def launched_rank() -> int:
    """Return the rank that a launcher has given to this process; 0 without one."""
    from slimlab.comm.launchers import rank_in

    kind = launcher_of(os.environ).kind
    if kind == "torch":
        return int(os.environ["RANK"])
    return rank_in(os.environ) if kind == "mpi" else 0
