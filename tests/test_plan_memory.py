"""Predicted bytes against what models, gradients, optimizers and autograd hold."""

import dataclasses
from math import prod

import pytest
import torch
from plan_cases import CASES, batch_of, loss_of, model_of

from slimlab.config import InputError, ModelConfig
from slimlab.model.masks import packed_mask, packed_positions, padding_mask
from slimlab.plan.activations import activation_bytes, block_activation_bytes
from slimlab.plan.params import num_params, param_shapes
from slimlab.plan.training_memory import (
    bytes_per_param,
    korthikanti_block_bytes,
    state_bytes,
    training_bytes,
)
from slimlab.train.optimizer import SGD, AdamW
from slimlab.train.precision import MasterWeights

DTYPES = {2: torch.bfloat16, 4: torch.float32}
SETTINGS = [("fused", 4), ("fused", 2), ("explicit", 4), ("explicit", 2), ("tiled", 4)]
STATE_CASES = ["decoder llama", "decoder gpt", "encoder pairs", "both post"]


def num_bytes(tensors):
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def gradients(model):
    return [p.grad for p in model.parameters()]


def optimizer_tensors(optimizer):
    states = [state for state in optimizer.state.values() for state in state.items()]
    assert all(x is None or isinstance(x, torch.Tensor) for _, x in states)
    return [x for _, x in states]


def make(optimizer, model):
    rules = {
        "sgd": lambda params: SGD(params, 0.1),
        "momentum": lambda params: SGD(params, 0.1, momentum=0.9),
        "adamw": lambda params: AdamW(params, 0.1),
        "torch adamw": lambda params: torch.optim.AdamW(params, 0.1, fused=True),
        "torch momentum": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
    }
    return rules[optimizer](list(model.parameters()))


def batch_for(config):
    return batch_of(config, 3, 7, *([5] if config.kind == "encoder_decoder" else []))


@pytest.mark.parametrize("precision", ["float32", "pure_16"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "torch adamw", "torch momentum"])
@pytest.mark.parametrize("name", STATE_CASES)
def test_weights_gradients_and_state_are_what_the_objects_hold(name, optimizer, precision):
    config = CASES[name]
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = model_of(config, dtype=dtype)
    updates = make(optimizer, model)
    loss_of(model, *batch_for(config)).backward()
    updates.step()
    found = state_bytes(config, precision=precision, optimizer=optimizer.split()[-1])
    assert found["weights"] == num_bytes(model.parameters())
    assert found["gradients"] == num_bytes(gradients(model))
    state = found.get("optimizer", 0) + found.get("optimizer_steps", 0)
    assert state == num_bytes(optimizer_tensors(updates))
    assert "masters" not in found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STATE_CASES)
def test_mixed_precision_holds_masters_besides(name, dtype):
    config = CASES[name]
    mixed = MasterWeights(model_of(config), dtype)
    updates = make("adamw", mixed.masters)
    batch = batch_for(config)
    for _ in range(2):  # two micro-batches: the second finds the sum of the first
        loss_of(mixed.model, *batch).backward()
        held = [num_bytes(gradients(model)) for model in (mixed.model, mixed.masters)]
        mixed.gather_gradients()
    updates.step()
    found = state_bytes(config, precision="mixed", gathered=True)
    assert found["weights"] == num_bytes(mixed.model.parameters())
    assert [found["gradients"], found["gathered_gradients"]] == held
    assert found["masters"] == num_bytes(mixed.masters.parameters())
    state = found["optimizer"] + found["optimizer_steps"]
    assert state == num_bytes(optimizer_tensors(updates))
    assert "gathered_gradients" not in state_bytes(config, precision="mixed")
    assert "gathered_gradients" not in state_bytes(config, gathered=True)


def test_sixteen_bytes_per_parameter_are_those_of_the_literature():
    # Rajbhandari et al., table 1: one card needs 120 GB for 7.5, 2048 for 128, 16000 for 1000
    # billion parameters.
    for billions, gigabytes in [(7.5, 120), (128, 2048), (1000, 16000)]:
        assert billions * bytes_per_param("mixed", "adamw") == gigabytes
    assert bytes_per_param("float32", "adamw") == bytes_per_param("mixed", "adamw") == 16
    assert bytes_per_param("float32", "sgd") == 8
    assert bytes_per_param("pure_16", "adamw") == 8


def kept_bytes(config, batch, form="fused", recompute="none", bytes_per_element=4):
    """Bytes that autograd saves in the forward pass and, on top of it, in the backward pass.

    Every storage counts once; those of parameters, buffers and the batch do not count.
    """
    model = model_of(config, form, recompute, DTYPES[bytes_per_element])
    inputs, targets = batch
    given = [*model.parameters(), *model.buffers(), *inputs.values(), *targets]
    known = {x.untyped_storage().data_ptr() for x in given}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address is given out twice
        return x

    def total():
        return sum(one.nbytes() for address, one in kept.items() if address not in known)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(model, inputs, targets)
        # Each loss keeps one float32 besides, its number of targets.
        forward = total() - 4 * len(targets)
        loss.backward()
    return forward, total() - 4 * len(targets) - forward


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(("form", "bytes_per_element"), SETTINGS)
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_activations_are_what_autograd_saves(config, form, bytes_per_element, recompute, dropout):
    config = dataclasses.replace(config, dropout=dropout)
    source = {"source_len": 5} if config.kind == "encoder_decoder" else {}
    batch = batch_of(config, 3, 7, **source)
    found, again = kept_bytes(config, batch, form, recompute, bytes_per_element)
    given = {"form": form, "bytes_per_element": bytes_per_element, "recompute": recompute}
    # Promised are 5 %; every byte is known.
    assert sum(activation_bytes(config, 3, 7, **source, **given).values()) == found
    assert (again == 0) == (recompute == "none")


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize(("form", "bytes_per_element"), SETTINGS)
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("decoder llama", "packed"),
        ("decoder gpt", "packed"),
        ("decoder post", "padding"),
        ("encoder pairs", "padding"),
        ("both llama", "padding"),
    ],
)
def test_masks_are_kept_in_every_layer(name, mask, form, bytes_per_element, recompute):
    config = CASES[name]
    source = {"source_len": 5} if config.kind == "encoder_decoder" else {}
    inputs, targets = batch_of(config, 3, 7, **source)
    if mask == "packed":
        documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0] * 7, [0] * 6 + [1]])
        inputs |= {"mask": packed_mask(documents), "positions": packed_positions(documents)}
    else:
        inputs["source_mask" if source else "mask"] = padding_mask([3, 5, 2], 5 if source else 7)
    found, _ = kept_bytes(config, (inputs, targets), form, recompute, bytes_per_element)
    given = {"form": form, "bytes_per_element": bytes_per_element, "recompute": recompute}
    assert sum(activation_bytes(config, 3, 7, **source, **given, mask=mask).values()) == found


@pytest.mark.parametrize("name", ["decoder llama", "decoder gpt", "both gpt"])
def test_larger_batches_are_predicted_as_well(name):
    config = dataclasses.replace(CASES[name], seq_len=40)
    source = {"source_len": 23} if config.kind == "encoder_decoder" else {}
    found, _ = kept_bytes(config, batch_of(config, 8, 40, **source))
    assert sum(activation_bytes(config, 8, **source).values()) == found


@pytest.mark.parametrize("name", ["decoder llama", "decoder gpt", "decoder post"])
def test_a_recomputed_block_needs_what_a_block_keeps(name):
    config = CASES[name]
    _, again = kept_bytes(config, batch_of(config, 3, 7), recompute="block")
    block = block_activation_bytes(config, 3, 7)
    # Its input was kept all the time: what the first norm reads, or the first projection.
    first = "norm_input" if config.norm_place == "pre" else "input"
    assert again == config.num_layers * (sum(block.values()) - block[f"attention.{first}"])


def test_items_are_the_tensors_of_the_formula():
    config = ModelConfig(
        37, 13, 24, 3, 6, 2, 6, 22, feed_forward="swiglu", norm="layer", positions="none"
    )
    B, T, D, H, K, E, F, V, L = 2, 11, 24, 6, 2, 6, 22, 37, 3
    items = activation_bytes(config, B, T)
    assert items["attention.norm_input"] == items["feed_forward.input"] == 4 * L * B * T * D
    assert items["attention.norm_statistics"] == 4 * L * B * T * 2
    assert items["attention.query"] == items["attention.output"] == 4 * L * B * T * H * E
    assert items["attention.key"] == items["attention.value"] == 4 * L * B * T * K * E
    assert items["attention.logsumexp"] == 4 * L * B * H * T
    for tensor in ("gate", "gate_activated", "up", "product"):
        assert items[f"feed_forward.{tensor}"] == 4 * L * B * T * F
    assert items["loss.log_probabilities"] == 4 * B * T * V
    explicit = activation_bytes(config, B, T, form="explicit")
    assert explicit["attention.weights"] == 4 * L * B * H * T * T
    inputs_only = activation_bytes(config, B, T, recompute="block")
    assert inputs_only["blocks.input"] == 4 * L * B * T * D
    assert not any(name.startswith(("attention", "feed_forward")) for name in inputs_only)


@pytest.mark.parametrize(("b", "s", "h", "a"), [(3, 7, 24, 4), (1, 2048, 12288, 96)])
def test_the_published_count_of_a_block_follows_with_stated_differences(b, s, h, a):
    config = ModelConfig(50, s, h, 1, a, positions="learned", norm="layer", bias=True, dropout=0.1)
    ours = block_activation_bytes(config, b, form="explicit", bytes_per_element=2)
    no_dropout_of_weights = 3 * a * s**2 * b
    masks_of_two_bytes = 2 * s * b * h
    statistics, causal_mask = 8 * s * b, s**2
    theirs = korthikanti_block_bytes(b, s, h, a)
    assert theirs == s * b * (34 * h + 5 * a * s)
    assert sum(ours.values()) == (
        theirs - no_dropout_of_weights + masks_of_two_bytes + statistics + causal_mask
    )


def test_training_holds_state_and_activations():
    config = CASES["decoder gpt"]
    items = training_bytes(config, 3, 7, precision="mixed", recompute="block")
    kept = activation_bytes(config, 3, 7, recompute="block", bytes_per_element=2)
    assert items.pop("activations") == sum(kept.values())
    steps = items.pop("optimizer_steps")
    assert sum(items.values()) == 16 * num_params(config)
    assert steps == 4 * len(param_shapes(config))
    assert sum(prod(shape) for shape in param_shapes(config).values()) == num_params(config)


@pytest.mark.parametrize(
    "bad",
    [
        lambda c: state_bytes(c, precision="float8"),
        lambda c: state_bytes(c, optimizer="adam"),
        lambda c: bytes_per_param("float32", "lion"),
        lambda c: training_bytes(c, 2, precision="half"),
        lambda c: training_bytes(c, 2, recompute="all"),
        lambda c: activation_bytes(c, 0),
        lambda c: activation_bytes(c, 2, form="flash"),
        lambda c: activation_bytes(c, 2, mask="causal"),
        lambda c: activation_bytes(CASES["encoder pairs"], 2, mask="packed"),
        lambda c: activation_bytes(c, 2, bytes_per_element=8, recompute="block"),
        lambda c: activation_bytes(c, 2, 5, source_len=4),
        lambda c: block_activation_bytes(c, 2, memory_len=0),
        lambda c: korthikanti_block_bytes(2, 3, -4, 1),
    ],
)
def test_bad_input_is_refused(bad):
    with pytest.raises(InputError, match="given"):
        bad(CASES["decoder gpt"])
