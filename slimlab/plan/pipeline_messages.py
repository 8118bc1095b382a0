"""What the stages of a pipeline send: every message of a step, and the calls that end it.

Chapter 10 predicts with it, and compares with what the ledgers counted. Every pair of neighbours in
the order of the model exchanges B T D elements forward and as many backward for each micro-batch,
whatever the schedule; only where both are chunks of one stage nothing is sent. So interleaving with
v chunks sends v times as much.

Production (Megatron-LM) can cut each message over the tensor group and gather it on arrival.
Narayanan et al. 2021 (arXiv:2104.04473), section 4.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from slimlab.config import check_size, require
from slimlab.plan.pipeline_schedule import FORWARD, INPUT_GRADIENT, Schedule

NUMBER_BYTES = 8


@dataclass(frozen=True)
class StageMessages:
    """What one stage sends, receives and calls in a step.

    sent         (stage, bytes) of each message, in the order of sending
    received     (stage, bytes) of each message, in the order in which it is needed
    all_reduces  payload of each: the report, which has loss, tokens and a digest of each stage's
                 batch; then, on the first and the last stage, the gradient of a tied table
    """

    sent: tuple[tuple[int, int], ...]
    received: tuple[tuple[int, int], ...]
    all_reduces: tuple[int, ...]

    @property
    def sent_bytes(self) -> int:
        """The payload of all messages that are sent."""
        return sum(n_bytes for _, n_bytes in self.sent)

    @property
    def num_calls(self) -> int:
        """Every send, receive and all_reduce."""
        return len(self.sent) + len(self.received) + len(self.all_reduces)


def predict_step(
    schedule: Schedule,
    micro_batch_sizes: Sequence[int],
    seq_len: int,
    d_model: int,
    item_bytes: int,
    *,
    table_bytes: int = 0,
) -> tuple[StageMessages, ...]:
    """Predict the messages and calls of one step of each stage; without those of replicas.

    schedule           what each stage does
    micro_batch_sizes  sequences of each micro-batch
    seq_len            T; under sequence parallelism the positions of a rank
    d_model            D
    item_bytes         bytes per element of activations and their gradients
    table_bytes        of a tied table's gradient on a rank; 0 if none is tied
    returns            of each stage

    Raises InputError for sizes that are not whole numbers of at least 1.
    """
    sizes = {"seq_len": seq_len, "d_model": d_model, "item_bytes": item_bytes}
    for name, size in sizes.items():
        check_size(name, size)
    batches = schedule.num_micro_batches
    asked, given = f"sizes of {batches} micro-batches", f"{len(micro_batch_sizes)}"
    require(len(micro_batch_sizes) == batches, asked, given, "give one number for each")
    row = seq_len * d_model * item_bytes
    ends = schedule.place_of(0)[0], schedule.place_of(schedule.num_virtual_stages - 1)[0]
    found = []
    for stage, order in enumerate(schedule.stages):
        sent, received = [], []
        for one in order:
            n_bytes = micro_batch_sizes[one.micro_batch] * row
            for product in schedule.needs(stage, one):
                if schedule.receiver_of(product) == stage:
                    received.append((schedule.place_of(product[1])[0], n_bytes))
            for product in schedule.makes(stage, one):
                dst = schedule.receiver_of(product)
                if product[0] in (FORWARD, INPUT_GRADIENT) and dst is not None:
                    sent.append((dst, n_bytes))
        reports = [(2 + schedule.num_stages) * NUMBER_BYTES]
        if table_bytes and ends[0] != ends[1] and stage in ends:
            reports.append(table_bytes)
        found.append(StageMessages(tuple(sent), tuple(received), tuple(reports)))
    return tuple(found)
