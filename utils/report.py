"""One self-contained HTML page about a set of runs: scores, probes, curves, and clips with their reasoning.

The page loads nothing: pictures and sounds are data addresses, charts are inline SVG, and its policy forbids any
request. Every text that comes from data or from a model is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from utils.curves import Chart, colour_of, svg
from utils.report_style import CSS, SCRIPT
from utils.tables import Cell, text
from utils.visualize import data_uri

POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
SPLITS = {"test_s": "seen", "test_u": "unseen", "mix": "mix"}
PROTOCOLS = {
    "official": "256 x 256, J at 0.4, F and S pooled over 4 expressions",
    "per_expression": "native size, J at 0.5, every expression on its own",
}
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Clip:
    """One predicted row with its picture."""

    split: str
    row: int
    kind: str
    reference: str
    class_name: str
    answer_class: str | None
    text: str
    """The whole answer."""
    faithful: bool | None
    scores: Mapping[str, float]
    """J and F, or S of a null row, of this row alone in percent."""
    picture: bytes
    """JPEG of `visualize.strip`."""
    audio: bytes | None = None
    """MP3 of the sound that the model heard."""


def render_page(title: str, summary: Mapping[str, Any], clips: Sequence[Clip], charts: Sequence[Chart]) -> str:
    """The whole page as HTML.

    Args:
        title: heading.
        summary: `stages` {name: {split: scores, "kinds": ..., "class_accuracy": ...}}, `probes` of the same form,
            `seconds` {step: seconds}, `git`; scores in percent, protocol official, others under "per_expression".
        clips: shown in this order.
        charts: shown in this order.
    """
    stages, probes = summary["stages"], summary.get("probes", {})
    origin = f"code {summary.get('git')}, config {json.dumps(summary.get('config'))}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="meta">{escape(origin)}</p>',
        "<h2>Stages</h2>",
        *[_stage_table(stages, protocol) for protocol in PROTOCOLS],
        *_kind_section(stages),
        *_probe_section(stages, probes),
        *_curve_section(charts),
        *_clip_section(clips),
        *_seconds_section(summary.get("seconds", {})),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{CSS}</style></head><body>\n'
        + "\n".join(body)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def sentences(answer: str) -> list[str]:
    """An answer cut after each full stop, exclamation or question mark."""
    return [part for part in _SENTENCE.split(answer.strip()) if part]


def _table(label: str, header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td>{escape(text(value))}</td>" for value in row[1:])
        lines.append(f'<tr><th scope="row">{escape(text(row[0]))}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _of(scores: Mapping[str, Any] | None, protocol: str) -> Mapping[str, Any]:
    """The scores of a protocol: official ones stand in the open, the others one level below."""
    scores = scores or {}
    return scores if protocol == "official" else scores.get(protocol, {})


def _stage_table(stages: Mapping[str, Any], protocol: str) -> str:
    header = ["stage", *[f"{title} {m}" for title in SPLITS.values() for m in ("J", "F", "J&F")], "null S"]
    header += ["class accuracy", "faithful", "clips"]
    rows: list[list[Cell]] = []
    for name, stage in stages.items():
        row: list[Cell] = [name]
        for split in SPLITS:
            row += [_of(stage.get(split), protocol).get(m) for m in ("J", "F", "J&F")]
        counted = [split["n"] for split in (stage.get(s) for s in ("test_s", "test_u", "test_n")) if split]
        rows.append([*row, _of(stage.get("test_n"), protocol).get("S"), stage.get("class_accuracy"),
                     stage.get("faithful"), sum(counted)])
    note = f"Protocol {protocol}: {PROTOCOLS[protocol]}. Percent; S: lower is better; mix: mean of seen and unseen."
    given = [name for name, stage in stages.items() if stage.get("answers") == "given"]
    if given:
        note += f" {', '.join(given)}: reads the true class instead of answering, as when it teaches."
    table = _table(f"Scores of the stages, protocol {protocol}", header, rows)
    return f'{table}<p class="note">{escape(note)}</p>'


def _kind_section(stages: Mapping[str, Any]) -> list[str]:
    parts = []
    for name, stage in stages.items():
        if stage.get("kinds"):
            rows = [
                [kind, s["n"], s.get("J"), s.get("F"), s.get("J&F"), s.get("class_accuracy"), s.get("faithful")]
                for kind, s in stage["kinds"].items()
            ]
            header = ["kind", "rows", "J", "F", "J&F", "class accuracy", "faithful"]
            parts += [f"<h3>{escape(name)}</h3>", _table(f"Question kinds of stage {name}", header, rows)]
    return ["<h2>Question kinds (test_s)</h2>", *parts] if parts else []


def _probe_section(stages: Mapping[str, Any], probes: Mapping[str, Any]) -> list[str]:
    if not probes:
        return []
    base = stages[next(iter(probes.values())).get("stage", next(reversed(stages)))]
    header = ["kind", "J&F", *[part for name in probes for part in (name, "change")]]
    groups = {"all": base.get("test_s"), **base.get("kinds", {})}
    rows: list[list[Cell]] = []
    for kind, scores in groups.items():
        plain = (scores or {}).get("J&F")
        row: list[Cell] = [kind, plain]
        for probe in probes.values():
            probed = (probe.get("test_s") if kind == "all" else probe.get("kinds", {}).get(kind)) or {}
            value = probed.get("J&F")
            row += [value, None if value is None or plain is None else f"{value - plain:+.2f}"]
        rows.append(row)
    note = '<p class="note">The same questions with the sound or the frames of another clip: what falls was used.</p>'
    return ["<h2>Does it listen and look?</h2>", _table("Probes by question kind", header, rows), note]


def _curve_section(charts: Sequence[Chart]) -> list[str]:
    if not charts:
        return []
    names = list(dict.fromkeys(series.name for chart in charts for series in chart.series))
    drawn = []
    for chart in charts:
        keys = "".join(
            f'<span class="key"><i style="background:{colour_of(s.name, names)}"></i>{escape(s.name)}</span>'
            for s in chart.series
        )
        drawn.append(f"<figure>{svg(chart, names)}<figcaption>{keys}</figcaption></figure>")
    return ["<h2>Curves</h2>", f'<div class="charts">{"".join(drawn)}</div>']


def _clip_section(clips: Sequence[Clip]) -> list[str]:
    if not clips:
        return []
    kinds = [kind for kind in dict.fromkeys(clip.kind for clip in clips) if kind]
    tags = [("", "all"), ("right", "class right"), ("wrong", "class wrong")]
    tags += [(f"kind-{i}", kind) for i, kind in enumerate(kinds)]
    buttons = "".join(
        f'<button type="button" data-tag="{tag}" aria-pressed="{"false" if tag else "true"}">{escape(label)}</button>'
        for tag, label in tags
    )
    note = '<p class="note">Rows of each picture: frames, ground truth (green), prediction (orange).</p>'
    articles = [_article(clip, kinds) for clip in clips]
    return ["<h2>Clips</h2>", note, f'<div class="filters" role="group" aria-label="Show">{buttons}</div>', *articles]


def _article(clip: Clip, kinds: Sequence[str]) -> str:
    right = clip.answer_class == clip.class_name
    tags = ["right" if right else "wrong", *([f"kind-{kinds.index(clip.kind)}"] if clip.kind else [])]
    steps = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(clip.text)) or "<li>(no answer)</li>"
    verdict = f'<span class="{"good" if right else "bad"}">answer {escape(clip.answer_class or "none")}</span>'
    if clip.faithful is not None:
        word = "faithful" if clip.faithful else "unfaithful"
        verdict += f', <span class="{"good" if clip.faithful else "bad"}">reasoning {word}</span>'
    sound = "" if clip.audio is None else (
        f'<audio controls preload="none" src="{data_uri(clip.audio, "audio/mpeg")}" aria-label="sound"></audio>'
    )
    where = " / ".join(part for part in (clip.split, clip.kind, f"row {clip.row}") if part)
    numbers = ", ".join(f"{name} {value:.1f}" for name, value in clip.scores.items())
    caption = f"Frames, ground truth and prediction for: {clip.reference}"
    return (
        f'<article data-tags="{" ".join(tags)}"><div><img loading="lazy" alt="{escape(caption)}" '
        f'src="{data_uri(clip.picture, "image/jpeg")}">{sound}</div><div><h3>{escape(clip.reference)}</h3>'
        f'<p class="meta">{escape(where)}; target {escape(clip.class_name)}; {numbers}</p>'
        f"<p>{verdict}</p><ol>{steps}</ol></div></article>"
    )


def _seconds_section(seconds: Mapping[str, float]) -> list[str]:
    if not seconds:
        return []
    rows: list[list[Cell]] = [[name, float(value)] for name, value in seconds.items()]
    return ["<h2>Time</h2>", _table("Seconds per step", ["step", "seconds"], rows)]
