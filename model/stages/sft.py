"""Stage 1: supervised reasoning with segmentation feature distillation.

| paper | published code | here | why |
|---|---|---|---|
| eq. 1, 6: CE + BCE + Dice + MSE, weights 1 | CE + 2 BCE + 0.5 Dice; the MSE is commented out (train_ds.py:245-273, 522-529) | all four, weights by config | the term is in the paper; its weight is nowhere else |
| eq. 2: MSE(f_t, f_s) between [SEG] features | 256-wide outputs of text_hidden_fcs, teacher's context "It is {class} [SEG]." | the same; mean over width and over answers with [SEG] in both | eq. 2 does not say which answer the teacher reads: `sft.teacher_answer` |
| 3.1: the teacher is trained before | a second 7B model in memory | the teacher's trained tensors alone, swapped into the student for its pass | they are all that differs: megabytes with adapters |
| 3.1 does not say where the student starts | the teacher's weights go into teacher and student (train_ds.py:245-273, commented) | `sft.student_start`: teacher or init_from | behind the frozen decoder a random [SEG] head would have to be learned anew |
| 3.1: the student uses the teacher's SAM decoder, frozen | decoder trained in the trainer of the release (train_ds.py:280) | `sft.freeze_mask_decoder`, see `model.aurora.build` | the paper is explicit |
| - | f_t computed at every step | kept by metadata row after the first time | teacher and media never change |
| - | each model encodes video and sound | encoded once where no tower differs between the two | frozen towers and projectors are one |
| eq. 1: sum over tokens | mean over the batch's answer tokens | mean | a sum would weigh long answers and outweigh the masks |
| no learning rate, no warm-up (4.1) | 1e-4, warm-up 100, accumulation 10 in the only trainer with a cross entropy (train_ds_test.py:87, :315, :472); 1e-5 and 30 in the GRPO trainer (train_ds.py:88, :342) | 1e-4, warm-up 100; accumulation 4 | the rate belongs to its loss; the paper names the accumulation |
"""  # noqa: E501 (a table)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedTokenizerBase

from configs.schema import RunConfig
from model.aurora.features import FeatureCache
from model.aurora.model import AuroraModel, evaluating
from model.aurora.trained import Trained, check_fit, read_trained
from model.objectives.distill import feature_distillation
from model.stages.base import Prepared, SupervisedStage
from utils.errors import ConfigError, Problem
from utils.types import AuroraOutput, Batch, MediaFeatures, PackedInputs

TOWERS = ("backbone.vision_tower.", "backbone.mm_projector.", "backbone.audio_tower.", "backbone.mm_projector_a.")


class SftStage(SupervisedStage):
    """Cross entropy of the reasoning, mask losses, and the distance to the teacher's [SEG] feature.

    Raises:
        ConfigError: distillation without a teacher, or under ZeRO-3.
        WeightsError: the teacher does not fit the student.
    """

    def __init__(self, config: RunConfig, engine: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__(config, engine, tokenizer)
        self.teacher: FrozenTeacher | None = None
        if config.loss.distill > 0:
            if not config.sft.teacher_checkpoint:
                raise ConfigError([Problem("sft.teacher_checkpoint", None, "distillation needs a teacher", "name one")])
            self.teacher = FrozenTeacher(self.model, read_trained(config.sft.teacher_checkpoint))

    @torch.no_grad()
    def prepare(self, batch: Batch) -> Prepared:
        """Lay the batch out and ask the teacher."""
        prepared = super().prepare(batch)
        if self.teacher is not None:
            prepared.media = self.teacher.shared_media(batch)
            prepared.teacher_features, prepared.teacher_has_seg = self.teacher.features(batch, prepared.media)
        return prepared

    def distillation(self, prepared: Prepared, output: AuroraOutput) -> Tensor | None:
        """Paper eq. 2."""
        if self.teacher is None:
            return None
        return feature_distillation(
            prepared.teacher_features, output.seg_features, prepared.teacher_has_seg, output.has_seg
        )


class FrozenTeacher:
    """The teacher as a second set of values for the student's own modules.

    The two models share base, SAM and the choice of trained parameters, so the teacher is its light checkpoint: for its
    pass these tensors take the places of the student's (`torch.func.functional_call`), in eval mode and without
    gradient. Its features are kept by metadata row, because neither it nor the media change.

    Args:
        model: the student, in whose types and on whose device the tensors are kept.
        trained: the teacher's light checkpoint.

    Raises:
        WeightsError: the two do not train the same parameters.
        ConfigError: the student's parameters are partitioned (ZeRO-3), so that nothing can take their places.
    """

    def __init__(self, model: AuroraModel, trained: Trained) -> None:
        check_fit(trained, model)
        parameters = dict(model.named_parameters())
        if any(hasattr(p, "ds_id") for p in parameters.values()):
            raise ConfigError(
                [
                    Problem(
                        "engine.zero_stage", 3, "the teacher of stage sft needs whole parameters", "set it to 2 or less"
                    )
                ]
            )
        self._tensors = {
            f"model.{name}": x.to(parameters[name].device, parameters[name].dtype)
            for name, x in trained.tensors.items()
        }
        self._pass = _SegPass(model)
        # What is encoded for the student holds for the teacher only if their towers are equal, and stay so.
        self._shares_towers = not any(
            parameters[name].requires_grad or not torch.equal(parameters[name], self._tensors[f"model.{name}"])
            for name in trained.tensors
            if name.startswith(TOWERS)
        )
        self._known: dict[int, tuple[Tensor, bool]] = {}

    @torch.no_grad()
    def shared_media(self, batch: Batch) -> MediaFeatures | None:
        """Video and sound of B clips for teacher and student alike; None if a tower or projector of the two differs.

        One clip at a time, so that not even the last bits of f_t depend on which clips a run happened to meet first.
        """
        if not self._shares_towers:
            return None
        found = [self._pass.model.encode(_one(batch, i), masks=False) for i in range(len(batch))]
        return MediaFeatures(torch.cat([m.video for m in found]), torch.cat([m.audio for m in found]))

    def features(self, batch: Batch, media: MediaFeatures | None) -> tuple[Tensor, Tensor]:
        """f_t [B,C] and whether the teacher's answer has a [SEG], bool [B].

        Args:
            batch: B clips.
            media: their `shared_media`.

        Raises:
            ValueError: a sample without `teacher_ids`.
        """
        new = {s.row: i for i, s in enumerate(batch.samples) if s.row not in self._known}
        if new:
            clips = [_one(batch, i) for i in new.values()]
            shared = [None if media is None else _rows_of(media, i) for i in new.values()]
            self._known.update(zip(new, self._compute(clips, shared), strict=True))
        found = [self._known[s.row] for s in batch.samples]
        device = self._pass.model.device
        return torch.stack([f for f, _ in found]).to(device), torch.tensor([h for _, h in found], device=device)

    @torch.no_grad()
    def _compute(
        self, clips: Sequence[Batch], shared: Sequence[MediaFeatures | None]
    ) -> list[tuple[Tensor, bool]]:
        """Of each batch of one: f_t [C] on the CPU and whether there is a [SEG]."""
        unread = [str(clip.samples[0].row) for clip in clips if not len(clip.samples[0].teacher_ids)]
        if unread:
            raise ValueError(
                f"metadata rows {', '.join(unread)} have no teacher_ids: stage sft needs the teacher's answer to each"
            )
        model = self._pass.model
        packed = [model.pack(clip, [clip.samples[0].teacher_ids]) for clip in clips]
        with evaluating(model):
            found = functional_call(self._pass, self._tensors, (clips, packed, shared))
        return [(f.to("cpu", copy=True), bool(p.has_seg[0])) for f, p in zip(found, packed, strict=True)]


def _one(batch: Batch, i: int) -> Batch:
    """Sample i of a batch as a batch of its own."""
    rows = slice(i, i + 1)
    return Batch(
        batch.samples[rows],
        batch.pixel_values[rows],
        batch.sam_pixels[rows],
        batch.fbank[rows],
        batch.masks[rows],
    )


def _rows_of(media: MediaFeatures, i: int) -> MediaFeatures:
    rows = slice(i, i + 1)
    return MediaFeatures(media.video[rows], media.audio[rows])


class _SegPass(nn.Module):
    """Clips and answers to [SEG] features, as one module call: no lm_head, no masks.

    One clip at a time, as in `FrozenTeacher.shared_media`; all in one call, since for a small model the exchange of the
    tensors costs as much as the pass.
    """

    def __init__(self, model: AuroraModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, clips: Sequence[Batch], packed: Sequence[PackedInputs], shared: Sequence[MediaFeatures | None]
    ) -> list[Tensor]:
        """[C] per clip; a clip without shared media is encoded here, past the student's feature cache."""
        found = []
        for clip, places, media in zip(clips, packed, shared, strict=True):
            media = media or self.model.encode(clip, masks=False, cache=FeatureCache("none"))
            hidden = self.model.hidden_states(places, media)
            found.append(self.model.seg_features(hidden, places)[0])
        return found
