"""Which runs make up the paper's ablations, and how each becomes a step of `utils.pipeline`.

A node is one run of one public command with one seed. Its key is a hash of its resolved configuration, the keys of the
runs it builds upon and its seed, and names its folder: rows of different tables that mean the same run share it, and a
changed value gives a new key to exactly the runs that depend on it. Values that no result depends on (log.*, threads,
workers, output_dir) are left out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs.schema import RunConfig
from scripts.quickstart import DATA, ENGINE_CODE, EVAL_CODE, TRAIN_CODE, WORLD_CODE
from utils.config import load_config
from utils.pipeline import Step

NO_MATTER = {"output_dir": True, "log": True, "engine": {"threads"}, "data": {"num_workers"}}
"""Fields without influence on a result."""
GPUS = {"mini": 1, "paper": 2}
"""Processes that the configurations are written for."""


@dataclass(frozen=True)
class Train:
    """A training: configs/ablations/<scale>/<name>.yaml, whose inputs come from other nodes.

    `inputs`: field -> "node/file" ("[node/file]" for a list), taken where the scale has that node; elsewhere the
    configuration's own value stands, which is a file that must be there.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluate:
    """The evaluation of a training, by configs/ablations/<scale>/<config>.yaml."""

    of: str
    config: str = "eval"


@dataclass(frozen=True)
class Command:
    """Another script; `{data}`, `{folder}`, `{scale}` and the names of other nodes in braces stand for paths."""

    arguments: tuple[str, ...]
    output: str
    sources: tuple[str, ...]
    after: tuple[str, ...] = ()
    seeded: bool = True
    folder: str | None = None
    """Where it writes, if not below the runs."""
    stamps: str | None = None
    parallel: bool = False


Spec = Train | Evaluate | Command
TEACHER = {"sft.teacher_checkpoint": "teacher/final"}
MINED = {"reflective.paths": "[compose/reflective.jsonl]"}
TRAININGS: dict[str, Train] = {
    "teacher": Train(),
    "cot": Train(TEACHER),
    "wo_cot": Train(TEACHER),
    "wo_mllm": Train(),
    "wo_distill": Train(TEACHER),
    "fixed_teacher": Train({"data.cot": "[fixed_paths/train.jsonl]"}),
    "fixed": Train({"sft.teacher_checkpoint": "fixed_teacher/final", "data.cot": "[fixed_paths/train.jsonl]"}),
    "crt": Train({"init_from": "cot/final", **MINED}),
    "ct": Train({"init_from": "cot/final", **MINED}),
    "sft_grpo": Train({"init_from": "cot/final"}),
    "ct_grpo": Train({"init_from": "ct/final"}),
    "crt_grpo": Train({"init_from": "crt/final"}),
    "format_iou": Train({"init_from": "crt/final"}),
    "s4": Train({"init_from": "crt_grpo/final", "data.root": "s4_data/v2"}),
    "seg": Train(),
    "seg_mllm": Train({"init_from": "seg/final"}),
    "mllm": Train(),
    "mllm_seg": Train({"init_from": "mllm/final"}),
}
CHECKPOINTS = {"early": "cot/checkpoints/step_000090"}
"""What is evaluated and built upon though it is no training's end: stage 1 stopped half way."""
EARLY = {"init_from": CHECKPOINTS["early"]}
STUDY_TRAININGS: dict[str, Train] = {
    "crt_all": TRAININGS["crt"],
    "plain_teacher": Train(),
    "wo_cot_plain": Train({"sft.teacher_checkpoint": "plain_teacher/final"}),
    "early_sft": Train({**EARLY, **TEACHER}),
    **{f"early_{name}": Train(EARLY) for name in ("grpo", "tenth", "format", "t1", "all", "best", "none", "reasoning")},
}
"""Of `scripts.ablation.tables.STUDIES`, at mini scale alone."""
COMMANDS: dict[str, Command] = {
    "world": Command(("scripts/make_mini_world.py", "--out", DATA), "metadata.csv", WORLD_CODE, seeded=False,
                     folder=DATA, stamps="data/steps"),
    "fixed_paths": Command(
        ("scripts/generate_cot.py", "--data", DATA, "--style", "fixed", "--backend", "mini", "--mistakes", "0",
         "--out", "{folder}/train.jsonl"),
        "train.jsonl", (*ENGINE_CODE, "scripts/generate_cot.py"), ("world",), seeded=False),
    "mine": Command(
        ("scripts/mine_failures.py", "--config", "{configs}/mine.yaml", "--checkpoint", "{cot}/final",
         "--out", "{folder}/failures.jsonl"),
        "failures.jsonl", (*EVAL_CODE, *ENGINE_CODE, "scripts/mine_failures.py"), ("world", "cot"), parallel=True),
    "correct": Command(
        ("scripts/correct_paths.py", "--data", DATA, "--failures", "{mine}/failures.jsonl",
         "--out", "{folder}/corrections.jsonl", "--backend", "mini"),
        "corrections.jsonl", (*ENGINE_CODE, "scripts/correct_paths.py"), ("mine",)),
    "compose": Command(
        ("scripts/build_reflective.py", "--corrections", "{correct}/corrections.jsonl",
         "--out", "{folder}/reflective.jsonl"),
        "reflective.jsonl", (*ENGINE_CODE, "scripts/build_reflective.py"), ("correct",)),
    "s4_data": Command(
        ("scripts/make_mini_s4.py", "--out", "{folder}/v2"), "v2/metadata.csv",
        ("dataset/mini_scene.py", "scripts/make_mini_s4.py"), seeded=False),
}  # fmt: skip
"""What the mini world makes itself; at paper scale these are files (docs/data_engine.md, the benchmarks' downloads)."""


@dataclass(frozen=True)
class Node:
    """One run."""

    name: str
    seed: int
    """0 where no seed matters."""
    key: str
    step: Step
    config: RunConfig | None
    """None for a command without one."""
    needs: tuple[str, ...]
    """Names of steps."""
    kind: Literal["train", "evaluate", "command"]


@dataclass(frozen=True)
class Setting:
    """Where and how a graph is run."""

    root: Path
    out: Path
    """Relative to `root`."""
    configs: Path
    """Folder with one YAML per training, and eval.yaml, eval_s4.yaml."""
    scale: Literal["mini", "paper"]
    gpus: int


class Graph:
    """The nodes behind some evaluations, ancestors first, each once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.nodes: dict[str, Node] = {}
        """Step name -> node, in an order in which they can run."""
        self._steps: dict[tuple[str, int], Node] = {}

    def add(self, spec: str, seed: int) -> Node:
        """The node `spec` (a training, a command, or eval_<training>) with a seed, and all it needs.

        Raises:
            ConfigError: a configuration is wrong.
            KeyError: there is no such node.
        """
        command = COMMANDS.get(spec)
        seed = 0 if command is not None and not command.seeded else seed
        if (spec, seed) not in self._steps:
            if command is not None:
                node = self._command(spec, command, seed)
            elif spec in (trainings := TRAININGS | STUDY_TRAININGS):
                node = self._training(spec, trainings[spec], seed)
            else:
                node = self._evaluation(spec, Evaluate(*spec.removeprefix("eval_").split("@")), seed)
            self._steps[spec, seed] = node
            self.nodes.setdefault(node.step.name, node)
        return self._steps[spec, seed]

    def _has(self, name: str) -> bool:
        return name in TRAININGS or self.setting.scale == "mini"

    def _inputs(self, inputs: Mapping[str, str], seed: int) -> tuple[dict[str, str], dict[str, Node]]:
        """Field -> value with `{node}` for folders, and the nodes."""
        values, nodes = {}, {}
        for name, text in inputs.items():
            node, _, rest = text.strip("[]").partition("/")
            if self._has(node):
                nodes[node] = self.add(node, seed)
                path = f"{{{node}}}/{rest}"
                values[name] = f"[{path}]" if text.startswith("[") else path
        return values, nodes

    def _training(self, name: str, spec: Train, seed: int) -> Node:
        values, parents = self._inputs(spec.inputs, seed)
        path = self.setting.configs / f"{name}.yaml"
        config = self._load(path, [f"seed={seed}"], values, parents)
        if self.setting.scale == "mini" and config.data.root == DATA:
            parents["world"] = self.add("world", 0)
        key, text = self._key(config, parents)
        same = next((n for n in self.nodes.values() if n.kind == "train" and n.key == key), None)
        if same is not None:  # another row's configuration says the same
            return same
        folder = self.setting.out / f"{name}-s{seed}-{key}"
        command = self._overrides(values, parents, folder, seed)
        command += self._batch(config)
        step = Step(
            folder.name, ("train_ds.py", "--config", str(path), *command), folder, folder / "final/config.yaml",
            TRAIN_CODE, tuple(p.step.name for p in parents.values()), text, parallel=True,
        )  # fmt: skip
        return Node(name, seed, key, step, config, step.needs, "train")

    def _evaluation(self, name: str, spec: Evaluate, seed: int) -> Node:
        inputs = {"eval.checkpoint": CHECKPOINTS.get(spec.of, f"{spec.of}/final")}
        if spec.config == "eval_s4":
            inputs["data.root"] = "s4_data/v2"
        values, parents = self._inputs(inputs, seed)
        path = self.setting.configs / f"{spec.config}.yaml"
        config = self._load(path, [f"seed={seed}"], values, parents)
        key, text = self._key(config, parents)
        folder = self.setting.out / f"{name.replace('@', '_')}-s{seed}-{key}"
        command = (*self._overrides(values, parents, folder, seed), f"eval.output_dir={folder}")
        step = Step(
            folder.name, ("train_ds_test.py", "--config", str(path), *command), folder,
            folder / config.eval.splits[-1] / "metrics.json", EVAL_CODE,
            tuple(p.step.name for p in parents.values()), text, parallel=True,
        )  # fmt: skip
        return Node(name, seed, key, step, config, step.needs, "evaluate")

    def _command(self, name: str, spec: Command, seed: int) -> Node:
        parents = {other: self.add(other, seed) for other in spec.after}
        mined = load_config(self.setting.root / self.setting.configs / "mine.yaml") if name == "mine" else None
        extra = [] if mined is None else [_dump(mined)]
        key = _hash([spec.arguments, *extra, *(p.key for p in parents.values())])
        folder = Path(spec.folder) if spec.folder else self.setting.out / f"{name}-s{seed}-{key}"
        names = {other: str(p.step.folder) for other, p in parents.items()}
        arguments = tuple(a.format(folder=folder, configs=self.setting.configs, **names) for a in spec.arguments)
        step = Step(
            name if spec.stamps else folder.name, arguments, folder, folder / spec.output, spec.sources,
            tuple(p.step.name for p in parents.values()), parallel=spec.parallel,
            stamps=None if spec.stamps is None else self.setting.root / spec.stamps,
        )  # fmt: skip
        return Node(name, seed, key, step, None, step.needs, "command")

    def _load(
        self, path: Path, overrides: list[str], values: Mapping[str, str], parents: Mapping[str, Node]
    ) -> RunConfig:
        """The configuration with the parents' names where their folders will stand."""
        names = {name: parent.step.folder.name for name, parent in parents.items()}
        own = [f"{field}={text.format(**names)}" for field, text in values.items()]
        return load_config(self.setting.root / path, [*overrides, *own])

    def _key(self, config: RunConfig, parents: Mapping[str, Node]) -> tuple[str, str]:
        text = json.dumps([_dump(config), sorted(parent.key for parent in parents.values())], sort_keys=True)
        return _hash(text), text

    def _overrides(
        self, values: Mapping[str, str], parents: Mapping[str, Node], folder: Path, seed: int
    ) -> tuple[str, ...]:
        names = {name: str(parent.step.folder) for name, parent in parents.items()}
        inputs = (f"{field}={text.format(**names)}" for field, text in values.items())
        return (f"output_dir={folder}", f"seed={seed}", *inputs)

    def _batch(self, config: RunConfig) -> tuple[str, ...]:
        """Keeps clips per step where another number of processes is asked for than the configurations are made for.

        Raises:
            ValueError: the batch cannot be divided so.
        """
        gpus, usual = self.setting.gpus, GPUS[self.setting.scale]
        if gpus == usual:
            return ()
        name, value = ("engine.micro_batch", config.engine.micro_batch)
        if self.setting.scale == "paper":
            name, value = "engine.accumulation", config.engine.accumulation
        if value * usual % gpus:
            raise ValueError(f"--num_gpus {gpus} must divide {value * usual}, {name} times the usual {usual}")
        return (f"{name}={value * usual // gpus}",)


def ancestors(graph: Graph, name: str) -> Iterator[str]:
    """Step names that a step needs, itself last, each once."""
    seen: dict[str, None] = {}

    def visit(step: str) -> None:
        for other in graph.nodes[step].needs:
            visit(other)
        seen.setdefault(step)

    visit(name)
    yield from seen


def _dump(config: RunConfig) -> dict[str, Any]:
    exclude: dict[str, Any] = {**NO_MATTER, "eval": {"output_dir"}}
    return config.model_dump(mode="json", exclude=exclude)


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
