"""A mesh is drawn with every rank on its host and a line for every neighbour; pieces add up."""

import pytest

from slimlab import show
from slimlab.config import InputError
from slimlab.parallel.mesh import MeshShape


def test_every_rank_has_a_box_with_its_coordinates_and_every_host_a_frame():
    figure = show.mesh_figure(MeshShape(2, 2, 2), [0, 0, 0, 0, 1, 1, 1, 1], "eight")
    (axes,) = figure.axes
    words = [text.get_text() for text in axes.texts]
    assert [word for word in words if word.startswith("host")] == ["host 0", "host 1"]
    assert {str(rank) for rank in range(8)} <= set(words)
    assert {"0,0,0", "0,1,1", "1,1,1"} <= set(words)
    assert len(axes.patches) == 8 + 2
    # 4 groups along each of 3 axes, each of two neighbours; links are annotations without words.
    assert words.count("") == 12


def test_boxes_of_a_host_lie_in_its_frame_and_others_do_not():
    figure = show.mesh_figure(MeshShape(2, 2, 2), [0, 0, 0, 0, 1, 1, 1, 1])
    patches = figure.axes[0].patches
    frames = [one for one in patches if not one.get_fill()]
    boxes = [one.get_bbox() for one in patches if one.get_fill()]
    for number, frame in enumerate(frames):
        inside = [frame.get_bbox().contains(box.x0, box.y0) for box in boxes]
        assert inside == [rank // 4 == number for rank in range(8)]


@pytest.mark.parametrize(
    ("shape", "hosts"), [(MeshShape(2, 2, 2), [0] * 7), (MeshShape(64), [0] * 64)]
)
def test_meshes_that_cannot_be_drawn_are_refused(shape, hosts):
    with pytest.raises(InputError):
        show.mesh_figure(shape, hosts)


def test_each_piece_begins_where_the_one_above_ended_and_the_last_bar_is_the_sum():
    pieces = {"products": 3.0, "bubble": 0.5, "data": 0.0}
    figure = show.waterfall_figure(pieces, "time (s)", "a step", {"measured": 3.4})
    (axes,) = figure.axes
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches]
    assert spans == [(0, 3), (3, 3.5), (3.5, 3.5), (0, 3.5)]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["products", "bubble", "data", "all"]
    assert list(axes.lines[0].get_xdata()) == [3.4, 3.4]
    assert axes.get_xlabel() == "time (s)"


@pytest.mark.parametrize("pieces", [{}, {"products": 1.0, "gain": -0.5}])
def test_pieces_that_cannot_be_added_up_are_refused(pieces):
    with pytest.raises(InputError):
        show.waterfall_figure(pieces, "time (s)")
