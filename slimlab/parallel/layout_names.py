"""Names for the dims of every tensor of the book's models, and the size of each.

Chapter 09 lays tensors out by the names of their dims (slimlab.parallel.layout). Sizes alone would
not do: a model may have as many heads as sequences, and only names say that the rows of q_proj and
the columns of out_proj are the same heads.

Production: Mesh-TensorFlow and Flax give names where a tensor is made; DTensor has none and is told
numbers of dims, module by module. Shazeer et al. 2018 (arXiv:1811.02084), section 3.
"""

from torch import nn

from slimlab.config import InputError, ModelConfig, require

# Linear layers: the dim of their results, then that of their inputs, as nn.Linear's weight lies.
LINEAR = {
    "q_proj": ("heads", "model"),
    "k_proj": ("kv_heads", "model"),
    "v_proj": ("kv_heads", "model"),
    "out_proj": ("model", "heads"),
    "up_proj": ("feed_forward", "model"),
    "gate_proj": ("feed_forward", "model"),
    "down_proj": ("model", "feed_forward"),
    "lm_head": ("vocabulary", "model"),
    # A tensor may not have one name twice, so the square matrices of encoders have a second name.
    "token_transform": ("transformed", "model"),
    "pooler": ("pooled", "model"),
    "pair_head": ("pair", "pooled"),
}
TABLES = {
    "tokens": ("vocabulary", "model"),
    "positions": ("position", "model"),
    "segments": ("segment", "model"),
}
# The field of the configuration that counts a dim, heads as whole heads.
SIZE_NAMES = {
    "vocabulary": "vocab_size",
    "position": "seq_len",
    "segment": "num_segments",
    "model": "d_model",
    "heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "feed_forward": "d_ff",
    "transformed": "d_model",
    "pooled": "d_model",
}
VECTORS = {"token_bias": ("vocabulary",)}
# What flows between layers. Positions have two names: "sequence" between the sub-layers, where
# norms, dropout and sums work on each position alone, "position" inside. One name would put two
# dims of "hidden" on the axis tensor as soon as sequences are cut along it.
ACTIVATIONS = {
    "stream": ("batch", "sequence", "model"),
    "queries": ("batch", "position", "heads"),
    "keys": ("batch", "position", "kv_heads"),
    "hidden": ("batch", "position", "feed_forward"),
    "logits": ("batch", "position", "vocabulary"),
}


def dimensions_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Name the dims of every parameter.

    model    a Decoder, an Encoder or an EncoderDecoder, also one on the device meta
    returns  name of the parameter -> a name for each of its dims, in the order of
             named_parameters(); a tied table once, as embedding.tokens.weight. "heads" are the
             num_heads * d_head rows of W^Q, "kv_heads" the num_kv_heads * d_head rows of W^K and
             W^V, "model" the D features of the stream

    Raises InputError for a parameter that is none of the book's.
    """
    return {name: _dims(name, param.dim()) for name, param in model.named_parameters()}


def _dims(name: str, num_dims: int) -> tuple[str, ...]:
    layer, _, kind = name.rpartition(".")
    layer = layer.rpartition(".")[2]
    if kind in VECTORS:
        return VECTORS[kind]
    if layer == "token_norm":
        dims = ("transformed",)
    elif layer.endswith("norm"):
        dims = ("model",)
    else:
        dims = (LINEAR | TABLES).get(layer, ())
        dims = dims[:1] if kind == "bias" else dims
    if len(dims) != num_dims:
        raise InputError(
            "a parameter of the book's models, as plan.params.param_shapes lists them",
            f"{name} with {num_dims} dims",
            "give a model from slimlab.model.build.build_model",
        )
    return dims


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Measure each dim that a parameter may have, in what a cut may not go through.

    model    one of the book's
    returns  name -> size: whole heads for "heads" and "kv_heads", elements for all others

    Raises InputError for another model.
    """
    config = getattr(model, "config", None)
    require(
        isinstance(config, ModelConfig),
        "a model with a ModelConfig",
        f"a {type(model).__name__}",
        "give a model from slimlab.model.build.build_model",
    )
    sizes = {dim: getattr(config, field) for dim, field in SIZE_NAMES.items()}
    return sizes | {"pair": 2}
