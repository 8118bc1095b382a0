"""The line that shows how far a notebook has come.

Chapter 00 shows it when it explains how to run the book. Full-screen progress displays (rich,
JupyterLab's own) show every cell at once; this is one line per notebook.
"""

import sys
import threading
import time

from tqdm import tqdm


class ProgressLine:
    """One line per notebook on standard error: name, bar, cell k of n, seconds.

    chapter  the name to show

    On a terminal the seconds tick while a long cell runs; in a log it is one line at the end.
    """

    def __init__(self, chapter: str):
        self.bar = tqdm(
            desc=f"{chapter:<24}",
            unit="cell",
            bar_format="{desc} {bar:20} cell {n_fmt}/{total_fmt}  {elapsed_s:.0f} s",
            disable=not sys.stderr.isatty(),
        )
        self.chapter, self.at, self.started = chapter, (0, 0), time.perf_counter()
        self.stop = threading.Event()
        threading.Thread(target=self.tick, daemon=True).start()

    def tick(self) -> None:
        """Redraw the line twice a second until it is closed."""
        while not self.stop.wait(0.5):
            self.bar.refresh()

    def cell(self, chapter: str, number: int, total: int) -> None:
        """Show that cell `number` of `total` of `chapter` starts."""
        self.chapter, self.at = chapter, (number, total)
        self.bar.n, self.bar.total = number, total
        self.bar.refresh()

    def close(self) -> None:
        """Finish the line."""
        self.stop.set()
        self.bar.close()
        if self.bar.disable:
            seconds = time.perf_counter() - self.started
            print(f"{self.chapter:<24} cell {self.at[0]}/{self.at[1]}  {seconds:.0f} s", flush=True)
