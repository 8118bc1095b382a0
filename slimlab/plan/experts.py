"""What expert parallelism sends, per rank, exactly, given how many tokens the router sends where.

Chapter 09 predicts with it, and compares with what the ledgers counted. The router decides while it
runs, so the numbers of rows are an input here; over all ranks the payload does not depend on them,
but its division among the ranks does, and the slowest rank is the one with the popular experts.

Lepikhin et al. 2020 (arXiv:2006.16668), section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from slimlab.config import check_divides, check_number, check_size, require

COUNT_BYTES = 8  # of each number of rows


@dataclass(frozen=True)
class ExpertTraffic:
    """What one rank hands to all_to_all in one layer.

    counts_bytes  the numbers of rows for all experts
    there_bytes   rows on their way to their experts
    back_bytes    results on their way back

    Gradients travel both ways once more in the backward pass: five calls in all, or none.
    """

    counts_bytes: int
    there_bytes: int
    back_bytes: int

    @property
    def forward_bytes(self) -> int:
        """The payload of three calls."""
        return self.counts_bytes + self.there_bytes + self.back_bytes

    @property
    def backward_bytes(self) -> int:
        """The payload of two calls: the gradients of the results go there, those of rows back."""
        return self.there_bytes + self.back_bytes


def predict_experts(
    rows: Sequence[Sequence[int]], d_model: int, item_bytes: int
) -> tuple[ExpertTraffic, ...]:
    """Predict what each rank hands to all_to_all in one layer.

    rows        rows[rank][expert]: tokens of a rank that visit an expert; each token stands in
                top_k of them
    d_model     D
    item_bytes  bytes per element
    returns     for each rank; nothing is sent where there is one

    Raises InputError for tables that are no rectangle of whole numbers, and ranks that do not
    divide the experts.
    """
    _check_rows(rows)
    check_size("d_model", d_model)
    check_size("item_bytes", item_bytes)
    if len(rows) == 1:
        return (ExpertTraffic(0, 0, 0),)
    row_bytes = d_model * item_bytes
    return tuple(
        ExpertTraffic(len(mine) * COUNT_BYTES, sum(mine) * row_bytes, arriving * row_bytes)
        for mine, arriving in zip(rows, rows_per_rank(rows))
    )


def rows_per_rank(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Add up the rows that each rank's experts compute.

    rows     as in predict_experts
    returns  rows of each rank; the largest over the mean is how much longer all wait for the one

    Raises InputError as predict_experts does.
    """
    _check_rows(rows)
    here = len(rows[0]) // len(rows)
    per_expert = [sum(column) for column in zip(*rows)]
    return tuple(sum(per_expert[rank * here : (rank + 1) * here]) for rank in range(len(rows)))


def _check_rows(rows: Sequence[Sequence[int]]) -> None:
    require(
        len(rows) > 0 and len(rows[0]) > 0 and len({len(row) for row in rows}) == 1,
        "rows: a list per rank, with a number for each expert",
        f"lists of {[len(row) for row in rows]} numbers",
        "give rows[rank][expert]",
    )
    for row in rows:
        for count in row:
            check_number("each of rows", count, int, 0, float("inf"))
    check_divides("number of ranks", len(rows), "number of experts", len(rows[0]))
