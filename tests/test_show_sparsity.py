"""The figure of pruned matrices: as many marks as weights, and refusals."""

import pytest
import torch

from slimlab import show
from slimlab.config import InputError


def test_every_weight_has_one_mark_where_it_stands():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    figure = show.sparsity_figure({"one": mask, "two": ~mask}, "title")
    panels = figure.axes
    assert [axes.get_title() for axes in panels] == ["one", "two"]
    stays, pruned = panels[0].collections
    assert sorted(map(tuple, stays.get_offsets().tolist())) == [(0, 0), (2, 0), (2, 1)]
    assert len(pruned.get_offsets()) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["stays", "pruned"]


def test_too_many_weights_or_no_matrix_are_refused():
    with pytest.raises(InputError, match="corner"):
        show.sparsity_figure({"large": torch.ones(41, 3, dtype=torch.bool)})
    with pytest.raises(InputError):
        show.sparsity_figure({"row": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(InputError, match="at least one"):
        show.sparsity_figure({})
