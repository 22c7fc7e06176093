"""Servers that live, however it looks: lines break, answers come late, questions are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from engines import small_vllm
from tiny_policy import tiny_tokenizer

from querl.errors import EngineError
from querl.rollout import http_engine
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.http_engine import HttpEngine
from querl.rollout.server import RemoteServer
from querl.types import Completion

PROMPT = (1, 2, 3)
SAMPLING = Sampling(max_tokens=4)


@dataclass
class Answering:
    """vLLM's routes, as far as an engine without weights asks them; all tokens are 5."""

    breaks: int = 0  # requests whose line breaks before they are answered
    alive: int = 200  # what the question whether it lives is answered
    seconds: float = 0.0  # until a request is answered after the one before it
    num_asked: int = 0
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    answering: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.num_asked += 1
        if self.num_asked <= self.breaks:
            assert request.transport is not None
            request.transport.abort()
        num_tokens = body["sampling_params"]["max_tokens"]
        reason = "length"
        if num_tokens > 4:  # too long to end before a pause
            await self.cut.wait()
            num_tokens, reason = 2, "abort"
        async with self.answering:
            await asyncio.sleep(self.seconds)
        return web.json_response(
            {
                "choices": [
                    {
                        "token_ids": [5] * num_tokens,
                        "logprobs": {"content": [{"logprob": -0.5}] * num_tokens},
                        "finish_reason": reason,
                    }
                ]
            }
        )

    async def pause(self, request: web.Request) -> web.Response:
        self.cut.set()
        return web.json_response({})

    async def tell(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=self.alive)

    async def agree(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})


@asynccontextmanager
async def engine_of(
    answering: Answering, *, heartbeat_s: float = 15.0
) -> AsyncIterator[HttpEngine]:
    app = web.Application()
    app.router.add_get("/health", answering.agree)
    for route, handler in {
        "/inference/v1/generate": answering.generate,
        "/collective_rpc": answering.tell,
        "/pause": answering.pause,
        "/resume": answering.agree,
        "/sleep": answering.agree,
        "/wake_up": answering.agree,
    }.items():
        app.router.add_post(route, handler)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    engine = HttpEngine(
        small_vllm(Path("none")),
        RemoteServer(f"http://{host}:{port}", start_timeout_s=10.0),
        tiny_tokenizer(),
        context=256,
        heartbeat_s=heartbeat_s,
    )
    try:
        yield engine
    finally:
        await engine.close()
        await runner.cleanup()


async def sample(engine: HttpEngine, number: int = 0) -> Completion:
    return await engine.generate(PROMPT, SAMPLING, RequestKey(0, 0, 0, number, 0))


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        async with asyncio.timeout(60):
            return await work()

    return asyncio.run(go())


def test_a_request_whose_line_breaks_is_asked_again_of_a_server_that_lives() -> None:
    answering = Answering(breaks=3)

    async def work() -> int:
        async with engine_of(answering) as engine:
            found = await asyncio.gather(*(sample(engine, number) for number in range(3)))
            assert [completion.token_ids for completion in found] == [(5, 5, 5, 5)] * 3
            return engine.num_restarts

    assert run(work) == 0
    assert answering.num_asked == 6


def test_a_request_that_breaks_every_line_ends_with_its_reason() -> None:
    answering = Answering(breaks=10**9)

    async def work() -> None:
        async with engine_of(answering) as engine:
            with pytest.raises(EngineError, match="failed again after it was started anew"):
                await sample(engine)

    run(work)
    assert answering.num_asked == http_engine.MOST_BROKEN + 2


def test_a_slow_server_that_refuses_to_say_whether_it_lives_is_let_be() -> None:
    async def work() -> int:
        async with engine_of(Answering(alive=503, seconds=1.0), heartbeat_s=0.2) as engine:
            assert len((await sample(engine)).token_ids) == 4
            return engine.num_restarts

    assert run(work) == 0


@pytest.mark.slow
def test_what_a_pause_has_cut_is_kept_though_seconds_lie_between_its_answers() -> None:
    async def work() -> tuple[Completion, ...]:
        answering = Answering(seconds=3.0)
        async with engine_of(answering, heartbeat_s=1.0) as engine:
            long = Sampling(max_tokens=6)
            keys = [RequestKey(0, 0, 0, number, 0) for number in range(2)]
            asked = [asyncio.create_task(engine.generate(PROMPT, long, key)) for key in keys]
            while answering.num_asked < 2:
                await asyncio.sleep(0.01)
            await engine.sleep()
            answering.seconds = 0.0
            await engine.wake()
            found = await asyncio.gather(*asked)
        assert answering.num_asked == 4
        return tuple(found)

    for completion in run(work):
        assert completion.token_ids == (5,) * 6
