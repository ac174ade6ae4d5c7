"""A local server that speaks OpenAI's and Gemini's protocols and misbehaves by plan."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

TRANSIENT = ("429", "429_after", "500", "503", "hang", "cut", "no_json", "no_object", "no_choices", "empty", "no_parts")
"""Faults after which asking again helps."""


def good_answer(prompt: str) -> str:
    """A correct reply to the shipped prompts: the two-part correction, or a written chain."""
    reference = re.findall(r"Reference: \"?([^\"\n]+)", prompt)[-1] if "LVLM" in prompt else ""
    found = re.search(r"The LVLM's answer: (.*)\nThe final correct result: (.*)\n", prompt)
    if found is None:
        target = re.findall(r"Target: \"([^\"]+)\"", prompt)
        return (
            "The images show a thing that is held. The audio contains its sound. The reference asks for it. "
            f"So the target is {target[0]}."
        )
    wrong, target = found.groups()
    name = wrong.rsplit(" ", 1)[-1].rstrip(".")
    first, second = f'{wrong.removesuffix(name + ".")}"{name}".', f'{wrong.removesuffix(name + ".")}"{target}".'
    assert reference
    return f"(1) The original LVLM's answer: {first}\n(2) Your corrected answer: {second}"


class MisbehavingServer:
    """Serve on loopback; `plan[number]` lists what happens to the successive requests of "thing number <number>"."""

    def __init__(self, plan: dict[int, list[str]], always: str | None = None) -> None:
        self.plan = {number: list(faults) for number, faults in plan.items()}
        self.always = always
        self.requests: list[tuple[int, str]] = []
        self.answered: dict[int, int] = defaultdict(int)
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                server.handle(self, json.loads(body), body)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]

    def __enter__(self) -> MisbehavingServer:
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def url(self, backend: str) -> str:
        return f"http://127.0.0.1:{self.port}" + ("/v1" if backend == "openai" else "")

    def handle(self, request: BaseHTTPRequestHandler, body: dict, raw: bytes) -> None:
        prompt, media = _read(body)
        number = int(re.findall(r"thing number (\d+)", prompt)[-1])
        with self.lock:
            faults = self.plan.get(number, [])
            fault = self.always or (faults.pop(0) if faults else "good")
            self.requests.append((number, fault))
        assert media > 1
        secret = request.headers.get("Authorization") or request.headers.get("x-goog-api-key") or ""
        gemini = "generateContent" in request.path
        if fault == "hang":
            time.sleep(1.2)
        if fault in ("cut", "hang"):
            request.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{")
            request.wfile.flush()
            with contextlib.suppress(OSError):  # the client may have given up already
                request.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault in ("401", "429", "429_after", "500", "503"):
            # an unfriendly service that repeats the key in its error
            error = {"error": {"code": int(fault[:3]), "message": f"failed for {secret}", "status": "FAILED"}}
            return _send(request, int(fault[:3]), json.dumps(error), {"Retry-After": "0.02"} if "_" in fault else {})
        if fault == "no_json":
            return _send(request, 200, '{"choices": [')
        if fault in ("no_object", "no_choices"):
            return _send(request, 200, "[7]" if fault == "no_object" else "{}")
        text = {"empty": "", "no_parts": "I think it is a cat.", "right": " Right. "}.get(fault) or good_answer(prompt)
        text = "" if fault == "empty" else text
        with self.lock:
            self.answered[number] += 1
        return _send(request, 200, json.dumps(_gemini(text, fault) if gemini else _openai(text, fault)))


def _read(body: dict) -> tuple[str, int]:
    """(prompt, number of media parts) of either protocol."""
    if "contents" in body:
        parts = body["contents"][0]["parts"]
        return "".join(p.get("text", "") for p in parts), sum("inlineData" in p for p in parts)
    parts = body["messages"][0]["content"]
    return "".join(p.get("text", "") for p in parts), sum(p["type"] != "text" for p in parts)


def _openai(text: str, fault: str) -> dict:
    message = {"role": "assistant", "content": text}
    reason = "content_filter" if fault == "blocked" else "stop"
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100},
    }  # fmt: skip


def _gemini(text: str, fault: str) -> dict:
    usage = {"promptTokenCount": 1000, "candidatesTokenCount": 60, "thoughtsTokenCount": 40, "totalTokenCount": 1100}
    if fault == "blocked":
        return {"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": usage}
    content = {"role": "model", "parts": [{"text": "thinking", "thought": True}, {"text": text}]}
    return {"candidates": [{"content": content, "finishReason": "STOP"}], "usageMetadata": usage}


def _send(request: BaseHTTPRequestHandler, status: int, text: str, headers: dict[str, str] | None = None) -> None:
    data = text.encode()
    request.send_response(status)
    own = {"Content-Type": "application/json", "Content-Length": str(len(data))}
    for name, value in {**own, **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(data)
