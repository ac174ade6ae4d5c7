"""What a browser needs of a report's page, told from the page alone: this runs where there is no Chromium.

tests/test_report_browser.py looks at the same things, and at how they behave, in a real one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from scripts.report import main as report_command
from tests.report_case import ROWS, gallery, line, make_world, read_page, write_run
from utils.report import Report, render_page
from utils.report_gallery import RESULTS, gallery_data, gallery_rows
from utils.report_runs import Evaluation, PredictedRow
from utils.report_script import SCRIPT
from utils.report_style import CSS

MANY = 2288
"""Rows of test_s and test_u in Ref-AVS."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("structure")
    write_run(folder / "run", make_world(folder / "data"))
    assert report_command([str(folder / "run")]) == 0
    return (folder / "run/report.html").read_text(encoding="utf-8")


def many_rows(folder: Path) -> dict[str, Any]:
    made = [PredictedRow.from_json({**line(i % 8), "row": i}) for i in range(MANY)]
    evaluation = Evaluation("sft", folder, {"test_s": {}}, {row.row: row for row in made})
    return gallery_data([evaluation], gallery_rows([evaluation], list(evaluation.rows)))


def test_the_script_finds_what_it_looks_for(page: str) -> None:
    found = [attributes.get("id") for _, attributes, _ in read_page(page).elements if attributes.get("id")]
    assert len(found) == len(set(found))
    wanted = set(re.findall(r"getElementById\('([^']+)'\)", SCRIPT))
    assert wanted and wanted <= set(found)
    fields = {attributes.get("name") for tag, attributes, _ in read_page(page).elements if tag in ("select", "input")}
    used = set(re.findall(r"form\.elements\.(\w+)", SCRIPT)) | set(re.findall(r"value\('(\w+)'\)", SCRIPT))
    assert used <= fields and {"run", "beside", "split", "class", "result", "order", "text", "masks"} <= fields
    tests = SCRIPT[SCRIPT.index("const TESTS") : SCRIPT.index("const change")]
    assert set(re.findall(r"(\w+): a =>", tests)) == set(RESULTS)


def test_every_link_leads_somewhere(page: str) -> None:
    reader = read_page(page)
    names = {attributes.get("id") for _, attributes, _ in reader.elements}
    rows = {f"#row={row['row']}" for row in gallery(page)["rows"]}
    links = [attributes["href"] for tag, attributes, _ in reader.elements if tag == "a"]
    assert len(links) > 8
    for link in links:
        assert link[1:] in names or link in rows, link


def test_nothing_is_loaded_before_it_is_looked_at(page: str) -> None:
    assert not {"img", "audio", "video", "iframe", "link"} & set(read_page(page).tags)
    assert "image.loading = 'lazy'" in SCRIPT and "player.preload = 'none'" in SCRIPT
    assert 0 < int(re.search(r"const STEP = (\d+)", SCRIPT)[1]) <= 40


def test_controls_have_names_and_tables_scroll_by_themselves(page: str) -> None:
    reader = read_page(page)
    assert 'name="viewport"' in page and "@media (max-width" in CSS and "prefers-color-scheme: dark" in CSS
    for tag, attributes, around in reader.elements:
        if tag in ("select", "input"):
            assert "label" in around, attributes
        if tag == "table":
            assert around[-1] == "div"
    boxes = [attributes for _, attributes, _ in reader.elements if attributes.get("class") == "scroll"]
    assert len(boxes) == reader.tags.count("table") and all(b.get("aria-label") and "tabindex" in b for b in boxes)


def test_filters_offer_the_values_that_rows_have(page: str) -> None:
    data = gallery(page)
    assert len(data["rows"]) == len(ROWS)
    for name, key in (("split", "split"), ("class", "cls")):
        offered = re.search(rf'<select name="{name}">(.*?)</select>', page)[1]
        values = set(re.findall(r'<option value="([^"]*)"', offered)) - {""}
        assert values == {row[key] for row in data["rows"] if row[key]}


def test_a_page_of_thousands_of_clips_stays_small(tmp_path: Path) -> None:
    data = many_rows(tmp_path)
    text = render_page(Report("many", {"stages": {}}, gallery=data))
    assert len(gallery(text)["rows"]) == MANY and len(data["texts"]) < 40
    assert len(text) < 800 * MANY and "<article" not in text
