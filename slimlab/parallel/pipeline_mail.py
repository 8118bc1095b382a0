"""What stages of a pipeline send each other: activations forward, their gradients backward.

Chapter 10 uses it. Which messages there are follows from the schedule: an instruction needs
products, and a product is made on another stage or on this one. Sends are only started, since a
blocking one would deadlock nearly every schedule; a receive waits.

A tensor that is sent must be kept until it has arrived. Asking would cost a call; instead, what
arrives later from the same stage proves it: whatever that stage needed for it, it had received.

Production: Megatron-LM and torch fuse a send with the receive that follows it
(batch_isend_irecv), as NCCL demands.
"""

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.comm.calls import MAX_TAG, Handle
from slimlab.config import require
from slimlab.parallel.pipeline_record import SlotClock
from slimlab.parallel.stages import Stage
from slimlab.plan.pipeline_schedule import FORWARD, Product, Schedule


class Mail:
    """One stage's messages in one step.

    comm      of the stages, in their order
    schedule  what each stage does

    stamps    of the product that was taken last: when it was sent and when it arrived, by the
              stages' clocks; None and None if it was no message, or messages are not stamped
    """

    def __init__(self, comm: Communicator, schedule: Schedule):
        self.comm, self.schedule, self._clock = comm, schedule, None
        # Twice, since a stamp has a tag of its own.
        self._num_tags = tag_of(schedule, (FORWARD, schedule.num_virtual_stages, 0))
        require(
            2 * self._num_tags <= MAX_TAG,
            f"at most {MAX_TAG // 4} products: virtual stages times micro-batches",
            f"{schedule.num_virtual_stages} times {schedule.num_micro_batches}",
            "take larger micro-batches",
        )
        self._made_at, self._used_at = _places(schedule)
        self.begin_step()

    def begin_step(self) -> None:
        """Forget the step before, which may have failed."""
        self._here: dict[Product, Tensor] = {}
        self._leaving: list[tuple[int, int, Handle]] = []
        self.stamps = None, None

    def stamp_with(self, clock: SlotClock | None) -> None:
        """Send the time beside every product; the same on every stage.

        clock  this stage's; None: send no times
        """
        self._clock = clock

    def take(self, product: Product | None) -> Tensor | None:
        """Return a product that was made before, here or elsewhere; wait until it is there.

        product  that the instruction needs; None: it needs none
        """
        self.stamps = None, None
        if product is None or product in self._here:
            return self._here.pop(product, None)
        src = self.schedule.place_of(product[1])[0]
        tensor = self.comm.recv(src, tag_of(self.schedule, product))
        if self._clock is not None:
            sent_s = self.comm.recv(src, self._num_tags + tag_of(self.schedule, product)).item()
            self.stamps = sent_s, self._clock.arrival(product, sent_s)
        self._let_go(src, self._made_at[product])
        return tensor

    def hand_on(self, product: Product, tensor: Tensor) -> None:
        """Send a product, or keep it if this stage needs it itself.

        product  that was made
        tensor   its value
        """
        dst = self.schedule.receiver_of(product)
        if dst is None:
            self._here[product] = tensor
            return
        tag, used_at = tag_of(self.schedule, product), self._used_at[product]
        self._leaving.append((dst, used_at, self.comm.isend(tensor, dst, tag)))
        if self._clock is not None:
            stamp = torch.tensor([self._clock.now_s], dtype=torch.float64).to(self.comm.device)
            handle = self.comm.isend(stamp, dst, self._num_tags + tag)
            self._leaving.append((dst, used_at, handle))

    def finish(self) -> None:
        """Wait until all that was sent has arrived."""
        for _, _, handle in self._leaving:
            handle.wait()
        self._leaving = []

    def _let_go(self, src: int, made_at: int) -> None:
        # What src used before it made this has arrived there: these waits return at once.
        kept = []
        for dst, used_at, handle in self._leaving:
            if dst == src and used_at <= made_at:
                handle.wait()
            else:
                kept.append((dst, used_at, handle))
        self._leaving = kept


def tag_of(schedule: Schedule, product: Product) -> int:
    """Return the tag of a product's message; every product of a step has its own.

    schedule  counts the micro-batches
    product   what is sent
    """
    kind, place, micro_batch = product
    return (2 * place + (kind != FORWARD)) * schedule.num_micro_batches + micro_batch


def _places(schedule: Schedule) -> tuple[dict[Product, int], dict[Product, int]]:
    """Find where in its maker's list a product is made, and where in its receiver's it is used."""
    made_at, used_at = {}, {}
    for stage, order in enumerate(schedule.stages):
        for number, one in enumerate(order):
            made_at |= dict.fromkeys(schedule.makes(stage, one), number)
            for product in schedule.needs(stage, one):
                if schedule.receiver_of(product) == stage:
                    used_at[product] = number
    return made_at, used_at


def table_group(stage: Stage, comm: Communicator, schedule: Schedule) -> Communicator | None:
    """Return the group of the two ranks that hold a tied table; None: there are no two.

    stage     of this rank
    comm      of the stages
    schedule  says where the first and the last virtual stage are

    Communicates: one split if there are two.
    """
    ends = schedule.place_of(0)[0], schedule.place_of(schedule.num_virtual_stages - 1)[0]
    if not stage.config.tie_embeddings or ends[0] == ends[1]:
        return None
    return comm.split(0 if comm.rank in ends else None, key=comm.rank)
