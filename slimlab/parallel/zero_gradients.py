"""Gradients of flat parameters: each unit's row is summed over the ranks when it is complete.

Chapter 08 uses it for ZeRO. It has the methods of slimlab.parallel.data_buckets.GradientBuckets, so
that slimlab.parallel.data.DataParallel's way through a step serves both; but of the sum a rank
keeps its shard alone. In stage 1 ranks keep their own whole rows too, add up the gradients of
micro-batches there, and send once per step; in stages 2 and 3 a row lives from the first gradient
of a unit to its last, and every micro-batch is sent.

Rows are sent in a fixed order, the last unit's first, since ranks must make the same calls.

Production sends on a stream of its own while the backward pass goes on.
"""

from functools import partial

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import InputError, check_number, require
from slimlab.parallel.zero_shards import FlatParameter, held_bytes
from slimlab.train.optimizer_checks import LEAST


class ShardedGradients:
    """The gradients of all units.

    flats         flat parameters that are trained, in the order of sending
    stage         of ZeRO
    check_finite  look for gradients that are not finite before they are mixed with other ranks'

    names         of the parameters, in the order of sending
    bad_name      the first of them whose gradient is not finite on this rank
    unused        those that no rank used in the last step
    whole_peak_bytes  most memory that whole rows had at one time
    """

    def __init__(self, flats: list[FlatParameter], stage: int, check_finite: bool):
        self.flats, self._stage, self._check_finite = flats, stage, check_finite
        self.names = [name for flat in flats for name in flat.names]
        self.bad_name: str | None = None
        self.unused: list[str] = []
        self.whole_peak_bytes = 0
        self._sending, self._next = False, 0
        self._filling: set[FlatParameter] = set()
        self._hooks = [
            param.register_post_accumulate_grad_hook(partial(self._arrive, flat, number))
            for flat in flats
            for number, param in enumerate(flat.params)
        ]

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def begin_step(self) -> None:
        """Forget all gradients."""
        self.bad_name = None
        for flat in self.flats:
            flat.filled, flat.reduced = [False] * len(flat.params), False
            for param in flat.params:
                param.grad = None

    def begin_pass(self, send: bool) -> None:
        """Prepare for a backward pass.

        send  it is the last of the step; in stages 2 and 3 every pass is sent
        """
        self._sending, self._next = send or self._stage > 1, 0
        for flat in self.flats:
            flat.arrived, flat.sent = [False] * len(flat.params), False

    def filled(self) -> list[bool]:
        """Tell which parameters got a gradient in this step on this rank, in the order of names."""
        return [one for flat in self.flats for one in flat.filled]

    def send_before(self, flat: FlatParameter | None) -> None:
        """Send the rows that stand before one in the order, zeros for what is missing.

        flat  the row that may still be filled; None: send all that are left

        Communicates: one reduce_scatter per row that has not been sent.
        """
        while self._sending and self._next < len(self.flats) and self._flat is not flat:
            self._send()

    def send_rest(self) -> None:
        """Send all rows that are left, if this pass is to be sent, and end it.

        Communicates: as send_before.
        """
        self.send_before(None)
        self._sending = False

    def finish(self, factor: float, used: list[bool], accepted: bool = True) -> None:
        """Leave the scaled sums in the shards.

        factor    what each sum is multiplied by
        used      which parameters have a gradient on some rank, in the order of names
        accepted  False: the step is about to be refused
        """
        for flat in self.flats:
            flat.shard_grad.mul_(factor)
        self.unused = [name for name, one in zip(self.names, used) if not one]

    def forward_without_data(self) -> None:
        """Make the calls of a forward pass, of which there are none in stages 1 and 2.

        Communicates: nothing.
        """

    def give_up(self) -> None:
        """Free what a pass that was not finished has left."""
        self._sending = False
        self._filling.clear()
        for flat in self.flats:
            flat.drop_gradients()

    def renew_weights(self) -> None:
        """Bring what the ranks have changed in their shards into every rank's rows.

        Communicates: one all_gather per row.
        """
        for flat in reversed(self.flats):
            flat.exchange()

    @property
    def _flat(self) -> FlatParameter:
        return self.flats[self._next]

    def _arrive(self, flat: FlatParameter, number: int, param: nn.Parameter) -> None:
        if flat.arrived[number] or flat.sent:
            raise InputError(
                "one gradient for each parameter in a backward pass, before that of the unit is "
                "sent",
                f"{'a late' if flat.sent else 'a second'} one for {flat.names[number]}",
                "call backward through this model only, once per micro-batch; let the forward "
                "pass go through the units in their order",
            )
        flat.take(number)
        self._filling.add(flat)
        while self._sending and self._next < len(self.flats) and all(self._flat.arrived):
            self._send()

    def _send(self) -> None:
        flat = self._flat
        flat.fill_up()
        self._filling.add(flat)
        whole_bytes = held_bytes([one.whole_grad for one in self._filling])
        self.whole_peak_bytes = max(self.whole_peak_bytes, whole_bytes)
        if self._check_finite and self.bad_name is None:
            number = flat.not_finite()
            self.bad_name = None if number is None else flat.names[number]
        flat.reduce()
        self._filling.discard(flat)
        self._next += 1


def check_used(unused: list[str]) -> None:
    """Refuse parameters that no rank used: one count of steps serves a whole shard.

    unused  their names

    Raises InputError.
    """
    more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
    require(
        not unused,
        "a gradient for every parameter that is trained, on some rank",
        f"none on any rank for {', '.join(unused[:5])}{more}",
        "freeze what the objective does not use: param.requires_grad_(False). AdamW counts its "
        "steps once for a shard, so it cannot pass over a part of it. No weight was changed",
    )


def clip_shards(flats: list[FlatParameter], comm: Communicator, max_norm: float) -> Tensor:
    """Shorten the gradients in all ranks' shards by one factor if they are too long together.

    flats, comm, max_norm  of slimlab.parallel.zero.Zero.clip
    returns  () their length before clipping, the same on every rank

    Communicates: one all_reduce of a number.
    Raises InputError for a max_norm that is not above 0.
    """
    if max_norm != torch.inf:
        check_number("max_norm", max_norm, float, LEAST, torch.inf)
    grads = [flat.shard_grad for flat in flats]
    squares = [torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2 for grad in grads]
    total_norm = comm.all_reduce(torch.stack(squares).sum()).sqrt()
    factor = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor)
    return total_norm.to(grads[0].dtype)
