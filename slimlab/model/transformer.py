"""The decoder-only Transformer: the model of GPT, of LLaMA and of this book.

Chapter 03 builds it, chapter 05 trains it, all later ones cut it, spread it and make it small.
Encoders and encoder-decoders are in encoder.py and seq2seq.py; build.py picks by kind.

Production differs: fused projections, a cache in pages, a loss that never holds all logits.
"""

import torch
from torch import Tensor, nn

from slimlab.config import ModelConfig, check_choice, require
from slimlab.model.block import Block, Embedding, check_ids, check_positions, norm_of
from slimlab.model.cache import KVCache
from slimlab.model.initialise import initialise
from slimlab.model.positions import rotary_angles
from slimlab.model.recompute import recompute

RECOMPUTE = ("none", "block")


class Decoder(nn.Module):
    """Score the next token at every position of a text, from what stands before it.

    config  kind is "decoder"

    Its parts are embedding, blocks, final_norm (with norm_place "pre") and lm_head, whose weight is
    the table of the tokens if tie_embeddings. `recompute` = "block" keeps only the input of every
    block for the backward pass. Weights are drawn as slimlab.model.initialise says, from torch's
    global generator.

    Raises InputError for another kind of configuration.
    Radford et al. 2019 (GPT-2); Touvron et al. 2023 (arXiv:2302.13971) for the LLaMA choices.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_kind(config, "decoder")
        self.config = config
        self.recompute = "none"
        self.embedding = Embedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = norm_of(config) if config.norm_place == "pre" else nn.Identity()
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.tokens.weight
        initialise(self)

    def forward(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = True,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Score every token of the vocabulary as the next one, at every position.

        ids        (B, T) token ids
        mask       hides more than the causal rule: boolean or additive, broadcast to (B, H, T, S)
        causal     hide what stands later; False only to show what happens then
        positions  (T,) or (B, T), counted from the cache's length if not given
        cache      keys and values of the tokens before ids; those of ids are added
        returns    (B, T, V) logits

        Raises InputError for ids outside the vocabulary, too long a text, and as attention does.
        """
        hidden = self.hidden(ids, mask=mask, causal=causal, positions=positions, cache=cache)
        return self.logits(hidden)

    def hidden(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = True,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Compute what the last block says of every position.

        ids, mask, causal, positions, cache  as in forward
        returns  (B, T, D), not yet through final_norm
        """
        check_ids("ids", ids, self.config.vocab_size)
        positions = check_positions(positions, cache.length if cache else 0, ids, self.config)
        x = self.dropout(self.embedding(ids, positions))
        return run_blocks(self, self.blocks, x, positions, mask=mask, causal=causal, cache=cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Turn what the last block says into scores of the vocabulary.

        hidden   (B, T, D)
        returns  (B, T, V)
        """
        return self.lm_head(self.final_norm(hidden))


def run_blocks(
    model: nn.Module,
    blocks: nn.ModuleList,
    x: Tensor,
    positions: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
    cache: KVCache | None = None,
) -> Tensor:
    """Send x through the blocks, recomputing them in the backward pass if the model says so.

    model        its config and its attribute recompute are read
    blocks       what to go through
    x            (B, T, D)
    positions    (T,) or (B, T)
    mask, causal, memory, memory_mask  as in Block.forward
    cache        of all layers, or None
    returns      (B, T, D)
    """
    check_choice("recompute", model.recompute, RECOMPUTE)
    require(
        cache is None or len(cache.layers) == len(blocks),
        f"a cache of {len(blocks)} layers",
        f"one of {len(cache.layers) if cache else 0}",
        "make it with KVCache(model.config, batch_size)",
    )
    config = model.config
    angles = None
    if config.positions == "rotary":
        angles = rotary_angles(positions, config.d_head, config.rotary_base)
    for number, block in enumerate(blocks):
        if model.recompute == "block" and model.training and cache is None:
            given = x, mask, angles, memory, memory_mask
            x = recompute(_plain(block, causal), *given, generators=generators_of(block))
        else:
            layer = cache.layers[number] if cache else None
            x = block(
                x, mask, causal=causal, angles=angles, memory=memory, memory_mask=memory_mask,
                cache=layer,
            )  # fmt: skip
    return x


def generators_of(model: nn.Module) -> list[torch.Generator]:
    """List the generators that modules draw from, besides torch's global one, each once.

    model  modules may have an attribute `generator`; nn.Dropout has none
    """
    found = [getattr(module, "generator", None) for module in model.modules()]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _plain(block: Block, causal: bool):
    def call(x, mask, angles, memory, memory_mask):
        return block(x, mask, causal=causal, angles=angles, memory=memory, memory_mask=memory_mask)

    return call


def check_kind(config: ModelConfig, kind: str) -> None:
    """Refuse a configuration of another kind of model.

    config  what was given
    kind    what is needed
    """
    given = getattr(config, "kind", type(config).__name__)
    require(
        given == kind,
        f'a configuration with kind="{kind}"',
        f"kind = {given!r}",
        "use slimlab.model.build.build_model(config), which picks the class by kind",
    )


def num_params(model: nn.Module) -> int:
    """Count the parameters of `model`, a tied table once."""
    return sum(p.numel() for p in model.parameters())


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which the parameters of `model` lie."""
    return next(model.parameters()).device
