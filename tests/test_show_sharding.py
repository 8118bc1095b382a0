"""Figures of cut tensors: pieces lie where their ranks' parts do, and misfits are named."""

import pytest
import torch
from matplotlib.patches import Rectangle

from slimlab import show
from slimlab.config import InputError


def boxes(axes):
    """(left, bottom, width, height) of every rectangle, rounded."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [
        tuple(round(x, 6) for x in (one.get_x(), one.get_y(), one.get_width(), one.get_height()))
        for one in found
    ]


def written(axes):
    return [text.get_text() for text in axes.texts]


def test_pieces_of_columns_and_of_rows_share_the_matrix_out():
    figure = show.cut_figure([("A", 4, 6, "columns"), "·", ("B", 6, 2, "rows")], 2, "Cut")
    left, right, upper, lower = boxes(figure.axes[0])
    assert right[0] == pytest.approx(left[0] + left[2])
    assert left[1:] == right[1:]
    assert lower[1] == pytest.approx(upper[1] - upper[3])
    assert lower[0] == upper[0]
    assert upper[3] == pytest.approx(left[2])  # three rows as high as three columns are wide
    texts = written(figure.axes[0])
    assert texts.count("0") == texts.count("1") == 2
    assert {"A\ncut by columns", "B\ncut by rows", "Cut", "·"} <= set(texts)


def test_partial_sums_are_sheets_of_full_size_and_what_all_have_has_no_number():
    axes = show.cut_figure([("P", 4, 6, "partial"), "→ sum →", ("Z", 4, 6, "whole")], 3).axes[0]
    *sheets, whole = boxes(axes)
    assert len(sheets) == 3
    assert {sheet[2:] for sheet in sheets} == {whole[2:]}
    assert len({sheet[:2] for sheet in sheets}) == 3
    assert {"0", "1", "2", "P\nto be added", "Z\non all ranks"} <= set(written(axes))


def test_everything_lies_on_the_page():
    figure = show.cut_figure([("A", 4, 6, "columns"), ("P", 4, 6, "partial")], 3, "Title")
    width, height = figure.get_size_inches()
    for left, bottom, wide, high in boxes(figure.axes[0]):
        assert 0 <= left < left + wide <= width
        assert 0.3 <= bottom < bottom + high <= height


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["·"], "at least one matrix"),
        ([("A", 4, 5, "columns")], "columns of A that 2 ranks"),
        ([("A", 5, 4, "rows")], "rows of A that 2 ranks"),
        ([("A", 4, 4, "diagonally")], "how"),
    ],
)
def test_what_cannot_be_cut_is_refused(items, words):
    with pytest.raises(InputError, match=words):
        show.cut_figure(items, 2)


def test_matrices_have_a_square_for_every_number_and_lines_between_ranks():
    gather = torch.cat([torch.eye(2)] * 2)
    figure = show.block_matrices_figure({"all_gather": gather, "its transpose": gather.T}, 2, "M")
    first, second = figure.axes
    places = {(round(box[0] - 0.1), round(box[1] - 0.1)) for box in boxes(first)}
    assert places == {(0, 0), (1, 1), (0, 2), (1, 3)}  # (column, row)
    assert {(row, column) for column, row in places} == {
        (round(box[0] - 0.1), round(box[1] - 0.1)) for box in boxes(second)
    }
    assert [line.get_ydata()[0] for line in first.lines[:1]] == [2]
    assert [axes.get_title() for axes in figure.axes] == ["all_gather", "its transpose"]


@pytest.mark.parametrize(
    ("matrices", "words"),
    [({}, "at least one"), ({"M": torch.eye(3)}, r"M \(3, 3\)"), ({"v": torch.ones(4)}, "v")],
)
def test_matrices_that_ranks_cannot_share_are_refused(matrices, words):
    with pytest.raises(InputError, match=words):
        show.block_matrices_figure(matrices, 2)


def test_a_layout_has_a_cell_for_each_rank_and_tells_parts_from_wholes():
    held = {"q_proj": ["(4, 8)", "(4, 8)"], "norm": ["(8)", "(8)"]}
    axes = show.layout_figure(held, {"q_proj": False, "norm": True}, "Who holds what").axes[0]
    assert written(axes) == ["(4, 8)", "(4, 8)", "(8)", "(8)"]
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert len(set(colours[:2])) == 2
    assert colours[2] == colours[3]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q_proj", "norm"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["rank 0", "rank 1"]


@pytest.mark.parametrize(
    ("held", "whole"),
    [({}, {}), ({"a": ["1"], "b": ["1", "2"]}, {"a": True, "b": True}), ({"a": ["1"]}, {})],
)
def test_a_layout_that_does_not_fit_is_refused(held, whole):
    with pytest.raises(InputError, match="for each tensor one text per rank"):
        show.layout_figure(held, whole)
