"""A small chat endpoint of OpenAI's kind: real HTTP on 127.0.0.1, answers by script."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Answer = Callable[["Asked"], Awaitable[web.Response]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request: its JSON body, its key, how many came before it."""

    body: dict[str, Any]
    authorization: str | None
    number: int

    @property
    def prompt(self) -> str:
        """All that the model reads."""
        return "\n".join(message["content"] for message in self.body["messages"])

    @property
    def num_turns(self) -> int:
        """How many turns the model has had before."""
        return sum(message["role"] == "assistant" for message in self.body["messages"])


@dataclass(slots=True)
class Endpoint:
    """A running endpoint: where it is, what it was asked, and how many calls were open at most."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0


def chat(content: str | None, finish: str = "stop", **more: Any) -> web.Response:
    """A chat completion; ``more`` are fields of its message, ``usage`` and ``choice`` apart."""
    usage = more.pop("usage", {"prompt_tokens": 9, "completion_tokens": 7})
    choice = more.pop("choice", {})
    message = {"role": "assistant", "content": content, **more}
    choices = [{"index": 0, "message": message, "finish_reason": finish, **choice}]
    return web.json_response({"object": "chat.completion", "choices": choices, "usage": usage})


def refusal(
    status: int, message: str, *, retry_after: float | None = None, **more: Any
) -> web.Response:
    """An error as OpenAI words it."""
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    return web.json_response(
        {"error": {"message": message, **more}}, status=status, headers=headers
    )


@contextmanager
def chat_endpoint(answer: Answer) -> Iterator[Endpoint]:
    """Serves ``answer`` in a thread of its own until the block ends."""
    loop = asyncio.new_event_loop()
    endpoint = Endpoint("")

    async def handle(request: web.Request) -> web.Response:
        asked = Asked(
            body=await request.json(),
            authorization=request.headers.get("Authorization"),
            number=len(endpoint.asked),
        )
        endpoint.asked.append(asked)
        endpoint.num_open += 1
        endpoint.most_open = max(endpoint.most_open, endpoint.num_open)
        try:
            return await answer(asked)
        finally:
            endpoint.num_open -= 1

    async def start() -> web.AppRunner:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        runner = asyncio.run_coroutine_threadsafe(start(), loop).result(timeout=10)
        host, port = runner.addresses[0][:2]
        endpoint.url = f"http://{host}:{port}/v1"
        try:
            yield endpoint
        finally:
            asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(timeout=10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
