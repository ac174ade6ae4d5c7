"""What prompts SAM besides [SEG]: learnable tokens and a text encoder, from layout to training and evaluation."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import train_ds_test
from configs.schema import ModelConfig, TrainableConfig
from dataset.prompt import build_prompts, load_tokenizer
from model.aurora.ablations import LearnableQueryAurora, TextEncoderAurora, load_text_encoder
from model.aurora.inference import predict
from model.aurora.model import AuroraModel
from model.aurora.trainable import apply_trainable, component_counts
from model.aurora.trained import load_trained, save_trained
from model.backbones.videollama2.weights import load_backbone
from tests.aurora_cases import BASE, SEG, StubTokenizer, stir, three_clips, tiny_batch, tiny_sample, tiny_segmenter
from tests.data_builders import write_tokenizer
from tests.tiny_run import ROOT, environment, make_tiny_run, metrics, train
from utils.config import load_config
from utils.errors import ConfigError, DataError, WeightsError
from utils.types import IGNORE

HEADS = TrainableConfig(lora_rank=0, lora_targets=(), full=())
WHOLE = TrainableConfig(lora_rank=0, lora_targets=(), full=(r"language_model\.",))


def queried(count: int = 2, trainable: TrainableConfig | None = None, seed: int = 0) -> AuroraModel:
    backbone, _ = load_backbone(BASE)
    torch.manual_seed(seed)
    model = LearnableQueryAurora(backbone, tiny_segmenter(seed), SEG, count=count)
    if trainable is not None:
        apply_trainable(model, trainable)
    return model


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text model of two narrow layers and a tokenizer of a few words."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, projection_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=58, eos_token_id=59, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "do", "dog</w>", "th", "the</w>"]
    vocabulary = {word: i for i, word in enumerate([*words, "<pad>", "!", "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nd o\ndo g</w>\nt h\nth e</w>\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder


def with_references(*references: list[int]) -> object:
    """Clips whose prompts are ids of references."""
    samples = [tiny_sample(i, prompt_length=3) for i in range(len(references))]
    changed = [type(s)(**{**vars(s), "prompt_ids": torch.tensor(r)}) for s, r in zip(samples, references, strict=True)]
    return tiny_batch(*changed)


def test_learnable_tokens_stand_behind_each_answer() -> None:
    model, batch = queried(3).eval(), three_clips()
    packed = model.pack(batch, batch.answers)
    assert packed.has_seg.all()  # an answer without [SEG] asks for a mask too
    for row, answer in enumerate(batch.answers):
        last = int(packed.seg_positions[row])
        assert packed.attention_mask[row].sum() == last + 1
        assert packed.token_ids[row, last - 2 - len(answer) : last - 2].equal(answer)
        assert (packed.labels[row] != IGNORE).sum() == len(answer) and (packed.labels[row, last - 2 :] == IGNORE).all()
    with torch.no_grad():
        embedded = model.backbone.embed(packed, model.encode(batch))
        hidden = model.hidden_states(packed, model.encode(batch))
        for row in range(3):  # the naive way: one row, its embeddings with the tokens put in by hand
            end = int(packed.seg_positions[row]) + 1
            inputs = torch.cat([embedded[row, : end - 3], model.prompter["queries"].weight])[None]
            states = model.backbone.language_model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[0]
            expected = torch.stack([model.project(states[i]) for i in range(end - 3, end)]).mean(0)
            torch.testing.assert_close(model.seg_features(hidden, packed)[row], expected, rtol=1e-4, atol=1e-5)


def test_words_before_learnable_tokens_are_as_without_them() -> None:
    model, batch = queried().eval(), three_clips()
    plain = AuroraModel(model.backbone, model.segmenter, SEG).eval()
    with torch.no_grad():
        ours, theirs = (m(m.pack(batch, batch.answers), m.encode(batch)) for m in (model, plain))
    torch.testing.assert_close(ours.answer_logits, theirs.answer_logits, rtol=1e-4, atol=1e-5)
    assert ours.answer_labels.equal(theirs.answer_labels)


def test_learnable_tokens_learn_are_counted_and_come_back(tmp_path: Path) -> None:
    model, batch = queried(2, WHOLE).train(), three_clips()
    output = model(model.pack(batch, batch.answers), model.encode(batch))
    (F.cross_entropy(output.answer_logits, output.answer_labels) + output.mask_logits.square().mean()).backward()
    assert model.prompter["queries"].weight.grad.abs().min() > 0
    counts = {c.name: c for c in component_counts(model)}
    assert counts["prompter"].trainable == model.prompter["queries"].weight.numel()
    stir(model, 1)
    save_trained(model, tmp_path)
    # A training of the words alone keeps them frozen, and hands them on.
    words = queried(2, WHOLE.model_copy(update={"seg_head": False, "mask_decoder": False}), seed=5)
    load_trained(words, tmp_path)
    assert not words.prompter["queries"].weight.requires_grad and words.is_frozen("prompter")
    save_trained(words, tmp_path / "second")
    third = queried(2, WHOLE, seed=6)
    load_trained(third, tmp_path / "second")
    assert third.prompter["queries"].weight.equal(model.prompter["queries"].weight)
    with pytest.raises(WeightsError, match="prompter.queries"):
        load_trained(queried(3, WHOLE), tmp_path)


def test_generation_goes_on_to_the_learnable_tokens() -> None:
    model, batch = queried(2), three_clips()
    found = predict(model, batch, StubTokenizer(), 4)
    assert all(p.has_seg for p in found) and all(p.text for p in found)
    with torch.no_grad():
        model.eval()
        answers = [torch.tensor([SEG if w == "[SEG]" else int(w[1:]) for w in p.text.split()]) for p in found]
        assert all(len(a) == 4 for a in answers)  # untrained: nothing stops, so the texts hold every token
        low = model(model.pack(batch, answers), model.encode(batch)).mask_logits
    for i, prediction in enumerate(found):
        size = tuple(batch.masks[i].shape[-2:])
        expected = model.segmenter.upscale(low[i], batch.sam_sizes[i], size)
        torch.testing.assert_close(prediction.mask_logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["clip", "base"])
def test_a_text_encoder_reads_the_reference_alone(kind: str, clip_folder: Path) -> None:
    encoder = load_text_encoder(str(clip_folder), torch.float32) if kind == "clip" else None
    backbone, _ = load_backbone(BASE)
    model = TextEncoderAurora(backbone, tiny_segmenter(), SEG, encoder=encoder)
    apply_trainable(model, HEADS)
    references = [[58, 3, 4, 59], [58, 9, 10, 11, 12, 59], [58, 2, 59]]
    batch = with_references(*references)
    media = model.encode(batch)
    assert media.video is None and media.audio is None and media.image_embeddings is not None
    output = model.train()(model.pack(batch, batch.answers), media)
    assert len(output.seg_features) == 3 and output.answer_logits is None and not len(output.answer_labels)
    for i, ids in enumerate(references):  # one by one, without padding
        alone = torch.tensor([ids])
        if encoder is None:
            state = backbone.language_model.model(input_ids=alone, use_cache=False).last_hidden_state[0, -1]
        else:
            state = encoder(input_ids=alone).text_embeds[0]  # CLIP's own pooling
        torch.testing.assert_close(output.seg_features[i], model.project(state), rtol=1e-4, atol=1e-5)
    output.mask_logits.square().mean().backward()
    assert model.text_hidden_fcs[0][0].weight.grad.any()
    assert all(p.grad is None for n, p in model.named_parameters() if n.startswith(("backbone", "prompter")))
    found = predict(model, batch, StubTokenizer(), 4)
    assert [(p.text, p.class_name, p.has_seg) for p in found] == [("", None, True)] * 3
    with pytest.raises(ValueError, match="reference alone"):
        model.pack(three_clips(), None)


def test_prompts_of_each_kind(clip_folder: Path, tmp_path: Path) -> None:
    tokenizer, seg = load_tokenizer(write_tokenizer(tmp_path))
    chain = "In the video a man. So the target is the cello."
    kept = build_prompts(ModelConfig(prompter="learnable_tokens"), tokenizer, seg)
    assert kept.prompt_ids("the cello").equal(build_prompts(ModelConfig(), tokenizer, seg).prompt_ids("the cello"))
    texts = [kept.answer_text(kind, "cello", chain) for kind in ("reasoning", "conclusion", "class", "plain")]
    assert texts == [chain, chain, "It is cello.", ""]
    ids = kept.answer_ids("reasoning", "cello", chain)
    assert seg not in ids and tokenizer.decode(ids) == f"{chain}<|im_end|>"
    own = build_prompts(ModelConfig(prompter="text_encoder"), tokenizer, seg)
    assert tokenizer.decode(own.prompt_ids("the [SEG] cello")) == "the [SEG] cello"
    assert seg not in own.prompt_ids("the [SEG] cello")
    clip = build_prompts(ModelConfig(prompter="text_encoder", text_encoder=str(clip_folder)), tokenizer, seg)
    assert clip.prompt_ids("The dog").tolist() == [58, 55, 53, 59]
    assert len(clip.prompt_ids("dog " * 100)) == 77 and clip.prompt_ids("dog " * 100)[-1] == 59
    with pytest.raises(DataError, match="CLIP tokenizer"):
        build_prompts(ModelConfig(prompter="text_encoder", text_encoder=str(tmp_path / "none")), tokenizer, seg)
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_text_encoder(str(tmp_path), torch.float32)


QUERIES = (
    "model.prompter=learnable_tokens loss.distill=0 sft.teacher_checkpoint=null sft.freeze_mask_decoder=false "
    "sft.student_start=init_from trainable.mask_decoder=true"
)
TEXT = QUERIES.replace("learnable_tokens", "text_encoder") + " loss.ce=0 data.answer=plain"
RULES = {
    "GRPO writes [SEG]": ("grpo.yaml", "model.prompter=learnable_tokens", "model.prompter + stage"),
    "reflective paths hold [SEG]": ("reflective.yaml", "model.prompter=learnable_tokens", "model.prompter + stage"),
    "distillation at [SEG]": ("sft.yaml", "model.prompter=learnable_tokens", "model.prompter + loss.distill"),
    "rows of no token": ("sft.yaml", f"{QUERIES} trainable.full=[] trainable.seg_rows_only=true", "seg_rows_only"),
    "an idle encoder": ("sft.yaml", "model.text_encoder=x", "model.text_encoder + model.prompter"),
    "idle tokens": ("sft.yaml", "model.learnable_tokens=4", "model.learnable_tokens + model.prompter"),
    "tokens without a loss": (
        "sft.yaml", f"{QUERIES} loss.bce=0 loss.dice=0 trainable.mask_decoder=false", "trainable.seg_head + loss.bce"
    ),
    "a wordless answer": ("sft.yaml", f"{TEXT} data.answer=class", "model.prompter + data.answer"),
    "wordless cross entropy": ("sft.yaml", f"{TEXT} loss.ce=1", "model.prompter + loss.ce"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rule(name: str) -> None:
    file, overrides, expected = RULES[name]
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "configs" / file, re.split(r" (?=\w+\.\w+=)", overrides))
    assert expected in str(caught.value) and "Remedy: " in str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


def test_both_are_trained_and_evaluated_by_the_common_commands(tiny: Path, tmp_path: Path) -> None:
    common = ("stage=sft", "sft.student_start=init_from", "sft.freeze_mask_decoder=false", "optim.steps=2",
              "log.every=1")  # fmt: skip
    text = ("model.prompter=text_encoder", "loss.ce=0", "data.answer=plain",
            "trainable.lora_rank=0", "trainable.full=[]")  # fmt: skip
    queries = ("model.prompter=learnable_tokens", "model.learnable_tokens=2", "data.answer=reasoning",
               f"data.cot=[{tiny.parent}/cot.jsonl]")  # fmt: skip
    for name, own in (("text", text), ("queries", queries)):
        run = tmp_path / name
        done = train(tiny, *common, *own, f"output_dir={run}")
        assert done.returncode == 0, done.stderr
        rows = metrics(run)
        assert rows[-1]["mask_loss"] > 0 and (rows[-1]["ce_loss"] > 0) == (name == "queries")
    words = ("loss.bce=0", "loss.dice=0", "trainable.mask_decoder=false", "trainable.seg_head=false")
    done = train(tiny, *common, *queries, *words, f"init_from={tmp_path}/queries", f"output_dir={tmp_path}/then")
    assert done.returncode == 0, done.stderr
    for name in ("text", "then"):
        settings = ("stage=eval", f"eval.checkpoint={tmp_path}/{name}", f"eval.output_dir={tmp_path}/eval_{name}",
                    "eval.splits=[train]", "eval.max_new_tokens=3", "eval.pictures=0")  # fmt: skip
        done = subprocess.run(
            [sys.executable, train_ds_test.__file__, "--config", str(tiny), *settings],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        scores = json.loads((tmp_path / f"eval_{name}/train/metrics.json").read_text())
        assert scores["scores"]["failed"] == [] and scores["config"]["model"]["prompter"].startswith(
            {"text": "text", "then": "learn"}[name]
        )
