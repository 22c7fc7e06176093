"""Which tasks a run trains on, which it validates on, and which it leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from querl.data.audit import Fault, audit
from querl.data.registry import hold_out_databases, load_tasks
from querl.data.synth import Question, draw_questions
from querl.errors import ConfigError, DataError
from querl.rollout.stream import TaskOrder
from querl.sql.databases import DatabaseKind, database_kind

if TYPE_CHECKING:
    from querl.config import Recipe
    from querl.env.env import Environment
    from querl.rollout.history import History
    from querl.sql.database import Databases
    from querl.types import Task

OWN_VALIDATION_EVERY = 5
MIN_DATABASES_TO_SPLIT = 5  # of your own: below, a fifth of them would be none
FEW_TRAINING_TASKS = 50  # below, a run learns its questions by heart
MAX_CHUNK = 500  # golds executed at a time, so that progress shows
MADE = "made"  # the split of tasks that are made from your own database
MADE_SEED_OFFSET = 1_000_003  # other questions than `querl data synth` makes with the run's seed
VALIDATION_SEED = 0  # which tasks are validated on does not change with the run's seed


def choose_tasks(recipe: Recipe) -> tuple[list[Task], list[Task]]:
    """(training tasks, validation tasks), with no database in both unless they are your own files.

    Raises ConfigError or DataError, in one line, for what the data lacks.
    """
    data = recipe.data
    if data.db is not None or data.questions is not None:
        tasks = _own_tasks(data.db, data.questions)
    else:
        tasks = load_tasks(data.source, data.split)
    if holds_out_databases(recipe):
        training, validation = hold_out_databases(tasks, held_out_share(recipe))
        if not training or not validation:
            raise DataError(
                f"data.validation={data.validation!r} leaves {len(training)} tasks to train on and "
                f"{len(validation)} to validate on: choose another share"
            )
    elif data.db is not None:
        training, validation = split_own(tasks)
        made = made_questions(tasks, num=data.made, seed=recipe.run.seed)
        training += [question.task for question in made]
    else:
        training, validation = tasks, load_tasks(data.source, data.validation)
    return (
        fair_sample(training, data.max_samples, recipe.run.seed),
        fair_sample(validation, data.max_validation, VALIDATION_SEED),
    )


def _own_tasks(db: str | None, questions: str | None) -> list[Task]:
    from querl.data import files

    if db is None or questions is None:
        raise ConfigError("data.db and data.questions go together: name both, or neither")
    return files.load(db, Path(questions))


def split_own(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Your own tasks: a fifth validates, always the same one.

    Of five databases or more, every fifth validates; else every fifth question. Tasks of one gold
    stay together: who has seen the answer in training would be asked for it again.
    """
    by_database = len({task.database for task in tasks}) >= MIN_DATABASES_TO_SPLIT
    parts: dict[Hashable, list[Task]] = {}
    for task in tasks:
        parts.setdefault(task.database if by_database else given_away_by(task), []).append(task)
    if len(parts) < 2:
        number = "1 question" if len(tasks) == 1 else f"{len(tasks)} questions"
        raise DataError(
            f"{number} with one answer: at least two different ones are needed, to train on one "
            "and validate on the other; see querl data synth"
        )
    together = {part[0].id: part for part in parts.values()}
    order = TaskOrder([part[0] for part in parts.values()], VALIDATION_SEED)
    drawn = range(0, len(parts), OWN_VALIDATION_EVERY)
    held_out = [together[order[place].id] for place in drawn]
    validation = {task.id for part in held_out for task in part}
    return (
        [task for task in tasks if task.id not in validation],
        [task for task in tasks if task.id in validation],
    )


def made_questions(tasks: Sequence[Task], *, num: int, seed: int) -> list[Question]:
    """At most ``num`` questions over the SQLite files that ``tasks`` ask, all files together.

    None has the gold or the words of one of ``tasks``; their tasks are of the split ``MADE``.
    """
    files = {t.database for t in tasks if database_kind(t.database) is DatabaseKind.SQLITE}
    hidden = {given_away_by(task) for task in tasks}
    seed += MADE_SEED_OFFSET
    questions: list[Question] = []
    for file in sorted(files):
        share = num // len(files)
        try:
            drawn = draw_questions(Path(file), seed=seed, num_questions=share, split=MADE)
        except DataError:  # it holds no rows: no fault, where others do
            continue
        questions += [one for one in drawn.questions if given_away_by(one.task) not in hidden]
    return [
        replace(one, task=replace(one.task, id=f"{MADE}-{seed}-{one.task.id}")) for one in questions
    ]


def given_away_by(task: Task) -> Hashable:
    """What two tasks share if one gives the other away: the gold, spelt alike, or the question."""
    text = task.gold_sql or task.question
    return task.database, " ".join(text.lower().rstrip("; \n").split())


def too_little(training: Sequence[Task], validation: Sequence[Task]) -> str | None:
    """One line on what so few tasks of your own cannot do, or None. Made ones are not counted."""
    num_yours = sum(task.split != MADE for task in training)
    if num_yours >= FEW_TRAINING_TASKS:
        return None
    points = 100 * 1.96 * 0.5 / len(validation) ** 0.5
    return (
        f"{num_yours} questions of yours to train on are few (below {FEW_TRAINING_TASKS} alone are "
        f"learnt by heart), and an accuracy over {len(validation)} may be off by {points:.0f} "
        "points: write more, or let querl data synth make some"
    )


def holds_out_databases(recipe: Recipe) -> bool:
    """Whether validation is on databases of the training split."""
    return recipe.data.validation.startswith("databases:")


def held_out_share(recipe: Recipe) -> float:
    """The share of the training split's databases to validate on. Raises ConfigError."""
    validation = recipe.data.validation
    try:
        share = float(validation.removeprefix("databases:"))
    except ValueError as error:
        raise ConfigError(
            f"data.validation={validation!r}: write a split, or databases:0.1 for a tenth of them"
        ) from error
    if not 0 < share < 1:
        raise ConfigError(f"data.validation={validation!r}: the share must lie between 0 and 1")
    return share


def fair_sample(tasks: Sequence[Task], most: int | None, seed: int) -> list[Task]:
    """All in their order, or a sample of ``most`` in a seeded one."""
    if most is None or most >= len(tasks):
        return list(tasks)
    order = TaskOrder(tasks, seed)
    return [order[index] for index in range(most)]


async def check_own_golds(recipe: Recipe, tasks: Sequence[Task], databases: Databases) -> None:
    """Refuse a gold of your own files that fails: raises DataError, which names the first.

    Of other task sets nothing is refused: who trains on them cannot correct them.
    """
    if recipe.data.db is None and not recipe.data.source.startswith("files:"):
        return
    for one in await audit(tasks, databases, faults=(Fault.FAILING,)):
        if one.faults and one.gold is not None:
            raise DataError(
                f"the gold SQL of task {one.task.id}, {one.task.question!r}, fails "
                f"({one.gold.outcome}: {one.gold.message}): correct it, or take the question out"
            )


async def drop_faulty_golds(
    tasks: Sequence[Task],
    databases: Databases,
    drop: Sequence[Fault],
    on_done: Callable[[int, int], None] = lambda *_: None,
) -> tuple[list[Task], Counter[Fault]]:
    """The tasks whose gold has none of these faults, and how many were dropped for which first.

    ``on_done(done, total)`` hears of the golds. Raises DataError when nothing is left.
    """
    kept = []
    dropped: Counter[Fault] = Counter()
    for start in range(0, len(tasks), MAX_CHUNK):
        audited = await audit(tasks[start : start + MAX_CHUNK], databases, faults=drop)
        kept += [one.task for one in audited if not one.faults]
        dropped.update(min(one.faults) for one in audited if one.faults)
        on_done(start + len(audited), len(tasks))
    if not kept:
        raise DataError(
            f"the gold of every task is {' or '.join(drop)}: there is nothing to learn from; see "
            "querl data audit"
        )
    return kept, dropped


async def drop_long_prompts(
    tasks: Sequence[Task],
    env: Environment,
    history: History,
    *,
    max_prompt: int,
    on_done: Callable[[int, int], None] = lambda *_: None,
) -> tuple[list[Task], int]:
    """The tasks whose prompt fits, and how many were dropped; ``on_done(done, total)`` hears."""
    kept = []
    for number, task in enumerate(tasks, start=1):
        messages = await env.reset(task)
        if len(history.start(messages)) <= max_prompt:
            kept.append(task)
        on_done(number, len(tasks))
    if not kept:
        raise DataError(f"no task has a prompt of at most env.max_prompt={max_prompt} tokens")
    return kept, len(tasks) - len(kept)
