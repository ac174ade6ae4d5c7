"""Runs the nodes of a graph of ablations through `utils.pipeline`, one after the other or several at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from scripts.ablation.graph import Graph, Node, ancestors
from utils.config import check_paths
from utils.errors import ConfigError
from utils.pipeline import Pipeline, StepError, locked


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
        shares = core_shares(jobs)
        running: dict[Future[None], tuple[str, Pipeline]] = {}
        waiting = dict(self.graph.nodes)
        idle = list(shares)
        pool = ThreadPoolExecutor(jobs)
        try:
            while waiting or running:
                busy = {name for name, _ in running.values()}
                ready = [n for n in waiting if not any(o in waiting or o in busy for o in self.graph.nodes[n].needs)]
                for name in ready[: len(idle)]:
                    node = waiting.pop(name)
                    print(f"-- {len(self.graph.nodes) - len(waiting)} of {len(self.graph.nodes)}", flush=True)
                    pipeline = self._pipeline(idle.pop())
                    running[pool.submit(self._run, node, pipeline)] = (name, pipeline)
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    idle.append(running.pop(future)[1].cores)
                    future.result()
        finally:
            for _, pipeline in running.values():
                pipeline.stop()
            pool.shutdown(cancel_futures=True)

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
        self._run(self.graph.nodes[name], self._pipeline(None))

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
        made.hashes, made.seconds = self.pipeline.hashes, self.pipeline.seconds
        return made

    def _run(self, node: Node, pipeline: Pipeline) -> None:
        with locked(self.folder / "locks" / node.step.name) as lock:
            pipeline.lock = lock
            pipeline.run(node.step)

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


def core_shares(jobs: int) -> Sequence[frozenset[int] | None]:
    """Equal disjoint shares of this process's cores; None each where there is one job, or fewer cores than jobs."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    size = len(cores) // jobs
    if jobs == 1 or size == 0:
        return [None] * jobs
    return [frozenset(cores[i * size : (i + 1) * size]) for i in range(jobs)]
