"""A warm start on your own database: a small model must have met its names before it can explore.

Without it the packaged model answers none of the questions on a database in another style of names,
and reinforcement finds nothing to reinforce.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from querl.config import Recipe
from querl.data.synth import Question
from querl.data.traces import Trace, save_traces
from querl.errors import DataError
from querl.launch.tasks import MADE, made_questions
from querl.launch.traces import make_traces
from querl.launch.training import HowFar, prepare
from querl.launch.warm import Report, prepare_warm_up, warm_up
from querl.run import RunFolder
from querl.sections import RunConfig
from querl.types import Task

NUM_QUESTIONS = 1200  # made, over all databases together
SEED_OFFSET = 500_009  # others than those that join the run's training tasks


def warm_questions(
    training: Sequence[Task], validation: Sequence[Task], seed: int
) -> list[Question]:
    """Your training tasks that have gold SQL, and made ones that are neither in ``training``, so
    that reinforcement still finds something new, nor in ``validation``."""
    yours = [task for task in training if task.gold_sql is not None and task.split != MADE]
    made = made_questions([*training, *validation], num=NUM_QUESTIONS, seed=seed + SEED_OFFSET)
    return [*(Question(task=task) for task in yours), *made]


def warm_traces(recipe: Recipe, on_done: HowFar) -> list[Trace]:
    """Traces of `warm_questions`; writes nothing.

    Raises what `prepare` raises, first, and DataError where no trace can be made.
    """
    prepared = asyncio.run(prepare(recipe, on_done))  # a wrong file must not cost a warm start
    questions = warm_questions(prepared.training, prepared.validation, recipe.run.seed)
    making = make_traces(recipe, questions, lambda done, total: on_done(done, total, "traces"))
    traces = asyncio.run(making).traces
    if not traces:
        raise DataError(
            "nothing shows the tiny model your database: that takes questions with gold SQL, or a "
            "SQLite file to make some from; or name a larger model by --model"
        )
    return list(traces)


def warm_start(
    recipe: Recipe,
    traces: Sequence[Trace],
    folder: Path,
    *,
    fresh: bool,
    say: Callable[[str], None],
    on_step: Callable[[Report], None],
) -> bool:
    """Supervised training of the recipe's model on the traces of `warm_traces`, into ``folder``.

    A finished warm start in ``folder`` is taken as it is, an unfinished one goes on. False after
    Ctrl-C. The traces are written beside ``folder``.
    """
    path = folder.with_name(f"{folder.name}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_traces(path, traces)
    # how long and how often the run that follows goes is no matter of the warm start
    own = recipe.model_copy(update={"run": RunConfig(seed=recipe.run.seed)})
    warming = prepare_warm_up(own, path)
    say(f"warm start: {len(traces):,} traces, {warming.trainer.num_steps} steps, in {folder}")
    with RunFolder(folder, own, say, derived=warming.derived, fresh=fresh) as run:
        warm_up(warming, run, on_step)
        return not run.wants_to_stop
