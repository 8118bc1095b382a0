"""Who works here: the student's name and the seed of the class, for numbers of one's own.

A notebook calls student("Ada Lovelace") once. The seed comes from a file classroom.toml in the
notebook's folder or above it, which `slimlab handout` writes; without one it is 0. Used by every
exercise that draws numbers. Course platforms keep this in a database.
"""

import tomllib
from pathlib import Path

from slimlab.config import InputError

SETTINGS = {"seed": int, "deadline": object, "late_penalty": (int, float), "solutions": list}


class Session:
    """The student's name and seed in this process.

    name        the student, or None for the numbers of the book
    seed        the seed of the class, or None until classroom.toml was looked for
    grading     True inside the process that a check runs in, where a check checks nothing
    unrecorded  cells that ran in this notebook without a place in its history
    cell_ids    which cell of the notebook ran at a place in the history, where the editor says it
    failed      the places of those that ended with an error
    """

    def __init__(self):
        self.name: str | None = None
        self.seed: int | None = None
        self.grading = False
        self.unrecorded: list[str] = []
        self.cell_ids: dict[int, str] = {}
        self.failed: set[int] = set()

    def begin(self, name: str | None, seed: int | None = None, grading: bool = False) -> None:
        """Set `name`, `seed` and `grading`."""
        self.name, self.seed, self.grading = name, seed, grading

    def class_seed(self) -> int:
        """Return the seed; the first time, look for classroom.toml here and above."""
        if self.seed is None:
            here = Path.cwd()
            files = [folder / "classroom.toml" for folder in [here, *here.parents]]
            found = next((file for file in files if file.is_file()), None)
            self.seed = read_settings(found).get("seed", 0) if found else 0
        return self.seed


SESSION = Session()


def read_settings(path: Path) -> dict:
    """Return what a classroom.toml holds: seed, deadline, late_penalty, solutions.

    path  the file; a missing one is empty

    Raises InputError for a file that is not TOML, an unknown key or a value of the wrong kind.
    """
    if not path.is_file():
        return {}
    known = ", ".join(SETTINGS)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError("a classroom.toml", f"{path}: {error}", "mend that line") from None
    for key, value in found.items():
        if key not in SETTINGS:
            raise InputError(f"the keys {known}", f"{key!r} in {path.name}", "correct or remove it")
        if not isinstance(value, SETTINGS[key]) or isinstance(value, bool):
            raise InputError(
                f"{key} of another kind", f"{key} = {value!r} in {path.name}", "see README, Classes"
            )
    return found
