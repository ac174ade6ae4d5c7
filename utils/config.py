"""YAML files and `a.b=value` overrides -> `RunConfig`; the resolved config and the code's git state beside every run.

Imports no torch: `python train_ds.py --help` and every config error come before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.rule import BrokenRule
from configs.schema import RunConfig
from utils.config_help import fields, help_text
from utils.errors import ConfigError, Problem

__all__ = ["check_paths", "differences", "git_state", "help_text", "load_config", "save_config", "validate"]

MAX_YAML_BYTES = 1_000_000
"""A configuration is a page of text; anything larger is refused unread."""

FREE_ON_RESUME = ("optim.steps", "optim.decay_steps", "log.", "eval.", "watch.", "output_dir", "engine.threads",
                  "data.num_workers", "model.attention")  # fmt: skip
"""Fields (or sections) that may change when a run is resumed; nothing the run has learned depends on them."""


class _Loader(yaml.SafeLoader):
    """YAML with floats as people write them (`2e-5`), without aliases, Python tags or doubled keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not accepted; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        doubled = sorted({key for key in keys if keys.count(key) > 1})
        if doubled:
            raise yaml.YAMLError(f"keys written twice: {', '.join(doubled)} (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, the files it inherits from, and the overrides of the command line.

    Args:
        path: YAML file; its key `inherit` (one path or a list, relative to the file) names files it builds upon.
        overrides: `section.field=value`, the value in YAML; later ones win.

    Raises:
        ConfigError: listing every unreadable override, unknown key, wrong type, bad value and broken rule at once.
    """
    data, problems = _read_yaml(Path(path), ()), []
    for text in overrides:
        try:
            _merge(data, _parse_override(text))
        except yaml.YAMLError as error:
            problems.append(Problem(text, text, f"not a readable override ({error})", "write section.field=value"))
    return validate(data, str(path), problems)


def validate(data: dict[str, Any], source: str, earlier: Sequence[Problem] = ()) -> RunConfig:
    """Build a `RunConfig` from plain data.

    Raises:
        ConfigError: every problem, `earlier` ones first. Rules between fields are checked even where fields are
            wrong, as far as they do not involve these.
    """
    try:
        config = RunConfig.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        problems = [*earlier, *_problems(error, data)]
        raise ConfigError(problems, source) from None
    if earlier:
        raise ConfigError(list(earlier), source)
    return config


def check_paths(config: RunConfig) -> None:
    """Require that every file and folder the run reads exists.

    Raises:
        ConfigError: naming each missing path with its field.
    """
    teacher = config.sft.teacher_checkpoint if config.stage == "sft" else None
    evaluated = config.eval.checkpoint if config.stage == "eval" else None
    reflective = config.reflective.paths if config.stage == "reflective" else ()
    wanted = {
        "model.base": config.model.base,
        "model.sam_checkpoint": config.model.sam_checkpoint,
        "model.sam_type": config.model.sam_type if config.model.sam_type.endswith(".json") else None,
        "model.text_encoder": config.model.text_encoder,
        "data.root": config.data.root,
        "init_from": config.init_from,
        "sft.teacher_checkpoint": teacher,
        "eval.checkpoint": evaluated,
        **{f"data.cot.{i}": path for i, path in enumerate(config.data.cot)},
        **{f"reflective.paths.{i}": path for i, path in enumerate(reflective)},
    }
    missing = [
        Problem(field, path, "does not exist", f"correct {field} or put the file there (looked in {os.getcwd()})")
        for field, path in wanted.items()
        if path is not None and not Path(path).exists()
    ]
    if missing:
        raise ConfigError(missing, "paths")


def save_config(config: RunConfig, folder: str | Path) -> Path:
    """Write `config.yaml` (loads back as it is, the git state in its first line) by temporary name and rename."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    target = folder / "config.yaml"
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(f"# code: git {git_state()}\n{text}", encoding="utf-8")
    temporary.replace(target)
    return target


def git_state() -> str:
    """Commit of the running code ("-dirty" after it if tracked files were changed); "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def differences(ours: RunConfig, theirs: RunConfig, free: tuple[str, ...] = FREE_ON_RESUME) -> list[str]:
    """Fields that differ and are not `free` (names or beginnings of names), as `field: theirs -> ours`."""
    before, now = dict(_leaves(theirs.model_dump(mode="json"))), dict(_leaves(ours.model_dump(mode="json")))
    return [
        f"{field}: {before.get(field)!r} -> {now.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if before.get(field) != now.get(field) and not field.startswith(free)
    ]


def _read_yaml(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """One file with everything it inherits, the file's own values last. `chain` guards against circles."""
    if path.resolve() in chain:
        raise ConfigError([Problem("inherit", str(path), "inherits from itself", "remove the circle")], str(chain[0]))
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise yaml.YAMLError(f"is larger than {MAX_YAML_BYTES} bytes")
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            [Problem("file", str(path), f"not readable: {error}", "correct the file or its path")]
        ) from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(
            [Problem("file", type(data).__name__, "must be a mapping of sections", "see configs/sft.yaml")], str(path)
        )
    parents = data.pop("inherit", [])
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        _merge(merged, _read_yaml(path.parent / parent, (*chain, path.resolve())))
    _merge(merged, data)
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise yaml.YAMLError("no '=' in it")
    nested: Any = yaml.load(value, _Loader)  # noqa: S506 - _Loader is a SafeLoader
    for part in reversed(key.strip().split(".")):
        nested = {part: nested}
    return nested


def _merge(base: dict[str, Any], update: dict[str, Any]) -> None:
    """Put `update` over `base` in place, section by section; a field's whole value is replaced, mappings too."""
    for key, value in update.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            base[key] = {**base[key], **value}
        else:
            base[key] = value


def _problems(error: ValidationError, data: dict[str, Any]) -> Iterator[Problem]:
    """Field errors first, then the rules between the fields that are right."""
    wrong: list[tuple[Any, ...]] = []
    for item in error.errors(include_url=False):
        if item["type"] == "impossible_combination":
            yield from map(_rule_problem, item["ctx"]["problems"])
            return
        loc = item["loc"]
        wrong.append(loc)
        value = None if item["type"] == "missing" else item["input"]
        yield Problem(".".join(map(str, loc)), value, *_rule_and_remedy(item["type"], item["msg"], loc))
    remaining = json.loads(json.dumps(data, default=str))
    for loc in wrong:
        _drop(remaining, loc)
    try:
        RunConfig.model_validate_json(json.dumps(remaining))
    except ValidationError as second:
        names = [".".join(map(str, loc)) for loc in wrong]
        for item in second.errors(include_url=False):
            for rule in item.get("ctx", {}).get("problems", []):
                if not any(n.startswith(f) or f.startswith(f"{n}.") for f in rule.fields for n in names):
                    yield _rule_problem(rule)


def _rule_problem(rule: BrokenRule) -> Problem:
    return Problem(" + ".join(rule.fields), rule.values, rule.rule, rule.remedy)


def _rule_and_remedy(kind: str, message: str, loc: tuple[Any, ...]) -> tuple[str, str]:
    message = message.removeprefix("Value error, ")
    if kind == "extra_forbidden":
        close = _closest(loc)
        return (
            "unknown key",
            f"write {close}" if close else "remove it (python train_ds.py --help lists every key)",
        )
    if kind == "missing":
        return "is required", f"set {'.'.join(map(str, loc))}"
    return message[:1].lower() + message[1:], f"see `python train_ds.py --help` on {'.'.join(map(str, loc[:2]))}"


def _closest(loc: tuple[Any, ...]) -> str | None:
    """The known field most like an unknown one: same last name elsewhere, else similar spelling."""
    paths = [path for path, _ in fields(RunConfig)]
    wanted = ".".join(map(str, loc))
    same = [path for path in paths if path.rsplit(".", 1)[-1] == str(loc[-1])]
    return (same or difflib.get_close_matches(wanted, paths, 1, 0.75) or [None])[0]


def _drop(data: Any, loc: tuple[Any, ...]) -> None:
    """Remove the field that holds `loc` (the whole field where `loc` points into a list or free mapping)."""
    for depth, part in enumerate(loc[:2]):
        if not isinstance(data, dict) or part not in data:
            return
        if depth == min(len(loc), 2) - 1:
            del data[part]
        else:
            data = data[part]


def _leaves(data: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and not prefix:
            yield from _leaves(value, f"{key}.")
        else:
            yield prefix + key, value
