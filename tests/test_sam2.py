"""SAM 2 as a segmenter: against transformers' own session and its image model, in values and in gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Sam2Model, Sam2VideoInferenceSession

from model.segmenters.sam2 import Sam2Segmenter, build_sam2
from tests.sam2_cases import GRID, SIDE, WIDTH, load_sam2, save_sam2, settings, tiny_sam2, tiny_segmenter2
from utils.errors import ConfigError, WeightsError

FRAMES = 10
MODES = ("none", "first", "every")


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize(
    ("bias", "changes"),
    [(9.0, {}), (-9.0, {}), (-0.45, {}), (-0.45, {"enable_occlusion_spatial_embedding": False}),
     (9.0, {"enable_temporal_pos_encoding_for_object_pointers": False})],
    ids=["seen", "absent", "comes and goes", "no occlusion", "SAM 2.0"],
)  # fmt: skip
def test_a_clip_is_that_of_the_library_session(bias: float, changes: dict) -> None:
    """Two objects, a point each at the first frame; scores are biased so that objects are seen, absent, or mixed."""
    sam = tiny_sam2(**changes)
    sam.mask_decoder.pred_obj_score_head.proj_out.bias += bias
    clip = noise(FRAMES, 3, SIDE, SIDE)
    session = Sam2VideoInferenceSession(clip, SIDE, SIDE, dtype=torch.float32)
    points = torch.tensor([[[[10.0, 20.0]]], [[[40.0, 50.0]]]])
    for number, point in enumerate(points):
        session.obj_id_to_idx(number)
        inputs = {"point_coords": point[None], "point_labels": torch.ones(1, 1, 1, dtype=torch.int32)}
        session.add_point_inputs(number, 0, inputs)
    session.obj_with_new_inputs = [0, 1]
    sam(session, frame_idx=0)
    found = {out.frame_idx: out for out in sam.propagate_in_video_iterator(session)}
    wanted = torch.stack([found[t].pred_masks[:, 0] for t in range(FRAMES)], 1)
    scores = torch.stack([found[t].object_score_logits for t in range(FRAMES)])
    assert bool((scores > 0).all()) == (bias > 1) and bool((scores <= 0).all()) == (bias < -1)

    segmenter = Sam2Segmenter(sam, "first", gate=True)
    labels = torch.ones(2, 1, 1, dtype=torch.int32)
    tokens = sam.prompt_encoder(points, labels, None, None)[0]  # the point and its padding: two tokens
    own = segmenter.prompt_tokens
    segmenter.prompt_tokens = lambda prompts, n: own(None, n) if prompts is None else (tokens, own(None, n)[1])
    masks = segmenter.decode(segmenter.encode(clip[None]), noise(2, segmenter.prompt_width), torch.tensor([0, 0]))
    torch.testing.assert_close(masks, wanted, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prompt", ["alone", "behind_no_point"])
def test_without_memory_a_frame_is_that_of_the_image_model(prompt: str, tmp_path: Path) -> None:
    """`Sam2Model` reads the same folder; its mask decoder gets the same tokens."""
    segmenter = load_sam2(save_sam2(tmp_path), sam_prompt=prompt)
    image = Sam2Model.from_pretrained(tmp_path, local_files_only=True).eval()
    pixels, prompts = noise(1, 3, 3, SIDE, SIDE), noise(1, WIDTH, seed=1)
    masks = segmenter.decode(segmenter.encode(pixels), prompts)
    maps = image.get_image_embeddings(pixels[0])
    nowhere, label = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -1, dtype=torch.int32)
    none, dense = image.prompt_encoder(nowhere, label, None, None)
    sparse = prompts[:, None, None] if prompt == "alone" else torch.cat([none, prompts[:, None, None]], 2)
    wanted = image.mask_decoder(
        maps[-1], image.get_image_wide_positional_embeddings().expand(3, -1, -1, -1), sparse.expand(3, -1, -1, -1),
        dense.expand(3, -1, -1, -1), False, maps[:-1],
    )[0]  # fmt: skip
    torch.testing.assert_close(masks[0], wanted[:, 0, 0], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("memory", MODES)
def test_queries_frames_and_a_stream_are_one_by_one_as_in_one_pass(memory: str, monkeypatch) -> None:
    """Three queries about two clips; drawn frames; encoding in chunks; frame after frame as they come."""
    segmenter = tiny_segmenter2(memory)
    segmenter.memory_dtype = torch.float32  # the last bit of another batch may round to another bfloat16
    pixels, prompts, clips = noise(2, 6, 3, SIDE, SIDE), noise(3, WIDTH, seed=1), torch.tensor([1, 0, 1])
    features = segmenter.encode(pixels)
    assert features.shape == (2, 6, segmenter.feature_size)
    together = segmenter.decode(features, prompts, clips)
    assert together.shape == (3, 6, 4 * GRID, 4 * GRID) and together.std() > 1e-3
    alone = torch.cat([segmenter.decode(features, prompts[q : q + 1], clips[q : q + 1]) for q in range(3)])
    torch.testing.assert_close(alone, together, atol=2e-5, rtol=0)
    torch.testing.assert_close(segmenter.decode(features, prompts[:2]), segmenter.decode(
        features, prompts[:2], torch.arange(2)), atol=0, rtol=0)  # fmt: skip
    drawn = torch.tensor([[0, 2, 5]] * 3)
    some = segmenter.decode(features, prompts, clips, drawn)
    if memory == "none":
        torch.testing.assert_close(some, together[:, drawn[0]], atol=2e-5, rtol=0)
    else:  # a clip of their own: the first frame has nothing behind it, the others another past
        torch.testing.assert_close(some[:, 0], together[:, 0], atol=2e-5, rtol=0)
        assert (some[:, 1:] - together[:, drawn[0, 1:]]).abs().max() > 1e-4

    monkeypatch.setattr("model.segmenters.sam2.CHUNK_VALUES", 1)
    assert segmenter.frames_per_chunk == 1
    track = segmenter.track(prompts, length=6)
    for t in range(6):
        frame = segmenter.encode(pixels[:, t : t + 1])[:, 0]
        torch.testing.assert_close(segmenter.step(track, frame, clips), together[:, t], atol=2e-5, rtol=0)
        assert len(track.memories) <= segmenter.sam.num_maskmem and len(track.pointers) <= 6


def test_a_long_clip_keeps_a_bounded_memory() -> None:
    segmenter = tiny_segmenter2("every")
    track, frame = segmenter.track(noise(1, WIDTH)), noise(1, segmenter.feature_size, seed=1)
    with torch.no_grad():
        for _ in range(20):
            segmenter.step(track, frame, torch.tensor([0]))
    assert sorted(track.memories) == [0, 17, 18, 19] and sorted(track.pointers) == [0, *range(5, 20)]


@pytest.mark.parametrize("memory", MODES)
def test_gradients_of_a_clip_that_is_recomputed_are_those_of_one_that_is_kept(memory: str, monkeypatch) -> None:
    """Bit for bit, and what is kept for backward is a frame, not the clip."""
    segmenter = tiny_segmenter2(memory).train()
    features, saved, gradients = noise(1, 6, segmenter.feature_size), [], []
    for keep in (False, True):
        if keep:
            monkeypatch.setattr("model.segmenters.sam2.checkpoint", lambda run, *inputs, **_: run(*inputs))
        prompts, sizes = noise(2, WIDTH, seed=1).requires_grad_(), {}

        def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        segmenter.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = segmenter.decode(features, prompts, torch.tensor([0, 0])).square().mean()
        loss.backward()
        saved.append(sum(sizes.values()))
        gradients.append([loss.detach(), prompts.grad, *(p.grad for p in segmenter.parameters() if p.grad is not None)])
    for recomputed, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, atol=0, rtol=0)
    assert saved[0] < saved[1] / 3


def test_gradient_reaches_the_first_frame_through_memory() -> None:
    """The loss of any later frame moves a prompt that was given at the first alone; a hard gate would cut it."""
    segmenter = tiny_segmenter2("first")
    features = noise(1, FRAMES, segmenter.feature_size)
    prompts = noise(1, WIDTH, seed=1).requires_grad_()
    masks = segmenter.decode(features, prompts)
    norms = [torch.autograd.grad(masks[:, t].square().mean(), prompts, retain_graph=True)[0].norm() for t in range(10)]
    assert min(norms) > 1e-6
    every = [name for name, p in segmenter.sam.named_parameters() if name.startswith(("memory_attention", "object_p"))]
    segmenter.decode(features, prompts).square().mean().backward()
    assert all(segmenter.sam.get_parameter(name).grad.any() for name in every)

    segmenter.sam.mask_decoder.pred_obj_score_head.proj_out.bias.data -= 50  # all absent
    segmenter.gate = True
    masks = segmenter.decode(features, prompts)
    assert torch.autograd.grad(masks.square().mean(), prompts)[0].any()  # no gate where gradients are recorded
    with torch.no_grad():
        assert bool((segmenter.decode(features, prompts) == -1024).all())


@pytest.mark.parametrize("memory", ["first", "every"])
def test_gradient_through_memory_against_central_differences(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, also where the library takes float32 (rotary angles), whose rounding would hide a small step."""
    single = Tensor.float
    monkeypatch.setattr(Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
    segmenter = tiny_segmenter2(memory).double()
    segmenter.memory_dtype = torch.float64
    features, direction = noise(1, 3, segmenter.feature_size).double(), noise(1, WIDTH, seed=2).double()
    prompts, weights = noise(1, WIDTH, seed=1).double(), noise(1, 4 * GRID, 4 * GRID, seed=3).double()

    def last_frame(step: float) -> Tensor:
        return (segmenter.decode(features, prompts + step * direction)[:, 2] * weights).sum()

    start = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (segmenter.decode(features, prompts + start * direction)[:, 2] * weights).sum().backward()
    with torch.no_grad():
        numeric = (last_frame(1e-5) - last_frame(-1e-5)) / 2e-5
    assert numeric.abs() > 1e-6
    torch.testing.assert_close(start.grad, numeric, atol=0, rtol=1e-3)


@torch.no_grad()
def test_bfloat16_leaves_position_codes_and_rotary_angles_exact() -> None:
    segmenter, rounded = tiny_segmenter2("every"), tiny_segmenter2("every").bfloat16()
    for name in ("dense_pe", "top_pe", "memory_pe"):
        wanted = getattr(segmenter, name).bfloat16()
        torch.testing.assert_close(getattr(rounded, name), wanted, atol=0, rtol=0)
    angles = [s.sam.memory_attention.rotary_emb(x, s.sam.memory_attention.position_ids) for s, x in (
        (segmenter, torch.zeros(1)), (rounded, torch.zeros(1).bfloat16()))]  # fmt: skip
    torch.testing.assert_close(*angles, atol=0, rtol=0)
    features = segmenter.encode(noise(1, 3, 3, SIDE, SIDE))
    prompts = noise(1, WIDTH, seed=1)
    exact, low = segmenter.decode(features, prompts), rounded.decode(features.bfloat16(), prompts.bfloat16())
    assert low.dtype == torch.bfloat16 and (low - exact).norm() < 0.1 * exact.norm()


def test_it_stays_in_eval_mode_and_no_choice_depends_on_it() -> None:
    segmenter = tiny_segmenter2("every").train()
    assert segmenter.training and not any(module.training for module in segmenter.sam.modules())
    assert not segmenter.sam.mask_decoder.dynamic_multimask_via_stability


def test_prompts_and_frames_of_another_size_are_refused() -> None:
    segmenter = tiny_segmenter2()
    with pytest.raises(ValueError, match=r"model\.sam_image_size"):
        segmenter.encode(noise(1, 1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"prompts has shape \(2, 8\), expected \(1, 128\)"):
        segmenter.decode(noise(1, 1, segmenter.feature_size), noise(2, 8))


def test_upscaling_fills_the_native_frame() -> None:
    logits = noise(2, 16, 16)
    up = tiny_segmenter2().upscale(logits.bfloat16(), (SIDE, SIDE), (45, 71))
    assert up.shape == (2, 45, 71) and up.dtype == torch.float32
    torch.testing.assert_close(tiny_segmenter2().upscale(logits, (SIDE, SIDE), (16, 16)), logits, atol=0, rtol=0)


# ---- the folder


@torch.no_grad()
def test_a_folder_is_read_at_any_size_with_every_tensor_in_its_place(tmp_path: Path) -> None:
    save_sam2(tmp_path)
    segmenter, plain = load_sam2(tmp_path), tiny_segmenter2()
    assert segmenter.sam.state_dict().keys() == load_file(tmp_path / "model.safetensors").keys()
    pixels, prompts = noise(1, 2, 3, SIDE, SIDE), noise(1, WIDTH, seed=1)
    masks = [s.decode(s.encode(pixels), prompts) for s in (segmenter, plain)]
    torch.testing.assert_close(*masks, atol=1e-5, rtol=0)
    larger = load_sam2(tmp_path, 96, sam_memory="every")
    masks = larger.decode(larger.encode(noise(1, 3, 3, 96, 96)), prompts)
    assert masks.shape == (1, 3, 24, 24) and larger.feature_size == 4 * WIDTH * 6**2 and bool(masks.isfinite().all())
    for name, tensor in segmenter.sam.state_dict().items():
        torch.testing.assert_close(larger.sam.state_dict()[name], tensor, atol=0, rtol=0)
    assert not segmenter.training and all(p.dtype == torch.float32 for p in segmenter.parameters())


def test_a_folder_that_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.sam_checkpoint.*holds no config\.json.*not as Meta's \.pt"):
        load_sam2(tmp_path / "nowhere")
    save_sam2(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.sam_image_size = 48: must be a multiple of 32"):
        load_sam2(tmp_path, 48)
    file = tmp_path / "model.safetensors"
    state, whole = load_file(file), file.read_bytes()
    for change, message in (
        (lambda s: s.pop("no_object_pointer"), r"missing_keys \['no_object_pointer'\]"),
        (lambda s: s.update(stranger=torch.zeros(1)), r"unexpected_keys \['stranger'\]"),
        (lambda s: s.update(no_object_pointer=torch.zeros(1, 3)), r"mismatched_keys \['no_object_pointer'\]"),
    ):
        own = copy.copy(state)
        change(own)
        save_file(own, file, {"format": "pt"})
        with pytest.raises(WeightsError, match=f"(?s){message}"):
            load_sam2(tmp_path)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match="not readable as SAM 2"):
        load_sam2(tmp_path)
    file.unlink()
    with pytest.raises(WeightsError, match="not readable as SAM 2"):
        load_sam2(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "sam3_video"}')
    with pytest.raises(ConfigError, match="says model_type 'sam3_video', not 'sam2_video'"):
        load_sam2(tmp_path)


def test_without_a_folder_a_plan_has_the_sizes_of_the_released_large_model() -> None:
    """224.4 M parameters, 901 tensors in the released file (three of them buffers)."""
    with torch.device("meta"):
        segmenter = build_sam2(settings(Path("nowhere"), 1024, sam_memory="every"), weights=False)
    assert 224.3e6 < sum(p.numel() for p in segmenter.parameters()) < 224.5e6
    assert len(segmenter.sam.state_dict()) == 901
    assert segmenter.feature_size == 4_194_304 and segmenter.frames_per_chunk == 7
