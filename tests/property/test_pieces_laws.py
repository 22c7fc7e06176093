"""A completion that pauses cut anywhere is the completion that nothing cut."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import tiny_tokenizer

from querl.rollout.dialect import Piece
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.http import Http
from querl.rollout.http_engine import HttpEngine
from querl.rollout.pieces import Pieces
from querl.rollout.server import RemoteServer
from querl.types import Completion, FinishReason

TOKENIZER = tiny_tokenizer()
PROMPT = (1, 2, 3)
KEY = RequestKey(seed=0, step=0, group=0, sample=0, turn=0)
LETTERS = [i for i in range(len(TOKENIZER)) if TOKENIZER.decode([i]) in tuple("SELECT name ='1")]
END_ID = 0


def next_token(ids: Sequence[int]) -> int:
    """A function of all tokens before it, as greedy decoding is; one in fifty ends."""
    number = hashlib.sha256(repr(tuple(ids)).encode()).digest()[0]
    return END_ID if number < 5 else LETTERS[number % len(LETTERS)]


def completed(
    prompt: Sequence[int], max_tokens: int, stop: Sequence[str], cut_after: int | None
) -> dict[str, Any]:
    """As a server does it: it sees stop strings in what this one request has sampled."""
    said: list[int] = []
    while len(said) < max_tokens:
        if len(said) == cut_after:
            return {"token_ids": said, "finish": None}
        said.append(next_token((*prompt, *said)))
        if said[-1] == END_ID:
            return {"token_ids": said, "finish": FinishReason.END}
        if any(text in str(TOKENIZER.decode(said)) for text in stop):
            return {"token_ids": said, "finish": FinishReason.STOP}
    return {"token_ids": said, "finish": FinishReason.LENGTH}


def piece(answer: Mapping[str, Any]) -> Piece:
    ids = tuple(answer["token_ids"])
    finish = None if answer["finish"] is None else FinishReason(answer["finish"])
    return Piece(token_ids=ids, logprobs=tuple(-0.01 * i for i in ids), finish=finish)


class Cutting:
    """A dialect whose server cuts each request as the test wishes."""

    name = "cutting"

    async def is_ready(self, http: Http) -> bool:
        return True

    def request(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int
    ) -> tuple[str, dict[str, Any]]:
        body = {"prompt": prompt_ids, "max_tokens": sampling.max_tokens, "stop": sampling.stop}
        return "/complete", body

    def piece(self, answer: Mapping[str, Any]) -> Piece:
        return piece(answer)


async def sampled(sampling: Sampling, prompt: tuple[int, ...], cuts: list[int]) -> Completion:
    """By an engine whose server cuts request after request after so many tokens."""

    async def complete(request: web.Request) -> web.Response:
        body = await request.json()
        cut_after = cuts.pop(0) if cuts else None
        return web.json_response(
            completed(body["prompt"], body["max_tokens"], body["stop"], cut_after)
        )

    app = web.Application()
    app.router.add_post("/complete", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    server = RemoteServer(f"http://{host}:{port}", start_timeout_s=10)
    engine = HttpEngine(Cutting(), server, TOKENIZER, context=10_000)
    try:
        return await engine.generate(prompt, sampling, KEY)
    finally:
        await engine.close()
        await runner.cleanup()


@settings(max_examples=150, deadline=None)
@given(
    start=st.integers(0, 10**6),
    max_tokens=st.integers(1, 60),
    stop=st.lists(st.text("SELECT name='1", min_size=1, max_size=4), max_size=2),
    cuts=st.lists(st.integers(0, 12), max_size=6),
)
def test_cuts_change_nothing(start: int, max_tokens: int, stop: list[str], cuts: list[int]) -> None:
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, stop=tuple(stop))
    prompt = (*PROMPT, start)
    whole = asyncio.run(sampled(sampling, prompt, []))
    in_pieces = asyncio.run(sampled(sampling, prompt, list(cuts)))
    assert in_pieces == whole
    assert len(whole.versions) == len(whole.token_ids)


@given(
    start=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 12), min_size=1, max_size=6),
)
def test_each_token_keeps_the_version_of_its_piece(start: int, cuts: list[int]) -> None:
    prompt, pieces, expected = (*PROMPT, start), Pieces(TOKENIZER, ()), []
    for version, cut_after in enumerate(cuts):
        if pieces.finish is None:
            found = piece(completed((*prompt, *pieces.token_ids), 99, (), cut_after))
            pieces.add(found, version)
            expected += [version] * len(found.token_ids)
    whole = completed(prompt, len(pieces.token_ids), (), None)
    assert pieces.token_ids == whole["token_ids"]
    assert pieces.versions == expected
