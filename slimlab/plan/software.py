"""What a training program does to save time, apart from the layout: kernels, overlap, messages.

The step-time model (slimlab.plan.step_time) reads these choices; each is a fact about a program,
known before it runs, and none is a number to turn. Chapter 11 switches them one by one.

Production has more: kernels for each GPU, communication inside matrix products, 8-bit products.
"""

from dataclasses import dataclass

from slimlab.config import check_choice, require

ATTENTION = ("explicit", "fused")


@dataclass(frozen=True)
class Software:
    """The choices of a training program.

    attention         "explicit": all scores are written to memory; "fused": they never are, hidden
                      tiles of a causal mask are skipped, and the backward pass makes scores again
    fused_kernels     one kernel adds bias, dropout and residual, one adds bias and activates, one
                      scales, masks and normalises scores; else one kernel for each of these, and
                      scores in 32 bits
    fused_gradients   the product that makes a weight gradient adds it to the sum of micro-batches;
                      else it is written, and added by another kernel
    overlap_tensor    in the backward pass, collectives of tensor parallelism run beside products
                      that do not need their result
    overlap_data      gradients are summed over replicas while the backward pass goes on; with
                      zero_stage 3, weights are gathered while the block before computes
    split_messages    ranks of a tensor group send a part of each message between stages, and gather
                      it inside the host; else each sends all of it
    paired_messages   a stage sends to a neighbour and receives from it at once; else one after the
                      other
    gradient_bytes    2 or 4, per element of the sum of gradients
    item_bytes        per element of weights and activations: 2, and masters of 32 bits besides, or
                      4 throughout

    Raises InputError for a value that is none of these.
    """

    attention: str = "fused"
    fused_kernels: bool = True
    fused_gradients: bool = True
    overlap_tensor: bool = True
    overlap_data: bool = True
    split_messages: bool = True
    paired_messages: bool = True
    gradient_bytes: int = 4
    item_bytes: int = 2

    def __post_init__(self):
        check_choice("attention", self.attention, ATTENTION)
        for name in ("gradient_bytes", "item_bytes"):
            given, change = f"{name} = {getattr(self, name)!r}", "choose one of them"
            require(getattr(self, name) in (2, 4), f"{name}: 2 or 4", given, change)
        for name in FLAGS:
            value = getattr(self, name)
            asked, change = f"{name}, True or False", f"give {name}=True or {name}=False"
            require(isinstance(value, bool), asked, f"{name} = {value!r}", change)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes per parameter of AdamW's two moments, and of a master if weights have 16 bits."""
        return 12 if self.item_bytes == 2 else 8

    @property
    def update_bytes(self) -> int:
        """Bytes per parameter that an update reads and writes.

        AdamW reads gradient, weight and moments and writes all but the gradient, 28 in 32 bits.
        With masters the gradient is converted (6), measured (4) and scaled (8), and the weight in
        16 bits is written from the master (6).
        """
        return 52 if self.item_bytes == 2 else 28


FLAGS = (
    "fused_kernels", "fused_gradients", "overlap_tensor", "overlap_data", "split_messages",
    "paired_messages",
)  # fmt: skip

SOFTWARE = {
    # Narayanan et al. 2021: fused kernels (section 4.2), split messages (4.1), float16; nothing
    # overlaps.
    "megatron-2021": Software(
        attention="explicit", fused_gradients=False, overlap_tensor=False, overlap_data=False,
        gradient_bytes=2,
    ),
    # Korthikanti et al. 2022: collectives of tensor parallelism run beside weight gradients.
    "megatron-2022": Software(attention="explicit", overlap_data=False, gradient_bytes=2),
    # DeepSpeed's pipelines (runtime/pipe/schedule.py): each message is an instruction of its own,
    # and blocks; gradients are summed in 32 bits.
    "megatron-deepspeed": Software(
        attention="explicit", fused_gradients=False, overlap_tensor=False, overlap_data=False,
        paired_messages=False,
    ),
    # PyTorch's own kernels and fully_shard, without a compiler.
    "torch-fsdp": Software(fused_kernels=False, fused_gradients=False, overlap_tensor=False),
    # Programs of this book on a CPU: float32, nothing fused but attention, nothing overlaps.
    "slimlab": Software(
        fused_kernels=False, fused_gradients=False, overlap_tensor=False, overlap_data=False,
        split_messages=False, paired_messages=False, item_bytes=4,
    ),
    # Fused attention and every overlap above.
    "current": Software(),
}  # fmt: skip


def find_software(name: str) -> Software:
    """Return the choices of a program in SOFTWARE.

    name  its key

    Raises InputError that lists all names.
    """
    check_choice("software", name, tuple(SOFTWARE))
    return SOFTWARE[name]
