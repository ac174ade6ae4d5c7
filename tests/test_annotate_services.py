"""The real SDKs against a server that misbehaves: every row exactly once, whatever fails and whenever it is killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from google.genai import types

from scripts import analyze_failures, correct_paths, generate_cot
from tests.data_builders import write_lines, write_world
from tests.misbehaving_server import TRANSIENT, MisbehavingServer

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-very-secret-0123456789"
ROWS = 15
BOTH = pytest.mark.parametrize("backend", ["openai", "gemini"])
WRONG = "The images show a cello. The audio holds it. The reference asks for it. So the target is cello. It is [SEG]."


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen rows of one small clip, all failed by stage 1."""
    root = tmp_path_factory.mktemp("world")
    rows = [("clip_0_10000", f"clip_0_10000_dog_{i}", "train", 0, f"The thing number {i}.") for i in range(ROWS)]
    write_world(root, rows, size=(16, 16), seconds=0.5)
    write_lines(root / "failures.jsonl", [
        {"row": i, "uid": row[1], "reference": row[4], "kind": "", "target": "dog", "answer_class": "cello", "iou": 0.1,
         "path": WRONG} for i, row in enumerate(rows)
    ])  # fmt: skip
    return root


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys, and short waits of Google's SDK (OpenAI's begins with half a second)."""
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    monkeypatch.setattr(types, "HttpRetryOptions", partial(types.HttpRetryOptions, initial_delay=0.01, jitter=0.01))


def arguments(world: Path, out: Path, server: MisbehavingServer, backend: str, *more: str) -> list[str]:
    return [
        "--data", str(world), "--failures", str(world / "failures.jsonl"), "--out", str(out), "--backend", backend,
        "--model", "m", "--base-url", server.url(backend), "--timeout", "0.6", "--concurrency", "4", "--retries", "3",
        "--send", *more,
    ]  # fmt: skip


def report_of(out: Path) -> dict:
    return json.loads(out.with_name(f"{out.name}.report.json").read_text())


def statuses(out: Path) -> dict[int, str]:
    """Row -> status, asserting that every row stands once."""
    accepted = [json.loads(line) for line in out.read_text().splitlines()]
    others = [json.loads(line) for line in out.with_name(f"{out.name}.refused.jsonl").read_text().splitlines()]
    rows = [line["row"] for line in accepted + others]
    assert len(rows) == len(set(rows))
    return {**{line["row"]: "accepted" for line in accepted}, **{line["row"]: line["status"] for line in others}}


def no_key(folder: Path, *texts: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    assert not any(KEY in text for text in texts)


@BOTH
def test_every_fault_ends_with_every_row_once(
    backend: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    plan = {i: [fault] for i, fault in enumerate(TRANSIENT)}
    plan |= {11: ["blocked"], 12: ["right"], 13: ["no_parts"] * 9, 14: ["500", "cut", "empty", "429"]}
    out = tmp_path / "corrections.jsonl"
    with MisbehavingServer(plan) as server:
        assert correct_paths.main(arguments(world, out, server, backend)) == 0
        asked = len(server.requests)
        assert correct_paths.main(arguments(world, out, server, backend)) == 0
        assert len(server.requests) == asked
    found = statuses(out)
    assert found == {**dict.fromkeys(range(ROWS), "accepted"), 11: "blocked", 12: "right", 13: "refused"}
    line = json.loads(out.read_text().splitlines()[0])
    assert line["corrected"].endswith("the target is dog.") and line["wrong"] == WRONG.removesuffix(" It is [SEG].")
    (start, end), (first, last) = line["corrected_spans"][0], line["wrong_spans"][0]
    assert (line["corrected"][start:end], line["wrong"][first:last]) == ("dog", "cello")
    assert 0 < line["edit_ratio"] < 0.1
    report = report_of(out)
    assert report["refusals_by_gate"] == {"no_two_parts": 4, "empty": 2} and report["blocked"] == 1
    assert report["tokens_out"] == 100 * report["replies"] == 100 * (ROWS - 1 + 2 + 1 + 2)
    texts = capfd.readouterr()
    assert f"\n{ROWS}/{ROWS} row " in texts.out and f"\n{ROWS} rows: {ROWS - 3} accepted, 1 right, 1 ref" in texts.out
    no_key(tmp_path, *texts)


@BOTH
def test_nothing_is_sent_without_the_flag(
    backend: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with MisbehavingServer({}) as server:
        given = arguments(world, tmp_path / "out.jsonl", server, backend, "--price-in", "2", "--price-out", "10")
        given.remove("--send")
        assert correct_paths.main(given) == 0
        assert server.requests == []
    text = capsys.readouterr().out
    pattern = r"estimate: (\d+) rows x \((\d+) tokens in \+ (\d+) out\) = (.*) USD"
    rows, given, out, usd = re.match(pattern, text).groups()
    assert (int(rows), int(out)) == (ROWS, 600) and 10 * 258 + 16 < int(given) < 5000 and "nothing was sent" in text
    assert float(usd) == pytest.approx(ROWS * (int(given) * 2 + 600 * 10) / 1e6, abs=1e-4)
    assert not list(tmp_path.iterdir())


@BOTH
def test_a_dead_service_leaves_rows_open(
    backend: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out.jsonl"
    with MisbehavingServer({}, always="503") as server:
        assert correct_paths.main(arguments(world, out, server, backend, "--retries", "1", "--limit", "4")) == 3
        assert len(server.requests) == 8 and statuses(out) == {} and report_of(out)["open"] == 4
    gone = arguments(world, out, server, backend, "--retries", "0", "--limit", "4")
    assert correct_paths.main(gone) == 3
    with MisbehavingServer({}) as server:
        assert correct_paths.main(arguments(world, out, server, backend, "--limit", "4")) == 0
    assert statuses(out) == dict.fromkeys(range(4), "accepted")
    no_key(tmp_path, *capfd.readouterr())


@BOTH
def test_a_refused_key_ends_the_run(
    backend: str, world: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    with MisbehavingServer({}, always="401") as server:
        assert correct_paths.main(arguments(world, out, server, backend, "--concurrency", "1")) == 4
        assert len(server.requests) <= 2
    texts = capfd.readouterr()
    assert "ended early: status 401: " in texts.out and "<key>" in texts.out
    no_key(tmp_path, *texts)
    monkeypatch.delenv("GEMINI_API_KEY")
    monkeypatch.delenv("OPENAI_API_KEY")
    given = arguments(world, tmp_path / "other.jsonl", server, backend)
    if backend == "openai":
        at = given.index("--base-url")
        del given[at : at + 2]
    assert correct_paths.main(given) == 1
    assert "is set" in (text := capfd.readouterr().err) or "is not set" in text


def test_the_cost_limit_holds_over_restarts(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A reply costs 1000 x 10 + 100 x 100 per million = 0.02 USD; about 0.045 are expected of a request."""
    out = tmp_path / "out.jsonl"
    money = ("--price-in", "10", "--price-out", "100", "--expected-out", "100", "--concurrency", "3")
    spent = [0.0]
    with MisbehavingServer({0: ["no_json"]}) as server:
        for _ in range(3):
            assert correct_paths.main(arguments(world, out, server, "openai", *money, "--max-cost", "0.2")) == 4
            spent.append(report_of(out)["usd"])
            assert spent[-2] <= spent[-1] <= 0.2 and report_of(out)["open"] > 0
        assert spent[1] > 0.05 and "ended early: cost limit of 0.20 USD" in capsys.readouterr().out
        assert correct_paths.main(arguments(world, out, server, "openai", *money, "--max-cost", "9")) == 0
    assert statuses(out) == dict.fromkeys(range(ROWS), "accepted")
    report = report_of(out)
    # the unreadable answer is charged at its estimate
    assert report["replies"] == ROWS and 0.04 < report["usd"] - 0.02 * ROWS < 0.05


def test_killed_at_any_moment(world: Path, tmp_path: Path) -> None:
    """SIGKILL three times, with a torn last line in between; the reruns leave every row exactly once."""
    out, rng = tmp_path / "out.jsonl", random.Random(0)
    plan = {i: ["500", "cut", "429_after"][i % 3 :] for i in range(ROWS)}
    with MisbehavingServer(plan) as server:
        command = [sys.executable, "scripts/correct_paths.py", *arguments(world, out, server, "openai")]
        command += ["--per-minute", "600"]
        for _ in range(3):
            target = len(server.requests) + rng.randint(4, 9)
            child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.requests) < target and child.poll() is None:
                time.sleep(0.01)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            part = Path(f"{out}.parts/rank0.jsonl")
            with open(part, "ab") as file:
                file.write(b'{"row": 3, "uid": "clip_0_')
        assert correct_paths.main(arguments(world, out, server, "openai")) == 0
    assert statuses(out) == dict.fromkeys(range(ROWS), "accepted")
    written = [json.loads(line)["row"] for line in part.read_text().splitlines()]
    assert sorted(written) == list(range(ROWS)) and report_of(out)["replies"] >= ROWS


@pytest.mark.smoke
@BOTH
def test_the_writer_uses_the_same_services(backend: str, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "cot.jsonl"
    with MisbehavingServer({1: ["no_parts", "500"], 2: ["hang"]}) as server:
        given = arguments(world, out, server, backend)
        del given[2:4]
        assert generate_cot.main(given) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == list(range(ROWS))
    assert all(line["target"] == "dog" and line["reasoning"].endswith("the target is dog.") for line in lines)


def test_a_service_can_name_failure_types(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.misbehaving_server.good_answer", lambda _: "audio_perception")
    out = tmp_path / "types.jsonl"
    with MisbehavingServer({}) as server:
        assert analyze_failures.main(arguments(world, out, server, "openai")) == 0
    table = Path(f"{out}.csv").read_text().splitlines()
    assert table[0].startswith("type,family,count,percent,paper_count") and Path(f"{out}.png").stat().st_size > 5000
    assert f"audio_perception,Perceptual Failure,{ROWS},100.0,251,16.68,{ROWS}" in table[3]


def test_other_settings_are_not_mixed(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.jsonl"
    with MisbehavingServer({}) as server:
        assert correct_paths.main(arguments(world, out, server, "openai", "--limit", "2")) == 0
        assert correct_paths.main(arguments(world, out, server, "openai", "--max-ratio", "0.3")) == 1
    assert "made with another max_ratio (0.6 there, 0.3 now)" in capsys.readouterr().err
