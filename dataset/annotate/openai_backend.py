"""Any server that speaks the OpenAI chat protocol: OpenAI itself, or vLLM serving Qwen-Omni on one's own machines.

The key is read from OPENAI_API_KEY when the backend is made; a server that needs none gets a placeholder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dataset.annotate.backend import Blocked, Rejected, Reply, Request, Transient, encoded, image_type, redacted

KEY = "OPENAI_API_KEY"


class OpenAIBackend:
    """`openai`'s client without its own retries.

    Args:
        model: name of the served model.
        base_url: of the server; None = OpenAI.
        timeout: seconds for one request.
        max_tokens: longest reply.
        temperature: of sampling.

    Raises:
        Rejected: no key in the environment though no server of one's own is named.
    """

    remote = True
    batch_size = 1

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        timeout: float = 120.0,
        max_tokens: int = 1024,
        temperature: float = 0.7,
    ) -> None:
        import openai  # imported late: only the data engine needs it

        self._key = os.environ.get(KEY)
        if not self._key and base_url is None:
            raise Rejected(f"{KEY} is not set. Remedy: export it, or name your own server with --base-url.")
        self.name = f"openai:{model}"
        self._sdk, self._model = openai, model
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        self._client = openai.OpenAI(
            api_key=self._key or "none", base_url=base_url, timeout=timeout, max_retries=0
        )

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """One reply per request.

        Raises:
            Transient, Blocked, Rejected: see `dataset.annotate.backend`.
        """
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Reply:
        sdk = self._sdk
        try:
            found = self._client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": _content(request)}], **self._options
            )
        except sdk.APITimeoutError as error:
            raise Transient("no answer in time", billed=True) from error
        except sdk.APIConnectionError as error:
            raise Transient(f"connection failed: {self._clean(error.__cause__ or error)}", billed=True) from error
        except sdk.APIStatusError as error:
            raise self._status(error) from error
        except (sdk.APIError, ValueError) as error:
            raise Transient(f"the answer is no valid JSON: {self._clean(error)}", billed=True) from error
        choices = getattr(found, "choices", None)
        if not choices:
            raise Transient("the answer holds no choices", billed=True)
        if choices[0].finish_reason == "content_filter":
            raise Blocked("content filter")
        usage = found.usage
        text = choices[0].message.content or ""
        return Reply(text, getattr(usage, "prompt_tokens", 0) or 0, getattr(usage, "completion_tokens", 0) or 0)

    def _status(self, error: Any) -> Transient | Rejected | Blocked:
        code, text = error.status_code, f"status {error.status_code}: {self._clean(error)}"
        if code == 429 and getattr(error, "code", None) == "insufficient_quota":
            return Rejected(f"{text}. Remedy: see your account.")
        if code in (408, 409, 425, 429) or code >= 500:
            return Transient(text, seconds(error.response.headers.get("retry-after")))
        if code == 400 and "content" in str(getattr(error, "code", "") or ""):
            return Blocked(text)
        return Rejected(f"{text}. Remedy: check --model, --base-url and {KEY}.")

    def _clean(self, error: object) -> str:
        return redacted(f"{type(error).__name__}: {error}", self._key)


def seconds(header: str | None) -> float | None:
    """Seconds of a Retry-After header; None if there is none or it is a date."""
    try:
        return None if header is None else max(0.0, float(header))
    except ValueError:
        return None


def _content(request: Request) -> list[dict[str, Any]]:
    """Images, then sound, then the prompt, as parts of one user message."""
    images = [
        {"type": "image_url", "image_url": {"url": f"data:{image_type(path)};base64,{encoded(path)}"}}
        for path in request.frames
    ]
    sound = {"type": "input_audio", "input_audio": {"data": encoded(request.audio), "format": "wav"}}
    return [*images, sound, {"type": "text", "text": request.prompt}]
