"""The joint model: words, video and sound in; answer logits, [SEG] features and masks out.

What a missing [SEG] means is said here and nowhere else. Masks are asked for by queries: an answer without [SEG] has
none, so that no mask of it is decoded, trained or distilled, and at evaluation it has the J of an empty mask. (The
released stages differ: SFT stops at such a batch, LISA_sft_distill.py:403-438; GRPO decodes the second-to-last position
and trains that mask, LISA_grpo.py:499-505; evaluation appends "It is [SEG].", LISA_sft_distill.py:252-255.)

The [SEG] feature is text_hidden_fcs[0] of the final-norm hidden state AT the last [SEG] of the answer, in every stage
and at inference (released code LISA_sft_distill.py:326-327; LISA_grpo.py:496-498 reads one position earlier).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from configs.schema import ModelConfig, TrainableConfig
from model.aurora.features import IMAGES, FeatureCache
from model.aurora.sampling import GenerationDefaults
from model.aurora.shared_prompt import ATTENTION, score_answers
from model.backbones.base import Backbone, Tower, query_positions
from model.objectives.policy import token_log_probs
from model.segmenters.base import Segmenter
from utils.guards import check_logits
from utils.types import IGNORE, AuroraOutput, Batch, Generation, GroupInputs, GroupOutput, MediaFeatures, PackedInputs


class AuroraModel(nn.Module):
    """A multimodal language model, a segmenter, and the projection between them.

    Args:
        backbone: towers and language model.
        segmenter: what the [SEG] feature prompts.
        seg_token_id: id of [SEG].
        feature_cache: where features of frozen towers are kept; None = nowhere.
        width: of the states that prompt the segmenter; None = that of the language model.

    Raises:
        ValueError: the embedding matrix has no row for [SEG].
    """

    writes = True  # whether an answer is written or read; without one, video and sound are not encoded either

    def __init__(
        self,
        backbone: Backbone,
        segmenter: Segmenter,
        seg_token_id: int,
        feature_cache: FeatureCache | None = None,
        width: int | None = None,
    ) -> None:
        super().__init__()
        rows, language_width = backbone.words.weight.shape
        if not 0 <= seg_token_id < rows:
            raise ValueError(f"[SEG] has id {seg_token_id}, but the embedding matrix has {rows} rows")
        backbone.language_model.set_attn_implementation(ATTENTION)
        self.backbone = backbone
        self.segmenter = segmenter
        self.seg_token_id = seg_token_id
        self.feature_cache = FeatureCache() if feature_cache is None else feature_cache
        width = language_width if width is None else width
        # One entry of a list, as checkpoints of LISA and AURORA name it (released code LISA_sft_distill.py:94-100).
        projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, segmenter.prompt_width), nn.Dropout(0.0)
        )
        self.text_hidden_fcs = nn.ModuleList([projection])
        # What `build_model` knows; a model that was put together by hand knows nothing.
        self.trainable_config: TrainableConfig | None = None  # what is trained, once `apply_trainable` has chosen it
        self.loaded_names: frozenset[str] = frozenset()  # parameters that an earlier stage has trained
        self.generation_defaults = GenerationDefaults()  # what generation_config.json of the base says
        self.origin: ModelConfig | None = None  # where base and SAM came from, for exports

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def components(self) -> tuple[str, ...]:
        """The parts whose names begin every parameter of the model; each is frozen or trained by itself."""
        backbone = (f"backbone.{name}" for name in self.backbone.components)
        segmenter = (f"segmenter.{name}" for name in self.segmenter.components)
        return (*backbone, *segmenter, "text_hidden_fcs")

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

    # ---- clips

    def encode(self, batch: Batch, masks: bool = True, reuse: MediaFeatures | None = None) -> MediaFeatures:
        """Run the towers, once per clip: MediaFeatures on the model's device, in its type.

        A frozen tower runs without gradient and may be served by the feature cache, its projector with it if that is
        frozen too. What has trainable parts, and what stands behind it, is always computed, with gradient where
        gradients are enabled.

        Args:
            batch: B clips on any device.
            masks: whether the segmenter's image embeddings are wanted.
            reuse: features of the same batch made earlier, perhaps without gradient: those of frozen towers are taken.
        """
        ready = MediaFeatures(None, None) if reuse is None else reuse
        found = MediaFeatures(None, None)
        for tower in self.backbone.towers if self.writes else ():
            setattr(found, tower.kind, self._media_tokens(tower, batch, getattr(ready, tower.kind)))
        if masks:
            clips, encode = [s.clip for s in batch.samples], self.segmenter.encode
            found.image_embeddings = self._frozen(IMAGES, encode, batch.sam_pixels, clips, ready.image_embeddings)
        return found

    def _media_tokens(self, tower: Tower, batch: Batch, ready: Tensor | None) -> Tensor:
        """[B,M,D]: tower, then projector; what can be kept is as much of the two as is frozen, from the input on."""
        inputs, keys = getattr(batch, tower.inputs), [getattr(s, tower.key) for s in batch.samples]
        run, project = partial(self.backbone.run_tower, tower), self.backbone.get_submodule(tower.projector)
        if not self.is_frozen(f"backbone.{tower.tower}"):
            return project(run(inputs.to(self.device, non_blocking=True)))
        if self.is_frozen(f"backbone.{tower.projector}"):
            return self._frozen(tower.projector, lambda rows: project(run(rows)), inputs, keys, ready)
        return project(self._frozen(tower.tower, run, inputs, keys, None))

    @torch.no_grad()
    def _frozen(
        self, name: str, run: Callable[[Tensor], Tensor], inputs: Tensor, keys: list[str], ready: Tensor | None
    ) -> Tensor:
        """`run` of `inputs` on the model's device, unless the features are ready or kept."""
        return self.feature_cache.fetch(name, keys, run, inputs, self.device) if ready is None else ready

    # ---- rows of words and media positions

    def pack(
        self, batch: Batch, answers: Sequence[Tensor] | None, prompts: Sequence[Tensor] | None = None
    ) -> PackedInputs:
        """Lay out prompts and answers, int64 [L] each, with the media positions of `batch`; runs no weight.

        Args:
            batch: gives the token counts of video and sound.
            answers: one per prompt, or None for generation.
            prompts: None = `batch.prompts`. Give them to repeat a clip's prompt.
        """
        rows = [prompt.cpu() for prompt in (batch.prompts if prompts is None else prompts)]
        ends = None if answers is None else [answer.cpu() for answer in answers]
        return self.backbone.layout(batch, rows, ends, self.seg_token_id).to(self.device)

    def pack_group(self, batch: Batch, answers: Sequence[Tensor], group: int, temperature: float = 1.0) -> GroupInputs:
        """Lay out B prompts and the R = B * G answers behind them, int64 [L] each; runs no weight.

        Raises:
            ValueError: another number of answers than B * G, an empty answer, or a prompt that ends in a placeholder.
        """
        if len(answers) != group * len(batch):
            raise ValueError(f"{len(answers)} answers for {len(batch)} prompts in groups of {group}")
        packed = self.pack_without_last_token(batch)
        streams, targets, queries = [], [], []
        for number, answer in enumerate(x.cpu() for x in answers):
            if not len(answer):
                raise ValueError(f"answer {number} is empty")
            # The prompt's last token predicts the answer's first, so it is read with the answer: no logit of the
            # prompt is needed. The answer's last token predicts nothing; it is read only if a query stands there.
            queries.append(query_positions(answer, self.seg_token_id) + 1)
            length = max([len(answer), *(queries[-1] + 1).tolist()])
            streams.append(torch.cat([batch.prompts[number // group].cpu()[-1:], answer])[:length])
            targets.append(F.pad(answer, (0, length - len(answer)), value=IGNORE))
        token_ids, targets = pad_sequence(streams, True), pad_sequence(targets, True, IGNORE)
        asking = torch.arange(len(answers)).repeat_interleave(torch.tensor([len(q) for q in queries]))
        tensors = (x.to(self.device) for x in (token_ids, targets, asking, torch.cat(queries)))
        return GroupInputs(packed, *tensors, group, temperature)

    def pack_without_last_token(self, batch: Batch) -> PackedInputs:
        """Prompts [B,P] whose last token is left to be read with each of the answers behind them.

        Raises:
            ValueError: a prompt ends in a placeholder, or has one token alone.
        """
        for number, prompt in enumerate(batch.prompts):
            if len(prompt) < 2 or prompt[-1] < 0:
                raise ValueError(f"prompt {number} must end in a token of text behind at least one other")
        return self.pack(batch, None, [prompt[:-1] for prompt in batch.prompts])

    # ---- the pass

    def forward(
        self, packed: PackedInputs | GroupInputs, media: MediaFeatures, frame_index: Tensor | None = None
    ) -> AuroraOutput | GroupOutput:
        """One teacher-forced pass.

        Args:
            packed: B rows, which give an AuroraOutput; or B prompts with G answers each, which give a GroupOutput.
            media: features of the same B clips; without image embeddings no mask is decoded.
            frame_index: int64 [B,k] frames of each clip whose masks are decoded; None = all T.

        Raises:
            NonFiniteError: the weights are float16 and the logits overflow.
        """
        if isinstance(packed, GroupInputs):
            return self._forward_group(packed, media, frame_index)
        hidden = self.hidden_states(packed, media)
        # Only positions that predict a labelled token reach lm_head: [A,V] instead of [B,S,V] (2,400 x 152,064 a row).
        labels = packed.labels[:, 1:]
        predicts = labels != IGNORE
        logits = self.backbone.lm_head(hidden[:, :-1][predicts]) if self.writes else None
        if logits is not None and logits.dtype == torch.float16:  # the one type in which they overflow
            check_logits(logits)
        seg_features = self.seg_features(hidden, packed)
        masks = self.decode_masks(seg_features, packed.answer_of_query, media.image_embeddings, frame_index)
        return AuroraOutput(logits, labels[predicts], seg_features, masks)

    def _forward_group(self, packed: GroupInputs, media: MediaFeatures, frame_index: Tensor | None) -> GroupOutput:
        """Log-probabilities, [SEG] features and masks of R answers, each prompt and clip read once."""
        prompts, mask = packed.prompts, packed.mask
        answers = self.backbone.words(packed.token_ids)
        rows = self.embed(prompts, media), prompts.attention_mask, answers
        hidden = score_answers(self.backbone.decoder, *rows, packed.group, prompts.position_ids)
        # Inside the forward, since ZeRO-3 gathers lm_head for as long as this call lasts.
        scores = token_log_probs(self.backbone.lm_head, hidden[mask], packed.targets[mask], packed.temperature)
        log_probs, entropy = (hidden.new_zeros(mask.shape, dtype=x.dtype).masked_scatter(mask, x) for x in scores)
        seg_features = self.seg_features(hidden, packed)
        clip_of_query = packed.answer_of_query // packed.group
        masks = self.decode_masks(seg_features, clip_of_query, media.image_embeddings, frame_index)
        return GroupOutput(log_probs, entropy, seg_features, masks)

    def embed(self, packed: PackedInputs, media: MediaFeatures) -> Tensor:
        """[B,S,D] embeddings of words and media."""
        return self.backbone.embed(packed, media)

    def hidden_states(self, packed: PackedInputs, media: MediaFeatures) -> Tensor:
        """Final-norm hidden states [B,S,D] of the spliced rows."""
        embeddings, positions = self.embed(packed, media), packed.position_ids
        return self.backbone.decoder(
            inputs_embeds=embeddings, attention_mask=packed.attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def project(self, hidden: Tensor) -> Tensor:
        """[Q,D] hidden states at [SEG] -> [Q,C] prompts for the segmenter (f_s of paper eq. 2)."""
        return self.text_hidden_fcs[0](hidden)

    def seg_features(self, hidden: Tensor, packed: PackedInputs | GroupInputs) -> Tensor:
        """[B,S,D] or [R,L,D] hidden states -> [Q,C] projected states of the queries."""
        return self.project(hidden[packed.answer_of_query, packed.position_of_query])

    def drawn_queries(self, answers: Generation | None, batch: Batch, media: MediaFeatures) -> tuple[Tensor, Tensor]:
        """[Q,C] prompts for the segmenter, and int64 [Q] the answer of each, of answers drawn about `batch`."""
        return self.project(answers.seg_hidden), answers.answer_of_query

    def decode_masks(
        self, prompts: Tensor, clip_of_query: Tensor, images: Tensor | None, frame_index: Tensor | None = None
    ) -> Tensor | None:
        """[Q,C] prompts -> low-resolution mask logits [Q,T or k,4h,4w]; frame_index is int64 [B,k]."""
        if images is None:
            return None
        if not len(prompts):
            # Processes must agree on which gradients there are, and under ZeRO-3 on the calls: one prompt of zeros is
            # decoded and its masks are left out. A sum over no rows keeps text_hidden_fcs in the graph.
            one = prompts.sum(0, keepdim=True)
            return self.decode_masks(one, clip_of_query.new_zeros(1), images, frame_index)[:0]
        frames = None if frame_index is None else frame_index[clip_of_query]
        return self.segmenter.decode(images, prompts, clip_of_query, frames)


@contextmanager
def evaluating(model: AuroraModel) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) for the length of a `with`, then the mode it had."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
