"""Layers whose weights are integers: linear layers of two kinds, and an embedding.

QuantizedLinear keeps the weight small and multiplies in floats: it saves memory, no time.
Int8Linear turns its input into integers too and multiplies in int8, with 32-bit sums: faster where
the processor has instructions for it. Chapter 14 uses both.

Production fuses the rounding of the input with the layer before it, and the scales with the sum.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlab.config import check_number, require
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_maps import Quantized, check_finite, find_map, to_integers
from slimlab.slim.quantize_pack import from_parts, parts_of

ROWS = QuantScheme(8, symmetric=True, granularity="channel")
WHOLE = QuantScheme(8, symmetric=False, granularity="tensor")
MAX_FEATURES = (2**31 - 1) // (128 * 127)  # so many products always fit a sum of 32 bits


class QuantizedWeight(nn.Module):
    """The parts of a quantized tensor, held as buffers, packed as in the file.

    quantized  a matrix; two layers may share one QuantizedWeight, as tied ones share a table

    `shape` and `scheme` are those of the matrix.
    """

    def __init__(self, quantized: Quantized):
        super().__init__()
        self.shape, self.scheme = tuple(quantized.integers.shape), quantized.scheme
        require(len(self.shape) == 2, "a matrix", f"shape {self.shape}", "quantize matrices")
        for name, tensor in parts_of(quantized).items():
            self.register_buffer(name, tensor)

    def quantized(self) -> Quantized:
        """Return the matrix as a Quantized, unpacked."""
        return from_parts(dict(self.named_buffers()), self.shape, self.scheme)

    def rows(self, places: Tensor) -> Tensor:
        """Look up rows and turn them into numbers; the others stay packed.

        places   any shape, int64
        returns  (*places.shape, I) float32
        """
        parts = dict(self.named_buffers())
        if self.scheme.granularity == "tensor":
            shared = {name: part for name, part in parts.items() if name != "packed"}
        else:
            shared = {name: part[places.flatten()] for name, part in parts.items()}
        parts = {**shared, "packed": parts["packed"][places.flatten()]}
        shape = (places.numel(), self.shape[1])
        return from_parts(parts, shape, self.scheme).dequantize().view(*places.shape, shape[1])


class QuantizedEmbedding(nn.Module):
    """An embedding whose table is quantized; only rows that are looked up become numbers.

    table  (V, D)

    forward: ids of any shape to (..., D) float32.
    """

    def __init__(self, table: QuantizedWeight):
        super().__init__()
        self.table = table
        self.num_embeddings, self.embedding_dim = table.shape

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids, int64 of any shape."""
        if ids.numel() == 0:
            return torch.empty(*ids.shape, self.embedding_dim)
        return self.table.rows(ids)


class _IntegerLinear(nn.Module):
    """What both linear layers have: a table of integers, a bias, and the names of nn.Linear."""

    def __init__(self, table: QuantizedWeight, bias: Tensor | None = None):
        super().__init__()
        self.table = table
        self.out_features, self.in_features = table.shape
        own = bias.detach().clone().float() if bias is not None else None
        self.register_buffer("bias", own)
        # Layers around this one ask for the shape and type of its weight; it has no numbers.
        self.weight = torch.empty(table.shape, device="meta")

    def _check(self, x: Tensor) -> None:
        width = self.in_features
        require(
            x.dim() > 0 and x.shape[-1] == width,
            f"x (..., {width})",
            f"x {tuple(x.shape)}",
            "give the features in the last dimension",
        )


class QuantizedLinear(_IntegerLinear):
    """Multiply with a weight that is kept as integers: weight-only quantization, W8A16 and below.

    table  (O, I) any map
    bias   (O,) or None; copied as float32

    forward: x (..., I) float32 to (..., O). The weight becomes numbers for each call.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., O)."""
        self._check(x)
        weight = self.table.quantized().dequantize()
        return F.linear(x.float(), weight, self.bias).to(x.dtype)


class Int8Linear(_IntegerLinear):
    """Multiply integers with integers: weight and activations of 8 bits (W8A8).

    table         (O, I), 8 bits, symmetric, granularity "channel" or "tensor"
    bias          (O,) or None; copied as float32
    input_range   (low, high) of x, as calibration found it: one asymmetric map for all inputs, and
                  what lies outside is clipped. None: a symmetric map for each row of x, found anew
                  in each call.
    smoothing     (I,) or None: x is divided by it; the weight was multiplied with it before it was
                  quantized (arXiv:2211.10438)
    outliers      column numbers of x that are multiplied in float32, or None
    outlier_weight  (O, len(outliers)) the weight's columns for them; those of the table are 0
                  (arXiv:2208.07339)

    forward: x (..., I) float to (..., O): scale_x * scale_w * (q_x - zero_x) @ q_w^T + bias, the
    product in int8 with sums of 32 bits, which are exact.

    Raises InputError for another map, for more columns than a sum of 32 bits holds, and for a
    range, smoothing or outliers that do not fit.
    """

    def __init__(
        self,
        table: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        input_range: tuple[float, float] | None = None,
        smoothing: Tensor | None = None,
        outliers: Tensor | None = None,
        outlier_weight: Tensor | None = None,
    ):
        super().__init__(table, bias)
        scheme = table.scheme
        require(
            scheme.num_bits == 8 and scheme.symmetric and scheme.granularity != "group",
            "a symmetric weight of 8 bits, with a scale per channel or tensor",
            f"{scheme}",
            "use QuantScheme(8), or QuantizedLinear for a weight of another map",
        )
        asked, change = f"at most {MAX_FEATURES:,} columns", "split the layer by columns"
        require(self.in_features <= MAX_FEATURES, asked, f"{self.in_features:,}", change)
        self.input_range = input_range
        scale = zero_point = None
        if input_range is not None:
            low, high = input_range
            for name, value in {"low": low, "high": high}.items():
                check_number(name, value, float, -3.4e38, 3.4e38)
            asked, given = "low, high in this order", f"{low:g}, {high:g}"
            require(low <= high, asked, given, "calibrate again")
            scale, zero_point = find_map(torch.tensor([low]), torch.tensor([high]), WHOLE)
        self.register_buffer("input_scale", scale)
        self.register_buffer("input_zero_point", zero_point)
        self._register_columns(smoothing, outliers, outlier_weight)
        sums = table.packed.sum(dim=1, dtype=torch.int32).float() if scale is not None else None
        self.register_buffer("row_sums", sums, persistent=False)

    def _register_columns(self, smoothing, outliers, outlier_weight) -> None:
        if smoothing is not None:
            shape, lowest = tuple(smoothing.shape), float(smoothing.min())
            asked = f"smoothing ({self.in_features},), above 0"
            fits = shape == (self.in_features,) and 0 < lowest < float("inf")
            require(fits, asked, f"{shape}, from {lowest:g}", "use smoothing_factors")
        if outliers is not None:
            wanted = (self.out_features, len(outliers))
            given = None if outlier_weight is None else tuple(outlier_weight.shape)
            change = "give weight[:, outliers]"
            require(given == wanted, f"outlier_weight {wanted}", f"{given}", change)
        self.register_buffer("smoothing", smoothing)
        self.register_buffer("outliers", outliers)
        self.register_buffer("outlier_weight", outlier_weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., I) to (..., O)."""
        self._check(x)
        rows = x.detach().float().reshape(-1, self.in_features)
        if self.smoothing is not None:
            rows = rows / self.smoothing
        loud = None
        if self.outliers is not None:
            loud = self._join(rows[:, self.outliers] @ self.outlier_weight.t(), "sum")
            rows = rows.index_fill(1, self.outliers, 0.0)
        output = self._static(rows) if self.input_scale is not None else self._dynamic(rows)
        if loud is not None:
            output = output.add_(loud)
        if self.bias is not None:
            output = output.add_(self.bias)
        return output.view(*x.shape[:-1], self.out_features).to(x.dtype)

    def _join(self, found: Tensor, op: str) -> Tensor:
        # Where ranks share the columns (quantize_parallel_layers) they combine what each has found.
        return found

    def _dynamic(self, rows: Tensor) -> Tensor:
        # amax sees NaN and infinity as well: the scale then is not finite, and so is the output.
        scale = self._join(rows.abs().amax(dim=1, keepdim=True), "max").div_(ROWS.highest)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        places = (rows / scale).round_().clamp_(ROWS.lowest, ROWS.highest).to(torch.int8)
        sums = self._join(multiply(places, self.table.packed), "sum")
        return sums.float() * scale * self._weight_scale()

    def _static(self, rows: Tensor) -> Tensor:
        check_finite(rows, "x")
        return self._unshifted(multiply(self._shifted(rows), self.table.packed))

    def _shifted(self, rows: Tensor) -> Tensor:
        zero = self.input_zero_point[:, None]
        places = to_integers(rows, self.input_scale[:, None], zero, WHOLE)
        # The product takes signed bytes: 128 is subtracted from x, and added again to its zero.
        return (places.to(torch.int16) - 128).to(torch.int8)

    def _unshifted(self, sums: Tensor) -> Tensor:
        sums = sums.double() - (float(self.input_zero_point) - 128) * self.row_sums
        return sums.float() * self.input_scale * self._weight_scale()

    def _weight_scale(self) -> Tensor:
        return self.table.scale.float().view(1, -1)


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply two matrices of int8 exactly.

    x        (N, I) int8
    weight   (O, I) int8, contiguous
    returns  (N, O) int32: x @ weight^T
    """
    if len(x) == 0:
        return torch.zeros(0, len(weight), dtype=torch.int32)
    if x.shape[1] == 1:  # torch 2.13 mistakes the strides of a transposed matrix of one column
        return x.int() * weight.int().t()
    # A transposed view is what oneDNN multiplies fast; a transposed copy costs three times as much.
    return torch._int_mm(x.contiguous(), weight.t())
