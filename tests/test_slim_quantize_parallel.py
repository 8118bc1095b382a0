"""Quantized models over ranks: equal to one process, bit for bit where all sums are of integers."""

import copy

import comm_runtimes
import pytest
import torch
from parallel_cases import tiny_model
from tensor_cases import GPT, LLAMA, MULTI_QUERY, SIZES, storage_bytes
from torch import nn
from torch.nn import functional as F

from slimlab.comm.launch import run_ranks
from slimlab.comm.report import RankError
from slimlab.config import InputError
from slimlab.parallel.mesh import Mesh, MeshShape
from slimlab.parallel.tensor import tensor_parallel, whole_logits
from slimlab.parallel.tensor_loss import tensor_parallel_objective
from slimlab.plan.quantized_parallel import (
    local_quantized_bytes,
    predict_forward,
    predict_logits,
)
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize import quantize_model
from slimlab.slim.quantize_file import save_quantized_model
from slimlab.slim.quantize_layers import (
    Int8Linear,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
)
from slimlab.slim.quantize_maps import quantize
from slimlab.slim.quantize_parallel import (
    data_parallel_logits,
    data_parallel_loss,
    quantized_tensor_parallel,
)
from slimlab.slim.quantize_parallel_layers import (
    RowParallelInt8Linear,
    RowParallelQuantizedLinear,
    cut_rows,
)
from slimlab.train.objectives import causal_objective

DRAW = torch.Generator().manual_seed(0)
IDS = torch.randint(SIZES["vocab_size"], (3, 7), generator=DRAW)
TEXT = torch.randint(SIZES["vocab_size"], (4, 12), generator=DRAW)
TARGETS = torch.randint(SIZES["vocab_size"], (3, 7), generator=DRAW)
FOUR = QuantScheme(4, symmetric=False, granularity="group", quant_group_size=4)
SEVEN = QuantScheme(4, True, "group", 7, "bfloat16")
EXACT = {
    "dynamic": {"activations": "dynamic"},
    "static": {"activations": "static"},
    "smoothed": {"activations": "static", "smoothing": 0.5},
    "per tensor": {"activations": "dynamic", "scheme": QuantScheme(granularity="tensor")},
}
ROUNDED = {
    "weight only": {},
    "groups of 4 bits": {"scheme": FOUR},
    "3 bits": {"scheme": QuantScheme(3), "table_scheme": QuantScheme(8)},
    "some layers in floats": {"scheme": FOUR, "skip": ("lm_head", "blocks.0.attention.out_proj")},
}
MIXED = {"activations": "dynamic", "skip": ("embedding", "lm_head")}


def quantized(choices=GPT, **options):
    """The same on every rank."""
    if "activations" in options or "rounding" in options:
        options = {"batches": [TEXT], **options}
    return quantize_model(tiny_model(**choices).float(), **options)


def in_parts(comm, models):
    return [whole_logits(quantized_tensor_parallel(one, comm), IDS).detach() for one in models]


def run(world_size, models, program=in_parts, **options):
    """Every rank has copies of its own: rank threads share what they are given."""

    def on_rank(comm):
        return program(comm, copies[comm.rank])

    copies = [copy.deepcopy(models) for _ in range(world_size)]
    return run_ranks(on_rank, world_size, **options)


@pytest.mark.parametrize(
    ("world_size", "choices"), [(1, GPT), (2, GPT), (4, LLAMA), (3, MULTI_QUERY)]
)
def test_integer_layers_in_parts_give_the_logits_of_one_process_bit_for_bit(world_size, choices):
    models = [quantized(choices, **options) for options in EXACT.values()]
    expected = [model(IDS) for model in models]
    for found in run(world_size, models):
        for case, one, true in zip(EXACT, found, expected, strict=True):
            assert torch.equal(one, true), case


def exact_logits(model):
    """Of the same integers, computed in float64."""
    wide = copy.deepcopy(model)
    for name, one in model.named_modules():
        if isinstance(one, QuantizedLinear):
            layer = nn.Linear(one.in_features, one.out_features, one.bias is not None)
            layer.weight.data = one.table.quantized().dequantize()
            if one.bias is not None:
                layer.bias.data = one.bias.clone()
            wide.set_submodule(name, layer)
        if isinstance(one, QuantizedEmbedding):
            layer = nn.Embedding(one.num_embeddings, one.embedding_dim)
            layer.weight.data = one.table.quantized().dequantize()
            wide.set_submodule(name, layer)
    return wide.double()(IDS).detach()


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_of_floats_in_parts_are_as_exact_as_those_of_one_process(world_size):
    models = [quantized(**options) for options in ROUNDED.values()]
    expected = [model(IDS).detach() for model in models]
    exact = [exact_logits(model) for model in models]
    for found in run(world_size, models):
        for case, one, true, ideal in zip(ROUNDED, found, expected, exact, strict=True):
            own, alone = (float((some - ideal).norm()) for some in (one, true))
            assert own < 2 * alone < 1e-6 * float(ideal.norm()), case


def test_layers_in_floats_beside_those_of_integers_are_cut_too():
    def program(comm, model):
        quantized_tensor_parallel(model, comm)
        return model.hidden(IDS), whole_logits(model, IDS).detach()

    model = quantized(**MIXED)
    assert type(model.lm_head) is nn.Linear
    for hidden, logits in run(2, model, program):
        assert torch.equal(hidden, model.hidden(IDS))
        assert float((logits - model(IDS).detach()).abs().max()) < 1e-6


ON_PROCESSES = {
    "dynamic": EXACT["dynamic"],
    "static": EXACT["static"],
    "groups of 4 bits": ROUNDED["groups of 4 bits"],
}


def on_processes(comm):
    models = [quantized(**options) for options in ON_PROCESSES.values()]
    parts = in_parts(comm, copy.deepcopy(models))
    shares = [data_parallel_logits(one, IDS, comm) for one in models]
    with torch.no_grad():  # not every runtime's maximum sees NaN
        layer = RowParallelInt8Linear(models[0].blocks[0].attention.out_proj, comm)
        spoilt = layer(torch.full((1, 12), torch.nan if comm.rank == 1 else 1.0))
    calls = counted_forward(comm, quantized(**EXACT["dynamic"]))
    return parts, shares, bool(spoilt.isfinite().any()), calls


@pytest.mark.parametrize("runtime", ["gloo", "mpich"])
def test_processes_equal_one_process(runtime):
    if reason := comm_runtimes.why_not(runtime):
        pytest.skip(reason)
    with comm_runtimes.started_by(runtime) as backend:
        results = run_ranks(on_processes, 2, backend=backend)
    expected = [quantized(**options)(IDS).detach() for options in ON_PROCESSES.values()]
    for parts, shares, finite, calls in results:
        assert not finite
        for case, part, share, true in zip(ON_PROCESSES, parts, shares, expected, strict=True):
            bound = 0.0 if case in EXACT else 1e-6 * float(true.norm())
            assert float((part - true).norm()) <= bound, case
            assert float((share - true).norm()) <= bound, case
        assert calls == list(predict_forward(model_config(), 3, 7, 2, activations="dynamic"))


def model_config(choices=GPT):
    return tiny_model(**choices).config


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_in_parts(world_size, whole, kind, x):
    def program(comm):
        width = x.shape[-1] // comm.world_size
        part = x[..., comm.rank * width : (comm.rank + 1) * width]
        return kind(whole, comm)(part).detach()

    return run_ranks(program, world_size)


@pytest.mark.parametrize("input_range", [None, (-3.0, 4.0)])
def test_the_largest_sums_of_all_ranks_are_exact_together(input_range):
    x, weight = torch.full((2, 4096), -3.0), torch.full((3, 4096), 0.25)
    x[1] = numbers(4096)
    whole = Int8Linear(QuantizedWeight(quantize(weight, QuantScheme())), input_range=input_range)
    for found in layer_in_parts(4, whole, RowParallelInt8Linear, x):
        assert torch.equal(found, whole(x))


def test_a_row_has_one_scale_however_its_columns_are_cut():
    x, weight = numbers(5, 64, seed=1), numbers(7, 64)
    x[:, 3] *= 1000  # on rank 0 alone
    whole = Int8Linear(QuantizedWeight(quantize(weight, QuantScheme())), numbers(7, seed=2))
    for found in layer_in_parts(2, whole, RowParallelInt8Linear, x):
        assert torch.equal(found, whole(x))
    apart = Int8Linear(QuantizedWeight(quantize(weight[:, 32:], QuantScheme())))
    own = apart(x[:, 32:])  # with a scale of its own the second half would count
    assert float(own.abs().max()) > 1


def test_columns_of_outliers_may_all_lie_on_one_rank():
    x, weight, places = numbers(5, 64, seed=1), numbers(7, 64), torch.tensor([33, 40])
    x[:, places] *= 1000
    table = QuantizedWeight(quantize(weight.index_fill(1, places, 0), QuantScheme()))
    options = {
        "outliers": places,
        "outlier_weight": weight[:, places],
        "smoothing": x.abs().amax(0),
    }
    whole = Int8Linear(table, **options)
    for found in layer_in_parts(2, whole, RowParallelInt8Linear, x):
        assert torch.equal(found, whole(x))  # the other rank adds zeros


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("num_bits", [8, 4, 3, 2])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_columns_in_parts_stay_within_what_the_order_of_a_sum_can_change(
    num_bits, granularity, world_size
):
    size = 12 if granularity == "group" else None
    scheme = QuantScheme(num_bits, num_bits == 4, granularity, size)
    weight, bias, x = numbers(10, 144), numbers(10, seed=1), numbers(2, 3, 144, seed=2)
    whole = QuantizedLinear(QuantizedWeight(quantize(weight, scheme)), bias)
    values = whole.table.quantized().dequantize()
    terms = F.linear(x.double().abs(), values.double().abs(), bias.double().abs())
    unit, n = 2.0**-24, 144 + 1
    bound = 2 * n * unit / (1 - n * unit) * terms
    for found in layer_in_parts(world_size, whole, RowParallelQuantizedLinear, x):
        assert bool(((found.double() - whole(x).double()).abs() <= bound).all())


@pytest.mark.parametrize("num_bits", [8, 4, 3, 2])
def test_rows_of_a_part_have_the_integers_and_scales_of_the_whole(num_bits):
    scheme = QuantScheme(num_bits, False, "group", 6)
    whole = QuantizedLinear(QuantizedWeight(quantize(numbers(12, 18), scheme)), numbers(12, seed=1))
    joined = torch.cat([cut_rows(whole, (n, 3)).table.quantized().integers for n in range(3)])
    assert torch.equal(joined, whole.table.quantized().integers)
    x = numbers(5, 18, seed=2)
    parts = torch.cat([cut_rows(whole, (n, 3))(x) for n in range(3)], dim=-1)
    assert float((parts - whole(x)).abs().max()) < 1e-5


def test_rows_of_a_part_have_the_outliers_and_the_smoothing_of_the_whole():
    x, weight, places = numbers(5, 18, seed=1), numbers(12, 18), torch.tensor([3, 11])
    table = QuantizedWeight(quantize(weight.index_fill(1, places, 0), QuantScheme()))
    options = {
        "outliers": places,
        "outlier_weight": weight[:, places],
        "smoothing": x.abs().amax(0),
    }
    whole = Int8Linear(table, numbers(12, seed=2), **options)
    parts = torch.cat([cut_rows(whole, (n, 3))(x) for n in range(3)], dim=-1)
    assert float((parts - whole(x)).abs().max()) < 1e-5


def counted_forward(comm, model):
    quantized_tensor_parallel(model, comm, broadcast=False)
    before = len(comm.ledger.entries)
    model(IDS)
    return [(entry.call, entry.n_bytes) for entry in comm.ledger.entries[before:]]


CALLS = {
    "weight only": {},
    "dynamic": {"activations": "dynamic"},
    "static": {"activations": "static"},
    "outliers": {"activations": "static", "outlier_threshold": 0.6},
}


@pytest.mark.parametrize("case", CALLS)
def test_the_calls_of_a_forward_pass_are_those_predicted(case):
    options = CALLS[case]
    model = quantized(**options)
    loud = [n for n, one in model.named_modules() if getattr(one, "outliers", None) is not None]
    assert any(name.endswith("out_proj") for name in loud) == (case == "outliers")
    kind = options.get("activations", "none")
    expected = predict_forward(model.config, 3, 7, 2, activations=kind, outliers=loud)
    for found in run(2, model, counted_forward):
        assert found == list(expected)
    assert predict_forward(model.config, 3, 7, 1, activations=kind) == ()


def test_a_part_of_the_cuts_sends_and_holds_what_is_predicted_too():
    def program(comm, model):
        quantized_tensor_parallel(model, comm, cut=cut)
        before = len(comm.ledger.entries)
        logits = whole_logits(model, IDS)
        sent = [(one.call, one.n_bytes) for one in comm.ledger.entries[before:]]
        return logits, sent, storage_bytes([*model.buffers(), *model.parameters()])

    cut, model = ("feed_forward",), quantized(**EXACT["dynamic"])
    held = local_quantized_bytes(model.config, 2, QuantScheme(), cut=cut)
    for logits, sent, counted in run(2, model, program):
        assert torch.equal(logits, model(IDS))
        assert sent == list(predict_forward(GPT_CONFIG, 3, 7, 2, activations="dynamic", cut=cut))
        assert counted == sum(held.values())


GPT_CONFIG = model_config()
HELD = {
    "weights": (GPT, {}),
    "static": (GPT, {"activations": "static"}),
    "groups": (LLAMA, {"scheme": FOUR, "table_scheme": QuantScheme(8)}),
    "fitted groups": ({**LLAMA, "d_ff": 56}, {"scheme": SEVEN, "fit_groups": True}),
    "table apart": ({**GPT, "tie_embeddings": False}, {"scheme": QuantScheme(2)}),
}


@pytest.mark.parametrize("case", HELD)
def test_a_rank_holds_the_bytes_that_are_predicted(case):
    choices, options = HELD[case]
    model = quantized(choices, **options)
    kept = {key: one for key, one in options.items() if key != "scheme"}
    for world_size in (1, 2):
        scheme = options.get("scheme", QuantScheme())
        expected = local_quantized_bytes(model.config, world_size, scheme, **kept)
        for found in run(world_size, model, held_after_cut):
            assert found == sum(expected.values())


def held_after_cut(comm, model):
    quantized_tensor_parallel(model, comm)
    return storage_bytes([*model.buffers(), *model.parameters()])


def test_every_rank_gets_the_integers_of_the_first():
    def program(comm):
        model = quantize_model(tiny_model(seed=comm.rank, **GPT).float())
        logits = whole_logits(quantized_tensor_parallel(model, comm), IDS).detach()
        return logits, sum(one.n_bytes for one in comm.ledger.entries if one.call == "broadcast")

    model = quantized()
    whole = sum(local_quantized_bytes(model.config, 1, QuantScheme()).values())
    for logits, sent in run_ranks(program, 2):
        assert float((logits - model(IDS).detach()).norm()) < 1e-6 * float(logits.norm())
        assert sent == whole


def test_the_loss_is_found_where_the_logits_lie():
    def program(comm, model):
        quantized_tensor_parallel(model, comm)
        return float(tensor_parallel_objective(model, (IDS, TARGETS))[0])

    model = quantized(**EXACT["dynamic"])
    expected = float(causal_objective(model, (IDS, TARGETS))[0])
    for found in run(2, model, program):
        assert abs(found - expected) < 1e-6 * expected


def test_gradients_flow_through_weights_that_do_not_learn():
    def norms(model, objective):
        objective(model, (IDS, TARGETS))[0].backward()
        return {name: param.grad.clone() for name, param in model.named_parameters()}

    def program(comm, model):
        return norms(quantized_tensor_parallel(model, comm), tensor_parallel_objective)

    model = quantized(LLAMA, scheme=FOUR)
    expected = norms(copy.deepcopy(model), causal_objective)
    for found in run(2, model, program):
        for name, grad in expected.items():
            assert float((found[name] - grad).abs().max()) < 1e-5 * float(grad.abs().max()), name


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicas_divide_the_rows_of_a_batch_and_some_may_have_none(world_size):
    def program(comm, model):
        logits = data_parallel_logits(model, IDS, comm)
        entry = comm.ledger.entries[-1]
        loss = data_parallel_loss(model, (IDS, TARGETS), comm)
        return logits, (entry.call, entry.n_bytes), loss, comm.ledger.entries[-1].n_bytes

    model = quantized(**EXACT["dynamic"])
    expected, num_targets = causal_objective(model, (IDS, TARGETS))
    ends = [3 * rank // world_size for rank in range(world_size + 1)]
    for rank, (logits, call, loss, last) in enumerate(run(world_size, model, program)):
        assert torch.equal(logits, model(IDS))
        assert (call,) == predict_logits(model.config, ends[rank + 1] - ends[rank], 7)
        assert loss == (pytest.approx(float(expected), rel=1e-6), num_targets)
        assert last == 16


def test_replicas_may_each_be_shared_by_ranks():
    def program(comm, model):
        mesh = Mesh(comm, MeshShape(data=2, tensor=2))
        quantized_tensor_parallel(model, mesh.group("tensor"))
        group = mesh.group("data")
        loss = data_parallel_loss(model, (IDS, TARGETS), group, tensor_parallel_objective)
        return data_parallel_logits(model, IDS, group, run=whole_logits), loss[0]

    model = quantized(**EXACT["dynamic"])
    expected = float(causal_objective(model, (IDS, TARGETS))[0])
    for logits, loss in run(4, model, program):
        assert torch.equal(logits, model(IDS))
        assert abs(loss - expected) < 1e-6 * expected


@pytest.mark.parametrize("case", ["dynamic", "static"])
def test_a_number_that_is_none_on_one_rank_is_noticed_by_all(case):
    def program(comm):
        part = torch.full((2, 8), torch.nan if comm.rank == 1 else 1.0)
        layer = RowParallelInt8Linear(whole, comm)
        if case == "dynamic":
            return bool(layer(part).isfinite().any())
        with pytest.raises(InputError, match="x: 16 are NaN or infinite, on all ranks together"):
            layer(part)
        return False

    ends = (-1.0, 1.0) if case == "static" else None
    whole = Int8Linear(QuantizedWeight(quantize(numbers(3, 16), QuantScheme())), input_range=ends)
    assert run_ranks(program, 2) == [False, False]


def groups(size):
    return {"scheme": QuantScheme(4, True, "group", size)}


REFUSED = {
    "heads": (2, {**GPT, "num_heads": 3}, {}, "(?s)num_heads = 3.*num_heads=2 or 4"),
    "words": (2, {**GPT, "vocab_size": 13}, {}, "vocab_size = 13"),
    "neurons": (2, {**GPT, "d_ff": 25}, {}, "d_ff = 25"),
    "groups": (
        2,
        GPT,
        groups(8),
        "(?s)out_proj and 3 more .* / 2 ranks = 12, groups of 8.*size=4, or .* of 1",
    ),
    "groups for three": (3, GPT, groups(6), "(?s)24 columns / 3 ranks = 8, groups of 6.*of 1 or 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_cut_would_divide_is_refused_on_every_rank_before_a_weight_is_sent(case):
    def program(comm, model):
        with pytest.raises(InputError, match=message):
            quantized_tensor_parallel(model, comm)
        return [(one.call, one.n_bytes) for one in comm.ledger.entries]

    world_size, choices, options, message = REFUSED[case]
    for calls in run(world_size, quantized(choices, **options), program):
        assert calls == [("all_gather", 8)]


def test_groups_of_rows_that_are_cut_may_be_as_long_as_the_row():
    def program(comm, model):
        model = quantized_tensor_parallel(model, comm, cut=("feed_forward",))
        return whole_logits(model, IDS).detach()

    model = quantized({**GPT, "d_ff": 48}, **groups(24))  # 24 = d_model = d_ff / 2
    for logits in run(2, model, program):
        assert float((logits - model(IDS).detach()).norm()) < 1e-6 * float(logits.norm())


DIFFERENT = {
    "bits": (quantized, lambda: quantized(scheme=QuantScheme(4))),
    "activations": (quantized, lambda: quantized(**EXACT["dynamic"])),
    "ranges": (
        lambda: quantized(**EXACT["static"]),
        lambda: quantized(activations="static", batches=[IDS]),
    ),
    "layers": (quantized, lambda: quantized(skip=("lm_head",))),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_ranks_whose_models_differ_are_told_so(case):
    def program(comm):
        with pytest.raises(InputError, match="something else on rank 1 than on rank 0"):
            quantized_tensor_parallel(models[comm.rank], comm)
        return True

    models = [make() for make in DIFFERENT[case]]
    assert run_ranks(program, 2) == [True, True]


def test_a_model_in_floats_or_cut_before_is_refused(tmp_path):
    def program(comm):
        whole = tiny_model(**GPT).float()
        with pytest.raises(InputError, match="a Decoder with 0 of them"):
            quantized_tensor_parallel(whole, comm)
        small = quantize_model(nn.Sequential(nn.Linear(4, 4)))
        with pytest.raises(InputError, match="a Sequential with 1 of them"):
            quantized_tensor_parallel(small, comm)
        with pytest.raises(InputError, match="each of cut"):
            quantized_tensor_parallel(quantized(), comm, cut=("layers",))
        model = quantized_tensor_parallel(quantized(), comm)
        with pytest.raises(InputError, match="cut before"):
            quantized_tensor_parallel(model, comm)
        with pytest.raises(InputError, match="whole Decoder"):
            tensor_parallel(model, comm)
        with pytest.raises(InputError, match="save the whole model"):
            save_quantized_model(tmp_path / "part", model)
        return len(list(tmp_path.iterdir()))

    assert run_ranks(program, 2) == [0, 0]


def test_threads_that_share_one_model_are_told_to_copy_it():
    model = quantized()
    with pytest.raises(RankError, match=r"give copy.deepcopy\(model\) to each"):
        run_ranks(lambda comm: quantized_tensor_parallel(model, comm), 2)


def test_a_plan_refuses_what_a_cut_would_divide():
    with pytest.raises(InputError, match="12 columns on each rank, groups of 8"):
        local_quantized_bytes(GPT_CONFIG, 2, QuantScheme(4, True, "group", 8))
    with pytest.raises(InputError, match="num_heads"):
        predict_forward(GPT_CONFIG, 3, 7, 5)
    with pytest.raises(InputError, match="activations"):
        predict_forward(GPT_CONFIG, 3, 7, 2, activations="int8")
