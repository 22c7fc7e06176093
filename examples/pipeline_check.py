"""The whole pipeline on one small database, in a minute on a CPU: no data set, no download.

Five employees in three departments. What three written answers are paid, what the tiny model
answers, three steps of GRPO on four questions, and what it answers then.

    python examples/pipeline_check.py
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from querl.config import Recipe, load_recipe
from querl.launch.engines import open_player
from querl.launch.local import load_policy, make_reward, validate
from querl.launch.tasks import choose_tasks
from querl.launch.training import train_locally
from querl.rollout.engine import RequestKey
from querl.rollout.scripted import ScriptedEngine
from querl.run import Run

if TYPE_CHECKING:
    from querl.types import Task

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SCHEMA = """
CREATE TABLE departments (id INTEGER PRIMARY KEY, name TEXT, budget INTEGER);
CREATE TABLE employees (
  id INTEGER PRIMARY KEY, name TEXT, salary INTEGER,
  department_id INTEGER REFERENCES departments(id)
);
INSERT INTO departments VALUES (1, 'Sales', 300), (2, 'Research', 500), (3, 'Kitchen', 100);
INSERT INTO employees VALUES (1, 'Ada', 90, 2), (2, 'Bob', 40, 1), (3, 'Cem', 55, 2),
  (4, 'Dee', 40, 3), (5, 'Eva', 70, 1);
"""
GOLDS = {
    "How many employees are there?": "SELECT count(*) FROM employees",
    "What are the names of the employees?": "SELECT name FROM employees",
    "What is the highest salary of the employees?": "SELECT max(salary) FROM employees",
    "Which employees earn more than 60?": "SELECT name FROM employees WHERE salary > 60",
}
WRITTEN = {
    "right": "SELECT count(*) FROM employees",
    "valid, but wrong": "SELECT count(*) FROM departments",
    "invalid": "SELECT count(*) FROM nobody",
}
# Hotter than usual: the tiny model is sure of itself, and a group of equal answers teaches nothing.
SETTINGS = (
    *("run.num_steps=3", "run.groups_per_step=4", "run.group_size=8", "run.max_refill=0.0"),
    *("run.eval_every=3", "run.save_every=3", "sql.workers=1", "engine.temperature=1.5"),
    "reward.parts={composite=1.0}",
)


class Printed:
    """Implements ``querl.run.Watcher`` by printed lines."""

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """A step has ended."""
        say(
            f"step {step}: mean reward {values['rollout/reward']:+.3f}, "
            f"{values['tokens/trained']:.0f} tokens trained, "
            f"gradient norm {values.get('optimizer/grad_norm', 0.0):.2f}"
        )

    def evaluated(self, step: int, summary: dict[str, Any]) -> None:
        """A validation has ended."""
        say(f"after {step} steps: {summary['accuracy']:.0%} right")

    def say(self, text: str) -> None:
        """One line for the person."""
        say(text)


def say(text: str) -> None:
    """One line."""
    print(text, flush=True)  # noqa: T201


def prepare(folder: Path) -> Recipe:
    """Database, questions, and the demo's recipe on them."""
    with closing(sqlite3.connect(folder / "company.sqlite")) as connection:
        connection.executescript(SCHEMA)
    lines = [json.dumps({"question": q, "sql": sql}) for q, sql in GOLDS.items()]
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return load_recipe(RECIPES / "demo.toml", (f"data.source=files:{folder}", *SETTINGS))


async def rewards_of(recipe: Recipe, task: Task) -> dict[str, float]:
    """What each of ``WRITTEN`` is paid for an answer to the task."""
    policy = load_policy(recipe)
    texts = list(WRITTEN.values())

    def answer(key: RequestKey, _prompt: str) -> str:
        return f"<think>so it is</think><solution>{texts[key.sample]}</solution>"

    reward, paid = make_reward(recipe)(1), {}
    async with open_player(recipe, policy) as player:
        scripted = replace(player, engine=ScriptedEngine(policy.tokenizer, answer))
        for number, kind in enumerate(WRITTEN):
            key = RequestKey(recipe.run.seed, 1, 0, number, 0)
            trajectory, judgement = await scripted.play(task, key)
            paid[kind] = reward(trajectory, judgement, task)
    return paid


async def answers(recipe: Recipe) -> list[str]:
    """What the recipe's model answers to each question, greedily."""
    _, tasks = choose_tasks(recipe)
    async with open_player(recipe, load_policy(recipe)) as player:
        episodes = await validate(player.greedy(), tasks, seed=recipe.run.seed, step=0)
    return [
        f"{episode.task.question}  {episode.trajectory.turns[-1].text.strip()}"
        f"  ({episode.judgement.verdict})"
        for episode in episodes
    ]


def main() -> None:
    """Run it all in a temporary folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = prepare(folder)
        training, _ = choose_tasks(recipe)
        for kind, reward in asyncio.run(rewards_of(recipe, training[0])).items():
            say(f"{kind}: {reward:+.2f}")
        say("before:\n  " + "\n  ".join(asyncio.run(answers(recipe))))
        with Run(folder / "run", recipe, Printed(), fresh=False) as run:
            asyncio.run(train_locally(recipe, run, say))
        last = folder / "run" / "checkpoints" / "last" / "model"
        trained = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"path": str(last)})}
        )
        say("after:\n  " + "\n  ".join(asyncio.run(answers(trained))))


if __name__ == "__main__":
    main()
