"""Look at a report in a real browser: does it load, hold its width, answer to filters and keys, stay within itself?

    python scripts/check_report.py runs/quickstart/index.html --out runs/quickstart/screenshots

Needs Chromium or Chrome (apt-get install chromium; CHROMIUM names another program). Prints what was measured, writes
screenshots of every section at 1280 and 420 pixels, light and dark, and ends with status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.browser import Browser  # noqa: E402 - the project's root must be on the path first
from utils.errors import AuroraError  # noqa: E402

WIDE, NARROW = (1280, 900), (420, 900)
FIRST = 40
"""At most this many clips may have been made when a page has just opened."""
CARDS = "document.querySelectorAll('#clips article').length"
COUNT = "document.getElementById('count').textContent"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
UNNAMED = (
    "[...document.querySelectorAll('a, button, input, select, audio, summary')].filter(e => "
    "!(e.textContent.trim() || e.getAttribute('aria-label') || (e.labels && e.labels.length))).length"
)


def check(page: Path, out: Path) -> tuple[dict[str, Any], list[str]]:
    """What was measured, and what is wrong.

    Args:
        page: the HTML file.
        out: folder of the screenshots.

    Raises:
        BrowserError: there is no browser, or it does not answer.
    """
    facts: dict[str, Any] = {}
    with Browser(WIDE) as browser:
        facts["seconds_to_load"] = round(browser.open(page), 3)
        problems = list(_opened(browser, page, facts))
        _pictures(browser, out, "wide")
        if facts["gallery"]:
            problems += _filters(browser, facts)
            problems += _keys(browser, out)
        problems += _sound(browser, facts)
        problems += [f"broken picture {address}" for address in browser.run(BROKEN)[:3]]
        problems += _narrow(browser, out)
        problems += [f"the browser reports: {error}" for error in browser.errors[:3]]
    return facts, problems


def _opened(browser: Browser, page: Path, facts: dict[str, Any]) -> Iterator[str]:
    facts["gallery"] = browser.run("document.getElementById('gallery') !== null")
    facts["clips_at_start"] = browser.run(CARDS)
    facts["requests_at_start"] = len(browser.requests)
    facts["clips"] = browser.run("window.shown === undefined && typeof shown !== 'undefined' ? shown.length : 0")
    folder = page.resolve().parent.as_uri()
    for address in browser.requests:
        if not address.startswith((folder, "data:", "about:")) and not address.startswith("file:"):
            yield f"asks for {address}, which is outside this machine"
    if facts["clips_at_start"] > FIRST:
        yield f"{facts['clips_at_start']} clips are made at once, more than {FIRST}"
    if browser.run(OVERFLOW) > 0:
        yield f"the page is wider than a window of {WIDE[0]} pixels"
    if browser.run(UNNAMED):
        yield f"{browser.run(UNNAMED)} controls have no name for screen readers"


def _filters(browser: Browser, facts: dict[str, Any]) -> Iterator[str]:
    """Every value of every list gives clips that the page counts, and all of them come back."""
    before = browser.run(COUNT)
    options = browser.run(
        "[...document.querySelectorAll('#filters select')].flatMap(s => [...s.options].map(o => [s.name, o.value]))"
    )
    for name, value in options:
        script = f"""(() => {{ const s = form.elements[{json.dumps(name)}]; s.value = {json.dumps(value)};
            s.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"""
        browser.run(script)
        browser.settle(0.03)
        if not browser.run(f"shown.every(r => r.said[value('run')]) && {CARDS} <= shown.length"):
            yield f"filter {name} = {value!r} shows clips that do not belong"
        browser.run("form.reset()")
        browser.settle(0.03)
    facts["filters_tried"] = len(options)
    if browser.run(COUNT) != before:
        yield f"after a reset the page counts {browser.run(COUNT)!r} instead of {before!r}"


def _keys(browser: Browser, out: Path) -> Iterator[str]:
    browser.run("document.activeElement.blur()")
    browser.press("/", 191, "/")
    if browser.run("document.activeElement.name") != "text":
        yield "key / does not reach the search"
    for letter in "zzqq":
        browser.press(letter, ord(letter.upper()), letter)
    browser.settle(0.4)
    if browser.run("shown.length"):
        yield "searching for zzqq finds clips"
    browser.run("form.reset()")
    browser.settle(0.1)
    browser.press("Escape", 27)
    browser.press("j", 74, "j")
    browser.settle(0.1)
    if browser.run("document.activeElement.tagName") != "ARTICLE":
        yield "key j does not reach the first clip"
        return
    browser.press("m", 77, "m")
    if not browser.run("document.body.classList.contains('plain')"):
        yield "key m does not hide the masks"
    browser.press("m", 77, "m")
    if browser.run("document.querySelector('#clips .enlarge') !== null"):
        yield from _enlarged(browser, out)


def _enlarged(browser: Browser, out: Path) -> Iterator[str]:
    browser.press("Enter", 13, "\r")
    browser.settle(0.5)
    if not browser.run("large.open"):
        yield "key Enter does not enlarge the clip"
        return
    label = "document.querySelector('dialog .slide .meta').textContent"
    first = browser.run(label)
    browser.press("ArrowRight", 39)
    if browser.run("Number(document.querySelector('dialog input').max)") > 0 and browser.run(label) == first:
        yield "key → does not show the next frame"
    browser.screenshot(out / "enlarged.png")
    browser.press("Escape", 27)
    browser.settle(0.1)
    if browser.run("large.open"):
        yield "key Esc does not close the enlarged clip"


def _sound(browser: Browser, facts: dict[str, Any]) -> Iterator[str]:
    """The first player loads its sound when asked to."""
    script = """new Promise(done => { const p = document.querySelector('#clips audio'); if (!p) return done(-1);
        p.onloadedmetadata = () => done(p.duration); p.onerror = () => done(-2); setTimeout(() => done(-3), 8000);
        p.load(); p.preload = 'auto'; p.load(); })"""
    seconds = browser.run(script)
    facts["seconds_of_first_sound"] = None if seconds == -1 else round(seconds, 2)
    if seconds < -1:
        yield "the first sound does not load"


def _narrow(browser: Browser, out: Path) -> Iterator[str]:
    browser.resize(*NARROW)
    browser.run("scrollTo(0, 0)")
    if browser.run(OVERFLOW) > 0:
        yield f"the page is wider than a window of {NARROW[0]} pixels"
    _pictures(browser, out, "narrow")
    browser.resize(*WIDE, dark=True)
    _pictures(browser, out, "dark")


def _pictures(browser: Browser, out: Path, name: str) -> None:
    browser.run("scrollTo(0, 0)")
    browser.settle(0.3)
    browser.screenshot(out / f"{name}_top.png")
    for anchor in browser.run("[...document.querySelectorAll('nav.top a')].map(a => a.hash.slice(1))"):
        browser.run(f"document.getElementById({json.dumps(anchor)}).scrollIntoView()")
        browser.settle(0.4)
        browser.screenshot(out / f"{name}_{anchor}.png")
    browser.run("scrollTo(0, 0)")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="HTML file of scripts/report.py or the quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder of the screenshots")
    options = parser.parse_args(arguments)
    if not options.page.is_file():
        parser.error(f"{options.page}: no such page; write one with scripts/report.py")
    try:
        facts, problems = check(options.page, options.out)
    except AuroraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(facts, indent=1))
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
