"""PowerSGD: a gradient matrix travels as the product of two thin ones.

Chapter 08 uses it. A matrix M of n x m is replaced by P Q^T, with r columns each: r (n + m) numbers
instead of n m. One step of the power iteration finds them: P is an orthonormal basis of the sum of
M Q over the ranks, with the Q of the step before (warm start), and the new Q is the sum of M^T P.
Both sums are linear in M, so two all_reduces do it. Vogels et al. 2019 (arXiv:1905.13727).

What a rank sends is P P^T M. The paper keeps M minus that as the rank's residual, as here; torch's
hook keeps M minus the mean of all ranks. Summed over the ranks, both are the same.

A matrix that is higher than wide is transposed, so that P belongs to the shorter side: with r equal
to that side P P^T is the identity, whatever M is, and nothing is lost.

Production (torch's powerSGD_hook) sends vectors in a call of their own and starts after some plain
steps, since DistributedDataParallel still changes its buckets then.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from slimlab.comm.base import Communicator
from slimlab.config import check_number, check_size, require
from slimlab.parallel.compression import Compressor

OTHER_BUCKET = 1_000_003  # keeps the seeds of buckets apart


class PowerSGD(Compressor):
    """Matrices as products of thin ones; vectors, and matrices that would not get smaller, whole.

    A parameter with more than two dims is a matrix of its first dim and all others. Computed and
    sent in float32 where gradients have 16 bits.

    rank                  r, columns of P and Q; of smaller matrices their shorter side
    min_compression_rate  a matrix is compressed if it has more than this many times the numbers of
                          P and Q together; 0: compress all
    seed                  of the first Q, the same on every rank
    error_feedback        as in slimlab.parallel.compression.Compressor

    factors               number of a bucket -> the Q of each compressed matrix, the same on every
                          rank

    Raises InputError for numbers out of range.
    """

    def __init__(
        self,
        rank: int = 2,
        *,
        min_compression_rate: float = 1.0,
        seed: int = 0,
        error_feedback: bool = True,
    ):
        super().__init__(error_feedback=error_feedback)
        check_size("rank", rank)
        check_number("min_compression_rate", min_compression_rate, float, 0, math.inf)
        check_number("seed", seed, int, 0, 2**32)
        self.rank, self.min_compression_rate, self.seed = rank, min_compression_rate, seed
        self.factors: dict[int, list[Tensor]] = {}
        self._pending_factors: dict[int, list[Tensor]] = {}

    def check(self, shapes: Sequence[torch.Size]) -> None:
        """Refuse a rank at which nothing is compressed, or that no matrix has.

        shapes  of all parameters that are trained

        Communicates: nothing.
        Raises InputError with the largest rank that there is.
        """
        sides = [_sides(shape) for shape in shapes if len(shape) >= 2]
        require(
            bool(sides),
            "PowerSGD: a parameter with at least two dims",
            f"{len(shapes)} parameters with at most one",
            "use Half() or TopK(), which compress vectors too",
        )
        ranks = [rank for n, m in sides for rank in range(1, n + 1) if self._saves(n, m, rank)]
        largest = max(ranks, default=0)
        require(
            self.rank <= largest,
            f"PowerSGD: a rank from 1 to {largest}, at which some matrix has more than "
            f"{self.min_compression_rate:g} times the numbers of its factors",
            f"rank = {self.rank}, the largest matrix is {max(sides)}",
            f"choose a rank up to {largest}, or min_compression_rate=0"
            if largest
            else "choose a smaller min_compression_rate; 0 compresses every matrix",
        )

    def begin_step(self) -> None:
        """Forget what a step that was given up has left behind."""
        super().begin_step()
        self._pending_factors = {}

    def _keep(self) -> None:
        super()._keep()
        self.factors = self._pending_factors

    def _exchange(self, number, flat, shapes, comm: Communicator):
        work = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
        parts = [p.view(s) for p, s in zip(work.split([s.numel() for s in shapes]), shapes)]
        thin = [self._compresses(shape) for shape in shapes]
        matrices = [_wide(part) for part, is_thin in zip(parts, thin) if is_thin]
        whole = [part for part, is_thin in zip(parts, thin) if not is_thin]
        before = self.factors.get(number) or self._first_factors(number, matrices)
        products = [matrix @ orthonormal(q) for matrix, q in zip(matrices, before)]
        summed = _all_reduce([*products, *whole], comm)
        bases = [orthonormal(product) for product in summed[: len(matrices)]]
        mine = [matrix.T @ basis for matrix, basis in zip(matrices, bases)]
        factors = _all_reduce(mine, comm) if matrices else []
        self._pending_factors[number] = factors
        total = _put_together(shapes, thin, bases, factors, summed[len(matrices) :])
        sent = _put_together(shapes, thin, bases, mine, whole)
        return total.to(flat.dtype), sent.to(flat.dtype)

    def _saves(self, num_rows: int, num_columns: int, rank: int) -> bool:
        factors = (num_rows + num_columns) * rank
        return factors * self.min_compression_rate < num_rows * num_columns

    def _compresses(self, shape: torch.Size) -> bool:
        if len(shape) < 2:
            return False
        n, m = _sides(shape)
        return self._saves(n, m, min(self.rank, n))

    def _first_factors(self, number: int, matrices: Sequence[Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * OTHER_BUCKET + number)
        return [
            torch.randn(m.shape[1], min(self.rank, m.shape[0]), generator=generator).to(m)
            for m in matrices
        ]


def orthonormal(matrix: Tensor) -> Tensor:
    """Find orthonormal columns that span those of a matrix, and more if they do not span enough.

    matrix   (n, r), n >= r
    returns  (n, r), its columns of length 1 and at right angles; the same bits on every rank that
             has the same bits, the same library and the same kind of processor
    """
    return torch.linalg.qr(matrix).Q


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shorter and the longer side of a parameter that is taken for a matrix."""
    rows, columns = shape[0], math.prod(shape[1:])
    return min(rows, columns), max(rows, columns)


def _wide(tensor: Tensor) -> Tensor:
    matrix = tensor.reshape(tensor.shape[0], -1)
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _all_reduce(tensors: Sequence[Tensor], comm: Communicator) -> list[Tensor]:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    flat = comm.all_reduce(flat, out=flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


def _put_together(shapes, thin, bases, factors, whole) -> Tensor:
    pairs, whole, parts = iter(zip(bases, factors)), iter(whole), []
    for shape, is_thin in zip(shapes, thin):
        if not is_thin:
            parts.append(next(whole).reshape(-1))
            continue
        basis, factor = next(pairs)
        matrix = basis @ factor.T
        is_high = shape[0] > shape[1:].numel()
        parts.append((matrix.T if is_high else matrix).reshape(-1))
    return torch.cat(parts)
