"""What context parallelism sends and computes, per rank, exactly: keys and values round a ring.

Chapter 09 predicts with it, and compares with what the ledgers counted. It reads sizes only. What a
rank sends grows with its own positions and with the number of ranks, so over all it is that of the
whole sequence, however many ranks there are; what it computes falls. A long enough sequence
therefore hides the messages behind the arithmetic.

Liu, Zaharia and Abbeel 2023 (arXiv:2310.01889), section 3.1.
"""

from dataclasses import dataclass

from slimlab.config import ModelConfig, check_choice, check_divides, check_size
from slimlab.plan.params import check_config

PIECES = {"contiguous": 1, "zigzag": 2}  # of each rank


@dataclass(frozen=True)
class RingTraffic:
    """What each rank sends in one attention layer.

    forward_messages   in the forward pass
    backward_messages  in the backward pass
    message_bytes      payload of each
    """

    forward_messages: int
    backward_messages: int
    message_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Both passes."""
        return (self.forward_messages + self.backward_messages) * self.message_bytes


def predict_ring(
    config: ModelConfig, batch_size: int, seq_len: int, world_size: int, item_bytes: int
) -> RingTraffic:
    """Predict the messages that each rank sends in one attention layer.

    config      num_kv_heads and d_head are read
    batch_size  B, sequences that the ranks share
    seq_len     T, tokens of a whole sequence
    world_size  w, the number of ranks that share them
    item_bytes  bytes per element
    returns     w - 1 messages forward, 2 w - 1 backward, each of 2 B K E T/w elements; with w = 1
                none

    Raises InputError for sizes that are no whole numbers of at least 1, or do not divide.
    """
    check_config(config)
    for name, size in (("batch_size", batch_size), ("item_bytes", item_bytes)):
        check_size(name, size)
    _check_cut(seq_len, world_size, 1)
    size = 2 * batch_size * config.num_kv_heads * config.d_head * (seq_len // world_size)
    backward = 0 if world_size == 1 else 2 * world_size - 1
    return RingTraffic(world_size - 1, backward, size * item_bytes)


def ring_scores(seq_len: int, world_size: int, order: str = "contiguous") -> tuple[int, ...]:
    """Count the scores that each rank computes of a causal sequence, per head.

    seq_len     T, tokens of a whole sequence
    world_size  w, the number of ranks
    order       "contiguous" or "zigzag", see slimlab.parallel.context
    returns     scores of each rank. Pieces that a mask hides whole are left out, those on the
                diagonal computed whole: contiguous (r + 1) (T/w)^2, zigzag the same on every rank

    Raises InputError for an unknown order, and sizes that do not divide.
    """
    check_choice("order", order, tuple(PIECES))
    _check_cut(seq_len, world_size, PIECES[order])
    piece = seq_len // (world_size * PIECES[order])
    if order == "contiguous":
        return tuple((rank + 1) * piece**2 for rank in range(world_size))
    # Piece i meets pieces 0 to i; a rank has r and 2 w - 1 - r.
    return ((2 * world_size + 1) * piece**2,) * world_size


def _check_cut(seq_len: int, world_size: int, pieces: int) -> None:
    check_size("seq_len", seq_len)
    check_size("world_size", world_size)
    name = "world_size" if pieces == 1 else f"{pieces} * world_size"
    check_divides(name, pieces * world_size, "seq_len", seq_len)
