"""The encoder-only Transformer: every position sees the whole text, as in BERT.

Chapter 03 builds it, chapter 04 trains it to fill in hidden tokens and to tell whether one sentence
follows another, chapter 06 fine-tunes it.

Production BERTs also drop out attention weights; the newer ones (ModernBERT) use rotary positions,
no segments and local attention.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.config import ModelConfig, require
from slimlab.model.block import Block, Embedding, check_ids, check_positions, norm_of
from slimlab.model.initialise import initialise
from slimlab.model.transformer import check_kind, run_blocks


class EncoderOutput(NamedTuple):
    """What an encoder says of a batch.

    hidden        (B, T, D) a vector for every position, in its context
    token_logits  (B, T, V) scores of the vocabulary for every position
    pair_logits   (B, 2) scores of "does not follow" and "follows"; None without segments
    """

    hidden: Tensor
    token_logits: Tensor
    pair_logits: Tensor | None


class Encoder(nn.Module):
    """Give every position of a text a vector that knows the text on both its sides.

    config  kind is "encoder"; with num_segments it has pooler and pair_head too

    Its parts are embedding, embedding_norm (with norm_place "post"), blocks, final_norm (with
    "pre"), and for the hidden tokens token_transform, token_norm and lm_head with token_bias; for
    pairs, pooler and pair_head read the first position.

    Raises InputError for another kind of configuration.
    Devlin et al. 2018 (arXiv:1810.04805).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_kind(config, "encoder")
        self.config = config
        self.recompute = "none"
        post = config.norm_place == "post"
        self.embedding = Embedding(config)
        self.embedding_norm = norm_of(config) if post else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.Identity() if post else norm_of(config)
        self.token_transform = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.token_norm = norm_of(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.token_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.tokens.weight
        if config.num_segments:
            self.pooler = nn.Linear(config.d_model, config.d_model, bias=config.bias)
            self.pair_head = nn.Linear(config.d_model, 2, bias=config.bias)
        initialise(self)

    def encode(
        self, ids: Tensor, *, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Compute the vectors.

        ids       (B, T) token ids
        segments  (B, T) numbers of the segments, all 0 if not given
        mask      which positions may be attended to, for instance padding_mask(lengths, T)
        returns   (B, T, D)

        Raises InputError for ids or segments out of range, and too long a text.
        """
        check_ids("ids", ids, self.config.vocab_size)
        if segments is not None:
            self._check_segments(segments, ids)
        positions = check_positions(None, 0, ids, self.config)
        x = self.embedding_norm(self.embedding(ids, positions, segments))
        x = run_blocks(self, self.blocks, self.dropout(x), positions, mask=mask)
        return self.final_norm(x)

    def forward(
        self, ids: Tensor, *, segments: Tensor | None = None, mask: Tensor | None = None
    ) -> EncoderOutput:
        """Compute the vectors, and what they say of hidden tokens and of the pair.

        ids, segments, mask  as in encode
        returns  EncoderOutput
        """
        hidden = self.encode(ids, segments=segments, mask=mask)
        return EncoderOutput(hidden, self.token_logits(hidden), self.pair_logits(hidden))

    def token_logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary for every position.

        hidden   (B, T, D)
        returns  (B, T, V)
        """
        x = self.token_norm(F.gelu(self.token_transform(hidden)))
        return self.lm_head(x) + self.token_bias

    def pair_logits(self, hidden: Tensor) -> Tensor | None:
        """Score "does not follow" and "follows" from the first position.

        hidden   (B, T, D)
        returns  (B, 2); None without segments
        """
        if not self.config.num_segments:
            return None
        return self.pair_head(torch.tanh(self.pooler(hidden[:, 0])))

    def _check_segments(self, segments: Tensor, ids: Tensor) -> None:
        most = self.config.num_segments - 1
        fits = segments.shape == ids.shape and not segments.is_floating_point()
        require(
            fits and int(segments.min()) >= 0 and int(segments.max()) <= most,
            f"segments {tuple(ids.shape)} of numbers from 0 to {most}",
            f"segments {tuple(segments.shape)} from {segments.min()} to {segments.max()}",
            "number the sentences 0 and 1, or make the model with num_segments=2",
        )
