"""Loss scaling as torch.amp does it, 32-bit masters, and the context for 16-bit products."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from slimlab.config import InputError, ModelConfig
from slimlab.model.transformer import Decoder
from slimlab.train.optimizer import AdamW, clip_gradients, make_optimizer
from slimlab.train.precision import LossScaler, MasterWeights, autocast_for

SETTINGS = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}
# What goes wrong with the gradient of each step; enough good steps in a row for growth, twice.
FAULTS = [None, math.inf, None, None, math.nan, None, None, None, None, None, None, -math.inf, None]


def test_the_three_losses_that_16_bits_bring_are_as_large_as_the_module_says():
    half, brain = torch.float16, torch.bfloat16
    assert torch.tensor(2.9e-8).to(half) == 0
    assert torch.tensor(3.1e-8).to(half) > 0
    assert torch.tensor(2.9e-8 * 2**16).to(half) > 0
    assert torch.tensor(1e-30).to(brain) > 0
    assert torch.tensor(1.0 + 4.8e-4).to(half) == 1
    assert torch.tensor(1.0 + 3.9e-3).to(brain) == 1  # eight times as coarse
    assert torch.tensor(2048.0, dtype=half) + torch.ones((), dtype=half) == 2048


class Twin:
    """A parameter, its optimizer and a scaler: one loop for both kinds of scaler."""

    def __init__(self, scaler, clip=False, optimizer_class=AdamW):
        self.param = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.optimizer = optimizer_class([self.param], lr=0.1)
        self.scaler, self.clip = scaler, clip

    def step(self, number, fault):
        self.optimizer.zero_grad()
        loss = (self.param**2 * (number + 1)).sum()
        self.scaler.scale(loss).backward()
        if fault is not None:
            self.param.grad[1] = fault
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            clip_gradients([self.param], 1.0)
        stepped = self.scaler.step(self.optimizer)
        self.scaler.update()
        return stepped


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scale", [2.0**16, 1000.0])
def test_scale_weights_and_state_are_those_of_torchs_scaler(scale, clip):
    mine = Twin(LossScaler(scale, **SETTINGS), clip)
    theirs = Twin(torch.amp.GradScaler("cpu", scale, **SETTINGS), clip)
    scales = []
    for number, fault in enumerate(FAULTS):
        stepped = mine.step(number, fault)
        theirs.step(number, fault)
        assert stepped == (fault is None)
        assert mine.scaler.get_scale() == theirs.scaler.get_scale()
        assert mine.scaler.state_dict() == theirs.scaler.state_dict()
        torch.testing.assert_close(mine.param, theirs.param, rtol=0, atol=0)
        scales.append(mine.scaler.get_scale() / scale)
    assert scales == [1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 1, 0.5, 0.5]


def test_the_fused_optimizer_steps_and_skips_as_under_torchs_scaler():
    def fused(params, lr):
        return torch.optim.AdamW(params, lr, fused=True)

    mine = Twin(LossScaler(512.0, **SETTINGS), optimizer_class=fused)
    theirs = Twin(torch.amp.GradScaler("cpu", 512.0, **SETTINGS), optimizer_class=fused)
    for number, fault in enumerate(FAULTS):
        mine.step(number, fault)
        theirs.step(number, fault)
    torch.testing.assert_close(mine.param, theirs.param, rtol=1e-6, atol=0)


def test_a_skipped_step_leaves_weights_and_state_alone():
    twin = Twin(LossScaler(**SETTINGS))
    twin.step(0, None)
    weights, state = twin.param.detach().clone(), copy.deepcopy(twin.optimizer.state_dict())
    assert twin.step(1, math.nan) is False
    assert torch.equal(twin.param, weights)
    now = twin.optimizer.state_dict()["state"][0]
    for name, value in state["state"][0].items():
        assert torch.equal(now[name], value)


def test_the_factor_never_grows_beyond_float32():
    sgd = {"optimizer_class": torch.optim.SGD}  # whose steps stay as small as the gradients
    twin = Twin(LossScaler(2.0**126, growth_interval=1), **sgd)
    theirs = Twin(torch.amp.GradScaler("cpu", 2.0**126, growth_interval=1), **sgd)
    for scaler_twin in (twin, theirs):
        with torch.no_grad():
            scaler_twin.param.fill_(1e-3)
    for _ in range(3):
        twin.step(0, None)
        theirs.step(0, None)
        assert twin.scaler.get_scale() == theirs.scaler.get_scale() == 2.0**127


def test_scaling_saves_gradients_that_float16_would_lose():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False))
    optimizer = torch.optim.SGD(layers.parameters(), lr=1.0)

    def gradient(precision, scaler, x):
        optimizer.zero_grad()
        with autocast_for("cpu", precision):
            loss = layers(x).float().sum() * 1e-9
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return layers[0].weight.grad.clone()

    x = torch.ones(5, 4)
    lost = gradient("float16", LossScaler(enabled=False), x)
    saved = gradient("float16", LossScaler(), x)
    exact = gradient("float32", LossScaler(enabled=False), x)
    assert (lost == 0).all()
    assert (exact != 0).all()
    # float16 keeps 11 bits, and a few roundings follow one another.
    torch.testing.assert_close(saved, exact, rtol=4e-3, atol=0)


def test_a_saved_scaler_goes_on_here_and_in_torch_and_passes_through_json():
    first = Twin(LossScaler(64.0, **SETTINGS))
    for number, fault in enumerate(FAULTS[:7]):
        first.step(number, fault)
    saved = json.loads(json.dumps(first.scaler.state_dict()))
    here, there = LossScaler(), torch.amp.GradScaler("cpu")
    here.load_state_dict(saved)
    there.load_state_dict(saved)
    for scaler in (here, there):
        assert scaler.state_dict() == first.scaler.state_dict()
    back = LossScaler()
    back.load_state_dict(there.state_dict())
    assert back.state_dict() == saved


def test_a_scaler_that_is_not_enabled_passes_everything_through():
    twin, plain = Twin(LossScaler(enabled=False), clip=True), Twin(None)
    for number in range(3):
        assert twin.step(number, None)
        plain.optimizer.zero_grad()
        (plain.param**2 * (number + 1)).sum().backward()
        clip_gradients([plain.param], 1.0)
        plain.optimizer.step()
    assert torch.equal(twin.param, plain.param)
    assert twin.scaler.get_scale() == 1.0
    assert twin.scaler.state_dict() == {}
    twin.scaler.load_state_dict({})


def test_calls_out_of_order_are_refused():
    twin = Twin(LossScaler())
    with pytest.raises(InputError, match="no gradient"):
        twin.scaler.step(twin.optimizer)
    twin.scaler.scale(twin.param.sum()).backward()
    with pytest.raises(InputError, match="step before update"):
        twin.scaler.update()
    twin.scaler.unscale_(twin.optimizer)
    with pytest.raises(InputError, match="unscale_ once"):
        twin.scaler.unscale_(twin.optimizer)
    twin.scaler.step(twin.optimizer)
    with pytest.raises(InputError, match="step twice"):
        twin.scaler.step(twin.optimizer)
    twin.scaler.update()


def test_float16_gradients_are_refused_as_torch_does():
    param = nn.Parameter(torch.ones(3, dtype=torch.float16))
    param.grad = torch.ones_like(param)
    with pytest.raises(InputError, match="MasterWeights"):
        LossScaler().step(torch.optim.SGD([param], lr=0.1))


def test_a_loss_that_is_not_finite_at_any_scale_ends_the_training():
    twin = Twin(LossScaler(2.0**-23))
    twin.step(0, math.nan)
    with pytest.raises(InputError, match="every scale down to"):
        twin.step(1, math.nan)


BAD_SCALERS = {
    "no scale": {"scale": 0.0},
    "an infinite scale": {"scale": math.inf},
    "a factor that does not grow": {"growth_factor": 1.0},
    "a factor that does not shrink": {"backoff_factor": 1.0},
    "an interval of 0": {"growth_interval": 0},
}


@pytest.mark.parametrize("case", BAD_SCALERS)
def test_factors_out_of_range_are_refused(case):
    with pytest.raises(InputError, match=next(iter(BAD_SCALERS[case]))):
        LossScaler(**BAD_SCALERS[case])


def test_a_state_that_is_not_a_scalers_is_refused():
    for state in ({}, {"scale": 2.0}):
        with pytest.raises(InputError, match="was enabled"):
            LossScaler().load_state_dict(state)


def test_autocast_changes_products_but_neither_weights_nor_gradients():
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    for precision, dtype in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ):
        with autocast_for(torch.device("cpu"), precision):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == dtype
        assert layer.weight.grad.dtype == layer.weight.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_an_unknown_precision_is_refused():
    with pytest.raises(InputError, match="float32, bfloat16, float16"):
        autocast_for("cpu", "fp8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_keep_updates_that_16_bits_would_round_away(dtype):
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    alone = copy.deepcopy(model).to(dtype)
    pair = MasterWeights(model, dtype)
    sgd = torch.optim.SGD(pair.masters.parameters(), lr=2.0**-12)
    lost = torch.optim.SGD(alone.parameters(), lr=2.0**-12)
    for _ in range(64):
        for module in (pair.model, alone):
            module.weight.grad = torch.ones_like(module.weight)
        pair.gather_gradients()
        sgd.step()
        sgd.zero_grad()
        pair.write_back()
        lost.step()
    assert alone.weight.item() == 1.0
    assert pair.masters.weight.item() == 1 - 64 * 2.0**-12
    assert pair.model.weight.item() == torch.tensor(1 - 2.0**-6).to(dtype).item() < 1


def test_gradients_of_micro_batches_are_summed_in_32_bits():
    pair = MasterWeights(nn.Linear(1, 1, bias=False), torch.bfloat16)
    for value in [1.0] + [2.0**-9] * 8:  # in bfloat16 1 + 2**-9 is 1
        pair.model.weight.grad = torch.full((1, 1), value, dtype=torch.bfloat16)
        pair.gather_gradients()
        assert pair.model.weight.grad is None
    assert pair.masters.weight.grad.item() == 1 + 8 * 2.0**-9
    assert pair.masters.weight.grad.dtype == torch.float32


CONFIG = ModelConfig(vocab_size=13, seq_len=8, d_model=16, num_layers=2, num_heads=2)


def test_a_tied_model_has_one_master_and_stays_tied():
    model = Decoder(CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pair = MasterWeights(model)
    assert pair.model is model
    assert pair.masters.lm_head.weight is pair.masters.embedding.tokens.weight
    assert model.lm_head.weight is model.embedding.tokens.weight
    for name, master in pair.masters.named_parameters():
        assert torch.equal(master, before[name])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def train_decoder(way, steps=40):
    """Learn to count modulo 13; returns the loss of the last step."""
    torch.manual_seed(1)
    model, scaler = Decoder(CONFIG), LossScaler(2.0**10, enabled="float16" in way)
    dtype = getattr(torch, way.split()[-1])
    pair = MasterWeights(model, dtype) if "masters" in way else None
    precision = way.split()[-1] if "autocast" in way else "float32"
    trained = pair.masters if pair else model
    optimizer = make_optimizer("adamw_own", trained, lr=0.01)
    ids = (torch.arange(9) + torch.arange(4)[:, None]) % 13
    for _ in range(steps):
        optimizer.zero_grad()
        with autocast_for("cpu", precision):
            logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
        scaler.scale(loss).backward()
        if pair:
            pair.gather_gradients()
        scaler.step(optimizer)
        scaler.update()
        if pair:
            pair.write_back()
    return loss.item()


WAYS = ["autocast bfloat16", "autocast float16", "masters bfloat16", "masters float16"]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_learns_in_every_mixed_precision_as_in_float32(way):
    exact = train_decoder("alone float32")
    assert exact < 0.2  # from ln 13 = 2.6
    # The four runs end within 4e-4 of it; a model of bfloat16 alone, without masters, 7e-3 off.
    assert abs(train_decoder(way) - exact) < 0.002


def test_masters_of_a_model_that_is_already_narrow_are_refused():
    with pytest.raises(InputError, match="weight"):
        MasterWeights(nn.Linear(2, 3).half())
    with pytest.raises(InputError, match="its own master"):
        MasterWeights(nn.Linear(2, 3), torch.float32)
