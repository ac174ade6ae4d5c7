"""No private name (with a leading underscore) of another package is read, written, imported or overridden here.

The syntax trees of all Python files are walked. Whether an object is another package's is not known from the tree, so a
name counts as ours if our own files define it, and a method counts as another's if a base class of another package has
it.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import re
import subprocess
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.tiny_run import ROOT
from utils.ds import deepspeed

PRIVATE = re.compile(r"_(?!_)\w+|__\w+(?<!__)")
DUNDER = re.compile(r"__\w+__")
BY_TEXT = ("getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller")
LANGUAGE = {"__version__", "__path__", "__index__", "__file__", "__cause__"}.union(
    *(dir(part) for part in (object, type, types.FunctionType, types.ModuleType, BaseException, int, str, dict, list))
)
"""Names with two underscores on each side that belong to Python itself."""
ALLOWED = {
    "os._exit": "documented: ends a process at once, where the orderly end would wait for threads of gloo or NCCL",
    "deepspeed.ops.__compatible_ops__": "utils/ds.py:_spare_shm_build, which says why and what happens without it",
}


@cache
def trees() -> dict[Path, ast.Module]:
    """Every Python file that is or may be committed, relative to the project."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py")
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {Path(name): ast.parse((ROOT / name).read_text("utf-8")) for name in names if (ROOT / name).is_file()}


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a file gives to functions, classes, variables and attributes of `self` and `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            yield node.attr


def violations(tree: ast.Module, ours: set[str], packages: set[str]) -> Iterator[tuple[int, str]]:
    """(line, what stands there) of every use of another package's private name.

    Args:
        tree: of a file.
        ours: names that the project defines.
        packages: names of its own packages and modules.
    """
    imports = _imports(tree)
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Attribute):
            private = PRIVATE.fullmatch(node.attr) and node.attr not in ours
            if private or (DUNDER.fullmatch(node.attr) and node.attr not in LANGUAGE | ours):
                found = [ast.unparse(node)]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] not in packages:
            found = [f"{node.module}.{alias.name}" for alias in node.names if _private(f"{node.module}.{alias.name}")]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] not in packages]
            found = [name for name in names if _private(name)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_TEXT:
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found = [ast.unparse(node) for text in texts if any(_private(p) for p in {text} - ours)]
        elif isinstance(node, ast.ClassDef):
            found = [f"{node.name}.{name}" for name in _overridden(node, imports, packages)]
        yield from ((node.lineno, text) for text in found if text not in ALLOWED)


def _private(dotted: str) -> bool:
    return any(PRIVATE.fullmatch(part) for part in dotted.split("."))


def _is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _imports(tree: ast.Module) -> dict[str, str]:
    """Name in the file -> dotted name of what it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                found[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _overridden(node: ast.ClassDef, imports: dict[str, str], packages: set[str]) -> list[str]:
    """Private names that a class defines, or gives to its objects, though a base of another package has them."""
    own = {name for name in defined(ast.Module([node], [])) if PRIVATE.fullmatch(name)}
    found = []
    for base in node.bases if own else []:
        head, *rest = ast.unparse(base.value if isinstance(base, ast.Subscript) else base).split(".")
        dotted = ".".join([imports.get(head, head), *rest])
        if dotted.split(".")[0] not in packages and (head in imports or hasattr(builtins, head)):
            theirs = _resolve(dotted)
            known = {*dir(theirs), *getattr(theirs, "__annotations__", {})}
            found += [name for name in sorted(own) if name in known]
    return found


def _resolve(dotted: str) -> object:
    """What a dotted name stands for."""
    head, *rest = dotted.split(".")
    if hasattr(builtins, head):
        return getattr(builtins, head)
    found = importlib.import_module(head)
    for i, name in enumerate(rest):
        if not hasattr(found, name):
            importlib.import_module(".".join([head, *rest[: i + 1]]))
        found = getattr(found, name)
    return found


def project() -> tuple[set[str], set[str]]:
    """Names that the project defines, and those of its packages and modules."""
    ours = {name for tree in trees().values() for name in defined(tree)}
    return ours, {path.parts[0].removesuffix(".py") for path in trees()}


def test_no_private_name_of_another_package() -> None:
    ours, packages = project()
    found = [f"{path}:{line}: {text}" for path, tree in trees().items()
             for line, text in violations(tree, ours, packages)]  # fmt: skip
    assert not found, "private names of other packages:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.nn.Linear(1, 1)._parameters",
        "from torch.utils._pytree import tree_map",
        "from torch import _dynamo",
        "import torch._dynamo",
        "import operator\noperator.attrgetter('_parameters')",
        "def f(model):\n    return getattr(model, '_parameters', None)",
        "def f(model):\n    model._parameters = {}",
        "def f(model):\n    return model.__compatible_ops__",
        "from torch import nn\nclass A(nn.Module):\n    def _apply(self, fn):\n        return super()._apply(fn)",
        "from torch import nn\nclass A(nn.Module):\n    def f(self):\n        self._modules = {}",
        "from torch.utils.data import Dataset as D\nimport torch\nclass A(torch.nn.Module, D[int]):\n    _version = 2",
    ],
)
def test_every_kind_of_use_is_seen(source: str) -> None:
    tree = ast.parse(source)
    assert list(violations(tree, set(defined(tree)), {"utils"}))


def test_own_names_and_those_of_the_language_are_free() -> None:
    source = "from torch import nn\nfrom utils.x import _y\nclass A(nn.Module):\n    def _f(self):\n" \
             "        return self._f, type(self).__name__, A._f, __file__"  # fmt: skip
    tree = ast.parse(source)
    assert not list(violations(tree, set(defined(tree)), {"utils"}))


def test_the_exceptions_are_used_and_deepspeed_still_has_its_name() -> None:
    nodes = (node for tree in trees().values() for node in ast.walk(tree))
    texts = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert texts >= ALLOWED.keys()
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False, (
        "deepspeed.ops.__compatible_ops__ no longer decides what DeepSpeed builds at its start: find in "
        "deepspeed/comm/torch.py (build_shm_op) what does, and change utils/ds.py:_spare_shm_build"
    )
    assert importlib.import_module("deepspeed.comm.torch").build_shm_op() is None
