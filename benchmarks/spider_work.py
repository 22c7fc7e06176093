"""The work of one step that querl and TRL are measured on: which questions, and their prompts.

Both play the same questions of Spider in every step, those that a run of the recipe would train on
first, so that neither reads other prompts or other databases than the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from querl.config import Recipe, load_recipe
from querl.data.audit import Fault
from querl.errors import DataError
from querl.launch.local import make_env, make_history, model_path, open_databases
from querl.launch.tasks import choose_tasks, drop_faulty_golds, drop_long_prompts
from querl.trainer.model import load_tokenizer
from querl.types import Message, Task

SPARE = 1.5  # questions looked at for each that is needed: golds may fail, prompts may be too long


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The questions of every step, and the first messages of each."""

    tasks: list[Task]
    messages: list[tuple[Message, ...]]


def read_recipe(path: Path, overrides: Sequence[str], *, num_steps: int) -> Recipe:
    """The recipe for ``num_steps`` steps in which nothing but the steps takes time.

    One question is validated on, before the first step and with the last.
    """
    recipe = load_recipe(path, tuple(overrides))
    num_tasks = int(SPARE * recipe.run.groups_per_step)
    run = {"num_steps": num_steps, "eval_every": num_steps, "save_every": num_steps}
    data = {"max_samples": num_tasks, "max_validation": 1}
    return recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update=run),
            "data": recipe.data.model_copy(update=data),
        }
    )


def first_tasks(recipe: Recipe, tasks: Sequence[Task]) -> list[Task]:
    """As many as a step plays. Raises DataError where there are fewer."""
    needed = recipe.run.groups_per_step
    if len(tasks) < needed:
        raise DataError(
            f"{len(tasks)} questions are left for run.groups_per_step={needed}: "
            "set it lower, or raise SPARE"
        )
    return list(tasks[:needed])


async def read_work(recipe: Recipe) -> Work:
    """The questions that a run of the recipe trains on, without its model."""
    tokenizer = load_tokenizer(model_path(recipe))
    training, _ = choose_tasks(recipe)
    async with open_databases(recipe) as databases:
        faults = [Fault(name) for name in recipe.data.drop]
        training, _ = await drop_faulty_golds(training, databases, faults)
        env = make_env(recipe, databases, tokenizer)()
        history = make_history(recipe, tokenizer)
        training, _ = await drop_long_prompts(
            training, env, history, max_prompt=recipe.env.max_prompt
        )
        tasks = first_tasks(recipe, training)
        return Work(tasks=tasks, messages=[await env.reset(task) for task in tasks])
