"""What the commands that ask a backend share: options, the dry run, the run itself and its report."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dataset.annotate.backend import Backend, Request
from dataset.annotate.engine import Engine, Judge, Limits
from dataset.annotate.journal import Journal
from dataset.annotate.mini_backend import MiniBackend
from dataset.annotate.money import Budget, Prices, tokens_in

DRY_SAMPLE = 50
"""Requests whose input tokens are measured for an estimate."""


def add_options(parser: argparse.ArgumentParser, default: str, expected_out: int) -> None:
    """Options of backend, limits and money."""
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSONL to write; parts, refused rows and report lie beside it")
    add("--backend", choices=("mini", "openai", "gemini", "transformers"), default=default, help="default: %(default)s")
    add("--model", help="name at the service, or folder of Qwen2.5-Omni (transformers)")
    add("--base-url", help="of an OpenAI-compatible server (http://localhost:8000/v1) or another Gemini endpoint")
    add("--send", action="store_true", help="really send clips to the service; without it only the estimate is printed")
    add("--limit", type=int, help="the first so many rows")
    add("--again", action="store_true", help="ask about refused and blocked rows once more")
    add("--template", type=Path, help="another prompt: paper_6_1, paper_6_2, or a file (dataset/annotate/prompts.py)")
    add("--concurrency", type=int, default=8, help="requests in flight (default: %(default)s)")
    add("--per-minute", type=float, help="requests started per minute (default: no limit)")
    add("--tries", type=int, default=3, help="replies per row before a refusal is final (default: %(default)s)")
    add("--retries", type=int, default=6, help="repetitions after 429, 5xx, timeouts (default: %(default)s)")
    add("--first-wait", type=float, default=1.0, help="seconds before the first repetition, then doubled")
    add("--timeout", type=float, default=120.0, help="seconds for one request (default: %(default)s)")
    add("--max-tokens", type=int, default=8192 if default == "gemini" else 1024, help="longest reply")
    add("--temperature", type=float, default=0.7, help="of sampling (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="requests per forward of the transformers backend")
    add("--price-in", type=float, default=0.0, help="USD per million input tokens")
    add("--price-out", type=float, default=0.0, help="USD per million output tokens")
    add("--expected-out", type=int, default=expected_out, help="output tokens per reply, for estimates")
    add("--max-usd", type=float, help="spending cap over all runs on --out; needs the prices")
    add("--mistakes", type=float, default=0.1, help="share of spoiled replies of the mini backend")
    add("--seed", type=int, default=0, help="of the mini backend and of sampling")


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse impossible combinations (exit status 2)."""
    if options.backend != "mini" and not options.model:
        parser.error(f"--backend {options.backend} needs --model")
    if options.max_usd is not None and not options.price_in + options.price_out > 0:
        parser.error("--max-usd needs --price-in and --price-out: without prices nothing can be capped")
    for name in ("concurrency", "tries", "batch_size", "max_tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.retries < 0 or options.first_wait < 0 or (options.per_minute is not None and options.per_minute <= 0):
        parser.error("--retries, --first-wait and --per-minute must not be negative (nor the last 0)")


def build_backend(options: argparse.Namespace, task: str, style: str = "flexible") -> Backend:
    """The backend that the options name; SDKs and models are imported here, not before."""
    if options.backend == "mini":
        return MiniBackend(task, style, options.mistakes, options.seed)
    if options.backend == "transformers":
        from dataset.annotate.transformers_backend import TransformersBackend

        local = os.environ.get("LOCAL_RANK")
        device = f"cuda:{local}" if local and _cuda() else None
        return TransformersBackend(
            options.model, options.batch_size, device, options.max_tokens, options.temperature, options.seed
        )
    common = (options.model, options.base_url, options.timeout, options.max_tokens, options.temperature)
    if options.backend == "openai":
        from dataset.annotate.openai_backend import OpenAIBackend

        return OpenAIBackend(*common)
    from dataset.annotate.gemini_backend import GeminiBackend

    return GeminiBackend(*common)


def settings(options: argparse.Namespace, template: str, **more: Any) -> dict[str, Any]:
    """What replies depend on; no secret is among it."""
    prompt = hashlib.sha256(template.encode()).hexdigest()[:16]
    own = {"mistakes": options.mistakes, "seed": options.seed} if options.backend == "mini" else {}
    return {"backend": options.backend, "model": options.model, "prompt_sha256": prompt, **own, **more}


def execute(
    options: argparse.Namespace,
    requests: Sequence[Request],
    facts: dict[str, Any],
    judge: Judge,
    task: str,
    style: str = "flexible",
) -> int:
    """Estimate or run; returns the exit status (0 complete, 3 rows are open, 4 ended by the cap or the service).

    Args:
        options: of `add_options`.
        requests: every row of the job, settled or not.
        facts: see `settings`.
        judge: gates.
        task: write, correct or classify, for the mini backend.
        style: likewise.
    """
    if options.backend in ("openai", "gemini") and not options.send:
        print(json.dumps(estimate(requests, options), indent=1))
        print("nothing was sent; add --send to send clips and prompts to the service")
        return 0
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    journal = Journal(options.out, facts, rank)
    done = journal.done(options.again)
    mine = [r for r in requests[rank::world] if r.row.row not in done]
    limits = Limits(
        options.concurrency, options.per_minute, options.tries, options.retries, options.first_wait
    )
    backend = build_backend(options, task, style)
    with journal.writing() as writer:
        prices = Prices(options.price_in, options.price_out)
        budget = Budget(journal.ledger, rank, prices, options.max_usd, options.expected_out)
        progress = Engine(backend, judge, limits, budget).run(mine, writer)
        budget.close()
    report = journal.publish([r.row.row for r in requests], budget.totals(journal.ledger), progress.open)
    print(json.dumps(report, indent=1, ensure_ascii=False))
    if progress.stopped:
        print(f"ended early: {progress.stopped}")
        return 4
    if report["open"]:
        print(f"{report['open']} rows are open; run the same command again")
        return 3
    return 0


def estimate(requests: Sequence[Request], options: argparse.Namespace) -> dict[str, Any]:
    """Tokens and price of one reply per row, from a sample of the requests."""
    sample = random.Random(0).sample(list(requests), min(DRY_SAMPLE, len(requests)))
    each = mean(map(tokens_in, sample)) if sample else 0.0
    total_in, total_out = round(each * len(requests)), options.expected_out * len(requests)
    price = Prices(options.price_in, options.price_out).cost(total_in, total_out)
    return {
        "rows": len(requests), "tokens_in_per_row": round(each), "tokens_out_per_row": options.expected_out,
        "tokens_in": total_in, "tokens_out": total_out, "usd": round(price, 4),
    }  # fmt: skip


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
