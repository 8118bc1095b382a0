"""Run the chapters, then build the book as HTML pages that need no network.

    python tools/build_book.py                     the whole book: build/book/index.html
    python tools/build_book.py --solutions 01,02   show solutions of these chapters only
    python tools/build_book.py --solutions none    show none
    python tools/build_book.py --no-run            use the stored outputs

A chapter is run again only if its cells, slimlab, Python or torch have changed since the last
time; executed copies lie in build/executed/. The chapters themselves are not written.
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import covered  # noqa: E402

from slimlab.classroom import runner  # noqa: E402
from slimlab.config import InputError, require  # noqa: E402
from slimlab.text.files import write_atomically  # noqa: E402

MATHJAX_PARTS = [
    "MathJax.js",
    "extensions/AssistiveMML.js",
    "extensions/MathEvents.js",
    "extensions/MathZoom.js",
    "extensions/TeX",
    "extensions/tex2jax.js",
    "extensions/toMathML.js",
    "jax/element",
    "jax/input/TeX",
    "jax/output/SVG",
]


def fingerprint(notebook, package: Path) -> str:
    """A number that changes with the cells, with slimlab's code and with the versions below it."""
    parts = [sys.version, importlib.metadata.version("torch")]
    parts += [f"{cell.cell_type} {cell.id}\n{cell.source}" for cell in notebook.cells]
    for path in sorted(package.rglob("*.py")):
        parts += [str(path.relative_to(package)), path.read_text(encoding="utf-8")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def run_changed(root: Path, build: Path) -> tuple[dict[str, Path], list[str]]:
    """Run the chapters that changed; return the newest copy of each, and the names that failed.

    A chapter that fails appears in the book with its stored outputs.
    """
    executed, memory = build / "executed", build / "executed" / "fingerprints.json"
    known, pages, failed = remembered(memory), {}, []
    for path in sorted((root / "chapters").glob("*.ipynb")):
        now = fingerprint(runner.read_notebook(path), root / "slimlab")
        copy = executed / path.name
        pages[path.stem] = copy
        if known.get(path.stem) == now and is_whole(copy):
            print(f"{path.stem:<24} unchanged")
            continue
        (report,) = runner.run_chapters([str(path)], executed, root)
        if report.failure:
            failed.append(path.stem)
            pages[path.stem] = path
            known.pop(path.stem, None)
        else:
            known[path.stem] = now
        write_atomically(memory, json.dumps(known, indent=1).encode())
    return pages, failed


def remembered(memory: Path) -> dict[str, str]:
    """The fingerprints of the last run; none if the file is not there or damaged."""
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def is_whole(copy: Path) -> bool:
    try:
        runner.read_notebook(copy)
    except InputError:
        return False
    return True


def copy_mathjax(target: Path) -> None:
    """Copy what the book needs of MathJax out of the package nbclassic."""
    found = importlib.util.find_spec("nbclassic")
    asked, change = "the package nbclassic, which carries MathJax", 'pip install -e ".[book]"'
    require(found is not None, asked, "it is not installed", change)
    source = Path(found.submodule_search_locations[0]) / "static" / "components" / "MathJax"
    require((source / "MathJax.js").is_file(), asked, f"no MathJax.js in {source}", change)
    for part in MATHJAX_PARTS:
        (target / part).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (source / part).is_dir() else shutil.copy2
        copy(source / part, target / part)


def chosen_solutions(solutions: list[Path], wanted: str) -> list[Path]:
    """Those of `solutions` that `wanted` names: "all", "none", or chapters such as "01,02"."""
    if wanted in ("all", "none"):
        return solutions if wanted == "all" else []
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    chosen = [path for path in solutions if any(path.stem.startswith(name) for name in names)]
    for name in names:
        hit = any(path.stem.startswith(name) for path in chosen)
        known = ", ".join(path.stem for path in solutions)
        require(hit, "chapters that have solutions", repr(name), f"choose from {known}")
    return chosen


def toctree(caption: str, pages: list[str]) -> str:
    if not pages:
        return ""
    lines = ["", "```{toctree}", ":maxdepth: 1", f":caption: {caption}", "", *pages, "```", ""]
    return "\n".join(lines)


def headings(pages: dict[str, Path]) -> dict[str, str]:
    """Each chapter's first heading."""
    found = {}
    for name, path in pages.items():
        text = "\n".join(
            cell.source for cell in runner.read_notebook(path).cells if cell.cell_type == "markdown"
        )
        titles = [line[2:].strip() for line in text.splitlines() if line.startswith("# ")]
        found[name] = titles[0] if titles else name
    return found


def assemble(root: Path, source: Path, pages: dict[str, Path], solutions: list[Path]) -> None:
    """Lay out in `source` what Sphinx reads: settings, pages, notebooks, MathJax, contents."""
    shutil.copytree(root / "book", source)
    copy_mathjax(source / "_static" / "mathjax")
    exercises = sorted((root / "exercises").glob("*.ipynb"))
    rooms = {"chapters": list(pages.values()), "exercises": exercises, "solutions": solutions}
    for room, paths in rooms.items():
        (source / room).mkdir()
        for path in paths:
            notebook = runner.read_notebook(path)  # names a broken one, as Sphinx does not
            if room == "solutions":  # the exercises are made from them, heading and all
                first = notebook.cells[0]
                first.source = first.source.replace(": exercises", ": solutions", 1)
            runner.write_notebook(notebook, source / room / path.name)
    items = [item for item in covered.load(root / "chapters" / "coverage") if item.chapter in pages]
    (source / "covered.md").write_text(covered.page(items, headings(pages)), encoding="utf-8")
    listed = {room: [f"{room}/{path.stem}" for path in paths] for room, paths in rooms.items()}
    contents = [
        toctree("Chapters", listed["chapters"]),
        toctree("Exercises", listed["exercises"]),
        toctree("Reference", ["symbols", "covered"]),
        toctree("Solutions", listed["solutions"]),
    ]
    with (source / "index.md").open("a", encoding="utf-8") as file:
        file.write("".join(contents))


def make_pages(source: Path, target: Path) -> None:
    """Run Sphinx beside `source`, then put the finished pages in place of `target`."""
    print("building the pages ...", flush=True)
    fresh = source.parent / "html" / "book"
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-b", "html"]
    command += ["-d", str(source.parent / "doctrees"), str(source), str(fresh)]
    done = subprocess.run(command)
    if done.returncode:
        raise SystemExit("the pages could not be built; what Sphinx says stands above")
    if target.exists():
        os.replace(target, source.parent / "old")
    os.replace(fresh, target)


@contextmanager
def one_at_a_time(build: Path):
    """Hold a lock on the folder `build`, and remove what a killed build left there."""
    build.mkdir(parents=True, exist_ok=True)
    with (build / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            given = f"another build that is writing in {build}"
            change = "wait until it has finished, or end it"
            raise InputError("one build at a time", given, change) from error
        for left in build.glob(".book-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def build_book(root: Path, build: Path, solutions: str = "all", run: bool = True) -> list[str]:
    """Build the book of `root` into build/book; return the chapters that failed."""
    chosen = chosen_solutions(sorted((root / "solutions").glob("*.ipynb")), solutions)
    pages = {path.stem: path for path in sorted((root / "chapters").glob("*.ipynb"))}
    require(bool(pages), "a book", f"no chapters in {root / 'chapters'}", "restore that folder")
    failed = []
    with one_at_a_time(build):
        if run:
            pages, failed = run_changed(root, build)
        with tempfile.TemporaryDirectory(prefix=".book-", dir=build) as folder:
            source = Path(folder) / "source"
            assemble(root, source, pages, chosen)
            make_pages(source, build / "book")
    return failed


def disk_problem(error: OSError, build: Path) -> tuple[str, str, str]:
    """What InputError says about a file that could not be read or written."""
    # shutil.copytree collects what went wrong with each file and carries no number of its own.
    first = error.args[0][0][-1] if isinstance(error, shutil.Error) else error
    free_bytes = shutil.disk_usage(build if build.is_dir() else ROOT).free
    given = f"{first}; {free_bytes / 1e6:.0f} MB free"
    return f"a folder {build} to write in", given, "make room, or give yourself the right to write"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--solutions", default="all", help='"all", "none" or chapters: 01,02')
    parser.add_argument("--no-run", action="store_true", help="use the stored outputs")
    arguments = parser.parse_args()
    try:
        failed = build_book(ROOT, ROOT / "build", arguments.solutions, not arguments.no_run)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(InputError(*disk_problem(error, ROOT / "build")), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the book is as it was before", file=sys.stderr)
        return 130
    if failed:
        print(f"\nfailed, and shown with their stored outputs: {', '.join(failed)}")
    print(ROOT / "build" / "book" / "index.html")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
