"""The gallery of a report: its data as JSON inside the page, and the controls; `report_script` draws the clips.

A clip becomes elements only when it is scrolled to, so that thousands of rows open as fast as ten. Text of data and
models travels as JSON whose angle brackets are escaped, and the script puts it into the page as text, never as markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from utils.answers import reasoning_steps
from utils.report_media import COLUMNS, Drawn
from utils.report_runs import Evaluation, PredictedRow

RESULTS = {
    "right": "class right",
    "wrong": "class wrong",
    "unfaithful": "reasoning unfaithful",
    "high": "J&F 80 or more",
    "low": "J&F below 30",
    "noseg": "no [SEG]",
}
"""Values of the filter `result`; the script knows what they mean."""

ORDERS = {
    "row": "row",
    "worst": "worst first",
    "best": "best first",
    "gain": "largest gain over beside",
    "loss": "largest loss to beside",
}

KEYS = (
    ("j, k", "next, previous clip"), ("/", "search"), ("m", "masks on or off"), ("p", "play or pause the sound"),
    ("Enter", "enlarge the clip"), ("← →", "frame by frame in the enlarged clip"), ("Esc", "close it"),
)  # fmt: skip


def gallery_data(evaluations: Sequence[Evaluation], clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the script needs to know, as plain values.

    Args:
        evaluations: in the order of the page.
        clips: `gallery_rows` of each benchmark; the texts of their steps become numbers of `texts`.
    """
    plain = [e for e in evaluations if e.probe == "none"] or list(evaluations)
    same = [e.name for e in plain if e.benchmark == plain[0].benchmark]
    texts: dict[str, int] = {}  # each once: models repeat themselves, and a page of thousands of clips must stay small
    rows = []
    for clip in clips:
        said = {
            name: {**answer, "steps": [[step, texts.setdefault(text, len(texts))] for step, text in answer["steps"]]}
            for name, answer in clip["said"].items()
        }
        rows.append({**clip, "said": said})
    names = {"runs": [e.name for e in evaluations], "run": same[-1] if same else ""}
    return {**names, "columns": COLUMNS, "texts": list(texts), "rows": rows}


def gallery_rows(
    evaluations: Sequence[Evaluation],
    rows: Sequence[int],
    drawn: Drawn | None = None,
    strips: Mapping[tuple[str, int], str] | None = None,
    sizes: Mapping[int, str] | None = None,
    failures: Mapping[int, str] | None = None,
) -> list[dict[str, Any]]:
    """One clip of the gallery per row, as plain values.

    Args:
        evaluations: of one benchmark, in the order of the page.
        rows: that are shown.
        drawn: pictures and sounds of these rows.
        strips: (evaluation, row) -> address of a ready picture, used where nothing was drawn.
        sizes: row -> name of its mask size.
        failures: row -> type of failure.
    """
    strips, sizes, failures = strips or {}, sizes or {}, failures or {}
    listed = []
    for number in rows:
        said = {e.name: e.rows[number] for e in evaluations if number in e.rows}
        if not said:
            continue
        first = next(iter(said.values()))
        media = drawn.rows.get(number) if drawn else None
        item: dict[str, Any] = {
            "row": number, "split": first.split, "kind": first.kind, "ref": first.reference, "cls": first.class_name,
            "clip": first.clip, "size": sizes.get(number, ""), "failure": failures.get(number, ""), "said": {},
        }  # fmt: skip
        if media:
            item |= {"frames": media.frames, "truth": media.truth, "n": media.count, "hw": list(media.size)}
        for name, row in said.items():
            item["said"][name] = _said(row, drawn, media.masks.get(name) if media else None, strips.get((name, number)))
        listed.append(item)
    return listed


def _said(row: PredictedRow, drawn: Drawn | None, masks: str | None, strip: str | None) -> dict[str, Any]:
    scores = {name: round(value, 1) for name, value in row.scores.items()}
    said: dict[str, Any] = {
        "steps": reasoning_steps(row.text, row.reference), "answer": row.answer_class, "right": row.class_right,
        "faithful": row.faithful, "seg": row.has_seg, "scores": scores,
        "jf": None if row.jf is None else round(row.jf, 2),
    }  # fmt: skip
    if masks:
        said["masks"] = masks
    elif strip:
        said["strip"] = strip
    if drawn and row.audio in drawn.sounds:
        said["sound"] = drawn.sounds[row.audio]
    other = [f"{what} {clip}" for what, clip in (("saw", row.video), ("heard", row.audio)) if clip != row.clip]
    if other:
        said["note"] = f"Probe: the model {' and '.join(other)}."
    return said


def gallery_section(data: Mapping[str, Any]) -> str:
    """Data, controls, and the places where the script puts clips."""
    rows = data["rows"]
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(sign, code)
    values = {name: sorted({row[key] for row in rows} - {""}) for name, key in _FIELDS.items()}
    selects = [_select("run", "run", {name: name for name in data["runs"]}, data["run"])]
    if len(data["runs"]) > 1:
        selects.append(_select("beside", "beside", {"": "nothing", **{name: name for name in data["runs"]}}))
    for name, found in values.items():
        if len(found) > 1 or (name == "failure" and found):
            selects.append(_select(name, name.replace("_", " "), {"": "all", **{v: v for v in found}}))
    selects.append(_select("result", "result", {"": "all", **RESULTS}))
    orders = ORDERS if len(data["runs"]) > 1 else {k: v for k, v in ORDERS.items() if k not in ("gain", "loss")}
    selects.append(_select("order", "order", orders))
    keys = "".join(f"<dt><kbd>{escape(key)}</kbd></dt><dd>{escape(what)}</dd>" for key, what in KEYS)
    return f"""<form class="filters" id="filters" role="search" aria-label="Filter clips">
<label class="wide">search<input type="search" name="text" placeholder="reference, class, reasoning, row" \
autocomplete="off"></label>{"".join(selects)}
<label class="tick"><input type="checkbox" name="masks" checked> masks</label>
<button type="reset">all clips</button></form>
<p class="note"><span id="count" role="status"></span> Green: ground truth. Orange: prediction. Scores of one row: \
protocol per_expression.</p>
<details class="keys"><summary>Keyboard</summary><dl>{keys}</dl></details>
<noscript><p>The clips need JavaScript; the tables above do not.</p></noscript>
<div id="clips"></div><p id="more"><button type="button">more clips</button></p>
<dialog id="large" aria-label="Enlarged clip"></dialog>
<script type="application/json" id="gallery">{text}</script>"""


_FIELDS = {"split": "split", "kind": "kind", "class": "cls", "mask_size": "size", "failure": "failure"}


def _select(name: str, label: str, options: Mapping[str, str], chosen: str | None = None) -> str:
    """A drop-down list; the first option is chosen where no other is named."""
    chosen = next(iter(options)) if chosen is None else chosen
    lines = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(title)}</option>'
        for value, title in options.items()
    )
    return f'<label>{escape(label)}<select name="{escape(name)}">{lines}</select></label>'
