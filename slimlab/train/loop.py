"""The training loop: update, measure, report, keep; and go on after whatever ended it.

Chapter 05 trains with it. What is promised: a run that is killed at any moment, kill -9 and the
moment of saving included, and then started again, ends with the same weights, bit for bit, as the
run that was not killed. On a GPU that holds as far as its kernels add in a fixed order
(torch.use_deterministic_algorithms); on a processor, for the same number of threads.

Production differs: many ranks (chapters 08 to 12), reading, saving and validation beside training
instead of between steps, restarts by a scheduler, alarms.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.config import TrainingConfig, require
from slimlab.text.batches import text_ids
from slimlab.text.progress import progress_bar
from slimlab.train.accumulate import Objective
from slimlab.train.checkpoint_folder import latest, remove_leftovers
from slimlab.train.history import History, HistoryFile
from slimlab.train.interrupts import Interrupted, StopSignals
from slimlab.train.metrics import held_out_loss, total_loss
from slimlab.train.objectives import causal_objective
from slimlab.train.run import Data, NotFiniteError, Run, check_vocabulary
from slimlab.train.run_folder import only_writer


def train(
    model: nn.Module,
    data: Data,
    config: TrainingConfig,
    *,
    objective: Objective = causal_objective,
    held_out: Sequence[int] | Tensor | list | None = None,
    run_folder: str | Path | None = None,
    resume: bool = True,
    new_settings: bool = False,
    notes: dict | None = None,
    show: bool = True,
    say: Callable[[str], None] = print,
    watch: Callable[[dict], None] | None = None,
) -> History:
    """Train a model in place, from its present weights or from the last checkpoint of the run.

    model       with parameters in 32 bits or more, on any device; moved to config.device
    data        (N,) token ids, from which windows are drawn; or a function from the number of a
                step, from 0, to its batch, which must give the same batch every time
    config      a TrainingConfig
    objective   as in slimlab.train.objectives
    held_out    ids to measure by, or a list of batches of the objective; None: no measurement
    run_folder  for history.jsonl and checkpoints, also of step 0; None: nothing is written
    resume      go on if run_folder holds a checkpoint; False: refuse it
    new_settings  let the learning rate, the number of steps and what else is in
                run_folder.NEW_SETTINGS differ from those of the checkpoint, from there on
    notes       written into config.json and compared when the run goes on, such as a fingerprint
    show        draw a progress bar with loss and speed
    say         told what was found and done
    watch       called with the record of each step
    returns     a History, of the steps before an interruption too

    The random numbers of the caller are left as they were. Ctrl-C and SIGTERM end the step, save
    and raise Interrupted (without run_folder they act as ever).
    Raises InputError if a loss or gradient is not finite (weights and checkpoints are then those
    before that step), if the folder holds another run or is in use, and if saving fails.
    """
    run = Run(model, data, config, objective, notes)
    held_out = held_out_data(held_out, run.model)
    folder = Path(run_folder) if run_folder is not None else None
    with ExitStack() as stack:
        stack.enter_context(training_mode(run, config))
        torch.manual_seed(config.seed)
        if folder is not None:
            stack.enter_context(only_writer(folder))
            _begin_or_go_on(run, folder, resume, say, new_settings)
        report = stack.enter_context(Report(run, folder, show, watch))
        stop = stack.enter_context(StopSignals(enabled=folder is not None))
        try:
            _repeat(run, held_out, folder, stop, report)
        except NotFiniteError as error:
            raise error.with_last_good(folder) from error
        if stop.received is not None and run.step < config.num_steps:
            _end(run, folder, stop.received)
        return report.history


def _repeat(
    run: Run, held_out: object, folder: Path | None, stop: StopSignals, report: "Report"
) -> None:
    config = run.config
    while run.step < config.num_steps and stop.received is None:
        record = run.update()
        if held_out is not None and is_due(run.step, config.validate_every, config):
            record["validation_loss"] = _validate(run, held_out)
        report.note(record)
        due = is_due(run.step, config.save_every, config) or stop.received is not None
        if folder is not None and due:
            report.file.sync()
            run.save(folder)


class Report:
    """Records in memory, in the file of the run, on the progress bar, and to whoever watches.

    run     whose steps they are
    folder  of its history; None: nothing is written
    show    draw a bar
    watch   called with each record

    file, history  where the records are
    """

    def __init__(self, run: Run, folder: Path | None, show: bool, watch: Callable | None):
        self.file = HistoryFile(folder and folder / "history.jsonl", run.step)
        self.history = History(self.file.earlier)
        self.bar = progress_bar("training", run.config.num_steps, run.step, show)
        self.watch, self.measured = watch, ""

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_) -> None:
        """Close bar and file."""
        self.bar.close()
        self.file.close()

    def note(self, record: dict) -> None:
        """Take the record of a step.

        record  as in History
        """
        self.history.records.append(record)
        self.file.append(record)
        if "validation_loss" in record:
            self.measured = f", held out {record['validation_loss']:.3f}"
        self.bar.set_postfix_str(self.status(), refresh=False)
        self.bar.update()
        if self.watch is not None:
            self.watch(record)

    def status(self) -> str:
        """Say how the last steps went, on average."""
        recent = self.history.records[-20:]
        seconds = sum(record["seconds"] for record in recent)
        speed = sum(record["num_tokens"] for record in recent) / max(seconds, 1e-9)
        loss = sum(record["loss"] for record in recent) / len(recent)
        return f"loss {loss:.3f}{self.measured}, {speed:,.0f} tokens/s"


def is_due(step: int, every: int | None, config: TrainingConfig) -> bool:
    """Tell whether something is to be done after a step; after the last one it is in any case.

    step    updates made
    every   so many steps lie between; None: only after the last
    config  says which is the last
    """
    return step == config.num_steps or (every is not None and step % every == 0)


def held_out_data(held_out: object, model: nn.Module) -> object:
    """Return batches as they are; ids as a tensor, checked before the first step.

    held_out  as in train
    model     whose vocabulary it must be
    """
    is_batches = isinstance(held_out, list | tuple) and isinstance(
        next(iter(held_out), None), Tensor | tuple | list | dict
    )
    if held_out is None or is_batches:
        return held_out
    return check_vocabulary(text_ids(held_out, 1), model)


def _validate(run: Run, held_out: object) -> float:
    config = run.config
    if not isinstance(held_out, Tensor):
        loss_sum, num_tokens = total_loss(run.model, held_out, run.objective)
        return loss_sum / num_tokens
    batch_size = config.micro_batch_size or config.batch_size
    return held_out_loss(run.model, held_out, config.seq_len, batch_size)


@contextmanager
def training_mode(run: Run, config: TrainingConfig) -> Iterator[None]:
    """Train with recomputation as asked and random numbers of our own; put all back afterwards.

    run     whose model it is
    config  its recompute is read
    """
    model, before = run.model, run.model.training
    has_choice = hasattr(model, "recompute")
    require(
        has_choice or config.recompute == "none",
        'a model that can recompute, as recompute="block" asks',
        f"a {type(model).__name__} without an attribute `recompute`",
        'give recompute="none"',
    )
    recompute_before = model.recompute if has_choice else None
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.train()
        if has_choice:
            model.recompute = config.recompute
        try:
            yield
        finally:
            model.train(before)
            if has_choice:
                model.recompute = recompute_before


def _begin_or_go_on(
    run: Run, folder: Path, resume: bool, say: Callable[[str], None], new_settings: bool
) -> None:
    remove_leftovers(folder)
    found = latest(folder, say)
    if found is None:
        run.save(
            folder
        )  # the weights to begin with; and a full disk is known before an hour's work
        return
    require(
        resume,
        "a folder without checkpoints, since resume=False",
        f"{folder}, which holds {found.name}",
        "go on with resume=True, or give another folder",
    )
    run.restore(found, say, new_settings)
    say(f"going on from {found}")


def _end(run: Run, folder: Path, number: int) -> None:
    name = signal.Signals(number).name
    raise Interrupted(
        f"stopped by {name} after step {run.step} of {run.config.num_steps}, which is saved in "
        f"{folder}; the same call goes on from there",
        number,
    )
