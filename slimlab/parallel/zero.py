"""ZeRO: what data parallelism keeps on every rank is cut into shards, one for each rank.

Chapter 08 explains it. Ranks work on their own parts of a batch, as in data parallelism, and come
to the same weights; but each updates only its shard of them, so that only it needs the optimizer's
state of that shard (stage 1), its gradients (stage 2), and, between uses, its weights (stage 3).

    stage  weights  gradients  optimizer  calls
    1      whole    whole      shard      reduce_scatter of gradients, all_gather of new weights
    2      whole    shard      shard      the same, gradients in every micro-batch
    3      shard    shard      shard      all_gather before use, forward and backward, too

All three send gradients by reduce_scatter, since a rank needs only its shard of the sum: with the
all_gather of weights that is what one all_reduce moves. Stage 3 moves half as much again.

Production: ZeroRedundancyOptimizer (stage 1, by whole parameters) and fully_shard (stage 3) of
torch, DeepSpeed. They keep 16-bit weights beside 32-bit masters, and overlap calls with computing.
Rajbhandari et al. 2020 (arXiv:1910.02054); Zhao et al. 2023 (arXiv:2304.11277).
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import require
from slimlab.parallel.data import DataParallel, is_empty
from slimlab.parallel.data_replicas import broadcast_model
from slimlab.parallel.zero_checkpoint import load_shards, save_shards
from slimlab.parallel.zero_gradients import ShardedGradients, check_used, clip_shards
from slimlab.parallel.zero_shards import FlatParameter, held_bytes, rows_of
from slimlab.parallel.zero_stage3 import ShardedUnits
from slimlab.parallel.zero_units import units_of
from slimlab.plan.zero import check_stage
from slimlab.train.accumulate import Objective, split_batch
from slimlab.train.optimizer import optimizer_of_groups, parameter_groups


class Zero(DataParallel):
    """One rank's share of a model in training: its shards, and what of the whole the stage keeps.

    model         changed in place: it gets the weights of rank 0, which become views of flat rows.
                  In stage 3 they read as NaN but while a unit computes, and all ranks must go
                  forward together, also without gradients
    comm          of the ranks that share the model: all, or the group of a mesh's axis data
    stage         1, 2 or 3
    optimizer     "adamw", "adamw_own" or "sgd", as in slimlab.train.optimizer
    lr, weight_decay, betas, eps, momentum, decay_embeddings  as in make_optimizer there
    prefetch      in stage 3, ask for the next unit's weights before a unit computes
    check_finite  name the rank and the parameter if a gradient is not finite
    broadcast     False: the ranks' models are known to be equal already

    optimizer     of torch's form, over this rank's shards; a schedule sets its groups' lr
    units         of slimlab.parallel.zero_units.Unit
    rows          of slimlab.parallel.zero_shards.FlatParameter, in the order of the units
    num_steps     updates made

    Communicates: what broadcast_model does; close(), in stage 3, one all_gather per row.
    Raises InputError if the ranks' models differ, nothing is to be trained, or a setting is wrong.
    """

    def __init__(
        self,
        model: nn.Module,
        comm: Communicator,
        *,
        stage: int,
        lr: float,
        optimizer: str = "adamw",
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.9,
        decay_embeddings: bool = True,
        prefetch: bool = True,
        check_finite: bool = True,
        broadcast: bool = True,
    ):
        check_stage(stage)
        settings = {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum}
        groups = parameter_groups(model, weight_decay, decay_embeddings=decay_embeddings)
        optimizer_of_groups(optimizer, groups, **settings)  # refuses wrong settings first
        matrices = parameter_groups(model, 1.0, decay_embeddings=decay_embeddings)
        decaying = {p for group in matrices if group["weight_decay"] for p in group["params"]}
        if broadcast:
            broadcast_model(model, comm)
        self.stage, self.units = stage, units_of(model)
        flats = [rows_of(unit.params, decaying, comm, stage) for unit in self.units]
        self.rows = [flat for some in flats for flat in some]
        if stage == 3:
            buckets = ShardedUnits(self.units, flats, model, check_finite, prefetch)
        else:
            trained = [flat for some in reversed(flats) for flat in some]
            buckets = ShardedGradients(trained, stage, check_finite)
        self._connect(model, comm, buckets)
        self._has_gradients, self.num_steps = False, 0
        shards = [{"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)]
        for flat in buckets.flats:
            flat.make_pieces(*(group["params"] for group in shards))
        self.optimizer = optimizer_of_groups(optimizer, shards, **settings)

    def backward(
        self,
        loss_sum: Tensor | None,
        num_tokens: int | Tensor,
        *,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> tuple[Tensor, int] | None:
        """Back-propagate, and make this rank's shards of gradients those of the mean loss.

        In stages 2 and 3 all ranks must make equally many calls, those without data with None;
        gradients() sees to that.

        loss_sum, num_tokens, scale  as in DataParallel.backward
        returns  as there: the mean loss over all ranks' tokens and their number, the same on every
                 rank; None inside no_sync

        Communicates: one reduce_scatter per flat parameter, in stage 3 one all_gather for each that
        the backward pass reads; then one all_reduce of a few numbers. Inside no_sync: nothing in
        stage 1, all but the last in stages 2 and 3.
        Raises InputError, on every rank, if no rank has a token, a gradient is not finite, or a
        parameter has none on any rank.
        """
        self._check_open("backward")
        self._has_gradients = False
        try:
            if loss_sum is None:
                self.buckets.forward_without_data()
            result = super().backward(loss_sum, num_tokens, scale=scale)
            if not self._sync and self.stage > 1:
                self.buckets.send_rest()
        except BaseException:
            self.buckets.give_up()
            raise
        return result

    def gradients(
        self,
        batch: object | None,
        objective: Objective,
        micro_batch_size: int | None = None,
        *,
        context: Callable = nullcontext,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
    ) -> tuple[Tensor, int]:
        """Make this rank's shards of gradients those of the mean loss over all ranks' tokens.

        batch, objective, context, scale  as in DataParallel.gradients
        micro_batch_size  as there; ranks may need different numbers of pieces
        returns           as there

        Communicates: what backward does, in stages 2 and 3 for every piece of the rank that has
        most; there, given a micro_batch_size, one all_reduce of a number before.
        Raises InputError as backward does.
        """
        self._check_open("gradients")
        choices = {"context": context, "scale": scale}
        if self.stage > 1 and micro_batch_size is not None:
            mine = 1 if is_empty(batch) else len(split_batch(batch, micro_batch_size))
            number = torch.tensor([mine], device=self.comm.device)
            missing = int(self.comm.all_reduce(number, op="max")) - mine
            with self.no_sync():
                for _ in range(missing):
                    self.backward(None, 0)
        try:
            return super().gradients(batch, objective, micro_batch_size, **choices)
        except BaseException:
            self.buckets.give_up()  # the forward pass too may have been left
            raise

    def clip(self, max_norm: float) -> Tensor:
        """Shorten all gradients by one factor if their common length is above max_norm.

        max_norm  length that the gradients of the whole model may have together, above 0; infinity
                  only measures
        returns   () their length before clipping, the same on every rank

        Communicates: one all_reduce of a number.
        Raises InputError for a max_norm that is not above 0, and if there are no gradients.
        Equal to slimlab.train.optimizer.clip_gradients on the whole model.
        """
        self._check_gradients("clip")
        return clip_shards(self.buckets.flats, self.comm, max_norm)

    def step(self) -> None:
        """Update this rank's shards; the ranks exchange the new weights, in stage 3 at their use.

        Communicates: in stages 1 and 2 one all_gather per flat parameter.
        Raises InputError if there are no gradients since the last step.
        """
        self._check_gradients("step")
        self.optimizer.step()
        self.num_steps += 1
        self._has_gradients = False
        self.buckets.renew_weights()

    def full_gradients(self) -> dict[str, Tensor]:
        """Return the whole gradients, by the names of the parameters, the same on every rank.

        Communicates: one all_gather per flat parameter that is trained.
        Raises InputError if there are no gradients since the last step.
        """
        self._check_gradients("full_gradients")
        return self._full(lambda flat: flat.shard_grad)

    def full_weights(self) -> dict[str, Tensor]:
        """Return copies of the whole weights, by the names of the parameters, on every rank.

        Communicates: one all_gather per flat parameter; in stages 1 and 2 frozen ones are at hand.
        """
        found = self._full(lambda flat: flat.shard)
        named = self.model.named_parameters()
        return {n: found[n] if n in found else p.detach().clone() for n, p in named}

    def save(
        self, folder: str | os.PathLike, step: int, *, extra: dict | None = None, keep: int = 2
    ) -> Path:
        """Write a checkpoint, every rank its shard, whole or not at all.

        folder   of the run, the same for all ranks, made if missing
        step     updates made so far; gives the checkpoint its name
        extra    more that the run needs to go on, for JSON; that of rank 0 counts
        keep     so many checkpoints stay, of this step and before it
        returns  the path of the checkpoint

        Communicates: three all_gathers of a message, one after each part of the work.
        Raises InputError, on every rank, if a whole checkpoint of this step is there already, or a
        rank cannot write; the last good checkpoint is then untouched.
        """
        self._check_open("save")
        return save_shards(self, folder, step, extra or {}, keep)

    def load(self, path: str | os.PathLike, say: Callable[[str], None] = print) -> tuple[int, dict]:
        """Go on from a checkpoint of any number of ranks, any stage, or one process.

        path     a checkpoint of save or of slimlab.train.checkpoint, or the folder of a run, of
                 which the newest whole one is taken
        say      told, on rank 0, of damaged checkpoints that are passed over
        returns  the step, and what the run added as extra

        Communicates: three all_gathers and a broadcast of a message; in stages 1 and 2 one
        all_gather per flat parameter.
        Raises InputError, on every rank, for what is no checkpoint, damaged, or of another model,
        with the names; nothing is then changed.
        """
        self._check_open("load")
        source = load_shards(self, path, say)
        self._has_gradients, self._new_step = False, True
        self.buckets.renew_weights()
        return source.step, source.extra

    def held_bytes(self) -> dict[str, int]:
        """Count the bytes of the tensors that exist on this rank, from their storages.

        returns  "weights", "gradients", "optimizer" (AdamW's averages) and "optimizer_steps"; what
                 of them exists for a moment only, in whole rows, is apart: "gathered" (weights, in
                 stage 3) and "unreduced" (gradients, in stages 2 and 3) at this time, and the most
                 there was at one time, "gathered_peak" and "unreduced_peak"
        """
        is_3, kept = self.stage == 3, list(self.model.parameters())
        states = [item for state in self.optimizer.state.values() for item in state.items()]
        rows = [flat.whole for flat in self.rows]
        grads = [flat.whole_grad for flat in self.rows] if self.stage > 1 else []
        return {
            "weights": held_bytes([flat.shard for flat in self.rows] if is_3 else kept),
            "gradients": held_bytes([flat.shard_grad for flat in self.rows]),
            "optimizer": held_bytes([one for key, one in states if key != "step"]),
            "optimizer_steps": held_bytes([one for key, one in states if key == "step"]),
            "gathered": held_bytes(rows) if is_3 else 0,
            "gathered_peak": self.buckets.gathered_peak_bytes if is_3 else 0,
            "unreduced": held_bytes(grads),
            "unreduced_peak": self.buckets.whole_peak_bytes if grads else 0,
        }

    def _full(self, shard_of: Callable[[FlatParameter], Tensor | None]) -> dict[str, Tensor]:
        found = {}
        for flat in self.rows:
            shard = shard_of(flat)
            if shard is not None:
                whole = self.comm.all_gather(shard.clone())
                found |= {name: view for name, view in zip(flat.names, flat.views(whole))}
        return found

    def _finish_step(self) -> tuple[Tensor, int]:
        result = super()._finish_step()
        check_used(self.buckets.unused)
        self._has_gradients = True
        return result

    def _check_gradients(self, what: str) -> None:
        self._check_open(what)
        require(
            self._has_gradients,
            f"gradients before {what}()",
            "none since the last step, or such as were refused",
            "call gradients(batch, objective) first",
        )
