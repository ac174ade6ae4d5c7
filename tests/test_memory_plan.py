"""The plan against what DeepSpeed holds, against a real step on the CPU, and against itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from model.aurora.meta import build_meta_model
from model.stages.base import build_stage
from model.stages.footprint import measure
from model.stages.workload import Workload, fbank_frames
from model.videollama2.config import RELEASED
from scripts.plan_memory import main
from tests.aurora_cases import LORA, SAM_SIDE, SEG, STOP, run_config, tiny_batch, tiny_model, tiny_sample
from tests.aurora_cases import SAM as SIZES
from tests.memory_case import SIZES as LAYERS
from tests.tiny_run import ROOT, environment
from utils.config import load_config
from utils.live_memory import LiveBytes, gradients_dropped
from utils.memory_plan import (
    GB,
    REDUCE_BUCKET,
    Change,
    Footprint,
    Phase,
    Plan,
    cheapest,
    engine_state,
    make_plan,
    own_values,
)
from utils.memory_tables import Row, grid_text, markdown, plan_text

PROMPT, ANSWER, FRAME = 90, 160, (120, 200)
FBANK_SECONDS = 0.415
"""40 filter-bank frames, as `tiny_sample` has."""


def test_own_values_are_those_of_every_parameter_touched() -> None:
    assert own_values([10, 10], 2) == 10
    assert own_values([10, 10, 10], 2) == 20  # the middle one belongs to both
    assert own_values([30], 3) == 30
    assert own_values([545, 3, 545, 18], 2) == 545 + 3 + 545  # as embed_tokens, adapters, lm_head, heads


def test_arithmetic_by_hand() -> None:
    """1000 values, 600 of them trained in one piece, two GPUs, bf16."""
    zero = [engine_state([600], 1000, 2, 2, stage, 4, False) for stage in range(4)]
    assert [s.optimiser for s in zero] == [7200, 3600, 3600, 3600]
    assert [s.gradients for s in zero] == [1200, 1200 + 1200, 2 * 1200, 600]
    assert [s.weights for s in zero] == [2000, 2000, 2000, 1000 + 2000]  # ZeRO-3 may hold all of it gathered
    assert [s.step for s in zero] == [4800, 2400, 3000, 2400]
    assert zero[2].communication == 2 * 2 * REDUCE_BUCKET + 1200
    assert engine_state([600], 1000, 4, 2, 0, 4, False).optimiser == 8 * 600
    offloaded = engine_state([600], 1000, 2, 2, 2, 4, True)
    assert (offloaded.optimiser, offloaded.step, offloaded.gradients) == (0, 0, 1200)
    assert offloaded.cpu == 3600 + 1200 + 600
    assert engine_state([], 1000, 2, 2, 2, 4, False) == engine_state([], 1000, 2, 1, 0, 1, False)


def test_engine_state_against_deepspeed() -> None:
    """Two real processes at ZeRO 1, 2 and 3: bytes of masters, moments and gradients."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "tests/memory_case.py"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    trained = [a * b for a, b in LAYERS]
    for case, found in json.loads(done.stdout.strip().splitlines()[-1]).items():
        zero, element = int(case[0]), 2 if case.endswith("bf16") else 4
        state = engine_state(trained, sum(trained), element, 2, zero, 2, False)
        assert found["optimiser"] == pytest.approx(state.optimiser, rel=0.01), case
        if zero == 2:  # between two micro-steps the accumulated copy exists alone
            assert found["gradients"] == pytest.approx(state.gradients / 2, rel=0.01), case
        if zero == 3:
            assert found["gradients"] == pytest.approx(state.gradients, rel=0.01), case
        if found["bucket"]:
            assert found["bucket"] == REDUCE_BUCKET


def test_live_bytes_of_a_network_known_by_heart() -> None:
    first, second = nn.Linear(30, 50, bias=False), nn.Linear(50, 7, bias=False)
    x = torch.randn(10, 30)
    with LiveBytes([*first.parameters(), *second.parameters(), x], vocabulary=7) as live:
        logits = second(torch.relu(first(x)))
        # forward: relu's output is saved and its input freed; both exist once
        assert live.peak == 4 * (500 + 500) and live.now == 4 * (500 + 70)
        with gradients_dropped([*first.parameters(), *second.parameters()]):
            logits.sum().backward()
        assert first.weight.grad is None and second.weight.grad is None
    assert live.logits_now == 4 * 70


@pytest.fixture(scope="module")
def sam_json(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sam") / "sam.json"
    SIZES.to_json(path)
    return str(path)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_on_meta_counts_as_a_real_step_on_the_cpu(checkpointing: bool, sam_json: str) -> None:
    """The real stage with real tensors under the same counter: within 2 %."""
    engine = {"precision": "fp32", "gradient_checkpointing": checkpointing}
    sections = {"trainable": LORA.model_dump(), "engine": engine}
    config = run_config("teacher", **sections)
    model = tiny_model(LORA)
    model.backbone.set_gradient_checkpointing(checkpointing)
    answer = [5] * (ANSWER - 3) + [SEG, 7, STOP]
    sample = tiny_sample(0, answer=answer, prompt_length=PROMPT)
    sample = replace(sample, masks=torch.zeros(2, *FRAME, dtype=torch.bool), sam_size=(19, 32))
    stage = build_stage(config, model.train())
    prepared = stage.prepare(tiny_batch(sample))
    known = [*model.parameters(), *model.buffers()]
    with gradients_dropped(model.parameters()), LiveBytes(known, 600) as live:
        stage.loss(prepared).total.backward()

    planned = config.model_copy(update={"model": config.model.model_copy(update={"sam_type": sam_json})})
    work = Workload(1, 1, 2, FRAME, FBANK_SECONDS, PROMPT, ANSWER)
    assert fbank_frames(FBANK_SECONDS) == sample.fbank.shape[0]
    phase = measure(planned, work=work).phases[-1]
    assert phase.name == "forward and backward"
    assert phase.total == pytest.approx(live.peak, rel=0.02)


def test_every_stage_has_its_phases(sam_json: str) -> None:
    for stage, names in {
        "teacher": ["towers", "forward and backward"],
        "sft": ["towers", "teacher's pass", "forward and backward"],
        "eval": ["towers", "answer and masks"],
    }.items():
        extra = {"eval": {"checkpoint": "x"}} if stage == "eval" else {}
        section = {"base": str(tiny_base()), "sam_type": sam_json, "sam_image_size": SAM_SIDE}
        config = run_config(stage, model=section, **extra)
        footprint = measure(config, work=Workload(1, 1, 2, FRAME, FBANK_SECONDS, PROMPT, ANSWER))
        assert [phase.name for phase in footprint.phases] == names
        assert (footprint.teacher > 0) == (stage == "sft") and bool(footprint.trained) == (stage != "eval")
        cached = footprint.phases[-1].kv_cache
        assert cached == (0 if stage != "eval" else 4 * 2 * 2 * 2 * 16 * (9 + 16 + PROMPT + ANSWER))


def test_answers_share_the_cache_of_their_prompt(sam_json: str) -> None:
    section = {"base": str(tiny_base()), "sam_type": sam_json, "sam_image_size": SAM_SIDE}
    config = run_config("grpo", model=section, init_from="x", loss={"ce": 0.0, "distill": 0.0})
    footprint = measure(config, work=Workload(2, 3, 2, FRAME, FBANK_SECONDS, PROMPT, ANSWER))
    assert [phase.name for phase in footprint.phases] == ["towers", "rollout", "forward and backward"]
    assert footprint.phases[1].kv_cache == 2 * (4 * 2 * 2 * 2 * 16) * (9 + 16 + PROMPT + 3 * ANSWER)


def tiny_base() -> Path:
    return Path(__file__).parent / "fixtures" / "videollama2_av_tiny"


def plan_of(total: int, limit: int) -> Plan:
    footprint = Footprint("teacher", {"all": 0}, (), 2, (Phase("towers", total),), (Phase("towers", total),), True)
    return make_plan(footprint, 1, 0, 1, False, limit, 0)


def test_the_cheapest_change_that_fits_is_found() -> None:
    saved = {"a=1": 10, "b=1": 30, "c=1": 40}
    asked: list[tuple[str, ...]] = []

    def plan_with(overrides: tuple[str, ...]) -> Plan | None:
        asked.append(overrides)
        if overrides == ("b=1",):
            return None  # the configuration refuses it alone
        return plan_of(100 - sum(saved[text] for text in overrides), 65)

    changes = [Change((name,), "") for name in saved]
    assert cheapest(changes, plan_with).changes == (changes[2],)
    saved["c=1"] = 20
    assert cheapest(changes, plan_with).changes == (changes[0], changes[1])
    assert asked[:3] == [("a=1",), ("b=1",), ("c=1",)]
    saved["c=1"] = saved["b=1"] = 1
    assert cheapest(changes, plan_with).plan is None


def test_changes_that_are_not_needed_are_left_out() -> None:
    """No field twice, nothing that does not help, nothing that a dearer change makes needless."""
    stages, cuts = {"2": 100, "1": 98, "0": 110, "3": 70}, {"small=1": 5, "mask=1": 12}

    def plan_with(overrides: tuple[str, ...]) -> Plan | None:
        zero = [text[-1] for text in overrides if text.startswith("zero=")]
        assert len(zero) < 2, overrides
        offload = 20 if "offload=1" in overrides else 0
        return plan_of(stages[(zero or "2")[0]] - sum(cuts.get(text, 0) for text in overrides) - offload, 45)

    names = ("zero=1", "zero=0", "small=1", "mask=1", "zero=3", "offload=1")
    remedy = cheapest([Change((name,), "") for name in names], plan_with)
    assert [change.overrides[0] for change in remedy.changes] == ["small=1", "zero=3", "offload=1"]
    assert remedy.plan is not None and remedy.plan.total == 45


def test_tables_of_a_plan_made_by_hand() -> None:
    """Each part at its own height; totals with and without checkpointing; ! beyond the limit; - where refused."""
    back = Phase("forward and backward", 3 * 10**9, 10**9, backward=True, most_logits=2 * 10**9)
    footprint = Footprint(
        "teacher", {"a.frozen": 6 * 10**9, "a.trained": 2 * 10**9}, (10**9,), 2, (Phase("towers", 10**9), back),
        (Phase("towers", 10**9), replace(back, activations=9 * 10**9)), True, trained_by={"a.trained": 10**9},
    )  # fmt: skip
    plan = make_plan(footprint, 1, 0, 4, False, 33 * 10**9, 10**9)
    assert (plan.total, plan.other, plan.peak) == (31 * 10**9, 33 * 10**9, "optimiser step")
    plan = replace(plan, limit=32 * 10**9)
    described = plan_text(plan, footprint)
    assert re.search(r"^frozen +6.00 +0.00 +0.00$", described, re.MULTILINE)
    assert re.search(r"^trained +2.00 +2.00 +12.00$", described, re.MULTILINE)
    assert re.search(r"^forward and backward +3.00 +1.00 +2.00 +0.00 +0.00 +27.00$", described, re.MULTILINE)
    assert "31.00 GB of 32.00 at the height of 'optimiser step', with gradient checkpointing" in described
    grid = {"teacher": {0: Row(plan), 3: Row(None)}}
    cells = ["8.00", "2.00", "12.00", "0.00", "3.00", "9.00", "2.00", "0.00", "0.00", "8.00", "31.00", "33.00!"]
    assert re.search("^teacher +0 +" + " +".join(cells) + "$", grid_text(grid), re.MULTILINE)
    assert "fits with" not in grid_text(grid)
    text = grid_text({"teacher": {0: Row(plan, "engine.zero_stage=2")}})
    assert text.endswith("\nteacher at ZeRO 0 fits with engine.zero_stage=2")
    rows = markdown(grid, {"teacher": ("configs/teacher.yaml", 0)}).splitlines()
    assert rows[2] == "| `configs/teacher.yaml` | 0 | " + " | ".join(cells) + " |"
    assert rows[-1] == "| teacher | 3 | " + " | ".join("-" * len(cells)) + " |"
    swapped = replace(footprint, phases=footprint.other_phases, other_phases=footprint.phases, checkpointing=False)
    plan = make_plan(swapped, 1, 0, 4, False, 32 * 10**9, 10**9)
    assert " ".join(cells) in " ".join(grid_text({"teacher": {0: Row(plan)}}).split())  # the same columns


def test_published_and_lean_sets_of_the_7b_model() -> None:
    """Trained values, component by component, of the model that the plan is made of."""
    counts = {}
    for name in ("configs/teacher.yaml", "configs/lean/teacher.yaml"):
        model = build_meta_model(load_config(ROOT / name), RELEASED)
        counts[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(p.numel() for p in model.backbone.parameters()) > 8.5e9 and model.backbone.dtype == torch.bfloat16
    rows = 152064 * 3584 * 2
    lora = 28 * 8 * (2 * 3584 + 3584 + 512)
    head = 3584 * 3584 + 3584 + 3584 * 256 + 256
    decoder = counts["configs/lean/teacher.yaml"] - lora - head - 2 * 3584
    assert counts["configs/teacher.yaml"] == rows + lora + head + decoder
    assert lora == 2_523_136 and decoder == 4_058_340


def test_command_on_the_tiny_model(
    tmp_path: Path, sam_json: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "teacher.yaml"
    config.write_text(
        f"stage: teacher\nmodel: {{base: {tiny_base()}, sam_type: {sam_json}, sam_image_size: {SAM_SIDE}}}\n"
        "data: {answer: class, audio_padding_seconds: 1.0, num_frames: 2}\nlog: {samples_every: 0}\n"
        "trainable: {lora_rank: 2}\n"
    )
    arguments = ["--config", str(config), "--frame-size", "60x80", "--json", str(tmp_path / "plan.json")]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert re.search(r"of 48.00 at the height of '.*', with gradient checkpointing \(without: .*\): fits", text)
    assert [len(re.findall(rf"^(?:teacher)? +{zero} +[\d.]+ ", text, re.MULTILINE)) for zero in range(4)] == [1] * 4
    data = json.loads((tmp_path / "plan.json").read_text())
    plan = data["plan"]
    assert plan["total"] == max(p["total"] for p in plan["phases"]) or plan["peak"] == "optimiser step"
    assert data["stages"]["teacher"]["2"]["total"] == plan["total"]

    # The two gradient buckets are 4 GB of the total; ZeRO-1 needs one, ZeRO-0 none.
    tight = str(plan["total"] / GB - 1.0)
    assert main([*arguments, "--gpu-gb", tight]) == 1
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text and "Remedy: the cheapest change with which it fits" in text
    assert "engine.zero_stage=0   # nothing but communication" in text
    assert main([*arguments, "--gpu-gb", "0.1"]) == 1
    assert "No change of the list makes it fit" in capsys.readouterr().out


def test_shipped_configs_fit_two_gpus_of_48_gb(capsys: pytest.CaptureFixture[str]) -> None:
    """Stage sft, the largest of all, planned anew; the others in the table of docs/memory.md."""
    assert main(["--config", str(ROOT / "configs/sft.yaml"), "--alone"]) == 0
    text = capsys.readouterr().out
    total = re.search(r"^([\d.]+) GB of 48.00", text, re.MULTILINE).group(1)
    document = (ROOT / "docs/memory.md").read_text(encoding="utf-8")
    row = next(line for line in document.splitlines() if line.startswith("| `configs/sft.yaml` |"))
    assert f" {total} " in row, f"docs/memory.md is out of date: {row}"
    shipped = [path for folder in ("configs", "configs/lean") for path in (ROOT / folder).glob("*.yaml")]
    for path in (path for path in shipped if path.name != "base.yaml"):
        name = path.relative_to(ROOT)
        row = next((line for line in document.splitlines() if line.startswith(f"| `{name}` |")), "")
        assert row, f"docs/memory.md has no row of {name}: see `plan_memory.py --config {name} --markdown`"
        config, cells = load_config(path), [cell.strip() for cell in row.strip("| ").split("|")]
        assert float(cells[-1 if config.stage == "eval" else -2]) <= 48, row
        assert config.stage == "eval" or (int(cells[1]), config.engine.offload) == (config.engine.zero_stage, False)
