"""Time the shared prompt of GRPO against G full copies, in one process, on a random Qwen2.

    python scripts/dev/bench_grpo.py [--prompts 1341 2341] [--groups 3 8] [--threads 1 2] [--repeats 5] [--json FILE]
    python scripts/dev/bench_grpo.py --prompts 1341 --groups 3 --threads 1 --repeats 3 --parts scoring     a short run

scoring   forward and backward of the answers' log-probabilities; plain: one batch of G copies of prompt + answer
sampling  C tokens for each of G answers; plain: transformers' generate(num_return_sequences=G) from the same embeddings
step      a whole step with towers and SAM of the mini base: encoding, sampling, rewards with masks, scoring with mask
          losses forward and backward, AdamW; plain: every part once per answer (tests.oracles.plain_grpo)
memory    peak resident memory of scoring beyond that of the loaded model, each path in a process of its own

Beside scoring stand the limit of token counts, G (P + C) / (P + G C), and the package prefix-grouper, if it is there.
Loss and gradients are compared, and the samples at an equal seed, which warms all up; then they are timed in turns and
medians are printed. On a busy machine, --clock cpu with one thread counts processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM

try:
    import prefix_grouper  # a peer, for this comparison alone: pip install --no-deps prefix-grouper
except ImportError:
    prefix_grouper = None

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from model.aurora.generation import generate  # noqa: E402 - the repository root must be on the path first
from model.aurora.sampling import Sampling  # noqa: E402
from model.aurora.shared_prompt import ATTENTION, score_answers  # noqa: E402
from model.objectives.policy import token_log_probs  # noqa: E402
from model.stages.grpo import GrpoStage  # noqa: E402
from scripts.dev.random_run import BenchTokenizer, random_batch, random_model  # noqa: E402
from scripts.plan_memory import Workload  # noqa: E402
from tests.oracles.plain_grpo import PlainGrpoStage  # noqa: E402
from utils.config import load_config  # noqa: E402
from utils.types import Batch, Generation, MediaFeatures  # noqa: E402

WANTED = {"scoring": None, "sampling": {3: 1.4, 8: 2.0}, "step": 1.8, "memory": 1.0}
"""Part -> wanted ratio of plain to fast: a number, one by group size, or None for the limit of token counts."""
UNITS = {"scoring": "s", "sampling": "s", "step": "s", "memory": "MiB"}


def sizes(arguments: argparse.Namespace) -> dict[str, int]:
    """Fields of the language model's configuration: 8 heads, 2 of keys and values."""
    return {"vocab_size": arguments.vocabulary, "hidden_size": arguments.width,
            "intermediate_size": 4 * arguments.width, "num_hidden_layers": arguments.layers, "num_attention_heads": 8,
            "num_key_value_heads": 2, "max_position_embeddings": 8192}  # fmt: skip


def build(arguments: argparse.Namespace) -> Qwen2ForCausalLM:
    """A random Qwen2 of the asked size."""
    torch.manual_seed(0)
    config = Qwen2Config(**sizes(arguments), tie_word_embeddings=False, attn_implementation=ATTENTION)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return Qwen2ForCausalLM(config).eval()


class Case:
    """Prompt [1,P,D] as embeddings and G answers [G,C] of random words."""

    def __init__(self, model: Qwen2ForCausalLM, prompt: int, group: int, new_tokens: int) -> None:
        self.model, self.group = model, group
        self.last = torch.zeros(1, dtype=torch.long)
        """The prompt's last token, which is text."""
        self.prompt = torch.randn(1, prompt, model.config.hidden_size) * 0.02
        self.prompt[:, -1] = model.model.embed_tokens(self.last).detach()
        self.answers = torch.randint(0, model.config.vocab_size, (group, new_tokens))
        self.weights = torch.randn(group, 1)

    def fast(self) -> Tensor:
        """Loss and gradients with the prompt shared; the last token of the prompt is read with the answers."""
        words = self.model.model.embed_tokens(self.answers[:, :-1])
        stream = torch.cat([self.prompt[:, -1:].expand(self.group, -1, -1), words], dim=1)
        known = torch.ones(1, self.prompt.shape[1] - 1, dtype=torch.bool)
        hidden = score_answers(self.model.model, self.prompt[:, :-1], known, stream, self.group)
        return self._finish(hidden)

    def prefix_grouper(self) -> Tensor:
        """The same by the package prefix-grouper, which packs prompt and answers in one row likewise."""
        words = self.model.model.embed_tokens(self.answers[:, :-1]).flatten(0, 1)[None]
        prompt, length = self.prompt.shape[1], self.answers.shape[1] - 1
        grouper = prefix_grouper.PrefixGrouper([[prompt] + [length] * self.group])
        behind = torch.arange(prompt, prompt + length).repeat(self.group)
        self.model.set_attn_implementation("prefix_grouper")
        hidden = self.model.model(
            inputs_embeds=torch.cat([self.prompt, words], 1),
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),  # 4-D: handed down, and not read
            position_ids=torch.cat([torch.arange(prompt), behind])[None],
            use_cache=False,
            grouper=grouper,
        ).last_hidden_state
        self.model.set_attn_implementation(ATTENTION)
        last = hidden[:, prompt - 1 : prompt].expand(self.group, -1, -1)
        return self._finish(torch.cat([last, hidden[0, prompt:].unflatten(0, (self.group, length))], 1))

    def plain(self) -> Tensor:
        """The same from G copies."""
        words = self.model.model.embed_tokens(self.answers[:, :-1])
        rows = torch.cat([self.prompt.expand(self.group, -1, -1), words], dim=1)
        hidden = self.model.model(inputs_embeds=rows, use_cache=False).last_hidden_state
        return self._finish(hidden[:, self.prompt.shape[1] - 1 :])

    def _finish(self, hidden: Tensor) -> Tensor:
        self.model.zero_grad()
        scores, _ = token_log_probs(self.model.lm_head, hidden.flatten(0, 1), self.answers.flatten())
        loss = (scores.view(self.answers.shape) * self.weights).mean()
        loss.backward()
        return loss.detach()

    def gradients(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])

    def sample(self, seed: int = 0) -> Tensor:
        """[G,C] drawn by the project's own loop."""
        torch.manual_seed(seed)
        drawn = generate(
            _WordsAlone(self.model, self.prompt[:, :-1]),
            SimpleNamespace(prompts=[self.last]),
            MediaFeatures(None, None),
            _NoStop(),
            self.answers.shape[1],
            group=self.group,
            sampling=Sampling(1.0),
        )
        return torch.stack(drawn.token_ids)

    def sample_plain(self, seed: int = 0) -> Tensor:
        """[G,C] drawn by transformers."""
        torch.manual_seed(seed)
        mask = torch.ones(self.prompt.shape[:2], dtype=torch.long)
        return self.model.generate(
            inputs_embeds=self.prompt, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=self.answers.shape[1], num_return_sequences=self.group, pad_token_id=0,
        )  # fmt: skip


def prefix_grouper_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, grouper: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """The package's layout, with torch's attention on a CPU (it is written for FlashAttention's)."""

    def attend(query: Tensor, key: Tensor, value: Tensor, _: Tensor) -> Tensor:
        new, total = query.shape[2], key.shape[2]
        # No row is padded here, so the causal mask is all that there is.
        seen = None if new == total else _seen(new, total)
        found = scaled_dot_product_attention(
            query, key, value, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=True
        )
        return found.transpose(1, 2)

    return grouper.forward(attend, query, key, value), None


@cache
def _seen(new: int, total: int) -> Tensor:
    """bool [new,total]: the last `new` of `total` positions see themselves and all before them."""
    return torch.ones(new, total, dtype=torch.bool).tril(total - new)


class _EndsInSeg:
    """Random weights write no [SEG]; each answer gets one in the place of its last token, so that masks are trained."""

    def draw(self, batch: Batch) -> tuple[MediaFeatures, Generation]:
        media, answers = super().draw(batch)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(len(answers.token_ids), self.model.text_hidden_fcs[0][0].in_features, generator=generator)
        for row in answers.token_ids:
            row[-1] = self.model.seg_token_id
        everyone = torch.arange(len(states))
        return media, replace(answers, seg_hidden=states, answer_of_query=everyone, log_probs=None)


class _FastStage(_EndsInSeg, GrpoStage):
    """The project's stage."""


class _PlainStage(_EndsInSeg, PlainGrpoStage):
    """G full copies."""


class StepCase:
    """A clip of 10 frames and 10 s of sound through towers and SAM of the mini base and a language model of its own.

    Args:
        folder: gets the config.json of the base.
        language: fields of the language model's configuration.
        prompt: P, tokens of the prompt, media included.
        group: G.
        new_tokens: C, tokens of each answer.
    """

    def __init__(self, folder: Path, language: dict[str, int], prompt: int, group: int, new_tokens: int) -> None:
        mini = json.loads((ROOT / "assets/mini_base/config.json").read_text(encoding="utf-8"))
        text = json.dumps({**mini, **language, "hidden_size_a": language["hidden_size"]})
        (folder / "config.json").write_text(text, encoding="utf-8")
        config = load_config(ROOT / "configs/mini/grpo.yaml", [
            f"model.base={folder}", "engine.micro_batch=1", "data.feature_cache=none", "grpo.temperature=1.0",
            "grpo.top_p=1.0", "grpo.mask_loss_on=all", f"grpo.group_size={group}", f"grpo.max_new_tokens={new_tokens}",
        ])  # fmt: skip
        torch.manual_seed(0)
        model = random_model(config, torch.device("cpu"))
        work = Workload(1, group, 10, (96, 96), 10.0, 40, new_tokens)
        short = model.pack(random_batch(model, work), None).attention_mask.sum().item()
        if prompt <= short:
            raise ValueError(f"a prompt of {prompt} tokens: its media and the least of text have {short}")
        self.batch = random_batch(model, replace(work, prompt_tokens=work.prompt_tokens + prompt - short))
        tokenizer = BenchTokenizer(model.seg_token_id)
        tokenizer.ids["<|im_end|>"] = 2**31  # none of the vocabulary: no answer ends before its time
        self.stages = {"fast": _FastStage(config, model, tokenizer), "plain": _PlainStage(config, model, tokenizer)}
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def run(self, path: str) -> Tensor:
        """Sample, judge, score, backward and step; at a learning rate of 0, so that every step is the same."""
        torch.manual_seed(0)
        self.optimizer.zero_grad()
        stage = self.stages[path]
        loss = stage.loss(stage.prepare(self.batch)).total
        loss.backward()
        self.optimizer.step()
        return loss.detach()


class _NoStop:
    def convert_tokens_to_ids(self, tokens: str) -> int:
        return -1

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        return ""


class _WordsAlone(nn.Module):
    """As much of the joint model as sampling reads, with a prompt that is embedded already."""

    seg_token_id, device = -1, torch.device("cpu")

    def __init__(self, language_model: Qwen2ForCausalLM, prompt: Tensor) -> None:
        super().__init__()
        self.prompt = prompt
        self.backbone = nn.Module()
        self.backbone.decoder, self.backbone.lm_head = language_model.model, language_model.lm_head
        self.backbone.words = language_model.get_input_embeddings()

    def pack_without_last_token(self, batch: Any) -> SimpleNamespace:
        length = self.prompt.shape[1]
        mask = torch.ones(1, length, dtype=torch.bool)
        return SimpleNamespace(attention_mask=mask, position_ids=torch.arange(length)[None])

    def embed(self, packed: Any, media: Any) -> Tensor:
        return self.prompt


def timed(paths: dict[str, Callable[[], Tensor]], repeats: int, clock: str) -> dict[str, float]:
    """Median seconds of each path, both warm already; taken in turns, so that a busy machine is fair to both."""
    now = time.perf_counter if clock == "wall" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, path in paths.items():
            start = now()
            path()
            seconds[name].append(now() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(arguments: argparse.Namespace, prompt: int, group: int, threads: int) -> Iterator[dict[str, Any]]:
    """One case, part by part: the same row with one more part each time."""
    torch.set_num_threads(threads)
    case = Case(build(arguments), prompt, group, arguments.new_tokens)
    tokens, repeats, clock = arguments.new_tokens, arguments.repeats, arguments.clock
    row: dict[str, Any] = {"prompt": prompt, "group": group, "threads": threads, "new_tokens": tokens,
                           "clock": clock, "repeats": repeats,
                           "limit": group * (prompt + tokens) / (prompt + group * tokens)}  # fmt: skip
    if "scoring" in arguments.parts:
        loss, ours = case.fast(), case.gradients()
        plain_loss, plain = case.plain(), case.gradients()
        row["loss_apart"] = float((loss - plain_loss).abs() / plain_loss.abs())
        row["gradients_apart"] = float((ours - plain).norm() / plain.norm())
        del ours, plain
        paths = {"fast": case.fast, "plain": case.plain}
        if prefix_grouper is not None:
            AttentionInterface.register("prefix_grouper", prefix_grouper_attention)
            row["peer_apart"] = float((case.prefix_grouper() - plain_loss).abs() / plain_loss.abs())
            paths["peer"] = case.prefix_grouper
        row["scoring"] = timed(paths, repeats, clock)
        yield row
    if "sampling" in arguments.parts:
        row["same_samples"] = bool(torch.equal(case.sample(), case.sample_plain()))
        row["sampling"] = timed({"fast": case.sample, "plain": case.sample_plain}, repeats, clock)
        yield row
    if "step" in arguments.parts:
        del case
        with tempfile.TemporaryDirectory() as folder:
            step = StepCase(Path(folder), sizes(arguments), prompt, group, tokens)
            paths = {path: partial(step.run, path) for path in step.stages}
            fast, plain = float(step.run("fast")), float(step.run("plain"))
            row["step_loss_apart"] = abs(fast - plain) / abs(plain)
            row["step"] = timed(paths, repeats, clock)
        yield row
    if "memory" in arguments.parts:
        row["memory"] = {path: peak(arguments, prompt, group, path) for path in ("fast", "plain")}
        yield row


def peak(arguments: argparse.Namespace, prompt: int, group: int, path: str) -> float:
    """MiB that one scoring pass needs beyond the loaded model, in a fresh process."""
    command = [sys.executable, __file__, "--child", path, "--prompts", str(prompt), "--groups", str(group)]
    for name in ("new_tokens", "width", "layers", "vocabulary"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def child(arguments: argparse.Namespace) -> None:
    """Print the MiB that one pass adds to the peak of this process."""
    torch.set_num_threads(1)
    case = Case(build(arguments), arguments.prompts[0], arguments.groups[0], arguments.new_tokens)
    before = peak_resident()
    getattr(case, arguments.child)()
    print(peak_resident() - before)


def peak_resident() -> float:
    """Largest resident memory of this process so far, MiB (Linux; getrusage would count that of the parent too)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def describe(row: dict[str, Any]) -> str:
    """What the newest part of a row says."""
    name = [name for name in UNITS if name in row][-1]
    case = f"P = {row['prompt']}, G = {row['group']}, C = {row['new_tokens']}, {row['threads']} thread(s)"
    fast, plain, unit = row[name]["fast"], row[name]["plain"], UNITS[name]
    text = f"{case}  {name:<9} fast {fast:8.2f} {unit}   plain {plain:8.2f} {unit}   {plain / fast:.2f}x"
    if name == "scoring":
        apart = f"loss {row['loss_apart']:.1e}, gradients {row['gradients_apart']:.1e} relative"
        if "peer" in row["scoring"]:
            text += f"   prefix-grouper {plain / row['scoring']['peer']:.2f}x"
        return f"{text}   limit {row['limit']:.2f}x   apart: {apart}"
    wanted = WANTED[name].get(row["group"]) if isinstance(WANTED[name], dict) else WANTED[name]
    if wanted is not None:
        text += f"   wanted {wanted:.1f}x"
    if name == "sampling":
        text += f"   samples equal at an equal seed: {row['same_samples']}"
    if name == "step":
        text += f"   losses apart: {row['step_loss_apart']:.1e} relative"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1341, 2341])
    parser.add_argument("--groups", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--new-tokens", type=int, default=150)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for one thread on a busy machine"
    )
    parser.add_argument("--parts", nargs="+", choices=UNITS, default=list(UNITS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("fast", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    cases = [(p, g, t) for p in arguments.prompts for g in arguments.groups for t in arguments.threads]
    rows: dict[tuple[int, int, int], dict[str, Any]] = {}
    for case in cases:
        for row in measure(arguments, *case):
            rows[case] = row
            print(describe(row), flush=True)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
