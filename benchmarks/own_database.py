"""From a database to a trained model in one command: how long on a CPU, and what each part gains.

    python benchmarks/own_database.py ../shared/data/samples/chinook.sqlite --seed 0 --out runs/own
    python benchmarks/own_database.py chinook.sqlite --questions mine.csv --seed 0 --out runs/own

Without ``--questions``, ``querl data synth`` makes ``--num``. Then it runs ``querl train --db
--questions`` and prints wall clock and CPU time of that command, and the greedy accuracy (judge
``strict``) of the packaged model, after the warm start, and after the training: on the fifth of the
questions that validates, and on ``--others`` made ones of another seed, of which none has the gold
of one that any part was trained on.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from querl.cli.own import TINY_RECIPE, Named
from querl.config import Recipe, load_recipe
from querl.data.own import make_questions
from querl.data.traces import load_traces
from querl.eval.report import interval_of_mean
from querl.launch.engines import open_player
from querl.launch.local import TINY, load_policy, validate
from querl.launch.tasks import choose_tasks, given_away_by
from querl.types import Task

QUERL = [sys.executable, "-c", "from querl.cli import main; main()"]
OTHER_SEED = 77


@dataclass(frozen=True, slots=True)
class Spent:
    """What a command took."""

    wall_s: float
    cpu_s: float


def run(*arguments: object) -> Spent:
    """One command, which must succeed."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*QUERL, *map(str, arguments)], check=True, stdout=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(time.monotonic() - start, cpu_s)


def other_tasks(recipe: Recipe, traces: Path, db: Path, num: int) -> list[Task]:
    """Made tasks that nothing in the run has given away."""
    training, validation = choose_tasks(recipe)
    met = [*training, *validation, *(trace.task for trace in load_traces(traces))]
    hidden = {given_away_by(task) for task in met}
    drawn = make_questions(db, num=4 * num, seed=OTHER_SEED).tasks
    return [task for task in drawn if given_away_by(task) not in hidden][:num]


async def rights(recipe: Recipe, model: str, tasks: Sequence[Task]) -> list[bool]:
    """Whether the model's greedy answer to each task is right."""
    named = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": model})})
    async with open_player(named, load_policy(named)) as player:
        episodes = await validate(player.greedy(), tasks, seed=0, step=0)
    return [episode.is_right for episode in episodes]


def told(values: Sequence[float]) -> str:
    """A mean with its 95 % interval over questions."""
    low, high = interval_of_mean(values)
    return f"{sum(values) / len(values):.1%} [{low:.1%}, {high:.1%}]"


def compare(recipe: Recipe, folder: Path, tasks: Sequence[Task]) -> str:
    """The cells of one set of tasks: three models, and what training added to the warm start."""
    models = (
        TINY,
        str(folder.with_name(f"{folder.name}-warm") / "checkpoints" / "last" / "model"),
        str(folder / "checkpoints" / "best" / "model"),
    )
    packaged, warm, trained = (asyncio.run(rights(recipe, model, tasks)) for model in models)
    added = [float(after) - before for before, after in zip(warm, trained, strict=True)]
    cells = [str(len(tasks)), *(told([float(right) for right in one]) for one in (packaged, warm))]
    return " | ".join([*cells, told([float(right) for right in trained]), told(added)])


def main() -> None:
    """Make questions where there are none, train, and print the rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("db", type=Path)
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--num", type=int, default=60)
    parser.add_argument("--others", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    folder = chosen.out / f"{chosen.db.stem}-{chosen.seed}"
    questions = chosen.questions or chosen.out / f"{folder.name}.csv"
    if chosen.questions is None:
        questions.unlink(missing_ok=True)  # of the same database and seed, or of an earlier querl
        size = ("--num", chosen.num, "--seed", chosen.seed)
        run("data", "synth", "--db", chosen.db, *size, "--out", questions)
    named = ("--db", chosen.db, "--questions", questions, f"run.seed={chosen.seed}")
    spent = run("train", *named, "--out", folder, "--fresh")
    options = Named(db=str(chosen.db), questions=str(questions), model=None).overrides()
    recipe = load_recipe(TINY_RECIPE, (*options, f"run.seed={chosen.seed}"))
    traces = folder.with_name(f"{folder.name}-warm.jsonl")
    _, validation = choose_tasks(recipe)
    print(f"seed {chosen.seed}: {spent.wall_s / 60:.1f} minutes, {spent.cpu_s / 60:.1f} of CPU")
    print("| questions | n | packaged | after the warm start | trained | training added |")
    print("|---|---|---|---|---|---|")
    print(f"| that validate | {compare(recipe, folder, validation)} |")
    others = other_tasks(recipe, traces, chosen.db, chosen.others)
    print(f"| others, made | {compare(recipe, folder, others)} |")


if __name__ == "__main__":
    main()
