"""Losses and objectives: sums and counts, what counts as a target, and what each model is asked."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from slimlab.config import InputError, ModelConfig
from slimlab.model.encoder import Encoder, EncoderOutput
from slimlab.model.seq2seq import EncoderDecoder
from slimlab.model.transformer import Decoder
from slimlab.train.masking import mask_tokens
from slimlab.train.objectives import (
    IGNORE,
    MaskedBatch,
    bits_per_byte,
    causal_objective,
    masked_objective,
    masked_pair_objective,
    mean_loss,
    pair_objective,
    perplexity,
    sequence_objective,
    shift_right,
    token_loss,
)
from slimlab.train.optimizer import make_optimizer
from slimlab.train.pairs import FOLLOWS, RANDOM, sentence_pairs, shorten
from slimlab.train.scheduled_sampling import mixed_inputs, own_fraction_at, scheduled_objective

B, T, V = 2, 3, 7


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def logits_and_targets(dtype=torch.float64):
    logits = torch.randn(B, T, V, generator=draws(), dtype=torch.float64).to(dtype)
    return logits, torch.tensor([[3, IGNORE, 0], [6, 1, IGNORE]])


def loss_by_hand(logits, targets):
    """-log of the softmax's entry, number by number."""
    total, count = 0.0, 0
    for row, target in zip(logits.double().reshape(-1, logits.shape[-1]), targets.flatten()):
        if target != IGNORE:
            exponentials = [math.exp(score) for score in row.tolist()]
            total -= math.log(exponentials[int(target)] / sum(exponentials))
            count += 1
    return total, count


def test_the_loss_is_the_sum_over_the_targets_that_count():
    logits, targets = logits_and_targets()
    loss_sum, num_tokens = token_loss(logits, targets)
    expected, count = loss_by_hand(logits, targets)
    assert num_tokens == count == 4
    # Five roundings of numbers below 10.
    assert math.isclose(float(loss_sum), expected, rel_tol=1e-13)
    assert math.isclose(float(mean_loss(logits, targets)), expected / 4, rel_tol=1e-13)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (2, 2, 2)])
def test_any_number_of_dims_will_do(shape):
    logits = torch.randn(*shape, V, generator=draws())
    targets = torch.randint(V, shape, generator=draws(1)).to(torch.int32)
    loss_sum, num_tokens = token_loss(logits, targets)
    expected, count = loss_by_hand(logits, targets)
    assert num_tokens == count == math.prod(shape)
    assert math.isclose(float(loss_sum), expected, rel_tol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_are_summed_in_32_bits(dtype):
    logits = torch.zeros(30_000, V, dtype=dtype)
    logits[:, 0] = 8.0
    loss_sum, _ = token_loss(logits, torch.ones(30_000, dtype=torch.int64))
    assert loss_sum.dtype == torch.float32
    # 240 000 is beyond float16; of 30 000 terms in float32 about 2e-4 is lost at most.
    expected = 30_000 * (math.log(math.exp(8) + V - 1))
    assert math.isclose(float(loss_sum), expected, rel_tol=1e-3)


def test_a_part_of_a_batch_without_targets_adds_nothing_and_has_a_gradient():
    logits = torch.randn(B, T, V, generator=draws()).requires_grad_()
    loss_sum, num_tokens = token_loss(logits, torch.full((B, T), IGNORE))
    loss_sum.backward()
    assert (loss_sum.item(), num_tokens) == (0.0, 0)
    assert (logits.grad == 0).all()


def test_a_batch_without_targets_is_refused():
    logits, targets = logits_and_targets()
    nothing = torch.full_like(targets, IGNORE)
    with pytest.raises(InputError, match="at least one target"):
        mean_loss(logits, nothing)
    model, _ = encoder_answer()
    unlabelled = MaskedBatch(targets, targets, labels=torch.full((B,), IGNORE))
    with pytest.raises(InputError, match="at least one target"):
        pair_objective(model, unlabelled)


def test_a_target_outside_the_vocabulary_is_named_with_its_place():
    logits, targets = logits_and_targets()
    targets[1, 2] = V
    with pytest.raises(InputError, match=r"targets\[1, 2\] = 7 \(1 such"):
        token_loss(logits, targets)
    targets[0, 1] = -1
    with pytest.raises(InputError, match=r"targets\[0, 1\] = -1 \(2 such"):
        token_loss(logits, targets)


def test_targets_of_another_shape_or_kind_are_refused():
    logits, targets = logits_and_targets()
    for bad in (targets[:, :2], targets.flatten(), nn.functional.one_hot(targets.abs() % V, V)):
        with pytest.raises(InputError, match="one for each row"):
            token_loss(logits, bad)
    with pytest.raises(InputError, match="float64"):
        token_loss(logits, targets.double())


def test_sums_over_parts_give_the_gradient_of_the_whole_and_means_of_means_do_not():
    torch.manual_seed(0)
    model = nn.Linear(5, V).double()
    x, targets = torch.randn(33, 5, dtype=torch.float64), torch.randint(V, (33,))
    parts = [slice(0, 3), slice(3, 33)]  # 3 tokens and 30

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return model.weight.grad.clone()

    whole = gradient(mean_loss(model(x), targets))
    sums = [token_loss(model(x[part]), targets[part]) for part in parts]
    total = sum(count for _, count in sums)
    right = gradient(sum(loss_sum for loss_sum, _ in sums) / total)
    wrong = gradient(sum(mean_loss(model(x[part]), targets[part]) for part in parts) / 2)
    torch.testing.assert_close(right, whole, rtol=1e-12, atol=1e-14)
    assert (wrong - whole).norm() > 0.1 * whole.norm()


def test_perplexity_is_the_number_of_equally_likely_tokens():
    loss = mean_loss(torch.zeros(B, T, V), torch.zeros(B, T, dtype=torch.int64))
    assert math.isclose(perplexity(loss.requires_grad_()), V, rel_tol=1e-6)
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_guessing_bytes_blindly_costs_8_bits_each_whatever_the_tokens():
    num_bytes = 1000
    assert math.isclose(bits_per_byte(num_bytes * math.log(256), num_bytes), 8.0)
    pairs = torch.tensor(num_bytes / 2 * math.log(256**2), dtype=torch.float64)
    assert math.isclose(bits_per_byte(pairs, num_bytes), 8.0)
    with pytest.raises(InputError, match="num_bytes"):
        bits_per_byte(1.0, 0)


class Recorder:
    """A model that answers with prepared logits and remembers what it was asked."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, *ids, **given):
        self.ids, self.given = ids, given
        return self.answer


def test_the_causal_objective_asks_for_the_next_tokens():
    logits, targets = logits_and_targets()
    model, inputs = Recorder(logits), torch.zeros(B, T, dtype=torch.int64)
    loss_sum, num_tokens = causal_objective(model, (inputs, targets))
    assert (model.ids, model.given) == ((inputs,), {})
    assert (float(loss_sum), num_tokens) == pytest.approx(loss_by_hand(logits, targets))


def test_packed_documents_are_trained_as_if_each_stood_alone():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(vocab_size=V, seq_len=8, d_model=8, num_layers=2, num_heads=2))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=draws()) * 0.1)
    model = model.double()
    a, b = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[5, 6, 0]])
    alone = [causal_objective(model, (one[:, :-1], one[:, 1:])) for one in (a, b)]
    row = torch.cat((a[:, :-1], b[:, :-1]), dim=1)
    targets = torch.cat((a[:, 1:], b[:, 1:]), dim=1)
    document_ids = torch.tensor([[0, 0, 0, 1, 1]])
    packed = causal_objective(model, (row, targets, document_ids))
    leaking = causal_objective(model, (row, targets))
    expected = sum(loss for loss, _ in alone)
    torch.testing.assert_close(packed[0], expected, rtol=1e-12, atol=0)
    assert packed[1] == 5
    assert abs(leaking[0] - expected) > 1e-4


def encoder_answer():
    logits, targets = logits_and_targets()
    pair_logits = torch.randn(B, 2, generator=draws(3), dtype=torch.float64)
    return Recorder(EncoderOutput(None, logits, pair_logits)), targets


def test_the_masked_objective_hides_padding_and_counts_hidden_tokens():
    model, targets = encoder_answer()
    inputs = torch.zeros(B, T, dtype=torch.int64)
    found = masked_objective(model, (inputs, targets))
    assert model.given == {}
    expected = loss_by_hand(model.answer.token_logits, targets)
    assert (float(found[0]), found[1]) == pytest.approx(expected)
    segments = torch.tensor([[0, 1, 1], [0, 0, 1]])
    masked_objective(model, MaskedBatch(inputs, targets, torch.tensor([3, 2]), segments))
    assert model.given["segments"] is segments
    assert model.given["mask"].flatten(1).tolist() == [[True] * 3, [True, True, False]]


def test_the_pair_objective_counts_pairs_and_both_together_add_their_means():
    model, targets = encoder_answer()
    labels = torch.tensor([FOLLOWS, RANDOM])
    batch = MaskedBatch(torch.zeros(B, T, dtype=torch.int64), targets, labels=labels)
    tokens, pairs = masked_objective(model, batch), pair_objective(model, batch)
    by_hand = loss_by_hand(model.answer.pair_logits, labels)
    assert (float(pairs[0]), pairs[1]) == pytest.approx(by_hand)
    both = masked_pair_objective(model, batch)
    assert both[1] == tokens[1]
    expected = tokens[0] / tokens[1] + pairs[0] / pairs[1]
    torch.testing.assert_close(both[0] / both[1], expected, rtol=1e-13, atol=0)


def test_pairs_need_labels_and_a_head():
    model, targets = encoder_answer()
    inputs, labels = torch.zeros(B, T, dtype=torch.int64), torch.tensor([FOLLOWS, RANDOM])
    with pytest.raises(InputError, match="labels missing, pair_logits given"):
        masked_pair_objective(model, (inputs, targets))
    headless = Recorder(model.answer._replace(pair_logits=None))
    with pytest.raises(InputError, match="labels given, pair_logits missing"):
        pair_objective(headless, MaskedBatch(inputs, targets, labels=labels))


def test_shifting_right_gives_each_position_the_token_before_its_target():
    targets = torch.tensor([[4, 5, 6], [3, IGNORE, IGNORE]])
    assert shift_right(targets, 1).tolist() == [[1, 4, 5], [1, 3, 1]]
    assert targets[1, 1] == IGNORE
    for bad, start_id in ((targets[0], 1), (targets, -1), (targets, 1.5), (targets.float(), 1)):
        with pytest.raises(InputError):
            shift_right(bad, start_id)


def test_the_sequence_objective_shows_the_shifted_target_and_hides_padding():
    logits, _ = logits_and_targets()
    model, source = Recorder(logits), torch.ones(B, 5, dtype=torch.int64)
    targets = torch.tensor([[4, 5, 6], [3, IGNORE, IGNORE]])
    lengths = torch.tensor([5, 2])
    found = sequence_objective(model, (source, targets, lengths), start_id=2)
    assert model.ids[0] is source
    assert model.ids[1].tolist() == [[2, 4, 5], [2, 3, 2]]
    assert model.given["source_mask"].sum(-1).flatten().tolist() == [5, 2]
    assert (float(found[0]), found[1]) == pytest.approx(loss_by_hand(logits, targets))
    sequence_objective(model, (source, targets), start_id=2)
    assert model.given == {}


def test_padding_of_source_and_target_changes_no_loss():
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=V, seq_len=9, d_model=8, num_layers=1, num_heads=2, kind="encoder_decoder"
    )
    model = EncoderDecoder(config).double()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=draws()) * 0.1)
    source, target = torch.tensor([[4, 2, 6]]), torch.tensor([[5, 3]])
    alone = sequence_objective(model, (source, target), start_id=1)
    padded = nn.functional.pad(source, (0, 4)), nn.functional.pad(target, (0, 3), value=IGNORE)
    beside = sequence_objective(model, (*padded, torch.tensor([3])), start_id=1)
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-12, atol=0)
    assert alone[1] == beside[1] == 2


MASK, KEEP = 11, [0, 1]


def hide(ids, **changes):
    settings = {"mask_id": MASK, "vocab_size": 50, "generator": draws(), "keep": KEEP}
    return mask_tokens(ids, **{**settings, **changes})


def test_15_percent_are_chosen_and_of_these_80_are_hidden_10_random_10_unchanged():
    ids = torch.randint(12, 50, (20, 1000), generator=draws(5))
    inputs, targets = hide(ids)
    chosen = targets != IGNORE
    assert (chosen.sum(dim=1) == 150).all()
    assert torch.equal(targets[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    hidden = inputs[chosen] == MASK
    kept = inputs[chosen] == ids[chosen]
    changed = inputs[chosen][~hidden & ~kept]
    # 3000 choices: standard deviation of a share is at most 0.8 %; five of them. One random
    # token in 47 is the true one.
    assert hidden.double().mean() == pytest.approx(0.8, abs=0.04)
    assert kept.double().mean() == pytest.approx(0.1 + 0.1 / 47, abs=0.03)
    assert len(changed) / 3000 == pytest.approx(0.1 - 0.1 / 47, abs=0.03)
    assert set(changed.tolist()) == set(range(2, 50)) - {MASK}


def test_every_position_is_chosen_equally_often():
    ids = torch.full((4000, 20), 9)
    _, targets = hide(ids)
    shares = (targets != IGNORE).double().mean(dim=0)
    # 3 of 20 in each row; standard deviation of a share over 4000 rows 0.6 %.
    assert (shares - 0.15).abs().max() < 0.03


def test_the_generator_alone_decides():
    ids = torch.randint(12, 50, (3, 40), generator=draws(5))
    before, first = ids.clone(), hide(ids)
    torch.manual_seed(99)
    second, other = hide(ids), hide(ids, generator=draws(1))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    assert not torch.equal(first[1], other[1])
    assert torch.equal(ids, before)


def test_special_tokens_are_never_chosen_and_never_put_in():
    ids = torch.randint(0, 50, (30, 40), generator=draws(5))
    inputs, targets = hide(ids, fraction=1.0)
    special = torch.isin(ids, torch.tensor([MASK, *KEEP]))
    assert torch.equal(targets != IGNORE, ~special)
    assert not torch.isin(inputs[~special], torch.tensor(KEEP)).any()


def test_a_short_row_has_one_target_and_a_row_of_special_tokens_none():
    ids = torch.tensor([[0, 7, 1, 0], [0, 1, 0, 0], [8, 9, 1, 0]])
    _, targets = hide(ids)
    assert (targets != IGNORE).sum(dim=1).tolist() == [1, 0, 1]
    assert targets[0, 1] == 7


BAD_MASKING = {
    "mask_id outside": ({"mask_id": 50}, "mask_id = 50"),
    "mask_id below 0": ({"mask_id": -1}, "mask_id = -1"),
    "a special id outside": ({"keep": [0, 51]}, "51"),
    "fraction 0": ({"fraction": 0.0}, "fraction = 0.0"),
    "fraction above 1": ({"fraction": 1.5}, "fraction = 1.5"),
    "ids outside": ({"vocab_size": 12}, "position"),
    "nothing to hide": ({"keep": [9]}, "can be hidden"),
    "nothing but special tokens": ({"vocab_size": 12, "keep": range(12)}, "all of them special"),
}


@pytest.mark.parametrize("case", BAD_MASKING)
def test_masking_that_cannot_be_done_is_refused(case):
    changes, message = BAD_MASKING[case]
    ids = torch.full((2, 3), 20 if case == "ids outside" else 9)
    with pytest.raises(InputError, match=message):
        hide(ids, **changes)


CLS, SEP, PAD = 1, 2, 0
# Sentence i of document d is the token 100 d + i + 10, one to three times.
DOCUMENTS = [[[100 * d + i + 10] * (1 + i % 3) for i in range(4 + d)] for d in range(5)]


def pairs_of(documents=DOCUMENTS, **changes):
    settings = {
        "num_pairs": 2000, "seq_len": 10, "cls_id": CLS, "sep_id": SEP, "pad_id": PAD,
        "generator": draws(),
    }  # fmt: skip
    return sentence_pairs(documents, **{**settings, **changes})


def sentences_of(row):
    """Document and place of both sentences of a row, read off its tokens."""
    a, b = row[1], row[row.index(SEP) + 1]
    return divmod(a - 10, 100), divmod(b - 10, 100)


def test_half_of_the_pairs_follow_and_the_others_come_from_another_document():
    pairs = pairs_of()
    follow = 0
    for row, label in zip(pairs.ids.tolist(), pairs.labels.tolist()):
        (d, i), (e, j) = sentences_of(row)
        assert j > 0
        if label == FOLLOWS:
            assert (e, j) == (d, i + 1)
            follow += 1
        else:
            assert e != d
    assert abs(follow - 1000) < 5 * math.sqrt(500)
    assert (RANDOM, FOLLOWS) == (0, 1)  # the order of the encoder's pair logits


def test_neither_sentence_alone_gives_the_label_away():
    pairs = pairs_of(num_pairs=4000)
    places = [sentences_of(row) for row in pairs.ids.tolist()]
    for side in (0, 1):
        counts = {FOLLOWS: {}, RANDOM: {}}
        for both, label in zip(places, pairs.labels.tolist()):
            key = both[side] if side == 0 else both[side][1]
            counts[label][key] = counts[label].get(key, 0) + 1
        assert counts[FOLLOWS].keys() == counts[RANDOM].keys()
    first_places = [both[0][1] for both in places]
    assert set(first_places) == set(range(7))


def test_rows_are_laid_out_as_bert_does():
    pairs = pairs_of(num_pairs=50)
    assert pairs.ids.shape == pairs.segments.shape == (50, 10)
    for row, segments, length in zip(
        pairs.ids.tolist(), pairs.segments.tolist(), pairs.lengths.tolist()
    ):
        (d, i), (e, j) = sentences_of(row)
        a, b = DOCUMENTS[d][i], DOCUMENTS[e][j]
        expected = [CLS, *a, SEP, *b, SEP]
        assert row == expected + [PAD] * (10 - len(expected))
        assert length == len(expected)
        assert segments == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (10 - length)


def test_long_pairs_lose_the_end_of_the_longer_sentence():
    assert shorten([1, 2, 3, 4, 5], [6, 7], 4) == ([1, 2], [6, 7])
    assert shorten([1], [2, 3, 4], 3) == ([1], [2, 3])
    assert shorten([1, 2], [3, 4], 3) == ([1, 2], [3])
    assert shorten([1, 2], [3, 4], 2) == ([1], [3])
    tight = pairs_of(seq_len=5, num_pairs=30)
    assert (tight.lengths == 5).all()
    assert (tight.segments == torch.tensor([0, 0, 0, 1, 1])).all()


BAD_PAIRS = {
    "one document": (DOCUMENTS[:1], {}, "at least two documents"),
    "one document of two sentences": ([DOCUMENTS[0], [[5]]], {}, "1 such of 2 documents"),
    "no document": ([], {}, "at least two documents"),
    "an empty sentence": ([[[5], []], [[6], [7]]], {}, "document 0, sentence 1"),
    "text": (["one. two.", "three. four."], {}, "encode each"),
    "floats": ([[[5], [0.5]], [[6], [7]]], {}, "document 0, sentence 1"),
    "too short a row": (DOCUMENTS, {"seq_len": 4}, "seq_len = 4"),
    "no pairs": (DOCUMENTS, {"num_pairs": 0}, "num_pairs"),
    "a negative id": (DOCUMENTS, {"sep_id": -2}, "sep_id = -2"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_pairs_that_cannot_be_drawn_are_refused(case):
    documents, changes, message = BAD_PAIRS[case]
    with pytest.raises(InputError, match=message):
        pairs_of(documents, **changes)


def certain(ids):
    """Logits that are sure of the id after each one: 3 more, modulo V."""
    return nn.functional.one_hot((ids + 3) % V, V) * 100.0


def test_own_words_replace_inputs_after_the_first():
    inputs = torch.tensor([[0, 1, 1, 1], [2, 2, 2, 2]])
    mix = partial(mixed_inputs, inputs, certain(inputs), generator=draws())
    assert torch.equal(mix(own_fraction=0.0), inputs)
    assert mix(own_fraction=1.0).tolist() == [[0, 3, 4, 4], [2, 5, 5, 5]]
    assert mix(own_fraction=1.0, temperature=0.0).tolist() == [[0, 3, 4, 4], [2, 5, 5, 5]]


def test_the_share_of_own_words_is_the_one_asked_for():
    inputs = torch.zeros(50, 201, dtype=torch.int64)
    mixed = mixed_inputs(inputs, certain(inputs), own_fraction=0.3, generator=draws())
    # Of 10 000 draws the standard deviation is 0.46 %.
    assert (mixed[:, 1:] == 3).double().mean() == pytest.approx(0.3, abs=0.025)
    assert (mixed[:, 0] == 0).all()


def test_a_single_token_has_nothing_to_replace():
    one = torch.tensor([[4], [5]])
    assert torch.equal(mixed_inputs(one, certain(one), own_fraction=1.0, generator=draws()), one)


def test_scheduled_sampling_trains_the_second_pass_only():
    model, inputs = nn.Sequential(nn.Embedding(V, 4), nn.Linear(4, V)), torch.tensor([[0, 1, 2]])
    targets = torch.tensor([[1, 2, 3]])
    loss, count = scheduled_objective(model, (inputs, targets), own_fraction=1.0, generator=draws())
    with torch.no_grad():
        mixed = mixed_inputs(inputs, model(inputs), own_fraction=1.0, generator=draws())
    expected, _ = token_loss(model(mixed), targets)
    assert count == 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, model[0].weight), torch.autograd.grad(expected, model[0].weight)
    )
    teacher, _ = scheduled_objective(model, (inputs, targets), own_fraction=0, generator=draws())
    torch.testing.assert_close(teacher, causal_objective(model, (inputs, targets))[0])


def test_the_first_pass_of_scheduled_sampling_keeps_nothing_for_a_backward_pass():
    keeps = []

    def model(ids):
        keeps.append(torch.is_grad_enabled())
        return certain(ids)

    ids = torch.zeros(B, T, dtype=torch.int64)
    scheduled_objective(model, (ids, ids), own_fraction=0.5, generator=draws())
    assert keeps == [False, True]


def test_scheduled_sampling_refuses_shares_and_shapes_that_do_not_fit():
    inputs = torch.zeros(B, T, dtype=torch.int64)
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="own_fraction"):
            mixed_inputs(inputs, certain(inputs), own_fraction=fraction, generator=draws())
    with pytest.raises(InputError, match="logits"):
        mixed_inputs(inputs, certain(inputs)[:, 1:], own_fraction=0.5, generator=draws())


def test_the_share_of_own_words_rises_along_an_inverse_sigmoid():
    shares = [own_fraction_at(step, pace=20) for step in range(0, 400, 10)]
    expected = [1 - 20 / (20 + math.exp(step / 20)) for step in range(0, 400, 10)]
    assert shares == pytest.approx(expected, rel=1e-12)
    assert own_fraction_at(round(20 * math.log(20)), pace=20) == pytest.approx(0.5, abs=0.01)
    assert own_fraction_at(10**9, pace=1) == 1.0
    with pytest.raises(InputError, match="pace"):
        own_fraction_at(1, pace=0)


SIZES = {"vocab_size": 20, "seq_len": 16, "d_model": 32, "num_layers": 2, "num_heads": 2}


def train(model, batches, objective, lr=0.01):
    optimizer = make_optimizer("adamw", model, lr=lr)
    losses = []
    for batch in batches:
        loss_sum, count = objective(model, batch)
        optimizer.zero_grad()
        (loss_sum / count).backward()
        optimizer.step()
        losses.append(loss_sum.item() / count)
    return losses


def test_a_decoder_learns_the_next_token():
    torch.manual_seed(0)
    ids = (torch.arange(13) * 3 + torch.arange(8)[:, None]) % 20
    batches = [(ids[:, :-1], ids[:, 1:])] * 40
    losses = train(Decoder(ModelConfig(**SIZES)), batches, causal_objective)
    assert losses[0] == pytest.approx(math.log(20), rel=0.05)
    assert losses[-1] < 0.1


def test_an_encoder_learns_hidden_tokens_and_pairs():
    torch.manual_seed(0)
    # A document is one token, so b follows a exactly if both are the same token.
    documents = [[[token] * 3] * 3 for token in range(4, 8)]
    generator = draws()

    def batch():
        pairs = sentence_pairs(
            documents, num_pairs=32, seq_len=10, cls_id=CLS, sep_id=SEP, pad_id=PAD,
            generator=generator,
        )  # fmt: skip
        hidden = mask_tokens(
            pairs.ids, mask_id=3, vocab_size=20, generator=generator, keep=[CLS, SEP, PAD]
        )
        return MaskedBatch(*hidden, *pairs[1:])

    model = Encoder(ModelConfig(**SIZES, kind="encoder", num_segments=2))
    losses = train(model, (batch() for _ in range(150)), masked_pair_objective, lr=2e-3)
    assert losses[0] == pytest.approx(math.log(20) + math.log(2), rel=0.1)
    test = batch()
    with torch.no_grad():
        tokens, pairs = masked_objective(model, test), pair_objective(model, test)
    assert tokens[0] / tokens[1] < 0.3
    assert pairs[0] / pairs[1] < 0.3


def test_an_encoder_decoder_learns_to_reverse():
    torch.manual_seed(0)
    generator = draws()

    def batch():
        source = torch.randint(2, 20, (32, 4), generator=generator)
        return source, source.flip(1)

    config = ModelConfig(**SIZES, kind="encoder_decoder", positions="learned")
    objective = partial(sequence_objective, start_id=1)
    model = EncoderDecoder(config)
    losses = train(model, (batch() for _ in range(150)), objective, lr=3e-3)
    assert losses[0] == pytest.approx(math.log(20), rel=0.1)
    assert losses[-1] < 0.2
