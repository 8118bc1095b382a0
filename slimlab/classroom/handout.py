"""Make a student's copy of the book: chapters, exercises and the solutions that are switched on.

Run it again on the same folder to switch more solutions on; exercises that lie there are never
overwritten, so nobody's work is lost. The command `slimlab handout` calls it; the README's section
on classes shows it. Course platforms (nbgitpuller) merge a repository into a student's folder.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from slimlab.classroom.session import read_settings
from slimlab.config import InputError, require
from slimlab.text.files import write_atomically

README = """This is a student's copy of slimlab.

chapters/   the book: open one in JupyterLab and run it from top to bottom
exercises/  fill in the cells marked `# exercise`, run the check cells below them
solutions/  those that your teacher has switched on

The notebooks need slimlab installed. `slimlab doctor` says what is missing on your machine.
"""


@dataclass(frozen=True)
class Copied:
    """What a handout holds.

    folder     where it lies
    num_files  how many notebooks were written
    solutions  the chapters whose solutions are in it
    kept       exercises that were there and were left as they are
    """

    folder: Path
    num_files: int
    solutions: tuple[str, ...]
    kept: tuple[str, ...]


def make_handout(
    root: Path, folder: Path, solutions: tuple[str, ...] | None = None, seed: int | None = None
) -> Copied:
    """Write or refresh a handout.

    root       the book's folder
    folder     where the handout goes: a new or empty folder, or an earlier handout
    solutions  chapters whose solutions are switched on, ("01",); None keeps what the handout has
    seed       the class's seed; None keeps what the handout has

    Raises InputError for a chapter without solutions and for a folder that is something else.
    """
    settings_file = folder / "classroom.toml"
    if folder.exists() and not settings_file.is_file():
        empty = folder.is_dir() and not any(folder.iterdir())
        require(
            empty, "a new folder or an earlier handout", f"{folder}, which holds something else",
            "choose another name",
        )  # fmt: skip
    settings = read_settings(settings_file)
    wanted = solutions if solutions is not None else tuple(settings.get("solutions", ()))
    settings |= {"solutions": list(wanted)} | ({} if seed is None else {"seed": seed})
    switched_on = _find_solutions(root, wanted)
    copies, kept = _copies(root, folder, switched_on)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # first of all: by this file a handout that was interrupted is known as one
        write_atomically(settings_file, _as_toml(settings).encode())
    except OSError as error:
        given = f"{folder}: {error.strerror or error}"
        raise InputError("a folder for the handout", given, "choose another") from None
    for source, target in copies:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.part")
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    names = {path.name for path in switched_on}
    for path in (folder / "solutions").glob("*.ipynb"):
        if path.name not in names:
            path.unlink()
    write_atomically(folder / "README.txt", README.encode())
    return Copied(folder, len(copies), wanted, tuple(kept))


def _find_solutions(root: Path, wanted: tuple[str, ...]) -> list[Path]:
    there = {path.stem[:2]: path for path in sorted((root / "solutions").glob("*.ipynb"))}
    for chapter in wanted:
        if chapter not in there:
            known = ", ".join(there) or "none"
            raise InputError("a chapter that has solutions", repr(chapter), f"choose from: {known}")
    return [there[chapter] for chapter in wanted]


def _copies(root: Path, folder: Path, solutions: list[Path]) -> tuple[list, list[str]]:
    copies, kept = [], []
    for path in sorted((root / "chapters").glob("*.ipynb")):
        copies.append((path, folder / "chapters" / path.name))
    for path in sorted((root / "exercises").glob("*.ipynb")):
        target = folder / "exercises" / path.name
        if target.is_file() and target.read_bytes() != path.read_bytes():
            kept.append(path.name)
        else:
            copies.append((path, target))
    copies += [(path, folder / "solutions" / path.name) for path in solutions]
    return copies, kept


def _as_toml(settings: dict) -> str:
    lines = []
    for key, value in settings.items():
        if isinstance(value, list):
            shown = "[" + ", ".join(f'"{one}"' for one in value) + "]"
        else:
            shown = f'"{value}"' if isinstance(value, str) else str(value)
        lines.append(f"{key} = {shown}")
    return "\n".join(lines) + "\n"
