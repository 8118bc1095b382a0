"""What a committed notebook looks like: how to tidy it, and which rules it must keep."""

import ast
import base64
import hashlib
import re

import nbformat

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python"}
METADATA = {"tags", "nbgrader", "jupyter", "editable", "deletable", "slimlab"}
AUTOMATIC_ID = re.compile(r"cell-[0-9a-f]{8}(-\d+)?")
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}")
ABSOLUTE_PATH = re.compile(
    r"(?<![\w./:-])/(?:home|root|tmp|usr|var|opt|mnt|private|Users|work|builds?|data)/\w"
    r"|\b[A-Z]:\\\w"
)
MAX_IMAGE_BYTES = 150_000
MAX_IMAGES_BYTES = 1_500_000
MAX_CODE_LINES = 25
TABLE_NUMBER = re.compile(r"\b(?:C\d{3}|E\d{2,3})\b")
PARTS = [
    ("goals", ("goal",)),
    ("the idea", ("idea",)),
    ("the maths", ("math",)),
    ("the smallest code", ("smallest",)),
    ("the library code", ("library",)),
    ("a prediction tested", ("prediction",)),
    ("exercises", ("exercise",)),
    ("documents and production systems", ("documents", "production")),
]


def is_code(cell) -> bool:
    return cell.cell_type == "code"


def tidy(notebook) -> None:
    """Remove what differs from run to run; name the cells; count executed cells 1..n."""
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    name_cells(notebook)
    count = 0
    for cell in notebook.cells:
        kept = {key: value for key, value in cell.metadata.items() if key in METADATA}
        if "jupyter" in kept:
            hidden = kept["jupyter"].get("source_hidden")
            kept["jupyter"] = {"source_hidden": hidden}
            if hidden is None:
                del kept["jupyter"]
        cell.metadata = nbformat.from_dict(kept)
        cell.source = "\n".join(line.rstrip() for line in cell.source.strip("\n").splitlines())
        cell.pop("attachments", None)
        if is_code(cell):
            if cell.execution_count is not None:
                count += 1
                cell.execution_count = count
            tidy_outputs(cell)


def name_cells(notebook) -> None:
    """Keep given names; derive the others from the text, so that they change only with it."""
    taken = {cell.get("id") for cell in notebook.cells if is_readable(cell.get("id"))}
    for cell in notebook.cells:
        if is_readable(cell.get("id")):
            continue
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source.strip()}".encode()).hexdigest()[:8]
        name, again = f"cell-{digest}", 1
        while name in taken:
            again += 1
            name = f"cell-{digest}-{again}"
        taken.add(name)
        cell["id"] = name


def is_readable(name) -> bool:
    """True for ids that a person wrote: several short words, not what an editor drew."""
    if not name or AUTOMATIC_ID.fullmatch(name):
        return False
    random = re.fullmatch(r"[0-9a-f]{8}|[0-9a-f-]{32,36}", name)
    return not random and bool(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name))


def tidy_outputs(cell) -> None:
    merged = []
    for output in cell.outputs:
        last = merged[-1] if merged else None
        if output.output_type == "stream" and last and last.get("name") == output.name:
            last.text += output.text
            continue
        output.pop("transient", None)
        if "metadata" in output:
            output.metadata = nbformat.from_dict({})
        if output.output_type == "execute_result":
            output.execution_count = cell.execution_count
        merged.append(output)
    cell.outputs = merged


def problems(notebook) -> list[str]:
    """List every rule that a committed, executed notebook breaks; empty if it is fine."""
    found = []
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        found.append(f"format {notebook.nbformat}.{notebook.nbformat_minor}, not 4.5")
    if notebook.metadata != {"kernelspec": KERNEL, "language_info": LANGUAGE}:
        found.append("untidy: the notebook's metadata")
    names = [cell.get("id") for cell in notebook.cells]
    found += [
        f"cell id {name!r} is used twice" for name in {n for n in names if names.count(n) > 1}
    ]
    code = [cell for cell in notebook.cells if is_code(cell)]
    counts = [cell.execution_count for cell in code]
    if None in counts:
        number = counts.index(None) + 1
        found.append(f"not executed: code cell {number} of {len(counts)}")
    elif counts != list(range(1, len(counts) + 1)):
        found.append("not executed from top to bottom: counts are not 1..n")
    for number, cell in enumerate(notebook.cells, start=1):
        found += [f"cell {number} ({cell.get('id')}): {text}" for text in cell_problems(cell)]
    size = sum(image_bytes(output) for cell in code for output in cell.outputs)
    if size > MAX_IMAGES_BYTES:
        found.append(f"images take {size} bytes, more than {MAX_IMAGES_BYTES}")
    return found


def cell_problems(cell) -> list[str]:
    found = []
    extra = set(cell.metadata) - METADATA
    if extra or set(cell.metadata.get("jupyter", {})) - {"source_hidden"}:
        found.append(f"untidy: metadata {sorted(extra)}")
    if not cell.source.strip():
        found.append("untidy: it is empty")
    if not is_code(cell):
        return found
    if ABSOLUTE_PATH.search(cell.source):
        found.append("an absolute path in the code")
    for output in cell.outputs:
        found += output_problems(output, cell.metadata.get("tags", []))
    streams = [output.name for output in cell.outputs if output.output_type == "stream"]
    if any(first == second for first, second in zip(streams, streams[1:])) and len(streams) == len(
        cell.outputs
    ):
        found.append("untidy: printed text in several pieces")
    return found


def output_problems(output, tags) -> list[str]:
    found = []
    if output.output_type == "error" and "raises-exception" not in tags:
        found.append(f"a stored error: {output.ename}: {output.evalue}"[:160])
    if output.output_type == "stream" and output.name == "stderr":
        found.append(f"text on standard error: {output.text.strip()[:80]!r}")
    text = output_text(output)
    if ADDRESS.search(text):
        found.append(f"an object's address in the output: {ADDRESS.search(text)[0]}")
    if ABSOLUTE_PATH.search(text):
        start = ABSOLUTE_PATH.search(text).start()
        found.append(f"an absolute path in the output: {text[start : start + 40]!r}")
    if output.get("metadata"):
        found.append("untidy: metadata of an output")
    if image_bytes(output) > MAX_IMAGE_BYTES:
        found.append(f"an image of {image_bytes(output)} bytes, more than {MAX_IMAGE_BYTES}")
    return found


def output_text(output) -> str:
    """All text of an output that a reader or nbval sees, without images."""
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return "\n".join([output.evalue, *output.traceback])
    return "\n".join(
        str(data) for kind, data in output.data.items() if not kind.startswith("image/")
    )


def image_bytes(output) -> int:
    data = output.get("data", {})
    coded = [value for kind, value in data.items() if kind in ("image/png", "image/jpeg")]
    drawn = [value for kind, value in data.items() if kind == "image/svg+xml"]
    return sum(len(base64.b64decode(text)) for text in coded) + sum(map(len, drawn))


def chapter_problems(notebook, library_names: dict[str, str]) -> list[str]:
    """List the rules of design and size that a chapter breaks.

    library_names maps each public name of slimlab to its module.
    """
    found = []
    for number, cell in enumerate(notebook.cells, start=1):
        for name in TABLE_NUMBER.findall(cell.source):
            found.append(f"cell {number} ({cell.id}): {name} means nothing to a reader")
        if not is_code(cell):
            continue
        lines = cell.source.count("\n") + 1
        if lines > MAX_CODE_LINES:
            found.append(f"cell {number} ({cell.id}): {lines} lines, at most {MAX_CODE_LINES}")
        if re.search(r"^\s*[%!]", cell.source, re.MULTILINE):
            found.append(f"cell {number} ({cell.id}): a magic or a shell command")
            continue
        for name in defined_names(cell.source):
            if name in library_names and not name.startswith("tiny_"):
                found.append(f"cell {number}: {name} is defined in {library_names[name]} too")
    headings = [heading.lower() for heading in second_level_headings(notebook)]
    return found + [
        f"no section for part {number}, {name}"
        for number, (name, words) in enumerate(PARTS, start=1)
        if not any(all(word in heading for word in words) for heading in headings)
    ]


def second_level_headings(notebook) -> list[str]:
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^## +(.+)$", text, re.MULTILINE)


def defined_names(source: str) -> list[str]:
    """Functions and classes that `source` defines at its top level."""
    kinds = (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds)]
