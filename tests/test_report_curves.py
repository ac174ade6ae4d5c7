"""Training curves: what is read of metrics.jsonl, what is drawn in the page and as pictures of the paper's figures."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import cv2
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from scripts.report import main
from utils.errors import DataError
from utils.report.curves import COLOURS, chart_image, charts_of_runs, draw_chart, read_scalars, smooth


def write_run(folder: Path, **scalars: float) -> Path:
    folder.mkdir()
    rows = [{"step": step, **{name: value * step for name, value in scalars.items()}} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_curves_skip_what_cannot_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "ce": 2.0, "note": "x"}, {"step": 2, "ce": float("nan")}, {"step": 3, "ce": 1.0, "lr": 1e-4}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ce"')
    assert read_scalars(path) == {"ce": ([1.0, 3.0], [2.0, 1.0]), "lr": ([3.0], [1e-4])}
    found = charts_of_runs([("sft", path), ("grpo", tmp_path / "none.jsonl")], ["lr", "ce", "kl"])
    assert [(title, list(lines)) for title, lines in found.items()] == [("lr", ["sft"]), ("ce", ["sft"])]
    path.write_text('{"ce": 1}\n')
    with pytest.raises(DataError, match="metrics.jsonl:1.*Remedy"):
        read_scalars(path)


@pytest.mark.parametrize(
    ("values", "scale"),
    [((1.0,), "linear"), ((0.0, 0.0), "linear"), ((5.0, 5.0, 5.0), "linear"), ((1e-6, 10.0), "log"),
     ((-3.0, 4.0), "linear"), ((1e9, 2e9), "linear"), ((0.0, 1e6), "linear")],
)  # fmt: skip
def test_charts_of_awkward_ranges_show_all_values(values: tuple[float, ...], scale: str) -> None:
    axes = Figure().subplots()
    draw_chart(axes, "x", {"a": (list(map(float, range(len(values)))), list(values))}, ["a"], None)
    assert axes.get_yscale() == scale and axes.get_title("left") + axes.get_title() == "x" + " (log)" * (scale == "log")
    assert "$" not in "".join(label.get_text() for label in axes.get_yticklabels())
    low, high = axes.get_ylim()
    assert low <= min(values) <= max(values) <= high and low < high
    drawn = axes.lines[-1]
    assert list(drawn.get_ydata()) == list(values) and (drawn.get_marker() == ".") == (len(values) == 1)


def test_smooth() -> None:
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_a_chart_in_the_page_is_small_and_holds_names_as_text() -> None:
    steps = [float(step) for step in range(5000)]
    lines = {"$x^{2": (steps, [1000 - step / 10 for step in steps]), "b": (steps, [step / 7 for step in steps])}
    image = chart_image("reward_$1", lines, ["b", "$x^{2"])
    picture = base64.b64decode(image["src"].split(",")[1]).decode()
    root = ElementTree.fromstring(picture)
    assert "reward_$1" in "".join(root.itertext())  # not read as a formula
    assert image["keys"] == [("$x^{2", COLOURS[1]), ("b", COLOURS[0])] and COLOURS[1] in picture
    assert "$x^{2 1e+03 to 500" in image["alt"] and len(image["src"]) < 40_000
    widths = [float(number) for number in re.search(r'viewBox="([^"]*)"', picture)[1].split()]
    found = re.findall(r'd="(M [^"]*)"', picture)
    points = [tuple(map(float, pair)) for d in found for pair in re.findall(r"[ML] (\S+) (\S+)", d)]
    assert len(points) > 20 and all(x <= widths[2] and y <= widths[3] for x, y in points)
    assert {"0", "1000"} <= {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}  # labels stay whole
    assert chart_image("reward_$1", lines, ["b", "$x^{2"]) == image


def test_figures_of_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a", reward_all=0.1, reward_class=0.2, reward_iou=0.3, group_std=0.0, entropy=1.0)
    second = write_run(tmp_path / "b", reward_all=0.2)
    assert main([f"with={first}", str(second), "--png", str(tmp_path / "out"), "--window", "2"]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(p).name for p in written] == ["figure_8.png", "figure_9.png", "figure_policy.png"]
    widths = [cv2.imread(path).shape[1] for path in written]
    assert widths[0] == 3 * widths[1] == 3 * widths[2]
    picture = cv2.imread(written[0])[..., ::-1]
    in_both, in_one = picture[:, : widths[1]], picture[:, widths[1] : 2 * widths[1]]
    for colour, counts in ((COLOURS[0], (True, True)), (COLOURS[1], (True, False))):
        rgb = [round(255 * share) for share in to_rgb(colour)]
        assert tuple(bool((part == rgb).all(-1).any()) for part in (in_both, in_one)) == counts, colour


def test_runs_without_figures_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--png", str(tmp_path / "out")]) == 1
    assert "metrics.jsonl" in capsys.readouterr().err
    sft = write_run(tmp_path / "sft", ce_loss=1.0)
    assert main([str(sft), "--png", str(tmp_path / "out")]) == 1
    assert "no scalar of stage grpo" in capsys.readouterr().err
