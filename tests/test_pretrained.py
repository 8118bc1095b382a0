"""Weights of transformers read and written: the same logits on both sides, both ways."""

import json
import warnings

import pretrained_cases as cases
import pytest
import torch
from pretrained_edits import edit_tensors
from safetensors import safe_open
from torch.testing import assert_close

from slimlab.config import ModelConfig
from slimlab.model.build import build_model
from slimlab.model.families import family_config
from slimlab.model.masks import padding_mask
from slimlab.model.pretrained import from_pretrained, save_pretrained
from slimlab.model.pretrained_config import read_config
from slimlab.train.pairs import FOLLOWS, RANDOM

transformers = cases.transformers

# float32 keeps 6e-8 of a number; two layers of sums over at most 28 products of size 1, taken in
# another order by another kernel, differ by about 1e-6 here. A wrong or missing tensor shows in the
# first digit, as the last test of this group checks.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

DECODERS = {
    "gpt2": lambda: cases.gpt2(),
    "gpt2, one head, wide": lambda: cases.gpt2(n_head=1, n_inner=31, n_layer=3),
    "gpt2, exact gelu, untied": lambda: cases.gpt2(
        activation_function="gelu", tie_word_embeddings=False
    ),
    "llama, full": lambda: cases.llama(num_key_value_heads=6),
    "llama, grouped": lambda: cases.llama(),
    "llama, single": lambda: cases.llama(num_key_value_heads=1, rope_theta=500000.0),
    "llama, tied": lambda: cases.llama(tie_word_embeddings=True),
    "llama, head_dim 10": lambda: cases.llama(head_dim=10, rms_norm_eps=1e-3),
    "llama, biases": lambda: cases.llama(attention_bias=True, mlp_bias=True),
    "llama, attention biases": lambda: cases.llama(attention_bias=True),
    "llama, other biases": lambda: cases.llama(mlp_bias=True),
}
ENCODERS = {
    "pre-training": lambda: cases.bert(),
    "masked": lambda: cases.bert("BertForMaskedLM", num_attention_heads=3),
    "segments": lambda: cases.bert(type_vocab_size=3, layer_norm_eps=1e-3),
}


def their_logits(model, ids, **given):
    with torch.no_grad():
        output = model(ids, **given)
    return output.logits if hasattr(output, "logits") else output.prediction_logits


def our_logits(model, ids, **given):
    with torch.no_grad():
        output = model(ids, **given)
    return output if isinstance(output, torch.Tensor) else output.token_logits


def load(folder, **given):
    """Read a folder whose heads may be incomplete; other tests are about that warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return from_pretrained(folder, **given)


@pytest.mark.parametrize("case", [*DECODERS, *ENCODERS])
def test_logits_are_those_of_transformers_both_ways(tmp_path, case):
    theirs = {**DECODERS, **ENCODERS}[case]()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    ids = cases.some_ids()
    expected = their_logits(theirs, ids)
    assert expected.std() > 0.1
    assert_close(our_logits(ours, ids), expected, **CLOSE)

    save_pretrained(ours, tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert_close(their_logits(again, ids), expected, **CLOSE)


def test_our_own_models_are_read_by_transformers(tmp_path):
    torch.manual_seed(5)
    sizes = {"vocab_size": cases.V, "seq_len": 9, "d_model": 24, "num_layers": 2, "num_heads": 4}
    ids = cases.some_ids()
    kinds = {
        "gpt2": {},
        "llama": {"num_kv_heads": 2, "d_head": 10, "rotary_base": 500.0},
        "bert": {},
    }
    for name, other in kinds.items():
        ours = cases.random_weights(build_model(family_config(name, **sizes, **other)))
        save_pretrained(ours, tmp_path / name)
        auto = "AutoModelForPreTraining" if name == "bert" else "AutoModelForCausalLM"
        theirs = getattr(transformers, auto).from_pretrained(tmp_path / name).eval()
        assert_close(their_logits(theirs, ids), our_logits(ours, ids), **CLOSE)


@pytest.mark.parametrize("case", [*DECODERS, *ENCODERS])
def test_padding_is_hidden_alike(tmp_path, case):
    theirs = {**DECODERS, **ENCODERS}[case]()
    theirs.save_pretrained(tmp_path)
    ids, lengths = cases.some_ids(), torch.tensor([7, 4])
    seen = torch.arange(7) < lengths[:, None]
    expected = their_logits(theirs, ids, attention_mask=seen.long())
    found = our_logits(load(tmp_path), ids, mask=padding_mask(lengths, 7))
    assert_close(found[seen], expected[seen], **CLOSE)


@pytest.mark.parametrize("case", [*DECODERS, *ENCODERS])
def test_any_mask_hides_alike(tmp_path, case):
    theirs = {**DECODERS, **ENCODERS}[case]()
    theirs.save_pretrained(tmp_path)
    ids = cases.some_ids()
    mask = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    mask |= torch.eye(7, dtype=torch.bool)  # nobody is left without a key
    causal = torch.ones(7, 7, dtype=torch.bool).tril() if case in DECODERS else True
    given = mask & causal
    if case in ENCODERS and transformers.__version__.startswith("4."):
        given = given[:, 0].long()
    expected = their_logits(theirs, ids, attention_mask=given)
    assert_close(our_logits(load(tmp_path), ids, mask=mask), expected, **CLOSE)


def test_segments_the_body_and_the_pair_head_are_berts(tmp_path):
    theirs = cases.bert()
    theirs.save_pretrained(tmp_path)
    ids = cases.some_ids()
    segments = (torch.arange(7) > 3).long().expand(2, 7)
    with torch.no_grad():
        expected = theirs(ids, token_type_ids=segments, output_hidden_states=True)
        found = from_pretrained(tmp_path)(ids, segments=segments)
    assert_close(found.hidden, expected.hidden_states[-1], **CLOSE)
    assert_close(found.token_logits, expected.prediction_logits, **CLOSE)
    # transformers documents 0 for a second part that follows, 1 for one that does not.
    for ours, bert in ((FOLLOWS, 0), (RANDOM, 1)):
        theirs_of_it = expected.seq_relationship_logits[:, bert]
        assert_close(found.pair_logits[:, ours], theirs_of_it, **CLOSE)


def test_every_tensor_has_a_part_in_the_logits(tmp_path):
    """The tests above can fail: each tensor of each kind, changed alone, changes some result."""
    sizes = {
        "gpt2": cases.gpt2,
        "llama": lambda: cases.llama(attention_bias=True),
        "bert": cases.bert,
    }
    ids = cases.some_ids()
    for name, make in sizes.items():
        make().save_pretrained(tmp_path / name)
        model = from_pretrained(tmp_path / name)
        with torch.no_grad():
            before = model(ids)
            for key, parameter in model.named_parameters():
                if key.endswith("k_proj.bias") and name != "llama":
                    continue  # softmax does not see what all keys share; rotation makes it differ
                kept = parameter.clone()
                parameter.mul_(1.1)
                after = model(ids)
                parameter.copy_(kept)
                pairs = [(before, after)] if name != "bert" else zip(before, after)
                change = max((one - other).abs().max() for one, other in pairs)
                zero_bias = not kept.any()
                assert zero_bias or change > 1e-4, f"{name}: {key} changes nothing: {change}"


@pytest.mark.parametrize("case", ["gpt2", "llama, tied", "pre-training"])
def test_shards_are_read_and_written(tmp_path, case):
    theirs = {**DECODERS, **ENCODERS}[case]()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="3KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    ours = from_pretrained(tmp_path / "theirs")
    expected = their_logits(theirs, ids := cases.some_ids())
    assert_close(our_logits(ours, ids), expected, **CLOSE)

    save_pretrained(ours, tmp_path / "ours", max_shard_bytes=3000)
    shards = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(shards) > 2
    for path in shards:
        with safe_open(path, framework="pt") as file:
            sizes = [file.get_tensor(name).nbytes for name in list(file.keys())]
        assert sum(sizes) <= 3000 or len(sizes) == 1
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    stored_bytes = sum(p.numel() * 4 for p in ours.parameters())
    assert index["metadata"]["total_size"] == stored_bytes
    again = type(theirs).from_pretrained(tmp_path / "ours").eval()
    assert_close(their_logits(again, ids), expected, **CLOSE)


@pytest.mark.parametrize("case", ["gpt2", "llama, head_dim 10", "segments"])
def test_what_was_saved_here_is_read_here_bit_for_bit(tmp_path, case):
    {**DECODERS, **ENCODERS}[case]().save_pretrained(tmp_path / "theirs")
    first = from_pretrained(tmp_path / "theirs")
    save_pretrained(first, tmp_path / "ours")
    second = from_pretrained(tmp_path / "ours")
    assert second.config == first.config
    assert second.state_dict().keys() == first.state_dict().keys()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_interleaved_rotary_features_are_put_in_their_order(tmp_path):
    sizes = {"vocab_size": cases.V, "seq_len": 9, "d_model": 24, "num_layers": 2, "num_heads": 4}
    other = {"num_kv_heads": 2, "d_head": 10, "rotary_layout": "interleaved", "bias": True}
    ours = cases.random_weights(build_model(family_config("llama", **sizes, **other)))
    save_pretrained(ours, tmp_path / "model")
    ids = cases.some_ids()
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert_close(their_logits(theirs, ids), our_logits(ours, ids), **CLOSE)
    assert from_pretrained(tmp_path / "model").config.rotary_layout == "half"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_stay_or_are_converted(tmp_path, dtype):
    theirs = cases.llama().to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    assert {p.dtype for p in ours.parameters()} == {dtype}
    ids = cases.some_ids()
    # Converting weights to 32 bits changes no number, so that the 32-bit tolerance holds. Theirs is
    # read anew: .to(dtype) has rounded its rotary frequencies too.
    wide = from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    oracle = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert_close(our_logits(wide, ids), their_logits(oracle.eval(), ids), **CLOSE)
    save_pretrained(ours, tmp_path / "ours")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == dtype


def test_models_of_a_bare_body_are_read(tmp_path):
    """Their names lack the prefix, as those of the published GPT-2 do."""
    theirs = cases.gpt2()
    theirs.transformer.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert "wte.weight" in list(file.keys())
    ids = cases.some_ids()
    assert_close(our_logits(from_pretrained(tmp_path), ids), their_logits(theirs, ids), **CLOSE)


def test_heads_that_are_absent_are_drawn_and_named(tmp_path):
    theirs = cases.bert("BertModel")
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"token_transform.weight.*pair_head.bias"):
        ours = from_pretrained(tmp_path)
    ids = cases.some_ids()
    with torch.no_grad():
        expected = theirs(ids)
        found = ours(ids)
    assert_close(found.hidden, expected.last_hidden_state, **CLOSE)
    pooled = torch.tanh(ours.pooler(found.hidden[:, 0]))
    assert_close(pooled, expected.pooler_output, **CLOSE)
    assert torch.isfinite(found.token_logits).all()
    assert torch.equal(ours.token_norm.weight, torch.ones(12))
    assert 0 < ours.pair_head.weight.std() < 0.1


def test_a_complete_folder_is_read_without_a_warning(tmp_path):
    cases.bert().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained(tmp_path)


def test_older_names_and_stored_constants_are_known(tmp_path):
    theirs = cases.bert()
    theirs.save_pretrained(tmp_path / "bert")

    def as_in_2018(tensors):
        for name in list(tensors):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            tensors[new.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = torch.arange(13)[None]
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()

    edit_tensors(tmp_path / "bert", as_in_2018)
    ids = cases.some_ids()
    found = our_logits(from_pretrained(tmp_path / "bert"), ids)
    assert_close(found, their_logits(theirs, ids), **CLOSE)

    theirs = cases.gpt2()
    theirs.save_pretrained(tmp_path / "gpt2")

    def as_in_2019(tensors):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 11, 11).tril()
        tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    edit_tensors(tmp_path / "gpt2", as_in_2019)
    assert_close(
        our_logits(from_pretrained(tmp_path / "gpt2"), ids), their_logits(theirs, ids), **CLOSE
    )


def test_a_tied_table_stays_one_parameter(tmp_path):
    cases.gpt2().save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    assert model.lm_head.weight is model.embedding.tokens.weight
    assert not model.training
    assert all(p.requires_grad and p.is_contiguous() for p in model.parameters())
    loss = model(cases.some_ids()).logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_reading_draws_no_random_numbers(tmp_path):
    cases.llama().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_in_memory_does_not_follow_its_file(tmp_path):
    cases.llama().save_pretrained(tmp_path)
    model = from_pretrained(tmp_path)
    before = our_logits(model, ids := cases.some_ids())
    path = tmp_path / "model.safetensors"
    with open(path, "r+b") as file:  # in place: a mapped file would change under the model
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (path.stat().st_size // 2))
    assert torch.equal(our_logits(model, ids), before)


# The settings of published checkpoints, each with the number of parameters that is stated for it.
GPT2_SMALL = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12,
    "n_layer": 12, "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None,
    "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
    "summary_use_proj": True, "vocab_size": 50257,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}  # fmt: skip
TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 5632, "max_position_embeddings": 2048, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float32", "transformers_version": "4.31.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
SMOL_LM = {
    "_name_or_path": "HuggingFaceTB/SmolLM2-135M", "architectures": ["LlamaForCausalLM"],
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 0,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 576,
    "initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": True,
    "max_position_embeddings": 2048, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None,
    "rope_theta": 100000, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0", "use_cache": True, "vocab_size": 49152,
}  # fmt: skip
BERT_BASE = {
    "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
    "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
    "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
}  # fmt: skip


@pytest.mark.parametrize(
    ("theirs", "num_params"),
    [
        (GPT2_SMALL, 124_439_808),
        (TINY_LLAMA, 1_100_048_384),
        (SMOL_LM, 134_515_008),
        (BERT_BASE, 110_106_428),
    ],
    ids=["gpt2", "TinyLlama", "SmolLM2-135M", "bert-base-uncased"],
)
def test_settings_of_published_checkpoints_are_read(theirs, num_params):
    with torch.device("meta"):
        model = build_model(read_config(theirs, "config.json"))
        kind = theirs["architectures"][0].replace("MaskedLM", "PreTraining")
        config = transformers.AutoConfig.for_model(**theirs)
        oracle = getattr(transformers, kind)(config)
    assert sum(p.numel() for p in model.parameters()) == num_params
    assert sum(p.numel() for p in oracle.parameters()) == num_params


@pytest.mark.parametrize("make", [cases.gpt2, cases.llama, cases.bert])
def test_every_key_that_transformers_itself_writes_is_known(make):
    theirs = make().config
    full = read_config(json.loads(theirs.to_json_string(use_diff=False)), "config.json")
    assert isinstance(full, ModelConfig)
    assert full == read_config(theirs.to_diff_dict(), "config.json")


def test_both_forms_of_the_rotary_base_are_read():
    sizes = {**TINY_LLAMA, "vocab_size": 7}
    new = {**sizes, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    old = {**sizes, "rope_theta": 5e5, "rope_scaling": {"type": "default"}}
    assert read_config(new, "").rotary_base == read_config(old, "").rotary_base == 5e5
    assert read_config(sizes, "").rotary_base == 10000.0


def test_saving_over_a_model_keeps_the_tokenizer_and_leaves_no_old_shard(tmp_path):
    cases.gpt2().save_pretrained(tmp_path / "gpt2")
    model = from_pretrained(tmp_path / "gpt2")
    save_pretrained(model, tmp_path / "out", max_shard_bytes=2000)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    save_pretrained(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "out"]
    from_pretrained(tmp_path / "out")
