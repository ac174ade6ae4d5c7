"""What requests cost: estimates before, a ledger during, a cap that holds over restarts.

    price = rows x (tokens_in x price_in + tokens_out x price_out) / 1,000,000

Prices are the user's (they change); token counts of the ledger are those the service reports.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile

from dataset.annotate.backend import Reply, Request
from utils.errors import AuroraError
from utils.results import PartWriter

IMAGE_TOKENS = 258
"""Of one small image (Gemini API documentation: 258 for an image of at most 384 px a side; larger ones are tiled)."""
AUDIO_TOKENS_PER_SECOND = 32
"""Gemini API documentation."""
CHARACTERS_PER_TOKEN = 4


class CapReached(AuroraError):
    """The next request could exceed the spending cap."""


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens."""

    per_million_in: float = 0.0
    per_million_out: float = 0.0

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        """US dollars."""
        return (tokens_in * self.per_million_in + tokens_out * self.per_million_out) / 1e6


def tokens_in(request: Request) -> int:
    """Estimated input tokens of a request: text, frames and sound."""
    seconds = soundfile.info(str(request.audio)).duration
    text = -(-len(request.prompt) // CHARACTERS_PER_TOKEN)
    return text + IMAGE_TOKENS * len(request.frames) + round(AUDIO_TOKENS_PER_SECOND * seconds)


class Budget:
    """Thread-safe account; every charge is on disk before the reply is judged.

    Args:
        folder: of the ledger, one file per rank.
        rank: this process.
        prices: of the service.
        cap: US dollars for all runs on this ledger together; None = no cap.
        expected_out: output tokens set aside for a request in flight.
    """

    def __init__(self, folder: Path, rank: int, prices: Prices, cap: float | None, expected_out: int) -> None:
        self.prices, self.cap, self.expected_out = prices, cap, expected_out
        self.spent = sum(_charges(folder))
        self._reserved = 0.0
        self._lock = threading.Lock()
        self._writer = PartWriter(folder, rank)

    def close(self) -> None:
        self._writer.__exit__(None, None, None)

    def reserve(self, requests: Sequence[Request]) -> float:
        """Set the estimated price aside; returns it.

        Raises:
            CapReached: it does not fit under the cap.
        """
        if self.cap is None:
            return 0.0
        price = sum(self.prices.cost(tokens_in(r), self.expected_out) for r in requests)
        with self._lock:
            if self.spent + self._reserved + price > self.cap:
                raise CapReached(
                    f"spending cap of {self.cap:.2f} USD: {self.spent:.4f} are spent, the next request may cost "
                    f"{price:.4f}. Remedy: raise --max-usd and run again."
                )
            self._reserved += price
        return price

    def settle(self, reserved: float, row: int, reply: Reply | None, billed: bool = True) -> None:
        """Replace a reservation by the true price; a request that was lost after sending counts as reserved."""
        true = 0.0 if not billed else reserved
        if reply is not None:
            true = self.prices.cost(reply.tokens_in, reply.tokens_out)
        with self._lock:
            self._reserved -= reserved
            self.spent += true
            tokens = {} if reply is None else {"tokens_in": reply.tokens_in, "tokens_out": reply.tokens_out}
            if true or any(tokens.values()):
                self._writer.append([{"row": row, "usd": true, **tokens}])

    def totals(self, folder: Path) -> dict[str, float]:
        """Replies, tokens and dollars of the ledgers of all ranks."""
        lines = _ledger(folder)
        return {
            "replies": sum("tokens_in" in line for line in lines),
            "tokens_in": sum(line.get("tokens_in", 0) for line in lines),
            "tokens_out": sum(line.get("tokens_out", 0) for line in lines),
            "usd": round(sum(line["usd"] for line in lines), 6),
        }


def _charges(folder: Path) -> list[float]:
    return [line["usd"] for line in _ledger(folder)]


def _ledger(folder: Path) -> list[dict]:
    """Complete lines of all ledgers (a last line cut by a kill is no charge that was written)."""
    return [
        json.loads(line) for path in sorted(folder.glob("rank*.jsonl")) for line in path.read_bytes().split(b"\n")[:-1]
    ]
