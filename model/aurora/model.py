"""The joint model: words, video and sound in; answer logits, [SEG] features and masks out.

What a missing [SEG] means is said here and nowhere else. An answer without [SEG] asks for no mask: its `has_seg` is
False, its [SEG] feature is zero and carries no gradient, and its mask logits are `EMPTY_LOGIT` everywhere. So it gets
no mask loss and no distillation, and at evaluation the J of an empty mask. (The published stages differ: SFT stops
at such a batch, LISA_sft_distill.py:403-438; GRPO decodes the second-to-last position and trains that mask,
LISA_grpo.py:499-505; evaluation appends "It is [SEG].", see `model.aurora.inference`.)

The [SEG] feature is text_hidden_fcs[0] of the final-norm hidden state AT the last [SEG] of the answer, in every stage
and at inference (published code LISA_sft_distill.py:326-327; LISA_grpo.py:496-498 reads one position earlier).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from configs.schema import ModelConfig, TrainableConfig
from model.aurora.features import FeatureCache
from model.aurora.prompter import Prompter
from model.aurora.sampling import GenerationDefaults
from model.aurora.shared_prompt import ATTENTION, score_answers
from model.backbones.videollama2.backbone import VideoLlama2
from model.backbones.videollama2.splice import splice
from model.objectives.policy import token_log_probs
from model.segmenters.sam import Segmenter
from utils.guards import check_logits
from utils.types import IGNORE, AuroraOutput, Batch, GroupInputs, GroupOutput, MediaFeatures, PackedInputs

EMPTY_LOGIT = -100.0
"""Mask logit of an answer without [SEG]: a probability of 0 in float32, exact in bfloat16."""

COMPONENTS = (
    "backbone.vision_tower",
    "backbone.mm_projector",
    "backbone.audio_tower",
    "backbone.mm_projector_a",
    "backbone.language_model",
    "segmenter.sam.image_encoder",
    "segmenter.sam.prompt_encoder",
    "segmenter.sam.mask_decoder",
    "text_hidden_fcs",
)
"""The parts whose names begin every parameter of the model; each is frozen or trained by itself."""


class AuroraModel(nn.Module):
    """VideoLLaMA2, SAM, and the projection between them.

    Args:
        backbone: towers and language model.
        segmenter: SAM.
        seg_token_id: id of [SEG].
        feature_cache: where features of frozen towers are kept; None = nowhere.
        prompter: what prompts SAM; None = the [SEG] token.

    Raises:
        ValueError: the embedding matrix has no row for [SEG].
    """

    def __init__(
        self,
        backbone: VideoLlama2,
        segmenter: Segmenter,
        seg_token_id: int,
        feature_cache: FeatureCache | None = None,
        prompter: Prompter | None = None,
    ) -> None:
        super().__init__()
        rows, width = backbone.language_model.get_input_embeddings().weight.shape
        if not 0 <= seg_token_id < rows:
            raise ValueError(f"[SEG] has id {seg_token_id}, but the embedding matrix has {rows} rows")
        backbone.language_model.set_attn_implementation(ATTENTION)
        self.backbone = backbone
        self.segmenter = segmenter
        self.seg_token_id = seg_token_id
        self.feature_cache = FeatureCache("none") if feature_cache is None else feature_cache
        self.prompter = Prompter() if prompter is None else prompter
        width = self.prompter.width or width
        # One entry of a list, as checkpoints of LISA and AURORA name it (published code LISA_sft_distill.py:94-100).
        projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, segmenter.prompt_width), nn.Dropout(0.0)
        )
        self.text_hidden_fcs = nn.ModuleList([projection])
        self.trainable_config: TrainableConfig | None = None
        """What is trained, once `apply_trainable` has chosen it."""
        self.loaded_names: frozenset[str] = frozenset()
        """Parameters that came from a light checkpoint of an earlier stage, and so differ from the base."""
        self.generation_defaults = GenerationDefaults()
        """What the base's generation_config.json says of drawing words; for a model put together by hand, nothing."""
        self.origin: ModelConfig | None = None
        """Where base and SAM came from, for exports; None for a model that was put together by hand."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> AuroraModel:
        """The model of an export, in eval mode; see `model.aurora.export.from_pretrained` for the options."""
        from model.aurora.export import from_pretrained  # imported late: it builds on this class
        return from_pretrained(folder, **options)

    def save_pretrained(self, folder: str | Path, merge: bool = True) -> Path:
        """Write a folder that `from_pretrained` reads; see `model.aurora.export.save_pretrained`."""
        from model.aurora.export import save_pretrained  # imported late: it builds on this class

        return save_pretrained(self, folder, merge)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def components(self) -> tuple[str, ...]:
        """`COMPONENTS`, and the prompter where it has parameters of its own."""
        return COMPONENTS if next(self.prompter.parameters(), None) is None else (*COMPONENTS, "prompter")

    def train(self, mode: bool = True) -> AuroraModel:
        """As `nn.Module.train`, but a component without trainable parameters stays in eval mode."""
        super().train(mode)
        for name in self.components:
            if self.is_frozen(name):
                self.get_submodule(name).eval()
        return self

    def is_frozen(self, *components: str) -> bool:
        """Whether none of the named components has a trainable parameter."""
        return not any(p.requires_grad for name in components for p in self.get_submodule(name).parameters())

    def pack(
        self,
        batch: Batch,
        answers: Sequence[Tensor] | None,
        prompts: Sequence[Tensor] | None = None,
        padding_side: Literal["right", "left"] = "right",
    ) -> PackedInputs:
        """Lay out prompts and answers with the media positions of `batch`; runs no weight.

        Args:
            batch: gives the token counts of video and sound.
            answers: one per prompt, int64 [L] each, or None for generation.
            prompts: the rows; None = `batch.prompts`. Give them to repeat a clip's prompt, or to leave clips out.
            padding_side: "left" for a generation prefill.

        Returns:
            PackedInputs on the model's device.
        """
        config = self.backbone.config
        video, audio = config.video_tokens(batch.pixel_values.shape[1]), config.audio_tokens(batch.fbank.shape[1])
        rows = [p.cpu() for p in (batch.prompts if prompts is None else prompts)]
        ends = self.prompter.extend(None if answers is None else [a.cpu() for a in answers])
        packed = splice(rows, ends, video, audio, self.seg_token_id, padding_side=padding_side)
        return self.prompter.mark(packed).to(self.device)

    def pack_group(
        self, batch: Batch, answers: Sequence[Tensor], group: int, temperature: float = 1.0
    ) -> GroupInputs:
        """Lay out B prompts and the B * G answers behind them; runs no weight.

        Args:
            batch: B clips.
            answers: R x int64 [L], at least one token each, in the order of `Generation`.
            group: G.
            temperature: the logits are divided by it, as in sampling.

        Raises:
            ValueError: another number of answers than B * G, an empty answer, or a prompt that ends in a placeholder.
        """
        prompts = [prompt.cpu() for prompt in batch.prompts]
        if len(answers) != group * len(prompts):
            raise ValueError(f"{len(answers)} answers for {len(prompts)} prompts in groups of {group}")
        rows = []
        for number, answer in enumerate(x.cpu() for x in answers):
            if not len(answer):
                raise ValueError(f"answer {number} is empty")
            at = (answer == self.seg_token_id).nonzero().flatten()
            seg = int(at[-1]) + 1 if len(at) else -1
            # The prompt's last token predicts the answer's first, so it is read with the answer: no logit of the
            # prompt is needed. The answer's last token predicts nothing; it is read only if it is the last [SEG].
            stream = torch.cat([prompts[number // group][-1:], answer])[: max(len(answer), seg + 1)]
            rows.append((stream, answer, seg))
        longest = max(len(stream) for stream, _, _ in rows)
        token_ids = torch.zeros(len(rows), longest, dtype=torch.long)
        targets = torch.full_like(token_ids, IGNORE)
        for number, (stream, answer, _) in enumerate(rows):
            token_ids[number, : len(stream)] = stream
            targets[number, : len(answer)] = answer
        segs = torch.tensor([seg for _, _, seg in rows], device=self.device)
        packed = self.pack_without_last_token(batch)
        return GroupInputs(packed, token_ids.to(self.device), targets.to(self.device), segs, group, temperature)

    def pack_without_last_token(self, batch: Batch) -> PackedInputs:
        """Prompts [B,P] whose last token is left to be read with each of the answers behind them.

        Raises:
            ValueError: a prompt ends in a placeholder, or has one token alone.
        """
        for number, prompt in enumerate(batch.prompts):
            if len(prompt) < 2 or prompt[-1] < 0:
                raise ValueError(f"prompt {number} must end in a token of text behind at least one other")
        return self.pack(batch, None, [prompt[:-1] for prompt in batch.prompts])

    def encode(
        self,
        batch: Batch,
        masks: bool = True,
        reuse: MediaFeatures | None = None,
        cache: FeatureCache | None = None,
    ) -> MediaFeatures:
        """Run the towers, once per clip.

        A frozen tower runs without gradient and may be served by the feature cache, its projector with it if that is
        frozen too. What has trainable parts, and what stands behind it, is always computed, with gradient where
        gradients are enabled.

        Args:
            batch: B clips on any device; the pixels are moved and cast as they are needed.
            masks: whether SAM's image embeddings are wanted.
            reuse: features of the same batch made earlier, perhaps without gradient: those of frozen towers are taken
                from it, the others are computed anew.
            cache: used in place of the model's own feature cache.

        Returns:
            MediaFeatures on the model's device, in its type.
        """
        device, dtype, backbone = self.device, self.backbone.dtype, self.backbone
        cache = self.feature_cache if cache is None else cache
        video_keys, audio_keys = ([getattr(s, f"{kind}_key") for s in batch.samples] for kind in ("video", "audio"))
        clip_keys = [s.clip for s in batch.samples]

        # Cast on the device: a pinned tensor that changes its type on the way is copied through other memory first.
        def patches(rows: slice) -> Tensor:  # [R,T,N,Dv]
            frames = batch.pixel_values[rows].to(device, non_blocking=True).to(dtype)
            return backbone.vision_tower(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])

        def sounds(rows: slice) -> Tensor:  # [R,Ma,Da]
            return backbone.audio_tower(batch.fbank[rows].to(device, non_blocking=True))

        def images(rows: slice) -> Tensor:  # [R,T,C,h,w]
            return self.segmenter.encode(batch.sam_pixels[rows].to(device, non_blocking=True))

        ready = MediaFeatures(None, None) if reuse is None else reuse
        found = MediaFeatures(None, None)
        if self.prompter.writes:
            inputs = batch.pixel_values, video_keys, cache, ready.video
            found.video = self._tower("vision_tower", "mm_projector", patches, *inputs)
            inputs = batch.fbank, audio_keys, cache, ready.audio
            found.audio = self._tower("audio_tower", "mm_projector_a", sounds, *inputs)
        if masks:
            known = ready.image_embeddings
            found.image_embeddings = self._frozen("image_encoder", images, batch.sam_pixels, clip_keys, cache, known)
        return found

    def _tower(
        self,
        tower: str,
        projector: str,
        compute: Callable[[slice], Tensor],
        inputs: Tensor,
        keys: list[str],
        cache: FeatureCache,
        ready: Tensor | None,
    ) -> Tensor:
        """Tower, then projector; what can be kept is as much of the two as is frozen, from the input on."""
        project = self.backbone.get_submodule(projector)
        if not self.is_frozen(f"backbone.{tower}"):
            return project(compute(slice(None)))
        if self.is_frozen(f"backbone.{projector}"):
            return self._frozen(projector, lambda rows: project(compute(rows)), inputs, keys, cache, ready)
        return project(self._frozen(tower, compute, inputs, keys, cache, None))

    @torch.no_grad()
    def _frozen(
        self,
        name: str,
        compute: Callable[[slice], Tensor],
        inputs: Tensor,
        keys: list[str],
        cache: FeatureCache,
        ready: Tensor | None,
    ) -> Tensor:
        return ready if ready is not None else cache.fetch(name, keys, compute, inputs).to(self.device)

    def forward(
        self, packed: PackedInputs | GroupInputs, media: MediaFeatures, frame_index: Tensor | None = None
    ) -> AuroraOutput | GroupOutput:
        """One teacher-forced pass.

        Args:
            packed: positions of B spliced rows; or B prompts with G answers each, from `pack_group`.
            media: features of the same B rows; without image embeddings no mask is decoded.
            frame_index: int64 [B,k] frames whose masks are decoded ([R,k] for groups); None = all T.

        Returns:
            AuroraOutput; `mask_logits` is [B,k,4h,4w] in SAM's padded square. GroupOutput for groups.

        Raises:
            NonFiniteError: the weights are float16 and the logits overflow.
        """
        if isinstance(packed, GroupInputs):
            return self._forward_group(packed, media, frame_index)
        hidden = self.hidden_states(packed, media)
        # Only positions that predict a labelled token reach lm_head: [A,V] instead of [B,S,V] (2,400 x 152,064 a row).
        labels = packed.labels[:, 1:]
        predicts = labels != IGNORE
        seg_features = self.seg_features(hidden, packed)
        logits = self.backbone.language_model.lm_head(hidden[:, :-1][predicts]) if self.prompter.writes else None
        if logits is not None and logits.dtype == torch.float16:
            check_logits(logits)
        return AuroraOutput(
            hidden=hidden,
            answer_logits=logits,
            answer_labels=labels[predicts],
            seg_features=seg_features,
            has_seg=packed.has_seg,
            mask_logits=self.decode_masks(seg_features, packed.has_seg, media.image_embeddings, frame_index),
        )

    def _forward_group(self, packed: GroupInputs, media: MediaFeatures, frame_index: Tensor | None) -> GroupOutput:
        """Log-probabilities, [SEG] features and masks of R answers, each prompt and clip read once."""
        language_model = self.backbone.language_model
        hidden = score_answers(
            language_model.model,
            self.backbone.embed(packed.prompts, replace(media, image_embeddings=None)),
            packed.prompts.attention_mask,
            language_model.get_input_embeddings()(packed.token_ids),
            packed.group,
        )
        mask = packed.mask
        # Inside the forward, since ZeRO-3 gathers lm_head for as long as this call lasts.
        log_probs, entropy = token_log_probs(
            language_model.lm_head, hidden[mask], packed.targets[mask], packed.temperature
        )
        places = torch.zeros_like(packed.targets, dtype=log_probs.dtype)
        rows = torch.arange(len(hidden), device=hidden.device)
        at_seg = hidden[rows, packed.seg_positions.clamp(min=0)]
        seg_features = self.project(at_seg).masked_fill(~packed.has_seg[:, None], 0)
        images = media.image_embeddings
        if images is not None:
            clips = rows // packed.group
            images = images[clips] if frame_index is None else images[clips[:, None], frame_index]
        return GroupOutput(
            log_probs=places.masked_scatter(mask, log_probs),
            entropy=places.masked_scatter(mask, entropy),
            seg_features=seg_features,
            has_seg=packed.has_seg,
            mask_logits=self.decode_masks(seg_features, packed.has_seg, images),
        )

    def hidden_states(self, packed: PackedInputs, media: MediaFeatures) -> Tensor:
        """Final-norm hidden states [B,S,D] of the spliced rows."""
        return self.prompter.hidden_states(self.backbone, packed, media)

    def project(self, hidden: Tensor) -> Tensor:
        """[B,D] hidden states at [SEG] -> [B,C] prompts for SAM (f_s of paper eq. 2)."""
        return self.text_hidden_fcs[0](hidden)

    def seg_features(self, hidden: Tensor, packed: PackedInputs) -> Tensor:
        """[B,S,D] hidden states -> [B,C] projected state at each row's last [SEG], zero without one."""
        return self.prompter.features(hidden, packed, self.project)

    def decode_masks(
        self, seg_features: Tensor, has_seg: Tensor, image_embeddings: Tensor | None, frame_index: Tensor | None = None
    ) -> Tensor | None:
        """[B,C] prompts -> low-resolution mask logits [B,T or k,4h,4w], EMPTY_LOGIT where `has_seg` [B] is False."""
        if image_embeddings is None:
            return None
        if frame_index is not None:
            rows = torch.arange(len(image_embeddings), device=image_embeddings.device)[:, None]
            image_embeddings = image_embeddings[rows, frame_index]
        logits = self.segmenter.decode(image_embeddings, seg_features)
        return logits.masked_fill(~has_seg[:, None, None, None], EMPTY_LOGIT)


@contextmanager
def evaluating(model: AuroraModel) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) for the length of a `with`, then the mode it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
