"""Configurations and batches on which predictions are compared with real models.

Sizes are small, odd and pairwise different, so that no two letters can be exchanged unnoticed.
"""

import torch

from slimlab.config import ModelConfig
from slimlab.model.attention import MultiHeadAttention
from slimlab.model.build import build_model
from slimlab.train.objectives import token_loss

LLAMA = {
    "vocab_size": 37, "seq_len": 13, "d_model": 24, "num_layers": 3, "num_heads": 6,
    "num_kv_heads": 2, "d_head": 6, "d_ff": 22, "feed_forward": "swiglu", "tie_embeddings": False,
}  # fmt: skip
GPT = {
    "vocab_size": 41, "seq_len": 11, "d_model": 20, "num_layers": 2, "num_heads": 5,
    "positions": "learned", "norm": "layer", "feed_forward": "gelu_tanh", "bias": True,
}  # fmt: skip
POST = {
    "vocab_size": 29, "seq_len": 9, "d_model": 18, "num_layers": 2, "num_heads": 3,
    "num_kv_heads": 1, "d_ff": 26, "positions": "sinusoidal", "norm": "layer",
    "norm_place": "post", "feed_forward": "relu",
}  # fmt: skip
BERT = {**POST, "positions": "learned", "num_kv_heads": 3, "bias": True, "feed_forward": "gelu"}

CASES = {
    "decoder llama": ModelConfig(**LLAMA),
    "decoder llama interleaved": ModelConfig(**LLAMA, rotary_layout="interleaved", bias=True),
    "decoder gpt": ModelConfig(**GPT),
    "decoder post": ModelConfig(**POST),
    "decoder plain": ModelConfig(31, 8, 16, 1, 4, 2, positions="none"),
    "encoder pairs": ModelConfig(**BERT, kind="encoder", num_segments=2),
    "encoder pre": ModelConfig(**LLAMA, kind="encoder"),
    "encoder gpt": ModelConfig(**{**GPT, "num_segments": 3, "norm": "rms"}, kind="encoder"),
    "both post": ModelConfig(**POST, kind="encoder_decoder"),
    "both llama": ModelConfig(**LLAMA, kind="encoder_decoder"),
    "both gpt": ModelConfig(**GPT, kind="encoder_decoder"),
}
GPT2 = ModelConfig(
    50257, 1024, 768, 12, 12, positions="learned", norm="layer", feed_forward="gelu_tanh", bias=True
)


def model_of(config, form="fused", recompute="none", dtype=torch.float32):
    """A model in training, its attention in the form asked for."""
    torch.manual_seed(3)
    model = build_model(config).to(dtype).train()
    model.recompute = recompute
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.form = form
    return model


def batch_of(config, batch_size, seq_len, source_len=None):
    """Inputs of a model, and targets: one token per position, and one class per pair."""
    generator = torch.Generator().manual_seed(5)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    inputs = {"ids": draw(config.vocab_size, batch_size, seq_len)}
    if config.kind == "encoder_decoder":
        inputs["target_ids"] = inputs.pop("ids")
        inputs["source_ids"] = draw(config.vocab_size, batch_size, source_len)
    targets = [draw(config.vocab_size, batch_size, seq_len)]
    if config.num_segments:
        inputs["segments"] = draw(config.num_segments, batch_size, seq_len)
        targets.append(draw(2, batch_size))
    return inputs, targets


def loss_of(model, inputs, targets):
    """The loss of all that a model puts out: tokens, and pairs where it scores them."""
    outputs = model(**inputs)
    outputs = outputs[1:] if model.config.kind == "encoder" else [outputs]
    return sum(token_loss(*pair)[0] for pair in zip(outputs, targets))
