"""What the chapters cover: read the tables, check them against the cells, try to break the cells.

    python tools/covered.py                          print what is covered and what is wrong
    python tools/covered.py perturb 01_attention     run a chapter's perturbations, which nbval
                                                     does too (perturb_plugin.py)

chapters/coverage/01_attention.toml holds the items of one chapter:

    [[item]]
    id = "C019"
    title = "Each row of weights sums to 1"
    cell = "rows-sum-to-one"            # or a list of cells
    question = "Why can no weight exceed 1?"
    answer = "They are positive and sum to 1."   # folded on the book's page, for teachers
    perturb = "weights = weights * 1.1" # run just before the cell, which must then fail

An item of history or use has background = true, a source that the chapter quotes word for word,
and may point at cells of text. All others point at a code cell that asserts. A perturbation
rebinds names; it must not change objects in place. `perturb_at` names the cell if there are many.
"""

import ast
import html
import json
import os
import sys
import tomllib
import traceback
import types
from dataclasses import dataclass
from pathlib import Path

import nbformat
from perturbing import run_cell, try_to_break

ROOT = Path(__file__).resolve().parents[1]
MIN_PERTURBED_SHARE = 1 / 3
KEYS = {"id", "title", "chapter", "cell", "question", "answer", "background", "source"}
KEYS |= {"perturb", "perturb_at"}


@dataclass(frozen=True)
class Item:
    """One line of the table; `cells` are ids inside the notebook of `chapter`."""

    id: str
    title: str
    chapter: str
    cells: tuple[str, ...]
    question: str
    answer: str = ""
    background: bool = False
    source: str = ""
    perturb: str = ""
    perturb_at: str = ""


def load(folder: Path) -> list[Item]:
    """Read every table in `folder`, in the order of the chapters."""
    items = []
    for path in sorted(folder.glob("*.toml")):
        for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("item", []):
            unknown, missing = set(entry) - KEYS, {"id", "title"} - set(entry)
            if unknown or missing:
                wrong = f"unknown keys {sorted(unknown)}, missing keys {sorted(missing)}"
                raise SystemExit(f"{path.name}, item {entry.get('id')}: {wrong}")
            cells = entry.get("cell", [])
            cells = (cells,) if isinstance(cells, str) else tuple(cells)
            items.append(
                Item(
                    id=entry["id"],
                    title=entry["title"],
                    chapter=entry.get("chapter", path.stem),
                    cells=cells,
                    question=entry.get("question", ""),
                    answer=entry.get("answer", ""),
                    background=entry.get("background", False),
                    source=entry.get("source", ""),
                    perturb=entry.get("perturb", ""),
                    perturb_at=entry.get("perturb_at", cells[0] if cells else ""),
                )
            )
    return items


def problems(items: list[Item], chapters: Path) -> list[str]:
    """List every item whose cells are missing, not executed or assert nothing, and so on."""
    notebooks = {}
    for name in {item.chapter for item in items}:
        path = chapters / f"{name}.ipynb"
        notebooks[name] = nbformat.read(path, 4) if path.is_file() else None
    return [
        f"{item.chapter}: {item.id} ({item.title}): {text}"
        for item in items
        for text in item_problems(item, notebooks[item.chapter])
    ]


def item_problems(item: Item, notebook) -> list[str]:
    if notebook is None:
        return ["the chapter does not exist"]
    found = []
    words = item.question.split()
    if len(words) < 3 or not item.question.rstrip().endswith("?"):
        found.append("the question is not one")
    if not item.answer.strip():
        found.append("the question has no answer")
    cells = {cell.id: cell for cell in notebook.cells}
    found += [f"no cell {name!r}" for name in item.cells if name not in cells]
    present = [cells[name] for name in item.cells if name in cells]
    code = [cell for cell in present if cell.cell_type == "code"]
    found += [f"cell {cell.id!r} was not executed" for cell in code if not cell.execution_count]
    if item.background:
        text = " ".join("\n".join(cell.source for cell in notebook.cells).split())
        if not item.source.strip():
            found.append("background without a source")
        elif " ".join(item.source.split()) not in text:
            found.append(f"the chapter does not quote the source {item.source!r}")
        return found
    if not item.cells:
        found.append("names no cell")
    found += [f"cell {cell.id!r} is text" for cell in present if cell not in code]
    if code and not any(asserts(cell.source) for cell in code):
        found.append(f"no assertion in {', '.join(item.cells)}")
    if item.perturb and item.perturb_at not in item.cells:
        found.append(f"perturb_at {item.perturb_at!r} is none of its cells")
    return found


def asserts(source: str) -> bool:
    """True if the code holds an assertion: assert, raise, or a call of assert_close and such."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assert, ast.Raise)):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.startswith("assert_"):
                return True
    return False


def counts(items: list[Item]) -> dict[str, int]:
    """How many items are background, asserted, and asserted with a perturbation."""
    asserted = [item for item in items if not item.background]
    return {
        "items": len(items),
        "background": len(items) - len(asserted),
        "asserted": len(asserted),
        "perturbed": len([item for item in asserted if item.perturb]),
    }


def page(items: list[Item], titles: dict[str, str]) -> str:
    """The book's page: topics, questions, folded answers. `titles` maps chapters to headings."""
    lines = [
        "# What the book covers",
        "",
        "Each topic with a question that its chapter answers; press a question for the answer.",
        "A topic is listed when a cell of the chapter asserts it, or, for history and use, when",
        "the chapter names its source.",
    ]
    for chapter in dict.fromkeys(item.chapter for item in items):
        lines += ["", f"## [{titles.get(chapter, chapter)}](chapters/{chapter}.ipynb)"]
        for item in items:
            if item.chapter == chapter:
                title, question, answer = map(html.escape, (item.title, item.question, item.answer))
                folded = f"<summary>{question}</summary>{answer}"
                lines += ["", title, "", f"<details>{folded}</details>"]
    return "\n".join(lines) + "\n"


def perturb_chapter(notebook, items: list[Item]) -> dict[str, str]:
    """Run the code cells once; before a cell with perturbations, try each of them.

    Returns item id and cell -> "caught" or what happened instead. Ends after the last such cell.
    """
    waiting = {}
    for item in items:
        if item.perturb:
            waiting.setdefault(item.perturb_at, []).append(item)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    names, outcome = vars(module), {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if not waiting:
            break
        for item in waiting.pop(cell.id, []):
            trial = (item.id, item.perturb, cell.id, cell.source, names)
            outcome[f"{item.id} {item.perturb_at}"] = try_to_break(*trial)
        run_cell(cell.source, cell.id, names)
    outcome |= {f"{item.id} {name}": "no such cell" for name in waiting for item in waiting[name]}
    return outcome


def perturb_main(chapter: str, chapters: Path) -> int:
    os.environ["SLIMLAB_BATCH"] = "1"
    os.environ["MPLBACKEND"] = "Agg"
    sys.path.insert(0, str(ROOT))
    notebook = nbformat.read(chapters / f"{chapter}.ipynb", 4)
    items = [item for item in load(chapters / "coverage") if item.chapter == chapter]
    try:
        print(json.dumps(perturb_chapter(notebook, items)))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] == ["perturb"]:
        folder = Path(arguments[2]) if arguments[2:] else ROOT / "chapters"
        return perturb_main(arguments[1], folder.resolve())
    items = load(ROOT / "chapters" / "coverage")
    print(counts(items))
    found = problems(items, ROOT / "chapters")
    print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
