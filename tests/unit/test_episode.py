from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tiny_policy import make_group, tiny_policy, tiny_tokenizer

from querl.algorithm.sample import to_samples
from querl.env.env import Environment, Step
from querl.env.prompts import Prompts, PromptStyle
from querl.env.schema_text import DescribedSchemas, ShownValues
from querl.env.text2sql import Text2Sql
from querl.env.wire import ACTION_STOPS
from querl.errors import EngineError
from querl.rollout.chat import ChatFormat
from querl.rollout.engine import Engine, RequestKey, Sampling
from querl.rollout.episode import EpisodeLimits, run_episode
from querl.rollout.hf import HfEngine
from querl.rollout.history import HISTORIES, History, Stepwise
from querl.rollout.scripted import ScriptedEngine
from querl.sql.schema import SchemaStyle
from querl.sql.worker import SqlitePool
from querl.types import ActionKind, FinishReason, Message, Outcome, StopReason, Task, Trajectory

TOKENIZER = tiny_tokenizer()
KEY = RequestKey(seed=0, step=0, group=0, sample=0, turn=0)
LIMITS = EpisodeLimits(max_prompt=400, max_turn_tokens=200, max_input=2000)
ASK = "<think>look</think>\n<sql>SELECT name FROM city ORDER BY id</sql>"
ANSWER = "<think>so</think>\n<solution>SELECT name FROM city</solution>"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    path = tmp_path / "map.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE city (id INTEGER PRIMARY KEY, name TEXT)")
        connection.execute("INSERT INTO city VALUES (1, 'Rome'), (2, 'Bern')")
    connection.close()
    return Task(id="t", question="Which cities?", database=str(path))


@pytest.fixture(params=HISTORIES)
def history(request: pytest.FixtureRequest) -> History:
    return HISTORIES[request.param](ChatFormat(TOKENIZER))


def sql_env(pool: SqlitePool) -> Environment:
    schemas = DescribedSchemas(pool, style=SchemaStyle.COMPACT, values=ShownValues.NONE)
    return Text2Sql(pool, Prompts(schemas, PromptStyle.SHORT), max_turns=3)


def play(
    task: Task,
    history: History,
    *turns: str,
    make_env: Callable[[SqlitePool], Environment] = sql_env,
    limits: EpisodeLimits = LIMITS,
    temperature: float = 1.0,
) -> Trajectory:
    """An episode in which the model says these turns."""

    async def go() -> Trajectory:
        async with SqlitePool(num_workers=1) as pool:
            return await run_episode(
                make_env(pool),
                ScriptedEngine(TOKENIZER, lambda key, prompt: turns[key.turn]),
                history,
                task=task,
                sampling=Sampling(max_tokens=1, temperature=temperature, stop=ACTION_STOPS),
                limits=limits,
                key=KEY,
            )

    return asyncio.run(go())


def test_an_episode_asks_reads_and_answers(task: Task, history: History) -> None:
    trajectory = play(task, history, ASK, ANSWER)
    first, last = trajectory.turns
    assert trajectory.stop is StopReason.ANSWERED
    assert trajectory.solution == "SELECT name FROM city"
    assert first.text == ASK
    assert first.result is not None
    assert first.result.rows == (("Rome",), ("Bern",))
    assert "Rome\nBern" in first.observation
    assert "Rome\nBern" in TOKENIZER.decode(list(last.prompt_ids))
    sampled = first.prompt_ids + first.completion.token_ids
    assert last.prompt_ids[: len(sampled)] == sampled


def test_stepwise_shows_a_rewritten_history_and_trains_each_turn_alone(task: Task) -> None:
    history = Stepwise(ChatFormat(TOKENIZER), keep_thoughts=False)
    trajectory = play(task, history, ASK, ASK, ANSWER)
    read = TOKENIZER.decode(list(trajectory.turns[-1].prompt_ids))
    assert "look" not in read
    assert read.count("<sql>SELECT name FROM city ORDER BY id</sql><|im_end|>") == 2
    assert read.count("Rome\nBern") == 2
    group = replace(make_group((1.0,)), trajectories=(trajectory,))
    samples, _ = to_samples([group], [[[1.0, 2.0, 3.0]]])
    assert [sample.token_ids for sample in samples] == [
        turn.prompt_ids + turn.completion.token_ids for turn in trajectory.turns
    ]
    assert [sample.num_prompt_tokens for sample in samples] == [
        len(turn.prompt_ids) for turn in trajectory.turns
    ]


def test_text_after_the_action_is_never_sampled(task: Task, history: History) -> None:
    trajectory = play(task, history, f"{ASK}\n<observation>made up</observation>", ANSWER)
    assert [turn.text for turn in trajectory.turns] == [ASK, ANSWER]


def test_void_turns_cost_turns_and_are_corrected(task: Task, history: History) -> None:
    trajectory = play(task, history, "I do not know", "", "still not")
    assert trajectory.stop is StopReason.OUT_OF_TURNS
    assert [turn.action.kind for turn in trajectory.turns] == [ActionKind.VOID] * 3
    assert trajectory.turns[0].completion.finish_reason is FinishReason.END
    assert "neither sql nor solution" in trajectory.turns[0].observation
    assert trajectory.turns[-1].observation == ""


def test_each_limit_has_its_own_end(task: Task, history: History) -> None:
    long = replace(LIMITS, max_prompt=5)
    assert play(task, history, ASK, limits=long).stop is StopReason.CONTEXT_FULL
    assert "max_prompt is 5" in (play(task, history, ASK, limits=long).error or "")

    cut = play(task, history, ASK, limits=replace(LIMITS, max_turn_tokens=4))
    assert cut.stop is StopReason.TRUNCATED
    assert len(cut.turns[0].completion.token_ids) == 4
    assert cut.turns[0].action.complaint == "cut at max_turn_tokens"

    num_prompt = len(cut.turns[0].prompt_ids)
    full = play(task, history, ASK, limits=replace(LIMITS, max_input=num_prompt + 10))
    assert full.stop is StopReason.CONTEXT_FULL
    assert len(full.turns) == 1


def test_a_prompt_of_just_its_limit_is_still_read(task: Task, history: History) -> None:
    first, second = (len(turn.prompt_ids) for turn in play(task, history, ASK, ANSWER).turns)
    exact = replace(LIMITS, max_prompt=first, max_input=second)
    assert play(task, history, ASK, ANSWER, limits=exact).stop is StopReason.ANSWERED
    for less in (replace(exact, max_prompt=first - 1), replace(exact, max_input=second - 1)):
        assert play(task, history, ASK, ANSWER, limits=less).stop is StopReason.CONTEXT_FULL


def test_an_action_that_ends_at_the_very_limit_still_acts(task: Task, history: History) -> None:
    whole = play(task, history, ASK, ANSWER)
    exact = replace(LIMITS, max_turn_tokens=len(whole.turns[1].completion.token_ids))
    assert play(task, history, ANSWER, limits=exact).stop is StopReason.ANSWERED


def test_a_missing_database_fails_its_episode_with_its_name(
    task: Task, history: History, tmp_path: Path
) -> None:
    gone = replace(task, database=str(tmp_path / "gone.sqlite"))
    trajectory = play(gone, history, ASK)
    assert trajectory.stop is StopReason.FAILED
    assert "gone.sqlite" in (trajectory.error or "")


@dataclass
class Troubled:
    """An environment that meets `trouble` in its first step."""

    trouble: Callable[[], Exception] | None
    stops: tuple[str, ...] = ACTION_STOPS

    async def reset(self, task: Task) -> tuple[Message, ...]:
        return ({"role": "user", "content": task.question},)

    async def step(self, text: str) -> Step:
        if self.trouble is None:
            await asyncio.Event().wait()
        assert self.trouble is not None
        raise self.trouble()


def test_a_failing_disk_and_a_missed_deadline_are_data(task: Task, history: History) -> None:
    disk = play(task, history, ASK, make_env=lambda _: Troubled(lambda: OSError("disk on fire")))
    assert (disk.stop, disk.error) == (StopReason.FAILED, "step: disk on fire")
    late = play(
        task,
        history,
        ASK,
        make_env=lambda _: Troubled(None),
        limits=replace(LIMITS, env_timeout_s=0.01),
    )
    assert (late.stop, late.error) == (StopReason.FAILED, "step: no answer in 0.01 s")


def test_an_episode_past_its_deadline_is_cut_and_keeps_the_turns_it_played(
    task: Task, history: History
) -> None:
    class Slow(ScriptedEngine):
        async def generate(self, prompt_ids, sampling, key):
            if key.turn:
                await asyncio.Event().wait()
            return await super().generate(prompt_ids, sampling, key)

    async def go() -> Trajectory:
        async with SqlitePool(num_workers=1) as pool:
            return await run_episode(
                sql_env(pool),
                Slow(TOKENIZER, lambda key, prompt: ASK),
                history,
                task=task,
                sampling=Sampling(max_tokens=1),
                limits=replace(LIMITS, timeout_s=1.0),
                key=KEY,
            )

    cut = asyncio.run(go())
    assert (cut.stop, cut.error) == (StopReason.FAILED, "cut after 1 s, in turn 1")
    assert [turn.action.kind for turn in cut.turns] == [ActionKind.SQL]


def test_our_own_bugs_and_a_broken_engine_stop_the_run(task: Task, history: History) -> None:
    with pytest.raises(KeyError, match="ours"):
        play(task, history, ASK, make_env=lambda _: Troubled(lambda: KeyError("ours")))

    async def go() -> None:
        engine: Engine = ScriptedEngine(TOKENIZER, lambda key, prompt: ASK)
        await engine.close()
        sampling = Sampling(max_tokens=1)
        await run_episode(
            Troubled(None),
            engine,
            history,
            task=task,
            sampling=sampling,
            limits=LIMITS,
            key=KEY,
        )

    with pytest.raises(EngineError, match="closed"):
        asyncio.run(go())


def test_a_timeout_of_our_own_is_no_missed_deadline(task: Task) -> None:
    class Hasty:
        def start(self, messages):
            raise TimeoutError("ours")

    with pytest.raises(TimeoutError, match="ours"):
        play(task, Hasty(), ASK)


def rollouts(task: Task, history: History, *, workers: int) -> list[Trajectory]:
    """A group of eight, sampled by a random model that often ends a turn early."""
    engine = HfEngine(
        tiny_policy(), TOKENIZER, max_batch=3, end_ids=frozenset(range(30, 40)) | {history.end_id}
    )

    async def one(pool: SqlitePool, sample: int) -> Trajectory:
        try:
            return await run_episode(
                sql_env(pool),
                engine,
                history,
                task=task,
                sampling=Sampling(max_tokens=1, stop=ACTION_STOPS),
                limits=replace(LIMITS, max_turn_tokens=60),
                key=replace(KEY, sample=sample),
            )
        finally:
            engine.leave(1)

    async def go() -> list[Trajectory]:
        async with SqlitePool(num_workers=workers) as pool:
            engine.enter(8)
            found = await asyncio.gather(*(one(pool, sample) for sample in range(8)))
            await engine.close()
            return found

    return asyncio.run(go())


def test_rollouts_are_bit_equal_whatever_the_timing(task: Task, history: History) -> None:
    def timeless(trajectories: list[Trajectory]) -> list[Trajectory]:
        return [
            replace(t, turns=tuple(replace(turn, seconds=0.0) for turn in t.turns))
            for t in trajectories
        ]

    first, second = (rollouts(task, history, workers=workers) for workers in (1, 2))
    assert timeless(first) == timeless(second)
    assert max(len(trajectory.turns) for trajectory in first) > 1


def test_the_outcome_of_refused_sql_is_recorded(task: Task, history: History) -> None:
    trajectory = play(task, history, "<think>x</think><sql>DELETE FROM city</sql>", ANSWER)
    assert trajectory.turns[0].result is not None
    assert trajectory.turns[0].result.outcome is Outcome.REFUSED
    assert trajectory.stop is StopReason.ANSWERED
