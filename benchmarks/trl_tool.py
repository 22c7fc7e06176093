"""SQL as a tool for TRL's GRPOTrainer: querl's tags, observations, judge and reward."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing
from functools import partial
from typing import Any

from spider_work import Work

from querl.config import Recipe
from querl.env.rewards import judge_trajectory
from querl.env.wire import ObservationLimits, Observations, Tags
from querl.launch.local import make_judge, make_reward, open_databases
from querl.types import (
    ActionKind,
    Completion,
    FinishReason,
    Outcome,
    QueryResult,
    StopReason,
    Task,
    Trajectory,
    Turn,
)

TOOL = "run_sql"
# What querl's conversation shows the model, with TRL's messages of tools: a call in our tags, its
# result as the user's words. TRL asks of a template that it shows any call, hence the other branch.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>"
    "{{ 'user' if message.role == 'tool' else message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{% set arguments = call.function.arguments %}"
    "{% if arguments.query is defined %}<sql>{{ arguments.query }}</sql>"
    "{% else %}<{{ call.function.name }}>{{ arguments | tojson }}{% endif %}"
    "{% endfor %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": "<sql>(?=.*?</sql>)",  # a turn that was cut asks for nothing
            "close": "</sql>",
            "repeats": True,
            "content": "text",
            "transform": {
                "type": "function",
                "function": {"name": TOOL, "arguments": {"query": "{content}"}},
            },
        },
        "content": {"close_pattern": r"<\|im_end\|>\s*", "content": "text"},
    },
}


class SqlTool:
    """One episode's tool, as TRL's ``environment_factory`` wants it: public methods are tools."""

    def __init__(self, tasks: Sequence[Task], recipe: Recipe) -> None:
        self._tasks = tasks
        self._max_turns = recipe.env.max_turns
        self._max_steps = recipe.sql.max_steps
        self._shown = recipe.env.observation_rows
        self._observations = Observations(
            limits=ObservationLimits(
                rows=recipe.env.observation_rows, chars=recipe.env.observation_chars
            ),
            reminders=recipe.env.reminders,
        )
        self._left = 0
        self._database = ""

    def reset(self, task: int, **_: Any) -> None:
        """Begin an episode on a question's database."""
        self._left = self._max_turns
        self._database = self._tasks[task].database

    def run_sql(self, query: str) -> str:
        """Run a read-only query on the database.

        Args:
            query: One SQL statement.

        Returns:
            Its rows, or the error.
        """
        self._left -= 1
        return self._observations.result(self._execute(query), turns_left=self._left)

    def _execute(self, query: str) -> QueryResult:
        with closing(sqlite3.connect(f"file:{self._database}?mode=ro", uri=True)) as connection:
            connection.text_factory = partial(str, encoding="utf-8", errors="replace")
            connection.set_progress_handler(lambda: 1, self._max_steps)
            try:
                cursor = connection.execute(query)
                rows = cursor.fetchmany(self._shown + 1)
            except (sqlite3.Error, sqlite3.Warning) as error:
                return QueryResult(outcome=Outcome.SQL_ERROR, message=str(error))
            columns = tuple(column[0] for column in cursor.description or ())
            return QueryResult(outcome=Outcome.ROWS, columns=columns, rows=tuple(rows))


class Judged:
    """TRL's reward function: querl's judge and reward, on the loop that TRL runs it on."""

    def __init__(self, recipe: Recipe, work: Work) -> None:
        self._recipe = recipe
        self._tasks = work.tasks
        self._reward = make_reward(recipe)(0)
        self._open = AsyncExitStack()
        self._judge: Any = None
        self.__name__ = "judged"  # as TRL names it in its metrics

    async def __call__(
        self, *, completions: Sequence[Any], task: Sequence[int], **_: Any
    ) -> list[float]:
        """The rewards of a batch, judged side by side."""
        if self._judge is None:
            databases = await self._open.enter_async_context(open_databases(self._recipe))
            self._judge = make_judge(self._recipe, databases)
        each = (self._one(*pair) for pair in zip(completions, task, strict=True))
        return list(await asyncio.gather(*each))

    async def close(self) -> None:
        """End the workers."""
        await self._open.aclose()

    async def _one(self, messages: Sequence[dict[str, Any]], number: int) -> float:
        task = self._tasks[number]
        trajectory = as_trajectory(task, messages)
        judgement = await judge_trajectory(self._judge, task, trajectory)
        return self._reward(trajectory, judgement, task)


def as_trajectory(task: Task, messages: Sequence[dict[str, Any]]) -> Trajectory:
    """What TRL's messages say, without their tokens."""
    nothing = Completion(token_ids=(), logprobs=(), versions=(), finish_reason=FinishReason.STOP)
    turns = []
    for text in texts(messages):
        action = Tags().parse(text)
        turns.append(Turn(prompt_ids=(), completion=nothing, text=text, action=action))
    answered = bool(turns) and turns[-1].action.kind is ActionKind.SOLUTION
    stop = StopReason.ANSWERED if answered else StopReason.OUT_OF_TURNS
    return Trajectory(task_id=task.id, turns=tuple(turns), stop=stop)


def texts(messages: Sequence[dict[str, Any]]) -> list[str]:
    """What the model wrote, a text a turn."""
    found = []
    for message in messages:
        if message["role"] == "assistant":
            calls = [call["function"]["arguments"] for call in message.get("tool_calls") or []]
            sql = "".join(f"<sql>{arguments['query']}</sql>" for arguments in calls)
            found.append(message["content"] + sql)
    return found
