"""What tensor parallelism refuses: models that differ, sizes that do not divide, layouts without
meaning.

Chapter 09 shows the errors. Models are compared first, with one small message; every rank then
comes to the same verdict by itself, and none is left waiting for another that has stopped.

A vocabulary that does not divide is refused, not padded. A padded word would take part in the sum
of the loss and in weight decay unless each place that touches the table left it out, and what a
rank holds would no longer be the whole divided by the number of ranks. Megatron-LM pads the
vocabulary before the model is made; so can the reader, with vocab_size in the configuration.

Production (DTensor) accepts sizes that do not divide and gives the last ranks less.
"""

import hashlib

import torch
from torch import nn

from slimlab.comm.base import Communicator
from slimlab.config import InputError, check_number, require
from slimlab.model.transformer import Decoder
from slimlab.parallel.layout import Layout, shardings
from slimlab.parallel.mesh import MeshShape

CUTS = ("heads", "kv_heads", "feed_forward", "vocabulary", "sequence")


def check_same_models(model: nn.Module, group: Communicator, arguments: tuple) -> None:
    """Compare the forms of the ranks' models and what else they were given.

    model      any
    group      the ranks that are to share it
    arguments  whatever must be the same on every rank

    Communicates: one all_gather of 8 bytes.
    Raises InputError, on every rank, if something differs from rank 0, naming the ranks.
    """
    config = getattr(model, "config", None)
    shapes = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    recompute = getattr(model, "recompute", None)
    text = repr((type(model).__name__, config, shapes, recompute, arguments))
    # 63 bits: int64 has a sign.
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
    found = group.all_gather(torch.tensor([number], device=group.device)).tolist()
    odd = [str(rank) for rank, one in enumerate(found) if one != found[0]]
    require(
        not odd,
        "the same model, layout, seed and choices on every rank of the group",
        f"something else on rank {', '.join(odd)} than on rank 0; rank {group.rank} has {config} "
        f"and {arguments}",
        "make the model from the same configuration on every rank, with the same arguments",
    )


def check_layout(model: nn.Module, layout: Layout, world_size: int, sequence_parallel: bool) -> int:
    """Refuse what cannot be done with this model, this layout and so many ranks.

    model              the whole one
    layout             rules
    world_size         ranks that are to share the model
    sequence_parallel  the stream is cut too
    returns            ranks that hold the same key heads: 1 unless there are fewer such heads than
                       ranks

    Raises InputError.
    """
    require(
        isinstance(model, Decoder) and not hasattr(model, "tensor_parallel"),
        "a whole Decoder",
        f"a {type(model).__name__}"
        + (" that was cut before" if hasattr(model, "tensor_parallel") else ""),
        'make one with build_model(ModelConfig(..., kind="decoder"))',
    )
    _check_rules(model, layout, sequence_parallel)
    cut = {dim for dim, axis in layout.rules if axis == "tensor"}
    config = model.config
    sizes = {
        "heads": ("num_heads", config.num_heads),
        "feed_forward": ("d_ff", config.d_ff),
        "vocabulary": ("vocab_size", config.vocab_size),
    }
    sizes = dict(pair for dim, pair in sizes.items() if dim in cut)
    num_kv_heads = config.num_kv_heads if "heads" in cut else 1
    check_degree(world_size, sizes, num_kv_heads)
    return max(world_size // num_kv_heads, 1) if "heads" in cut else 1


def check_degree(world_size: int, sizes: dict[str, int], num_kv_heads: int) -> None:
    """Refuse a number of ranks that does not divide all that is to be cut.

    world_size    the number of ranks
    sizes         name -> size, each of which it must divide
    num_kv_heads  K: it must divide K, or K must divide it; 1 if heads are not cut

    Raises InputError that names the nearest numbers of ranks that do, and the nearest sizes.
    """
    wrong = [name for name, size in sizes.items() if size % world_size]
    keys_fit = world_size % num_kv_heads == 0 or num_kv_heads % world_size == 0
    if not wrong and keys_fit:
        return
    limit = min(sizes.values(), default=num_kv_heads)
    fitting = [n for n in range(1, limit + 1) if _fits(n, sizes, num_kv_heads)]
    near = [n for n in fitting if n < world_size][-1:] + [n for n in fitting if n > world_size][:1]
    lows = {name: sizes[name] // world_size * world_size for name in wrong}
    changes = [
        f"{name}={f'{low} or ' if low else ''}{low + world_size}" for name, low in lows.items()
    ]
    listed = ", ".join(f"{name} = {size}" for name, size in sizes.items())
    raise InputError(
        f"a number of ranks that divides {', '.join(sizes)}"
        + (", and num_kv_heads or a multiple of it" if num_kv_heads > 1 else ""),
        f"{world_size} ranks for {listed}, num_kv_heads = {num_kv_heads}; what does not fit: "
        f"{', '.join(wrong if keys_fit else [*wrong, 'num_kv_heads'])}",
        f"take a group of {' or '.join(map(str, near))}"
        + (f"; or make the model with {', '.join(changes)}" if changes else "")
        + "; or leave the rule for what does not divide out of the layout",
    )


def check_positions_divide(seq_len: int, world_size: int) -> None:
    """Refuse a sequence that cannot be cut into equal slices.

    seq_len     T, positions of the batch
    world_size  ranks that share them

    Raises InputError.
    """
    low = seq_len // world_size * world_size
    require(
        seq_len % world_size == 0,
        f"sequences of a length that {world_size} ranks divide (sequence parallelism)",
        f"{seq_len} positions, remainder {seq_len % world_size}",
        f"give batches of {f'{low} or ' if low else ''}{low + world_size} positions, padded with "
        "targets that do not count, or sequence_parallel=False",
    )


def check_max_norm(max_norm: float) -> None:
    """Refuse what is no length to clip to.

    max_norm  above 0; infinity only measures

    Raises InputError.
    """
    if max_norm != float("inf"):
        check_number("max_norm", max_norm, float, 0, float("inf"), above=True)


def _fits(world_size: int, sizes: dict[str, int], num_kv_heads: int) -> bool:
    keys_fit = world_size % num_kv_heads == 0 or num_kv_heads % world_size == 0
    return keys_fit and all(size % world_size == 0 for size in sizes.values())


def _check_rules(model: nn.Module, layout: Layout, sequence_parallel: bool) -> None:
    names = shardings(model, layout, MeshShape())  # names alone; sizes below
    others = [rule for rule in layout.rules if rule[1] == "tensor" and rule[0] not in CUTS]
    elsewhere = {
        (dim, axis)
        for sharding in names.values()
        for dim, axis in zip(sharding.dims, sharding.axes)
        if axis not in (None, "tensor")
    }
    wrong = others + sorted(elsewhere)
    require(
        not wrong,
        f'rules that cut {", ".join(CUTS)} along "tensor"',
        f"{', '.join(map(str, wrong))}",
        "leave these rules out; replicas are a matter of DataParallel",
    )
    cut = {dim for dim, axis in layout.rules if axis == "tensor"}
    require(
        ("heads" in cut) == ("kv_heads" in cut),
        "rules for both heads and kv_heads, or for neither: queries need their keys on their rank",
        f"a rule for {'heads' if 'heads' in cut else 'kv_heads'} alone",
        'add ("heads", "tensor") or ("kv_heads", "tensor")',
    )
    require(
        not sequence_parallel or {"heads", "feed_forward"} <= cut,
        "sequence parallelism with heads and feed_forward cut: it halves each of their sums in two",
        f"rules for {', '.join(sorted(cut)) or 'nothing'}",
        "use slimlab.parallel.layout.TENSOR_PARALLEL, or sequence_parallel=False",
    )
