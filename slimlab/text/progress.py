"""Progress bars, silent where outputs are kept.

Chapter 00 uses one while it learns merges, chapter 05 while it trains: `show.progress` is this one.
Production tools write a line per interval into a log as well, since nobody watches for weeks.
"""

import os
from collections.abc import Iterable, Iterator

from tqdm import tqdm


def progress(iterable: Iterable, label: str, total: int | None = None) -> Iterator:
    """Yield from `iterable` and draw a progress bar meanwhile.

    iterable  what to go through
    label     the words in front of the bar
    total     how many items there are, if `iterable` has no length

    Silent where the environment has SLIMLAB_BATCH=1, so that saved outputs stay the same.
    """
    return iter(tqdm(iterable, desc=label, total=total, disable=is_silent()))


def progress_bar(label: str, total: int, start: int = 0, shown: bool = True) -> tqdm:
    """Make a bar that is moved by hand: bar.update(), bar.set_postfix_str("loss 2.31").

    label    the words in front of the bar
    total    where it ends
    start    where it begins
    shown    False: silent, as it is in any case where SLIMLAB_BATCH=1
    returns  a tqdm, to be used in a `with`
    """
    return tqdm(total=total, initial=start, desc=label, disable=is_silent() or not shown)


def is_silent() -> bool:
    """Return True where the environment has SLIMLAB_BATCH=1."""
    return os.environ.get("SLIMLAB_BATCH") == "1"
