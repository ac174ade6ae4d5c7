"""Who writes text about a clip: Gemini, or any server that speaks the OpenAI protocol (vLLM with Qwen-Omni, OpenAI).

The SDKs themselves repeat a request after 429, 5xx, timeouts and failed connections, with growing waits; all else is
decided in `dataset.annotate.engine`. A key is read from the environment when a backend is made, is never written
anywhere, and is cut out of every message.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from mimetypes import guess_type
from pathlib import Path
from typing import Any, Protocol

from dataset.media import frame_indexes, list_images
from dataset.refavs import RefAvsIndex, Row
from utils.errors import AuroraError, DataError

OPENAI_KEY = "OPENAI_API_KEY"
GEMINI_KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
GEMINI_BLOCKED = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY"}
"""Reasons for which Gemini ends an answer that another request would not change."""
NO_REPLY = (ValueError, TypeError, AttributeError, LookupError)
"""What reading an answer raises that is no JSON, or is JSON of another form."""


@dataclass(frozen=True)
class Request:
    """A prompt with the media it speaks of."""

    row: Row
    prompt: str
    frames: tuple[Path, ...]
    """Image files in order of time (JPEG or PNG, as they lie in the data set)."""
    audio: Path
    wrong: str = ""
    """The path that is to be corrected or classified; "" for the writer."""
    attempt: int = 0
    """How many replies to this row were unusable or refused before."""


@dataclass(frozen=True)
class Reply:
    """Text, and its tokens as the service counted them (0 for the mini world)."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0


class Backend(Protocol):
    """Whoever answers; called from several threads."""

    def answer(self, request: Request) -> Reply:
        """One reply, or one of the three errors below."""
        ...


class Unanswered(AuroraError):
    """There is no usable answer now.

    Args:
        message: what happened, without secrets.
        ask_again: whether to ask once more in this run (half an answer); False after the SDK's own repetitions.
        billed: whether the service may have charged for it.
    """

    def __init__(self, message: str, ask_again: bool = False, billed: bool = False) -> None:
        super().__init__(message)
        self.ask_again, self.billed = ask_again, billed


class Blocked(AuroraError):
    """The service refuses this row (safety filter); asking again would change nothing."""


class Rejected(AuroraError):
    """The service refuses the run (wrong key, unknown model, spent quota): the run ends."""


@dataclass(frozen=True)
class Service:
    """Which model is asked, and how."""

    model: str
    base_url: str | None = None  # another endpoint (a server of one's own, a proxy); None = the maker's
    timeout: float = 120.0  # seconds for one request
    retries: int = 6  # the SDK's: OpenAI's obeys Retry-After, Google's doubles its wait and does not read it
    max_tokens: int = 1024  # longest reply; Gemini's thinking counts too
    temperature: float = 0.7  # of sampling


class OpenAIBackend:
    """A chat model behind the OpenAI protocol.

    Raises:
        Rejected: no key in the environment though no server of one's own is named.
    """

    def __init__(self, service: Service) -> None:
        import openai  # an optional package

        self._key = os.environ.get(OPENAI_KEY)
        if not self._key and service.base_url is None:
            raise Rejected(f"{OPENAI_KEY} is not set. Remedy: export it, or name your own server with --base-url.")
        self._sdk, self._service = openai, service
        # the SDK demands a key even for a server that asks for none
        self._client = openai.OpenAI(api_key=self._key or "none", base_url=service.base_url, timeout=service.timeout,
                                     max_retries=service.retries)  # fmt: skip

    def answer(self, request: Request) -> Reply:
        """See `Backend.answer`.

        Raises:
            Unanswered, Blocked, Rejected: see there. DataError: a media file cannot be read.
        """
        images, sound = read_media(request)
        urls = [f"data:{kind};base64,{b64encode(data).decode()}" for kind, data in images]
        content = [
            *({"type": "image_url", "image_url": {"url": url}} for url in urls),
            {"type": "input_audio", "input_audio": {"data": b64encode(sound).decode(), "format": "wav"}},
            {"type": "text", "text": request.prompt},
        ]
        sdk, service = self._sdk, self._service
        try:
            found = self._client.chat.completions.create(
                model=service.model, messages=[{"role": "user", "content": content}],
                max_tokens=service.max_tokens, temperature=service.temperature,
            )  # fmt: skip
            reason, text, usage = found.choices[0].finish_reason, found.choices[0].message.content, found.usage
        except sdk.APIConnectionError as error:  # timeouts among them
            raise Unanswered(f"no answer: {redacted(error.__cause__ or error, self._key)}", billed=True) from error
        except sdk.APIStatusError as error:
            code, kind = error.status_code, str(getattr(error, "code", "") or "")
            text = f"status {code}: {redacted(error, self._key)}"
            if kind == "insufficient_quota":  # a 429 that no wait repairs
                raise Rejected(f"{text}. Remedy: see your account.") from error
            if code in (408, 409, 425, 429) or code >= 500:
                raise Unanswered(text) from error
            if code == 400 and "content" in kind:
                raise Blocked(text) from error
            raise Rejected(f"{text}. Remedy: check --model, --base-url and {OPENAI_KEY}.") from error
        except (sdk.APIError, *NO_REPLY) as error:
            raise Unanswered(f"unreadable answer: {redacted(error, self._key)}", ask_again=True, billed=True) from error
        if reason == "content_filter":
            raise Blocked("content filter")
        return Reply(text or "", *_counts(usage, "prompt_tokens", "completion_tokens"))


class GeminiBackend:
    """Gemini through Google's SDK `google-genai` (paper section 3.2: Gemini 2.5 Pro corrects).

    Raises:
        Rejected: no key in the environment.
    """

    def __init__(self, service: Service) -> None:
        from google import genai  # an optional package
        from google.genai import errors, types

        self._key = next((os.environ[name] for name in GEMINI_KEYS if os.environ.get(name)), None)
        if self._key is None:
            raise Rejected(f"none of {', '.join(GEMINI_KEYS)} is set. Remedy: export one.")
        # errors of the transport reach us as those of httpx, or of its fork httpx2 in newer releases
        http = [import_module(name) for name in ("httpx", "httpx2") if find_spec(name)]
        self._repeated = tuple(kind for m in http for kind in (m.TimeoutException, m.ConnectError))
        self._cut = tuple(m.HTTPError for m in http)
        self._model, self._types, self._errors = service.model, types, errors
        options = types.HttpOptions(base_url=service.base_url, timeout=round(service.timeout * 1000),  # milliseconds
                                    retry_options=types.HttpRetryOptions(attempts=service.retries + 1))  # fmt: skip
        self._client = genai.Client(api_key=self._key, vertexai=False, http_options=options)
        self._config = types.GenerateContentConfig(
            temperature=service.temperature, max_output_tokens=service.max_tokens
        )

    def answer(self, request: Request) -> Reply:
        """See `OpenAIBackend.answer`."""
        part, (images, sound) = self._types.Part, read_media(request)
        parts = [part.from_bytes(data=data, mime_type=kind) for kind, data in (*images, ("audio/wav", sound))]
        parts.append(part.from_text(text=request.prompt))
        try:
            found = self._client.models.generate_content(model=self._model, contents=parts, config=self._config)
            blocked = found.prompt_feedback and found.prompt_feedback.block_reason
            reason = blocked or found.candidates[0].finish_reason
            content = None if blocked else found.candidates[0].content
        except self._repeated as error:
            raise Unanswered(f"no answer: {redacted(error, self._key)}", billed=True) from error
        except self._cut as error:  # the SDK does not repeat after a connection that broke in the middle
            raise Unanswered(f"half an answer: {redacted(error, self._key)}", ask_again=True, billed=True) from error
        except self._errors.APIError as error:
            text = f"status {error.code}: {redacted(error, self._key)}"
            if error.code in (408, 429) or error.code >= 500:
                raise Unanswered(text) from error
            raise Rejected(f"{text}. Remedy: check --model and {' or '.join(GEMINI_KEYS)}.") from error
        except NO_REPLY as error:
            raise Unanswered(f"unreadable answer: {redacted(error, self._key)}", ask_again=True, billed=True) from error
        reason = getattr(reason, "name", reason)  # an enum's member, or the text of one that the SDK does not know
        if blocked or reason in GEMINI_BLOCKED:
            raise Blocked(f"blocked: {reason}")
        text = "".join(p.text for p in (content and content.parts) or () if p.text and not p.thought)
        given, written, thought = _counts(
            found.usage_metadata, "prompt_token_count", "candidates_token_count", "thoughts_token_count"
        )
        return Reply(text, given, written + thought)


def choose_frames(index: RefAvsIndex, clip: str, positions: Sequence[int] | int) -> tuple[Path, ...]:
    """Image files of a clip.

    Args:
        index: says where media lie.
        clip: folder name.
        positions: 0-based seconds (frame t shows second t+1 of the video), or how many evenly spaced frames.

    Raises:
        DataError: the clip has fewer frames than asked for.
    """
    paths = list_images(index.frames_folder(clip))
    if isinstance(positions, int):
        return tuple(paths[i] for i in frame_indexes(len(paths), min(positions, len(paths))))
    if max(positions) >= len(paths):
        raise DataError(f"{index.frames_folder(clip)}: {len(paths)} frames, but frame {max(positions)} is asked for. "
                        "Remedy: restore the clip.")  # fmt: skip
    return tuple(paths[i] for i in positions)


def read_media(request: Request) -> tuple[list[tuple[str, bytes]], bytes]:
    """((MIME type, bytes) of each frame, bytes of the sound), as the files lie on disk.

    Raises:
        DataError: a file cannot be read.
    """
    try:
        images = [(guess_type(path)[0] or "image/jpeg", path.read_bytes()) for path in request.frames]
        return images, request.audio.read_bytes()
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}. Remedy: restore the clip.") from error


def redacted(error: BaseException, *secrets: str | None) -> str:
    """An error's kind and message without the secrets, at most 300 characters, in one line."""
    text = f"{type(error).__name__}: {error}"
    for secret in filter(None, secrets):
        text = text.replace(secret, "<key>")
    return " ".join(text.split())[:300]


def _counts(usage: Any, *names: str) -> list[int]:
    """Token counts of a service's answer; 0 where it does not tell."""
    return [getattr(usage, name, 0) or 0 for name in names]
