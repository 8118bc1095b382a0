"""The encoder-decoder Transformer: reads one text, writes another, as in Vaswani et al. 2017.

Chapter 03 builds it and mends the usual picture of it: the encoder's output enters cross-attention
only, as keys and values. Chapter 04 trains it by teacher forcing.

Production (T5, BART, Whisper) shares what it can: tables between both halves, relative positions
between all layers.
"""

from torch import Tensor, nn

from slimlab.config import ModelConfig, require
from slimlab.model.block import Block, Embedding, check_ids, check_positions, norm_of
from slimlab.model.cache import KVCache
from slimlab.model.initialise import initialise
from slimlab.model.transformer import check_kind, run_blocks


class EncoderDecoder(nn.Module):
    """Score the next token of a target text from the source text and the target so far.

    config  kind is "encoder_decoder": num_layers blocks in each half, one vocabulary for both

    Its parts are embedding (of both texts), encoder_blocks, encoder_norm, blocks (with
    cross-attention), final_norm and lm_head; the norms with norm_place "pre" only. Rotary positions
    turn self-attention only: a target cannot ask for "the fifth of the source", so tasks such as
    reversing need learned or sinusoidal positions.

    Raises InputError for another kind of configuration.
    Vaswani et al. 2017, section 3.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        check_kind(config, "encoder_decoder")
        self.config = config
        self.recompute = "none"
        pre = config.norm_place == "pre"
        layers = range(config.num_layers)
        self.embedding = Embedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder_blocks = nn.ModuleList(Block(config) for _ in layers)
        self.encoder_norm = norm_of(config) if pre else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, cross=True) for _ in layers)
        self.final_norm = norm_of(config) if pre else nn.Identity()
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.tokens.weight
        initialise(self)

    def encode(self, source_ids: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Read the source.

        source_ids  (B, S) token ids
        mask        which positions may be attended to, for instance padding_mask(lengths, S)
        returns     (B, S, D), the memory
        """
        check_ids("source_ids", source_ids, self.config.vocab_size)
        positions = check_positions(None, 0, source_ids, self.config)
        x = self.dropout(self.embedding(source_ids, positions))
        return self.encoder_norm(run_blocks(self, self.encoder_blocks, x, positions, mask=mask))

    def decode(
        self,
        target_ids: Tensor,
        memory: Tensor,
        *,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Score the next token at every position of the target.

        target_ids   (B, T) token ids, beginning with the start token: the target shifted right
        memory       (B, S, D) from encode
        mask         hides more than the causal rule, broadcast to (B, H, T, T)
        memory_mask  which positions of the source may be attended to, broadcast to (B, H, T, S)
        cache        keys and values of the target so far, and of the memory
        returns      (B, T, V) logits

        Raises InputError if memory and target_ids are not of as many sequences.
        """
        check_ids("target_ids", target_ids, self.config.vocab_size)
        require(
            memory.dim() == 3 and memory.shape[0] == target_ids.shape[0],
            f"memory ({target_ids.shape[0]}, S, {self.config.d_model}), one per target",
            f"memory {tuple(memory.shape)}",
            "encode as many sources as there are targets",
        )
        start = cache.length if cache else 0
        positions = check_positions(None, start, target_ids, self.config)
        x = self.dropout(self.embedding(target_ids, positions))
        x = run_blocks(
            self, self.blocks, x, positions, mask=mask, causal=True, memory=memory,
            memory_mask=memory_mask, cache=cache,
        )  # fmt: skip
        return self.lm_head(self.final_norm(x))

    def forward(
        self, source_ids: Tensor, target_ids: Tensor, *, source_mask: Tensor | None = None
    ) -> Tensor:
        """Read the source and score the next token at every position of the target.

        source_ids   (B, S) token ids
        target_ids   (B, T) token ids, shifted right
        source_mask  which positions of the source may be attended to, (B, 1, 1, S)
        returns      (B, T, V) logits
        """
        memory = self.encode(source_ids, mask=source_mask)
        return self.decode(target_ids, memory, memory_mask=source_mask)
