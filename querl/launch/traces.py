"""Traces as a recipe asks for them: its training questions, its model's episodes, its shares."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from querl.data.explore_traces import look_around
from querl.data.own_samples import OwnSamples
from querl.data.registry import hold_out_databases, load_questions
from querl.data.synth import Question
from querl.data.thoughts import describe_query, name_tables
from querl.data.trace_maker import TraceMaker
from querl.data.traces import OWN_KINDS, TraceKind
from querl.errors import ConfigError
from querl.launch.engines import load_asked, open_player
from querl.launch.local import (
    check_suite,
    make_env,
    model_path,
    open_databases,
    validate,
)
from querl.launch.tasks import (
    MADE,
    choose_tasks,
    fair_sample,
    held_out_share,
    holds_out_databases,
    made_questions,
)
from querl.launch.trace_report import TraceSet
from querl.launch.warm import encode_traces
from querl.trainer.model import load_tokenizer

if TYPE_CHECKING:
    from querl.config import Recipe
    from querl.data.own_samples import Played
    from querl.data.trace_maker import Made
    from querl.data.traces import Trace
    from querl.launch.local import Speaker
    from querl.sql.database import Databases, Limits, Schema
    from querl.types import QueryResult, Task

DESCRIBERS = {"plan": describe_query, "tables": name_tables}
MAX_CHUNK = 2000  # questions at a time, so that progress shows
MAX_SAMPLED_CHUNK = 500  # fewer, since episodes with all their tokens are held for each


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """The recipe's model is asked each question ``num_samples`` times, at the recipe's temperature.

    Of one question, ``keep`` of its right episodes, or of its mistakes, become traces at most.
    """

    num_samples: int
    keep: int = 1


class CountedDatabases:
    """Implements ``querl.sql.database.Databases``: counts what another executes."""

    def __init__(self, databases: Databases) -> None:
        self._databases = databases
        self.num_executed = 0

    async def execute(self, database: str, sql: str, limits: Limits | None = None) -> QueryResult:
        """As the other."""
        self.num_executed += 1
        return await self._databases.execute(database, sql, limits)

    async def schema(self, database: str) -> Schema:
        """As the other."""
        return await self._databases.schema(database)

    async def close(self) -> None:
        """As the other."""
        await self._databases.close()


def training_questions(recipe: Recipe) -> list[Question]:
    """The recipe's training tasks, with the look at values that belongs to each where known.

    With ``data.max_samples`` they are those that training takes, or would before it drops faulty
    golds and long prompts.
    """
    if recipe.data.db is not None or recipe.data.questions is not None:
        return _own_questions(recipe)
    questions = load_questions(recipe.data.source, recipe.data.split)
    if holds_out_databases(recipe):  # what validates must not be met in the warm start either
        training, _ = hold_out_databases((q.task for q in questions), held_out_share(recipe))
        kept = {task.id for task in training}
        questions = [question for question in questions if question.task.id in kept]
    tasks = [question.task for question in questions]
    chosen = {task.id for task in fair_sample(tasks, recipe.data.max_samples, recipe.run.seed)}
    return [question for question in questions if question.task.id in chosen]


def _own_questions(recipe: Recipe) -> list[Question]:
    """The training tasks of own files; those that were made bring their look at values."""
    training, validation = choose_tasks(recipe)
    yours = [task for task in (*training, *validation) if task.split != MADE]
    made = made_questions(yours, num=recipe.data.made, seed=recipe.run.seed)
    known = {question.task: question for question in made}
    return [known.get(task, Question(task=task)) for task in training]


async def make_traces(
    recipe: Recipe,
    questions: Sequence[Question],
    on_done: Callable[[float, int], None],
    asking: Asking | None = None,
) -> TraceSet:
    """Traces of questions by the shares of ``sft.shares``; writes nothing.

    ``on_done(done, total)`` hears how many of the questions are through.

    Raises ConfigError where shares and ``asking`` do not go together, DataError for a suite that
    knows none of the questions, ModelError for a model that cannot be asked.
    """
    shares = {TraceKind(kind): share for kind, share in recipe.sft.shares.items()}
    _check_shares(shares, asking)
    speaker = None
    if asking is not None:
        check_suite(recipe, [question.task for question in questions])
        speaker = load_asked(recipe)
    # only by the model's own count are a cut schema's tables those that the model will be shown
    tokenizer = load_tokenizer(model_path(recipe)) if recipe.prompt.max_schema_tokens else None
    async with open_databases(recipe) as databases:
        counted = CountedDatabases(databases)
        async with _open_own(recipe, speaker, asking, len(questions), on_done) as own:
            maker = TraceMaker(
                counted,
                make_env(recipe, counted, tokenizer),
                max_turns=recipe.env.max_turns,
                seed=recipe.run.seed,
                describe=DESCRIBERS[recipe.sft.thoughts],
                own=own,
                look_around=look_around if recipe.env.kind == "explore" else None,
            )
            chunk = MAX_CHUNK if own is None else MAX_SAMPLED_CHUNK
            made: list[Made] = []
            for start in range(0, len(questions), chunk):
                made += await maker.make_all(questions[start : start + chunk], shares)
                on_done(len(made), len(questions))
    return TraceSet(
        made=made,
        shares=shares,
        num_executed=counted.num_executed,
        num_samples=asking.num_samples if asking is not None else 0,
        count_tokens=_token_counter(speaker) if speaker is not None else None,
    )


def _check_shares(shares: dict[TraceKind, float], asking: Asking | None) -> None:
    has_own = any(shares.get(kind) for kind in OWN_KINDS)
    if has_own and asking is None:
        raise ConfigError(
            "sft.shares asks for traces of a model's own samples: let it play each question some "
            "times by querl data traces --samples 4, or take sampled and own_repair out"
        )
    if asking is not None and not has_own:
        raise ConfigError(
            "--samples plays episodes that no trace would come from: give sampled or own_repair a "
            "share, as in 'sft.shares={sampled=0.5,own_repair=0.5}'"
        )


@asynccontextmanager
async def _open_own(
    recipe: Recipe,
    speaker: Speaker | None,
    asking: Asking | None,
    num_questions: int,
    on_done: Callable[[float, int], None],
) -> AsyncIterator[OwnSamples | None]:
    """What plays the model's episodes, or None where none is asked."""
    if speaker is None or asking is None:
        yield None
        return
    num_episodes = count(1)
    async with open_player(recipe, speaker) as player:

        async def sample(tasks: Sequence[Task]) -> list[list[Played]]:
            episodes = await validate(
                player,
                tasks,
                seed=recipe.run.seed,
                step=0,
                num_samples=asking.num_samples,
                on_done=lambda _: on_done(next(num_episodes) / asking.num_samples, num_questions),
            )
            played = [(episode.trajectory, episode.judgement) for episode in episodes]
            size = asking.num_samples
            return [played[start : start + size] for start in range(0, len(played), size)]

        yield OwnSamples(sample=sample, keep=asking.keep)


def _token_counter(speaker: Speaker) -> Callable[[Sequence[Trace]], int]:
    return lambda traces: len(encode_traces(traces, speaker.history).token_ids)
