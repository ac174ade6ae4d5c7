"""One annotation run on disk: `<out>.parts/` while rows are settled, then `<out>`, its refused rows and its report.

The parts are the truth and stay: a rerun reads them, asks only about what is open, and writes the results anew.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataset.annotate.engine import problems_of
from utils.errors import DataError
from utils.pipeline import locked
from utils.results import PartWriter, read_parts, write_json, write_jsonl


class Journal:
    """The files of one run.

    Args:
        out: JSONL of accepted rows.
        settings: what replies depend on (backend, model, prompt); another run's parts are not mixed in.
        rank: this process.

    Raises:
        DataError: `out` was made by something else, or its parts by other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any], rank: int = 0) -> None:
        self.out, self.rank = out, rank
        self.folder = out.with_name(f"{out.name}.parts")
        known = self.folder / "settings.json"
        if known.is_file():
            before = json.loads(known.read_text(encoding="utf-8"))
            other = sorted(k for k in before.keys() | settings.keys() if before.get(k) != settings.get(k))
            if other:
                raise DataError(
                    f"{self.folder}: made with another {', '.join(other)} "
                    f"({before.get(other[0])!r} there, {settings.get(other[0])!r} now). Remedy: name another --out."
                )
        elif out.exists():
            raise DataError(f"{out}: exists and was not made by this command. Remedy: name another --out.")
        else:
            write_json(known, settings)

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger"

    def done(self, again: bool = False) -> dict[int, dict[str, Any]]:
        """Settled rows; with `again`, refused and blocked ones count as open."""
        found = read_parts(self.folder)
        return {row: r for row, r in found.items() if not again or r["status"] not in ("refused", "blocked")}

    @contextmanager
    def writing(self) -> Iterator[PartWriter]:
        """The part of this process, which no second process may write at the same time."""
        with locked(self.folder / f".lock{self.rank}", patience=5), PartWriter(self.folder, self.rank) as writer:
            yield writer

    def publish(self, rows: Sequence[int], money: dict[str, float], open_rows: dict[int, str]) -> dict[str, Any]:
        """Write `out` (accepted rows), `<out>.refused.jsonl` (others) and `<out>.report.json`; returns the report."""
        found = self.done()
        outcomes = [found[row] for row in sorted(rows) if row in found]
        accepted = [o for o in outcomes if o["status"] == "accepted"]
        write_jsonl(self.out, (_plain(o) for o in accepted))
        write_jsonl(self._beside("refused.jsonl"), (o for o in outcomes if o["status"] != "accepted"))
        counts = Counter(o["status"] for o in outcomes)
        report = {
            "rows": len(rows),
            **{status: counts[status] for status in ("accepted", "right", "refused", "blocked")},
            "open": len(rows) - len(outcomes),
            "accepted_percent": round(100 * len(accepted) / len(rows), 3) if rows else 0.0,
            "asked_more_than_once": sum(o["attempts"] > 1 for o in outcomes),
            "refusals_by_gate": problems_of(outcomes),
            "open_because": dict(Counter(open_rows.values()).most_common(5)),
            **money,
        }
        write_json(self._beside("report.json"), report)
        return report

    def _beside(self, ending: str) -> Path:
        return self.out.with_name(f"{self.out.name}.{ending}")


def _plain(outcome: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in outcome.items() if k not in ("status", "attempts", "problems")}
