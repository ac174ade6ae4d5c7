"""Who may import whom, and what no module may contain, read from the syntax trees."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROOMS = {
    "configs": {"configs"},
    "utils": {"configs", "utils"},
    "dataset": {"configs", "utils", "dataset"},
    "model.backbones": {"configs", "utils", "model.backbones"},
    "model.segmenters": {"configs", "utils", "model.segmenters"},
    "model.objectives": {"utils", "model.objectives"},
    "model.aurora": {"configs", "utils", "model.backbones", "model.segmenters", "model.objectives", "model.aurora"},
    "model.stages": {"configs", "utils", "model.aurora", "model.objectives", "model.stages"},
    "scripts": {"configs", "utils", "dataset", "model", "scripts", "train_ds", "train_ds_test"},
    "scripts.dev": {"configs", "utils", "dataset", "model", "scripts", "tests.oracles"},
    "tests.oracles": {"configs", "utils", "model"},
    "train_ds": {"configs", "utils", "dataset", "model"},
    "train_ds_test": {"configs", "utils", "dataset", "model"},
}
"""Room -> rooms it may import (docs: configs <- utils <- {dataset, model} <- entry points and scripts <- tests)."""

OWN = ("configs", "utils", "dataset", "model", "scripts", "tests", "train_ds", "train_ds_test")
LIGHT = ("configs", "utils/config.py", "utils/errors.py")
"""Imported before torch may be: they answer --help and report every configuration error."""
HEAVY = {"torch", "numpy", "transformers", "deepspeed", "peft", "cv2"}
SINCE_3_11 = {("enum", "StrEnum"), ("typing", "Self"), ("typing", "assert_never"), ("datetime", "UTC")}
"""Names that Python 3.10 does not have; modules such as tomllib are in `MODULES_SINCE_3_11`."""
MODULES_SINCE_3_11 = {"tomllib"}
LONGEST_FILE = 500


def sources() -> list[Path]:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in tracked.stdout.split() if (ROOT / name).is_file()]


def room(module: str) -> str | None:
    """The entry of ROOMS that holds a module, None for tests and strangers."""
    found = [name for name in ROOMS if module == name or module.startswith(f"{name}.")]
    return max(found, key=len) if found else None


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Modules that a file imports at any depth, with line numbers; `if TYPE_CHECKING` counts too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@cache
def trees() -> list[tuple[Path, str, ast.Module]]:
    """(path, dotted name, tree) of every source file; parsing as 3.10 refuses newer syntax."""
    return [
        (
            path,
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"),
            ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10)),
        )
        for path in sources()
    ]


def test_imports_go_one_way() -> None:
    wrong = []
    for path, name, tree in trees():
        own = room(name)
        if own is None:
            continue
        for target, line in imports(tree):
            if target.split(".")[0] in OWN and target != "model":
                other = room(target)
                allowed = other is not None and any(other == a or other.startswith(f"{a}.") for a in ROOMS[own])
                if not allowed:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(sorted(set(wrong)))


def test_light_modules_stay_light() -> None:
    for path, _, tree in trees():
        if str(path.relative_to(ROOT)).startswith(LIGHT):
            heavy = [(target, line) for target, line in imports(tree) if target.split(".")[0] in HEAVY]
            assert not heavy, (path, heavy)


def test_nothing_newer_than_python_3_10() -> None:
    for path, _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                newer = {(node.module, alias.name) for alias in node.names} & SINCE_3_11
                assert not newer, f"{path.relative_to(ROOT)}:{node.lineno}: {newer}"
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & MODULES_SINCE_3_11, path


def test_no_bare_except() -> None:
    for path, _, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path.relative_to(ROOT)}:{node.lineno}: bare except"


def test_files_and_docstrings() -> None:
    for path, name, tree in trees():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LONGEST_FILE or room(name) is None, f"{path.relative_to(ROOT)} has {lines} lines"
        assert ast.get_docstring(tree) or name.endswith("__init__") or not tree.body, (
            f"{path.relative_to(ROOT)}: no docstring"
        )


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
