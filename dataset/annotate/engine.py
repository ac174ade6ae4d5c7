"""Ask a backend about many rows and lose nothing: an outcome is on disk before the next one counts.

    <out>, <out>.refused.jsonl   accepted rows; the others: "right", refused on every try, blocked by the service
    <out>.report.json            counts, refusals by gate, tokens, price
    <out>.parts/rank0.jsonl      outcomes as they came, from which all of these are written; a rerun reads it first
    <out>.parts/spent.json       running total of replies, tokens and US dollars, over all runs
    <out>.parts/settings.json    what replies depend on, so that two runs are not mixed

A row without an answer stays open, and the next run asks about it. The SDKs themselves repeat a request after 429, 5xx
and timeouts; here a reply that is cut, unreadable or refused by a gate is asked for again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

import soundfile

from dataset.annotate import backends
from dataset.annotate.backends import Blocked, Rejected, Reply, Request, Unanswered
from dataset.annotate.gates import Gate
from dataset.annotate.mini import MiniBackend
from utils.errors import DataError
from utils.files import lock, write_json, write_jsonl
from utils.results import PartWriter, read_parts

IMAGE_TOKENS = 258
"""Of one small image (Gemini API documentation: 258 for an image of at most 384 px a side; larger ones are tiled)."""
AUDIO_TOKENS_PER_SECOND = 32
"""Gemini API documentation."""
CHARACTERS_PER_TOKEN = 4
SAMPLE = 50
"""Requests whose input tokens are measured for an estimate."""
STATUSES = ("accepted", "right", "refused", "blocked")
"""Of a settled row."""
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """How hard a service is asked, and what it may cost (US dollars)."""

    concurrency: int = 4  # requests in flight
    per_minute: float | None = None  # requests started; None = no limit
    tries: int = 3  # replies per row before a refusal is final
    price_in: float = 0.0  # per million input tokens
    price_out: float = 0.0  # per million output tokens
    expected_out: int = 600  # output tokens of a request in flight, or of one that was lost
    max_cost: float | None = None  # of all runs on the same files; None = no limit

    def price(self, tokens_in: float, tokens_out: float) -> float:
        """US dollars."""
        return (tokens_in * self.price_in + tokens_out * self.price_out) / 1e6

    def expected(self, request: Request) -> float:
        """Estimated price of a request, in US dollars."""
        return self.price(tokens_in(request), self.expected_out) if self.price_in or self.price_out else 0.0


class RunFiles:
    """The files of one command, run after run.

    Args:
        out: JSONL of accepted rows.
        settings: what replies depend on (backend, model, prompt).

    Raises:
        DataError: `out` was made by something else, or its parts with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.out, self.folder = out, out.with_name(f"{out.name}.parts")
        known, spent = self.folder / "settings.json", self.folder / "spent.json"
        if known.is_file():
            before = json.loads(known.read_text(encoding="utf-8"))
            for name in sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k)):
                raise DataError(f"{self.folder}: made with another {name} ({before.get(name)!r} there, "
                                f"{settings.get(name)!r} now). Remedy: name another --out.")  # fmt: skip
        elif out.exists():
            raise DataError(f"{out}: exists and was not made by this command. Remedy: name another --out.")
        else:
            write_json(known, settings)
        nothing = {"replies": 0, "tokens_in": 0, "tokens_out": 0, "usd": 0.0}
        self.spent: dict[str, float] = json.loads(spent.read_text(encoding="utf-8")) if spent.is_file() else nothing

    def settled(self, again: bool = False) -> dict[int, dict[str, Any]]:
        """Outcomes by row; with `again`, refused and blocked rows count as open."""
        found = read_parts(self.folder)
        return {row: r for row, r in found.items() if not again or r["status"] not in ("refused", "blocked")}

    def charge(self, usd: float, reply: Reply | None = None) -> None:
        """Add to the running total, on disk when it returns; a reply without tokens (the mini world) counts nothing."""
        if reply is not None and reply.tokens_in:
            self.spent["replies"] += 1
            self.spent["tokens_in"] += reply.tokens_in
            self.spent["tokens_out"] += reply.tokens_out
        elif not usd:
            return
        self.spent["usd"] += usd
        write_json(self.folder / "spent.json", self.spent)

    def publish(self, rows: Sequence[int], unanswered: dict[int, str]) -> dict[str, Any]:
        """Write the results and the report anew; returns the report."""
        found = self.settled()
        outcomes = [found[row] for row in sorted(rows) if row in found]
        accepted = [outcome for outcome in outcomes if outcome["status"] == "accepted"]
        inner = ("status", "attempts", "problems")
        write_jsonl(self.out, ({k: v for k, v in outcome.items() if k not in inner} for outcome in accepted))
        others = (outcome for outcome in outcomes if outcome["status"] != "accepted")
        write_jsonl(self.out.with_name(f"{self.out.name}.refused.jsonl"), others)
        counts = Counter(outcome["status"] for outcome in outcomes)
        gates = Counter(problem for outcome in outcomes for problem in outcome["problems"])
        report = {
            "rows": len(rows),
            **{status: counts[status] for status in STATUSES},
            "open": len(rows) - len(outcomes),
            "accepted_percent": round(100 * len(accepted) / len(rows), 3) if rows else 0.0,
            "asked_more_than_once": sum(outcome["attempts"] > 1 for outcome in outcomes),
            "refusals_by_gate": dict(gates.most_common()),
            "open_because": dict(Counter(unanswered.values()).most_common(5)),
            **self.spent,
            "usd": round(self.spent["usd"], 6),
        }
        write_json(self.out.with_name(f"{self.out.name}.report.json"), report)
        return report


class Engine:
    """One run over open rows.

    Only `backend.answer` runs in threads: gates, files and counts belong to the thread that calls `run`.
    """

    def __init__(self, backend: backends.Backend, gate: Gate, limits: Limits, files: RunFiles) -> None:
        self.backend, self.gate, self.limits, self.files = backend, gate, limits, files
        self.unanswered: dict[int, str] = {}
        """Rows that this run leaves open, and why."""
        self.stopped: str | None = None
        """Why the run ended early: the cost limit, or a service that refuses the run."""
        self._waiting: deque[Request] = deque()
        self._in_flight: dict[Future[Reply], Request] = {}
        self._problems: dict[int, list[str]] = {}
        self._next_start = 0.0
        self._done = self._total = 0

    def run(self, requests: Sequence[Request], done: int = 0) -> None:
        """Settle every request or leave it open with a reason; each prints a line, numbered from `done` + 1."""
        self._waiting.extend(requests)
        self._done, self._total = done, done + len(requests)
        with PartWriter(self.files.folder, 0) as writer, ThreadPoolExecutor(self.limits.concurrency) as pool:
            while self._in_flight or (self._waiting and not self.stopped):
                pause = self._start(pool)
                if not self._in_flight:
                    time.sleep(pause)
                for future in wait(self._in_flight, pause or None, FIRST_COMPLETED).done:
                    self._settle(self._in_flight.pop(future), future, writer)

    def _start(self, pool: ThreadPoolExecutor) -> float:
        """Start what concurrency, rate and cost limit allow; returns the seconds until the rate allows the next one."""
        while self._waiting and not self.stopped and len(self._in_flight) < self.limits.concurrency:
            pause = self._next_start - time.monotonic()
            if pause > 0:
                return pause
            if self.limits.max_cost is not None:
                # what is in flight has no price yet, and counts as expected
                price = sum(map(self.limits.expected, (self._waiting[0], *self._in_flight.values())))
                spent = self.files.spent["usd"]
                if spent + price > self.limits.max_cost:
                    self.stopped = (
                        f"cost limit of {self.limits.max_cost:.2f} USD: {spent:.4f} are spent, the next request and "
                        f"those in flight may cost {price:.4f}. Remedy: raise --max-cost and run again."
                    )
                    break
            if self.limits.per_minute:
                self._next_start = time.monotonic() + 60 / self.limits.per_minute
            request = self._waiting.popleft()
            self._in_flight[pool.submit(self.backend.answer, request)] = request
        return 0.0

    def _settle(self, request: Request, future: Future[Reply], writer: PartWriter) -> None:
        """Judge what came back: write an outcome, ask again, or leave the row open."""
        row, problems = request.row, self._problems.setdefault(request.row.row, [])
        last = request.attempt + 1 >= self.limits.tries
        again = replace(request, attempt=request.attempt + 1)
        try:
            reply = future.result()
        except Unanswered as error:
            if error.billed:
                self.files.charge(self.limits.expected(request))
            if error.ask_again and not last:
                return self._waiting.appendleft(again)
            self.unanswered[row.row] = str(error)
            return self._print(request, f"open, {error}")
        except Rejected as error:
            self.stopped = self.stopped or str(error)
            return self._print(request, f"open, {error}")
        except Blocked as error:
            status, record = "blocked", {"reason": str(error)}
        else:
            self.files.charge(self.limits.price(reply.tokens_in, reply.tokens_out), reply)
            result = self.gate(request, reply.text)
            status, record = result.status, result.record
            problems.extend(result.problems)
            if status == "refused":
                if not last:
                    return self._waiting.appendleft(again)
                record = {"reply": reply.text}  # so that the gates can be examined
        outcome = {"row": row.row, "uid": row.uid, "status": status, "attempts": again.attempt, "problems": problems}
        writer.append([{**outcome, **record}])
        self._print(request, f"{status} after {again.attempt} replies ({', '.join(problems)})" if problems else status)

    def _print(self, request: Request, text: str) -> None:
        """Print one line about a row that is done with, for now or for good."""
        self._done += 1
        cost = f"   {self.files.spent['usd']:.4f} USD so far" if self.files.spent["usd"] else ""
        print(f"{self._done}/{self._total} row {request.row.row} {request.row.uid}: {text}{cost}", flush=True)


def tokens_in(request: Request) -> int:
    """Estimated input tokens of a request: text, frames and sound."""
    seconds = soundfile.info(str(request.audio)).duration
    text = -(-len(request.prompt) // CHARACTERS_PER_TOKEN)
    return text + IMAGE_TOKENS * len(request.frames) + round(AUDIO_TOKENS_PER_SECOND * seconds)


def add_options(parser: argparse.ArgumentParser, default: str, expected_out: int) -> None:
    """Options of backend, limits and cost."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSONL to write; refused rows, report and parts lie beside it")
    add("--backend", choices=("mini", "openai", "gemini"), default=default, help="default: %(default)s")
    add("--model", help="name at the service")
    add("--base-url", help="of an OpenAI-compatible server (http://localhost:8000/v1) or another Gemini endpoint")
    add("--send", action="store_true", help="really send clips to the service; without it only the estimate is printed")
    add("--limit", type=int, help="the first so many rows")
    add("--again", action="store_true", help="ask about refused and blocked rows once more")
    add("--template", type=Path, help="another prompt: paper_6_1, paper_6_2, or a file (dataset/annotate/prompts.py)")
    add("--concurrency", type=int, default=8, help="requests in flight (default: %(default)s)")
    add("--per-minute", type=float, help="requests started per minute (default: no limit)")
    add("--tries", type=int, default=3, help="replies per row before a refusal is final (default: %(default)s)")
    add("--retries", type=int, default=6, help="the SDK's repetitions after 429, 5xx, timeouts (default: %(default)s)")
    add("--timeout", type=float, default=120.0, help="seconds for one request (default: %(default)s)")
    add("--max-tokens", type=int, default=8192 if default == "gemini" else 1024, help="longest reply")
    add("--temperature", type=float, default=0.7, help="of sampling (default: %(default)s)")
    add("--price-in", type=float, default=0.0, help="USD per million input tokens")
    add("--price-out", type=float, default=0.0, help="USD per million output tokens")
    add("--expected-out", type=int, default=expected_out, help="output tokens per reply, for estimates")
    add("--max-cost", type=float, help="USD that all runs on --out together may cost; needs the prices")
    add("--mistakes", type=float, default=0.1, help="share of spoiled replies of the mini backend")
    add("--seed", type=int, default=0, help="of the mini backend")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse impossible combinations (exit status 2)."""
    if options.backend != "mini" and not options.model:
        parser.error(f"--backend {options.backend} needs --model")
    if options.max_cost is not None and not options.price_in + options.price_out > 0:
        parser.error("--max-cost needs --price-in and --price-out: without prices nothing can be limited")
    for name in ("concurrency", "tries", "max_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.retries < 0 or (options.per_minute is not None and options.per_minute <= 0):
        parser.error("--retries must not be negative, --per-minute must be above 0")


def annotate(
    options: argparse.Namespace, requests: Sequence[Request], gate: Gate, template: str, task: str, **settings: Any
) -> int:
    """Estimate or run; returns the exit status (0 complete, 3 rows are open, 4 ended by the cost limit or the service).

    Args:
        options: of `add_options`.
        requests: every row of the job, settled or not.
        gate: judges replies.
        template: of the prompt; its hash is one of the settings.
        task: write, correct or classify.
        settings: what else replies or gates depend on; no secret is among it.
    """
    if options.backend != "mini" and not options.send:
        print(f"{estimate(requests, options)}\nnothing was sent; add --send to send clips and prompts to the service")
        return 0
    mini = {"mistakes": options.mistakes, "seed": options.seed} if options.backend == "mini" else {}
    if mini:
        backend = MiniBackend(task, settings.get("style", "flexible"), **mini)
    else:
        kind = backends.OpenAIBackend if options.backend == "openai" else backends.GeminiBackend
        backend = kind(_chosen(backends.Service, options))
    settings |= {"backend": options.backend, "model": options.model, "task": task, **mini,
                 "prompt_sha256": hashlib.sha256(template.encode()).hexdigest()[:16]}  # fmt: skip
    with lock(options.out.with_name(f"{options.out.name}.parts") / ".lock0", patience=5):
        files = RunFiles(options.out, settings)
        settled = files.settled(options.again)
        waiting = [request for request in requests if request.row.row not in settled]
        engine = Engine(backend, gate, _chosen(Limits, options), files)
        engine.run(waiting, done=len(requests) - len(waiting))
        report = files.publish([request.row.row for request in requests], engine.unanswered)
    counts = ", ".join(f"{report[status]} {status}" for status in (*STATUSES, "open"))
    cost = "; {replies} replies, {tokens_in} tokens in, {tokens_out} out, {usd:.4f} USD" if report["replies"] else ""
    print(f"{report['rows']} rows: {counts}{cost.format(**report)}: {options.out}")
    if engine.stopped:
        print(f"ended early: {engine.stopped}")
        return 4
    if report["open"]:
        print(f"{report['open']} rows are open; run the same command again")
        return 3
    return 0


def estimate(requests: Sequence[Request], options: argparse.Namespace) -> str:
    """Tokens and price of one reply per row, from a sample of the requests."""
    rows = len(requests)
    sample = random.Random(0).sample(list(requests), min(SAMPLE, rows))
    each = round(mean(map(tokens_in, sample))) if sample else 0
    price = _chosen(Limits, options).price(rows * each, rows * options.expected_out)
    return f"estimate: {rows} rows x ({each} tokens in + {options.expected_out} out) = {price:.4f} USD"


def _chosen(kind: type[T], options: argparse.Namespace) -> T:
    """The dataclass `kind` with the options of its fields' names."""
    return kind(**{f.name: getattr(options, f.name) for f in fields(kind)})
