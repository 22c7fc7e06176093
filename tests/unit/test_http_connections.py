"""Many calls at once do not reach a server as one heap, which one of its processes would take."""

from __future__ import annotations

import asyncio
from collections import Counter

from querl.rollout.http import Http

CALLS = 60


def test_connections_are_opened_one_after_another() -> None:
    async def main() -> Counter[int]:
        turn = 0
        came: Counter[int] = Counter()

        async def count_turns() -> None:
            nonlocal turn
            while True:
                turn += 1
                await asyncio.sleep(0)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came[turn] += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        counting = asyncio.create_task(count_turns())
        http = Http(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        try:
            await asyncio.gather(*(http.get("/") for _ in range(CALLS)))
        finally:
            counting.cancel()
            await http.close()
            server.close()
        return came

    came = asyncio.run(main())
    assert came.total() == CALLS
    assert max(came.values()) < CALLS / 10
