"""Figures hold the data they were given; listings are the source; progress is silent in a batch."""

import inspect
import os
import subprocess
import sys
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy
import pytest
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle

from slimlab import config, show
from slimlab.config import InputError
from slimlab.show.source import without_docstrings

WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])


@pytest.fixture(autouse=True)
def _style():
    show.use_style()


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_attention_map_shows_each_weight_at_its_query_and_key():
    figure = show.attention_map(WEIGHTS, ["a", "b"], ["x", "y", "z"], title="two queries")
    axes = figure.axes[0]
    numpy.testing.assert_allclose(axes.images[0].get_array(), WEIGHTS)
    assert axes.get_title() == "two queries"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]
    # (column, row): the weight of query b on key y stands at x = 1, y = 1.
    placed = {text.get_position(): text.get_text() for text in axes.texts}
    assert placed[(1, 1)] == "0.75"
    assert placed[(0, 1)] == "0.25"
    assert len(placed) == 6


def test_attention_map_of_many_cells_carries_no_numbers():
    figure = show.attention_map(torch.ones(11, 10) / 10)
    assert texts(figure.axes[0]) == []


def test_scores_with_minus_infinity_are_drawn_around_zero():
    scores = torch.tensor([[2.0, float("-inf")], [-3.0, 1.0]])
    axes = show.attention_map(scores, value_label="score").axes[0]
    assert axes.images[0].get_clim() == (-3.0, 3.0)
    assert "−∞" in texts(axes)
    assert "−3.00" in texts(axes)


def test_attention_map_takes_tensors_that_need_a_gradient_and_half_precision():
    weights = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    assert show.attention_map(weights).axes[0].images[0].get_array().shape == (2, 3)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: show.attention_map(torch.ones(2, 2, 3)),
        lambda: show.attention_map(torch.ones(0, 3)),
        lambda: show.attention_map(WEIGHTS, ["a"], ["x", "y", "z"]),
        lambda: show.attention_map(WEIGHTS, ["a", "b"], ["x"]),
        lambda: show.heads_figure(WEIGHTS),
        lambda: show.heads_figure(torch.ones(2, 3, 4), titles=["only one"]),
        lambda: show.mask_figure(torch.ones(2, 3)),
        lambda: show.curves({"a": ([1, 2], [1])}, "x", "y"),
        lambda: show.curves({"a": ([0, 2], [1, 2])}, "x", "y", log_x=True),
        lambda: show.curves({}, "x", "y"),
        lambda: show.bars({"a": {"p": 1}, "b": {"q": 1}}, "y"),
        lambda: show.matrix_product_figure(
            [(("Q", "T", "E"), ("K", "S", "E"), ("A", "T", "S"))], {}
        ),
        lambda: show.flow_figure(["a", "b", "c"], ["one"]),
        lambda: show.box_figure({"a": (0, 0, "a")}, [("a", "b", "")]),
        lambda: show.lanes_figure(2, [(0, 0, 2, "x")]),
        lambda: show.ledger_figure([]),
        lambda: show.show_source(len),
        lambda: show.show_source(config),
        lambda: show.attention_map([[1], [2, 3]]),
        lambda: show.attention_map("weights"),
        lambda: show.attention_map(torch.ones(2, 3, dtype=torch.cfloat)),
        lambda: show.attention_map(torch.ones(2, 3, device="meta")),
        lambda: show.mask_figure({}),
        lambda: show.curves({"a": ([], [])}, "x", "y", log_x=True),
        lambda: show.curves({"a": (torch.ones(2, 2), torch.ones(2, 2))}, "x", "y"),
        lambda: show.curves({"a": (1, 2)}, "x", "y"),
        lambda: show.bars({"a": {}}, "y"),
        lambda: show.matrix_product_figure([], {}),
        lambda: show.matrix_product_figure(
            [(("Q", "T", "E"), ("K", "E", "S"), ("A", "T", "S"))], {"T": 3, "E": 4}
        ),
        lambda: show.flow_figure([]),
        lambda: show.box_figure({}, []),
    ],
)
def test_bad_input_gets_an_input_error_and_leaves_no_figure_open(draw):
    plt.close("all")
    with pytest.raises(InputError) as caught:
        draw()
    assert "change:" in str(caught.value)
    assert plt.get_fignums() == []


def test_a_token_with_dollar_signs_is_a_label_and_no_formula():
    figure = show.attention_map(torch.ones(2, 2), ["$\\nonsense$", "$$"])
    figure.canvas.draw()  # where a formula would be read, and found wrong
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == ["$\\nonsense$", "$$"]


def test_heads_figure_draws_one_map_per_head_in_one_scale():
    weights = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(0))
    figure = show.heads_figure(weights, ["a", "b"], ["x", "y", "z"])
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == [f"head {head}" for head in range(5)]
    for axes, expected in zip(maps, weights):
        numpy.testing.assert_allclose(axes.images[0].get_array(), expected)
        assert axes.images[0].get_clim() == (0.0, pytest.approx(float(weights.max())))


def test_mask_figure_marks_allowed_and_forbidden_cells_by_shape():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    axes = show.mask_figure(mask, title="causal").axes[0]
    allowed, forbidden = axes.collections
    assert {tuple(place) for place in allowed.get_offsets()} == {(0, 0), (0, 1), (1, 1)}
    assert {tuple(place) for place in forbidden.get_offsets()} == {(1, 0), (2, 0), (2, 1)}
    assert len(allowed.get_paths()[0]) != len(forbidden.get_paths()[0])
    assert (allowed.get_label(), forbidden.get_label()) == ("may attend", "may not attend")


def test_mask_figure_draws_a_panel_per_named_mask():
    masks = {"causal": torch.ones(2, 2).tril().bool(), "all": torch.ones(2, 3).bool()}
    assert [axes.get_title() for axes in show.mask_figure(masks).axes] == ["causal", "all"]


def test_an_interval_stands_at_each_point_of_a_curve_that_has_halves():
    figure = show.curves({"a": ([1, 2], [5, 7], [0.5, 1])}, "bits", "cost (%)", log_x=True)
    (bars,) = figure.axes[0].collections
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [[4.5, 5.5], [6.0, 8.0]]
    with pytest.raises(InputError, match="as many y as x"):
        show.curves({"a": ([1, 2], [5, 7], [0.5])}, "bits", "cost (%)")


def test_curves_differ_in_colour_line_and_marker_and_carry_units():
    series = {"one": ([1, 2, 4], [3, 5, 7]), "two": ([1, 2, 4], [1, 1, 2])}
    figure = show.curves(series, "length (tokens)", "time (s)", log_x=True, guides={"limit": 6})
    axes = figure.axes[0]
    one, two, limit = axes.lines
    numpy.testing.assert_allclose(one.get_xydata(), [(1, 3), (2, 5), (4, 7)])
    for look in ("get_color", "get_linestyle", "get_marker"):
        assert getattr(one, look)() != getattr(two, look)()
    assert set(limit.get_ydata()) == {6}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("length (tokens)", "time (s)")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two", "limit"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "4"]


def test_guides_differ_in_their_dashes_also_where_the_legend_names_them():
    guides = {"a": 3, "b": 2.5, "c": 2, "d": 1.5, "e": 1}
    axes = show.curves({"one": ([1, 2], [3, 1])}, "x", "y", guides=guides).axes[0]
    in_legend = axes.get_legend().get_lines()[1:]
    for lines in (axes.lines[1:], in_legend):
        assert [line.get_label() for line in lines] == list(guides)
        assert len({str(line._unscaled_dash_pattern) for line in lines}) == len(guides)
    width_pt = axes.get_legend().handlelength * axes.get_legend()._fontsize
    for line in in_legend[:3]:  # one period fits into the legend
        assert sum(line._unscaled_dash_pattern[1]) * line.get_linewidth() < width_pt


def test_bars_have_the_given_heights_and_write_them_down():
    axes = show.bars({"a": 3, "b": 12.5}, "memory (MB)").axes[0]
    assert [bar.get_height() for bar in axes.patches] == [3, 12.5]
    assert texts(axes) == ["3", "12.5"]
    assert axes.get_ylabel() == "memory (MB)"


def test_grouped_horizontal_bars_keep_series_apart_and_the_first_label_on_top():
    values = {"a": {"predicted": 1, "measured": 2}, "b": {"predicted": 3, "measured": 4}}
    axes = show.bars(values, "time (s)", horizontal=True).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1, 3, 2, 4]
    assert axes.patches[0].get_hatch() != axes.patches[2].get_hatch()
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def fake_ledger(*entries):
    entries = [SimpleNamespace(call=call, n_bytes=n_bytes) for call, n_bytes in entries]
    return SimpleNamespace(
        entries=entries,
        total_bytes=lambda call: sum(entry.n_bytes for entry in entries if entry.call == call),
    )


def test_ledger_figure_stacks_the_bytes_of_each_call_per_rank():
    ledgers = [fake_ledger(("send", 40), ("send", 2), ("all_reduce", 100)), fake_ledger()]
    axes = show.ledger_figure(ledgers).axes[0]
    stacks = [(bar.get_y(), bar.get_height()) for bar in axes.patches]
    assert stacks == [(0, 100), (0, 0), (100, 42), (0, 0)]
    assert texts(axes) == ["142 B", "0 B"]


def test_matrix_product_figure_draws_matrices_to_scale_with_their_sizes():
    product = (("Q", "T", "E"), ("Kᵀ", "E", "S"), ("scores", "T", "S"))
    axes = show.matrix_product_figure([product], {"T": 3, "E": 4, "S": 5}).axes[0]
    shapes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    cell = shapes[0].get_width() / 4
    sizes = [(patch.get_height() / cell, patch.get_width() / cell) for patch in shapes]
    numpy.testing.assert_allclose(sizes, [(3, 4), (4, 5), (3, 5)])
    assert {"Q", "Kᵀ", "scores", "T=3", "E=4", "S=5", "×", "="} <= set(texts(axes))


def test_flow_figure_places_boxes_from_left_to_right_with_an_arrow_between_two():
    axes = show.flow_figure(["text", "ids", "model"], ["encode", "(B, T)"]).axes[0]
    boxes = [patch for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    lefts = [box.get_x() for box in boxes]
    assert lefts == sorted(lefts)
    assert boxes[0].get_x() + boxes[0].get_width() < boxes[1].get_x()
    assert len([text for text in axes.texts if getattr(text, "arrow_patch", None)]) == 2
    assert {"text", "ids", "model", "encode", "(B, T)"} <= set(texts(axes))


def test_lanes_figure_draws_a_message_from_its_sender_to_its_receiver():
    axes = show.lanes_figure(3, [(0, 0, 2, "16 B")], [(1, 2, "add")]).axes[0]
    lanes = [line.get_ydata()[0] for line in axes.lines]
    assert lanes == sorted(lanes, reverse=True)
    (message,) = [text for text in axes.texts if getattr(text, "arrow_patch", None)]
    assert message.xyann[1] == lanes[0]
    assert message.xy[1] == lanes[2]
    assert message.xyann[0] < message.xy[0]
    assert {"rank 0", "rank 1", "rank 2", "16 B", "add"} <= set(texts(axes))


def test_lanes_figure_has_room_for_the_longest_text_in_the_last_step():
    work = [(2, rank, "mean of all gradients") for rank in range(3)]
    axes = show.lanes_figure(3, [], work).axes[0]
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert len(boxes) == 3
    assert all(axes.get_xlim()[0] < box.get_x() for box in boxes)
    assert all(box.get_x() + box.get_width() < axes.get_xlim()[1] for box in boxes)


def test_figures_are_closed_so_that_a_notebook_shows_them_once():
    plt.close("all")
    figures = [show.attention_map(WEIGHTS), show.bars({"a": 1}, "y"), show.flow_figure(["a", "b"])]
    assert plt.get_fignums() == []
    assert all("Figure size" in repr(figure) for figure in figures)


def test_show_source_prints_the_source_under_its_full_name(capsys):
    show.show_source(config.require)
    printed = capsys.readouterr().out
    assert printed.startswith("slimlab.inputs.require\n─")
    assert printed.endswith(inspect.getsource(config.require))


def test_show_source_without_docstring_is_the_same_program_and_shorter(capsys):
    show.show_source(config.ModelConfig, doc=False)
    printed = capsys.readouterr().out
    assert "defaults to num_heads" not in printed
    assert "object.__setattr__" in printed
    assert printed.count("\n") < inspect.getsource(config.ModelConfig).count("\n")


def test_a_body_of_only_a_docstring_stays_valid():
    source = 'def f():\n    """Say."""\n\n\ndef g():\n    """Say."""\n    # why\n    return 1\n'
    stripped = without_docstrings(source)
    compile(stripped, "stripped", "exec")
    assert stripped.count("Say") == 1
    assert "# why" in stripped


def run_progress(batch):
    program = "from slimlab.show import progress; print(sum(progress(range(3), 'adding')))"
    environment = {**os.environ, "SLIMLAB_BATCH": batch}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )


def test_progress_is_silent_in_a_batch_and_visible_otherwise():
    silent, loud = run_progress("1"), run_progress("0")
    assert silent.stdout == loud.stdout == "3\n"
    assert silent.stderr == ""
    assert "adding" in loud.stderr
    assert "3/3" in loud.stderr
