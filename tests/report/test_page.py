"""The page in a real browser."""

from pathlib import Path

import pytest

from samon.cli import report
from tests.browser import chromium
from tests.report.conftest import ENDING, HOSTILE
from tests.runs import ROOT

pytestmark = pytest.mark.slow

OVERLAPS = """plot => {
  const boxes = [...plot.querySelectorAll('text')].map(text => text.getBoundingClientRect());
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2;
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => meet(a, b))).length;
}"""
BEYOND = """plot => {
  const box = plot.getBoundingClientRect();
  return [...plot.querySelectorAll('text')].map(text => text.getBoundingClientRect())
    .filter(t => t.left < box.left - 4 || t.right > box.right + 4).length;
}"""


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_page_in_a_browser(width: int, scheme: str, sources: list[Path], tmp_path: Path) -> None:
    """No console message, names as text, both themes, no text on another one and nothing wider than the screen."""
    path = tmp_path / "report.html"
    committed = ROOT / "experiments/tradeoff/results.json"
    report.main([*map(str, [*sources, committed]), "-o", str(path), "--title", HOSTILE])
    with chromium() as browser:
        page = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme).new_page()
        page.set_default_timeout(120_000)
        messages: list[str] = []
        requests: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        plots = page.query_selector_all(".plot")
        assert len(plots) >= 13
        assert all(plot.query_selector("path") for plot in plots)
        assert [plot.evaluate(OVERLAPS) for plot in plots] == [0] * len(plots)
        assert [plot.evaluate(BEYOND) for plot in plots] == [0] * len(plots)
        assert page.title() == HOSTILE
        assert page.query_selector("img, main b, table script, svg script") is None
        assert HOSTILE in page.text_content("#origin")
        assert ENDING in page.text_content("#sharpness-0 .plot").replace("\n", "")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelector('nav').querySelectorAll('a').length") <= 6
        background = "getComputedStyle(document.body).backgroundColor"
        text = "getComputedStyle(document.querySelector('.plot text')).fill"
        shown = {scheme: (page.evaluate(background), page.evaluate(text))}
        page.click("#theme")
        shown["light" if scheme == "dark" else "dark"] = page.evaluate(background), page.evaluate(text)
        assert shown["dark"] == ("rgb(22, 24, 27)", "rgb(236, 236, 236)")
        assert shown["light"] == ("rgb(255, 255, 255)", "rgb(28, 28, 28)")
        assert messages == []
        assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
