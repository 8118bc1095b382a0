"""Try to break the cells of a chapter while nbval runs it: a plugin of pytest.

    pytest -p perturb_plugin --nbval chapters    (conftest.py registers it: no -p needed here)

Before a cell with perturbations (see covered.py) is run in the notebook's kernel, the kernel forks
for each of them. The copy runs the perturbation and the cell, which must fail by its assertion; if
it does not, the test of the cell fails. So a chapter is run once for outputs and perturbations.
"""

import ast
import functools
from pathlib import Path

import covered
import perturbing
import pytest

COUNT = "perturbations"


@functools.cache
def table(folder: Path) -> list[covered.Item]:
    """Return all items of the tables in `folder` that have a perturbation."""
    return [one for one in covered.load(folder) if one.perturb]


def perturbations_of(item: pytest.Item) -> list[covered.Item]:
    """Return the items that perturb the cell of this test; none for other tests."""
    if not hasattr(item, "cell"):
        return []
    here, cell = item.path.stem, item.cell["id"]
    found = table(item.path.parent / "coverage")
    return [one for one in found if (one.chapter, one.perturb_at) == (here, cell)]


def ask(kernel, *arguments: str) -> str:
    """Call try_in_fork in the kernel, which neither counts nor remembers it."""
    call = f"__import__('runpy').run_path({perturbing.__file__!r})['try_in_fork'](*{arguments!r})"
    options = {"silent": True, "store_history": False, "user_expressions": {"outcome": call}}
    if not kernel.is_alive():
        return "the kernel is gone"
    number = kernel.kc.execute("", **options)
    while True:
        message = kernel.kc.get_shell_msg(timeout=perturbing.DEADLINE_S + 20)
        if message["parent_header"].get("msg_id") == number:
            break
    answer = message["content"]["user_expressions"]["outcome"]
    if answer["status"] != "ok":
        return f"the kernel cannot try it: {answer['ename']}: {answer['evalue']}"
    return ast.literal_eval(answer["data"]["text/plain"])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Perturb the cell, then run it; fail if a perturbation was not caught."""
    found, wrong = perturbations_of(item), []
    for one in found:
        kernel, cell = item.parent.kernel, item.cell
        outcome = ask(kernel, one.id, one.perturb, cell["id"], cell["source"])
        if outcome != "caught":
            wrong.append(f"{one.id} ({one.title}): {outcome}")
    item.user_properties.append((COUNT, len(found)))
    result = yield
    assert not wrong, "\n".join(wrong)
    return result


def pytest_terminal_summary(terminalreporter):
    """Say how many perturbations were tried."""
    reports = [one for group in terminalreporter.stats.values() for one in group]
    calls = [one for one in reports if getattr(one, "when", "") == "call"]
    tried = sum(dict(one.user_properties).get(COUNT, 0) for one in calls)
    if calls:
        terminalreporter.write_line(f"{tried} perturbations were tried")
