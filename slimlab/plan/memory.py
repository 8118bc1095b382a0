"""How many bytes: closed forms for parameters, scores and the key-value cache.

GB is 1e9 bytes and GiB is 2**30. Chapter 01 compares the score matrix with a measurement, chapter
02 the key-value cache of multi-head, grouped-query and multi-query attention.

Production systems keep the cache in pages, share the pages of equal beginnings and store it in
fewer bits; allocators round sizes up and keep what was freed.
"""

from slimlab.config import ModelConfig, check_size


def param_bytes(num_params: int, bytes_per_element: int) -> int:
    """Multiply a number of parameters by their size.

    num_params         entries of all tensors
    bytes_per_element  4 for float32, 2 for float16 and bfloat16
    """
    _check_sizes(num_params=num_params, bytes_per_element=bytes_per_element)
    return num_params * bytes_per_element


def attention_score_bytes(
    seq_len: int,
    num_heads: int,
    bytes_per_element: int,
    *,
    num_keys: int | None = None,
    batch_size: int = 1,
) -> int:
    """Predict the size of one score matrix of one layer; the weights are another as large.

    seq_len            T queries
    num_heads          H
    bytes_per_element  4 for float32
    num_keys           S, seq_len if not given
    batch_size         B sequences
    returns            B H T S times bytes_per_element
    """
    num_keys = seq_len if num_keys is None else num_keys
    _check_sizes(seq_len=seq_len, num_heads=num_heads, bytes_per_element=bytes_per_element)
    _check_sizes(num_keys=num_keys, batch_size=batch_size)
    return batch_size * num_heads * seq_len * num_keys * bytes_per_element


def kv_cache_bytes(
    config: ModelConfig, seq_len: int, batch_size: int, bytes_per_element: int
) -> int:
    """Predict the size of the keys and values of all layers that generation keeps.

    config             num_layers, num_kv_heads and d_head are read
    seq_len            T tokens kept per sequence
    batch_size         B sequences
    bytes_per_element  2 for float16 and bfloat16
    returns            2 L B T K E times bytes_per_element: K, not H, so grouped queries save H/K
    """
    _check_sizes(seq_len=seq_len, batch_size=batch_size, bytes_per_element=bytes_per_element)
    per_token = 2 * config.num_layers * config.num_kv_heads * config.d_head
    return per_token * seq_len * batch_size * bytes_per_element


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_size(name, value)
