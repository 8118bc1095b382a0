"""What the zeros of a pruned matrix save on disk: bytes of four ways to store it, exactly.

Chapter 15 compares them with bytes counted from tensors that slimlab.slim.prune_pack makes. All
read numbers only, of one matrix of R rows and C columns with N elements that are not zero; a file's
header comes on top. Only bytes are predicted: which form multiplies fast is for a clock to say.

Mishra et al. 2021 (arXiv:2104.08378) for 2:4.

Production stores what its kernels read: 2:4 with 2 bits per kept number, blocks instead of single
elements, and indices as differences in fewer bits.
"""

import math

from slimlab.config import check_choice, check_size, require

FORMS = ("dense", "bitmap", "csr", "2:4")
INDEX_BYTES = 4  # of a column or of a place in the values: int32


def stored_bytes(form: str, rows: int, columns: int, num_nonzero: int, item_bytes: int) -> int:
    """Count the bytes of a matrix in one form.

    form         "dense": every element, R C item_bytes;
                 "bitmap": a bit per element, in whole bytes, and the N values;
                 "csr": N values with a column index of 4 bytes each, and R + 1 places where rows
                 begin;
                 "2:4": half of the elements, and 2 bits for the place of each among its four
    rows         R
    columns      C; for 2:4 a multiple of 4
    num_nonzero  N, from 0 to R C; for 2:4 at most half, and the bytes are the same for fewer
    item_bytes   bytes per value: 4 in float32
    returns      bytes

    Raises InputError for an unknown form or numbers that do not fit it.
    """
    check_choice("form", form, FORMS)
    _check_matrix(rows, columns, num_nonzero, item_bytes)
    n_all = rows * columns
    if form == "dense":
        return n_all * item_bytes
    if form == "bitmap":
        return math.ceil(n_all / 8) + num_nonzero * item_bytes
    if form == "csr":
        return num_nonzero * (item_bytes + INDEX_BYTES) + (rows + 1) * INDEX_BYTES
    _check_two_four(columns, n_all, num_nonzero)
    return n_all // 2 * item_bytes + math.ceil(n_all // 2 * 2 / 8)


def largest_num_nonzero(form: str, rows: int, columns: int, item_bytes: int) -> int:
    """Return the most elements that may stay for a form to be smaller than the dense matrix.

    form        "bitmap" or "csr": the two whose size depends on what stays
    rows        R
    columns     C
    item_bytes  bytes per value
    returns     the largest N that saves a byte or more; -1 if even a matrix of zeros does not. In a
                large float32 matrix 97 % of the elements may stay with a bitmap, not quite half
                with CSR.

    Raises InputError as stored_bytes does.
    """
    check_choice("form", form, ("bitmap", "csr"))
    empty = stored_bytes(form, rows, columns, 0, item_bytes)
    each = item_bytes + (INDEX_BYTES if form == "csr" else 0)
    room = stored_bytes("dense", rows, columns, 0, item_bytes) - empty - 1
    return max(room // each, -1)


def _check_matrix(rows: int, columns: int, num_nonzero: int, item_bytes: int) -> None:
    for name, value in {"rows": rows, "columns": columns, "item_bytes": item_bytes}.items():
        check_size(name, value)
    whole = isinstance(num_nonzero, int) and not isinstance(num_nonzero, bool)
    require(
        whole and 0 <= num_nonzero <= rows * columns,
        f"num_nonzero, a whole number from 0 to {rows * columns}",
        f"num_nonzero = {num_nonzero!r}",
        "count the elements that are not zero",
    )


def _check_two_four(columns: int, n_all: int, num_nonzero: int) -> None:
    require(
        columns % 4 == 0 and num_nonzero <= n_all // 2,
        "for 2:4, columns a multiple of 4 and at most half of the elements not zero",
        f"columns = {columns}, {num_nonzero} of {n_all} elements not zero",
        "prune with slimlab.slim.prune_masks.two_four_mask, or choose another form",
    )
