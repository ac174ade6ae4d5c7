"""The report in a headless Chromium, driven by Playwright.

`SCREENSHOTS=runs/screenshots bash scripts/test.sh -m browser` keeps what the browser showed. These tests need Chromium
or Chrome on the machine (apt-get install chromium; CHROMIUM names another program) and fail without one: a page that
no browser has opened is not known to work. `-m "not browser"` leaves them out on purpose.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from scripts.report import main as report_command
from tests.report_case import ROWS, make_world, many_clips, write_run
from utils.report.page import render_page

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 420, "height": 900}
CARDS = "#clips article"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
UNNAMED = """[...document.querySelectorAll('a, button, input, select, audio, summary')].filter(e =>
  !(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length))).length"""
SOUND = """new Promise(done => { const p = document.querySelector('#clips audio');
  p.onloadedmetadata = () => done(p.duration); p.onerror = () => done(-1); p.preload = 'auto'; p.load(); })"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CHROMIUM"), *NAMES)))), None)
    if found is None:
        pytest.fail(
            f"no browser: none of {', '.join(NAMES)} is on the PATH. Remedy: apt-get install chromium, or set "
            'CHROMIUM=/path/to/chrome, or leave these tests out with -m "not browser".',
            pytrace=False,
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--mute-audio"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A window that notes what the page asks for (`requests`) and complains about (`errors`)."""
    page = browser.new_page(viewport=WIDE)
    page.errors, page.requests = [], []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda said: page.errors.append(said.text) if said.type == "error" else None)
    page.on("request", lambda request: page.requests.append(request.url))
    yield page
    page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    write_run(folder / "run", make_world(folder / "data"))
    assert report_command([str(folder / "run")]) == 0
    return folder / "run/report.html"


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Folder of the screenshots."""
    return Path(os.environ.get("SCREENSHOTS", tmp_path))


def wait_until(page: Page, condition: str) -> None:
    """Playwright's own wait_for_function calls eval in the page, which the page's policy forbids."""
    for _ in range(100):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"{condition} did not become true within 5 s")


def screenshots(page: Page, folder: Path, name: str) -> None:
    """The top of the page and each of its sections."""
    for anchor in ["", *page.evaluate("[...document.querySelectorAll('nav.top a')].map(a => a.hash.slice(1))")]:
        page.evaluate("anchor => anchor ? document.getElementById(anchor).scrollIntoView() : scrollTo(0, 0)", anchor)
        page.wait_for_timeout(100)
        page.screenshot(path=folder / f"{name}_{anchor or 'top'}.png")


def test_a_report_opens_within_itself_and_holds_its_width(report: Path, page: Page, shots: Path) -> None:
    page.goto(report.as_uri())
    assert page.locator(CARDS).count() == len(ROWS) and page.evaluate("shown.length") == len(ROWS)
    assert page.evaluate(UNNAMED) == 0 and page.evaluate("typeof window.alerted") == "undefined"
    for view, scheme, name in ((WIDE, "light", "wide"), (NARROW, "light", "narrow"), (WIDE, "dark", "dark")):
        page.set_viewport_size(view)
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(OVERFLOW) <= 0, name
        screenshots(page, shots, name)
    assert page.evaluate(BROKEN) == [] and page.errors == []
    assert not any(url.endswith(".mp3") for url in page.requests)  # sounds wait until they are asked for
    assert page.evaluate(SOUND) == pytest.approx(2, abs=0.2)
    asked = {url for url in page.requests if not url.startswith("data:")}
    assert len(asked) > 5 and all(url.startswith(report.parent.as_uri()) for url in asked)
    assert {"wide_top.png", "narrow_gallery-title.png", "dark_stages.png"} <= {
        path.name for path in shots.iterdir()
    }


def test_every_value_of_every_filter_shows_clips_that_belong(report: Path, page: Page) -> None:
    page.goto(report.as_uri())
    before = page.locator("#count").text_content()
    assert before == f"{len(ROWS)} of {len(ROWS)} clips."
    options = page.evaluate(
        "[...document.querySelectorAll('#filters select')].flatMap(s => [...s.options].map(o => [s.name, o.value]))"
    )
    assert len(options) > 20
    for name, value in options:
        page.locator(f"#filters select[name={name}]").select_option(value=value)
        page.wait_for_timeout(20)
        number, cards = page.evaluate("shown.length"), page.locator(CARDS).count()
        assert page.evaluate("shown.every(row => row.said[value('run')])") and cards == number, (name, value)
        if name in ("split", "class") and value:
            field = {"split": "split", "class": "cls"}[name]
            assert number and page.evaluate("([f, v]) => shown.every(row => row[f] === v)", [field, value])
        page.locator("#filters button[type=reset]").click()
        page.wait_for_timeout(20)
        assert page.locator("#count").text_content() == before
    assert page.errors == []


def test_keys_search_masks_and_the_enlarged_clip(report: Path, page: Page, shots: Path) -> None:
    page.goto(report.as_uri())
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "text"
    page.keyboard.type("zzqq")
    wait_until(page, "shown.length === 0")
    page.locator("#filters button[type=reset]").click()
    wait_until(page, f"shown.length === {len(ROWS)}")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.tagName") == "ARTICLE"
    masks = page.locator("#clips .mask").first
    page.keyboard.press("m")
    assert not masks.is_visible()
    page.keyboard.press("m")
    assert masks.is_visible()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    label = page.locator("dialog .slide .meta")
    assert label.text_content() == "frame 1 of 10"
    page.keyboard.press("ArrowRight")
    assert label.text_content() == "frame 2 of 10"
    page.screenshot(path=shots / "enlarged.png")
    page.keyboard.press("Escape")
    assert not dialog.is_visible() and page.errors == []


def test_addresses_and_links_choose_what_is_shown(report: Path, page: Page) -> None:
    page.goto(report.as_uri() + "#beside=teacher&order=worst")
    assert page.evaluate("value('beside')") == "teacher" and page.evaluate("shown[0].row") == 1
    page.locator("a.show").first.click()
    wait_until(page, "shown.length === 1")
    assert page.evaluate("[value('run'), value('beside')]") == ["sft", "teacher"]
    assert page.evaluate("location.hash") == "#beside=teacher&row=2" and page.errors == []


def test_thousands_of_clips_open_as_fast_as_a_few(page: Page, tmp_path: Path) -> None:
    data = many_clips(tmp_path)
    for row in data["rows"]:
        row |= {"frames": f"f/{row['row']}.jpg", "truth": f"t/{row['row']}.png", "n": 10, "hw": [48, 64]}
    path = tmp_path / "many.html"
    path.write_text(render_page("many", {"stages": {}}, gallery=data), encoding="utf-8")
    page.goto(path.as_uri(), timeout=30_000)  # docs/report.md has what was measured
    assert page.evaluate("shown.length") == len(data["rows"]) and 0 < page.locator(CARDS).count() <= 40
    assert len(page.requests) < 60
