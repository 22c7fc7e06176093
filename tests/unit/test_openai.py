"""The engine for chat endpoints, against a real HTTP server that behaves as they do."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from aiohttp import web
from chat_endpoint import Answer, Asked, Endpoint, chat, chat_endpoint, refusal

from querl.env.wire import ACTION_STOPS
from querl.errors import EngineError
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.messages import MessageHistory, MessageIds
from querl.rollout.openai import OpenAiEngine
from querl.types import FinishReason

SAMPLING = Sampling(max_tokens=90, temperature=0.7, stop=ACTION_STOPS)
SECRET = "sk-test-0123456789"


class Spoken:
    """What one conversation with an endpoint gave: texts, how they ended, lengths, notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.finishes: list[FinishReason] = []
        self.lengths: list[int] = []
        self.notes: list[str] = []


def speak(
    endpoint: Endpoint,
    questions: Sequence[str],
    *,
    sampling: Sampling = SAMPLING,
    timeout_s: float = 20.0,
    api_key: str | None = None,
) -> Spoken:
    """Asks all questions at once."""
    spoken = Spoken()

    async def go() -> None:
        ids = MessageIds()
        history = MessageHistory(ids)
        engine = OpenAiEngine(
            endpoint.url,
            "parrot",
            ids,
            api_key=api_key,
            timeout_s=timeout_s,
            say=spoken.notes.append,
        )
        try:
            for completion in await asyncio.gather(
                *(
                    engine.generate(
                        history.start([{"role": "user", "content": question}]),
                        sampling,
                        RequestKey(0, 0, group, 0, 0),
                    )
                    for group, question in enumerate(questions)
                )
            ):
                spoken.texts.append(history.text(completion))
                spoken.finishes.append(completion.finish_reason)
                spoken.lengths.append(len(completion.token_ids))
        finally:
            await engine.close()

    asyncio.run(go())
    return spoken


def served(answer: Answer, *questions: str, **options: object) -> tuple[Spoken, list[Asked]]:
    with chat_endpoint(answer) as endpoint:
        return speak(endpoint, questions, **options), endpoint.asked  # type: ignore[arg-type]


async def echo(asked: Asked) -> web.Response:
    return chat(f"<sql>{asked.prompt}")


def test_a_question_comes_back_answered_as_a_local_model_would() -> None:
    spoken, asked = served(echo, "SELECT 1", api_key=SECRET)
    assert spoken.texts == ["<sql>SELECT 1</sql>"]
    assert spoken.finishes == [FinishReason.STOP]
    assert spoken.lengths == [7]  # as usage says
    body = asked[0].body
    assert asked[0].authorization == f"Bearer {SECRET}"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("parrot", 90, 0.7)
    assert body["messages"] == [{"role": "user", "content": "SELECT 1"}]
    assert "top_p" not in body


def test_each_request_has_a_seed_of_its_own_and_the_same_again() -> None:
    seeds = []
    for _ in range(2):
        _, asked = served(echo, "a", "b")
        seeds.append({one.prompt: one.body["seed"] for one in asked})
    assert seeds[0] == seeds[1]
    assert seeds[0]["a"] != seeds[0]["b"]


def test_a_busy_endpoint_is_asked_again_when_it_says() -> None:
    async def busy_twice(asked: Asked) -> web.Response:
        return refusal(429, "slow down", retry_after=0.01) if asked.number < 2 else chat("late")

    spoken, asked = served(busy_twice, "?")
    assert spoken.texts == ["late"]
    assert len(asked) == 3


def test_failures_of_one_request_lose_it_alone_once_others_are_answered() -> None:
    async def some(asked: Asked) -> web.Response:
        if asked.prompt == "poison":
            return refusal(500, "boom", retry_after=0.01)
        return chat("fine")

    with chat_endpoint(some) as endpoint:
        ids = MessageIds()
        history = MessageHistory(ids)

        async def go() -> None:
            engine = OpenAiEngine(
                endpoint.url, "parrot", ids, api_key=None, timeout_s=20, say=lambda _: None
            )

            async def ask(text: str) -> str:
                prompt_ids = history.start([{"role": "user", "content": text}])
                return history.text(
                    await engine.generate(prompt_ids, SAMPLING, RequestKey(0, 0, 0, 0, 0))
                )

            assert await ask("a") == "fine"
            with pytest.raises(TimeoutError, match=r"500.*boom"):
                await ask("poison")
            assert await ask("b") == "fine"
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await ask("poison")
            with pytest.raises(EngineError, match="boom"):  # nothing else is answered any more
                await ask("poison")
            await engine.close()
            with pytest.raises(EngineError, match="closed"):
                await ask("a")

        asyncio.run(go())


def test_an_endpoint_that_fails_from_the_first_stops_with_its_reason() -> None:
    async def broken(asked: Asked) -> web.Response:
        return refusal(503, "no model loaded", retry_after=0.01)

    with pytest.raises(EngineError, match=r"503.*no model loaded"):
        served(broken, "?")


def test_an_endpoint_that_never_answers_meets_a_deadline() -> None:
    async def silent(asked: Asked) -> web.Response:
        await asyncio.sleep(60)
        return chat("too late")

    with pytest.raises(EngineError, match=r"did not answer in 0\.2 s"):
        served(silent, "?", timeout_s=0.2)


def test_a_place_where_nothing_listens_is_told_at_once() -> None:
    with chat_endpoint(echo) as endpoint:
        pass
    with pytest.raises(EngineError, match=r"engine\.url"):
        speak(endpoint, ["?"])


def test_what_an_endpoint_refuses_is_found_out_once_for_all() -> None:
    async def picky(asked: Asked) -> web.Response:
        for name in ("max_tokens", "temperature", "stop", "seed"):
            if name in asked.body:
                return refusal(400, f"Unsupported parameter: '{name}'", param=name)
        return chat("<sql>SELECT 1</sql> and more")

    spoken, asked = served(picky, *"abcdefgh")
    assert spoken.texts == ["<sql>SELECT 1</sql>"] * 8
    assert len(asked) <= 5 * 8
    assert asked[-1].body["max_completion_tokens"] == 90
    assert sorted(note.split()[3].rstrip(":") for note in spoken.notes) == [
        "seed",
        "stop",
        "temperature",
    ]


def test_a_filter_and_a_full_context_are_empty_turns() -> None:
    async def strict(asked: Asked) -> web.Response:
        if asked.prompt == "bomb":
            return refusal(400, "no", code="content_filter")
        if asked.prompt.startswith("long"):
            return refusal(400, f"maximum context length is 9 tokens: {asked.prompt}")
        return chat(None, "content_filter")

    spoken, asked = served(strict, "bomb", "long", "longer", "rude")
    assert spoken.texts == [""] * 4
    assert spoken.finishes == [
        FinishReason.END,
        FinishReason.LENGTH,
        FinishReason.LENGTH,
        FinishReason.END,
    ]
    assert len(asked) == 4
    assert len(spoken.notes) == 2  # one of the filter, one of the context


@pytest.mark.parametrize(
    ("status", "key", "told"),
    [
        (401, None, "OPENAI_API_KEY is not set"),
        (403, SECRET, "OPENAI_API_KEY is not accepted"),
        (404, None, "model.path='parrot'"),
        (400, None, "teapot"),
    ],
)
def test_a_refusal_for_good_stops_with_one_clear_line(
    status: int, key: str | None, told: str
) -> None:
    async def refuse(asked: Asked) -> web.Response:
        return refusal(status, f"teapot\nrefuses {SECRET}")

    with pytest.raises(EngineError) as stopped:
        served(refuse, "?", api_key=key)
    line = str(stopped.value)
    assert told in line
    assert "\n" not in line
    assert key is None or key not in line


def test_an_error_that_comes_as_an_answer_is_asked_again() -> None:
    async def through_a_router(asked: Asked) -> web.Response:
        if asked.number == 0:
            return web.json_response({"error": {"code": 502, "message": "upstream"}})
        return chat("fine")

    assert served(through_a_router, "?")[0].texts == ["fine"]


def test_no_money_left_is_not_waited_for() -> None:
    async def poor(asked: Asked) -> web.Response:
        return refusal(429, "You exceeded your quota", code="insufficient_quota")

    with pytest.raises(EngineError, match="quota"):
        served(poor, "?")


def test_a_page_that_is_no_endpoint_is_told() -> None:
    async def page(asked: Asked) -> web.Response:
        return web.Response(text="<html>hello</html>", content_type="text/html")

    with pytest.raises(EngineError, match="with no JSON"):
        served(page, "?")


def test_there_is_nothing_to_train() -> None:
    async def go() -> None:
        engine = OpenAiEngine(
            "http://127.0.0.1:9/v1", "m", MessageIds(), api_key=None, timeout_s=1, say=print
        )
        with pytest.raises(EngineError, match="only evaluates"):
            await engine.load_weights(None, version=1)
        await engine.close()

    asyncio.run(go())
