"""A training run on a mesh: slimlab.train.run's Run, whose model lies cut over the ranks.

Chapter 11 trains with it, through slimlab.parallel.hybrid_loop. Configuration, schedule, place in
the data, records and checkpoints are those of a run in one process: it can go on here, and a run
that was begun here can go on in one process or in any other layout.

Every rank draws the whole batch of a step, which follows from the seed and the number of the step,
and takes its replica's part. Production gives each replica a reader of its own.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import InputError, TrainingConfig, check_number, require
from slimlab.parallel.data import NotFiniteGradientsError
from slimlab.parallel.hybrid import Hybrid
from slimlab.parallel.hybrid_checkpoint import load_hybrid, save_hybrid
from slimlab.parallel.hybrid_checks import RECOMPUTE, check_hybrid
from slimlab.parallel.hybrid_stages import evaluate_stages
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.parallel.together import with_all
from slimlab.plan.parallel_config import ParallelConfig, num_micro_batches
from slimlab.text.batches import consecutive_windows
from slimlab.train.accumulate import move_batch
from slimlab.train.checkpoint_folder import read_json
from slimlab.train.metrics import evaluating
from slimlab.train.objectives import IGNORE, causal_objective
from slimlab.train.precision import autocast_for
from slimlab.train.run import Data, NotFiniteError, Run
from slimlab.train.run_folder import check_same_run
from slimlab.train.schedule import set_learning_rate, warmup_cosine
from slimlab.train.training_state import random_state


class MeshRun(Run):
    """One rank's part in a run.

    model     a whole Decoder of the same form on every rank; it is moved to comm's device and cut
    data      as in Run, the same on every rank
    config    a TrainingConfig; its device is comm's, its micro_batch_size that of parallel
    comm      of all ranks
    parallel  the layout
    notes     as in Run

    hybrid    of slimlab.parallel.hybrid
    model     this rank's part of the model

    Communicates: what Hybrid does.
    Raises InputError, on every rank before it communicates, for a layout that does not fit the
    model, the batch or the number of ranks, and for float16.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: TrainingConfig,
        comm: Communicator,
        parallel: ParallelConfig,
        notes: dict | None = None,
    ):
        require(
            config.precision != "float16",
            "precision float32 or bfloat16 on a mesh",
            'precision = "float16"',
            'give precision="bfloat16": loss scaling would have to skip a step on all ranks alike',
        )
        if config.recompute == "block":
            parallel = replace(parallel, recompute="full")
        check_hybrid(model, parallel, comm.world_size)
        num_micro_batches(parallel, config.batch_size)
        recompute = RECOMPUTE[parallel.recompute]
        config = replace(config, device=str(comm.device), recompute=recompute)
        super().__init__(model, data, config, causal_objective, notes)
        self.comm, self.parallel = comm, parallel
        self.hybrid = Hybrid(
            self.model,
            comm,
            parallel,
            lr=config.peak_lr,
            optimizer=config.optimizer,
            weight_decay=config.weight_decay,
            betas=config.betas,
            seed=config.seed,
        )
        self.model, self.optimizer = self.hybrid.model, self.hybrid.optimizer

    def update(self) -> dict:
        """Make one update, as Run.update does, on all ranks together.

        returns  a record, as in History; but for the seconds the same on every rank

        Communicates: what Hybrid's gradients, clip and step do.
        Raises NotFiniteError, on every rank, if loss or gradient is not finite; the weights are
        then those before.
        """
        start_s, config, hybrid = time.perf_counter(), self.config, self.hybrid
        lr = warmup_cosine(
            self.step,
            peak_lr=config.peak_lr,
            warmup_steps=config.warmup_steps,
            num_steps=config.num_steps,
            final_fraction=config.final_lr_fraction,
        )
        set_learning_rate(self.optimizer, lr)
        share = move_batch(hybrid.share_of(self.batch_at(self.step)), self.device)
        context = partial(autocast_for, self.device, config.precision)
        try:
            mean_loss, num_tokens = hybrid.gradients(share, context=context)
            grad_norm = float(hybrid.clip(config.clip_norm or math.inf))
        except NotFiniteGradientsError as error:
            raise self._not_finite(error.given, lr) from error
        loss = float(mean_loss)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._not_finite(f"loss {loss:.6g}, gradient norm {grad_norm:.6g}", lr)
        hybrid.step()
        self.step += 1
        return {
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "num_tokens": num_tokens,
            "seconds": time.perf_counter() - start_s,
        }

    def measure(self, ids: Tensor, seq_len: int, batch_size: int) -> float:
        """Measure the mean loss of a text's tokens, as slimlab.train.metrics.held_out_loss does.

        ids         (N,) token ids, the same on every rank
        seq_len     T, tokens of a window; a shorter text is one window
        batch_size  B, windows at a time; each replica measures all of them
        returns     nats per token, the same on every rank

        Communicates: what the forward pass of the model does.
        """
        loss_sum, num_tokens = 0.0, 0
        windows = consecutive_windows(ids, min(seq_len, len(ids) - 1), batch_size)
        with evaluating(self.model):
            for window in windows:
                batch = move_batch(self._padded(window), self.device)
                piece_loss, piece_tokens = self._evaluate(batch)
                loss_sum, num_tokens = loss_sum + piece_loss, num_tokens + piece_tokens
        return loss_sum / num_tokens

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of the present step; all ranks call it.

        folder   of the run
        returns  its path

        Communicates: what save_hybrid does.
        """
        return save_hybrid(
            self.hybrid,
            folder,
            self.step,
            data_position=self.step,
            random_state=random_state(self.device),
            config=self.described,
            extra={"scaler": self.scaler.state_dict(), "layout": str(self.parallel)},
            keep=self.config.keep_checkpoints,
        )

    def restore(
        self, path: Path, say: Callable[[str], None] = print, new_settings: bool = False
    ) -> None:
        """Go on from a checkpoint of the same run, in whatever layout it was saved.

        path, say, new_settings  as in Run.restore; rank 0 alone speaks

        Communicates: an all_gather of a text, and what load_hybrid does.
        Raises InputError, on every rank, if it is of another configuration, naming the fields.
        """
        say = say if self.comm.rank == 0 else _say_nothing
        differing = with_all(self.comm, self._check_same, path, new_settings)
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        found = load_hybrid(self.hybrid, path, say)
        for group, decay in zip(self.optimizer.param_groups, decays):
            group["weight_decay"] = decay
        self.step = found.data_position
        if differing:
            say(f"from step {self.step} on, other settings: {'; '.join(differing)}")
            check_number("num_steps", self.config.num_steps, int, self.step, math.inf)
        before = found.extra.get("layout", "one process")
        if before != str(self.parallel):
            say(f"saved by {before}; going on with {self.parallel}")

    def _evaluate(self, batch: tuple[Tensor, Tensor]) -> tuple[float, int]:
        if self.hybrid.pipeline is not None:
            return evaluate_stages(self.hybrid.pipeline, batch, tensor_parallel_objective)
        loss_sum, num_tokens = tensor_parallel_objective(self.model, batch)
        return float(loss_sum), int(num_tokens)

    def _check_same(self, path: Path, new_settings: bool) -> list[str]:
        stored = read_json(path / "config.json")
        return check_same_run(stored, self.described, path.parent, new_settings)

    def _padded(self, window: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Make the last, shorter window one that sequence parallelism can divide."""
        inputs, targets = window
        more = -inputs.shape[1] % (self.parallel.tensor if self.parallel.sequence_parallel else 1)
        pad = torch.nn.functional.pad
        return pad(inputs, (0, more)), pad(targets, (0, more), value=IGNORE)

    def _not_finite(self, given: str, lr: float) -> InputError:
        return NotFiniteError(
            "a finite loss and finite gradients",
            f"step {self.step + 1}, learning rate {lr:.3g}: {given}",
            "lower peak_lr, set clip_norm=1.0 or lengthen warmup_steps; if it happens in the first "
            "steps, look for a division by 0 or the logarithm of 0 in model and loss",
        )


def _say_nothing(text: str) -> None:
    pass
