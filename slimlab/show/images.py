"""Small grey images in a row, as chapter 13 shows what its classifiers are trained with.

Data viewers page through thousands of them; here a handful is shown, on one grey scale.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure
from torch import Tensor

from slimlab.config import require
from slimlab.show.style import new_figure, to_array


def images_figure(images: Tensor | list, labels: Sequence[str], title: str = "") -> Figure:
    """Draw images side by side, dark where the values are high.

    images   (N, height, width)
    labels   N of them, one above each image
    title    printed above all
    returns  the figure

    Raises InputError if the sizes do not fit.
    """
    values = to_array(images)
    given = f"images of shape {values.shape}, {len(labels)} labels"
    fits = values.ndim == 3 and len(values) == len(labels) > 0
    require(fits, "images (N, height, width) and N labels", given, "give one label for each image")
    figure, row = new_figure(1, len(values), figsize=(6.4, 1.4), squeeze=False)
    for axes, image, label in zip(row[0], values, labels):
        axes.imshow(image, cmap="Greys", vmin=values.min(), vmax=values.max())
        axes.set(xticks=[], yticks=[], title=label)
        axes.grid(False)
    figure.suptitle(title, x=0.02, ha="left")
    return figure
