"""Where files are kept that can be made again: the model of the book, what a machine was measured.

    ~/.cache/slimlab/        (macOS: ~/Library/Caches/slimlab)

SLIMLAB_CACHE names another folder. Chapters 05 and 07 keep something there. Production programs ask
the same variables, or a library that knows all systems (platformdirs).
"""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that SLIMLAB_CACHE names, else the one that this system has for caches."""
    if given := os.environ.get("SLIMLAB_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "slimlab"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimlab"
