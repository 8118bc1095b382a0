"""Read slimlab's modules without importing them: who imports whom, sizes, docstrings, words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ORDER = [
    "inputs",
    "config",
    "text",
    "model",
    "comm",
    "train",
    "plan",
    "parallel",
    "slim",
    "show",
    "classroom",
    "demos",
    "doctor",
    "commands",
    "cli",
    "__main__",
]
# Packages that only some rooms may import: a reader of the others needs not have them.
CONFINED = {
    "matplotlib": {"show"},
    "cycler": {"show"},
    "mpi4py": {"comm", "doctor"},
    "jupyter_client": {"classroom"},
    "jupyter_core": {"classroom"},
    "nbclient": {"classroom"},
    "nbformat": {"classroom"},
    "nbconvert": {"classroom"},
    "IPython": {"classroom", "show"},
    "ipykernel": {"classroom"},
    "jupytext": set(),
    "pytest": set(),
}
MAX_MODULE_LINES = 300
MAX_FUNCTION_LINES = 60
PRIVATE_WORDS = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "scatter_reduce": "reduce_scatter",
    "scatterreduce": "reduce_scatter",
    "pass_to": "send",
    "mubatch": "micro_batch",
    "n_embd": "d_model",
    "n_head": "num_heads",
    "n_heads": "num_heads",
    "n_layers": "num_layers",
    "n_ranks": "world_size",
    "hidden_size": "d_model",
    "num_hiddens": "d_model",
    "flops": "_flop (a count) or _flop_per_s (a rate)",
    "comm_world": "group",
    "zero_level": "zero_stage",
}
# MPI's own names and those of other libraries are spelled as they are there.
FOREIGN_WORDS = {
    "comm/mpi.py",
    "comm/mpi_compare.py",
    "comm/mpi_transport.py",
    "comm/torch_carriers.py",
    "model/pretrained_names.py",
}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*.py"))


def room(path: Path, package: Path) -> str:
    """The first part of a module's name: slimlab/comm/base.py lies in room comm."""
    return path.relative_to(package).with_suffix("").parts[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions and under conditions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)


def import_problems(package: Path) -> list[str]:
    """Steps back in the order, relative and star imports, and packages outside their rooms."""
    found = []
    for path in modules(package):
        here = room(path, package)
        if here == "__init__":
            continue
        where = path.relative_to(package.parent)
        if here not in ORDER:
            found.append(f"{where}: room {here} has no place in the order")
            continue
        for line, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            parts = name.split(".")
            if name.startswith(".") or parts[-1] == "*":
                found.append(f"{where}:{line}: write the full name of {name}")
            elif parts[0] == "slimlab" and parts[1] in ORDER:
                if ORDER.index(parts[1]) > ORDER.index(here):
                    found.append(f"{where}:{line}: {here} imports {parts[1]}, which comes later")
            elif here not in CONFINED.get(parts[0], {here}):
                allowed = ", ".join(sorted(CONFINED[parts[0]])) or "tests and tools"
                found.append(f"{where}:{line}: {parts[0]} may be imported in {allowed} only")
    return found


def import_cycles(package: Path) -> list[str]:
    """Circles of modules that import each other, as 'a -> b -> a'."""
    names = {module_name(path, package): path for path in modules(package)}
    wanted = {}
    for name, path in names.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        targets = {target for _, target in imports(tree)}
        targets |= {target.rpartition(".")[0] for target in targets}
        wanted[name] = sorted((targets & set(names)) - {name})
    found, done = [], set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for target in wanted[name]:
                visit(target, [*trail, name])
            done.add(name)

    for name in wanted:
        visit(name, [])
    return found


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def size_problems(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    count = len(text.splitlines())
    found = [f"{path.name}: {count} lines, at most {MAX_MODULE_LINES}"]
    found = found if count > MAX_MODULE_LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, FUNCTIONS):
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path.name}: {node.name} has {length} lines, at most 60")
    return found


def docstring_problems(path: Path) -> list[str]:
    """Public things without docstring; parameters that their docstring does not name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [] if ast.get_docstring(tree) else [f"{path.name}: no docstring"]
    for name, node, owner in definitions(tree):
        if any(part.startswith("_") for part in name.split(".") if part != "__init__"):
            continue
        # A constructor's parameters are described where a reader looks for them: at the class.
        text = ast.get_docstring(owner if node.name == "__init__" else node) or ""
        if not text and node.name != "__init__":
            found.append(f"{path.name}:{node.lineno}: {name} has no docstring")
            continue
        if isinstance(node, FUNCTIONS):
            missing = [p for p in parameters(node) if not re.search(rf"\b{re.escape(p)}\b", text)]
            if missing:
                found.append(f"{path.name}:{node.lineno}: {name} does not name {missing}")
    return found


def definitions(tree: ast.AST, prefix: str = "", owner=None) -> Iterator[tuple]:
    """Full name, node and enclosing class of every function and class, those in functions not."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield prefix + node.name, node, owner
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.", node)


def parameters(node: ast.FunctionDef) -> list[str]:
    listed = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    listed += [given for given in (node.args.vararg, node.args.kwarg) if given]
    return [p.arg for p in listed if p.arg not in ("self", "cls") and not p.arg.startswith("_")]


def word_problems(path: Path, package: Path) -> list[str]:
    """Words of a private dialect where the field has a name."""
    if path.relative_to(package).as_posix() in FOREIGN_WORDS:
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for word, better in PRIVATE_WORDS.items():
            if re.search(rf"(?<![A-Za-z0-9]){word}(?![a-z0-9])", line.replace("plan.flops", "")):
                found.append(f"{path.name}:{number}: {word}: write {better}")
    return found


def init_problems(path: Path) -> list[str]:
    """Statements of an __init__ other than its docstring; show's may list names to import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    facade = path.parent.name == "show"
    allowed = [tree.body[0]] if ast.get_docstring(tree) else []
    for node in tree.body:
        name = node.targets[0].id if isinstance(node, ast.Assign) else ""
        if name == "__version__" or (facade and (name == "__all__")):
            allowed.append(node)
        if facade and isinstance(node, ast.ImportFrom):
            allowed.append(node)
    return [
        f"{path.parent.name}/__init__.py:{node.lineno}: holds more than a docstring"
        for node in tree.body
        if node not in allowed
    ] + ([] if ast.get_docstring(tree) else [f"{path.parent.name}/__init__.py: no docstring"])


def public_names(package: Path) -> dict[str, str]:
    """Public functions and classes of slimlab, each with the module that defines it.

    Without the demos: nobody imports them, and a chapter's cell holds a `program` as they do.
    """
    names = {}
    for path in modules(package):
        if room(path, package) == "demos":
            continue
        for name, _, owner in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            if owner is None and not name.startswith("_"):
                names[name] = module_name(path, package)
    return names
