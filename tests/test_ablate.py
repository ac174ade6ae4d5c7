"""scripts/ablate.py: what runs, what is kept, what a change or a kill makes anew, and what the tables say."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from configs.schema import RunConfig
from dataset.avsbench import AvsBenchIndex
from dataset.media import read_audio, read_frames, read_truth
from scripts.ablate import DECLARED, Plan, cost_table, main
from scripts.make_mini_s4 import main as make_s4
from tests.ablation_case import ROOT, log, make_project
from utils.config import load_config
from utils.errors import AuroraError, DataError
from utils.paper import ABLATIONS
from utils.report.ablations import Difference, Mean, Table, document, html, markdown, mean_of, outcome
from utils.report.breakdown import Estimate

DECLARATION = yaml.safe_load((ROOT / DECLARED).read_text(encoding="utf-8"))
TABLES = {str(name): Table(str(name), **fields) for name, fields in DECLARATION["tables"].items()}
PAPER = [name for name, table in TABLES.items() if table.is_paper]


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command changes folder and the handler of SIGTERM; both are put back."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(signal, "signal", lambda *_: None)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which Table 3 has been made with two seeds."""
    project = make_project(tmp_path_factory.mktemp("done"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(signal, "signal", lambda *_: None)
        assert main(["--table", "3", "--seeds", "2"], project) == 0
    (project / "first.txt").write_text("\n".join(log(project)))
    return project


@pytest.fixture
def project(done: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    copy = tmp_path / "project"
    shutil.copytree(done, copy)
    return copy


def plan(scale: str, *tables: str, seeds: int = 1) -> Plan:
    made = Plan(DECLARATION, scale, Path("runs/ablations") / scale, DECLARATION["scale"][scale]["processes"])
    for table in map(TABLES.__getitem__, tables):
        for seed in range(seeds):
            for row in table.rows:
                made.row(table, row, seed)
    return made


def declare(project: Path, kind: str, *overrides: str) -> None:
    """Puts overrides behind those of a run in the project's ablations.yaml."""
    path = project / DECLARED
    declared = yaml.safe_load(path.read_text())
    declared["scale"]["mini"]["runs"].setdefault(kind, []).extend(overrides)
    path.write_text(yaml.safe_dump(declared))


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_every_row_of_every_table_has_its_runs(scale: str) -> None:
    made = plan(scale, *(TABLES if scale == "mini" else PAPER))
    assert PAPER == ["2", "3", "4", "5", "6", "7", "8"]
    for name, run in made.runs.items():
        order = list(made.ancestors(name))
        assert order[-1] == name and set(run.needs) < set(order)
        assert [*made.runs].index(name) >= len(order) - 1 and all(n in made.runs for n in order)
    declared = {*DECLARATION["runs"], *made.scale["runs"], *made.scale.get("commands", {})}
    kinds = {run.kind for run in made.runs.values()}
    # The evaluations are made for rows; everything else that is declared is used.
    assert {kind for kind in declared if not kind.endswith(".yaml") and not kind.startswith("eval")} == {
        kind for kind in kinds if not kind.startswith("eval")
    }
    with pytest.raises(AuroraError, match=r"no run 'nothing' at this scale.*Remedy"):
        made.add("nothing", 0)


def test_every_override_has_its_source() -> None:
    """A place in the paper or the released code, or our choice with the reason."""
    source = r"paper (\d|eq\. \d|tables? \d)|released code [\w/]+\.py:\d+|our choice: \w|AVSBench official code \w"
    lines = [line for line in (ROOT / DECLARED).read_text(encoding="utf-8").splitlines() if re.match(r"\s*- .*=", line)]
    assert len(lines) > 80
    for line in lines:
        assert re.match(source, line.rpartition(" # ")[2]), line


def differing(one: RunConfig, other: RunConfig) -> dict[str, object]:
    """Fields of `one` that `other` has otherwise, but for places and what no result depends on."""
    left, right = ({f"{section}.{name}": value for section, fields in config.model_dump(mode="json").items()
                    for name, value in (fields.items() if isinstance(fields, dict) else [("", fields)])}
                   for config in (one, other))  # fmt: skip
    free = ("output_dir", "log.", "init_from", "sft.teacher_checkpoint", "data.cot")
    return {name: value for name, value in left.items() if value != right[name] and not name.startswith(free)}


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_rows_differ_from_the_paper_s_method_in_what_they_say(scale: str) -> None:
    runs = {run.kind: run.config for run in plan(scale, *(TABLES if scale == "mini" else PAPER)).runs.values()}
    folder = ROOT / DECLARATION["scale"][scale]["configs"]
    same = {"data.answer": "plain"}  # on the same rows: the paths of data.cot choose them
    assert differing(runs["wo_cot"], runs["cot"]) == same and runs["wo_cot"].data.cot == runs["cot"].data.cot != ()
    assert runs["wo_mllm"].data.cot == runs["cot"].data.cot
    # Its teacher reads the true class; the study `teacher` has the one that does not.
    assert runs["wo_cot"].sft.teacher_answer in ("class", "conclusion")
    assert all("reads the true class" in TABLES[name].remark for name in ("2", "7"))
    assert differing(runs["wo_distill"], runs["cot"]) == {"loss.distill": 0.0}
    assert differing(runs["ct"], runs["crt"]) == {"reflective.target": "corrected_only"}
    weights = {"format": 1.0, "iou": 1.0, "class": 0.0}
    assert differing(runs["format_iou"], runs["crt_grpo"]) == {"grpo.reward_weights": weights}
    for kind in ("sft_grpo", "ct_grpo"):
        assert differing(runs[kind], runs["crt_grpo"]) == {}, "the start alone differs"
    assert differing(runs["fixed"], runs["cot"]) == {} and "fixed" in runs["fixed"].data.cot[0]
    assert runs["s4"].data.benchmark == "avsbench_s4" and runs["s4"].grpo.reward_weights == weights
    seg, mllm = runs["seg"], runs["mllm"]
    assert seg.loss.ce == 0 < seg.loss.bce and mllm.loss.bce + mllm.loss.dice == 0 < mllm.loss.ce
    assert differing(runs["mllm_seg"], seg) == differing(runs["seg_mllm"], mllm) == {}
    assert runs["wo_mllm"].model.prompter == "text_encoder"
    assert (runs["wo_mllm"].model.text_encoder is None) == (scale == "mini")
    stages = {"cot": "sft", "teacher": "teacher", "crt": "reflective", "crt_grpo": "grpo"}
    for kind, stage in stages.items():  # the paper's method is the shipped configuration
        steps = {"optim.steps": 20} if (kind, scale) == ("crt_grpo", "mini") else {}
        shipped = load_config(folder / f"{stage}.yaml", ["output_dir=x"])
        changed = differing(runs[kind], shipped)
        places = {field: changed.pop(field, None) for field in ("data.root", "reflective.paths")}
        assert changed == steps and (scale == "mini" or not any(places.values())), kind
    if scale == "mini":
        plain = {"sft.teacher_answer": "plain"}
        assert differing(runs["wo_cot_plain"], runs["wo_cot"]) == plain
        assert runs["plain_teacher"].data.answer == "plain"
        assert differing(runs["early_t1"], runs["early_grpo"]) == {"grpo.temperature": 1.0}


def test_the_paper_s_lines_are_complete() -> None:
    assert sorted(ABLATIONS) == [2, 3, 4, 5, 7, 8]
    for lines in ABLATIONS.values():
        for line in lines:
            assert set(line.scores) == {"test_s", "test_u"}
            for j, f, both in line.scores.values():
                assert abs((j + f) / 2 - both) <= 0.1001  # the paper rounds


def test_shared_runs_are_made_once(done: Path) -> None:
    made = (done / "first.txt").read_text().split()
    assert sorted(made) == sorted(
        ["make_mini_world", *["teacher", "wo_distill", "cot", "eval_wo_distill", "eval_cot"] * 2]
    )
    assert made.index("teacher") < made.index("cot") < made.index("eval_cot")
    names = {run.kind: run.name for run in plan("mini", "3").runs.values()}
    for table in ("2", "4", "8"):
        assert names["cot"] in plan("mini", table).runs
    assert len(plan("mini", *PAPER).runs) < sum(len(plan("mini", table).runs) for table in PAPER)
    both = plan("mini", "6", seeds=2).runs.values()
    assert sorted(run.kind for run in both if run.seed == 0 and run.command[0].startswith("scripts/make")) == [
        "s4_data", "world"] and len([run for run in both if run.kind == "mine"]) == 2  # fmt: skip


def test_nothing_is_made_twice_and_other_tables_add_their_own(project: Path) -> None:
    assert main(["--table", "3", "--seeds", "2"], project) == 0 and log(project) == []
    assert main(["--table", "8"], project) == 0
    assert log(project) == ["generate_cot", "fixed_teacher", "fixed", "eval_fixed"]


def test_a_changed_config_makes_exactly_what_depends_on_it(project: Path) -> None:
    text = (project / DECLARED).read_text()
    declare(project, "wo_distill", "log.every=1")  # nothing depends on it, and its command is another
    declare(project, "wo_distill", "optim.steps=77")
    assert main(["--table", "3", "--seeds", "2"], project) == 0
    assert log(project) == ["wo_distill", "eval_wo_distill"] * 2
    (project / DECLARED).write_text(text)  # back again: the first runs are still there
    assert main(["--table", "3", "--seeds", "2"], project) == 0 and log(project) == []
    teacher = project / "configs/mini/teacher.yaml"  # a stage's own file counts as well
    shipped = load_config(teacher).optim.steps
    teacher.write_text(re.sub(rf"steps: {shipped}\b", "steps: 77", teacher.read_text()))
    assert main(["--table", "3"], project) == 0
    assert sorted(log(project)) == ["cot", "eval_cot", "eval_wo_distill", "teacher", "wo_distill"]


def test_changed_code_counts_unless_it_is_told_not_to(project: Path) -> None:
    with (project / "train_ds_test.py").open("a") as file:
        file.write("\n")
    (old,) = (project / "runs/ablations/mini").glob("cot-s0-*")
    (old / "old").touch()
    assert main(["--table", "3", "--any-code"], project) == 0 and log(project) == []
    assert main(["--table", "3"], project) == 0
    everything = ["cot", "eval_cot", "eval_wo_distill", "make_mini_world", "teacher", "wo_distill"]
    assert sorted(log(project)) == everything and not (old / "old").exists()


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    (project / "hold-cot").write_text("")
    code = f"from pathlib import Path; from scripts.ablate import main; main(['--table', '3'], Path({str(project)!r}))"
    runner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    end = time.monotonic() + 120
    path = project / "log.txt"
    while not path.exists() or "cot" not in path.read_text().splitlines():
        assert runner.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    # Its commands too: one that outlived it would finish, and count.
    for process in [*psutil.Process(runner.pid).children(recursive=True), psutil.Process(runner.pid)]:
        process.kill()
    runner.wait()
    (project / "hold-cot").unlink()
    before = log(project)
    assert before[-1] == "cot" and "eval_cot" not in before
    assert main(["--table", "3"], project) == 0
    after = log(project)
    assert after[0] == "cot" and not {*before[:-1]} & {*after}
    (folder,) = (project / "runs/ablations/mini").glob("cot-s0-*")
    assert (folder / "attempts").read_text() == "xx"  # the folder was kept, so the real command continues


def test_printed_commands_run_by_hand_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(tmp_path / "project")
    assert main(["--table", "6", "--print-commands"], project) == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(lines) == 2 * len(commands) == 2 * len(plan("mini", "6").runs) and log(project) == []
    assert [line for line in lines if line.startswith("# cot-")][0].split(" after ")[1].startswith("world, teacher-s0-")
    for line in commands[:2]:
        subprocess.run([sys.executable, *shlex.split(line)[1:]], cwd=project, check=True)
    assert log(project) == ["make_mini_world", "teacher"]
    assert main(["--table", "6", "--dry-run"], project) == 0 and "2 finished" in capsys.readouterr().out
    assert main(["--table", "6"], project) == 0 and len(log(project)) == len(commands) - 2
    text = (project / "runs/ablations/mini/table_6.md").read_text()
    assert "| fine-tuned, 3 epochs | S4 test | 12 | 77.3 | 86.7 | - |" in text and "Protocol s4" in text
    assert "| before fine-tuning - fine-tuned, 3 epochs | S4 test | - |" in text


def test_tables_of_finished_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table", "3", "--seeds", "3", "--report"], project) == 0
    assert log(project) == []
    folder = project / "runs/ablations/mini"
    text = (folder / "table_3.md").read_text()
    assert "Not finished: w/o distillation, seed 2; with distillation, seed 2." in text
    assert text in capsys.readouterr().out and "Mini world, synthetic data" in text
    with open(folder / "table_3.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    first = rows[0]
    assert (first["row"], first["split"], first["score"], first["paper"]) == ("w/o distillation", "test_s", "J", "60.2")
    assert (first["seeds"], first["n"], first["mini"]) == ("2", "12", "1")
    assert float(first["deviation"]) == pytest.approx(0.5**0.5)  # the seeds score x and x + 1
    facts = json.loads((folder / "table_3.json").read_text())
    seen = facts["differences"][0]
    # Made-up scores: without distillation 4 points better in every row and seed, against the paper.
    assert (seen["paper"], round(seen["ours"], 6)) == (-0.8, 4.0)
    assert (seen["agrees"], seen["significant"]) == (False, True)
    assert "w/o distillation on seen (not the paper's sign, significant)" in text
    page = (folder / "table_3.html").read_text()
    assert page.count("<table>") == 2 and "<script" not in page and "±" in page


def test_document_keeps_notes_and_names_open_questions(project: Path) -> None:
    docs = project / "all.md"
    assert main(["--table", "3", "--seeds", "2", "--report", "--docs", str(docs)], project) == 0
    text = docs.read_text()
    assert "Open question: w/o distillation on seen" in text and "What the mini world cannot show" in text
    assert text.count("Open question: ") == 2
    docs.write_text(text.replace("Open question: w/o distillation on seen", "Explained: w/o distillation on seen"))
    assert main(["--table", "all", "--report", "--docs", str(docs)], project) == 0
    again = docs.read_text()
    assert "Explained: w/o distillation on seen" in again and "Open question: w/o distillation on seen" not in again
    assert "Open question: w/o distillation on unseen" in again
    assert "## Table 7" in again and again.count("No run has finished.") == 4
    assert "| with distillation | seen |" in again


def test_one_seed_is_never_significant(project: Path) -> None:
    table, made = TABLES["3"], plan("mini", "3")
    folders = {(row, 0): project / made.row(table, row, 0).folder for row in table.rows}
    found = outcome(table, folders, (0,), 60.0)
    assert all(d.significant is None and d.over_seeds.interval is None for d in found.differences)
    assert "one seed" in markdown(found) and "one seed" in html(found)
    assert found.lines[0].scores["J"].deviation is None and "±" not in markdown(found)
    half = outcome(table, {k: v for k, v in folders.items() if "w/o" in k[0]}, (0,), 60.0)
    assert len(half.lines) == 2 and not half.differences and half.missing == ["with distillation, seed 0"]
    nothing = outcome(TABLES["2"], {}, (0,), 0.0)
    assert "No run has finished." in markdown(nothing) and document([nothing], 0.0).count("## Table 2") == 1
    broken = folders["with distillation", 0] / "test_s/metrics.json"
    facts = json.loads(broken.read_text())
    broken.write_text(json.dumps({**facts, "scores": {}}))
    with pytest.raises(DataError, match="no scores of split test_s under protocol official"):
        outcome(table, folders, (0,), 60.0)


def test_no_difference_has_no_sign() -> None:
    signs = [
        Difference("a", "b", "test_s", paper, mean_of([ours]), Estimate(ours, None, None, 1, 1)).agrees
        for paper, ours in ((-0.8, 0.0), (-0.8, -1.0), (-0.8, 1.0), (None, 1.0), (0.0, 1.0))
    ]
    assert signs == [False, True, False, None, None]


def test_means_and_their_intervals() -> None:
    mean = mean_of([1.0, 2.0, 3.0])
    assert (mean.value, mean.deviation, mean.seeds) == (2.0, 1.0, 3)
    low, high = mean.interval  # Student's t: 4.3027 at two degrees of freedom, 2.0452 at 29 (printed tables)
    assert high - 2 == pytest.approx(2 - low) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    low, high = Mean(0.0, 1.0, 30).interval
    assert high == -low == pytest.approx(2.0452 / 30**0.5, rel=1e-4)
    assert mean_of([5.0]) == Mean(5.0, None, 1) and mean_of([5.0]).interval is None


def test_cost_is_measured_where_it_can_be() -> None:
    def costs(seconds: dict[str, float]) -> dict[str, tuple[str, str]]:
        lines = cost_table(made, seconds, "paper").splitlines()[2:-1]
        return {line.split("-s0-")[0]: re.search(r"(\S+)  +(\S+(?: \S+)*)$", line).groups() for line in lines}

    made = plan("paper", *PAPER)
    guess = costs({})
    hours = {kind: float(value) for kind, (value, _) in guess.items() if value != "-"}
    assert guess["wo_mllm"][0] == "-" and guess["cot"][1] == "arithmetic"
    config = next(run.config for run in made.runs.values() if run.kind == "cot")
    clips = config.optim.steps * config.engine.micro_batch * config.engine.accumulation * 2
    by_hand = clips * 6 * 7.6e9 * (845 + 1496 + 300) / (0.4 * 149.7e12) / 3600
    assert hours["cot"] == pytest.approx(by_hand, abs=0.006)
    assert hours["teacher"] == pytest.approx(2 * by_hand, abs=0.006)
    assert 0 < hours["eval_wo_cot"] < hours["eval_cot"] < 20
    cot = next(name for name, run in made.runs.items() if run.kind == "cot")
    known = costs({cot: 3600.0})
    assert known["cot"] == ("2.00", "finished") and known["fixed"] == ("2.00", "mean of 1 like it")
    assert f"{len(made.runs)} runs, 1 finished; open: " in cost_table(made, {cot: 3600.0}, "paper")


def test_missing_files_are_named_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(tmp_path / "project")
    assert main(["--table", "2", "--scale", "paper"], project) == 1
    error = capsys.readouterr().err
    assert "model.text_encoder = 'weights/clip-vit-large-patch14'" in error and "data.root = 'data/refavs'" in error
    assert "init_from" not in error and "teacher_checkpoint" not in error and log(project) == []
    assert main(["--table", "2", "--num_gpus", "7"], project) == 1 and "must divide" in capsys.readouterr().err
    assert main(["--table", "2", "--scale", "paper", "--num_gpus", "4", "--dry-run"], project) == 0
    for wrong in (["2", "--seeds", "0"], ["3", "--jobs", "2", "--scale", "paper"], ["grpo", "--scale", "paper"]):
        with pytest.raises(SystemExit):
            main(["--table", *wrong], project)


def test_several_at_a_time_respect_what_needs_what(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    assert main(["--table", "grpo", "--seeds", "2", "--jobs", "2"], project) == 0
    made = log(project)
    study = [kind for kind in DECLARATION["scale"]["mini"]["runs"] if kind.startswith("early_")]
    assert sorted(name for name in made if not name.startswith("eval_")) == sorted(
        ["make_mini_world", *["teacher", "cot", *study] * 2]
    )
    assert made[0] == "make_mini_world" and "teacher" in made[1:3]
    for before, after in (("teacher", "cot"), ("cot", "eval_cot"), ("cot", "early_t1"), ("early_t1", "eval_early_t1")):
        assert made.index(before) < made.index(after)
    assert main(["--table", "grpo", "--seeds", "2"], project) == 0 and log(project) == []
    text = (project / "runs/ablations/mini/table_grpo.md").read_text()
    assert text.startswith("# What stage 3 changes") and "paper" not in text.split("| row |")[1]
    assert "| J | F | J&F | class accuracy | faithful | seeds |" in text and "J&F against the first row" in text
    with open(project / "runs/ablations/mini/table_grpo.csv", newline="") as file:
        assert {line["score"] for line in csv.DictReader(file)} == {"J", "F", "J&F", "class_accuracy", "faithful"}


def test_a_failure_ends_what_runs_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    project = make_project(tmp_path)
    (project / "hold-cot").write_text("")  # runs until it is ended
    failing = "import sys, pathlib\nif 'loss.distill=0.0' in sys.argv:\n    sys.exit(3)\n"
    (project / "train_ds.py").write_text(failing + (project / "train_ds.py").read_text())
    assert main(["--table", "3", "--jobs", "2"], project) == 1
    assert "run wo_distill-s0-" in (error := capsys.readouterr().err) and "ended with status 3" in error
    assert "eval_cot" not in log(project)


def test_mini_s4_has_the_layout_of_s4(tmp_path: Path) -> None:
    root = tmp_path / "s4"
    assert make_s4(["--out", str(root), "--train", "2", "--val", "1", "--test", "2"]) == 0
    index = AvsBenchIndex(root, "s4")
    assert index.layout == "v2" and [len(index.rows(s)) for s in ("train", "val", "test")] == [2, 1, 2]
    for split, annotated in (("train", 1), ("test", 5)):
        for row in index.rows(split):
            frames = read_frames(index.frames_folder(row.clip))
            assert frames.shape == (5, 96, 96, 3) and row.class_name
            masks, labelled = read_truth(index, row, (96, 96), None, None)
            assert (labelled or tuple(range(5))) == tuple(range(annotated)) and masks[:annotated].any(axis=(1, 2)).all()
            assert len(read_audio(index.audio_path(row.clip), 16_000)) == 5 * 16_000
    table = (root / "metadata.csv").read_bytes()
    assert make_s4(["--out", str(root), "--train", "2", "--val", "1", "--test", "2"]) == 0
    assert (root / "metadata.csv").read_bytes() == table and len(list(root.glob("v1s/*"))) == 5
