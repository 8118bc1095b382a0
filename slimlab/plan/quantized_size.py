"""What a quantized tensor is, in numbers, and how many bytes its file will have, to the byte.

QuantScheme says how numbers become integers; stored_parts, which tensors that leaves;
safetensors_bytes, what a file of such tensors weighs, its table included. Chapter 14 compares the
prediction with the file on the disk.

Production formats (GGUF, AWQ, GPTQ checkpoints) store the same three things, integers, scales and
zero points, in the order in which a GPU kernel reads them.
"""

import json
from dataclasses import dataclass, replace
from math import prod

from slimlab.config import check_choice, check_size, require

BITS = (8, 4, 3, 2)
GRANULARITIES = ("tensor", "channel", "group")
SCALE_DTYPES = ("float32", "bfloat16")
# In the order in which the safetensors library writes types: the last of its own list first.
ITEM_BYTES = {"I64": 8, "F64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class QuantScheme:
    """How a tensor becomes integers: x is about scale * (q - zero_point), Jacob et al. 2018.

    num_bits          8, 4, 3 or 2
    symmetric         zero_point is 0 and q goes from -(2^(b-1) - 1) to 2^(b-1) - 1; otherwise q
                      goes from 0 to 2^b - 1 and zero_point is the q of the number 0
    granularity       what shares one scale: the "tensor", a "channel" (a row of a matrix: one
                      output feature) or a "group" of neighbours in a row
    quant_group_size  numbers in a group; None without groups
    scale_dtype       "float32", or "bfloat16", rounded up so that nothing is clipped

    Raises InputError for a width that is not offered (16 bits is a cast, and not a map to
    integers), an unknown word, or a group size without groups. arXiv:1712.05877.
    """

    num_bits: int = 8
    symmetric: bool = True
    granularity: str = "channel"
    quant_group_size: int | None = None
    scale_dtype: str = "float32"

    def __post_init__(self):
        given = self.num_bits
        whole = isinstance(given, int) and not isinstance(given, bool)
        nearest = min(BITS, key=lambda bits: abs(bits - given)) if whole else BITS[0]
        cast = "; 16 bits is a cast: model.bfloat16()" if given == 16 else ""
        require(
            whole and given in BITS,
            "num_bits, one of 8, 4, 3, 2",
            f"num_bits = {given!r}",
            f"the nearest is {nearest}{cast}",
        )
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        require(
            isinstance(self.symmetric, bool),
            "symmetric, True or False",
            f"symmetric = {self.symmetric!r}",
            "give one of both",
        )
        if self.granularity == "group":
            check_size("quant_group_size", self.quant_group_size)
        else:
            require(
                self.quant_group_size is None,
                'a quant_group_size with granularity="group" only',
                f"granularity = {self.granularity!r}, quant_group_size = {self.quant_group_size}",
                'give granularity="group", or leave quant_group_size out',
            )

    @property
    def lowest(self) -> int:
        """The least integer."""
        return 1 - 2 ** (self.num_bits - 1) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The greatest integer."""
        return 2 ** (self.num_bits - 1) - 1 if self.symmetric else 2**self.num_bits - 1

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of a tensor.

        shape    of the tensor, at least one dimension, none empty
        returns  as many dimensions: all 1; the last one 1; or the last one divided by the groups

        Raises InputError for no or empty dimensions, and if the groups do not divide the last one;
        it names the nearest size that does.
        """
        require(
            len(shape) > 0 and all(shape),
            "a tensor with at least one number",
            f"shape {tuple(shape)}",
            "quantize weights and activations, no empty tensors",
        )
        if self.granularity == "tensor":
            return (1,) * len(shape)
        if self.granularity == "channel":
            return (*shape[:-1], 1)
        size, columns = self.quant_group_size, shape[-1]
        if columns % size:
            asked = f"a quant_group_size that divides the last dimension, {columns}"
            given = f"quant_group_size = {size}, remainder {columns % size}"
            nearest = self.fitted(columns).quant_group_size
            require(False, asked, given, f"the nearest that divides is {nearest}")
        return (*shape[:-1], columns // size)

    def fitted(self, columns: int) -> "QuantScheme":
        """Return the scheme whose groups divide a row; itself without groups.

        columns  numbers in a row: the group becomes its nearest divisor, the smaller of two
        """
        if self.granularity != "group":
            return self
        fitting = [n for n in range(1, columns + 1) if columns % n == 0]
        nearest = min(fitting, key=lambda n: abs(n - self.quant_group_size))
        return replace(self, quant_group_size=nearest)


def packed_columns(num_columns: int, num_bits: int) -> int:
    """Count the bytes of a row of packed integers; every row begins at a whole byte.

    num_columns  integers in a row
    num_bits     of each
    returns      ceil(num_columns * num_bits / 8)
    """
    return -(-num_columns * num_bits // 8)


def stored_parts(
    shape: tuple[int, ...], scheme: QuantScheme
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """List the tensors that stand for one quantized tensor.

    shape    of the tensor
    scheme   how it is quantized
    returns  "packed", "scale" and, if not symmetric, "zero_point": the type's name in a
             safetensors table and the shape

    Raises InputError as QuantScheme.scale_shape does.
    """
    scales = scheme.scale_shape(shape)
    columns = packed_columns(shape[-1], scheme.num_bits)
    kind = "I8" if scheme.symmetric and scheme.num_bits == 8 else "U8"
    parts = {"packed": (kind, (*shape[:-1], columns))}
    parts["scale"] = ("F32" if scheme.scale_dtype == "float32" else "BF16", scales)
    if not scheme.symmetric:
        parts["zero_point"] = ("U8", scales)
    return parts


def bits_per_number(shape: tuple[int, ...], scheme: QuantScheme) -> float:
    """Divide what stands for a quantized tensor by its numbers: scales cost bits too.

    shape    of the tensor
    scheme   how it is quantized
    returns  bits; 4.5 for 4 bits in symmetric groups of 32 with scales of 16 bits
    """
    return 8 * tensors_bytes(stored_parts(shape, scheme)) / prod(shape)


def tensors_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Add up the bytes of tensors, without the table of their file.

    tensors  name -> the type's name in a safetensors table ("F32") and the shape
    """
    return sum(ITEM_BYTES[kind] * prod(shape) for kind, shape in tensors.values())


def safetensors_bytes(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> int:
    """Predict the size of a safetensors file.

    tensors   name -> the type's name ("F32", "I8", ...) and the shape
    metadata  at most one text for the table, since the library writes several in any order
    returns   bytes: 8 for the table's length, the table, filled with spaces to a multiple of 8,
              and the tensors, in the order of ITEM_BYTES and then by name, one behind the other
    """
    table, place = {}, 0
    if metadata:
        table["__metadata__"] = metadata
    kinds = list(ITEM_BYTES)
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name][0]), name))
    for name in order:
        kind, shape = tensors[name]
        end = place + ITEM_BYTES[kind] * prod(shape)
        table[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + place
