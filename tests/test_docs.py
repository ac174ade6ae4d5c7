"""What the documents name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STOP = re.compile(r"`([\w/]+\.py):([\w.]+)`")
"""A file and the function or class in it, as docs/walkthrough.md writes them."""


def names(path: Path) -> set[str]:
    """Functions and classes of a file, methods as Class.method."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_every_stop_of_the_walkthrough_is_there() -> None:
    stops = STOP.findall((ROOT / "docs" / "walkthrough.md").read_text("utf-8"))
    assert len(stops) > 30
    missing = [f"{file}:{name}" for file, name in stops if name not in names(ROOT / file)]
    assert not missing, f"docs/walkthrough.md names what is not there: {missing}"
    assert len({file for file, _ in stops}) <= 30


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_and_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "#"))]
    named = re.findall(r"`((?:configs|dataset|model|utils|scripts|tests|docs|assets)/[\w./-]+\.\w+)`", text)
    folder = (ROOT / page).parent
    missing = [link for link in links if not (folder / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing, f"{page} names files that are not there: {sorted(set(missing))}"
