"""The report in a headless Chromium, where the machine has one; screenshots stay in pytest's temporary folder.

`bash scripts/test.sh -k browser --basetemp=runs/browser` keeps them below runs/browser.
"""

from __future__ import annotations

import json
import tempfile

import psutil
import pytest

from scripts.browser import Browser, find_browser
from scripts.check_report import check
from scripts.report import main as report_command
from tests.report_case import ROWS, line, make_world, write_run
from utils.report import Report, render_page
from utils.report_gallery import gallery_data, gallery_rows
from utils.report_runs import Evaluation, PredictedRow

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome (apt-get install chromium)")
MANY = 2288
"""Rows of test_s and test_u together with test_n's null rows are of this order in Ref-AVS."""


def test_a_report_works_in_the_browser(tmp_path):
    write_run(tmp_path / "run", make_world(tmp_path / "data"))
    assert report_command([str(tmp_path / "run")]) == 0
    facts, problems = check(tmp_path / "run/report.html", tmp_path / "screenshots")
    assert problems == []
    assert facts["clips"] == len(ROWS) and facts["seconds_of_first_sound"] == pytest.approx(2, abs=0.2)
    assert {"wide_top.png", "narrow_gallery-title.png", "dark_stages.png", "enlarged.png"} <= {
        path.name for path in (tmp_path / "screenshots").iterdir()
    }
    with Browser() as browser:
        browser.open(tmp_path / "run/report.html", "#beside=teacher&order=worst")
        assert browser.run("value('beside')") == "teacher" and browser.run("shown[0].row") == 1
        browser.run("document.querySelector('a.show').click()")
        browser.settle(0.3)
        assert browser.run("[shown.length, value('run'), value('beside')]") == [1, "sft", "teacher"]
        assert browser.errors == [] and browser.run("window.alerted") is None


def test_the_browser_leaves_nothing_behind(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    page = tmp_path / "page.html"
    page.write_text("<p>text", encoding="utf-8")
    with Browser() as browser:
        browser.open(page)
        children = psutil.Process().children(recursive=True)
        assert len(children) > 1
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive and list(tmp_path.iterdir()) == [page]


def test_thousands_of_clips_open_as_fast_as_a_few(tmp_path):
    made = [PredictedRow.from_json({**line(i % 8), "row": i}) for i in range(MANY)]
    evaluation = Evaluation("sft", tmp_path, {"test_s": {}}, {row.row: row for row in made})
    data = gallery_data([evaluation], gallery_rows([evaluation], list(evaluation.rows)))
    for row in data["rows"]:
        row |= {"frames": f"f/{row['row']}.jpg", "truth": f"t/{row['row']}.png", "n": 10, "hw": [48, 64]}
    page = tmp_path / "many.html"
    page.write_text(render_page(Report("many", {"stages": {}}, gallery=data)), encoding="utf-8")
    with Browser() as browser:
        seconds = browser.open(page)
        found = browser.run("JSON.stringify([shown.length, document.querySelectorAll('article').length])")
        assert json.loads(found)[0] == MANY and json.loads(found)[1] <= 40
        assert len(browser.requests) < 60 and seconds < 30  # docs/report.md has what was measured
