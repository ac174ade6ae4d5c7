"""Gemini through Google's SDK `google-genai` (paper section 3.2: Gemini 2.5 Pro corrects).

The key is read from GEMINI_API_KEY or GOOGLE_API_KEY when the backend is made.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from dataset.annotate.backend import Blocked, Rejected, Reply, Request, Transient, file_bytes, image_type, redacted
from dataset.annotate.openai_backend import seconds

KEYS = ("GEMINI_API_KEY", "GOOGLE_API_KEY")
_DELAY = re.compile(r"^(\d+(?:\.\d+)?)s$")
_STOPPED = {"SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "IMAGE_SAFETY"}


class GeminiBackend:
    """`google.genai.Client` without its own retries.

    Args:
        model: e.g. gemini-2.5-pro.
        base_url: another endpoint (a proxy, a test server); None = Google's.
        timeout: seconds for one request.
        max_tokens: longest reply, thinking included.
        temperature: of sampling.

    Raises:
        Rejected: no key in the environment.
    """

    remote = True
    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        timeout: float = 120.0,
        max_tokens: int = 8192,
        temperature: float = 0.7,
    ) -> None:
        from google import genai  # imported late: only the data engine needs it
        from google.genai import errors, types

        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), None)
        if self._key is None:
            raise Rejected(f"none of {', '.join(KEYS)} is set. Remedy: export one.")
        self.name = f"gemini:{model}"
        self._model, self._types, self._errors = model, types, errors
        self._timeouts, self._failures = transport_errors()
        options = types.HttpOptions(base_url=base_url, timeout=round(timeout * 1000))
        self._client = genai.Client(api_key=self._key, vertexai=False, http_options=options)
        self._config = types.GenerateContentConfig(temperature=temperature, max_output_tokens=max_tokens)

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request.

        Raises:
            Transient, Blocked, Rejected: see `dataset.annotate.backend`.
        """
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Reply:
        part = self._types.Part
        parts = [part.from_bytes(data=file_bytes(path), mime_type=image_type(path)) for path in request.frames]
        parts.append(part.from_bytes(data=file_bytes(request.audio), mime_type="audio/wav"))
        parts.append(part.from_text(text=request.prompt))
        try:
            found = self._client.models.generate_content(model=self._model, contents=parts, config=self._config)
        except self._timeouts as error:
            raise Transient("no answer in time", billed=True) from error
        except self._failures as error:
            raise Transient(f"connection failed: {self._clean(error)}", billed=True) from error
        except self._errors.APIError as error:
            raise self._status(error) from error
        except ValueError as error:  # JSON of the body, or its fields
            raise Transient(f"the answer is no valid JSON: {self._clean(error)}", billed=True) from error
        return self._reply(found)

    def _reply(self, found: Any) -> Reply:
        feedback = getattr(found, "prompt_feedback", None)
        if feedback is not None and feedback.block_reason:
            raise Blocked(f"prompt blocked: {_name(feedback.block_reason)}")
        candidate = (found.candidates or [None])[0]
        if candidate is None:
            raise Transient("the answer holds no candidates", billed=True)
        reason = _name(candidate.finish_reason)
        if reason in _STOPPED:
            raise Blocked(f"answer blocked: {reason}")
        parts = candidate.content.parts if candidate.content and candidate.content.parts else []
        text = "".join(part.text for part in parts if part.text and not part.thought)
        usage = found.usage_metadata
        spent = [getattr(usage, name, 0) or 0 for name in ("candidates_token_count", "thoughts_token_count")]
        return Reply(text, getattr(usage, "prompt_token_count", 0) or 0, sum(spent))

    def _status(self, error: Any) -> Transient | Rejected:
        text = f"status {error.code}: {self._clean(error.message or error)}"
        if error.code in (408, 429) or error.code >= 500 or error.code == 200:
            return Transient(text, self._wait(error))
        return Rejected(f"{text}. Remedy: check --model and {' or '.join(KEYS)}.")

    def _wait(self, error: Any) -> float | None:
        """Seconds asked for by the header Retry-After, or by a RetryInfo in the body."""
        headers = getattr(error.response, "headers", None) or {}
        told = seconds(headers.get("retry-after"))
        details = error.details.get("error", {}) if isinstance(error.details, dict) else {}
        for entry in details.get("details", []) if isinstance(details, dict) else []:
            match = _DELAY.match(str(entry.get("retryDelay", ""))) if isinstance(entry, dict) else None
            if told is None and match:
                told = float(match[1])
        return told

    def _clean(self, error: object) -> str:
        kind = "" if isinstance(error, str) else f"{type(error).__name__}: "
        return redacted(f"{kind}{error}", self._key)


def transport_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """(timeouts, all failures) of the HTTP library below the SDK: httpx, or its fork httpx2 in newer releases."""
    modules = [import_module(name) for name in ("httpx", "httpx2") if find_spec(name)]
    return tuple(m.TimeoutException for m in modules), tuple(m.HTTPError for m in modules)


def _name(value: Any) -> str:
    """Name of an enum member, or the text of an unknown one."""
    return str(getattr(value, "name", value) or "")
