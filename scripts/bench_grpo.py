"""Time the shared prompt of GRPO against G full copies, in one process, on a random Qwen2.

    python scripts/bench_grpo.py [--prompts 1341 2341] [--groups 3 8] [--threads 1 2] [--repeats 5] [--json FILE]
    python scripts/bench_grpo.py --prompts 1341 --groups 3 --threads 1 --repeats 3 --parts scoring     a short run

scoring   forward and backward of the answers' log-probabilities; plain: one batch of G copies of prompt + answer
sampling  C tokens for each of G answers; plain: transformers' generate(num_return_sequences=G) from the same embeddings
memory    peak resident memory of scoring beyond that of the loaded model, each path in a process of its own

Beside each scoring figure stands the limit set by token counts, G (P + C) / (P + G C). Loss and gradients
of the two are compared, and the samples at an equal seed, which warms both up; then they are timed in turns and medians
are printed.
The towers are no part of this: both paths would run them, ours once per clip.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.aurora.generation import generate  # noqa: E402 - the repository root must be on the path first
from model.aurora.group import shared_prompt_states  # noqa: E402
from model.objectives.policy import token_log_probs  # noqa: E402
from utils.types import MediaFeatures  # noqa: E402

PARTS = ("scoring", "sampling", "memory")


def build(arguments: argparse.Namespace) -> Qwen2ForCausalLM:
    """A random Qwen2 of the asked size: 8 heads, 2 of keys and values."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=arguments.vocabulary, hidden_size=arguments.width, intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers, num_attention_heads=8, num_key_value_heads=2,
        max_position_embeddings=8192, tie_word_embeddings=False, attn_implementation="sdpa",
    )  # fmt: skip
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    return Qwen2ForCausalLM(config).eval()


class Case:
    """Prompt [1,P,D] as embeddings and G answers [G,C] of random words."""

    def __init__(self, model: Qwen2ForCausalLM, prompt: int, group: int, new_tokens: int) -> None:
        self.model, self.group = model, group
        self.prompt = torch.randn(1, prompt, model.config.hidden_size) * 0.02
        self.answers = torch.randint(0, model.config.vocab_size, (group, new_tokens))
        self.weights = torch.randn(group, 1)

    def fast(self) -> Tensor:
        """Loss and gradients with the prompt shared; the last token of the prompt is read with the answers."""
        words = self.model.model.embed_tokens(self.answers[:, :-1])
        stream = torch.cat([self.prompt[:, -1:].expand(self.group, -1, -1), words], dim=1)
        known = torch.ones(1, self.prompt.shape[1] - 1, dtype=torch.bool)
        hidden = shared_prompt_states(self.model.model, self.prompt[:, :-1], known, stream, self.group)
        return self._finish(hidden)

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
            *(_WordsAlone(self.model, self.prompt), None, MediaFeatures(None, None), _NoStop(), self.answers.shape[1]),
            group=self.group,
            temperature=1.0,
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


class _NoStop:
    def convert_tokens_to_ids(self, tokens: str) -> int:
        return -1

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        return ""


class _WordsAlone(nn.Module):
    """As much of the joint model as sampling reads, with a prompt that is embedded already."""

    seg_token_id = -1

    def __init__(self, language_model: Qwen2ForCausalLM, prompt: Tensor) -> None:
        super().__init__()
        self.prompt = prompt
        self.backbone = nn.Module()
        self.backbone.language_model = language_model
        self.backbone.embed = lambda packed, media: prompt

    def pack(self, *_: Any, **__: Any) -> SimpleNamespace:
        return SimpleNamespace(attention_mask=torch.ones(self.prompt.shape[:2], dtype=torch.bool))


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


def measure(arguments: argparse.Namespace, prompt: int, group: int, threads: int) -> dict[str, Any]:
    """All parts of one case."""
    torch.set_num_threads(threads)
    case = Case(build(arguments), prompt, group, arguments.new_tokens)
    tokens = arguments.new_tokens
    row: dict[str, Any] = {"prompt": prompt, "group": group, "threads": threads, "new_tokens": tokens,
                           "clock": arguments.clock, "repeats": arguments.repeats,
                           "limit": group * (prompt + tokens) / (prompt + group * tokens)}  # fmt: skip
    if "scoring" in arguments.parts:
        loss, ours = case.fast(), case.gradients()
        plain_loss, plain = case.plain(), case.gradients()
        row["loss_apart"] = float((loss - plain_loss).abs() / plain_loss.abs())
        row["gradients_apart"] = float((ours - plain).norm() / plain.norm())
        row["scoring"] = timed({"fast": case.fast, "plain": case.plain}, arguments.repeats, arguments.clock)
    if "sampling" in arguments.parts:
        row["same_samples"] = bool(torch.equal(case.sample(), case.sample_plain()))
        paths = {"fast": case.sample, "plain": case.sample_plain}
        row["sampling"] = timed(paths, arguments.repeats, arguments.clock)
    if "memory" in arguments.parts:
        row["memory"] = {path: peak(arguments, prompt, group, path) for path in ("fast", "plain")}
    return row


def peak(arguments: argparse.Namespace, prompt: int, group: int, path: str) -> float:
    """MiB that one scoring pass needs beyond the loaded model, in a fresh process."""
    command = [sys.executable, __file__, "--child", path, "--prompts", str(prompt), "--groups", str(group)]
    for name in ("new_tokens", "width", "layers", "vocabulary"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def child(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    case = Case(build(arguments), arguments.prompts[0], arguments.groups[0], arguments.new_tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    getattr(case, arguments.child)()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def describe(row: dict[str, Any]) -> str:
    """One line per part."""
    lines = [f"P = {row['prompt']}, G = {row['group']}, C = {row['new_tokens']}, {row['threads']} thread(s)"]
    for name, unit in (("scoring", "s"), ("sampling", "s"), ("memory", "MiB")):
        if name in row:
            fast, plain = row[name]["fast"], row[name]["plain"]
            limit = f"   limit {row['limit']:.2f}x" if name == "scoring" else ""
            figures = f"fast {fast:8.2f} {unit}   plain {plain:8.2f} {unit}   {plain / fast:.2f}x"
            lines.append(f"  {name:<9} {figures}{limit}")
    if "scoring" in row:
        lines.append(f"  apart: loss {row['loss_apart']:.1e}, gradients {row['gradients_apart']:.1e} (relative)")
    if "sampling" in row:
        lines.append(f"  samples equal at an equal seed: {row['same_samples']}")
    return "\n".join(lines)


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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=("fast", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    rows = []
    for prompt in arguments.prompts:
        for group in arguments.groups:
            for threads in arguments.threads:
                rows.append(measure(arguments, prompt, group, threads))
                print(describe(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
