"""The choices of published models, by name: what sets GPT-2, LLaMA, BERT and Vaswani et al. apart.

Chapter 03 compares them side by side. The sizes are the caller's: a LLaMA of a megabyte is a LLaMA.

Production keeps a class of its own for every model; their differences that are no choice of
ModelConfig (sliding windows, experts, several kinds of attention) are not here.
"""

from dataclasses import fields

from slimlab.config import ModelConfig, check_choice, require

FAMILIES = {
    # Vaswani et al. 2017 (arXiv:1706.03762). The paper's formulas have biases in the feed-forward
    # layer only; here, as in PyTorch's nn.Transformer, the projections of attention have them too.
    "vaswani": {
        "kind": "encoder_decoder",
        "positions": "sinusoidal",
        "norm": "layer",
        "norm_place": "post",
        "feed_forward": "relu",
        "bias": True,
        "tie_embeddings": True,
    },
    # Devlin et al. 2018 (arXiv:1810.04805)
    "bert": {
        "kind": "encoder",
        "positions": "learned",
        "norm": "layer",
        "norm_eps": 1e-12,
        "norm_place": "post",
        "feed_forward": "gelu",
        "bias": True,
        "tie_embeddings": True,
        "num_segments": 2,
    },
    # Radford et al. 2019, and the code published with it
    "gpt2": {
        "kind": "decoder",
        "positions": "learned",
        "norm": "layer",
        "norm_eps": 1e-5,
        "norm_place": "pre",
        "feed_forward": "gelu_tanh",
        "bias": True,
        "tie_embeddings": True,
    },
    # Touvron et al. 2023 (arXiv:2302.13971); the layout of rotary pairs is that of the weights as
    # published for `transformers`, Meta's own files are interleaved
    "llama": {
        "kind": "decoder",
        "positions": "rotary",
        "rotary_layout": "half",
        "rotary_base": 10000.0,
        "norm": "rms",
        "norm_eps": 1e-6,
        "norm_place": "pre",
        "feed_forward": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    },
}


def family_config(name: str, **sizes) -> ModelConfig:
    """Make the configuration of a published kind of model in sizes of your own.

    name     "vaswani", "bert", "gpt2" or "llama"
    sizes    vocab_size, seq_len, d_model, num_layers and num_heads; any other field of ModelConfig
             too, and it then takes the place of the family's choice
    returns  the configuration; dropout is 0 unless given (0.1 was published for all but llama)

    Raises InputError for an unknown name or field, for a size that is missing, and as ModelConfig.
    """
    check_choice("family", name, tuple(FAMILIES))
    known = [field.name for field in fields(ModelConfig)]
    unknown = [key for key in sizes if key not in known]
    require(
        not unknown,
        f"fields of ModelConfig: {', '.join(known)}",
        ", ".join(unknown),
        "correct the name, or leave it out",
    )
    needed = ("vocab_size", "seq_len", "d_model", "num_layers", "num_heads")
    missing = [key for key in needed if key not in sizes]
    require(
        not missing,
        f"the sizes {', '.join(needed)}",
        f"no {', no '.join(missing)}",
        f"give family_config({name!r}, {missing[0] if missing else ''}=...)",
    )
    return ModelConfig(**{**FAMILIES[name], **sizes})
