"""Which of our tensors and settings is which of GPT-2's, LLaMA's and BERT's: three tables.

Chapter 03 reads them line by line. Their side is what `transformers` writes to a folder: names of
tensors in model.safetensors and keys of config.json. Both ways go through the same rows.

Production has such a table for every model, hundreds of them, and splits and fuses tensors while it
spreads them over devices.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

REQUIRED = object()
# Several spellings of one function; the first of each is written.
GELU = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
# Of a gated layer only the gate's function is named.
SWIGLU = {"silu": "swiglu", "swish": "swiglu"}


class TensorRow(NamedTuple):
    """One row: a tensor of theirs and what it is here.

    ours    our name, several names separated by blanks; {n} is the number of the block
    theirs  their name
    form    how one becomes the other: a key of slimlab.model.pretrained_tensors.FORMS
    only    present only with this: "untied" tables, or a switch of their configuration
    part    parts other than "body" may be absent, each as a whole
    """

    ours: str
    theirs: str
    form: str = "same"
    only: str = ""
    part: str = "body"


class FieldRow(NamedTuple):
    """One row: a setting of theirs and the field of ModelConfig that it is.

    Where two keys are one field here, what either switches on is on.

    ours     the field
    theirs   the key
    default  what its absence means to `transformers`; REQUIRED where that would be a guess
    values   their words and ours, where they differ
    """

    ours: str
    theirs: str
    default: object = REQUIRED
    values: Mapping[str, str] = {}


@dataclass(frozen=True)
class FamilyFiles:
    """All that is to be known about the files of one kind of model.

    architecture  the class of `transformers` that loads what is written here
    prefix        begins the names of the body; files of a bare body leave it out
    fields        rows of settings
    only          keys that change the computation, and the value that is known here
    written       settings that are written as they stand here
    harmless      keys that do not change the logits
    tensors       rows of tensors
    tied          names that repeat another tensor, where tables are tied
    buffers       ends of names of constants that older versions stored
    renamed       ends of names in older files, and today's
    """

    architecture: str
    prefix: str
    fields: tuple[FieldRow, ...]
    only: Mapping[str, object]
    harmless: frozenset[str]
    tensors: tuple[TensorRow, ...]
    tied: Mapping[str, str]
    written: Mapping[str, object] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)


def _both(
    ours: str, theirs: str, form: str = "same", bias: str = "", part: str = "body"
) -> list[TensorRow]:
    # The rows of a layer's weight and of its bias; `bias` is the switch of the latter.
    rows = []
    for end, only in (("weight", ""), ("bias", bias)):
        names = " ".join(f"{name}.{end}" for name in ours.split())
        rows.append(TensorRow(names, f"{theirs}.{end}", form, only, part))
    return rows


def _in_blocks(prefix: str, *layers: list[TensorRow]) -> list[TensorRow]:
    rows = []
    for row in sum(layers, []):
        ours = " ".join(f"blocks.{{n}}.{name}" for name in row.ours.split())
        rows.append(row._replace(ours=ours, theirs=f"{prefix}.{{n}}.{row.theirs}"))
    return rows


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Of all models: names, versions, memory, losses, ids of tokens, settings of generation.
ANYWHERE = _words("""
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset architectures
    transformers_version transformers.js_config model_type torch_dtype dtype use_bfloat16 use_cache
    torchscript return_dict output_attentions output_hidden_states gradient_checkpointing
    chunk_size_feed_forward tf_legacy_loss initializer_range id2label label2id num_labels
    problem_type finetuning_task task_specific_params tokenizer_class bos_token_id eos_token_id
    pad_token_id sep_token_id mask_token_id unk_token_id cls_token_id decoder_start_token_id prefix
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens unsloth_version
    unsloth_fixed
""")
EVERYWHERE = {
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
}

GPT2 = FamilyFiles(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fields=(
        FieldRow("vocab_size", "vocab_size"),
        FieldRow("seq_len", "n_positions"),
        FieldRow("d_model", "n_embd"),
        FieldRow("num_layers", "n_layer"),
        FieldRow("num_heads", "n_head"),
        FieldRow("d_ff", "n_inner", None),
        FieldRow("feed_forward", "activation_function", "gelu_new", GELU),
        FieldRow("norm_eps", "layer_norm_epsilon", 1e-5),
        FieldRow("dropout", "embd_pdrop", 0.1),
        FieldRow("dropout", "resid_pdrop", 0.1),
        FieldRow("tie_embeddings", "tie_word_embeddings", True),
    ),
    only={**EVERYWHERE, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    harmless=ANYWHERE
    | _words("""n_ctx attn_pdrop reorder_and_upcast_attn summary_activation summary_first_dropout
        summary_proj_to_labels summary_type summary_use_proj"""),
    tensors=(
        TensorRow("embedding.tokens.weight", "transformer.wte.weight"),
        TensorRow("embedding.positions.weight", "transformer.wpe.weight"),
        *_in_blocks(
            "transformer.h",
            _both("attention_norm", "ln_1"),
            _both(
                "attention.q_proj attention.k_proj attention.v_proj", "attn.c_attn", "side by side"
            ),
            _both("attention.out_proj", "attn.c_proj", "transposed"),
            _both("feed_forward_norm", "ln_2"),
            _both("feed_forward.up_proj", "mlp.c_fc", "transposed"),
            _both("feed_forward.down_proj", "mlp.c_proj", "transposed"),
        ),
        *_both("final_norm", "transformer.ln_f"),
        TensorRow("lm_head.weight", "lm_head.weight", only="untied"),
    ),
    tied={"lm_head.weight": "transformer.wte.weight"},
    written={"attn_pdrop": 0.0},  # nothing here drops attention weights
    buffers=(".attn.bias", ".attn.masked_bias"),
)

LLAMA = FamilyFiles(
    architecture="LlamaForCausalLM",
    prefix="model.",
    fields=(
        FieldRow("vocab_size", "vocab_size"),
        FieldRow("seq_len", "max_position_embeddings", 2048),
        FieldRow("d_model", "hidden_size"),
        FieldRow("num_layers", "num_hidden_layers"),
        FieldRow("num_heads", "num_attention_heads"),
        FieldRow("num_kv_heads", "num_key_value_heads", None),
        FieldRow("d_head", "head_dim", None),
        FieldRow("d_ff", "intermediate_size"),
        FieldRow("feed_forward", "hidden_act", "silu", SWIGLU),
        FieldRow("norm_eps", "rms_norm_eps", 1e-6),
        FieldRow("rotary_base", "rope_theta", 10000.0),
        FieldRow("bias", "attention_bias", False),
        FieldRow("bias", "mlp_bias", False),
        FieldRow("tie_embeddings", "tie_word_embeddings", False),
    ),
    # True would be Meta's own order of features, which `transformers` does not read either.
    only={**EVERYWHERE, "rope_interleaved": False},
    harmless=ANYWHERE | {"attention_dropout", "pretraining_tp", "is_llama_config"},
    tensors=(
        TensorRow("embedding.tokens.weight", "model.embed_tokens.weight"),
        *_in_blocks(
            "model.layers",
            [TensorRow("attention_norm.weight", "input_layernorm.weight")],
            _both("attention.q_proj", "self_attn.q_proj", bias="attention_bias"),
            _both("attention.k_proj", "self_attn.k_proj", bias="attention_bias"),
            _both("attention.v_proj", "self_attn.v_proj", bias="attention_bias"),
            _both("attention.out_proj", "self_attn.o_proj", bias="attention_bias"),
            [TensorRow("feed_forward_norm.weight", "post_attention_layernorm.weight")],
            _both("feed_forward.gate_proj", "mlp.gate_proj", bias="mlp_bias"),
            _both("feed_forward.up_proj", "mlp.up_proj", bias="mlp_bias"),
            _both("feed_forward.down_proj", "mlp.down_proj", bias="mlp_bias"),
        ),
        TensorRow("final_norm.weight", "model.norm.weight"),
        TensorRow("lm_head.weight", "lm_head.weight", only="untied"),
    ),
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    buffers=("rotary_emb.inv_freq",),
)

BERT = FamilyFiles(
    architecture="BertForPreTraining",
    prefix="bert.",
    fields=(
        FieldRow("vocab_size", "vocab_size"),
        FieldRow("seq_len", "max_position_embeddings", 512),
        FieldRow("d_model", "hidden_size"),
        FieldRow("num_layers", "num_hidden_layers"),
        FieldRow("num_heads", "num_attention_heads"),
        FieldRow("d_ff", "intermediate_size"),
        FieldRow("norm_eps", "layer_norm_eps", 1e-12),
        FieldRow("num_segments", "type_vocab_size", 2),
        FieldRow("dropout", "hidden_dropout_prob", 0.1),
    ),
    only={
        **EVERYWHERE,
        # The head for hidden tokens bends by the same function, here always the exact GELU.
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    },
    harmless=ANYWHERE
    | _words("""attention_probs_dropout_prob classifier_dropout directionality pooler_fc_size
        pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type"""),
    tensors=(
        TensorRow("embedding.tokens.weight", "bert.embeddings.word_embeddings.weight"),
        TensorRow("embedding.positions.weight", "bert.embeddings.position_embeddings.weight"),
        TensorRow("embedding.segments.weight", "bert.embeddings.token_type_embeddings.weight"),
        *_both("embedding_norm", "bert.embeddings.LayerNorm"),
        *_in_blocks(
            "bert.encoder.layer",
            _both("attention.q_proj", "attention.self.query"),
            _both("attention.k_proj", "attention.self.key"),
            _both("attention.v_proj", "attention.self.value"),
            _both("attention.out_proj", "attention.output.dense"),
            _both("attention_norm", "attention.output.LayerNorm"),
            _both("feed_forward.up_proj", "intermediate.dense"),
            _both("feed_forward.down_proj", "output.dense"),
            _both("feed_forward_norm", "output.LayerNorm"),
        ),
        *_both("token_transform", "cls.predictions.transform.dense", part="token head"),
        *_both("token_norm", "cls.predictions.transform.LayerNorm", part="token head"),
        TensorRow("token_bias", "cls.predictions.bias", part="token head"),
        *_both("pooler", "bert.pooler.dense", part="pooler"),
        # Theirs scores "follows" first, ours "does not follow".
        *_both("pair_head", "cls.seq_relationship", "reversed", part="pair head"),
    ),
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    written={"attention_probs_dropout_prob": 0.0},
    buffers=(".embeddings.position_ids",),
    renamed={".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"},
)

READ = {"gpt2": GPT2, "llama": LLAMA, "bert": BERT}
