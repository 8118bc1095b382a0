"""Settings for every test, those of the notebooks included."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# nbval's kernels inherit these; in-process tests never open a window.
os.environ["SLIMLAB_BATCH"] = "1"
# More threads than free cores make small matrix products slower by an order of magnitude.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")
# A shell starts what it puts into the background with interrupts ignored; tests send some.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = [str(ROOT / "tools")]


def pytest_configure(config):
    """Prepare matplotlib for notebooks or for tests."""
    if config.getoption("nbval", default=False):
        # The first import on a machine builds a font cache and says so in a cell's output.
        import matplotlib.font_manager
        import perturb_plugin

        config.pluginmanager.register(perturb_plugin)
    else:
        import matplotlib

        matplotlib.use("Agg")


def pytest_collection_modifyitems(config, items):
    """Run the notebook first that trains the model of the book: others would wait for it."""
    if config.getoption("nbval", default=False):
        items.sort(key=lambda item: item.path.parts[-2:] != ("chapters", "05_training.ipynb"))
