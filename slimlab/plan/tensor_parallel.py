"""What tensor parallelism sends and holds: the calls of a step, their payload, each rank's bytes.

Chapter 09 predicts with it, and compares with what the ledgers counted and with the tensors that
exist. It reads the configuration and a few numbers. With B sequences of T tokens and D features,
every sum has B T D elements, whatever the number of ranks; what a ring moves of it is in
slimlab.plan.messages.

Per block: forward two all_reduces, backward two; recomputation adds the forward ones once more.
With sequence parallelism each becomes a reduce_scatter of B T D elements and an all_gather of the
slice, and norms add up their gradients. The vocabulary adds a sum forward (the embedding), one
backward (what flows into lm_head), and two numbers per position for the loss.

Production plans also choose the degree by where ranks stand: these calls are on the critical path.
Shoeybi et al. 2019 (arXiv:1909.08053), section 3; Korthikanti et al. 2022 (arXiv:2205.05198),
section 4.2.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from slimlab.config import ModelConfig, check_choice, check_divides, check_size, require
from slimlab.plan.data_parallel import predict_broadcast
from slimlab.plan.params import check_config, param_shapes
from slimlab.plan.training_memory import OPTIMIZERS, PRECISIONS

CUT = ("heads", "feed_forward", "vocabulary")
STEP_BYTES = 4  # AdamW counts the updates of every tensor in one float32
NUMBER_BYTES = 8
# The part of a name that says along which dim a weight is cut, and for what.
CUT_DIMS = {
    "q_proj": ("heads", 0),
    "k_proj": ("kv_heads", 0),
    "v_proj": ("kv_heads", 0),
    "out_proj": ("heads", 1),
    "up_proj": ("feed_forward", 0),
    "gate_proj": ("feed_forward", 0),
    "down_proj": ("feed_forward", 1),
    "tokens": ("vocabulary", 0),
    "lm_head": ("vocabulary", 0),
}

Calls = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TensorParallelStep:
    """The calls of each rank in one step, the same on every rank: (name, payload in bytes).

    forward    in order: the embedding, the blocks, the loss
    backward   in order, but for sums of parameters' gradients, which come in between
    gradients  these sums, in the order of the parameters: norms under sequence parallelism, copies
               of key heads
    """

    forward: Calls
    backward: Calls
    gradients: Calls

    @property
    def calls(self) -> Calls:
        """All of them."""
        return self.forward + self.backward + self.gradients

    @property
    def num_calls(self) -> int:
        """How many there are."""
        return len(self.calls)

    @property
    def payload_bytes(self) -> int:
        """The payload of all of them."""
        return sum(n_bytes for _, n_bytes in self.calls)


def predict_step(
    config: ModelConfig,
    batch_size: int,
    seq_len: int,
    world_size: int,
    item_bytes: int,
    *,
    sequence_parallel: bool = False,
    recompute: str = "none",
    cut: Sequence[str] = CUT,
) -> TensorParallelStep:
    """Predict the calls of one forward and one backward pass; a micro-batch is a step of its own.

    config             of a decoder, all of whose parameters are trained
    batch_size         B, sequences that the ranks work on together
    seq_len            T, tokens of each
    world_size         ranks that share the model
    item_bytes         bytes per element of weights and activations
    sequence_parallel  the stream is cut along its positions
    recompute          "none" or "block", as in TrainingConfig
    cut                which of "heads", "feed_forward" and "vocabulary" are cut

    Raises InputError for sizes that do not divide, and unknown words.
    """
    for name, size in (("batch_size", batch_size), ("seq_len", seq_len), ("item", item_bytes)):
        check_size(name, size)
    check_choice("recompute", recompute, ("none", "block"))
    shapes = local_param_shapes(config, world_size, cut=cut)
    if world_size == 1:
        return TensorParallelStep((), (), ())
    if sequence_parallel:
        check_divides("world_size", world_size, "seq_len", seq_len)
    num_tokens = batch_size * seq_len
    stream = num_tokens * config.d_model * item_bytes
    vocabulary = "vocabulary" in cut
    loss = (("all_gather", 2 * num_tokens * max(item_bytes, 4)),) if vocabulary else ()
    table = (("all_reduce", stream),) if vocabulary else ()
    gather, scatter = ("all_gather", stream // world_size), ("reduce_scatter", stream)
    num_cut = sum(part in cut for part in ("heads", "feed_forward"))
    if sequence_parallel:
        layer = (gather, scatter) * num_cut
        forward = (*table, *layer * config.num_layers, gather, *loss)
        head, last = ((scatter,) if vocabulary else ()), (gather,)
    else:
        layer = (("all_reduce", stream),) * num_cut
        forward = (*table, *layer * config.num_layers, *loss)
        head, last = table, ()
    again = layer if recompute == "block" else ()
    backward = (*head, *(again + layer) * config.num_layers, *last)
    summed = _summed(config, shapes, world_size, sequence_parallel, "heads" in cut)
    sums = tuple(("all_reduce", prod(shapes[name]) * item_bytes) for name in summed)
    return TensorParallelStep(forward, backward, sums)


def predict_start(config: ModelConfig, item_bytes: int) -> Calls:
    """Predict the calls that compare the ranks' models and give all of them the weights of one.

    config      of a decoder without computed (sinusoidal) positions
    item_bytes  bytes per element of a weight
    returns     (name, payload in bytes) of each rank's calls, in order

    Raises InputError for sizes that are not whole numbers of at least 1.
    """
    check_size("item_bytes", item_bytes)
    sizes = [prod(shape) * item_bytes for shape in param_shapes(config).values()]
    return (("all_gather", NUMBER_BYTES), *predict_broadcast(sizes, 1, None))


def predict_clip() -> Calls:
    """Predict the calls that measure the gradients of all ranks together.

    returns  (name, payload in bytes): one number
    """
    return (("all_reduce", NUMBER_BYTES),)


def local_param_shapes(
    config: ModelConfig, world_size: int, *, cut: Sequence[str] = CUT
) -> dict[str, tuple[int, ...]]:
    """Write down the name and the shape of every parameter that a rank holds.

    config      of a decoder
    world_size  ranks that share the model
    cut         as in predict_step
    returns     name -> shape, the same on every rank, in the order of named_parameters(). Biases
                behind a sum, norms and tables of positions are whole on every rank

    Raises InputError for sizes that do not divide, another kind of model, and unknown words.
    """
    check_config(config)
    require(
        config.kind == "decoder",
        'a configuration with kind="decoder"',
        f"kind = {config.kind!r}",
        "tensor parallelism is written for decoders",
    )
    check_size("world_size", world_size)
    for part in cut:
        check_choice("each of cut", part, CUT)
    parts = _num_parts(config, world_size, cut)
    shapes = {}
    for name, shape in param_shapes(config).items():
        layer, kind = name.split(".")[-2:]
        part, dim = CUT_DIMS.get(layer, (None, 0))
        shape = list(shape)
        if part is not None and dim < len(shape) and not (dim == 1 and kind == "bias"):
            shape[dim] //= parts[part]
        shapes[name] = tuple(shape)
    return shapes


def local_state_bytes(
    config: ModelConfig,
    world_size: int,
    *,
    precision: str = "float32",
    optimizer: str = "adamw",
    cut: Sequence[str] = CUT,
) -> dict[str, int]:
    """Predict the bytes of weights, gradients, masters and optimizer state on each rank.

    config      of a decoder
    world_size  ranks that share the model
    precision, optimizer  as in bytes_per_param of slimlab.plan.training_memory
    cut         as in predict_step
    returns     "weights", "gradients", "masters", "optimizer", "optimizer_steps" -> bytes; what
                there is none of is left out

    Raises InputError as local_param_shapes does, and for an unknown precision or optimizer.
    """
    check_choice("precision", precision, tuple(PRECISIONS))
    check_choice("optimizer", optimizer, tuple(OPTIMIZERS))
    weight, gradient, master, state = PRECISIONS[precision]
    shapes = local_param_shapes(config, world_size, cut=cut)
    num_params = sum(prod(shape) for shape in shapes.values())
    items = {
        "weights": num_params * weight,
        "gradients": num_params * gradient,
        "masters": num_params * master,
        "optimizer": num_params * OPTIMIZERS[optimizer] * state,
        "optimizer_steps": len(shapes) * STEP_BYTES if optimizer == "adamw" else 0,
    }
    return {name: num_bytes for name, num_bytes in items.items() if num_bytes}


def _num_parts(config: ModelConfig, world_size: int, cut: Sequence[str]) -> dict[str, int]:
    """Return into how many parts each dim is cut; of key heads each rank has one at least."""
    sizes = {"heads": "num_heads", "feed_forward": "d_ff", "vocabulary": "vocab_size"}
    parts = dict.fromkeys((*CUT, "kv_heads"), 1)
    for part in cut:
        check_divides("world_size", world_size, sizes[part], getattr(config, sizes[part]))
        parts[part] = world_size
    if "heads" in cut:
        keys = config.num_kv_heads
        require(
            world_size % keys == 0 or keys % world_size == 0,
            "a world_size that divides num_kv_heads, or a multiple of it",
            f"world_size = {world_size}, num_kv_heads = {keys}",
            f"choose world_size={keys}",
        )
        parts["kv_heads"] = min(world_size, keys)
    return parts


def _summed(
    config: ModelConfig,
    shapes: dict[str, tuple[int, ...]],
    world_size: int,
    sequence_parallel: bool,
    heads: bool,
) -> list[str]:
    copied = heads and world_size > config.num_kv_heads
    return [
        name
        for name in shapes
        if (sequence_parallel and "norm." in name)
        or (copied and name.split(".")[-2] in ("k_proj", "v_proj"))
    ]
