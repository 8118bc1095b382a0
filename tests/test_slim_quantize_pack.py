"""Packed integers and their folder: each comes back bit for bit, and weighs as predicted."""

import json

import pytest
import torch
from safetensors import safe_open

from slimlab.config import InputError
from slimlab.model.tensor_files import check_state, read_tensors, write_tensors
from slimlab.plan.quantized_size import (
    BITS,
    ITEM_BYTES,
    QuantScheme,
    safetensors_bytes,
    stored_parts,
)
from slimlab.slim import quantize_pack
from slimlab.slim.quantize_maps import Quantized, quantize
from slimlab.slim.quantize_pack import (
    METADATA,
    TABLE,
    TENSORS,
    load_quantized,
    pack,
    save_quantized,
    unpack,
)
from slimlab.train.checkpoint import load_checkpoint, save_checkpoint

SCHEMES = [
    QuantScheme(bits, symmetric, granularity, 5 if granularity == "group" else None, scales)
    for bits in BITS
    for symmetric in (True, False)
    for granularity in ("tensor", "channel", "group")
    for scales in ("float32", "bfloat16")
]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same(one, other):
    if not isinstance(one, Quantized):
        return one.dtype == other.dtype and torch.equal(one, other)
    zeros = (one.zero_point is None, other.zero_point is None)
    return (
        one.scheme == other.scheme
        and one.integers.dtype == other.integers.dtype
        and torch.equal(one.integers, other.integers)
        and torch.equal(one.scale, other.scale)
        and (all(zeros) or torch.equal(one.zero_point, other.zero_point))
    )


def test_packed_bytes_are_those_by_hand():
    four = torch.tensor([[1, 2, 15]], dtype=torch.uint8)
    assert pack(four, QuantScheme(4, False)).tolist() == [[0x21, 0x0F]]
    two = torch.tensor([[3, 0, 1, 2, 1]], dtype=torch.uint8)
    assert pack(two, QuantScheme(2, False)).tolist() == [[0b10010011, 0b01]]
    three = torch.tensor([[7, 0, 5]], dtype=torch.uint8)
    assert pack(three, QuantScheme(3, False)).tolist() == [[0b01000111, 0b1]]
    signed = torch.tensor([[-7, 0, 7]], dtype=torch.int8)
    assert pack(signed, QuantScheme(4)).tolist() == [[0x70, 0x0E]]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_integer_of_a_width_survives_packing_at_every_place(bits, symmetric):
    scheme = QuantScheme(bits, symmetric)
    kind = torch.int8 if symmetric else torch.uint8
    values = torch.arange(scheme.lowest, scheme.highest + 1).to(kind)
    for columns in (1, 2, 3, 7, 8, 9):
        integers = values[
            (torch.arange(len(values))[:, None] + torch.arange(columns)) % len(values)
        ]
        packed = pack(integers, scheme)
        assert packed.shape == (len(values), -(-columns * bits // 8))
        back = unpack(packed, columns, scheme)
        assert back.dtype == kind
        assert torch.equal(back, integers)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_format_comes_back_bit_for_bit_and_weighs_as_predicted(scheme, tmp_path):
    tensors = {
        "a.weight": quantize(numbers(7, 15), scheme),
        "b": quantize(numbers(5, seed=1), scheme),
        "c": quantize(numbers(2, 3, 10, seed=2), scheme),
        "norm": numbers(7),
    }
    folder = save_quantized(tmp_path / "small", tensors, {"steps": 3})
    found = load_quantized(folder)
    assert found.config == {"steps": 3}
    assert found.tensors.keys() == tensors.keys()
    assert all(same(tensors[name], found.tensors[name]) for name in tensors)
    again = save_quantized(tmp_path / "again", found.tensors, found.config)
    assert (folder / TENSORS).read_bytes() == (again / TENSORS).read_bytes()

    shapes = {"a.weight": (7, 15), "b": (5,), "c": (2, 3, 10)}
    predicted = {"norm": ("F32", (7,))}
    for name, shape in shapes.items():
        parts = stored_parts(shape, scheme).items()
        predicted |= {f"{name}.{part}": one for part, one in parts}
    assert (folder / TENSORS).stat().st_size == safetensors_bytes(predicted, METADATA)


def test_the_size_of_an_ordinary_file_is_predicted_too(tmp_path):
    for count in range(8):  # the table is filled to a multiple of 8, at every remainder
        tensors = {f"n{'x' * count}": numbers(3, 5), "a": numbers(2).bfloat16()}
        kinds = {name: ("F32", (3, 5)) for name in tensors} | {"a": ("BF16", (2,))}
        write_tensors(tmp_path / "file.safetensors", tensors)
        assert (tmp_path / "file.safetensors").stat().st_size == safetensors_bytes(kinds)


def test_types_of_one_size_stand_in_the_librarys_own_order(tmp_path):
    types = {"I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32}
    types |= {"BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}
    assert types.keys() == ITEM_BYTES.keys()
    # the offsets of the longest have more digits than the others': the order decides the size
    for length in (1, 99, 100_000):
        for code in types:
            sizes = {f"n{k}": length if k == code else 1 for k in types}
            tensors = {f"n{k}": torch.zeros(sizes[f"n{k}"], dtype=one) for k, one in types.items()}
            write_tensors(tmp_path / "file.safetensors", tensors)
            kinds = {f"n{k}": (k, (sizes[f"n{k}"],)) for k in types}
            assert (tmp_path / "file.safetensors").stat().st_size == safetensors_bytes(kinds)


def test_the_file_is_safetensors_that_other_programs_read(tmp_path):
    folder = save_quantized(tmp_path / "small", {"w": quantize(numbers(4, 6), QuantScheme(4))})
    with safe_open(folder / TENSORS, "pt") as file:
        assert sorted(file.keys()) == ["w.packed", "w.scale"]
        assert file.metadata() == METADATA


def test_an_ordinary_checkpoint_is_refused_by_name(tmp_path):
    model = torch.nn.Linear(3, 2)
    path = save_checkpoint(tmp_path, model=model, step=1)
    with pytest.raises(InputError, match="an ordinary checkpoint"):
        load_quantized(path)
    with pytest.raises(InputError, match=f"no {TABLE}"):
        load_quantized(tmp_path)


def test_a_quantized_folder_is_refused_as_an_ordinary_checkpoint(tmp_path):
    model = torch.nn.Linear(3, 2)
    tensors = {"weight": quantize(model.weight, QuantScheme()), "bias": model.bias}
    folder = save_quantized(tmp_path / "small", tensors)
    with pytest.raises(InputError, match=TABLE):
        load_checkpoint(folder, model)
    with pytest.raises(InputError, match=r"missing weight; left over weight\.(scale|packed)"):
        check_state(model, read_tensors(folder / TENSORS), str(folder))


def test_a_folder_that_exists_is_not_touched(tmp_path):
    folder = save_quantized(tmp_path / "small", {"w": numbers(2)})
    before = (folder / TENSORS).read_bytes()
    with pytest.raises(InputError, match="does not exist"):
        save_quantized(folder, {"w": numbers(2, seed=1)})
    assert (folder / TENSORS).read_bytes() == before


def test_nothing_is_left_of_a_folder_that_could_not_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize_pack, "write_json", full)
    with pytest.raises(InputError, match="No space left"):
        save_quantized(tmp_path / "small", {"w": numbers(2)})
    assert list(tmp_path.iterdir()) == []


def test_a_changed_or_a_cut_file_is_refused(tmp_path):
    folder = save_quantized(tmp_path / "small", {"w": quantize(numbers(8, 8), QuantScheme(4))})
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match="SHA-256"):
        load_quantized(folder)
    (folder / TENSORS).write_bytes(data[:-3])
    with pytest.raises(InputError, match="instead of"):
        load_quantized(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"format": "another"}, "format 'another'"),
        ({"maps": {"w": {"shape": [8, 8], "scheme": {"num_bits": 3}}}}, "the parts"),
        ({"maps": {"v": {"shape": [8, 8], "scheme": {}}}}, "v.packed, v.scale missing"),
        ({"maps": {"w": {"shape": [8, 8], "scheme": {"num_bits": 5}}}}, "damaged"),
        ({"maps": {"w": {"scheme": {}}}}, "damaged"),
        ({"maps": {"w": {"shape": ["8", 8], "scheme": {}}}}, "damaged"),
        ({"maps": {"w": {"shape": [8.0, 8.0], "scheme": {"num_bits": 4}}}}, "damaged"),
        ({"files": {}}, "damaged"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, message, tmp_path):
    folder = save_quantized(tmp_path / "small", {"w": quantize(numbers(8, 8), QuantScheme(4))})
    table = json.loads((folder / TABLE).read_text()) | change
    (folder / TABLE).write_text(json.dumps(table))
    with pytest.raises(InputError, match=message):
        load_quantized(folder)
