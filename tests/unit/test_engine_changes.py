"""Engines over HTTP whose server is lost, or whose caller is, while what it holds is changed."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from engines import SmallVllm, processes, save_policy, small_vllm, vllm_engine
from tiny_policy import tiny_policy, tiny_tokenizer
from unit.test_http_engine import (
    KEY,
    LONG,
    OTHER,
    PROMPT,
    assert_sampled_by_other,
    never_ready,
    run,
    strike,
)

from querl.errors import DataError, EngineError
from querl.rollout.http import Http
from querl.rollout.http_engine import HttpEngine
from querl.rollout.server import RemoteServer, ServerProcess, wait_until_ready
from querl.trainer.weights import PublishedWeights
from querl.types import Completion


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of a model; at the end of a test no process that was started with it may live."""
    yield save_policy(tiny_policy(), tmp_path)
    assert processes(tmp_path) == []


@pytest.mark.slow
def test_weights_for_a_server_that_died_reach_the_one_after_it(folder: Path) -> None:
    async def work(engine: HttpEngine) -> Completion:
        await engine.generate(PROMPT, LONG, KEY)
        strike(folder, signal.SIGKILL)
        await engine.load_weights(PublishedWeights(OTHER), version=7)
        return await engine.generate(PROMPT, LONG, KEY)

    engine = vllm_engine(folder)
    assert_sampled_by_other(run(engine, work))
    assert engine.num_restarts == 1


class Slow(PublishedWeights):
    """Take a while to be read."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for named in super().tensors():
            signal.sigtimedwait([], 0.02)
            yield named


@pytest.mark.slow
def test_who_stops_waiting_for_new_weights_leaves_an_engine_that_has_them(folder: Path) -> None:
    async def work(engine: HttpEngine) -> Completion:
        await engine.generate(PROMPT, LONG, KEY)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await engine.load_weights(Slow(OTHER), version=7)
        async with asyncio.timeout(30):
            return await engine.generate(PROMPT, LONG, KEY)

    assert_sampled_by_other(run(vllm_engine(folder), work))


class Unreadable(PublishedWeights):
    """Weights that their owner cannot give."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise DataError("no such weights")


@pytest.mark.slow
def test_weights_that_cannot_be_read_leave_nobody_waiting(folder: Path) -> None:
    async def work(engine: HttpEngine) -> None:
        asked = asyncio.create_task(engine.generate(PROMPT, LONG, KEY))
        await engine.generate(PROMPT, LONG, KEY)
        with pytest.raises(DataError, match="no such weights"):
            await engine.load_weights(Unreadable(OTHER), version=7)
        async with asyncio.timeout(30):
            await asyncio.gather(asked, return_exceptions=True)
            with pytest.raises(EngineError, match="no such weights"):
                await engine.generate(PROMPT, LONG, KEY)

    run(vllm_engine(folder), work)


@pytest.mark.slow
def test_a_server_that_froze_before_new_weights_is_found_out_as_in_mid_rollout(
    folder: Path,
) -> None:
    async def work(engine: HttpEngine) -> Completion:
        await engine.generate(PROMPT, LONG, KEY)
        strike(folder, signal.SIGSTOP)
        async with asyncio.timeout(60):
            await engine.load_weights(PublishedWeights(OTHER), version=7)
        return await engine.generate(PROMPT, LONG, KEY)

    engine = vllm_engine(folder, heartbeat_s=1.0)
    assert_sampled_by_other(run(engine, work))
    assert engine.num_restarts == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_for_the_log_does_not_end_the_run(folder: Path) -> None:
    server = ServerProcess(small_vllm(folder), python=sys.executable, log=Path("/dev/full"))
    server.note("to be started anew")
    assert len(server.last_words()) < 2**17


class Misdirected(SmallVllm):
    """Asks on a route that answers something else."""

    def request(self, *args: Any, **kwargs: Any) -> tuple[str, dict[str, Any]]:
        return "/reset_prefix_cache", super().request(*args, **kwargs)[1]


@pytest.mark.slow
def test_an_answer_that_is_no_completion_is_told_with_where_it_came_from(folder: Path) -> None:
    dialect = Misdirected(small_vllm(folder)._settings)
    server = ServerProcess(dialect, python=sys.executable, log=folder / "engine.log")
    engine = HttpEngine(dialect, server, tiny_tokenizer(), context=256)

    async def work(engine: HttpEngine) -> None:
        with pytest.raises(EngineError, match=r"answers otherwise than vllm does \(KeyError"):
            await engine.generate(PROMPT, LONG, KEY)

    run(engine, work)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the server could not bind then")
def test_nobody_is_given_a_servers_port_while_it_starts(folder: Path) -> None:
    engine = never_ready(folder, ["sh", "-c", "sleep 60; true", str(folder)])

    async def work(engine: HttpEngine) -> None:
        engine._server.launch()
        port = int(engine._server.url.rpartition(":")[2])
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))

    run(engine, work)


def test_only_the_log_of_a_server_that_failed_is_left_behind(folder: Path) -> None:
    async def start(engine: HttpEngine) -> None:
        engine._server.launch()

    async def fail(engine: HttpEngine) -> None:
        with pytest.raises(EngineError, match="ended while it started"):
            await engine.generate(PROMPT, LONG, KEY)

    log = folder / "engine.log"
    run(never_ready(folder, ["sh", "-c", "echo well; sleep 60; true", str(folder)]), start)
    assert not log.exists()
    run(never_ready(folder, ["sh", "-c", "echo broken; exit 3", str(folder)]), fail)
    assert log.read_text() == "broken\n"


@asynccontextmanager
async def gate(key: str) -> AsyncIterator[str]:
    """The URL of something real that is ready for who has the key."""

    async def health(request: web.Request) -> web.Response:
        is_let_in = request.headers.get("Authorization") == f"Bearer {key}"
        return web.Response(status=200 if is_let_in else 401)

    app = web.Application()
    app.router.add_get("/health", health)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def wait_for_gate(headers: dict[str, str]) -> None:
    async with gate("open sesame") as url:
        server = RemoteServer(url, start_timeout_s=60.0, headers=headers)
        http = Http(server.url, headers=server.headers)
        try:
            await wait_until_ready(server, small_vllm(Path("none")), http)
        finally:
            await http.close()


def test_a_server_elsewhere_is_given_its_key_and_asked_for_it_only_once() -> None:
    asyncio.run(wait_for_gate({"Authorization": "Bearer open sesame"}))
    with pytest.raises(EngineError, match=r"refused: 401.*set its key.*VLLM_API_KEY"):
        asyncio.run(asyncio.wait_for(wait_for_gate({}), timeout=30))


def test_a_server_of_ours_asks_for_no_key_that_another_one_has(folder: Path) -> None:
    assert small_vllm(folder).environment()["VLLM_API_KEY"] == ""


def test_a_wrong_url_is_told_with_what_went_wrong_there() -> None:
    async def wait() -> None:
        server = RemoteServer("https://127.0.0.1:1", start_timeout_s=0.5)
        http = Http(server.url)
        try:
            await wait_until_ready(server, small_vllm(Path("none")), http)
        finally:
            await http.close()

    with pytest.raises(EngineError, match=r"not ready after 0\.5 s \(.*Cannot connect"):
        asyncio.run(wait())


def test_an_interpreter_that_is_not_there_is_told_in_one_line(folder: Path) -> None:
    async def work(engine: HttpEngine) -> None:
        with pytest.raises(EngineError, match=r"/no/python: No such file.*: set engine\.python"):
            await engine.generate(PROMPT, LONG, KEY)

    run(never_ready(folder, ["/no/python", str(folder)]), work)
    assert "Traceback" not in (folder / "engine.log").read_text()


@pytest.mark.slow
def test_a_server_that_froze_asleep_is_found_out_before_it_wakes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("querl.rollout.vllm.ALIVE_S", 1.0)

    async def work(engine: HttpEngine) -> Completion:
        await engine.load_weights(PublishedWeights(OTHER), version=7)
        await engine.sleep()
        strike(folder, signal.SIGSTOP)
        async with asyncio.timeout(60):
            await engine.wake()
        return await engine.generate(PROMPT, LONG, KEY)

    engine = vllm_engine(folder)
    assert_sampled_by_other(run(engine, work))
    assert engine.num_restarts == 1
