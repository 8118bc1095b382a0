"""Tensor parallelism: every layer of a decoder is shared by all ranks, each with part of it.

Chapter 09 explains it. Heads, features of the feed-forward layer and words of the vocabulary are
divided among the ranks; each block then sends two sums forward and two backward, of the stream's
size, whatever the number of ranks. Loss, gradients and weights are those of one process.

With sequence parallelism norms, dropout and sums between the layers work on a slice of the
positions, and each of these sums becomes a reduce_scatter with an all_gather at the next layer: as
many bytes, less memory. A norm's gain has then seen only the slice: its gradients are added up.

The model is still a Decoder with the same names. model(ids) returns this rank's part of the logits;
train with slimlab.parallel.tensor_loss.tensor_parallel_objective. Gradients are right as soon as
the backward pass ends, so DataParallel over another axis of a mesh, accumulation of gradients and
recomputation work as on a whole model; clipping needs slimlab.parallel.tensor_state.

Production: Megatron-LM makes such models part by part and fuses the projections; here the whole
model is cut, so it has to fit once. torch's parallelize_module does this with DTensor. Shoeybi et
al. 2019 (arXiv:1909.08053); Korthikanti et al. 2022 (arXiv:2205.05198).
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.layers import FeedForward
from slimlab.model.transformer import Decoder, device_of
from slimlab.parallel.data_replicas import broadcast_model
from slimlab.parallel.layout import TENSOR_PARALLEL, Layout, shardings
from slimlab.parallel.mesh import MeshShape
from slimlab.parallel.tensor_checks import check_layout, check_positions_divide, check_same_models
from slimlab.parallel.tensor_collectives import (
    copy_to_ranks,
    gather_from_ranks,
    gather_sequence,
    split_to_ranks,
)
from slimlab.parallel.tensor_layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabularyParallelEmbedding,
)
from slimlab.parallel.tensor_random import rank_generator, replace_dropout


@dataclass
class TensorParallelism:
    """How a model was cut; it stands in model.tensor_parallel.

    group              the ranks that share every layer
    sequence_parallel  the stream between the layers is cut along its positions (dim 1)
    cut_dims           parameter -> the dim that is cut; None: the parameter is replicated
    num_copies         ranks that hold the same key and value heads; more than 1 if there are fewer
                       such heads than ranks
    copied             the parameters that num_copies ranks hold each part of
    generator          that this rank's dropout draws from
    """

    group: Communicator
    sequence_parallel: bool
    cut_dims: dict[str, int | None]
    num_copies: int = 1
    copied: frozenset[str] = field(default_factory=frozenset)
    generator: torch.Generator | None = None


def tensor_parallel(
    model: Decoder,
    group: Communicator,
    *,
    layout: Layout = TENSOR_PARALLEL,
    sequence_parallel: bool = False,
    seed: int = 0,
    broadcast: bool = True,
) -> Decoder:
    """Cut a whole decoder, and keep this rank's part.

    model              of the same form on every rank; it gets the weights of rank 0 and is changed
                       in place. Make optimizers afterwards
    group              the ranks that share it, such as a mesh's group("tensor")
    layout             which of heads with kv_heads, feed_forward and vocabulary lie along "tensor";
                       a rule for "sequence" means sequence_parallel. Heads are cut whole. Where key
                       heads are fewer than ranks and divide them, each rank holds the one that its
                       queries need
    sequence_parallel  cut the stream between the layers along its positions, which world_size
                       must divide
    seed               of dropout, the same on every rank of the group; give each replica of the
                       axis data another
    broadcast          False: the ranks' weights are known to be equal already
    returns            the model; its forward pass gives (B, T, V / world_size), a shard of the
                       logits, or all of them where the vocabulary is not cut

    Communicates: one all_gather of 8 bytes, what broadcast_model does, and one split of the group
    if key heads are copied.
    Raises InputError, on every rank, if the ranks' models or arguments differ, sizes do not divide,
    or the layout asks for what this model cannot do.
    """
    check_same_models(model, group, (layout, sequence_parallel, seed))
    sequence_parallel = sequence_parallel or layout.axis_of("sequence") == "tensor"
    num_copies = check_layout(model, layout, group.world_size, sequence_parallel)
    if broadcast:
        broadcast_model(model, group)
    done = _describe(model, group, layout, sequence_parallel, num_copies)
    device = device_of(model)
    done.generator = rank_generator(group, seed, device, same=not sequence_parallel)
    cut = {dim for dim, axis in layout.rules if axis == "tensor"}
    for block in model.blocks:
        if "heads" in cut:
            _cut_attention(block.attention, done)
        if "feed_forward" in cut:
            _cut_feed_forward(block.feed_forward, done)
    if "vocabulary" in cut:
        _cut_vocabulary(model, done)
    if sequence_parallel:
        _cut_stream(model, done, gathers_logits="vocabulary" not in cut)
    if num_copies > 1:
        copies = group.split(group.rank // num_copies, key=group.rank)
        _sum_gradients([p for n, p in model.named_parameters() if n in done.copied], copies)
    replace_dropout(model, done.generator)
    model.tensor_parallel = done
    return model


def whole_logits(model: Decoder, ids: Tensor) -> Tensor:
    """Score every token of the vocabulary, as the model did before it was cut.

    model    that tensor_parallel has cut
    ids      (B, T) token ids, the same on every rank
    returns  (B, T, V) logits, the same on every rank

    Communicates: what the model's layers do, and one all_gather of the logits.
    """
    logits = model(ids)
    if logits.shape[-1] == model.config.vocab_size:
        return logits
    return gather_from_ranks(logits, model.tensor_parallel.group, dim=-1)


def _describe(
    model: Decoder,
    group: Communicator,
    layout: Layout,
    sequence_parallel: bool,
    num_copies: int,
) -> TensorParallelism:
    # Sizes were checked: a layout alone would refuse key heads that are copied.
    names = shardings(model, layout, MeshShape())
    cut_dims = {name: sharding.dim_along("tensor") for name, sharding in names.items()}
    of_keys = {name for name, sharding in names.items() if "kv_heads" in sharding.dims}
    copied = frozenset(of_keys) if num_copies > 1 else frozenset()
    return TensorParallelism(group, sequence_parallel, cut_dims, num_copies, copied)


def _cut_attention(attention: MultiHeadAttention, done: TensorParallelism) -> None:
    group, of_keys = done.group, _part_of_keys(done)
    for name, part in (("q_proj", None), ("k_proj", of_keys), ("v_proj", of_keys)):
        whole = getattr(attention, name)
        layer = ColumnParallelLinear(whole, group, part=part, copies_input=False)
        setattr(attention, name, layer)
    attention.out_proj = _row_parallel(attention.out_proj, done)
    _enter(attention, done)


def _part_of_keys(done: TensorParallelism) -> tuple[int, int]:
    group, copies = done.group, done.num_copies
    return group.rank // copies, group.world_size // copies


def _cut_feed_forward(layer: FeedForward, done: TensorParallelism) -> None:
    for name in ("gate_proj", "up_proj"):
        if hasattr(layer, name):
            whole = getattr(layer, name)
            setattr(layer, name, ColumnParallelLinear(whole, done.group, copies_input=False))
    layer.down_proj = _row_parallel(layer.down_proj, done)
    _enter(layer, done)


def _row_parallel(whole: nn.Linear, done: TensorParallelism) -> RowParallelLinear:
    return RowParallelLinear(whole, done.group, sequence_parallel=done.sequence_parallel)


def _cut_vocabulary(model: Decoder, done: TensorParallelism) -> None:
    tied = model.lm_head.weight is model.embedding.tokens.weight
    model.embedding.tokens = VocabularyParallelEmbedding(model.embedding.tokens, done.group)
    model.lm_head = ColumnParallelLinear(model.lm_head, done.group, copies_input=False)
    if tied:
        model.lm_head.weight = model.embedding.tokens.weight
    _enter(model.lm_head, done)


def _cut_stream(model: Decoder, done: TensorParallelism, gathers_logits: bool) -> None:
    group = done.group
    model.embedding.register_forward_pre_hook(partial(_check_length, group.world_size))
    model.embedding.register_forward_hook(partial(_split_stream, group))
    norms = [model.final_norm]
    for block in model.blocks:
        norms += [block.attention_norm, block.feed_forward_norm]
    _sum_gradients([param for norm in norms for param in norm.parameters()], group)
    if gathers_logits:  # lm_head is whole and does the same on every rank
        model.lm_head.register_forward_pre_hook(partial(_gather_stream, group))


def _enter(module: nn.Module, done: TensorParallelism) -> None:
    # Once for all the layers of a module that read the same input.
    through = gather_sequence if done.sequence_parallel else copy_to_ranks
    module.register_forward_pre_hook(partial(_through, through, done.group))


def _through(function, group, module, inputs):
    x, *rest = inputs
    return (function(x, group), *rest)


def _check_length(world_size, module, inputs):
    check_positions_divide(inputs[0].shape[1], world_size)


def _split_stream(group, module, inputs, x):
    return split_to_ranks(x, group, dim=1)


def _gather_stream(group, module, inputs):
    return (gather_from_ranks(inputs[0], group, dim=1),)


def _sum_gradients(params: list[nn.Parameter], group: Communicator) -> None:
    # Before autograd keeps the gradient: whoever watches parameters, such as DataParallel, sees the
    # sum.
    for param in params:
        if param.requires_grad and group.world_size > 1:
            param.register_hook(partial(_sum_over, group))


def _sum_over(group: Communicator, grad: Tensor) -> Tensor:
    return group.all_reduce(grad.contiguous())
