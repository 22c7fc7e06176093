"""Hidden schemas: what the tools say, whole episodes, and traces that explore."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_policy import tiny_tokenizer

from querl.config import load_recipe
from querl.data.explore_traces import look_around
from querl.data.synth import Question
from querl.data.trace_maker import TraceMaker
from querl.data.traces import TraceKind
from querl.env.env import Environment, Step
from querl.errors import ConfigError
from querl.launch.local import make_env, make_history, make_reward
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.episode import EpisodeLimits, run_episode
from querl.rollout.scripted import ScriptedEngine
from querl.sql.database import Databases, Limits, Schema
from querl.sql.duckdb_pool import DuckDbPool
from querl.sql.worker import SqlitePool
from querl.types import (
    ActionKind,
    Judgement,
    Outcome,
    QueryResult,
    StopReason,
    Task,
    Trajectory,
    Verdict,
)

SCHEMA = """
CREATE TABLE Singer (id INTEGER PRIMARY KEY, name TEXT);
INSERT INTO Singer VALUES (1, 'Ann'), (2, 'Bo'), (3, 'Cy'), (4, 'Di');
CREATE TABLE "odd ""name"", 🎤" (x INTEGER);
CREATE TABLE "<describe>" (singer INTEGER REFERENCES Singer(id));
"""
ODD = 'odd "name", 🎤'
TABLES = "<think>what is there</think><tables></tables>"
DESCRIBE = "<think>its columns</think><describe>singer</describe>"
ASK = "<think>look</think><sql>SELECT name FROM Singer</sql>"
ANSWER = "<think>so</think><solution>SELECT name FROM Singer</solution>"


class CountedSchemas:
    """Databases that count how often a schema is read."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases
        self.num_read = 0

    async def execute(self, database: str, sql: str, limits: Limits | None = None) -> QueryResult:
        return await self._databases.execute(database, sql, limits)

    async def schema(self, database: str) -> Schema:
        self.num_read += 1
        return await self._databases.schema(database)

    async def close(self) -> None:
        await self._databases.close()


@pytest.fixture
def task(tmp_path: Path) -> Task:
    path = tmp_path / "music.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(SCHEMA)
    gold = "SELECT name FROM Singer"
    return Task(id="t", question="Who sings?", database=str(path), gold_sql=gold)


def explore(script: Callable[[Environment], Awaitable[list[Step]]], *overrides: str) -> list[Step]:
    recipe = load_recipe(None, ("env.kind=explore", "env.max_turns=9", *overrides))

    async def go() -> list[Step]:
        async with SqlitePool(num_workers=1) as pool:
            return await script(make_env(recipe, pool, None)())

    return asyncio.run(go())


def steps(task: Task, *calls: tuple[str, str], overrides: tuple[str, ...] = ()) -> list[Step]:
    """What (tool, argument) after another leads to."""

    async def script(env: Environment) -> list[Step]:
        await env.reset(task)
        return [
            await env.step(f"<think>x</think><{tool}>{argument}</{tool}>")
            for tool, argument in calls
        ]

    return explore(script, "env.reminders=false", *overrides)


def shown(task: Task, tool: str, argument: str = "", *overrides: str) -> str:
    (step,) = steps(task, (tool, argument), overrides=overrides)
    assert step.action.kind is ActionKind.TOOL
    lines = step.observation.splitlines()
    assert (lines[0], lines[-1]) == ("<observation>", "</observation>")
    return "\n".join(lines[1:-1])


def test_tables_are_listed_and_no_name_can_spell_a_tag(task: Task) -> None:
    quoted = '"odd ""name"", 🎤"'
    assert shown(task, "tables") == f'Singer\n{quoted}\n"&lt;describe>"\n(3 tables)'
    assert shown(task, "tables", "SING") == "Singer\n(1 table of 3 with 'SING' in their names)"
    assert shown(task, "tables", "zzz") == "(0 tables of 3 with 'zzz' in their names)"


def test_tables_are_described_whatever_the_case_and_the_quotes(task: Task) -> None:
    singer = "Singer(id int pk, name text)"
    assert shown(task, "describe", "singer") == singer
    assert shown(task, "describe", ' "SINGER" ') == singer
    assert shown(task, "describe", "`singer`") == singer
    assert shown(task, "describe", "xsingerx").startswith("no table 'xsingerx'")
    odd = '"odd ""name"", 🎤"(x int)'
    assert shown(task, "describe", ODD) == shown(task, "describe", '"odd ""name"", 🎤"') == odd
    both = shown(task, "describe", "singer, singer,sniger")
    assert both == f"{singer}\nno table 'sniger': the nearest is Singer"
    assert shown(task, "describe", "").startswith("no table ''")
    assert "CREATE TABLE Singer" in shown(task, "describe", "Singer", "prompt.style=full")


def test_a_sample_is_the_first_rows_of_a_table(task: Task) -> None:
    assert shown(task, "sample", "singer") == "id | name\n1 | Ann\n2 | Bo\n3 | Cy\n(3 rows)"
    assert shown(task, "sample", ODD) == "x\n(0 rows)"
    assert shown(task, "sample", "singers") == "no table 'singers': the nearest is Singer"
    (step,) = steps(task, ("sample", "singer"))
    assert step.result is not None
    assert step.result.outcome is Outcome.ROWS


def test_a_thousand_tables_fit_an_observation(tmp_path: Path) -> None:
    path = tmp_path / "wide.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        creation = "".join(f"CREATE TABLE t_{i} (x);" for i in range(1000))
        connection.executescript(f"BEGIN; {creation} COMMIT;")  # a thousand fsyncs take long
    task = Task(id="t", question="?", database=str(path))
    listed = shown(task, "tables", "", "env.observation_chars=600")
    assert len(listed) <= 600
    assert "(1000 tables, 101 shown: ask for a part of a name" in listed
    assert "t_999\n(" in shown(task, "tables", "t_99")
    made_up = shown(task, "describe", ", ".join(f"no_{i}" for i in range(2000)))
    assert made_up.count("no table 'no_") == 16
    assert made_up.endswith("the first 16 of 2000 names: ask for fewer")
    empty = tmp_path / "empty.sqlite"
    with closing(sqlite3.connect(empty)) as connection:
        connection.execute("PRAGMA user_version = 1")
    nothing = Task(id="t", question="?", database=str(empty))
    assert shown(nothing, "tables") == "(0 tables)"
    assert shown(nothing, "describe", "x") == shown(nothing, "sample", "x") == "no table 'x'"


def test_a_database_is_read_once_for_all_episodes_that_begin_together(task: Task) -> None:
    async def go() -> int:
        async with SqlitePool(num_workers=1) as pool:
            counted = CountedSchemas(pool)
            make = make_env(load_recipe(None, ("env.kind=explore",)), counted, None)
            await asyncio.gather(*(make().reset(task) for _ in range(8)))
            return counted.num_read

    assert asyncio.run(go()) == 1


def test_other_databases_are_explored_alike(tmp_path: Path) -> None:
    import duckdb

    path = tmp_path / "music.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute('CREATE TABLE "a b" (x INTEGER); INSERT INTO "a b" VALUES (7)')
    task = Task(id="t", question="?", database=str(path), dialect="duckdb")
    recipe = load_recipe(None, ("env.kind=explore",))

    async def go() -> str:
        async with DuckDbPool(num_workers=1) as pool:
            env = make_env(recipe, pool, None)()
            await env.reset(task)
            return (await env.step("<think>x</think><sample>A B</sample>")).observation

    assert "x\n7\n(1 row)" in asyncio.run(go())


def test_prompts_hide_the_schema_and_name_the_tools(task: Task) -> None:
    async def messages(env: Environment) -> list[Step]:
        asked = await env.reset(task)
        text = "\n".join(message["content"] for message in asked)
        assert "Who sings?" in text
        assert "Singer" not in text
        assert all(name in text for name in ("tables", "describe", "sample", "solution"))
        return []

    for style in ("short", "full"):
        explore(messages, f"prompt.style={style}")
    with pytest.raises(ConfigError, match=r"set prompt\.style=short or full"):
        explore(messages, "prompt.style=skyrl")


def play(task: Task, *turns: str, overrides: tuple[str, ...] = ()) -> Trajectory:
    """A whole episode, in which the model says these turns."""
    recipe = load_recipe(None, overrides)
    tokenizer = tiny_tokenizer()

    async def go() -> Trajectory:
        async with SqlitePool(num_workers=1) as pool:
            return await run_episode(
                make_env(recipe, pool, None)(),
                ScriptedEngine(tokenizer, lambda key, prompt: turns[key.turn]),
                make_history(recipe, tokenizer),
                task=task,
                sampling=Sampling(max_tokens=1),
                limits=EpisodeLimits(max_turn_tokens=200),
                key=RequestKey(seed=0, step=0, group=0, sample=0, turn=0),
            )

    return asyncio.run(go())


def test_an_episode_explores_and_answers_and_tools_end_its_turns(task: Task) -> None:
    chatter = " and so on"
    texts = [text + chatter for text in (TABLES, DESCRIBE, ASK, ANSWER)]
    trajectory = play(task, *texts, overrides=("env.kind=explore", "env.max_turns=4"))
    assert trajectory.stop is StopReason.ANSWERED
    assert [turn.text for turn in trajectory.turns] == [TABLES, DESCRIBE, ASK, ANSWER]
    assert [turn.action.tool for turn in trajectory.turns] == ["tables", "describe", "", ""]


def test_an_episode_is_asked_for_its_answer_when_turns_run_out(task: Task) -> None:
    granted = ("env.max_turns=2", "env.final_answer=true")
    late = play(task, ASK, ASK, ANSWER, overrides=granted)
    assert (late.stop, len(late.turns)) == (StopReason.ANSWERED, 3)
    assert late.solution == "SELECT name FROM Singer"
    never = play(task, ASK, ASK, ASK, overrides=granted)
    assert (never.stop, len(never.turns)) == (StopReason.OUT_OF_TURNS, 3)
    assert never.solution is None
    assert play(task, ANSWER, overrides=granted).turns[-1].observation == ""
    discounted = make_reward(load_recipe(None, ("reward.discount=0.5",)))(0)
    assert discounted(late, Judgement(verdict=Verdict.MATCH), task) == 0.25


def test_an_episode_that_goes_round_in_circles_stalls(task: Task) -> None:
    circles = play(task, ASK, ASK, ASK, overrides=("env.max_turns=6", "env.early_exit=2"))
    assert (circles.stop, len(circles.turns)) == (StopReason.STALLED, 3)
    assert circles.solution is None
    looks = (TABLES, TABLES, TABLES)
    rules = ("env.kind=explore", "env.max_turns=6", "env.early_exit=1")
    assert play(task, *looks, overrides=rules).stop is StopReason.STALLED


def test_a_trace_looks_around_before_its_first_query(task: Task) -> None:
    recipe = load_recipe(None, ("env.kind=explore", "env.max_turns=4"))

    async def go() -> tuple[str, ...]:
        async with SqlitePool(num_workers=1) as pool:
            maker = TraceMaker(
                pool, make_env(recipe, pool, None), max_turns=4, seed=0, look_around=look_around
            )
            (trace,) = await maker.make(Question(task=task), TraceKind.PROBE_CONFIRM)
            assert all(turn.is_trained for turn in trace.turns)
            return tuple(turn.text.partition("\n")[2] for turn in trace.turns)

    assert asyncio.run(go()) == (
        "<tables></tables>",
        "<describe>Singer</describe>",
        "<sql>SELECT name FROM Singer</sql>",
        "<solution>SELECT name FROM Singer</solution>",
    )
    cte = replace(task, gold_sql="WITH c AS (SELECT id FROM Singer) SELECT * FROM c, singer")
    assert look_around(cte)[1].endswith("<describe>Singer</describe>")
    assert len(look_around(replace(task, gold_sql="no sql at (all"))) == 1
