"""One training run: what it consists of, one step of it, and how it is kept and found again.

Chapter 05 shows `Run.update`, which is a training step in full; loop.py repeats it.

The batch of a step follows from the seed and the number of the step alone, so the place in the
data is one whole number. Production reads shards in a shuffled order and keeps the place in each.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.config import InputError, TrainingConfig, check_number, require
from slimlab.text.batches import text_ids, token_windows
from slimlab.train.accumulate import Objective, accumulate_gradients, move_batch
from slimlab.train.checkpoint import load_checkpoint, save_checkpoint
from slimlab.train.checkpoint_folder import latest, read_json
from slimlab.train.device import choose_device
from slimlab.train.optimizer import clip_gradients, make_optimizer
from slimlab.train.precision import LossScaler, autocast_for
from slimlab.train.run_folder import check_same_run
from slimlab.train.schedule import set_learning_rate, warmup_cosine
from slimlab.train.training_state import random_state, set_random_state

Data = Sequence[int] | Tensor | Callable[[int], object]


class NotFiniteError(InputError):
    """Say in which step, at which learning rate and where numbers ceased to be finite."""

    def with_last_good(self, folder: Path | None) -> "NotFiniteError":
        """Return the same error with the checkpoint from which the run can go on.

        folder  of the run, if it has one
        """
        good = latest(folder, lambda _: None) if folder is not None else None
        kept = f"the last good checkpoint is {good}" if good else "no run_folder, so no checkpoint"
        change = self.change
        if good:
            change += (
                "; new_settings=True goes on from the last good checkpoint with another peak_lr "
                "(if that fails again, remove the newest: its weights may be too large already)"
            )
        return NotFiniteError(self.asked, f"{self.given}; {kept}", change)


class Run:
    """A model with all that its training needs: optimizer, loss scaler, device, data and place.

    model      moved to the device; its parameters are in 32 bits or more
    data       token ids, from which windows are drawn, or a function from the number of a step,
               from 0, to its batch
    config     a TrainingConfig
    objective  as in slimlab.train.objectives
    notes      more to be written into config.json, and compared when a run goes on

    `step` counts the updates that were made. Raises InputError for ids outside the vocabulary and
    for a device that is not there.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        config: TrainingConfig,
        objective: Objective,
        notes: dict | None = None,
    ):
        self.device = choose_device(config.device, model)
        self.model = model.to(self.device)
        self.config, self.objective, self.step = config, objective, 0
        narrow = [name for name, p in model.named_parameters() if p.itemsize < 4]
        require(
            not narrow,
            "parameters of at least 32 bits",
            f"16 bits or fewer in {', '.join(narrow[:3])}",
            'give model.float(), and precision="bfloat16" for the matrix products',
        )
        if not callable(data):
            data = check_vocabulary(text_ids(data, config.seq_len), model)
        self.batch_at = data if callable(data) else partial(window_batch, data, config)
        self.optimizer = make_optimizer(
            config.optimizer,
            self.model,
            lr=config.peak_lr,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        self.scaler = LossScaler(enabled=config.precision == "float16")
        self.described = _describe(model, data, config, objective, notes)

    def update(self) -> dict:
        """Make one update: batch, gradient, learning rate, clipping, step.

        returns  a record, as in History

        Raises NotFiniteError if loss or gradient is not; the weights are then those before.
        """
        start_s = time.perf_counter()
        config = self.config
        lr = warmup_cosine(
            self.step,
            peak_lr=config.peak_lr,
            warmup_steps=config.warmup_steps,
            num_steps=config.num_steps,
            final_fraction=config.final_lr_fraction,
        )
        set_learning_rate(self.optimizer, lr)
        mean_loss, num_tokens = accumulate_gradients(
            self.model,
            move_batch(self.batch_at(self.step), self.device),
            self.objective,
            config.micro_batch_size,
            context=partial(autocast_for, self.device, config.precision),
            scale=self.scaler.scale,
        )
        self.scaler.unscale_(self.optimizer)
        loss = float(mean_loss)
        grad_norm = self._clip(loss, lr)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return {
            "step": self.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "num_tokens": num_tokens,
            "seconds": time.perf_counter() - start_s,
        }

    def _clip(self, loss: float, lr: float) -> float | None:
        """Clip, or raise; None where float16 gradients overflowed and the step will be skipped."""
        if math.isfinite(loss):
            limit = self.config.clip_norm or math.inf
            named = self.model.named_parameters()
            try:
                return float(clip_gradients(named, limit, error_if_nonfinite=True))
            except InputError:
                if self.scaler.enabled:
                    return None
        raise _not_finite(self.model, self.step + 1, loss, lr, self.config.clip_norm)

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of the present step into `folder`; returns its path."""
        return save_checkpoint(
            folder,
            model=self.model,
            optimizer=self.optimizer,
            step=self.step,
            data_position=self.step,
            random_state=random_state(self.device),
            config=self.described,
            extra={"scaler": self.scaler.state_dict()},
            keep=self.config.keep_checkpoints,
        )

    def restore(
        self, path: Path, say: Callable[[str], None] = print, new_settings: bool = False
    ) -> None:
        """Go on from a checkpoint of the same run.

        path          of the checkpoint
        say           told if the random state of another kind of device cannot be used, and of
                      what differs
        new_settings  as in slimlab.train.loop.train

        Raises InputError if it is of another configuration, naming the fields.
        """
        stored = read_json(path / "config.json")
        differing = check_same_run(stored, self.described, path.parent, new_settings)
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        found = load_checkpoint(path, self.model, self.optimizer)
        for group, decay in zip(self.optimizer.param_groups, decays):
            group["weight_decay"] = decay  # as asked now; the learning rate is set in every step
        self.step = found.data_position
        if differing:
            say(f"from step {self.step} on, other settings: {'; '.join(differing)}")
            check_number("num_steps", self.config.num_steps, int, self.step, math.inf)
        self.scaler.load_state_dict(found.extra["scaler"])
        if not set_random_state(found.random_state, self.device):
            say(f"{path} was saved on another kind of device: dropout draws anew on {self.device}")


def window_batch(ids: Tensor, config: TrainingConfig, step: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of one step from the text.

    ids      (N,) token ids
    config   its batch_size, seq_len and seed
    step     updates made before, from 0
    returns  inputs and targets (B, T), the same for the same seed and step
    """
    # Hashed, since neighbouring seeds must not give neighbouring draws; PyTorch uses 32 bits.
    digest = hashlib.sha256(f"{config.seed} {step}".encode()).digest()
    seed = int.from_bytes(digest[:4])
    return next(iter(token_windows(ids, config.seq_len, config.batch_size, 1, seed)))


def check_vocabulary(ids: Tensor, model: nn.Module) -> Tensor:
    """Refuse ids for which a model has no embedding, before it has worked for an hour.

    ids      (N,) token ids
    model    one without a configuration is taken at its word
    returns  ids

    Raises InputError with the first id that is outside.
    """
    vocab_size = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocab_size is not None:
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        require(
            not len(outside),
            f"ids of the model's vocabulary, from 0 to {vocab_size - 1}",
            f"{len(outside)} ids outside it, the first of them {outside[:1].tolist()}",
            "make the model with vocab_size=tokenizer.vocab_size, and encode with that tokenizer",
        )
    return ids


def _describe(
    model: nn.Module,
    data: Tensor | Callable,
    config: TrainingConfig,
    objective: Objective,
    notes: dict | None,
) -> dict:
    model_config = getattr(model, "config", None)
    described = {
        "model": asdict(model_config) if is_dataclass(model_config) else type(model).__name__,
        "training": asdict(config),
        "objective": getattr(objective, "__name__", type(objective).__name__),
        "notes": notes or {},
    }
    if not callable(data):
        described["data"] = hashlib.sha256(data.cpu().contiguous().numpy()).hexdigest()[:12]
    return described


def _not_finite(
    model: nn.Module, step: int, loss: float, lr: float, clip_norm: float | None
) -> NotFiniteError:
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.nn.utils.get_total_norm(grads.values()))
    first = next((n for n, grad in grads.items() if not grad.isfinite().all()), None)
    where = f"first not finite in {first}" if first else "each finite, the sum of squares not"
    return NotFiniteError(
        "a finite loss and finite gradients",
        f"step {step}: loss {loss:.6g}, learning rate {lr:.3g}, gradient norm {norm:.6g}, {where}",
        f"lower peak_lr{'' if clip_norm else ', set clip_norm=1.0'} or lengthen warmup_steps; if "
        "it happens in the first steps, look for a division by 0 or the logarithm of 0 in model "
        "and loss",
    )
