"""The training loop on a mesh: slimlab.train.loop's, which all ranks go through together.

Chapter 11 trains with it. Rank 0 alone speaks, keeps the history and writes checkpoints; whatever
stops it in writing or reading is told to all. A run may be killed at any moment and goes on from
its last checkpoint: in the same layout with the same numbers, bit for bit, where the runtime adds
up in a fixed order; in another with the same up to rounding.

Signals act at once here, since ranks would have to agree on the step after which they stop.
Production has a launcher that restarts all ranks from the last checkpoint (torchrun, Slurm).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import TrainingConfig, require
from slimlab.parallel.hybrid_run import MeshRun
from slimlab.parallel.together import tell, with_all
from slimlab.plan.parallel_config import ParallelConfig
from slimlab.text.batches import text_ids
from slimlab.train.checkpoint_folder import latest, remove_leftovers
from slimlab.train.history import History
from slimlab.train.loop import Report, is_due, training_mode
from slimlab.train.run import Data, NotFiniteError, check_vocabulary
from slimlab.train.run_folder import only_writer


def train_on_mesh(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    comm: Communicator,
    parallel: ParallelConfig,
    *,
    held_out: Sequence[int] | Tensor | None = None,
    run_folder: str | Path | None = None,
    resume: bool = True,
    new_settings: bool = False,
    notes: dict | None = None,
    show: bool = True,
    say: Callable[[str], None] = print,
    watch: Callable[[dict], None] | None = None,
) -> tuple[MeshRun, History]:
    """Train a model on all ranks, from its present weights or from the run's last checkpoint.

    model       a whole Decoder of the same form on every rank, which is cut
    data        (N,) token ids, or a function from the number of a step to its whole batch; the same
                on every rank
    config      a TrainingConfig
    comm        of all ranks
    parallel    the layout
    held_out    ids to measure by; None: no measurement
    run_folder  the same folder for all ranks; of any layout, or of slimlab.train.loop.train. None:
                nothing is written
    resume, new_settings, notes, show, say, watch  as in slimlab.train.loop.train; rank 0 alone
                shows, says and is watched
    returns     the run, with this rank's part of the model, and its history: on rank 0 with the
                steps before an interruption

    Communicates: what MeshRun does.
    Raises InputError, on every rank, as slimlab.train.loop.train and Hybrid do.
    """
    run = MeshRun(model, data, config, comm, parallel, notes)
    first = comm.rank == 0
    ids = None if held_out is None else check_vocabulary(text_ids(held_out, 1), run.model)
    folder = Path(run_folder) if run_folder is not None else None
    with ExitStack() as stack:
        stack.enter_context(training_mode(run, run.config))
        torch.manual_seed(config.seed)
        if folder is not None:
            with_all(comm, _lock, first, folder, stack)
            _begin_or_go_on(run, folder, resume, say, new_settings)
        mine = (folder, show, watch) if first else (None, False, None)
        report = stack.enter_context(with_all(comm, Report, run, *mine))
        try:
            _repeat(run, ids, folder, report)
        except NotFiniteError as error:
            raise error.with_last_good(folder) from error
        return run, report.history


def _repeat(run: MeshRun, ids: Tensor | None, folder: Path | None, report: Report) -> None:
    config = run.config
    while run.step < config.num_steps:
        record = run.update()
        if ids is not None and is_due(run.step, config.validate_every, config):
            batch_size = config.micro_batch_size or config.batch_size
            record["validation_loss"] = run.measure(ids, config.seq_len, batch_size)
        report.note(record)
        if folder is not None and is_due(run.step, config.save_every, config):
            with_all(run.comm, report.file.sync)
            run.save(folder)


def _lock(first: bool, folder: Path, stack: ExitStack) -> None:
    if first:
        stack.enter_context(only_writer(folder))


def _begin_or_go_on(
    run: MeshRun, folder: Path, resume: bool, say: Callable[[str], None], new_settings: bool
) -> None:
    first = run.comm.rank == 0
    name = tell(run.comm, with_all(run.comm, _newest, first, folder, resume, say))
    if not name:
        run.save(folder)
        return
    run.restore(folder / name, say, new_settings)
    if first:
        say(f"going on from {folder / name}")


def _newest(first: bool, folder: Path, resume: bool, say: Callable[[str], None]) -> str:
    if not first:
        return ""
    remove_leftovers(folder)
    found = latest(folder, say)
    require(
        found is None or resume,
        "a folder without checkpoints, since resume=False",
        f"{folder}, which holds {found.name if found else 'none'}",
        "go on with resume=True, or give another folder",
    )
    return "" if found is None else found.name
