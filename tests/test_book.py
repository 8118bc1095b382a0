"""A book of two chapters loads nothing from a network, finds words and shows formulas."""

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import build_book
import nbformat
import pytest
import rules
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from slimlab.classroom import runner
from slimlab.config import InputError

pytest.importorskip("sphinx", reason="the extra [book] is not installed")
pytest.importorskip("myst_nb", reason="the extra [book] is not installed")

ROOT = Path(__file__).resolve().parents[1]
PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    notebook = new_notebook(cells=list(cells))
    rules.tidy(notebook)
    nbformat.write(notebook, path)


def write_root(root):
    """Two chapters, one exercise sheet, two solutions and the book's own settings."""
    figure = new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})
    printed = new_output("stream", name="stdout", text="saxophone\n")
    write_notebook(
        root / "chapters" / "01_one.ipynb",
        new_markdown_cell("# One\n\nInline $x_1^2$ and\n\n$$\\sum_i a_{ti} = 1$$"),
        new_code_cell("draw()", execution_count=1, outputs=[printed, figure]),
    )
    write_notebook(root / "chapters" / "02_two.ipynb", new_markdown_cell("# Two\n\nA xylophone."))
    write_notebook(root / "exercises" / "01_one.ipynb", new_markdown_cell("# Exercises of one"))
    for name in ("01_one", "02_two"):
        write_notebook(
            root / "solutions" / f"{name}.ipynb", new_markdown_cell("# Solved: exercises")
        )
    shutil.copytree(ROOT / "book", root / "book")
    (root / "slimlab").mkdir()
    (root / "slimlab" / "config.py").write_text("x = 1\n")
    (root / "chapters" / "coverage").mkdir()
    (root / "chapters" / "coverage" / "01_one.toml").write_text(
        '[[item]]\nid = "C1"\ntitle = "Sums"\ncell = "a"\nquestion = "What is the sum of a row?"\n'
    )
    return root


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    root = write_root(tmp_path_factory.mktemp("root") / "mein Buch, 书")
    assert build_book.build_book(root, root / "build", solutions="02", run=False) == []
    return root / "build" / "book"


class Loaded(HTMLParser):
    """Collects the addresses that a browser loads to show a page; links to follow are not."""

    def __init__(self, page):
        super().__init__()
        self.addresses, self.text, self.script = [], page.read_text(encoding="utf-8"), False
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed"):
            self.addresses.append(attrs.get("src") or "")
        loading = ("stylesheet", "preload", "modulepreload", "icon", "preconnect", "manifest")
        if tag == "link" and set((attrs.get("rel") or "").split()) & set(loading):
            self.addresses.append(attrs["href"])


def test_pages_load_scripts_styles_and_images_from_the_book_only(book):
    pages = [page for page in sorted(book.rglob("*.html")) if "_static" not in page.parts]
    assert {"index.html", "01_one.html", "02_two.html", "search.html"} <= {p.name for p in pages}
    for page in pages:
        for address in filter(None, Loaded(page).addresses):
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
            if not address.startswith("data:"):
                file = (page.parent / re.split(r"[?#]", address)[0]).resolve()
                assert file.is_file(), f"{page.name} loads {address}, which is not there"


def test_styles_load_fonts_and_images_from_the_book_only(book):
    styles = sorted(book.rglob("*.css"))
    assert styles
    for style in styles:
        text = style.read_text(encoding="utf-8", errors="replace")
        found = re.findall(
            r"""url\(\s*["']?((?:https?:)?//[^)"']+)|@import\s+["'](http\S+)""", text
        )
        assert found == [], style.name


def test_formulas_stand_between_delimiters_and_mathjax_lies_beside_them(book):
    text = (book / "chapters" / "01_one.html").read_text(encoding="utf-8")
    assert r"\(x_1^2\)" in text
    assert r"\[\sum_i a_{ti} = 1\]" in text
    assert "../_static/mathjax/MathJax.js" in text
    assert "MathJax.Hub.Config" in text
    for part in build_book.MATHJAX_PARTS:
        assert (book / "_static" / "mathjax" / part).exists()


def test_outputs_and_figures_are_shown(book):
    page = Loaded(book / "chapters" / "01_one.html")
    assert "saxophone" in page.text
    assert any(address.endswith(".png") for address in page.addresses)


def test_search_knows_words_of_the_text(book):
    index = (book / "searchindex.js").read_text(encoding="utf-8")
    assert "xylophon" in index
    assert "chapters/02_two" in index


def test_only_the_chosen_solutions_are_there(book):
    assert [page.stem for page in (book / "solutions").glob("*.html")] == ["02_two"]
    assert not list(book.rglob("*solutions/01_one*"))
    contents = (book / "index.html").read_text(encoding="utf-8")
    assert "solutions/02_two.html" in contents
    assert "Solved: solutions" in contents


def test_the_table_of_topics_links_to_chapters(book):
    text = (book / "covered.html").read_text(encoding="utf-8")
    assert "What is the sum of a row?" in text
    assert 'href="chapters/01_one.html"' in text


def test_solutions_of_a_chapter_that_has_none_are_refused(tmp_path):
    with pytest.raises(InputError, match="choose from 01_one"):
        build_book.chosen_solutions([tmp_path / "01_one.ipynb"], "01,07")


def test_a_chapter_runs_again_only_when_something_changed(tmp_path, monkeypatch, capsys):
    root, ran = write_root(tmp_path), []

    def run_chapters(names, output_folder, root):
        path = Path(names[0])
        ran.append(path.stem)
        output_folder.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, output_folder / path.name)
        failure = "boom" if path.stem == "02_two" and len(ran) > 4 else None
        return [runner.RunReport(path.stem, output_folder / path.name, 1, 0.1, failure)]

    monkeypatch.setattr(runner, "run_chapters", run_chapters)
    build_book.run_changed(root, root / "build")
    assert ran == ["01_one", "02_two"]
    build_book.run_changed(root, root / "build")
    assert ran == ["01_one", "02_two"]
    write_notebook(root / "chapters" / "01_one.ipynb", new_markdown_cell("# One, changed"))
    build_book.run_changed(root, root / "build")
    assert ran == ["01_one", "02_two", "01_one"]
    (root / "slimlab" / "config.py").write_text("x = 2\n")
    pages, failed = build_book.run_changed(root, root / "build")
    assert ran[3:] == ["01_one", "02_two"]
    assert failed == ["02_two"]
    assert pages["02_two"] == root / "chapters" / "02_two.ipynb"
    build_book.run_changed(root, root / "build")
    assert ran[5:] == ["02_two"]
    assert "unchanged" in capsys.readouterr().out


def test_what_a_build_remembers_may_be_damaged(tmp_path):
    memory = tmp_path / "fingerprints.json"
    assert build_book.remembered(memory) == {}
    for text in ("", "[]", '{"01_one": "x', "\0"):
        memory.write_text(text)
        assert build_book.remembered(memory) == {}
    memory.write_text('{"01_one": "x"}')
    assert build_book.remembered(memory) == {"01_one": "x"}


def test_two_builds_at_once_are_refused_and_the_leftovers_of_a_killed_one_removed(tmp_path):
    (tmp_path / ".book-killed" / "source").mkdir(parents=True)
    with build_book.one_at_a_time(tmp_path):
        assert not (tmp_path / ".book-killed").exists()
        with pytest.raises(InputError, match="another build"), build_book.one_at_a_time(tmp_path):
            pass
    with build_book.one_at_a_time(tmp_path):
        pass


@pytest.mark.parametrize("room", ["chapters", "exercises", "solutions"])
def test_a_broken_notebook_is_named_and_the_finished_book_stays(tmp_path, room):
    root = write_root(tmp_path / "mein Buch, 书")
    page = root / "build" / "book" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("the old book")
    (root / room / "02_two.ipynb").write_text("<<<<<<< HEAD")
    with pytest.raises(InputError, match=rf"{room}/02_two\.ipynb, which is not one"):
        build_book.build_book(root, root / "build", run=False)
    assert page.read_text() == "the old book"
    assert sorted(path.name for path in (root / "build").iterdir()) == [".lock", "book"]


def test_a_book_without_chapters_is_refused(tmp_path):
    with pytest.raises(InputError, match="no chapters in"):
        build_book.build_book(tmp_path, tmp_path / "build")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["one file", "many files", "no permission"])
def test_a_disk_that_cannot_be_written_is_told_without_a_traceback(
    tmp_path, monkeypatch, capsys, kind
):
    full = OSError(28, "No space left on device", "x")
    error = {
        "one file": full,
        "many files": shutil.Error([("a", "b", str(full)), ("c", "d", str(full))]),
        "no permission": PermissionError(13, "Permission denied", "x"),
    }[kind]

    def build(*_):
        raise error

    monkeypatch.setattr(build_book, "build_book", build)
    monkeypatch.setattr("sys.argv", ["build_book.py"])
    assert build_book.main() == 1
    told = capsys.readouterr().err
    assert ("Permission denied" if kind == "no permission" else "No space left") in told
    assert "MB free" in told


def dump_dom(address, folder):
    """Open a page in a browser that finds no host, and return it after its scripts have run."""
    command = [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu"]
    command += ["--disable-quic", "--no-first-run", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}"]
    command += ["--virtual-time-budget=15000", "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=90).stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium to render pages with")
def test_a_browser_without_network_shows_formulas_and_search_hits(book, tmp_path):
    page = dump_dom((book / "chapters" / "01_one.html").as_uri(), tmp_path / "a")
    assert page.count('class="MathJax_SVG"') == 2
    assert not re.search(r'class="(MathJax_Error|noError|merror)', page)
    hits = dump_dom((book / "search.html").as_uri() + "?q=xylophone", tmp_path / "b")
    assert re.search(r'<ul[^>]*class="search".*href="chapters/02_two.html', hits, re.DOTALL)
