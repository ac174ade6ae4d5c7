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
LONGEST_FUNCTION = 70
"""Lines with docstring and decorators."""
LARGEST_PRODUCT = 21_500
"""Lines of code outside tests and scripts/dev; the aim is 14,000. A new capability adds what it brings, and no more."""
LARGEST_METHOD = 2_420
"""Lines of METHOD, which a reader must read to know the method; the aim is 2,000."""
METHOD = ("train_ds.py", "model/stages/", "model/objectives/", "model/aurora/model.py", "model/aurora/shared_prompt.py",
          "model/backbones/videollama2/splice.py", "dataset/prompt.py", "utils/types.py")  # fmt: skip
LATE = {"openai", "google", "playwright", "decord", "tensorboard"}
"""Packages that a machine may lack, or that few commands need: they alone may be imported inside a function."""
MOST_LATE = 2
"""Other imports inside functions; the aim is none."""
MOST_IN_CIRCLES = 0
"""Modules that import themselves by way of others; the aim is none."""


def sources() -> list[Path]:
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [ROOT / name for name in tracked.stdout.split() if (ROOT / name).is_file()]


def product() -> dict[str, int]:
    """Path -> lines of every file of code that is neither a test nor a tool for developers."""
    patterns = ("*.py", "*.sh", "*.js", "*.css", "*.jinja")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kept = [name for name in listed if not name.startswith(("tests/", "scripts/dev/")) and (ROOT / name).is_file()]
    return {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in kept}


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


def test_the_house_is_no_larger_than_it_must_be() -> None:
    lines = product()
    method = {name: count for name, count in lines.items() if name.startswith(METHOD)}
    assert sum(lines.values()) <= LARGEST_PRODUCT, "the product has grown: make something shorter"
    assert sum(method.values()) <= LARGEST_METHOD, method


def test_functions_fit_on_a_screen() -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path, name, tree in trees()
        for node in ast.walk(tree)
        if room(name) is not None and isinstance(node, functions)
        and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    ]  # fmt: skip
    assert not long, "\n".join(long)


def test_imports_stand_at_the_top() -> None:
    late = set()
    for path, name, tree in trees():
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        for target, line in (found for function in functions for found in imports(function)):
            if room(name) is not None and target.split(".")[0] not in LATE:
                late.add(f"{path.relative_to(ROOT)}:{line}")
    assert len(late) <= MOST_LATE, f"{len(late)} imports inside functions:\n" + "\n".join(sorted(late))


def test_imports_run_in_no_circle() -> None:
    """Imports inside functions count, those for types alone do not."""
    modules = {name for _, name, _ in trees()}
    needs = {name: {t for t, _ in imports(_running(tree)) if t in modules and t != name} for _, name, tree in trees()}

    def reached(name: str) -> set[str]:
        found, open_ = set(), [name]
        while open_:
            new = needs[open_.pop()] - found
            found |= new
            open_ += new
        return found

    circular = sorted(name for name in needs if name in reached(name))
    assert len(circular) <= MOST_IN_CIRCLES, circular


def _running(tree: ast.Module) -> ast.Module:
    """The statements of a module that run when it is imported: no `if TYPE_CHECKING`."""
    kept = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    return ast.Module(kept, [])
