"""Framed diagrams and panels of masks: what was asked for is drawn, what does not fit is named."""

import pytest
import torch
from matplotlib.patches import FancyBboxPatch

from slimlab import show
from slimlab.config import InputError

BOXES = {"in": (0, 0, "ids"), "work": (1, 1, "attention"), "out": (0, 2.5, "sum")}
ARROWS = [("in", "work", "Q"), ("work", "out", ""), ("in", "out", "")]


def texts(figure):
    return {text.get_text() for axes in figure.axes for text in axes.texts}


def test_boxes_arrows_labels_and_frames_are_drawn():
    figure = show.framed_figure(BOXES, ARROWS, {"N blocks": ["work", "out"]}, "A block")
    patches = [p for p in figure.axes[0].patches if isinstance(p, FancyBboxPatch)]
    assert len(patches) == 4  # three boxes and a frame
    assert {"ids", "attention", "sum", "Q", "N blocks", "A block"} <= texts(figure)
    frame = next(p for p in patches if p.get_linestyle() == "--")
    boxes = dict(zip(BOXES, [p for p in patches if p is not frame]))
    top = frame.get_y() + frame.get_height()
    held = {name for name, box in boxes.items() if frame.get_y() < box.get_y() < top}
    assert held == {"work", "out"}


def test_everything_lies_on_the_page():
    figure = show.framed_figure(BOXES, ARROWS, {"N blocks": ["work", "out"]})
    width, height = figure.get_size_inches()
    for patch in figure.axes[0].patches:
        if isinstance(patch, FancyBboxPatch):
            assert 0 <= patch.get_x() <= patch.get_x() + patch.get_width() <= width
            assert 0 <= patch.get_y() <= patch.get_y() + patch.get_height() <= height


@pytest.mark.parametrize(
    ("arrows", "frames"), [([("in", "nowhere", "")], {}), (ARROWS, {"N": ["nowhere"]})]
)
def test_a_name_without_a_box_is_refused(arrows, frames):
    with pytest.raises(InputError, match="nowhere"):
        show.framed_figure(BOXES, arrows, frames)


def test_no_boxes_and_no_masks_are_refused():
    for draw in (lambda: show.framed_figure({}, []), lambda: show.mask_panels({})):
        with pytest.raises(InputError, match="at least one"):
            draw()


def test_panels_have_tokens_and_marks_of_their_own():
    square, wide = torch.eye(2, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    panels = {
        "self": (square, ["a", "b"], ["a", "b"]),
        "cross": (wide, ["c", "d"], ["x", "y", "z"]),
    }
    figure = show.mask_panels(panels, "Two masks")
    first, second = figure.axes
    assert [axes.get_title() for axes in (first, second)] == ["self", "cross"]
    assert [label.get_text() for label in second.get_xticklabels()] == ["x", "y", "z"]
    counts = [[len(c.get_offsets()) for c in axes.collections] for axes in (first, second)]
    assert counts == [[2, 2], [6, 0]]


def test_a_panel_with_too_few_tokens_is_refused():
    with pytest.raises(InputError, match="label"):
        show.mask_panels({"self": (torch.eye(3, dtype=torch.bool), ["a", "b"], ["a", "b", "c"])})
