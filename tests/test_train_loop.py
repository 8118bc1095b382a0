"""Training: the arithmetic of a step, what is measured and reported, on which device."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from training_cases import HELD_OUT, SIZES, TEXT, quiet, small_model, small_run, weights

from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.text.tokenizer import Tokenizer
from slimlab.train import device
from slimlab.train.accumulate import accumulate_gradients, map_tensors, split_batch
from slimlab.train.metrics import bits_per_byte_of, held_out_loss
from slimlab.train.objectives import IGNORE, MaskedBatch, causal_objective, masked_objective
from slimlab.train.run import window_batch

ROOT = Path(__file__).resolve().parents[1]


# The gradient of a batch in pieces


def uneven_batch():
    inputs = torch.arange(6 * 7).reshape(6, 7) % 11
    targets = (inputs * 3 + 1) % 11
    for row, known in enumerate([7, 1, 1, 2, 7, 3]):
        targets[row, known:] = IGNORE
    return inputs, targets


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 6, 9])
def test_the_gradient_of_pieces_is_that_of_the_batch_although_their_tokens_differ(micro_batch_size):
    model = small_model().double()
    loss, num_tokens = accumulate_gradients(
        model, uneven_batch(), causal_objective, micro_batch_size
    )
    found = gradients(model)
    inputs, targets = uneven_batch()
    model.zero_grad()
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    expected.backward()
    assert num_tokens == 21
    # float64: 1e-16 for each of some hundred additions
    torch.testing.assert_close(found, gradients(model), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-13, atol=0)


def test_the_mean_of_the_means_of_pieces_is_another_gradient():
    model = small_model().double()
    inputs, targets = uneven_batch()
    accumulate_gradients(model, (inputs, targets), causal_objective)
    right = gradients(model)
    model.zero_grad()
    for at in (0, 2, 4):
        loss_sum, count = causal_objective(model, (inputs[at : at + 2], targets[at : at + 2]))
        (loss_sum / count / 3).backward()
    assert (gradients(model) - right).norm() > 0.1 * right.norm()


def test_gradients_of_an_earlier_batch_do_not_stay():
    model = small_model()
    accumulate_gradients(model, uneven_batch(), causal_objective, 2)
    once = gradients(model)
    accumulate_gradients(model, uneven_batch(), causal_objective, 2)
    assert torch.equal(gradients(model), once)


def test_a_batch_keeps_its_form_when_it_is_cut():
    batch = MaskedBatch(torch.zeros(5, 3), torch.ones(5, 3), torch.arange(5))
    pieces = split_batch(batch, 2)
    assert [len(piece.inputs) for piece in pieces] == [2, 2, 1]
    assert all(isinstance(piece, MaskedBatch) and piece.segments is None for piece in pieces)
    assert pieces[2].lengths.tolist() == [4]
    assert split_batch(batch, None) == [batch]
    assert [p["a"][0].tolist() for p in split_batch({"a": [torch.arange(3)]}, 2)] == [[0, 1], [2]]
    assert map_tensors(lambda t: t + 1, (torch.tensor(1), "x", None)) == (2, "x", None)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ((torch.zeros(3, 2), torch.zeros(4, 2)), "same number of sequences"),
        ((torch.zeros(3, 2), torch.tensor(4)), "same number of sequences"),
        ((torch.zeros(0, 2),), "at least one"),
        ("text", "0 tensors"),
    ],
)
def test_tensors_that_disagree_about_the_sequences_are_refused(batch, words):
    with pytest.raises(InputError, match=words):
        split_batch(batch, 2)


# A run


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_is_what_a_plain_loop_of_torchs_own_parts_does(name):
    config = small_run(optimizer=name, clip_norm=0.5, weight_decay=0.2, warmup_steps=3)
    model, plain = small_model(), small_model()
    history = quiet(model, TEXT, config)

    matrices = [p for p in plain.parameters() if p.dim() >= 2]
    gains = [p for p in plain.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.2}, {"params": gains, "weight_decay": 0.0}]
    if name == "sgd":
        optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(12):
        past = (step - 3) / 8
        lr = 0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * past)) / 2)
        lr = 0.01 * (step + 1) / 3 if step < 3 else lr
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = window_batch(TEXT, config, step)
        loss = F.cross_entropy(plain(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        assert history.losses[step] == pytest.approx(loss.item(), rel=1e-5)
        assert history.grad_norms[step] == pytest.approx(norm.item(), rel=1e-4)
        assert history.lrs[step] == pytest.approx(lr, rel=1e-12)
    # float32 rounding of 12 steps of at most 0.01
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=2e-5)


def test_a_run_learns_and_its_history_says_so():
    model = small_model()
    first = held_out_loss(model, HELD_OUT, 7, 5)
    config = small_run(num_steps=60, validate_every=25)
    history = quiet(model, TEXT, config, held_out=HELD_OUT)
    assert first == pytest.approx(math.log(11), abs=0.1)
    assert [step for step, _ in history.validation] == [25, 50, 60]
    assert history.validation[-1][1] == held_out_loss(model, HELD_OUT, 7, 6) < 0.8 * first
    assert history.steps == list(range(1, 61))
    assert history.num_tokens == [42] * 60
    assert min(history.seconds) > 0


def test_validation_changes_no_weight_and_draws_nothing():
    with_it, without = small_model(dropout=0.3), small_model(dropout=0.3)
    quiet(with_it, TEXT, small_run(validate_every=1), held_out=HELD_OUT)
    quiet(without, TEXT, small_run())
    assert torch.equal(weights(with_it), weights(without))


@pytest.mark.parametrize("choice", [{"micro_batch_size": 4}, {"recompute": "block"}])
def test_memory_can_be_saved_without_another_result(choice):
    model, plain = small_model(), small_model()
    quiet(model, TEXT, small_run(**choice))
    quiet(plain, TEXT, small_run())
    # pieces add up in another order; recomputation changes nothing at all
    bound = 2e-5 if "micro_batch_size" in choice else 0
    torch.testing.assert_close(weights(model), weights(plain), rtol=0, atol=bound)
    assert model.recompute == "none"


def test_recomputation_draws_the_same_dropout():
    model, plain = small_model(dropout=0.3), small_model(dropout=0.3)
    quiet(model, TEXT, small_run(recompute="block"))
    quiet(plain, TEXT, small_run())
    assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_sixteen_bits_learn_nearly_as_well_and_are_used(precision):
    model, plain = small_model(), small_model()
    seen = set()

    def objective(model, batch):
        handle = model.blocks[0].feed_forward.up_proj.register_forward_hook(
            lambda module, inputs, output: seen.add(output.dtype)
        )
        loss = causal_objective(model, batch)
        handle.remove()
        return loss

    history = quiet(model, TEXT, small_run(precision=precision, num_steps=40), objective=objective)
    expected = quiet(plain, TEXT, small_run(num_steps=40))
    assert seen == {getattr(torch, precision)}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # bfloat16 has 8 bits: losses differ by some parts of 256
    assert history.losses[-1] == pytest.approx(expected.losses[-1], rel=0.03)
    assert history.losses != expected.losses


def test_a_step_whose_float16_gradients_overflow_is_skipped_and_the_scale_shrinks():
    def objective(model, batch):
        calls.append(weights(model))
        loss, count = causal_objective(model, batch)
        return loss * (1e30 if len(calls) == 2 else 1), count

    calls = []
    config = small_run(precision="float16", num_steps=4)
    history = quiet(small_model(), TEXT, config, objective=objective)
    assert [norm is None for norm in history.grad_norms] == [False, True, False, False]
    moved = [not torch.equal(calls[i], calls[i + 1]) for i in range(3)]
    assert moved == [True, False, True]


def test_the_callers_random_numbers_modes_and_settings_stay():
    model = small_model(dropout=0.2).eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quiet(model, TEXT, small_run(recompute="block"))
    assert torch.equal(torch.rand(3), expected)
    assert (model.training, model.recompute) == (False, "none")


def test_the_seed_decides_the_draws_and_neighbouring_seeds_draw_differently():
    first, again, other = (small_run(seed=seed) for seed in (3, 3, 4))
    batches = [window_batch(TEXT, config, 5)[0] for config in (first, again, other)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    shifted = [window_batch(TEXT, small_run(seed=s), 8 - s)[0] for s in (3, 4)]
    assert not torch.equal(*shifted)
    steps = [window_batch(TEXT, first, step)[0].flatten().tolist() for step in range(50)]
    assert len({tuple(one) for one in steps}) == 50


def test_dropout_draws_by_the_seed_and_not_by_what_was_drawn_before():
    found = []
    for ambient, seed in ((1, 0), (2, 0), (1, 5)):
        model = small_model(dropout=0.3)
        torch.manual_seed(ambient)
        fixed = window_batch(TEXT, small_run(), 0)
        quiet(model, lambda step, batch=fixed: batch, small_run(seed=seed))
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_encoder_is_trained_on_batches_made_by_a_function():
    model = build_model(ModelConfig(**SIZES, kind="encoder"))

    def data(step):
        generator = torch.Generator().manual_seed(step)
        targets = torch.randint(9, (6, 1), generator=generator).repeat(1, 7)
        hidden = torch.rand(6, 7, generator=generator) < 0.3
        hidden[:, 0] = True
        return MaskedBatch(targets.masked_fill(hidden, 10), targets.masked_fill(~hidden, IGNORE))

    config = small_run(num_steps=80, micro_batch_size=4)
    held_out = [data(1000), data(1001)]
    history = quiet(model, data, config, objective=masked_objective, held_out=held_out)
    assert history.validation[0][1] < 0.5 * history.losses[0]  # the other tokens give it away


def test_a_progress_bar_shows_loss_and_speed(capsys, monkeypatch):
    monkeypatch.setenv("SLIMLAB_BATCH", "0")
    quiet(small_model(), TEXT, small_run(num_steps=3), held_out=HELD_OUT)
    printed = capsys.readouterr().err
    assert "3/3" in printed
    assert "loss 2." in printed
    assert "tokens/s" in printed
    quiet(small_model(), TEXT, small_run(num_steps=3), show=False)
    monkeypatch.setenv("SLIMLAB_BATCH", "1")
    quiet(small_model(), TEXT, small_run(num_steps=3))
    assert capsys.readouterr().err == ""


# Measuring


def test_the_held_out_loss_is_the_mean_over_all_tokens_but_the_first():
    model = small_model(dropout=0.5)
    found = held_out_loss(model, HELD_OUT, 7, 5)
    model.eval()
    losses = []
    for at in range(0, 89, 7):
        window = HELD_OUT[at : at + 8]
        logits = model(window[None, :-1])[0].log_softmax(-1)
        losses += [-logits[i, token].item() for i, token in enumerate(window[1:])]
    assert len(losses) == 89
    assert found == pytest.approx(sum(losses) / 89, rel=1e-5)
    assert held_out_loss(model, HELD_OUT[:4], 7, 5) > 0  # shorter than a window
    model.train()
    held_out_loss(model, HELD_OUT, 7, 5)
    assert model.training


def test_a_model_that_knows_nothing_needs_log2_of_the_vocabulary_for_every_token():
    tokenizer = Tokenizer.train(["the cat sat on the mat, the cat sat"], num_merges=8)
    model = build_model(ModelConfig(**SIZES | {"vocab_size": tokenizer.vocab_size}))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    text = "the cat — sat"
    expected = len(tokenizer.encode(text)) * math.log2(tokenizer.vocab_size) / len(text.encode())
    assert bits_per_byte_of(model, tokenizer, text) == pytest.approx(expected, rel=1e-6)
    assert bits_per_byte_of(model, tokenizer, text, seq_len=3) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="at least two tokens"):
        bits_per_byte_of(model, tokenizer, "a")


# Devices


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        (["cpu"], "cpu"),
        (["cuda", "cpu"], "cuda"),
        (["cuda", "mps", "cpu"], "cuda"),
        (["mps", "cpu"], "mps"),
    ],
)
def test_auto_takes_the_first_accelerator_that_is_there(monkeypatch, there, expected):
    monkeypatch.setattr(device, "_available", lambda: [torch.device(name) for name in there])
    assert device.choose_device("auto").type == expected
    assert device.choose_device("auto", small_model()).type == expected
    assert device.choose_device("cpu", small_model()).type == "cpu"


def test_auto_leaves_a_model_on_the_accelerator_on_which_it_lies():
    class Placed(nn.Module):
        def parameters(self, recurse=True):
            return iter([type("P", (), {"device": torch.device("cuda:3")})()])

    assert device.choose_device("auto", Placed()) == torch.device("cuda:3")


@pytest.mark.skipif(device.choose_device().type == "cpu", reason="no accelerator on this machine")
def test_a_run_on_an_accelerator_is_that_on_the_processor():
    model, plain = small_model(), small_model()
    quiet(model, TEXT, small_run(device="auto", num_steps=3))
    quiet(plain, TEXT, small_run(num_steps=3))
    assert next(model.parameters()).device.type != "cpu"
    # kernels add in another order; AdamW's steps of 0.01 have the sign of a rounding error at worst
    assert (weights(model).cpu() - weights(plain)).abs().mean() < 1e-4
