"""Models of transformers with random weights, in odd shapes: the oracles of pretrained weights."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V = 23
# Special tokens of their defaults lie outside this vocabulary; transformers warns of each.
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def gpt2(**other):
    sizes = {"vocab_size": V, "n_positions": 11, "n_embd": 12, "n_layer": 2, "n_head": 3}
    config = transformers.GPT2Config(**{**sizes, **NO_IDS, **other})
    return random_weights(transformers.GPT2LMHeadModel(config))


def llama(**other):
    sizes = {
        "vocab_size": V, "max_position_embeddings": 32, "hidden_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 28,
    }  # fmt: skip
    config = transformers.LlamaConfig(**{**sizes, **NO_IDS, **other})
    return random_weights(transformers.LlamaForCausalLM(config))


def bert(kind="BertForPreTraining", **other):
    sizes = {
        "vocab_size": V, "max_position_embeddings": 13, "hidden_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 19,
    }  # fmt: skip
    config = transformers.BertConfig(**{**sizes, **NO_IDS, **other})
    return random_weights(getattr(transformers, kind)(config))


def random_weights(model, std=0.3):
    """Every parameter random, gains and biases too, large enough that each one shows."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.5)
    return model.eval()


def some_ids(B=2, T=7):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))
