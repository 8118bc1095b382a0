"""The key-value cache: what attention has computed for the past, kept for the next token.

Chapter 02 predicts its size, chapter 03 shows that reading a text in pieces with it gives the same
logits as reading it at once. It is made whole at the start, so that a long text runs out of room
with a message and not out of memory half-way.

Production keeps it in pages of a few tokens, shares the pages of equal beginnings and stores it in
fewer bits (vLLM's PagedAttention, arXiv:2309.06180).
"""

import torch
from torch import Tensor

from slimlab.config import ModelConfig, check_size, require


class LayerCache:
    """The keys and values of one layer.

    shape   (B, K, max_len, E)
    dtype   of keys and values
    device  where they lie
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.key = torch.empty(shape, dtype=dtype, device=device)
        self.value = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.memory: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the new keys and values and return all of them.

        key, value  (B, K, T, E) of the next T positions
        returns     (B, K, length + T, E) each, views of the cache

        Raises InputError if they are of another shape or there is no room left.
        """
        end, room = self.length + key.shape[-2], self.key.shape[-2]
        require(
            key.shape[:2] == self.key.shape[:2] and key.shape[-1] == self.key.shape[-1],
            f"keys (B, K, T, E) = {(*self.key.shape[:2], 'T', self.key.shape[-1])}",
            f"keys {tuple(key.shape)}",
            "make a cache for this batch size and this model: KVCache(config, batch_size)",
        )
        require(
            end <= room,
            f"at most {room} tokens, the room of this cache",
            f"{self.length} kept and {end - self.length} more",
            f"make it with max_len of at least {end}, or generate fewer tokens",
        )
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end]


class KVCache:
    """The keys and values of all layers of a decoder.

    config      num_layers, num_kv_heads, d_head and seq_len are read
    batch_size  B
    max_len     tokens there is room for, config.seq_len if not given
    dtype       float32 if not given
    device      the CPU if not given

    `length` is the number of tokens kept; `n_bytes` the memory taken, equal to
    slimlab.plan.memory.kv_cache_bytes. A cache serves inference: use it under torch.no_grad().
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int = 1,
        max_len: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        kind = getattr(config, "kind", type(config).__name__)
        require(
            kind in ("decoder", "encoder_decoder"),
            "the configuration of a model that writes: a decoder or an encoder_decoder",
            f"{kind}",
            "give model.config; an encoder sees all of its text at once and keeps nothing",
        )
        max_len = config.seq_len if max_len is None else max_len
        check_size("batch_size", batch_size)
        check_size("max_len", max_len)
        shape = (batch_size, config.num_kv_heads, max_len, config.d_head)
        device = torch.device(device)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.num_layers)]

    @property
    def length(self) -> int:
        """Tokens kept per sequence.

        Raises InputError if the layers differ in it: an error struck between two of them.
        """
        lengths = [layer.length for layer in self.layers]
        require(
            len(set(lengths)) == 1,
            "a cache whose layers keep equally many tokens",
            f"{min(lengths)} to {max(lengths)}: a forward pass with it ended in an error half-way",
            "make a new cache and read the text again",
        )
        return lengths[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of the keys and values that there is room for."""
        kept = (tensor for layer in self.layers for tensor in (layer.key, layer.value))
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)
