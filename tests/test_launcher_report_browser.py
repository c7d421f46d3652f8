"""Does a browser show a report: every picture there, no word of complaint, nothing wider than the screen?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from looking_runs import make_run

from ghostmask.launcher.cli import run_command

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
WIDTHS = {"a desk": 1280, "a telephone": 400}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; both are installed by `bash .ci/browser.sh`."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: bash .ci/browser.sh installs it")
    if not CHROMIUM:
        pytest.skip("no browser: bash .ci/browser.sh installs one")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )  # fmt: skip
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "of_many_layers", layers=54, decided=0.5, **{"gradient/clip_factor": 0.3})
    out = Path(folder / "report.html")
    assert run_command(["report", str(run), "--out", str(out)]) == 0
    return out.as_uri()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
def test_a_report_is_whole_on_a_screen(browser: Any, address: str, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    complaints: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    pictures = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth, i.alt.length])")
    assert len(pictures) >= 12
    for complete, natural, shown, words in pictures:
        assert complete
        assert natural > 100
        assert 250 < shown <= width
        assert words > 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = (
        "[...document.querySelectorAll('td, th, li, p, img')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    )
    assert page.evaluate(f"{cut}.map(e => e.textContent)") == []
    sizes = (
        "[...document.querySelectorAll('td, th, li, figcaption')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(page.evaluate(sizes)) >= 11
    page.close()
