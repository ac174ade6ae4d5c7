"""Ask a backend about many rows: retries, rate, concurrency, gates, spending; every row reaches the disk exactly once.

An outcome is final (accepted, right, refused by the gates on every attempt, or blocked by the service) and is written
with fsync before the next one starts; a row without an answer (the service failed on every try) is left open, and the
next run asks again. Parts, settings and ledger lie in `<out>.parts/`.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from dataset.annotate.backend import Backend, Blocked, Rejected, Reply, Request, Transient
from dataset.annotate.money import Budget, CapReached
from utils.results import PartWriter


@dataclass(frozen=True)
class Limits:
    """How hard a service is asked."""

    concurrency: int = 4
    """Requests in flight."""
    per_minute: float | None = None
    """Requests started per minute; None = no limit."""
    tries: int = 3
    """Replies per row before the gates' refusal is final."""
    retries: int = 6
    """Repetitions of a request that failed for the moment."""
    first_wait: float = 1.0
    """Seconds before the first repetition; doubled each time, plus or minus a half, unless the service names a time."""
    longest_wait: float = 120.0
    """Seconds; a service that asks for more is asked again by the next run."""


@dataclass(frozen=True)
class Verdict:
    """What a gate says of a reply."""

    status: str
    """accepted, right, or refused (asked again while tries are left)."""
    record: dict[str, Any] = field(default_factory=dict)
    """Fields of an accepted row's line."""
    problems: tuple[str, ...] = ()
    """Names of the gates that refused."""


Judge = Callable[[Request, Reply], Verdict]


@dataclass
class Progress:
    """Counts of one run."""

    outcomes: Counter = field(default_factory=Counter)
    open: dict[int, str] = field(default_factory=dict)
    """Rows left without an answer, and why."""
    stopped: str | None = None
    """Why the run ended early: the cap, or a service that refuses the run."""


class Engine:
    """One run over open rows.

    Args:
        backend: answers.
        judge: gates.
        limits: see Limits.
        budget: account of the run.
        sleep: waits for seconds, or less if the run is stopped (tests replace it).
    """

    def __init__(
        self,
        backend: Backend,
        judge: Judge,
        limits: Limits,
        budget: Budget,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.backend, self.judge, self.limits, self.budget = backend, judge, limits, budget
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._turn = threading.Lock()
        self._next = 0.0

    def run(self, requests: Iterable[Request], writer: PartWriter) -> Progress:
        """Settle every request; outcomes are written as they come. Ends early, in order, when the run is refused."""
        progress = Progress()
        threads = self.limits.concurrency if self.backend.batch_size == 1 else 1
        batches = _batches(requests, self.backend.batch_size)
        with ThreadPoolExecutor(threads) as pool:
            flying: dict[Future, list[Request]] = {}
            try:
                while True:
                    for batch in islice(batches, 0 if progress.stopped else 2 * threads - len(flying)):
                        flying[pool.submit(self._settle, batch)] = batch
                    if not flying:
                        return progress
                    done, _ = wait(flying, return_when=FIRST_COMPLETED)
                    settled = [self._collect(future, flying.pop(future), progress) for future in done]
                    writer.append([outcome for outcomes in settled for outcome in outcomes])
            finally:
                self._stop.set()

    def _collect(self, future: Future, batch: list[Request], progress: Progress) -> list[dict[str, Any]]:
        """Outcomes of a batch that is done; none of one that failed, which is counted as open."""
        try:
            outcomes = future.result()
        except (CapReached, Rejected) as error:
            progress.stopped = progress.stopped or str(error)
            self._stop.set()
            return []
        except Transient as error:
            progress.open.update({request.row.row: str(error) for request in batch})
            return []
        progress.outcomes.update(outcome["status"] for outcome in outcomes)
        return outcomes

    def _settle(self, batch: list[Request]) -> list[dict[str, Any]]:
        """Final outcomes of a batch, each after at most `tries` replies."""
        waiting, outcomes = list(batch), []
        problems: dict[int, list[str]] = {request.row.row: [] for request in batch}
        while waiting:
            try:
                replies = self._ask(waiting)
            except Blocked as error:
                if len(waiting) > 1:
                    raise RuntimeError("a backend for batches must not block single rows") from error
                outcomes.append(_outcome(waiting[0], "blocked", problems, {"reason": str(error)}, ""))
                break
            again = []
            for request, reply in zip(waiting, replies, strict=True):
                verdict = self.judge(request, reply)
                problems[request.row.row].extend(verdict.problems)
                if verdict.status == "refused" and request.attempt + 1 < self.limits.tries:
                    again.append(replace(request, attempt=request.attempt + 1))
                else:
                    outcomes.append(_outcome(request, verdict.status, problems, verdict.record, reply.text))
            waiting = again
        return outcomes

    def _ask(self, requests: list[Request]) -> list[Reply]:
        """Replies, after repetitions where the service failed for the moment."""
        for repetition in range(self.limits.retries + 1):
            if self._stop.is_set():
                raise Transient("the run was stopped")
            reserved = self.budget.reserve(requests)
            self._wait_turn()
            try:
                replies = self.backend.answer(requests)
            except Transient as error:
                self.budget.settle(reserved, requests[0].row.row, None, error.billed)
                pause = self._pause(error, repetition)
                if repetition == self.limits.retries or pause > self.limits.longest_wait:
                    raise
                self._sleep(pause)
                continue
            except (Blocked, Rejected):
                self.budget.settle(reserved, requests[0].row.row, None, billed=False)
                raise
            for request, reply in zip(requests, replies, strict=True):
                self.budget.settle(reserved / len(requests), request.row.row, reply)
            return replies
        raise AssertionError("unreachable: the last repetition returns or raises")

    def _pause(self, error: Transient, repetition: int) -> float:
        if error.wait is not None:
            return error.wait
        doubled = self.limits.first_wait * 2**repetition * random.uniform(0.5, 1.5)
        return min(doubled, self.limits.longest_wait)

    def _wait_turn(self) -> None:
        """Keep the distance between two starts that the rate asks for."""
        if self.limits.per_minute is None:
            return
        with self._turn:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + 60 / self.limits.per_minute
        if start > now:
            self._sleep(start - now)


def _outcome(
    request: Request, status: str, problems: dict[int, list[str]], record: dict[str, Any], text: str
) -> dict[str, Any]:
    """One line of a part file; a refused row keeps its last reply, so that gates can be examined."""
    row = request.row
    extra = {"reply": text} if status == "refused" else {}
    return {
        "row": row.row, "uid": row.uid, "status": status, "attempts": request.attempt + 1,
        "problems": problems[row.row], **record, **extra,
    }  # fmt: skip


def _batches(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    iterator = iter(requests)
    while batch := list(islice(iterator, size)):
        yield batch


def problems_of(outcomes: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How often each gate refused, repeated replies included."""
    return dict(Counter(problem for outcome in outcomes for problem in outcome["problems"]).most_common())
