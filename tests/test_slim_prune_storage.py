"""Storage of pruned matrices: every form comes back bit for bit, formulas equal counted bytes."""

import pytest
import torch
from safetensors.torch import save_file

from slimlab.config import InputError
from slimlab.plan.sparse_storage import FORMS, largest_num_nonzero, stored_bytes
from slimlab.slim.prune_masks import two_four_mask
from slimlab.slim.prune_pack import counted_bytes, pack_sparse, unpack_sparse
from slimlab.slim.prune_scores import magnitude_masks

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SHAPES = ((5, 8), (1, 4), (7, 12), (3, 4))


def pruned(shape, sparsity, dtype=torch.float32, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return weight * magnitude_masks({"w": weight}, sparsity)["w"]


def refused(call, *expected):
    with pytest.raises(InputError) as caught:
        call()
    for text in expected:
        assert text in str(caught.value), str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_bit_for_bit_and_has_the_predicted_bytes(form, shape, dtype):
    for sparsity in (0.0, 0.3, 0.5, 0.7):
        weight = pruned(shape, sparsity, dtype)
        if form == "2:4":
            weight = weight * two_four_mask(weight)
        before = weight.clone()
        packed = pack_sparse(weight, form)
        assert torch.equal(unpack_sparse(packed, form, shape), weight)
        assert torch.equal(weight, before)
        n = int((weight != 0).sum())
        assert counted_bytes(packed) == stored_bytes(form, *shape, n, weight.element_size())


def test_odd_shapes_fill_the_last_byte():
    weight = pruned((3, 5), 0.4)
    packed = pack_sparse(weight, "bitmap")
    assert packed["bits"].numel() == 2
    assert torch.equal(unpack_sparse(packed, "bitmap", (3, 5)), weight)


def test_bits_and_places_by_hand():
    weight = torch.tensor([[0.0, 5.0, 0.0, 6.0], [0.0, 0.0, 0.0, 7.0]])
    bitmap = pack_sparse(weight, "bitmap")
    assert bitmap["bits"].tolist() == [0b1000_1010]
    assert bitmap["values"].tolist() == [5.0, 6.0, 7.0]
    packed = pack_sparse(weight, "2:4")  # places 1 and 3; then 0, a zero that is kept, and 3
    assert packed["places"].tolist() == [0b11_00_11_01]
    assert packed["values"].tolist() == [5.0, 6.0, 0.0, 7.0]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_csr_is_that_of_torch():
    weight = pruned((9, 14), 0.6)
    packed, theirs = pack_sparse(weight, "csr"), weight.to_sparse_csr()
    assert torch.equal(packed["values"], theirs.values())
    assert torch.equal(packed["columns"].long(), theirs.col_indices())
    assert torch.equal(packed["row_starts"].long(), theirs.crow_indices())


def test_at_half_zeros_dense_saves_nothing_and_csr_is_larger():
    weight = pruned((256, 256), 0.5)
    sizes = {form: counted_bytes(pack_sparse(weight, form)) for form in ("dense", "csr", "bitmap")}
    assert sizes == {"dense": 262_144, "csr": 263_172, "bitmap": 139_264}
    assert stored_bytes("2:4", 256, 256, 32_768, 4) == 139_264


def test_the_file_on_disk_differs_by_its_header_only(tmp_path):
    weight = pruned((64, 64), 0.75)
    for form in ("dense", "csr", "bitmap"):
        path = tmp_path / f"{form}.safetensors"
        packed = pack_sparse(weight, form)
        save_file(packed, path)
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        predicted = stored_bytes(form, 64, 64, 1024, 4)
        assert path.stat().st_size == header + predicted


@pytest.mark.parametrize("form", ["bitmap", "csr"])
@pytest.mark.parametrize("matrix", [(256, 256, 4), (10, 3, 2), (64, 7, 1), (1, 1, 4)])
def test_the_largest_count_that_saves_is_the_last_one_that_does(form, matrix):
    rows, columns, item_bytes = matrix
    dense = stored_bytes("dense", rows, columns, 0, item_bytes)
    saving = [
        n
        for n in range(rows * columns + 1)
        if stored_bytes(form, rows, columns, n, item_bytes) < dense
    ]
    assert largest_num_nonzero(form, *matrix) == max(saving, default=-1)


def test_bad_input_is_refused():
    weight = torch.ones(2, 8)
    refused(lambda: pack_sparse(weight, "coo"), "dense, bitmap, csr, 2:4")
    refused(lambda: pack_sparse(weight, "2:4"), "two_four_mask")
    refused(lambda: pack_sparse(weight[0], "csr"), "(8,)")
    refused(lambda: pack_sparse(weight * float("nan"), "csr"), "16 of 16")
    packed = pack_sparse(weight, "csr")
    refused(lambda: unpack_sparse(packed, "bitmap", (2, 8)), "values, bits", "row_starts")
    refused(lambda: unpack_sparse(packed, "csr", (3, 8)), "'row_starts': 4", "'row_starts': 3")
    for shape in ((-2, -8), (2.0, 8.0), (2,)):
        refused(lambda shape=shape: unpack_sparse(packed, "csr", shape), "(R, C)", str(shape))
    bitmap = pack_sparse(weight, "bitmap")
    refused(lambda: unpack_sparse(bitmap, "bitmap", (4, 8)), "'bits': 4", "'bits': 2")
    refused(lambda: stored_bytes("csr", 2, 3, 7, 4), "from 0 to 6", "num_nonzero = 7")
    refused(lambda: stored_bytes("csr", 0, 3, 0, 4), "rows = 0")
    refused(lambda: stored_bytes("2:4", 2, 6, 6, 4), "columns = 6")
    refused(lambda: stored_bytes("2:4", 2, 4, 5, 4), "5 of 8")
    refused(lambda: largest_num_nonzero("dense", 2, 4, 4), "bitmap, csr")
