"""Images stand side by side in the order given, on one grey scale."""

import pytest
import torch

from slimlab import show
from slimlab.config import InputError


def test_images_are_in_order_with_their_labels_and_one_scale():
    images = torch.arange(24.0).view(2, 3, 4)
    figure = show.images_figure(images, ["a", "b"], "two")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    drawn = [axes.images[0] for axes in figure.axes]
    for one, image in zip(drawn, images):
        assert one.get_array().tolist() == image.tolist()
        assert one.get_clim() == (0, 23)


@pytest.mark.parametrize(
    ("shape", "labels"), [((2, 3), ["a"]), ((2, 3, 3), ["a"]), ((0, 3, 3), [])]
)
def test_images_without_a_label_for_each_are_refused(shape, labels):
    with pytest.raises(InputError):
        show.images_figure(torch.zeros(shape), labels)
