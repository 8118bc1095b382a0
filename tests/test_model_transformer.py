"""Decoder, encoder and encoder-decoder: what each position may know, and equal ways to compute it.

Bounds: float64, so rounding of a few hundred sums of size 1 stays below 1e-12.
"""

import dataclasses
import math

import pytest
import torch

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.model.cache import KVCache
from slimlab.model.initialise import initialise
from slimlab.model.masks import chunk_mask, packed_mask, packed_positions, padding_mask
from slimlab.model.transformer import Decoder, device_of, num_params
from slimlab.plan.memory import kv_cache_bytes

SIZES = {"vocab_size": 13, "seq_len": 11, "d_model": 12, "num_layers": 3, "num_heads": 3}
SHAPES = {
    "llama": {"feed_forward": "swiglu", "num_kv_heads": 1, "tie_embeddings": False},
    "gpt2": {"positions": "learned", "norm": "layer", "bias": True, "feed_forward": "gelu_tanh"},
    "vaswani": {"positions": "sinusoidal", "norm": "layer", "norm_place": "post",
                "feed_forward": "relu", "bias": True},
    "interleaved": {"rotary_layout": "interleaved", "d_head": 6, "d_ff": 17},
    "no positions": {"positions": "none"},
}  # fmt: skip
KINDS = ["decoder", "encoder", "encoder_decoder"]


def model_of(kind="decoder", **choices):
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES, kind=kind, **choices)).double()
    for parameter in model.parameters():  # weights of size 1, so that every part tells
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def ids_of(*shape):
    return torch.randint(13, shape, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("choices", SHAPES.values(), ids=SHAPES)
def test_a_decoder_knows_what_stands_before_and_nothing_later(choices):
    model, ids = model_of(**choices), ids_of(2, 9)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 13
    before, after = model(ids), model(changed)
    close(after[:, :5], before[:, :5])
    assert ((after[:, 5:] - before[:, 5:]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("choices", SHAPES.values(), ids=SHAPES)
def test_an_encoder_knows_both_sides(choices):
    model, ids = model_of("encoder", **choices), ids_of(2, 9)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 13
    differs = (model.encode(changed) - model.encode(ids)).abs().amax(-1) > 1e-6
    assert differs.all()


@pytest.mark.parametrize("choices", SHAPES.values(), ids=SHAPES)
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(choices):
    model, ids = model_of(**choices), ids_of(2, 11)
    cache = KVCache(model.config, 2, dtype=torch.float64)
    with torch.no_grad():
        pieces = [model(ids[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 9), (9, 11))]
    close(torch.cat(pieces, 1), model(ids))
    assert cache.length == 11
    assert cache.n_bytes == kv_cache_bytes(model.config, 11, 2, 8)


def test_the_block_is_the_composition_that_its_config_names():
    ids = ids_of(2, 5)
    for place in ("pre", "post"):
        model = model_of(norm_place=place, positions="none", norm="layer", bias=True)
        x = model.embedding.tokens.weight[ids]
        for block in model.blocks:
            if place == "pre":
                x = x + block.attention(block.attention_norm(x), causal=True)
                x = x + block.feed_forward(block.feed_forward_norm(x))
            else:
                x = block.attention_norm(x + block.attention(x, causal=True))
                x = block.feed_forward_norm(x + block.feed_forward(x))
        if place == "pre":
            x = model.final_norm(x)
        close(model(ids), x @ model.embedding.tokens.weight.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choices", list(SHAPES.values())[:3], ids=list(SHAPES)[:3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_blocks_changes_no_bit_of_output_or_gradient(kind, choices, dropout):
    model, ids = model_of(kind, **choices, dropout=dropout).train(), ids_of(2, 9)
    inputs = (ids, ids[:, :4]) if kind == "encoder_decoder" else (ids,)
    found = []
    for setting in ("none", "block"):
        model.recompute = setting
        model.zero_grad()
        torch.manual_seed(5)
        output = model(*inputs)
        output = output.token_logits if kind == "encoder" else output
        output.square().sum().backward()
        # What comes after is drawn from the same place of the random sequence.
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([output.detach(), *grads, torch.rand(1)])
    assert len(found[0]) == len(found[1]) > 10
    if kind == "encoder_decoder":  # gradients of the memory are added up in another order
        for a, b in zip(*found):
            close(a, b)
    else:
        assert all(torch.equal(a, b) for a, b in zip(*found))


def test_blocks_that_are_frozen_can_be_recomputed_too():
    found = []
    for setting in ("none", "block"):
        model, ids = model_of().train(), ids_of(2, 9)
        model.recompute = setting
        model.embedding.requires_grad_(False)
        model.blocks[0].requires_grad_(False)
        model(ids).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() != set()
    assert not any(name.startswith(("blocks.0", "embedding")) for name in found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_recomputing_keeps_less_for_the_backward_pass():
    kept = {}
    for setting in ("none", "block"):
        model, ids = model_of().train(), ids_of(4, 9)
        model.recompute = setting
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(ids).sum()
        kept[setting] = sum(sizes.values())
        loss.backward()
    assert kept["block"] < 0.6 * kept["none"]


def test_packed_documents_are_read_as_if_alone():
    lengths, ids = [3, 5, 2], ids_of(1, 10)
    numbers = torch.tensor([[n for n, length in enumerate(lengths) for _ in range(length)]])
    assert packed_positions(numbers).tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]
    for choices in SHAPES.values():
        model = model_of(**choices)
        packed = model(ids, mask=packed_mask(numbers), positions=packed_positions(numbers))
        alone = [model(part) for part in ids.split(lengths, dim=1)]
        close(packed, torch.cat(alone, 1))


def test_padding_changes_nothing_for_the_tokens_before_it():
    ids = ids_of(2, 7)
    for choices in SHAPES.values():
        encoder = model_of("encoder", **choices)
        padded = encoder.encode(ids, mask=padding_mask([4, 7], 7))
        close(padded[:1, :4], encoder.encode(ids[:1, :4]))
        close(padded[1:], encoder.encode(ids[1:]))
        both = model_of("encoder_decoder", **choices)
        logits = both(ids, ids[:, :3], source_mask=padding_mask([4, 7], 7))
        close(logits[:1], both(ids[:1, :4], ids[:1, :3]))


def test_a_target_sees_the_whole_source_and_its_own_past():
    model, source, target = model_of("encoder_decoder"), ids_of(2, 6), ids_of(2, 5)
    logits = model(source, target)
    later = target.clone()
    later[:, 3] = (later[:, 3] + 1) % 13
    close(model(source, later)[:, :3], logits[:, :3])
    other = source.clone()
    other[:, 5] = (other[:, 5] + 1) % 13
    assert ((model(other, target) - logits).abs().amax(-1) > 1e-6).all()
    memory = model.encode(source)
    cache = KVCache(model.config, 2, dtype=torch.float64)
    with torch.no_grad():
        steps = [model.decode(target[:, t : t + 1], memory, cache=cache) for t in range(5)]
    close(torch.cat(steps, 1), logits)


def test_segments_and_the_first_position_decide_about_pairs():
    model = model_of("encoder", num_segments=2, positions="learned")
    ids, segments = ids_of(2, 6), torch.tensor([[0, 0, 0, 1, 1, 1]] * 2)
    output = model(ids, segments=segments)
    assert output.token_logits.shape == (2, 6, 13)
    close(output.pair_logits, model.pair_head(torch.tanh(model.pooler(output.hidden[:, 0]))))
    assert (output.pair_logits - model(ids).pair_logits).abs().max() > 1e-6
    assert model_of("encoder")(ids).pair_logits is None


def test_chunks_that_leak_allow_the_future_inside_the_chunk():
    leaky, right = chunk_mask(8, 4, leaky=True), chunk_mask(8, 4)
    later = torch.arange(8) > torch.arange(8)[:, None]
    assert (int(leaky.sum()), int((leaky & later).sum())) == (48, 12)
    for chunk_len in (1, 3, 8, 20):
        assert torch.equal(chunk_mask(8, chunk_len), torch.ones(8, 8).tril().bool())
    assert torch.equal(right, ~later)
    ragged = chunk_mask(5, 3, leaky=True)
    assert ragged.int().tolist() == [[1, 1, 1, 0, 0]] * 3 + [[1] * 5] * 2


def test_an_untrained_model_begins_near_the_uniform_guess_and_as_asked():
    config = ModelConfig(100, 16, 64, 4, 4)
    ids = torch.randint(100, (8, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    logits = build_model(config)(ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    # Logits of standard deviation 0.02 * sqrt(64) = 0.16 add half their variance.
    assert loss.item() == pytest.approx(math.log(100), abs=0.1)
    zero = initialise(build_model(config), residual="zero", seed=1)
    x = zero.embedding.tokens(ids)
    assert torch.equal(zero.hidden(ids), x)
    scaled = initialise(build_model(config), residual="scaled", seed=1)
    plain = initialise(build_model(config), residual="plain", seed=1)
    for name in ("attention.out_proj", "feed_forward.down_proj"):
        small, full = (m.blocks[0].get_submodule(name).weight for m in (scaled, plain))
        assert full.std().item() == pytest.approx(0.02, rel=0.1)
        torch.testing.assert_close(small * 8**0.5, full)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), plain_again(config)))


def plain_again(config):
    return initialise(build_model(config), residual="plain", seed=1).parameters()


def test_sinusoidal_models_begin_with_tokens_as_large_as_positions():
    model = build_model(ModelConfig(50, 16, 64, 1, 4, positions="sinusoidal"))
    tokens = model.embedding.tokens.weight * 64**0.5
    assert tokens.std().item() == pytest.approx(1.0, rel=0.1)


def test_tied_tables_are_one_and_are_counted_once():
    tied, two = (Decoder(ModelConfig(**SIZES, tie_embeddings=t)) for t in (True, False))
    assert tied.lm_head.weight is tied.embedding.tokens.weight
    assert num_params(two) - num_params(tied) == 13 * 12
    assert device_of(tied) == torch.device("cpu")


BAD = {
    "ids outside": (lambda m: m(torch.tensor([[3, 13]])), "id 13 in sequence 0 at position 1"),
    "negative id": (lambda m: m(torch.tensor([[-1, 3]])), "from 0 to 12"),
    "float ids": (lambda m: m(torch.zeros(1, 2)), "token ids"),
    "a list": (lambda m: m([[1, 2]]), "token ids"),
    "no tokens": (lambda m: m(torch.zeros(1, 0, dtype=torch.int64)), "at least one"),
    "too long": (lambda m: m(ids_of(1, 12)), "at most 11 positions"),
    "positions": (lambda m: m(ids_of(1, 3), positions=torch.arange(2)), "one per token"),
    "recompute": (lambda m: (setattr(m, "recompute", "all"), m(ids_of(1, 3))), "none, block"),
    "cache of another": (
        lambda m: m(ids_of(2, 3), cache=KVCache(m.config, 1)), "KVCache"),
    "cache too short": (
        lambda m: m(ids_of(1, 3), cache=KVCache(m.config, 1, 2)), "at most 2 tokens"),
    "layers": (
        lambda m: m(ids_of(1, 3), cache=KVCache(dataclasses.replace(m.config, num_layers=2), 1)),
        "cache of 3 layers"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, words):
    model = Decoder(ModelConfig(**SIZES, positions="learned"))
    with pytest.raises(InputError, match=words), torch.no_grad():
        call(model)


def test_kinds_and_segments_that_do_not_fit_are_named():
    encoder = model_of("encoder", num_segments=2)
    with pytest.raises(InputError, match="numbers from 0 to 1"):
        encoder.encode(ids_of(1, 3), segments=torch.tensor([[0, 1, 2]]))
    with pytest.raises(InputError, match='kind="decoder"'):
        Decoder(encoder.config)
    both = model_of("encoder_decoder")
    with pytest.raises(InputError, match="one per target"):
        both.decode(ids_of(3, 2), both.encode(ids_of(2, 4)))


def test_rotary_positions_need_an_even_head():
    with pytest.raises(InputError, match="even d_head"):
        Decoder(ModelConfig(**SIZES, d_head=5))
    assert Decoder(ModelConfig(**SIZES, d_head=5, positions="learned"))(ids_of(1, 3)).dim() == 3


def test_a_long_text_is_no_error_with_rotary_positions():
    assert model_of()(ids_of(1, 30)).isfinite().all()
