"""A Decoder whose sequences are shared out among ranks: ring attention in the place of its own.

Chapter 09 trains one. Embeddings, norms and feed-forward layers stay as they are, since they work
on each position alone. Every rank has all weights, and the gradient of its own positions; the sum
over ranks is data parallelism's (slimlab.parallel.data), with tokens in the place of sequences.

Production (Megatron-LM, torchtitan) also cuts masks of packed documents, which are refused here.
"""

from functools import partial

from torch import Tensor, nn

from slimlab.comm.base import Communicator
from slimlab.config import InputError, check_choice, require
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.cache import LayerCache
from slimlab.model.heads import merge_heads, split_heads
from slimlab.model.positions import rotate
from slimlab.model.transformer import check_kind
from slimlab.parallel.context import ORDERS, context_positions, ring_attention
from slimlab.train.accumulate import Objective
from slimlab.train.objectives import token_loss


class ContextAttention(nn.Module):
    """Self-attention over the positions of all ranks, with the weights of an ordinary layer.

    attention  its projections are taken over, under the same names
    comm       of the ranks that share the sequences
    order      which positions a rank has, see context_positions
    """

    def __init__(self, attention: MultiHeadAttention, comm: Communicator, order: str):
        super().__init__()
        for name, layer in attention.named_children():
            self.add_module(name, layer)
        self.d_head, self.rotary_layout = attention.d_head, attention.rotary_layout
        self.comm, self.order = comm, order

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        causal: bool = False,
        angles: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Let this rank's positions attend to those of all ranks.

        x        (B, T/w, D), a shard
        context  refused: only self-attention goes round a ring here
        mask     refused, as it would have to travel too
        causal   hide what stands later
        angles   (T/w, E/2) of this rank's positions
        cache    refused
        returns  (B, T/w, D), a shard

        Communicates: what ring_attention does.
        Raises InputError as ring_attention does.
        """
        refused = {"context": context, "mask": mask, "cache": cache}
        given = [name for name, value in refused.items() if value is not None]
        require(
            not given,
            "self-attention without mask and cache, causal or not",
            f"{', '.join(given)}",
            "use the model before context_parallel changed it, in one process",
        )
        query, key, value = (
            split_heads(layer(x), self.d_head) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if angles is not None:
            query = rotate(query, angles, self.rotary_layout)
            key = rotate(key, angles, self.rotary_layout)
        heads = ring_attention(query, key, value, self.comm, causal=causal, order=self.order)
        return self.out_proj(merge_heads(heads))


def context_parallel(
    model: nn.Module, comm: Communicator, *, order: str = "contiguous"
) -> nn.Module:
    """Let the attention layers of a Decoder see the positions of all ranks.

    model    changed in place; names of parameters and weights stay. Train it with
             DataParallel(model, comm) and context_objective
    comm     of the ranks that share the sequences
    order    which positions a rank has, see context_positions
    returns  model

    Raises InputError for another model, or one that was changed before.
    """
    check_kind(getattr(model, "config", model), "decoder")
    check_choice("order", order, ORDERS)
    for block in model.blocks:
        if not isinstance(block.attention, MultiHeadAttention):
            raise InputError(
                "a Decoder with its own attention layers",
                f"one with {type(block.attention).__name__}",
                "call context_parallel once, on a model that nothing else has changed",
            )
        block.attention = ContextAttention(block.attention, comm, order)
    return model


def context_objective(comm: Communicator, order: str = "contiguous") -> Objective:
    """Make the objective that takes whole sequences and looks at this rank's positions alone.

    comm     of the ranks that share the sequences
    order    as it was given to context_parallel
    returns  objective(model, (inputs, targets)), both (B, T), the same on every rank: the loss sum
             and the number of targets of this rank's positions

    Raises InputError, when called, if the ranks do not divide T.
    """
    return partial(_own_positions, comm, order)


def _own_positions(comm: Communicator, order: str, model: nn.Module, batch: tuple):
    inputs, targets = batch
    positions = context_positions(
        inputs.shape[1], rank=comm.rank, world_size=comm.world_size, order=order
    ).to(inputs.device)
    return token_loss(model(inputs[:, positions], positions=positions), targets[:, positions])
