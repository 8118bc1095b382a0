"""One look for all figures of the book.

Chapter 00 shows it. Colours are those of Okabe and Ito (2008, "Color universal design"), which
people with any kind of colour vision can tell apart; every figure says the same thing a second
time with a marker, a line style, a symbol or a number. Plotting libraries for data analysis
(seaborn, plotly) choose scales and marks from the data; here each figure kind is fixed.
"""

import matplotlib.pyplot as plt
from cycler import cycler
from torch import Tensor, as_tensor, float64

from slimlab.config import InputError, require

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#8A8A8A"
# Yellow, the eighth colour, is left out: it cannot be read as a thin line on white.
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
LINE_STYLES = ("-", "--", "-.", ":", "-", "--", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
TEXT_PT = 10


def use_style() -> None:
    """Set the book's fonts, sizes and colours for every later figure of this process."""
    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 110,
            "savefig.dpi": 110,
            "figure.constrained_layout.use": True,
            "font.family": "DejaVu Sans",
            "font.size": TEXT_PT,
            "axes.titlesize": TEXT_PT + 1,
            "axes.labelsize": TEXT_PT,
            "xtick.labelsize": TEXT_PT - 1,
            "ytick.labelsize": TEXT_PT - 1,
            "legend.fontsize": TEXT_PT - 1,
            "legend.frameon": False,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#DDDDDD",
            "grid.linewidth": 0.6,
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "mathtext.fontset": "dejavusans",
            "image.cmap": "Blues",
        }
    )


def new_figure(*args, **options) -> tuple:
    """Return a figure and its axes, as plt.subplots(*args, **options) does.

    It is taken out of pyplot's list at once: a notebook then shows it where it is returned, and
    shows nothing half-drawn where drawing fails.
    """
    figure, axes = plt.subplots(*args, **options)
    plt.close(figure)
    return figure, axes


def to_array(values: Tensor | list) -> "numpy.ndarray":  # noqa: F821
    """Return `values` (a tensor on any device, or nested lists) as a float64 array.

    Raises InputError if they are no numbers, or rows of different lengths.
    """
    asked, change = "numbers in a tensor or in lists", "give rows of equal length"
    try:
        tensor = as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(asked, f"a {type(values).__name__} ({error})", change) from error
    drawable = not (tensor.is_complex() or tensor.is_meta)
    require(drawable, asked, f"{tensor.dtype} on {tensor.device}", "take the real part, on a cpu")
    return tensor.detach().to("cpu", float64).numpy()
