"""Layouts: names of dims, what each rank holds, what is illegal, and DTensor's view of the same."""

import itertools

import comm_runtimes
import pytest
import torch
from torch import nn

from slimlab.comm.launch import run_ranks
from slimlab.config import InputError, ModelConfig
from slimlab.model.build import build_model
from slimlab.parallel.layout import (
    SEQUENCE_PARALLEL,
    TENSOR_PARALLEL,
    Layout,
    Sharding,
    activation_shardings,
    dimensions_of,
    dtensor_placements,
    local_shape,
    local_slices,
    product_collectives,
    shardings,
)
from slimlab.parallel.layout_changes import change_collectives
from slimlab.parallel.layout_names import sizes_of
from slimlab.parallel.mesh import AXES, MeshShape
from slimlab.parallel.tensor_collectives import join_parts, sum_parts

# All sizes differ, so that a wrong name cannot have the right size.
SIZES = {
    "vocab_size": 36, "seq_len": 10, "d_model": 20, "num_layers": 2, "num_heads": 4, "d_head": 6,
    "num_kv_heads": 2, "d_ff": 28,
}  # fmt: skip
FORMS = {
    "decoder": {},
    "with biases and positions": {"bias": True, "norm": "layer", "positions": "learned"},
    "swiglu, own head": {"feed_forward": "swiglu", "tie_embeddings": False},
    "encoder": {"kind": "encoder", "bias": True, "norm": "layer", "num_segments": 2},
    "encoder, norms behind": {"kind": "encoder", "norm_place": "post", "positions": "learned"},
    "encoder_decoder": {"kind": "encoder_decoder", "bias": True, "feed_forward": "swiglu"},
}
# The features of the stream along data, as FSDP cuts weights; heads and the like along tensor.
BOTH = TENSOR_PARALLEL.with_rules(("model", "data"))


def model_of(form="decoder", **changes):
    with torch.device("meta"):
        return build_model(ModelConfig(**SIZES | FORMS[form] | changes))


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_names_and_each_name_one_size(form):
    model = model_of(form)
    dims = dimensions_of(model)
    assert list(dims) == [name for name, _ in model.named_parameters()]
    elements = sizes_of(model)
    elements["heads"] *= model.config.d_head
    elements["kv_heads"] *= model.config.d_head
    for name, param in model.named_parameters():
        assert len(set(dims[name])) == len(dims[name])
        assert tuple(param.shape) == tuple(elements[dim] for dim in dims[name])


def test_a_tied_table_is_named_once_and_an_own_head_beside_it():
    assert "lm_head.weight" not in dimensions_of(model_of())
    dims = dimensions_of(model_of(tie_embeddings=False))
    assert dims["lm_head.weight"] == dims["embedding.tokens.weight"] == ("vocabulary", "model")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", [TENSOR_PARALLEL, BOTH, Layout()], ids=["tensor", "both", "no"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 2), (2, 1, 2), (2, 2, 1)])
def test_the_parts_of_all_ranks_tile_each_tensor_once_per_replica(form, layout, sizes):
    model, shape = model_of(form), MeshShape(*sizes)
    found = shardings(model, layout, shape)
    for name, param in model.named_parameters():
        times = torch.zeros(param.shape, dtype=torch.int64)
        for at in itertools.product(*map(range, sizes)):
            part = times[local_slices(param.shape, found[name], shape, at)]
            assert part.shape == local_shape(param.shape, found[name], shape)
            part += 1
        cut = [getattr(shape, axis) for axis in found[name].axes if axis]
        replicas = shape.world_size // torch.tensor([1, *cut]).prod()
        assert (times == replicas).all(), name


def test_tensor_parallelism_cuts_heads_hidden_features_and_vocabulary_and_nothing_else():
    model = model_of("with biases and positions")
    found = shardings(model, TENSOR_PARALLEL, MeshShape(tensor=2))
    cut = {name: one.dim_along("tensor") for name, one in found.items()}
    expected = {"embedding.tokens.weight": 0}
    for block in ("blocks.0.", "blocks.1."):
        for layer in ("attention.q_proj", "attention.k_proj", "attention.v_proj"):
            expected |= {f"{block}{layer}.weight": 0, f"{block}{layer}.bias": 0}
        expected |= {f"{block}feed_forward.up_proj.{kind}": 0 for kind in ("weight", "bias")}
        expected |= {f"{block}attention.out_proj.weight": 1}
        expected |= {f"{block}feed_forward.down_proj.weight": 1}
    assert {name: dim for name, dim in cut.items() if dim is not None} == expected
    assert all(one.dim_along("data") is None for one in found.values())


def test_a_rank_holds_the_key_heads_that_its_query_heads_read():
    model, shape = model_of(), MeshShape(tensor=2)
    found, params = shardings(model, TENSOR_PARALLEL, shape), dict(model.named_parameters())
    config = model.config
    for part in range(2):
        heads = {}
        for layer in ("q_proj", "k_proj"):
            name = f"blocks.0.attention.{layer}.weight"
            rows, _ = local_slices(params[name].shape, found[name], shape, (0, 0, part))
            assert rows.start % config.d_head == rows.stop % config.d_head == 0
            heads[layer] = set(range(rows.start // config.d_head, rows.stop // config.d_head))
        group = config.num_heads // config.num_kv_heads
        assert {head // group for head in heads["q_proj"]} == heads["k_proj"]


def test_activations_are_cut_by_the_same_rules_and_between_sub_layers_by_their_own():
    model, shape = model_of(), MeshShape(data=3, tensor=2)
    layout = SEQUENCE_PARALLEL.with_rules(("batch", "data"))
    found = activation_shardings(model, layout, shape, batch_size=6, seq_len=8)
    assert found["stream"].axes == ("data", "tensor", None)
    assert {found[name].axes for name in ("queries", "keys", "hidden", "logits")} == {
        ("data", None, "tensor")
    }
    assert local_shape((6, 8, 20), found["stream"], shape) == (2, 4, 20)


WRONG_RULES = {
    "a layer and a device": (("transformer/encoder/layer_0", "gpu:0"),),
    "no pair": ("heads",),
    "one pair and no list": ("heads", "tensor"),
    "no names": ((0, 1),),
    "one of data, pipeline, tensor": (("heads", "rows"),),
    r"\('heads', 'tensor'\) and \('heads', 'data'\)": (("heads", "tensor"), ("heads", "data")),
}


@pytest.mark.parametrize("named", WRONG_RULES)
def test_what_is_no_rule_is_refused(named):
    with pytest.raises(InputError) as caught:
        Layout(WRONG_RULES[named])
    if not named.startswith(("no ", "one pair")):
        caught.match(named)


@pytest.mark.parametrize(
    ("layout", "sizes", "words"),
    [
        (TENSOR_PARALLEL, (1, 1, 3), ["tensor = 3, num_heads = 4", "tensor=2", "3 or 6"]),
        (TENSOR_PARALLEL, (1, 1, 4), ["tensor = 4, num_kv_heads = 2", "tensor=2", "make", " 4;"]),
        (Layout((("vocabulary", "tensor"),)), (1, 1, 5), ["vocab_size = 36", "4 or tensor=6"]),
        (Layout((("model", "data"),)), (3, 1, 1), ["data = 3, d_model = 20", "2 or data=4"]),
        (Layout((("head", "tensor"),)), (1, 1, 2), ["matches nothing", "'heads'"]),
        (Layout((("segment", "tensor"),)), (1, 1, 2), ["('segment', 'tensor')", "matches"]),
        (Layout((("zzz", "tensor"),)), (1, 1, 2), ["leave the rule out"]),
        (
            TENSOR_PARALLEL.with_rules(("model", "tensor")),
            (1, 1, 2),
            ["embedding.tokens.weight", "'vocabulary' and 'model' both along 'tensor'", "'data'"],
        ),
    ],
)
def test_illegal_layouts_are_refused_with_numbers_and_the_nearest_legal_choice(
    layout, sizes, words
):
    with pytest.raises(InputError) as caught:
        shardings(model_of(), layout, MeshShape(*sizes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6, 8, 12])
def test_an_axis_that_a_refusal_names_is_legal(tensor):
    model = model_of(num_heads=12, num_kv_heads=12, d_ff=24)
    try:
        shardings(model, TENSOR_PARALLEL, MeshShape(tensor=tensor))
    except InputError as error:
        sizes = [word for word in error.change.split(";")[0].split() if word.startswith("tensor=")]
        assert sizes
        for word in sizes:
            shardings(model, TENSOR_PARALLEL, MeshShape(tensor=int(word.removeprefix("tensor="))))
    else:
        assert tensor in (1, 2, 3, 4, 6, 12)


def test_a_name_for_positions_that_cuts_two_dims_of_one_tensor_is_refused():
    layout = TENSOR_PARALLEL.with_rules(("position", "tensor"))
    with pytest.raises(InputError, match="'position' and 'heads' both along 'tensor'"):
        activation_shardings(model_of(), layout, MeshShape(tensor=2), batch_size=2, seq_len=4)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((2, 1, 1), "data = 2, batch_size = 3"), ((1, 1, 2), "tensor = 2, seq_len = 5")],
)
def test_batches_and_sequences_that_do_not_divide_are_refused(sizes, words):
    layout = SEQUENCE_PARALLEL.with_rules(("batch", "data"))
    with pytest.raises(InputError, match=words):
        activation_shardings(model_of(), layout, MeshShape(*sizes), batch_size=3, seq_len=5)


def test_other_models_shapes_and_coordinates_are_refused():
    one = Sharding(("heads",), ("tensor",))
    stranger = nn.Linear(2, 2)
    for wrong in (
        lambda: dimensions_of(stranger),
        lambda: sizes_of(stranger),
        lambda: local_shape((4, 4), one, MeshShape()),
        lambda: local_shape((4,), one, MeshShape(tensor=3)),
        lambda: local_slices((4,), one, MeshShape(tensor=2), (0, 0, 2)),
    ):
        with pytest.raises(InputError):
            wrong()


def test_the_parts_are_those_that_distribute_tensor_makes():
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)

    def program(comm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import distribute_tensor

        shape, num_cut = MeshShape(data=2, tensor=2), 0
        mesh = init_device_mesh("cpu", shape.sizes, mesh_dim_names=AXES)
        torch.manual_seed(0)
        model = build_model(ModelConfig(**SIZES | FORMS["with biases and positions"]))
        found = shardings(model, BOTH, shape)
        for name, param in model.named_parameters():
            placements = dtensor_placements(found[name])
            theirs = distribute_tensor(param.detach(), mesh, placements).to_local()
            at = shape.coordinates_at(comm.rank)
            ours = param[local_slices(param.shape, found[name], shape, at)]
            assert torch.equal(ours, theirs), name
            num_cut += ours.numel() < param.numel()
        return num_cut

    assert min(run_ranks(program, 4, backend="gloo")) > 10


X, HIDDEN, W = ("batch", "position", "model"), ("batch", "position", "feed_forward"), (
    "feed_forward", "model",
)  # fmt: skip


@pytest.mark.parametrize(
    ("left", "right", "result", "axes"),
    [
        (X, W, HIDDEN, []),  # column-parallel forward
        (HIDDEN, W, X, ["tensor"]),  # its backward pass; row-parallel forward
        (HIDDEN, X, W, ["data"]),  # gradient of the weight: data parallelism's all_reduce
    ],
)
def test_a_sum_over_a_cut_dim_takes_an_all_reduce_along_its_axis(left, right, result, axes):
    layout = TENSOR_PARALLEL.with_rules(("batch", "data"))
    found = product_collectives(left, right, result, layout)
    assert found == tuple(("all_reduce", axis) for axis in axes)
    assert product_collectives(right, left, result, layout) == found
    assert product_collectives(left, right, result, Layout()) == ()


def test_the_collectives_that_a_layout_implies_make_a_product_whole():
    layout = TENSOR_PARALLEL.with_rules(("batch", "data"))
    letters = {"batch": "b", "position": "t", "model": "d", "feed_forward": "f"}
    sizes = {"batch": 4, "position": 3, "model": 5, "feed_forward": 6}
    shape = MeshShape(data=2, tensor=2)
    for left, right, result in [(X, W, HIDDEN), (HIDDEN, W, X), (HIDDEN, X, W)]:
        a, b = (torch.randn([sizes[dim] for dim in dims]) for dims in (left, right))
        spell = ["".join(letters[dim] for dim in dims) for dims in (left, right, result)]
        product = f"{spell[0]},{spell[1]}->{spell[2]}"
        whole, summed = torch.einsum(product, a, b), {}
        collectives = product_collectives(left, right, result, layout)
        for at in itertools.product(*map(range, shape.sizes)):
            parts = [
                one[local_slices(one.shape, layout.sharding_of(dims), shape, at)]
                for one, dims in ((a, left), (b, right))
            ]
            # What is summed has one key for all ranks of a group along the axis.
            axes = [axis for _, axis in collectives]
            key = tuple(0 if axis in axes else c for axis, c in zip(AXES, at))
            summed[key] = summed.get(key, 0) + torch.einsum(product, *parts)
        for at, found in summed.items():
            mine = local_slices(whole.shape, layout.sharding_of(result), shape, at)
            torch.testing.assert_close(found, whole[mine])


def test_products_with_strange_dims_are_refused():
    with pytest.raises(InputError, match="'heads'"):
        product_collectives(X, W, (*HIDDEN, "heads"), Layout())
    with pytest.raises(InputError, match="both along"):
        product_collectives(X, W, HIDDEN, TENSOR_PARALLEL.with_rules(("batch", "tensor")))


WHOLE, ROWS, COLUMNS = (
    Sharding(("a", "b"), axes) for axes in ((None, None), ("tensor", None), (None, "tensor"))
)


# Without the all_to_all, which DTensor replaces on gloo by an all_gather.
DTENSOR_CHANGES = [
    (ROWS, WHOLE, False), (COLUMNS, WHOLE, False), (WHOLE, WHOLE, True), (WHOLE, ROWS, True),
    (WHOLE, ROWS, False), (ROWS, ROWS, False),
]  # fmt: skip


def change(comm, collective, part, dim_before, dim_after):
    """Carry a collective out along the dims that it is about."""
    if collective == "all_reduce":
        return comm.all_reduce(part)
    if collective == "all_gather":
        return join_parts(part, comm, dim_before)
    if collective == "reduce_scatter":
        return sum_parts(part, comm, dim_after)
    pieces = torch.cat(part.chunk(comm.world_size, dim_after))
    received = comm.all_to_all(pieces.contiguous()).chunk(comm.world_size)
    return torch.cat(received, dim_before)


@pytest.mark.parametrize(
    ("before", "after", "partial", "collective"),
    [
        (ROWS, WHOLE, False, "all_gather"),
        (COLUMNS, WHOLE, False, "all_gather"),
        (ROWS, COLUMNS, False, "all_to_all"),
        (COLUMNS, ROWS, False, "all_to_all"),
        (WHOLE, WHOLE, True, "all_reduce"),
        (WHOLE, ROWS, True, "reduce_scatter"),
        (WHOLE, COLUMNS, True, "reduce_scatter"),
        (WHOLE, ROWS, False, None),
        (ROWS, ROWS, False, None),
        (WHOLE, WHOLE, False, None),
    ],
)
def test_a_change_of_layout_takes_the_collective_that_brings_it_about(
    before, after, partial, collective
):
    found = change_collectives(before, after, partial=("tensor",) if partial else ())
    assert found == (((collective, "tensor"),) if collective else ())

    def program(comm):
        shape, at = MeshShape(tensor=comm.world_size), (0, 0, comm.rank)
        summands = torch.arange(3 * 6 * 9.0).view(3, 6, 9)
        whole = summands.sum(0) if partial else summands[0]
        given = summands[comm.rank] if partial else whole
        part = given[local_slices(whole.shape, before, shape, at)].contiguous()
        if collective:
            dims = before.dim_along("tensor"), after.dim_along("tensor")
            part = change(comm, collective, part, *dims)
        elif before == WHOLE:
            part = part[local_slices(whole.shape, after, shape, at)]
        assert torch.equal(part, whole[local_slices(whole.shape, after, shape, at)])
        return comm.ledger.num_calls(collective or "send")

    assert run_ranks(program, 3) == [1 if collective else 0] * 3


def test_sequence_parallelism_turns_an_all_reduce_into_two_changes():
    stream, inside = ("batch", "sequence", "model"), ("batch", "position", "model")
    for layout, into, out in (
        (TENSOR_PARALLEL, (), (("all_reduce", "tensor"),)),
        (SEQUENCE_PARALLEL, (("all_gather", "tensor"),), (("reduce_scatter", "tensor"),)),
    ):
        stream_sharding, inside_sharding = layout.sharding_of(stream), layout.sharding_of(inside)
        assert change_collectives(stream_sharding, inside_sharding) == into
        found = change_collectives(inside_sharding, stream_sharding, partial=("tensor",))
        assert found == out


def test_dtensor_takes_the_same_collectives_for_the_same_changes():
    if reason := comm_runtimes.why_not("gloo"):
        pytest.skip(reason)
    names = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}

    def program(comm):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial
        from torch.distributed.tensor.debug import CommDebugMode

        mesh, found = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=AXES), []
        for before, after, partial in DTENSOR_CHANGES:
            given = list(dtensor_placements(before))
            if partial:
                given[AXES.index("tensor")] = Partial()
            tensor = DTensor.from_local(torch.ones(4, 6), mesh, given)
            with CommDebugMode() as counted:
                tensor.redistribute(mesh, dtensor_placements(after))
            calls = [str(call).rpartition(".")[2] for call in counted.get_comm_counts()]
            found.append([names.get(call, call) for call in calls])
        return found

    ours = [
        [name for name, _ in change_collectives(before, after, partial=("tensor",) * partial)]
        for before, after, partial in DTENSOR_CHANGES
    ]
    assert run_ranks(program, 2, backend="gloo") == [ours] * 2


def test_changes_between_different_tensors_and_cut_partial_sums_are_refused():
    with pytest.raises(InputError, match="2 dims"):
        change_collectives(ROWS, Sharding(("a",), (None,)))
    with pytest.raises(InputError, match="either cuts"):
        change_collectives(ROWS, WHOLE, partial=("tensor",))
