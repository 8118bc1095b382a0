"""Three ways to lose less than by rounding every number to the nearest.

compensated_rounding moves the error of each column into the columns that are still to be rounded;
smoothing_factors move the loud columns of the input into the weight; outlier_columns names those
that are better multiplied in floats. Chapter 14 measures each at equal bits.

Production rounds blocks of 128 columns at a time on a GPU, with the same result.
"""

import torch
from torch import Tensor

from slimlab.config import InputError, check_number, require
from slimlab.plan.quantized_size import QuantScheme
from slimlab.slim.quantize_maps import (
    Quantized,
    check_finite,
    find_map,
    from_integers,
    quantize,
    range_of,
    to_integers,
)

SMALLEST = 1e-5


def compensated_rounding(
    weight: Tensor, squares: Tensor, scheme: QuantScheme, *, damping: float = 0.01
) -> Quantized:
    """Round a weight column by column, and let the columns to come make up for each error.

    The aim is the least |W X - Q X|^2 for the inputs X that were seen. With H = X X^T and U the
    upper factor of the inverse, H^-1 = U^T U, the error e = (w_j - q_j) / U_jj of column j is
    taken out of the later ones: w_k -= e U_jk. The scales of a group are found when its first
    column is reached, from weights that are corrected already; scales of rows and of the tensor
    from the weight as it came.

    weight   (O, I)
    squares  (I, I) the sum of x x^T, of calibration
    scheme   the map
    damping  this part of the mean of the diagonal is added to it, since few inputs leave H
             without an inverse
    returns  a Quantized

    Raises InputError for shapes that do not fit, numbers that are not finite, groups that do not
    divide. Frantar et al. 2022 (arXiv:2210.17323).
    """
    check_squares(weight, squares)
    nearest = quantize(weight, scheme)
    work = weight.detach().double().clone()
    factor = inverse_factor(squares, damping)
    scale, zero_point = nearest.scale.clone(), nearest.zero_point
    zero_point = None if zero_point is None else zero_point.clone()
    integers = nearest.integers.clone()
    columns = work.shape[1]
    width = columns // scale.shape[1]  # columns that share the scales of their rows
    for column in range(columns):
        group = column // width
        if scheme.granularity == "group" and column % width == 0:
            block = work[:, column : column + width].float()
            scale[:, group : group + 1], new = find_map(*range_of(block, scheme), scheme)
            if zero_point is not None:
                zero_point[:, group : group + 1] = new
        own = scale[:, group : group + 1]
        zero = None if zero_point is None else zero_point[:, group : group + 1]
        before = work[:, column : column + 1]
        rounded = to_integers(before, own, zero, scheme)
        integers[:, column : column + 1] = rounded
        pass_error_on(work, factor, column, from_integers(rounded, own, zero).double())
    return Quantized(integers, scale, zero_point, scheme)


def check_squares(weight: Tensor, squares: Tensor) -> None:
    """Refuse squares that are not those of the inputs of a layer.

    weight   (O, I)
    squares  (I, I) finite
    """
    shape, wanted = tuple(squares.shape), (weight.shape[-1],) * 2
    fits = weight.dim() == 2 and shape == wanted
    change = "record the inputs of this layer"
    require(fits, f"squares {wanted}", f"{shape}, weight {tuple(weight.shape)}", change)
    check_finite(squares, "squares")


def inverse_factor(squares: Tensor, damping: float) -> Tensor:
    """Return U, upper triangular, with U^T U the inverse of the damped squares.

    squares  (I, I) the sum of x x^T; a column that was never used counts as one that is used by
             itself, so that nothing is passed on from it
    damping  this part of the mean of the diagonal is added to it, above 0
    returns  (I, I) float64

    Raises InputError for squares that are no sum of x x^T.
    """
    check_number("damping", damping, float, 0, 1, above=True)
    squares = squares.double().clone()
    diagonal = squares.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(squares))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        asked = "squares that are a sum of x x^T, symmetric and none negative"
        given = f"{tuple(squares.shape)} that have no inverse with damping = {damping:g}"
        change = "give record_inputs(..., squares=True), or more damping"
        raise InputError(asked, given, change) from error


def pass_error_on(work: Tensor, factor: Tensor, column: int, chosen: Tensor) -> None:
    """Let the columns to come make up for what one column has become.

    work    (O, I) float64, its columns after `column` are changed in place
    factor  of inverse_factor
    column  its number
    chosen  (O, 1) what is put in its place: rounded, or zero
    """
    error = (work[:, column : column + 1] - chosen) / factor[column, column]
    work[:, column + 1 :] -= error * factor[column, column + 1 :]


def output_error(weight: Tensor, changed: Quantized | Tensor, squares: Tensor) -> float:
    """Measure what rounding or pruning does to the outputs of a layer, |W X - Q X| / |W X|.

    weight   (O, I)
    changed  Q, of the same shape
    squares  (I, I) the sum of x x^T
    returns  a part; 0 if W X is 0
    """
    squares = squares.double()
    weight = weight.detach().double()
    changed = changed.dequantize() if isinstance(changed, Quantized) else changed.detach()
    moved = weight - changed.double()
    lost, whole = (float(((one @ squares) * one).sum()) for one in (moved, weight))
    return (max(lost, 0.0) / whole) ** 0.5 if whole > 0 else 0.0


def smoothing_factors(column_max: Tensor, weight: Tensor, *, strength: float = 0.5) -> Tensor:
    """Find by what to divide every input column, and to multiply the weight's, for even ranges.

    s_j = max|X_j|^a / max|W_j|^(1-a), so X / s times W s is X W.

    column_max  (I,) greatest absolute value of every input column
    weight      (O, I)
    strength    a, from 0 to 1: 0 evens out the weight alone, 1 the input alone
    returns     (I,) float32, above 0; 1 where a column is 0 on either side

    Raises InputError for another strength, shapes that do not fit, numbers that are not finite.
    Xiao et al. 2022 (arXiv:2211.10438).
    """
    check_number("strength", strength, float, 0, 1)
    fits = weight.dim() == 2 and tuple(column_max.shape) == (weight.shape[1],)
    given = f"{tuple(column_max.shape)}, weight {tuple(weight.shape)}"
    require(fits, f"column_max ({weight.shape[-1]},)", given, "record the inputs of this layer")
    check_finite(column_max, "column_max")
    check_finite(weight, "the weight")
    inputs, weights = column_max.float(), weight.detach().float().abs().amax(dim=0)
    factors = inputs.clamp(min=SMALLEST) ** strength
    factors = factors / weights.clamp(min=SMALLEST) ** (1 - strength)
    return torch.where((inputs == 0) | (weights == 0), torch.ones_like(factors), factors)


def outlier_columns(column_max: Tensor, *, threshold: float = 6.0) -> Tensor:
    """Name the input columns that are too loud to share a scale with the others.

    column_max  (I,) greatest absolute value of every input column
    threshold   columns at or above it are outliers; 6 is the paper's choice for its models
    returns     their numbers, int64, rising

    Raises InputError for a threshold that is not above 0. Dettmers et al. 2022 (arXiv:2208.07339).
    """
    check_number("threshold", threshold, float, 0, float("inf"), above=True)
    check_finite(column_max, "column_max")
    return (column_max >= threshold).nonzero().view(-1)
