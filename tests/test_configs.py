"""The schema refuses what is wrong, all at once and with a remedy; every shipped file loads; every field is used."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.schema import RunConfig
from utils.config import check_paths, differences, fields, git_state, load_config, save_config
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.stem != "ablations")  # see test_ablate.py
SHIPPED = [path for path in FILES if path.stem != "base"]
FIELDS = dict(fields(RunConfig))
NUMBER_SOURCE = r"paper (\d|eq\. \d|tables? \d)|released code [\w/]+\.py:\d+|our choice: \w"
SOURCE = rf"{NUMBER_SOURCE}|released code \w|(Ref-AVS|AVSBench) official code"
LATER = {"reflective": "model/stages/reflective.py", "grpo": "model/stages/grpo.py"}
"""Sections of stages that may not be part of this checkout yet -> the module that reads them."""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.smoke
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_shipped_file_loads_and_comes_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    saved = save_config(config, tmp_path)
    assert load_config(saved) == config
    assert git_state() in saved.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_value_has_its_source(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        has_value = re.match(r"\s*\w+:\s*[^\s#]", line) and not line.startswith("inherit:")
        if has_value:
            comment = line.rpartition(" # ")[2]
            assert re.match(SOURCE, comment), f"{path.name}:{number}: {line}"
            assert not re.search(r"\bours\b|published", comment), f"{path.name}:{number}: {line}"


def numbers_in(value: object) -> bool:
    if isinstance(value, dict | list):
        return any(map(numbers_in, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int | float) and not isinstance(value, bool)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_number_has_its_place_or_its_reason(path: Path) -> None:
    """A section of the paper, a line of the released code, or our choice with the reason."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = re.match(r"\s*\w+: ([^#]+?)\s+# (.+)$", line)
        if found and numbers_in(yaml.safe_load(found[1])):
            assert re.match(NUMBER_SOURCE, found[2]), f"{path.name}:{number}: {line}"
        elif not found and re.match(r"\s*\w+:\s*\S", line):
            assert line.startswith("inherit:"), f"{path.name}:{number}: no source: {line}"


def test_what_is_evaluated_is_what_the_last_stage_leaves() -> None:
    left = f"{load_config(ROOT / 'configs/grpo.yaml').output_dir}/final"
    assert load_config(ROOT / "configs/eval.yaml").eval.checkpoint == left
    stages = (ROOT / "README.md").read_text(encoding="utf-8").split("configs/grpo.yaml")[1]
    assert re.search(r"--config configs/eval\.yaml eval\.checkpoint=(\S+)", stages)[1] == left


def test_sources_of_the_released_code_are_named_by_line() -> None:
    """Lines that an audit against the released code corrected."""
    lines = {
        "eval.yaml": {"max_new_tokens": "LISA.py:199"},
        "base.yaml": {
            "system_prompt": "sem_seg_dataset.py:513-519",
            "decode_frames_per_step": "LISA_sft_distill.py:186",
            "incomplete_reasoning": "sem_seg_dataset.py:398",
        },
    }
    for name, fields_ in lines.items():
        text = (ROOT / "configs" / name).read_text(encoding="utf-8")
        for field, source in fields_.items():
            assert re.search(rf"^  {field}: .*{re.escape(source)}", text, re.M), field


def test_paper_values() -> None:
    runs = {stage: load_config(ROOT / f"configs/{stage}.yaml") for stage in ("sft", "reflective", "grpo")}
    assert [run.optim.steps for run in runs.values()] == [720, 300, 500]
    for run in runs.values():
        assert (run.engine.micro_batch, run.engine.accumulation, run.engine.zero_stage) == (1, 4, 2)
        assert (run.trainable.lora_rank, run.trainable.lora_alpha, run.trainable.lora_dropout) == (8, 16.0, 0.05)
        assert (run.loss.bce, run.loss.dice) == (1.0, 1.0)
    assert runs["sft"].loss.distill == 1.0
    # Section 6.3: stage 2 is as stage 1 but for the distillation, so its mask decoder stays frozen.
    assert [run.trainable.mask_decoder for run in runs.values()] == [False, False, True]
    assert (runs["grpo"].grpo.group_size, runs["grpo"].grpo.beta, runs["grpo"].loss.ce) == (3, 0.0, 0.0)
    assert (runs["reflective"].reflective.reflective_count, runs["reflective"].reflective.standard_count) == (
        1505,
        3500,
    )


SUPERVISED = (1e-4, 100, 3600)
RATES = {"teacher": SUPERVISED, "sft": SUPERVISED, "reflective": SUPERVISED, "grpo": (1e-5, 30, 4000)}
"""Learning rate, warm-up and decay of the released trainer whose loss a stage has: train_ds_test.py:87, :315, :312
(cross entropy), train_ds.py:88, :342, :339 (GRPO)."""


@pytest.mark.parametrize("folder", ["", "lean/"])
@pytest.mark.parametrize("stage", RATES)
def test_each_stage_has_the_rate_of_its_released_trainer(stage: str, folder: str) -> None:
    optim = load_config(ROOT / f"configs/{folder}{stage}.yaml").optim
    assert (optim.lr, optim.warmup_steps, optim.decay_steps) == RATES[stage]


def test_every_field_is_documented() -> None:
    for path, info in FIELDS.items():
        assert info.description, path
        assert info.json_schema_extra["unit"], path
        kind = NUMBER_SOURCE if numbers_in(info.default) else SOURCE
        assert re.match(kind, info.json_schema_extra["source"]), path


def test_every_field_is_read_by_the_code() -> None:
    files = [p for room in ("utils", "dataset", "model") for p in (ROOT / room).rglob("*.py")]
    code = "\n".join(p.read_text(encoding="utf-8") for p in [*files, *ROOT.glob("*.py")])
    unused = [
        path
        for path in FIELDS
        if not re.search(rf"\.{path.rpartition('.')[2]}\b", code)
        and not ((module := LATER.get(path.split(".")[0])) and not (ROOT / module).exists())
    ]
    assert not unused


@pytest.mark.smoke
def test_all_problems_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml",
        "stage: sft\noptim: {lr: fast, warmup_steps: 900, betas: [0.9, 1.5]}\nloss: {distill: 1}\nmodle: {base: x}\n",
    )
    text = refusal(path, "engine.zero_stage=7", "trainable.mask_decoder=true", "nonsense", "optim.lora_rank=4")
    for expected in (
        "nonsense",
        "optim.lr = 'fast'",
        "optim.betas.1 = 1.5",
        "modle",
        "engine.zero_stage = 7",
        "optim.lora_rank = 4: unknown key. Remedy: write trainable.lora_rank",
        "data.cot + data.answer",
        "sft.teacher_checkpoint + loss.distill",
        "sft.freeze_mask_decoder + trainable.mask_decoder",
        "optim.warmup_steps + optim.steps = (900, 720)",
    ):
        assert expected in text, expected
    assert text.count("Remedy: ") == len(text.splitlines()) - 1


RULES = {
    "grpo starts from somewhere": ("grpo.yaml", "init_from=null", "init_from + stage"),
    "reflective starts from somewhere": ("reflective.yaml", "init_from=null", "init_from + stage"),
    "reflective needs records": ("reflective.yaml", "reflective.paths=[]", "reflective.paths + stage"),
    "reasoning needs records": ("sft.yaml", "data.cot=[]", "data.cot + data.answer"),
    "conclusions need records": ("teacher.yaml", "data.answer=conclusion", "data.cot + data.answer"),
    "the teacher's conclusions need records": (
        "sft.yaml",
        "sft.teacher_answer=conclusion data.answer=plain data.cot=[]",
        "data.cot + sft.teacher_answer",
    ),
    "the teacher does not reason": ("teacher.yaml", "data.answer=reasoning", "data.answer + stage"),
    "distillation needs a teacher": (
        "sft.yaml",
        "sft.teacher_checkpoint=null",
        "sft.teacher_checkpoint + loss.distill",
    ),
    "only sft distils": ("teacher.yaml", "loss.distill=1", "loss.distill + stage"),
    "an idle teacher": ("sft.yaml", "loss.distill=0 sft.freeze_mask_decoder=false sft.student_start=init_from",
                        "used for nothing"),
    "no teacher to start from": ("sft.yaml", "loss.distill=0 sft.freeze_mask_decoder=false sft.teacher_checkpoint=null",
                                 "sft.teacher_checkpoint + sft.student_start"),
    "two starts": ("sft.yaml", "init_from=x", "init_from + sft.student_start"),
    "frozen and trained": ("sft.yaml", "trainable.mask_decoder=true", "sft.freeze_mask_decoder"),
    "no cross entropy in grpo": ("grpo.yaml", "loss.ce=1", "loss.ce + stage"),
    "no loss": ("teacher.yaml", "loss.ce=0 loss.bce=0 loss.dice=0", "nothing would be learned"),
    "decoder without a loss": ("teacher.yaml", "loss.bce=0 loss.dice=0", "the mask decoder gets no gradient"),
    "adapters without a place": ("teacher.yaml", "trainable.lora_targets=[]", "adapters without a place"),
    "rows twice": ("teacher.yaml", "trainable.seg_rows_only=true", "trainable.seg_rows_only + trainable.full"),
    "nothing trained": (
        "teacher.yaml",
        "trainable.lora_rank=0 trainable.full=[] trainable.seg_head=false trainable.mask_decoder=false",
        "nothing is trained",
    ),
    "a rate for what stands still": (
        "sft.yaml",
        "optim.group_lr_scale={mask_decoder: 0.1}",
        "optim.group_lr_scale + trainable.mask_decoder",
    ),
    "endless warm-up": ("teacher.yaml", "optim.warmup_steps=1440", "optim.warmup_steps + optim.steps"),
    "a rate of 0 before the end": ("grpo.yaml", "optim.decay_steps=499", "optim.decay_steps + optim.steps"),
    "a decay within the warm-up": ("sft.yaml", "optim.decay_steps=100", "optim.decay_steps + optim.steps"),
    "offload without ZeRO": ("teacher.yaml", "engine.zero_stage=0 engine.offload=true", "engine.offload"),
    "float32 sums without ZeRO 2": (
        "teacher.yaml",
        "engine.zero_stage=1 engine.accumulate_in=fp32",
        "engine.accumulate_in + engine.zero_stage",
    ),
    "more frames decoded than read": (
        "teacher.yaml",
        "data.num_frames=4 model.decode_frames_per_step=5",
        "model.decode_frames_per_step + data.num_frames",
    ),
    "samples under ZeRO-3": ("teacher.yaml", "engine.zero_stage=3", "log.samples_every + engine.zero_stage"),
    "teacher under ZeRO-3": ("sft.yaml", "engine.zero_stage=3", "loss.distill + engine.zero_stage"),
    "checkpoint between rows": ("teacher.yaml", "log.every=7", "log.save_every + log.every"),
    "checkpoint between updates": ("grpo.yaml", "grpo.updates_per_batch=3", "log.save_every + grpo.updates_per_batch"),
    "narrow upper clip": ("grpo.yaml", "grpo.clip_eps_high=0.1", "grpo.clip_eps_high + grpo.clip_eps"),
    "no reward": ("grpo.yaml", "grpo.reward_weights={iou: 0}", "grpo.reward_weights"),
    "mask loss without weight": ("grpo.yaml", "loss.bce=0 loss.dice=0", "grpo.mask_loss_on"),
    "no mask loss but a trained decoder": ("grpo.yaml", "grpo.mask_loss_on=none", "grpo.mask_loss_on + trainable"),
    "nothing to evaluate": ("eval.yaml", "eval.checkpoint=null", "eval.checkpoint + stage"),
    "a broken regex": ("teacher.yaml", "trainable.full=['(']", "is not a regular expression"),
    "not a number": ("teacher.yaml", "optim.lr=.nan", "finite number"),
    "a string for a number": ("teacher.yaml", "optim.steps='10'", "valid integer"),
    "an unknown SAM": ("teacher.yaml", "model.sam_type=vit_x", "model.sam_type"),
}


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    file, overrides, expected = RULES[name]
    text = refusal(ROOT / "configs" / file, *re.split(r" (?=\w+\.\w+=)", overrides))
    assert expected in text and "Remedy: " in text


def test_overrides_are_yaml_and_floats_need_no_point() -> None:
    path = ROOT / "configs/teacher.yaml"
    config = load_config(
        path, ["optim.lr=2e-5", "eval.splits=[val]", "init_from=null", "optim.group_lr_scale={head: 2}"]
    )
    assert (config.optim.lr, config.eval.splits, config.init_from) == (2e-5, ("val",), None)
    assert config.optim.group_lr_scale == {"head": 2.0}
    assert load_config(path, ["optim.lr=1", "optim.lr=1E-3"]).optim.lr == 1e-3


def test_inherit_is_relative_and_knows_circles(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "base.yaml", "data: {answer: class, root: a}\noptim: {lr: 1e-3}\n")
    child = write(tmp_path / "deep/child.yaml", "inherit: ../base.yaml\nstage: teacher\ndata: {root: b}\n")
    config = load_config(child)
    assert (config.data.answer, config.data.root, config.optim.lr) == ("class", "b", 1e-3)
    write(tmp_path / "base.yaml", "inherit: deep/child.yaml\n")
    assert "remove the circle" in refusal(child)


HOSTILE = {
    "stage: !!python/object/apply:os.system [true]\n": "could not determine a constructor",
    "a: &x [1]\nb: *x\n": "aliases",
    "stage: sft\nstage: grpo\n": "keys written twice: stage",
    "- stage\n": "must be a mapping",
    "stage: [\n": "not readable",
    "\x00": "not readable",
    "a: " + "[" * 1200: "not readable",
}


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{text[:20]!r}" for text in HOSTILE])
def test_hostile_yaml(text: str, tmp_path: Path) -> None:
    assert HOSTILE[text] in refusal(write(tmp_path / "x.yaml", text))


def test_missing_file_and_missing_paths(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refusal(tmp_path / "nowhere.yaml")
    config = load_config(ROOT / "configs/sft.yaml", [f"model.base={tmp_path}", f"data.root={tmp_path}/none"])
    with pytest.raises(ConfigError) as caught:
        check_paths(config)
    text = str(caught.value)
    assert (
        "data.root" in text and "sft.teacher_checkpoint" in text and "data.cot.0" in text and "model.base" not in text
    )


def test_frozen_and_differences() -> None:
    ours = load_config(ROOT / "configs/teacher.yaml")
    with pytest.raises(ValueError, match="frozen"):
        ours.seed = 1
    theirs = load_config(
        ROOT / "configs/teacher.yaml", ["seed=3", "optim.steps=1500", "log.keep=9", "engine.threads=1"]
    )
    assert differences(ours, theirs) == ["seed: 3 -> 0"]


def test_help_is_complete_and_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "train_ds.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for path, info in FIELDS.items():
        assert re.search(
            rf"^  {re.escape(path)} = .*\[{re.escape(info.json_schema_extra['unit'])}\]", done.stdout, re.M
        ), path
        assert info.json_schema_extra["source"] in done.stdout
    # Processor time: the clock would measure what else the machine does.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize(
    ("command", "refusal"),
    [
        (["train_ds.py", "--config", "configs/eval.yaml"], "use train_ds_test.py"),
        (["train_ds_test.py", "eval.probes=none"], "unknown key"),
        (["train_ds.py", "--config", "configs/sft.yaml", "data.root=nowhere"], "data.root = 'nowhere'"),
    ],
)
def test_a_wrong_configuration_is_refused_before_torch_is_loaded(command: list[str], refusal: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = {command!r}\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as end:\n"
        "    sys.exit(10 * any(m in sys.modules for m in ('torch', 'numpy', 'transformers')) + end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and refusal in done.stderr and "Traceback" not in done.stderr, done.stderr
