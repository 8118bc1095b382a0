"""Quantized models on several ranks: their layers shared, or their batches.

Chapter 15 ends with them. quantized_tensor_parallel cuts what quantize_model returned or
load_quantized_model read, as slimlab.parallel.tensor cuts an ordinary model: heads, features of the
feed-forward layer and words of the vocabulary are divided among the ranks, integers and scales
stay what they were. Between the layers flow floats or sums of 32 bits, so a model of a quarter of
the bytes sends as much as the original: the weights are smaller, the activations are not.

Such a model only runs. data_parallel_logits and data_parallel_loss divide a batch among replicas,
which need to send nothing but results.

Production (vLLM, TensorRT-LLM) cuts the file ahead of time, quantizes activations by rank, and
gathers logits of the last position alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from math import gcd

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import check_choice, require
from slimlab.model.transformer import Decoder
from slimlab.parallel.data_replicas import broadcast_model
from slimlab.parallel.tensor import TensorParallelism
from slimlab.parallel.tensor_checks import check_degree, check_same_models
from slimlab.parallel.tensor_collectives import copy_to_ranks
from slimlab.parallel.tensor_layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabularyParallelEmbedding,
)
from slimlab.plan.data_parallel import shard_sizes
from slimlab.plan.tensor_parallel import CUT, CUT_DIMS
from slimlab.slim.quantize_layers import (
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from slimlab.slim.quantize_parallel_layers import (
    RowParallelInt8Linear,
    RowParallelQuantizedLinear,
    VocabularyParallelQuantizedEmbedding,
    cut_beside,
    cut_quantized,
    cut_rows,
)
from slimlab.train.accumulate import Objective
from slimlab.train.objectives import causal_objective

QUANTIZED = (QuantizedLinear, Int8Linear, QuantizedEmbedding)
SIZES = {"heads": "num_heads", "feed_forward": "d_ff", "vocabulary": "vocab_size"}
LOSS_ITEMS = 2


def quantized_tensor_parallel(
    model: Decoder,
    group: Communicator,
    *,
    cut: Sequence[str] = CUT,
    broadcast: bool = True,
) -> Decoder:
    """Cut a whole quantized decoder, and keep this rank's part.

    model      of quantize_model or load_quantized_model, of the same form on every rank; it gets
               the integers and scales of rank 0 and is changed in place. Layers that were skipped
               are cut as floats
    group      the ranks that share it
    cut        which of "heads", "feed_forward" and "vocabulary"; where key heads are fewer than
               ranks and divide them, each rank holds the one that its queries need
    broadcast  False: the ranks' models are known to be equal already, all read from one file
    returns    the model, in eval mode; its forward pass gives (B, T, V / world_size), a shard of
               the logits, or all of them where the vocabulary is not cut. whole_logits,
               tensor_parallel_objective and join_logits take it as any model that was cut.
               With activations in 8 bits and without outliers the logits are those of one process
               bit for bit; weight-only ones differ by the rounding of sums in another order

    Communicates: one all_gather of 8 bytes, and what broadcast_model does.
    Raises InputError, on every rank, if the ranks' models or arguments differ, the model is not a
    whole decoder with quantized layers, or a cut would divide a head, a group or what else it must
    not; before any weight is sent.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, QUANTIZED)}
    check_same_models(model, group, (tuple(cut), _described(layers)))
    _check(model, layers, group.world_size, tuple(cut))
    if broadcast:
        broadcast_model(model, group)
    require(
        not hasattr(model, "tensor_parallel"),
        "a model of its own for every rank",
        "one object, which another rank has cut meanwhile",
        "ranks that are threads share what they are given: give copy.deepcopy(model) to each",
    )
    config, world_size = model.config, group.world_size
    copies = max(world_size // config.num_kv_heads, 1) if "heads" in cut else 1
    params = [name for name, _ in model.named_parameters()]
    for block in model.blocks:
        if "heads" in cut:
            of_keys = (group.rank // copies, world_size // copies)
            parts = {"q_proj": None, "k_proj": of_keys, "v_proj": of_keys}
            _cut_pair(block.attention, parts, "out_proj", group)
        if "feed_forward" in cut:
            _cut_pair(block.feed_forward, {"gate_proj": None, "up_proj": None}, "down_proj", group)
    if "vocabulary" in cut:
        _cut_vocabulary(model, group)
    names = {name: _cut_dim(name, cut) for name in params}
    copied = {name for name in params if name.split(".")[-2] in ("k_proj", "v_proj")}
    model.tensor_parallel = TensorParallelism(
        group, False, names, copies, frozenset(copied if copies > 1 else ())
    )
    return model.eval()


def data_parallel_logits(
    model: nn.Module, ids: Tensor, comm: Communicator, *, run: Callable | None = None
) -> Tensor:
    """Score the tokens of a batch, of which every rank takes its rows.

    model    equal on every rank, such as one read from the same file
    ids      (B, T) the whole batch, the same on every rank
    comm     of the ranks that hold replicas
    run      (model, ids) -> (B', T, V); None: the model is called. Give whole_logits where ranks of
             another axis share the model
    returns  (B, T, V) logits, the same on every rank; with activations in 8 bits those of one
             process bit for bit, since every row has a scale of its own

    Communicates: one all_gather of the logits, unequal parts if the rows do not divide.
    """
    sizes = shard_sizes(len(ids), comm.world_size)
    start = sum(sizes[: comm.rank])
    own = ids[start : start + sizes[comm.rank]]
    with torch.no_grad():
        if len(own):
            part = model(own) if run is None else run(model, own)
        else:
            part = torch.empty(0, ids.shape[1], model.config.vocab_size, device=ids.device)
    return comm.all_gather(part.contiguous(), sizes=sizes)


def data_parallel_loss(
    model: nn.Module,
    batch: tuple[Tensor, ...],
    comm: Communicator,
    objective: Objective = causal_objective,
) -> tuple[float, int]:
    """Measure the loss of a batch, of which every rank takes its rows.

    model      equal on every rank
    batch      whole tensors of equal first dim, the same on every rank
    comm       of the ranks that hold replicas
    objective  as in slimlab.train.objectives; tensor_parallel_objective where ranks of another axis
               share the model
    returns    the sum in nats and the number of targets of the whole batch, the same on every rank

    Communicates: one all_reduce of two numbers, 16 bytes.
    """
    sizes = shard_sizes(len(batch[0]), comm.world_size)
    start, size = sum(sizes[: comm.rank]), sizes[comm.rank]
    told = torch.zeros(LOSS_ITEMS, dtype=torch.float64, device=batch[0].device)
    if size:
        with torch.no_grad():
            loss_sum, count = objective(model, tuple(one[start : start + size] for one in batch))
        told[0], told[1] = float(loss_sum), count
    told = comm.all_reduce(told)
    return float(told[0]), int(told[1])


def _described(layers: dict[str, nn.Module]) -> str:
    """Say in a few words what the ranks must have in common besides sizes."""
    texts = []
    for name, one in layers.items():
        buffers = [(key, tuple(t.shape), str(t.dtype)) for key, t in one.named_buffers()]
        ends = getattr(one, "input_range", None)
        texts.append((name, type(one).__name__, one.table.scheme, buffers, ends))
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()[:8]
    return f"{len(layers)} quantized layers, fingerprint {digest}"


def _check(model: nn.Module, layers: dict, world_size: int, cut: tuple[str, ...]) -> None:
    for one in cut:
        check_choice("each of cut", one, CUT)
    before = hasattr(model, "tensor_parallel")
    require(
        isinstance(model, Decoder) and bool(layers) and not before,
        "a whole Decoder with quantized layers",
        f"a {type(model).__name__} with {len(layers)} of them" + (", cut before" if before else ""),
        "give what quantize_model returned; slimlab.parallel.tensor cuts ordinary models",
    )
    config = model.config
    sizes = {SIZES[one]: getattr(config, SIZES[one]) for one in CUT if one in cut}
    num_kv_heads = config.num_kv_heads if "heads" in cut else 1
    check_degree(world_size, sizes, num_kv_heads)
    wrong = [
        (name, one)
        for name, one in layers.items()
        if _cut_dim(f"{name}.weight", cut) == 1 and not _groups_fit(one.table, world_size)
    ]
    if not wrong:
        return
    name, table = wrong[0][0], wrong[0][1].table
    columns, group = table.shape[1], table.scheme.quant_group_size
    nearest = gcd(group, *(one.table.shape[1] // world_size for _, one in wrong))
    others = f" and {len(wrong) - 1} more layers" if len(wrong) > 1 else ""
    tables = [one.table for one in layers.values()]
    fitting = [
        n
        for n in range(1, world_size)
        if all(size % n == 0 for size in sizes.values())
        and (num_kv_heads % n == 0 or n % num_kv_heads == 0)
        and all(_groups_fit(table, n) for table in tables)
    ]
    require(
        False,
        "groups that stay whole: a quant_group_size that divides each rank's columns",
        f"{name}{others}: {columns} columns / {world_size} ranks = {columns // world_size}, "
        f"groups of {group}",
        f"quantize with quant_group_size={nearest}, or take a group of "
        f"{' or '.join(map(str, fitting[-2:]))}",
    )


def _groups_fit(table: QuantizedWeight, world_size: int) -> bool:
    size = table.scheme.quant_group_size
    return size is None or table.shape[1] % (size * world_size) == 0


def _cut_dim(name: str, cut: Sequence[str]) -> int | None:
    """Return the dim of a parameter that is cut; biases behind a sum are whole."""
    layer, kind = name.split(".")[-2:]
    part, dim = CUT_DIMS.get(layer, (None, None))
    part = "heads" if part == "kv_heads" else part
    return dim if part in cut and not (dim == 1 and kind == "bias") else None


def _cut_pair(module: nn.Module, firsts: dict, last: str, group: Communicator) -> None:
    """Cut the rows of the first layers of a module and the columns of its last one."""
    for name, part in firsts.items():
        if hasattr(module, name):
            setattr(module, name, _rows(getattr(module, name), group, part))
    whole = getattr(module, last)
    kinds = {QuantizedLinear: RowParallelQuantizedLinear, Int8Linear: RowParallelInt8Linear}
    setattr(module, last, kinds.get(type(whole), RowParallelLinear)(whole, group))
    _enter(module, group)


def _rows(whole: nn.Module, group: Communicator, part: tuple[int, int] | None) -> nn.Module:
    if isinstance(whole, nn.Linear):
        return ColumnParallelLinear(whole, group, part=part, copies_input=False)
    return cut_rows(whole, part or (group.rank, group.world_size))


def _cut_vocabulary(model: Decoder, group: Communicator) -> None:
    tokens, head = model.embedding.tokens, model.lm_head
    tied = isinstance(head, nn.Linear) and head.weight is getattr(tokens, "weight", None)
    if isinstance(tokens, nn.Embedding):
        model.embedding.tokens = VocabularyParallelEmbedding(tokens, group)
    else:
        part = (group.rank, group.world_size)
        table = QuantizedWeight(cut_quantized(tokens.table.quantized(), 0, part))
        model.embedding.tokens = VocabularyParallelQuantizedEmbedding(table, group)
    if getattr(head, "table", None) is getattr(tokens, "table", model):
        rows = slice(group.rank * table.shape[0], (group.rank + 1) * table.shape[0])
        model.lm_head = cut_beside(head, table, rows)
    else:
        model.lm_head = _rows(head, group, None)
        if tied:
            model.lm_head.weight = model.embedding.tokens.weight
    _enter(model.lm_head, group)


def _enter(module: nn.Module, group: Communicator) -> None:
    module.register_forward_pre_hook(partial(_copy_input, group))


def _copy_input(group, module, inputs):
    x, *rest = inputs
    return (copy_to_ranks(x, group), *rest)
