"""predict.py on generated video files: what is read of them, what is refused, and what is written."""

from __future__ import annotations

import json
import shutil

import av
import cv2
import numpy as np
import pytest
import soundfile

from dataset.media import SAMPLE_RATE
from dataset.prompt import load_tokenizer
from dataset.video import probe, read_clip
from model.aurora.build import build_model
from model.aurora.trained import save_trained
from scripts.predict import main
from tests.data_builders import write_clip
from tests.tiny_run import make_tiny_run
from utils.config import load_config, save_config
from utils.draw import write_gif, write_mp4
from utils.errors import DataError

KINDS = {"clip.mp4": ("libx264", "aac"), "clip.webm": ("libvpx-vp9", "libopus"), "clip.mkv": ("mpeg4", "libmp3lame")}


def write_video(path, codec="libx264", sound="aac", seconds=2.0, rate=10, size=(98, 64)):
    """A block that moves to the right; stereo sound, a tone of 440 Hz on the left channel alone."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate) if codec else None
        voice = container.add_stream(sound, rate=48_000, layout="stereo") if sound else None
        if video:
            video.width, video.height, video.pix_fmt = *size, "yuv420p"
            for i in range(round(seconds * rate)):
                image = np.zeros((size[1], size[0], 3), np.uint8)
                image[16:48, 3 * i : 3 * i + 16] = (220, 40, 40)
                container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(video.encode())
        if voice:
            wave = np.zeros((2, round(seconds * 48_000)), np.float32)
            wave[0] = 0.5 * np.sin(2 * np.pi * 440 * np.arange(wave.shape[1]) / 48_000)
            frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="stereo")
            frame.sample_rate = 48_000
            container.mux(voice.encode(frame))
            container.mux(voice.encode())
    return path


@pytest.mark.smoke
@pytest.mark.parametrize("name", KINDS)
def test_frames_and_sound_of_a_video(tmp_path, name):
    path = write_video(tmp_path / name, *KINDS[name])
    clip = read_clip(path)
    assert clip.frames.shape == (10, 64, 98, 3) and clip.seconds == pytest.approx(2, abs=0.11)
    assert clip.times[1] == pytest.approx(clip.seconds / 10)
    for t, frame in enumerate(clip.frames):  # shown at t/10 of the clip, when the block has moved by 6 t pixels
        reds = np.flatnonzero((frame[32].astype(int) @ [1, -1, 0]) > 90)
        assert abs(reds.min() - 6 * t) <= 3, (t, reds.min())
    assert clip.sound.dtype == np.float32 and len(clip.sound) == round(clip.seconds * SAMPLE_RATE)
    assert np.isfinite(clip.sound).all()
    middle = clip.sound[SAMPLE_RATE // 2 : SAMPLE_RATE]
    assert np.abs(middle).max() == pytest.approx(0.25, abs=0.03)  # mean of a channel with 0.5 and a silent one
    assert np.abs(np.fft.rfft(middle)).argmax() == 220  # 440 Hz in half a second


def test_what_cannot_be_read_is_refused_in_words(tmp_path):
    short = write_video(tmp_path / "short.mp4", seconds=0.5)
    voice = write_video(tmp_path / "voice.m4a", codec=None)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video" * 50)
    for path, message in (
        (short, r"short\.mp4: 0\.50 s; .*Remedy"),
        (voice, r"voice\.m4a: has no video stream \(only sound\).*Remedy"),
        (broken, r"broken\.mp4: not a media file.*Remedy"),
        (tmp_path / "none.mp4", r"none\.mp4: no such file.*Remedy"),
    ):
        with pytest.raises(DataError, match=message):
            read_clip(path)
    few = write_video(tmp_path / "few.mp4")
    for limits, message in (
        ({"frames": 30}, r"20 frames, 30 wanted.*Remedy"),
        ({"max_seconds": 1.5}, r"few\.mp4: 2\.[01] s, limit 1\.5 s.*Remedy"),
        ({"max_pixels": 100}, r"few\.mp4: 98x64 pixels, limit 100.*Remedy"),
    ):
        with pytest.raises(DataError, match=message):
            read_clip(few, **limits)


def test_a_codec_without_a_decoder_is_named(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")

    def refuse(*_, **__):
        raise RuntimeError("[10:00:00] /src/video/video_reader.cc:151: Check failed: cannot find video stream")

    monkeypatch.setattr("dataset.video.decord.VideoReader", refuse)
    with pytest.raises(DataError, match=r"video codec h264 cannot be decoded \(Check failed.*libx264"):
        read_clip(path)
    assert probe(path).audio == "aac"


@pytest.mark.smoke
def test_a_movie_is_what_was_written(tmp_path):
    frames = np.zeros((5, 33, 47, 3), np.uint8)
    frames[..., 0] = (np.arange(5) * 50)[:, None, None]
    sound = (0.2 * np.sin(np.arange(2 * SAMPLE_RATE) / 5)).astype(np.float32)
    write_mp4(tmp_path / "m.mp4", frames, 2.0, sound, SAMPLE_RATE)
    back = read_clip(tmp_path / "m.mp4", frames=5)
    assert back.frames.shape == (5, 34, 48, 3) and back.seconds == pytest.approx(2)  # H.264 wants even sides
    assert np.abs(back.frames[:, 10, 10, 0].astype(int) - frames[:, 10, 10, 0]).max() < 12
    assert np.abs(back.sound).max() == pytest.approx(0.2, abs=0.03)
    write_gif(tmp_path / "m.gif", frames, 2.0)
    assert (tmp_path / "m.gif").read_bytes().startswith(b"GIF89a")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained student."""
    folder = tmp_path_factory.mktemp("tiny")
    changes = ("stage=sft", "loss.distill=0", "sft.student_start=init_from", "sft.freeze_mask_decoder=false",
               f"output_dir={folder / 'sft'}")  # fmt: skip
    config = load_config(make_tiny_run(folder), changes)
    tokenizer, seg_id = load_tokenizer(config.model.base, config.model.seg_token)
    save_trained(build_model(config, len(tokenizer), seg_id), folder / "sft/final")
    save_config(config, folder / "sft/final")
    shutil.rmtree(folder / "data")  # a prediction needs no data of the training
    (folder / "cot.jsonl").unlink()
    return folder / "sft"


def predict(checkpoint, video, out, *more):
    arguments = ["--checkpoint", str(checkpoint), "--video", str(video), "--out", str(out)]
    return main([*arguments, "--reference", "The red block.", "--max-new-tokens", "3", *more])


def test_a_video_becomes_overlay_masks_and_answer(checkpoint, tmp_path, capsys):
    video = write_video(tmp_path / "clip.mp4")
    assert predict(checkpoint, video, tmp_path / "out", "--frames", "4") == 0
    printed = capsys.readouterr()
    assert "asks for no mask" in printed.err  # an untrained model
    record = json.loads((tmp_path / "out/answer.json").read_text())
    assert record["reference"] == "The red block." and record["has_seg"] is False and len(record["frames"]) == 4
    assert record["masks"][0]["size"] == [64, 98] and record["frames"][1]["second"] == pytest.approx(0.5)
    assert record["reasoning"] in (tmp_path / "out/answer.txt").read_text()
    masks = sorted((tmp_path / "out/masks").iterdir())
    assert len(masks) == 4 and cv2.imread(str(masks[0])).shape == (64, 98, 3)
    drawn = read_clip(tmp_path / "out/overlay.mp4", frames=4)
    assert drawn.sound is not None and drawn.frames.shape == (4, 4 * 64, 4 * 98, 3)  # enlarged, to be seen


def test_silence_is_asked_for_or_warned_about(checkpoint, tmp_path, capsys):
    video = write_video(tmp_path / "mute.mp4", sound=None)
    assert predict(checkpoint, video, tmp_path / "a", "--frames", "2", "--overlay", "gif") == 0
    assert "mute.mp4: has no sound; the model hears silence. Remedy" in capsys.readouterr().err
    assert (tmp_path / "a/overlay.gif").is_file()
    assert predict(checkpoint, video, tmp_path / "b", "--frames", "2", "--silent") == 0
    assert "has no sound" not in capsys.readouterr().err
    assert predict(checkpoint, video, tmp_path / "c", "--need-sound") == 1
    assert "mute.mp4: has no sound. Remedy" in capsys.readouterr().err and not (tmp_path / "c").exists()
    soundfile.write(tmp_path / "s.wav", np.zeros(800, np.float32), SAMPLE_RATE)
    assert predict(checkpoint, video, tmp_path / "c", "--sound", str(tmp_path / "s.wav")) == 1
    assert "s.wav: 0.05 s. Remedy" in capsys.readouterr().err


def test_a_folder_of_frames_with_its_sound(checkpoint, tmp_path):
    write_clip(tmp_path / "data", "clip")
    shutil.move(tmp_path / "data/media/clip", tmp_path / "clip")
    clip = read_clip(tmp_path / "clip")
    assert len(clip.frames) == 10 and len(clip.sound) == 10 * SAMPLE_RATE
    assert read_clip(tmp_path / "clip/frames").sound is not None  # audio.wav beside the frames
    assert predict(checkpoint, tmp_path / "clip", tmp_path / "out") == 0


def test_no_checkpoint(tmp_path, capsys):
    video = write_video(tmp_path / "clip.mp4")
    assert predict(tmp_path / "nothing", video, tmp_path / "out") == 1
    assert "holds no config.yaml" in capsys.readouterr().err
