"""Parts of a tensor along its first dim, one per rank: checks of the sizes that cut it.

Chapter 07 cuts tensors into parts. MPI calls the uneven forms by other names (MPI_Allgatherv) and
takes counts of elements with offsets; torch.distributed takes lists of tensors.
"""

from collections.abc import Sequence

from torch import Tensor

from slimlab.config import require


def check_rows(call: str, tensor: Tensor) -> None:
    """Refuse a tensor without a first dim to cut or to join along.

    call    name of the method
    tensor  its payload

    Raises InputError.
    """
    require(
        tensor.dim() > 0,
        f"{call}: a tensor with at least one dim, along which parts are joined",
        "a tensor of shape ()",
        "write tensor.reshape(1)",
    )


def check_sizes(call: str, sizes: Sequence[int], world_size: int, total: int | None) -> list[int]:
    """Check the sizes of the ranks' parts along dim 0.

    call        name of the method
    sizes       one whole number of at least 0 per rank
    world_size  number of ranks
    total       what they must add up to; None: anything
    returns     the sizes as a list

    Raises InputError.
    """
    sizes = list(sizes)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes)
    require(
        len(sizes) == world_size and whole,
        f"{call}: sizes of {world_size} parts, one per rank, whole numbers of at least 0",
        f"{sizes}",
        "give every rank the same list, in rank order",
    )
    require(
        total is None or sum(sizes) == total,
        f"{call}: sizes that add up to the {total} rows of the tensor",
        f"{sizes}, together {sum(sizes)}",
        "let the sizes add up to tensor.shape[0]",
    )
    return sizes


def equal_sizes(call: str, num_rows: int, world_size: int) -> list[int]:
    """Return the sizes of equal parts along dim 0.

    call        name of the method
    num_rows    rows to divide
    world_size  number of ranks

    Raises InputError if the rows do not divide.
    """
    require(
        num_rows % world_size == 0,
        f"{call}: a number of rows (dim 0) that {world_size} ranks divide",
        f"{num_rows} rows",
        "pad the tensor, or give sizes=[...] with one number of rows per rank",
    )
    return [num_rows // world_size] * world_size


def short_sizes(sizes: Sequence[int]) -> str:
    """Write sizes as tables show them.

    sizes  rows per rank
    """
    sizes = list(sizes)
    if len(set(sizes)) <= 1:
        return f"{sizes[0]} each"
    return str(sizes)
