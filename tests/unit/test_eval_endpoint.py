"""``querl eval`` at a chat endpoint: the demo's tasks, judged and told as a local model's are."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from chat_endpoint import Answer, Asked, Endpoint, chat, chat_endpoint, refusal
from console import Querl

from querl import records
from querl.data import demo
from querl.data.synth import Question

ROOT = Path(__file__).parents[2]
NUM_TASKS = 16


@pytest.fixture(scope="module")
def questions() -> dict[str, Question]:
    """The demo's validation questions by their words; one of several databases is enough."""
    return {one.task.question: one for one in demo.questions(None, "val")}


def asked_question(asked: Asked) -> str:
    found = re.search(r"^question: (.*)$", asked.body["messages"][0]["content"], re.MULTILINE)
    assert found is not None
    return found[1]


def knowing(questions: dict[str, Question]) -> Answer:
    """Looks once at what a question hides, then gives the gold; stop strings are taken off."""

    async def answer(asked: Asked) -> web.Response:
        question = questions[asked_question(asked)]
        if question.probe_sql and asked.num_turns == 0:
            return chat(f"<think>look</think>\n<sql>{question.probe_sql}")
        return chat(f"<think>so</think>\n<solution>{question.task.gold_sql}")

    return answer


def run_eval(
    querl: Querl, endpoint: Endpoint, folder: Path, *arguments: str
) -> tuple[dict[str, Any], str]:
    """The summary that it writes, and what it prints."""
    code, out, err = querl(
        "eval",
        ROOT / "recipes" / "demo.toml",
        "engine.kind=openai",
        f"engine.url={endpoint.url}",
        "model.path=parrot-7b",
        f"data.max_validation={NUM_TASKS}",
        "--json",
        folder / "summary.json",
        *arguments,
    )
    assert code == 0, err
    return json.loads((folder / "summary.json").read_text()), out


def test_a_model_that_knows_all_is_right_in_all(
    querl: Querl, questions: dict[str, Question], tmp_path: Path
) -> None:
    with chat_endpoint(knowing(questions)) as endpoint:
        summary, shown = run_eval(querl, endpoint, tmp_path, "--out", str(tmp_path / "episodes"))
    assert summary["accuracy"] == 1
    assert 0 < summary["used_tool"] < 1
    assert "parrot-7b" in shown
    assert all(asked.body["temperature"] == 0 for asked in endpoint.asked)
    assert summary["mean_tokens"] == 7 * summary["mean_turns"]  # what usage told
    groups = records.read_groups(tmp_path / "episodes", 0)
    looked = [group for group in groups if len(group.trajectories[0].turns) == 2]
    assert len(groups) == NUM_TASKS
    assert len(looked) == summary["used_tool"] * NUM_TASKS
    first, last = looked[0].trajectories[0].turns
    assert first.text.endswith("</sql>")
    assert first.observation.startswith("<observation>")
    assert last.prompt_ids[: len(first.prompt_ids)] == first.prompt_ids
    second_turns = [asked for asked in endpoint.asked if asked.num_turns == 1]
    roles = [message["role"] for message in second_turns[0].body["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_what_goes_wrong_with_one_question_is_told_of_it_alone(
    querl: Querl, questions: dict[str, Question], tmp_path: Path
) -> None:
    fates: dict[str, int] = {}
    know = knowing(questions)

    async def unlucky(asked: Asked) -> web.Response:
        fate = fates.setdefault(asked_question(asked), len(fates))
        match fate:
            case 0:
                return chat("<think>so</think>\n<solution>SELECT 'no'")
            case 1:
                return chat(None, "content_filter")
            case 2:
                return chat("<think>it goes on and on", "length")
            case 3 if asked.num_turns == 0:
                return chat("<think>what?</think>")
            case 4:
                return refusal(500, "boom", retry_after=0.01)
        if asked.number % 5 == 0:
            return refusal(429, "slow down", retry_after=0.01)
        return await know(asked)

    with chat_endpoint(unlucky) as endpoint:
        summary, _ = run_eval(
            querl, endpoint, tmp_path, "engine.max_batch=3", "--out", str(tmp_path / "episodes")
        )
    assert summary["accuracy"] == (NUM_TASKS - 4) / NUM_TASKS
    assert summary["verdicts"]["mismatch"] == 1
    assert summary["stops"] == {
        "answered": NUM_TASKS - 3,
        "out_of_turns": 1,
        "truncated": 1,
        "failed": 1,
    }
    errors = [
        trajectory.error
        for group in records.read_groups(tmp_path / "episodes", 0)
        for trajectory in group.trajectories
        if trajectory.error
    ]
    assert len(errors) == 1
    assert "boom" in errors[0]


def test_no_more_than_max_batch_calls_are_open_at_a_time(
    querl: Querl, questions: dict[str, Question], tmp_path: Path
) -> None:
    know = knowing(questions)
    are_three = asyncio.Event()

    async def slow(asked: Asked) -> web.Response:
        if endpoint.num_open == 3:
            are_three.set()
        async with asyncio.timeout(60):
            await are_three.wait()
        await asyncio.sleep(0.02)  # time for a fourth to come
        return await know(asked)

    with chat_endpoint(slow) as endpoint:
        summary, _ = run_eval(querl, endpoint, tmp_path, "engine.max_batch=3")
    assert summary["accuracy"] == 1
    assert endpoint.most_open == 3


def test_samples_give_pass_at_k_and_differ_in_their_seeds(
    querl: Querl, questions: dict[str, Question], tmp_path: Path
) -> None:
    async def every_other(asked: Asked) -> web.Response:
        gold = questions[asked_question(asked)].task.gold_sql
        return chat(f"<think>so</think>\n<solution>{gold if asked.body['seed'] % 2 else 'SELECT'}")

    with chat_endpoint(every_other) as endpoint:
        summary, shown = run_eval(
            querl,
            endpoint,
            tmp_path,
            "engine.temperature=0.8",
            "--samples",
            "4",
            "--judge",
            "bird",
        )
    assert {asked.body["temperature"] for asked in endpoint.asked} == {0.8}
    assert len({asked.body["seed"] for asked in endpoint.asked}) == 4 * NUM_TASKS
    assert 0 < summary["accuracy"] < summary["pass_at"]["2"] < summary["pass_at"]["4"] <= 1
    assert "judge bird" in shown


def test_stepwise_shows_no_earlier_thought(
    querl: Querl, questions: dict[str, Question], tmp_path: Path
) -> None:
    with chat_endpoint(knowing(questions)) as endpoint:
        summary, _ = run_eval(
            querl, endpoint, tmp_path, "env.history=stepwise", "env.keep_thoughts=false"
        )
    assert summary["accuracy"] == 1
    later = [asked.prompt for asked in endpoint.asked if asked.num_turns]
    assert later
    assert not any("<think>" in prompt for prompt in later)


def test_a_refused_parameter_is_told_to_the_user(
    querl: Querl, questions: dict[str, Question], tmp_path: Path
) -> None:
    know = knowing(questions)

    async def without_temperature(asked: Asked) -> web.Response:
        if "temperature" in asked.body:
            return refusal(400, "'temperature' is not supported", param="temperature")
        return await know(asked)

    with chat_endpoint(without_temperature) as endpoint:
        summary, shown = run_eval(querl, endpoint, tmp_path)
    assert summary["accuracy"] == 1
    assert shown.count("note: the endpoint refuses temperature: its own default holds") == 1


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("model.path=parrot",), "engine.url"),
        (("engine.url=http://127.0.0.1:1/v1",), "model.path"),
        (("engine.url=127.0.0.1:1/v1", "model.path=parrot"), "http://"),
        (("engine.url=http://me:secret@127.0.0.1:1/v1", "model.path=parrot"), "OPENAI_API_KEY"),
        (
            ("engine.url=http://127.0.0.1:1/v1", "model.path=parrot", "env.history=single"),
            "env.history=conversation",
        ),
    ],
)
def test_what_no_endpoint_can_play_is_refused_in_one_line(
    querl: Querl, overrides: tuple[str, ...], named: str
) -> None:
    code, _, err = querl("eval", ROOT / "recipes" / "demo.toml", "engine.kind=openai", *overrides)
    assert code == 2
    assert err.startswith("querl: ")
    assert err.count("\n") == 1
    assert named in err
    assert "secret" not in err


def test_an_endpoint_that_wants_a_key_names_the_variable(
    querl: Querl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    async def locked(asked: Asked) -> web.Response:
        return chat("in") if asked.authorization == "Bearer sk-right" else refusal(401, "who?")

    with chat_endpoint(locked) as endpoint:
        arguments = (
            *("eval", ROOT / "recipes" / "demo.toml", "engine.kind=openai", "model.path=parrot"),
            *(f"engine.url={endpoint.url}", "data.max_validation=2"),
        )
        code, _, err = querl(*arguments)
        assert (code, err.count("\n")) == (2, 1)
        assert "OPENAI_API_KEY is not set" in err
        monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
        code, out, _ = querl(*arguments)
    assert code == 0
    assert "sk-right" not in out


def test_the_doctor_looks_for_no_model_here(querl: Querl) -> None:
    at_endpoint = ("doctor", ROOT / "recipes" / "demo.toml", "engine.kind=openai")
    code, out, _ = querl(*at_endpoint, "engine.url=http://127.0.0.1:1/v1", "model.path=parrot")
    assert (code, out.rstrip().splitlines()[-1]) == (0, "ready")
    code, out, _ = querl(*at_endpoint, "model.path=parrot")
    assert code == 1
    assert "missing: engine.kind=openai needs an endpoint: set engine.url" in out
