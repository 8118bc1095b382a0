"""SGD, AdamW, groups, clipping and schedules: step for step what torch.optim does."""

import copy
import math

import pytest
import torch
from torch import nn

from slimlab.config import InputError
from slimlab.train import schedule
from slimlab.train.optimizer import SGD, AdamW, clip_gradients, make_optimizer, parameter_groups
from slimlab.train.schedule import warmup_constant, warmup_cosine, warmup_linear

# Each rule does the same operations as torch's in another order: a few roundings per step.
EXACT = {"rtol": 1e-12, "atol": 1e-14}
SHAPES = [(8, 3), (5,), (2, 3, 4), ()]
RULES = {
    "SGD": (SGD, torch.optim.SGD, {"weight_decay": 0.0}),
    "SGD with momentum": (SGD, torch.optim.SGD, {"momentum": 0.8}),
    "SGD with all": (SGD, torch.optim.SGD, {"momentum": 0.8, "weight_decay": 0.03}),
    "AdamW": (AdamW, torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.9, 0.95)}),
    "AdamW without decay": (AdamW, torch.optim.AdamW, {"weight_decay": 0.0, "betas": (0.8, 0.99)}),
    "AdamW with a large eps": (
        AdamW,
        torch.optim.AdamW,
        {"eps": 0.1, "betas": (0.9, 0.98), "weight_decay": 0},
    ),
}


def twins(shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    own = [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]
    return own, copy.deepcopy(own)


def groups_of(params):
    """Two groups, the second with a rate and a decay of its own."""
    return [{"params": params[:2]}, {"params": params[2:], "lr": 0.05, "weight_decay": 0.3}]


def give_gradients(step, *families):
    """The same gradients to each family: parameter 1 never has one, parameter 2 from step 5 on."""
    generator = torch.Generator().manual_seed(100 + step)
    for members in zip(*families):
        gradient = torch.randn(members[0].shape, generator=generator, dtype=torch.float64)
        for param in members:
            param.grad = gradient.to(param.dtype).clone()
    for params in families:
        params[1].grad = None
        if step < 5:
            params[2].grad = None


def run(optimizer, params, steps):
    for step in steps:
        give_gradients(step, params)
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_every_step_equals_torchs(rule):
    own_class, torch_class, settings = RULES[rule]
    own, theirs = twins()
    untouched = own[1].detach().clone()
    ours = own_class(groups_of(own), lr=0.02, **settings)
    reference = torch_class(groups_of(theirs), lr=0.02, **settings)
    for step in range(40):
        give_gradients(step, own, theirs)
        if step == 20:  # a schedule changes the rate in the middle
            schedule.set_learning_rate(ours, 0.004)
            schedule.set_learning_rate(reference, 0.004)
        ours.step()
        reference.step()
        torch.testing.assert_close(own, theirs, **EXACT)
    assert torch.equal(own[1], untouched)
    assert not ours.state.get(own[1])


@pytest.mark.parametrize("rule", RULES)
def test_a_saved_state_goes_on_in_the_other_implementation(rule):
    own_class, torch_class, settings = RULES[rule]
    for first_class, second_class in ((own_class, torch_class), (torch_class, own_class)):
        straight, broken = twins()
        never_stopped = torch_class(groups_of(straight), lr=0.02, **settings)
        run(never_stopped, straight, range(12))
        first = first_class(groups_of(broken), lr=0.02, **settings)
        run(first, broken, range(7))
        # Other settings at construction: what was saved replaces them.
        second = second_class(groups_of(broken), lr=0.5)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        run(second, broken, range(7, 12))
        torch.testing.assert_close(broken, straight, **EXACT)
        assert second.state_dict()["state"].keys() == never_stopped.state_dict()["state"].keys()


def test_the_state_has_torchs_names_and_types():
    own, theirs = twins(dtype=torch.float32)
    ours, reference = AdamW(own, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    run(ours, own, range(6))
    run(reference, theirs, range(6))
    for mine, expected in zip(
        ours.state_dict()["state"].values(), reference.state_dict()["state"].values()
    ):
        assert list(mine) == list(expected) == ["step", "exp_avg", "exp_avg_sq"]
        for name, tensor in expected.items():
            assert (mine[name].dtype, mine[name].shape) == (tensor.dtype, tensor.shape)
    assert ours.state_dict()["state"][2]["step"] == 1  # its first gradient came in step 5


def test_gradients_are_left_as_they_are():
    for optimizer_class in (SGD, AdamW):
        (param,), _ = twins([(3, 2)])
        param.grad = torch.ones_like(param)
        optimizer_class([param], lr=0.1, weight_decay=0.5).step()
        assert torch.equal(param.grad, torch.ones_like(param))


@pytest.mark.parametrize(
    ("torch_class", "own_class", "option"),
    [
        (torch.optim.AdamW, AdamW, {"amsgrad": True}),
        (torch.optim.AdamW, AdamW, {"maximize": True}),
        (torch.optim.SGD, SGD, {"nesterov": True, "momentum": 0.9}),
        (torch.optim.SGD, SGD, {"dampening": 0.1, "momentum": 0.9}),
    ],
)
def test_a_state_saved_under_another_rule_is_refused(torch_class, own_class, option):
    own, theirs = twins()
    saved = torch_class(theirs, lr=0.1, **option).state_dict()
    with pytest.raises(InputError, match=list(option)[0]):
        own_class(own, lr=0.1).load_state_dict(saved)


BAD_SETTINGS = {
    "lr = 0": (AdamW, {"lr": 0.0}, "lr = 0.0"),
    "lr below 0": (SGD, {"lr": -0.1}, "lr = -0.1"),
    "lr not finite": (SGD, {"lr": math.inf}, "lr = inf"),
    "lr NaN": (AdamW, {"lr": math.nan}, "lr = nan"),
    "lr a text": (AdamW, {"lr": "1e-3"}, "lr = '1e-3'"),
    "beta of 1": (AdamW, {"lr": 0.1, "betas": (0.9, 1.0)}, r"betas\[1\] = 1.0"),
    "beta below 0": (AdamW, {"lr": 0.1, "betas": (-0.1, 0.9)}, r"betas\[0\] = -0.1"),
    "one beta": (AdamW, {"lr": 0.1, "betas": 0.9}, "betas = 0.9"),
    "eps": (AdamW, {"lr": 0.1, "eps": -1e-8}, "eps = -1e-08"),
    "decay": (AdamW, {"lr": 0.1, "weight_decay": -1}, "weight_decay = -1"),
    "momentum of 1": (SGD, {"lr": 0.1, "momentum": 1}, "momentum = 1"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_out_of_range_are_refused(case):
    optimizer_class, settings, message = BAD_SETTINGS[case]
    own, _ = twins()
    with pytest.raises(InputError, match=message):
        optimizer_class(own, **settings)


def test_settings_of_a_group_are_checked_as_well():
    own, _ = twins()
    with pytest.raises(InputError, match="lr = -1"):
        AdamW([{"params": own[:1]}, {"params": own[1:], "lr": -1}], lr=0.1)


def test_what_cannot_be_updated_is_refused():
    whole = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(InputError, match="dtype torch.int64"):
        SGD([whole], lr=0.1)
    spent = iter(twins()[0])
    list(spent)
    with pytest.raises(InputError, match="walked through only once"):
        AdamW(spent, lr=0.1)
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InputError, match="sparse"):
        SGD(table.parameters(), lr=0.1).step()


class Tied(nn.Module):
    """A table tied to the output, a matrix, biases, gains, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.table, self.positions = nn.Embedding(11, 4), nn.Embedding(7, 4)
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 3).requires_grad_(False)
        self.output = nn.Linear(4, 11, bias=False)
        self.output.weight = self.table.weight

    def forward(self, ids):
        return self.output(self.norm(self.inner(self.table(ids)) + self.positions(ids % 7)))


def test_matrices_decay_and_gains_and_biases_do_not():
    model = Tied()
    decaying, others = parameter_groups(model, 0.3)
    assert decaying["param_names"] == ["table.weight", "positions.weight", "inner.weight"]
    assert others["param_names"] == ["inner.bias", "norm.weight", "norm.bias"]
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(param): name for name, param in model.named_parameters()}
    for group in (decaying, others):
        assert [names[id(param)] for param in group["params"]] == group["param_names"]


def test_embeddings_can_be_left_out_of_the_decay_tied_or_not():
    decaying, others = parameter_groups(Tied(), 0.3, decay_embeddings=False)
    assert decaying["param_names"] == ["inner.weight"]
    assert {"table.weight", "positions.weight"} <= set(others["param_names"])


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(InputError, match="requires_grad_"):
        parameter_groups(Tied().requires_grad_(False), 0.1)


def test_a_model_of_gains_alone_makes_one_group():
    (group,) = parameter_groups(nn.LayerNorm(4), 0.1)
    assert group["weight_decay"] == 0.0


def train_tied(name, **settings):
    torch.manual_seed(3)
    model = Tied().double()
    optimizer = make_optimizer(name, model, lr=0.01, **settings)
    for step in range(10):
        ids = torch.arange(6).view(2, 3) + step % 5
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), (ids + 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return optimizer, [param.detach() for param in model.parameters()]


def test_the_fused_and_the_own_adamw_train_alike():
    fused, fast = train_tied("adamw", weight_decay=0.2)
    own, readable = train_tied("adamw_own", weight_decay=0.2)
    assert type(own) is AdamW
    assert type(fused) is torch.optim.AdamW
    assert fused.defaults["fused"]
    torch.testing.assert_close(readable, fast, **EXACT)


def test_sgd_by_name_is_sgd_with_momentum_and_decay():
    optimizer, _ = train_tied("sgd", momentum=0.5, weight_decay=0.2)
    assert type(optimizer) is SGD
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}


def test_an_unknown_optimizer_and_bad_settings_are_refused():
    with pytest.raises(InputError, match="adamw, adamw_own, sgd"):
        make_optimizer("adam", Tied(), lr=0.1)
    for settings in ({"lr": 0}, {"lr": 0.1, "betas": (1, 0)}, {"lr": 0.1, "momentum": 2}):
        for name in ("adamw", "adamw_own", "sgd"):
            with pytest.raises(InputError):
                make_optimizer(name, Tied(), **settings)


@pytest.mark.parametrize("max_norm", [0.5, 2.0, 100.0, math.inf])
def test_clipping_equals_torchs(max_norm):
    own, theirs = twins()
    give_gradients(9, own, theirs)
    mine = clip_gradients(own, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(mine, expected, **EXACT)
    for param, other in zip(own, theirs):
        torch.testing.assert_close(param.grad, other.grad, **EXACT)


def test_clipping_keeps_the_direction_and_sets_the_length():
    own, _ = twins()
    give_gradients(9, own)
    before = torch.cat([p.grad.flatten() for p in own if p.grad is not None])
    total_norm = clip_gradients(own, 0.25)
    after = torch.cat([p.grad.flatten() for p in own if p.grad is not None])
    assert math.isclose(float(total_norm), float(before.norm()), rel_tol=1e-12)
    # The divisor has 1e-6 more than the norm.
    assert math.isclose(float(after.norm()), 0.25, rel_tol=1e-6)
    torch.testing.assert_close(after / after.norm(), before / before.norm(), **EXACT)


def test_16_bit_gradients_are_measured_in_32_bits():
    param = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    param.grad = torch.full((4,), 40_000.0, dtype=torch.float16)
    assert clip_gradients([param], 80.0) == 80_000.0  # beyond float16
    torch.testing.assert_close(param.grad.float(), torch.full((4,), 40.0))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite_become_what_torch_makes_of_them(bad):
    own, theirs = twins()
    give_gradients(9, own, theirs)
    own[0].grad[2, 1] = theirs[0].grad[2, 1] = bad
    mine = clip_gradients(own, 1.0)
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(mine, expected, equal_nan=True)
    for param, other in zip(own, theirs):
        torch.testing.assert_close(param.grad, other.grad, equal_nan=True)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite_are_named_on_request_and_left_alone(bad):
    model = Tied()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.inner.bias.grad[:3] = bad
    with pytest.raises(InputError, match=r"NaN in inner\.bias \(3 of 4\)"):
        clip_gradients(model.named_parameters(), 1.0, error_if_nonfinite=True)
    assert (model.norm.weight.grad == 1).all()
    with pytest.raises(InputError, match=r"parameter 3 \(3 of 4\)"):
        clip_gradients(model.parameters(), 1.0, error_if_nonfinite=True)


def test_clipping_nothing_is_a_mistake_but_no_gradient_is_a_length_of_0():
    model = Tied()
    assert clip_gradients(model.parameters(), 1.0) == 0
    for params, max_norm in (([], 1.0), (model.parameters(), 0.0), (model.parameters(), math.nan)):
        with pytest.raises(InputError):
            clip_gradients(params, max_norm)


PLAN = {"peak_lr": 0.6, "warmup_steps": 4, "num_steps": 15}


def torch_rates(decay, warmup_steps=4, num_steps=15, peak_lr=0.6):
    """The rates of torch's schedulers, one after the other."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak_lr)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup_steps, 1, warmup_steps - 1)
    both = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [rise, decay(optimizer, num_steps - 1 - warmup_steps)], [warmup_steps]
    )
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    return rates


def test_the_cosine_equals_torchs_schedulers():
    def decay(optimizer, length):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length, 0.1 * 0.6)

    rates = [warmup_cosine(step, **PLAN) for step in range(15)]
    assert rates == pytest.approx(torch_rates(decay), rel=1e-12)


def test_the_line_equals_torchs_schedulers():
    def decay(optimizer, length):
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, length)

    rates = [warmup_linear(step, **PLAN, final_fraction=0.25) for step in range(15)]
    assert rates == pytest.approx(torch_rates(decay), rel=1e-12)


@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_a_schedule_rises_to_its_peak_and_never_rises_again(name):
    rates = [schedule.learning_rate(name, step, **PLAN) for step in range(30)]
    assert rates[:5] == pytest.approx([0.15, 0.3, 0.45, 0.6, 0.6])
    assert all(later <= sooner for sooner, later in zip(rates[4:], rates[5:]))
    final = 0.6 if name == "constant" else 0.06
    assert rates[14:] == pytest.approx([final] * 16)


@pytest.mark.parametrize("function", [warmup_cosine, warmup_linear, warmup_constant])
def test_short_trainings_have_a_rate_too(function):
    for warmup_steps, num_steps in ((0, 1), (1, 1), (3, 3), (3, 4)):
        for step in range(num_steps + 2):
            rate = function(step, peak_lr=1.0, warmup_steps=warmup_steps, num_steps=num_steps)
            assert 0 < rate <= 1


BAD_PLANS = {
    "no steps": {"num_steps": 0},
    "fewer steps than warm-up": {"num_steps": 3},
    "a negative step": {"step": -1},
    "half a step": {"step": 0.5},
    "a negative warm-up": {"warmup_steps": -1},
    "no rate": {"peak_lr": 0.0},
    "a rate without end": {"peak_lr": math.inf},
    "a fraction above 1": {"final_fraction": 1.5},
}


@pytest.mark.parametrize("case", BAD_PLANS)
@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_a_plan_out_of_range_is_refused(case, name):
    with pytest.raises(InputError):
        schedule.learning_rate(name, **{"step": 0, **PLAN, **BAD_PLANS[case]})


def test_an_unknown_schedule_is_refused():
    with pytest.raises(InputError, match="cosine, linear, constant"):
        schedule.learning_rate("sine", 0, **PLAN)
