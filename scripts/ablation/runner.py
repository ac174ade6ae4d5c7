"""Runs the nodes of a graph of ablations through `utils.pipeline`, one after the other or several at a time."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable

from scripts.ablation.graph import Graph, Node, ancestors
from utils.config import check_paths
from utils.errors import ConfigError
from utils.pipeline import Pipeline, Step, StepError, locked
from utils.schedule import run_all


class Runner:
    """Each node runs under a lock of its own, so that several of these may share a folder.

    Args:
        graph: the nodes.
        any_code: whether finished runs count though the code has changed since.
    """

    def __init__(self, graph: Graph, any_code: bool) -> None:
        self.graph, self.setting, self.any_code = graph, graph.setting, any_code
        self.folder = self.setting.root / self.setting.out
        with open(os.devnull) as idle:  # each run brings a lock of its own
            self.pipeline = Pipeline(self.setting.root, self.folder, self.setting.gpus, idle, any_code)

    def finished(self) -> dict[str, float]:
        """Seconds of the steps that need not run."""
        done = {name for name, node in self.graph.nodes.items() if self.pipeline.is_done(node.step)}
        return {name: self.pipeline.seconds[name] for name in self.graph.nodes if name in done}

    def everything(self, jobs: int = 1) -> None:
        """Every node in order, `jobs` at a time.

        Raises:
            ConfigError: a file that no node makes is missing.
            StepError: a command failed; what runs beside it is ended, to be continued by the next call.
        """
        done = self.finished()
        self._check(node for name, node in self.graph.nodes.items() if name not in done)
        begun = itertools.count(1)

        def call(pipeline: Pipeline, step: Step) -> None:
            print(f"-- {next(begun)} of {len(self.graph.nodes)}", flush=True)
            self._run(pipeline, step)

        run_all([node.step for node in self.graph.nodes.values()], jobs, self._pipeline, call)

    def only(self, name: str) -> None:
        """One node.

        Raises:
            StepError: there is no such node, what it needs has not finished, or it failed.
        """
        if name not in self.graph.nodes:
            raise StepError(f"--only {name}: no run of this table. Remedy: choose one that --dry-run lists.")
        done = self.finished()
        waiting = [other for other in ancestors(self.graph, name) if other != name and other not in done]
        if waiting:
            raise StepError(f"--only {name} needs {', '.join(waiting)}. Remedy: run these before.")
        self._run(self._pipeline(None), self.graph.nodes[name].step)

    def print_commands(self, again: str) -> None:
        """One line per node that has not finished, with the nodes it must wait for as a comment."""
        done = self.finished()
        for name, node in self.graph.nodes.items():
            if name not in done:
                waits = [other for other in node.needs if other not in done]
                print(f"# {name}" + (f" after {', '.join(waits)}" if waits else ""))
                print(f"python scripts/ablate.py {again} --only {name}")

    def _pipeline(self, cores: frozenset[int] | None) -> Pipeline:
        """One that shares what is known of finished steps."""
        made = Pipeline(self.setting.root, self.folder, self.setting.gpus, self.pipeline.lock, self.any_code, cores)
        return made.sharing(self.pipeline)

    def _run(self, pipeline: Pipeline, step: Step) -> None:
        with locked(self.folder / "locks" / step.name) as lock:
            pipeline.lock = lock
            pipeline.run(step)

    def _check(self, nodes: Iterable[Node]) -> None:
        """Whether files that are nobody's output are there, before hours are spent."""
        problems = []
        made = tuple(node.step.folder.name for node in self.graph.nodes.values())
        for node in nodes:
            if node.config is not None:
                try:
                    check_paths(node.config)
                except ConfigError as error:
                    problems += [p for p in error.problems if not str(p.value).startswith((*made, "data/mini"))]
        if problems:
            raise ConfigError(list({(p.field, p.value): p for p in problems}.values()), "paths")
