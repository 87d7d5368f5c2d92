"""Draw the picture of the README: ``python tools/readme_picture.py`` (needs the browser extra and a Chromium)."""

from __future__ import annotations

import argparse
import shutil

import plotly.graph_objects as go

from replib.core.errors import ReplibError
from replib.core.settings import data_dir
from replib.figures import clusters_pair
from replib.study.study import Study

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1000, 460


def main() -> None:
    """Command line: bend the aligned organism, or read the adapter, and draw one block before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layer", type=int, default=9)
    layer = parser.parse_args().layer
    study = Study.open()
    bent = study.with_model(study.bend().model)
    after = bent.pair()
    with bent.model.adapter_off():
        before = bent.pair()
    photograph(clusters_pair(before, after, layer), str(data_dir() / "clusters.png"))


def photograph(figure: go.Figure, path: str) -> None:
    """A PNG of what a browser draws, at twice the size on screen."""
    from playwright.sync_api import sync_playwright

    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise ReplibError(f"A picture needs a browser: install one of {', '.join(BROWSERS)}.")
    page_source = figure.to_html(include_plotlyjs=True, config={"displayModeBar": False}, default_width=WIDTH)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH + 16, "height": HEIGHT}, device_scale_factor=2)
        page.set_content(page_source)
        page.locator(".js-plotly-plot .main-svg").first.wait_for()
        page.locator(".js-plotly-plot").screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    main()
