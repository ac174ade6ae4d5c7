"""Steps of a pipeline run several at a time, each on cores of its own and after the steps that it needs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from utils.pipeline import Pipeline, Step

Cores = frozenset[int] | None
"""Numbers of processor cores; None = all."""


def run_all(steps: Sequence[Step], jobs: int, pipeline: Callable[[Cores], Pipeline]) -> None:
    """Run every step, in the given order where nothing speaks against it.

    Args:
        steps: a step that is `alone` has all cores: it begins when nothing else runs, and nothing overtakes it once
            its turn has come. One that is `leading` has its turn before all others, and may use every core.
        jobs: steps at a time.
        pipeline: makes the one that a step runs in, in a thread of its own, on some cores.

    Raises:
        StepError: a command failed; what runs beside it is ended, to be continued by the next call.
    """
    waiting = {step.name: step for step in steps}
    running: dict[Future[None], tuple[Step, Pipeline, Cores]] = {}
    idle = list(core_shares(jobs))
    pool = ThreadPoolExecutor(jobs)
    try:
        while waiting or running:
            for step in startable(waiting, [step for step, *_ in running.values()], len(idle)):
                del waiting[step.name]
                share = idle.pop()
                made = pipeline(None if step.alone or step.leading else share)
                running[pool.submit(made.run, step)] = (step, made, share)
            for future in _ended(running):
                idle.append(running.pop(future)[2])
                future.result()
    finally:
        for _, made, _ in running.values():
            made.stop()
        pool.shutdown(cancel_futures=True)


def startable(waiting: Mapping[str, Step], running: Sequence[Step], free: int) -> list[Step]:
    """The waiting steps that may begin now, at most `free`."""
    if any(step.alone for step in running):
        return []
    unfinished = waiting.keys() | {step.name for step in running}
    chosen: list[Step] = []
    for step in sorted(waiting.values(), key=lambda step: not step.leading):
        if not unfinished.isdisjoint(step.needs):
            continue
        if step.alone:
            return chosen if running or chosen else [step]
        if len(chosen) == free:
            break
        chosen.append(step)
    return chosen


def core_shares(jobs: int) -> Sequence[Cores]:
    """Equal disjoint shares of this process's cores; None each where there is one job, or fewer cores than jobs."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    size = len(cores) // jobs
    if jobs == 1 or size == 0:
        return [None] * jobs
    return [frozenset(cores[i * size : (i + 1) * size]) for i in range(jobs)]


def elapsed(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the (begin, end) was going on."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _ended(running: Mapping[Future[None], tuple[Step, Pipeline, Cores]]) -> set[Future[None]]:
    """Wait until some are done; while nothing else is shown, a terminal tells which commands run, and for how long."""
    unseen = [step.name for step, *_ in running.values()] if all(made.quiet for _, made, _ in running.values()) else []
    begin = time.monotonic()
    while True:
        done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
        if unseen and sys.stdout.isatty():
            line = "" if done else f"   {', '.join(unseen)}: {time.monotonic() - begin:.0f} s"
            print(f"\r\x1b[K{line}", end="", flush=True)
        if done:
            return done
