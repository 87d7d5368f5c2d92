"""HTML report of executed notebooks that needs no kernel and no network.

nbconvert renders the cells. Plotly figures and the views of `replib.figures.widgets` stay interactive: the page has
plotly.js once, and `static/view.js` draws them as it draws the live widget.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup
from jinja2 import Environment, FileSystemLoader
from nbconvert import HTMLExporter
from plotly.offline import get_plotlyjs
from pygments.formatters import HtmlFormatter

from replib.core.errors import ReplibError
from replib.core.storage import write_text
from replib.figures.widgets import STATIC, VIEW_MIME

FIGURE_MIME = "application/vnd.plotly.v1+json"
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
_LIVE = {VIEW_MIME: "replib-view", FIGURE_MIME: "replib-figure"}


@dataclass(frozen=True)
class Chapter:
    """One notebook of the report; `sections` are anchors and headings."""

    anchor: str
    title: str
    sections: list[tuple[str, str]]
    body: str
    executed: bool
    failed: bool


def export_html(notebooks: Sequence[Path], out: Path, *, title: str) -> Path:
    """Write executed notebooks into one self-contained page, whole or not at all, and return its path."""
    if not notebooks:
        raise ReplibError("The report got no notebooks. Run them first, then pass the executed files.")
    exporter = HTMLExporter(template_file=str(STATIC / "notebook.html.j2"))
    chapters = [_chapter(exporter, path) for path in notebooks]
    template = Environment(loader=FileSystemLoader(STATIC), autoescape=True).get_template("page.html.j2")
    styles = (_text("page.css"), _text("view.css"), HtmlFormatter().get_style_defs(".highlight"))
    parts = {
        "css": "\n".join(styles),
        "script": _text("view.js") + _text("page.js"),
        "plotly": get_plotlyjs(),
    }
    return write_text(out, template.render(title=title, chapters=chapters, **parts))


def _chapter(exporter: HTMLExporter, path: Path) -> Chapter:
    notebook = _read(path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:
        if "data" in output:
            output.data = _alive(output.data)
    body, _ = exporter.from_notebook_node(notebook)
    soup = BeautifulSoup(body, "html.parser")
    _keep_offline(soup)
    headings = [*_headings(soup, path.stem)]
    return Chapter(
        anchor=path.stem,
        title=next((text for level, _, text in headings if level == "h1"), path.stem),
        sections=[(anchor, text) for level, anchor, text in headings if level == "h2"],
        body=str(soup),
        executed=any(cell.get("execution_count") for cell in notebook.cells),
        failed=any(output.output_type == "error" for output in outputs),
    )


def _read(path: Path) -> nbformat.NotebookNode:
    try:
        return nbformat.read(path, as_version=4)
    except FileNotFoundError as error:
        raise ReplibError(f"No notebook at {path}. Run the notebooks first, or correct the path.") from error
    except (nbformat.reader.NotJSONError, UnicodeDecodeError) as error:
        raise ReplibError(f"{path} is not a notebook; it holds no JSON. Pass .ipynb files.") from error


def _alive(data: dict[str, Any]) -> dict[str, Any]:
    """Turn a figure or view into a node for `static/page.js`; replace other controls by a note."""
    for mime, name in _LIVE.items():
        if mime in data:
            content = json.dumps(data[mime]).replace("<", "\\u003c")  # no text can close the script element
            height = _height(data[mime])
            place = f'<div class="live" style="min-height:{height}px"></div>'
            script = f'<script type="application/json">{content}</script>'
            return {"text/html": f'<div class="{name}">{place}{script}</div>'}
    if WIDGET_MIME in data:
        return {"text/html": '<p class="quiet">A control stood here that works in the running notebook only.</p>'}
    return data


def _height(content: dict[str, Any]) -> int:
    """Height of a figure in pixels, reserved so that the page does not jump when it is drawn."""
    layout = content["layout"] if "layout" in content else content["figure"]["layout"]
    return int(layout.get("height", 450))


def _keep_offline(soup: BeautifulSoup) -> None:
    """Remove scripts, styles and images from the network; a note stands in place of an image."""
    for node in soup.select("script[src], link[href], iframe[src], img[src], source[src], video[src]"):
        target = str(node.get("src") or node.get("href"))
        if target.startswith(("data:", "#")):
            continue
        alternative = f"[image not in this report: {node.get('alt') or target}]"
        node.replace_with(alternative) if node.name == "img" else node.decompose()


def _headings(soup: BeautifulSoup, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Give each heading a unique anchor; yield level, anchor and text."""
    for number, heading in enumerate(soup.select(".jp-MarkdownCell :is(h1, h2)")):
        anchor = f"{prefix}-{number}"
        for link in heading.select(".anchor-link"):
            link.decompose()
        heading["id"] = anchor
        yield heading.name, anchor, heading.get_text(strip=True)


def _text(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")
