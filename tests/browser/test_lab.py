"""Live views in JupyterLab, drawn and moved without the kernel."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the extra `notebooks` is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")

pytestmark = [pytest.mark.browser, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
TOKEN = "replib-test"
CELLS = [
    "import numpy as np\n"
    "import plotly.graph_objects as go\n"
    "from replib.figures import scrub_layers\n"
    "x, y = np.random.default_rng(0).normal(size=(2, 4, 40))\n"
    "def draw(row):\n"
    "    points = go.Scatter(x=x[row], y=y[row], mode='markers')\n"
    "    return go.Figure(points, {'title': {'text': f'block {row}'}})\n"
    "scrub_layers({row: draw(row) for row in range(4)})",
    "scrub_layers({row: draw(row) for row in range(4)})",
    "import time\ntime.sleep(10)",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with settings of its own, opened on a folder with one notebook."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "a.ipynb")
    news = folder / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    places = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "RUNTIME", "DATA")}
    lab_places = {f"JUPYTERLAB_{name.upper()}_DIR": str(folder / name) for name in ("settings", "workspaces")}
    port = free_port()
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.root_dir": folder,
        "IdentityProvider.token": TOKEN,
        "LabApp.expose_app_in_browser": True,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *arguments],
            env=os.environ | places | lab_places | {"PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
    try:
        wait_for_server(f"http://127.0.0.1:{port}/api?token={TOKEN}", server, folder / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/a.ipynb?token={TOKEN}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for_server(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def test_views_live_in_jupyterlab(lab, page, places):
    page.set_default_timeout(90_000)
    page.goto(lab)
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel")
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")

    # The last cell keeps the kernel busy: whatever moves now, moves without it.
    views = page.locator(".replib-scrub")
    views.nth(1).locator("path.point").first.wait_for()
    assert page.locator(".jp-InputPrompt", has_text="[*]").count() > 0
    layers = views.nth(0)
    before = places(layers)
    layers.locator("svg").first.evaluate("svg => { svg.dataset.first = 'yes' }")
    layers.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    layers.locator(".gtitle", has_text="block 1").wait_for()
    assert places(layers) != before
    assert layers.locator("svg[data-first=yes]").count() == 1, "the figure must not be torn out"
    assert page.locator(".jp-InputPrompt", has_text="[*]").count() > 0, "the kernel was idle, so nothing is shown"
    assert page.locator("head script[src^='blob:']").count() == 1, "two views, one plotly.js"
    assert not [error for error in page.errors if "replib" in error or "anywidget" in error]
