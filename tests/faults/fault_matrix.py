"""Kill every stage, evaluation, mining and correction at random moments and start them again: what is lost?

    python tests/faults/fault_matrix.py --kills 20 --json runs/faults.json
    python tests/faults/fault_matrix.py --kills 2 --only sft,evaluation --out /tmp/faults

Each command runs once undisturbed. Then it is started, killed by SIGKILL at a seeded moment (one process or all of
them), started again, killed again, until it has come to its end; and so on until it was killed --kills times. What it
leaves is compared with the undisturbed run: rows or steps that are missing (lost) or stand twice (doubled), and every
byte of its results. Exit status 1 if anything differs.

Two processes each (correction: one), on CPU, on a small mini world. Seconds are those of this machine, without the
start of the interpreter: the processes are forked from one that has loaded everything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.faults.cases import Case, cases, prepare, write_failures  # noqa: E402 - the project's root must come first
from tests.faults.lives import Life, draw_kill, live  # noqa: E402
from utils.files import write_json  # noqa: E402


@dataclass
class Tally:
    """What the kills of one case did."""

    name: str
    undisturbed_seconds: float
    killed_one: int = 0
    killed_all: int = 0
    runs: int = 0
    lost: int = 0
    doubled: int = 0
    different: list[str] = field(default_factory=list)
    """Files that are not equal to the undisturbed run's."""
    failed: list[str] = field(default_factory=list)
    """Starts that ended with an error of their own."""
    detect_seconds: list[float] = field(default_factory=list)
    """From the loss of one process to the end of all."""
    resume_seconds: list[float] = field(default_factory=list)
    """From the start after a kill to the first new row or step on disk."""

    @property
    def kills(self) -> int:
        return self.killed_one + self.killed_all

    @property
    def right(self) -> bool:
        """Whether nothing was lost, doubled, different or failed."""
        return not (self.lost or self.doubled or self.different or self.failed)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each case (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--only", help="cases, separated by commas; those they build on run undisturbed")
    parser.add_argument("--out", type=Path, help="folder of the runs, kept; default: a temporary one")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="figures of earlier runs, added to the table")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        tallies = matrix(folder, options.kills, options.seed, options.only.split(",") if options.only else None)
    for path in options.add:
        tallies = added(tallies, [Tally(**case) for case in json.loads(path.read_text())["cases"]])
    print(table(tallies))
    if options.json:
        write_json(options.json, {"kills": options.kills, "seed": options.seed, "cases": [asdict(t) for t in tallies]})
    return 0 if all(tally.right for tally in tallies) else 1


def matrix(folder: Path, kills: int, seed: int = 0, only: list[str] | None = None) -> list[Tally]:
    """Run every case; returns the tallies of those that were disturbed."""
    prepare(folder)
    write_failures(folder)
    tallies = []
    for case in cases(folder):
        whole = folder / case.name
        shutil.rmtree(whole, ignore_errors=True)
        life = start(case, whole)
        if life.status != 0:
            raise RuntimeError(f"{case.name}: the undisturbed run failed:\n{_log(whole).read_text()}")
        if only is None or case.name in only:
            tallies.append(disturb(case, whole, life.seconds, kills, random.Random(f"{seed}/{case.name}")))
            print(line(tallies[-1]), flush=True)
        if only is not None and len(tallies) == len(only):
            break  # nothing asked for builds on the rest
    return tallies


def disturb(case: Case, whole: Path, seconds: float, kills: int, rng: random.Random) -> Tally:
    """Kill a case `kills` times, over as many runs as that takes, and compare each run with the undisturbed one."""
    tally = Tally(case.name, seconds)
    while tally.kills < kills and not tally.failed:
        folder = whole.with_name(f"{case.name}.killed")
        shutil.rmtree(folder, ignore_errors=True)
        _log(folder).unlink(missing_ok=True)
        status, again = -1, False
        while status != 0:
            kill = draw_kill(rng, seconds, case.ranks) if tally.kills < kills else None
            life = start(case, folder, kill)
            if life.status == 0 and not again:  # a whole life: other work may have slowed down the undisturbed one
                seconds = min(seconds, life.seconds)
            status = life.status
            if again and life.first_work is not None:
                tally.resume_seconds.append(life.first_work)
            again = status == -9
            if status == -9:
                tally.killed_all += len(kill.victims) == case.ranks
                tally.killed_one += len(kill.victims) < case.ranks
                if life.detected is not None:
                    tally.detect_seconds.append(life.detected)
            elif status != 0:
                tally.failed.append(f"status {status}: {_log(folder).read_text()[-2000:]}")
                return tally
        tally.runs += 1
        compare(case, whole, folder, tally)
    return tally


def start(case: Case, folder: Path, kill: object = None) -> Life:
    """One life of a case's processes."""
    folder.mkdir(exist_ok=True)
    return live(lambda: case.main(folder), case.ranks, _log(folder), lambda: case.bytes_of_work(folder), kill)


def compare(case: Case, whole: Path, folder: Path, tally: Tally) -> None:
    """Count what is missing, double or different."""
    expected, found = Counter(map(json.dumps, case.items(whole))), Counter(map(json.dumps, case.items(folder)))
    tally.lost += (expected - found).total()
    tally.doubled += (found - expected).total()
    ours, theirs = case.files(folder), case.files(whole)
    tally.different += sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def added(ours: list[Tally], others: list[Tally]) -> list[Tally]:
    """Sums case by case: counts, and lists one behind the other; undisturbed seconds are ours."""
    known = {tally.name: tally for tally in others}
    found = []
    for tally in ours:
        if tally.name in known:
            other = known.pop(tally.name)
            sums = {f.name: getattr(tally, f.name) + getattr(other, f.name) for f in fields(Tally)[2:]}
            tally = replace(tally, **sums)
        found.append(tally)
    return [*found, *known.values()]


def table(tallies: list[Tally]) -> str:
    """Markdown."""
    head = ["case", "SIGKILL of one / of all", "runs", "lost", "doubled", "results", "s to detect", "s to resume",
            "s undisturbed"]  # fmt: skip
    lines = [" | ".join(head), "|".join("---" for _ in head), *map(line, tallies)]
    return "\n".join(f"| {text} |" if "|---" not in text else f"|{text}|" for text in lines)


def line(t: Tally) -> str:
    """One case; seconds are median and longest."""
    results = "equal" if not (t.different or t.failed) else ", ".join(dict.fromkeys(t.different)) or "failed"
    return " | ".join([
        t.name, f"{t.killed_one} / {t.killed_all}", str(t.runs), str(t.lost), str(t.doubled), results,
        _spread(t.detect_seconds), _spread(t.resume_seconds), f"{t.undisturbed_seconds:.1f}",
    ])  # fmt: skip


def _spread(values: list[float]) -> str:
    return f"{median(values):.1f}, {max(values):.1f}" if values else "-"


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


if __name__ == "__main__":
    begun = time.monotonic()
    outcome = main()
    print(f"{time.monotonic() - begun:.0f} s")
    sys.exit(outcome)
