"""The exported report: whole, offline, atomic, and frank about what failed."""

import os
import re

import numpy as np
import plotly.graph_objects as go
import pytest

from replib.core.errors import ReplibError

nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
from replib.figures.report import FIGURE_MIME, WIDGET_MIME, export_html  # noqa: E402
from replib.figures.widgets import scrub_layers  # noqa: E402

TAG = "<script>alert('a title must stay text')</script>"


def cell(source, *outputs):
    cells = nbformat.v4.new_code_cell(source, execution_count=1)
    cells.outputs = list(outputs)
    return cells


def shown(data):
    return nbformat.v4.new_output("display_data", data=data)


def figure(row: int) -> go.Figure:
    values = np.random.default_rng(row).normal(size=30).astype(np.float32)
    return go.Figure(go.Scatter(x=np.arange(30), y=values, mode="markers"), {"title": TAG, "height": 300})


def write(folder, name, cells):
    path = folder / name
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture
def notebooks(tmp_path):
    """Two executed notebooks as a kernel leaves them, made without one."""
    scrub = scrub_layers({row: figure(row) for row in range(3)})
    markdown = nbformat.v4.new_markdown_cell
    table = "| set | n |\n|---|---|\n| harmful | 96 |"
    first = [
        markdown(f"# Look inside\n\n{table}\n\n## Clusters"),
        cell("scrub", shown(scrub._repr_mimebundle_()[0])),
        cell("figure", shown({FIGURE_MIME: figure(0).to_plotly_json()})),
        cell("bar", shown({WIDGET_MIME: {"model_id": "x"}, "text/plain": "HBox()"})),
    ]
    remote = '<img src="https://example.org/a.png" alt="a plot"><script src="https://example.org/a.js"></script>'
    error = nbformat.v4.new_output("error", ename="ReplibError", evalue="no <model> here", traceback=["line 1"])
    second = [
        markdown("# Bend\n\n## Clusters"),
        cell("html", shown({"text/html": remote})),
        cell("bad()", error),
    ]
    return [write(tmp_path, "01_look.ipynb", first), write(tmp_path, "02_bend.ipynb", second)]


@pytest.fixture
def report(notebooks, tmp_path):
    return export_html(notebooks, tmp_path / "out" / "report.html", title="A <report>")


def body(report) -> str:
    """Return the page without plotly.js, whose text names many addresses."""
    return re.sub(r"<script>/\*\*\n\* plotly.js.*?</script>", "", report.read_text(), count=1, flags=re.S)


def test_the_page_holds_plotly_once_and_fetches_nothing(report):
    text = report.read_text()
    assert text.count("* plotly.js v") == 1
    fetched = re.findall(r"""(?:src|href)=["'](?!data:|#)([^"']+)""", body(report))
    assert fetched == []
    assert not re.search(r"mathjax|mermaid|require\.min|unpkg", body(report), re.IGNORECASE)
    assert "[image not in this report: a plot]" in text


def test_contents_lead_to_anchors_that_exist_once(report):
    text = body(report)
    links = re.findall(r'href="#([^"]+)"', text)
    assert len(links) == len(set(links)) == 4
    assert all(text.count(f'id="{link}"') == 1 for link in links)


def test_errors_and_lost_controls_are_visible(report):
    text = body(report)
    assert "ReplibError: no &lt;model&gt; here" in text
    assert text.count('class="failed"') == 1
    assert text.count("works in the running notebook only") == 1


def test_no_text_of_a_figure_can_leave_its_script_element(report):
    assert TAG not in report.read_text()


def test_a_notebook_that_never_ran_is_named_as_such(tmp_path):
    bare = nbformat.v4.new_code_cell("1 + 1")
    path = write(tmp_path, "raw.ipynb", [bare])
    assert "was not executed" in export_html([path], tmp_path / "r.html", title="t").read_text()


def test_a_failed_write_leaves_the_old_report(notebooks, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ReplibError, match="No space left"):
        export_html(notebooks, out, title="t")
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".report")] == []


def test_a_folder_that_cannot_be_written_is_named(notebooks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReplibError, match="Choose a folder"):
        export_html(notebooks, tmp_path / "file" / "report.html", title="t")


def test_what_is_no_notebook_is_refused(tmp_path):
    (tmp_path / "a.ipynb").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ReplibError, match="holds no JSON"):
        export_html([tmp_path / "a.ipynb"], tmp_path / "r.html", title="t")
    with pytest.raises(ReplibError, match="No notebook at"):
        export_html([tmp_path / "b.ipynb"], tmp_path / "r.html", title="t")
    with pytest.raises(ReplibError, match="no notebooks"):
        export_html([], tmp_path / "r.html", title="t")
