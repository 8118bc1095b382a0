"""Run the chapters, then build the book as HTML pages that need no network.

    python tools/build_book.py                     the whole book: build/book/index.html
    python tools/build_book.py --solutions 01,02   show solutions of these chapters only
    python tools/build_book.py --solutions none    show none
    python tools/build_book.py --no-run            use the stored outputs

A chapter is run again only if its cells, slimlab, Python or torch have changed since the last
time; executed copies lie in build/executed/. The chapters themselves are not written.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import covered  # noqa: E402

from slimlab.classroom import runner  # noqa: E402
from slimlab.config import InputError, require  # noqa: E402

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
    known = json.loads(memory.read_text()) if memory.is_file() else {}
    pages, failed = {}, []
    for path in sorted((root / "chapters").glob("*.ipynb")):
        now = fingerprint(runner.read_notebook(path), root / "slimlab")
        copy = executed / path.name
        pages[path.stem] = copy
        if known.get(path.stem) == now and copy.is_file():
            print(f"{path.stem:<24} unchanged")
            continue
        (report,) = runner.run_chapters([str(path)], executed, root)
        if report.failure:
            failed.append(path.stem)
            pages[path.stem] = path
            known.pop(path.stem, None)
        else:
            known[path.stem] = now
        replace_text(memory, json.dumps(known, indent=1))
    return pages, failed


def replace_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


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
            shutil.copy2(path, source / room / path.name)
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
    shutil.rmtree(target, ignore_errors=True)
    os.replace(fresh, target)


def build_book(root: Path, build: Path, solutions: str = "all", run: bool = True) -> list[str]:
    """Build the book of `root` into build/book; return the chapters that failed."""
    chosen = chosen_solutions(sorted((root / "solutions").glob("*.ipynb")), solutions)
    if run:
        pages, failed = run_changed(root, build)
    else:
        pages = {path.stem: path for path in sorted((root / "chapters").glob("*.ipynb"))}
        failed = []
    build.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".book-", dir=build) as folder:
        source = Path(folder) / "source"
        assemble(root, source, pages, chosen)
        make_pages(source, build / "book")
    return failed


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
    if failed:
        print(f"\nfailed, and shown with their stored outputs: {', '.join(failed)}")
    print(ROOT / "build" / "book" / "index.html")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
