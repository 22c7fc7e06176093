"""``querl eval``: the episodes of training, greedy by default, counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from querl.cli.paths import (
    CheckpointOption,
    Overrides,
    file_to_be,
    folder_to_be,
    recipe_of,
    start_note,
)
from querl.cli.progress import counter, progress
from querl.config import Recipe, load_recipe
from querl.errors import ConfigError
from querl.eval import report
from querl.sql.compare import CompareMode

if TYPE_CHECKING:
    from querl.eval.run import Episode
    from querl.rollout.sampler import Player
    from querl.types import Task


def evaluate(
    recipe: Annotated[
        Path, typer.Argument(help="A run's folder, or a .toml file: data, prompt, model.")
    ],
    overrides: Overrides = None,
    checkpoint: CheckpointOption = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Sample so often a task (pass@k); 1 is greedy.")
    ] = 1,
    judge: Annotated[
        CompareMode | None, typer.Option(help="Compare by these rules, not the recipe's.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="Ask all of these of data.db, not the recipe's validation tasks."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the summary here.")] = None,
    details: Annotated[
        Path | None,
        typer.Option(help="Write a JSON line an episode here; querl score reads the file."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the episodes into this folder, as training does.")
    ] = None,
) -> None:
    """Let a model answer the recipe's validation tasks, and judge the answers by execution.

    Of a run's folder it is the best checkpoint's model, by that run's recipe; of a .toml file it is
    model.path.

    Example: querl eval runs/demo

    Example: querl eval runs/shop --questions others.csv

    Example: querl eval recipes/demo.toml model.path=../my-model

    Example: querl eval my.toml engine.kind=openai engine.url=http://127.0.0.1:8000/v1
    model.path=NAME prompt.style=full
    """
    chosen = () if judge is None else (f"reward.judge={judge.value}",)
    file, settled = recipe_of(recipe, checkpoint, overrides or ())
    settings = load_recipe(file, (*settled, *chosen))
    settings.check_playing()
    folder = folder_to_be(out) if out is not None else None
    file_to_be("--json", json)
    file_to_be("--details", details)
    console = Console(highlight=False)
    if (note := start_note(recipe, settled)) is not None:
        console.print(note, markup=False, soft_wrap=True)
    start = time.monotonic()
    episodes = asyncio.run(_play(settings, _tasks(settings, questions), samples, console))
    from querl.eval.run import summarise

    summary = summarise(episodes)
    seconds = time.monotonic() - start
    _print(console, settings, summary, seconds)
    if json is not None:
        report.write_json(json, summary | _of_what(settings, seconds))
    _write(episodes, details, folder)


def _write(episodes: list[Episode], details: Path | None, folder: Path | None) -> None:
    """The episodes, a line each for other tools and as training keeps them."""
    from querl import records
    from querl.eval.run import detail_lines, to_groups

    if details is not None:
        report.write_jsonl(details, detail_lines(episodes))
    if folder is not None:
        records.write_step(folder, 0, to_groups(episodes))


def _of_what(recipe: Recipe, seconds: float) -> dict[str, Any]:
    """What the numbers are of, without which a file of them is nobody's."""
    return {
        "model": recipe.model.path,
        "judge": recipe.reward.judge,
        "suite": recipe.reward.suite,
        "seed": recipe.run.seed,
        "seconds": round(seconds, 1),
    }


def _tasks(recipe: Recipe, questions: Path | None) -> list[Task]:
    """The recipe's validation tasks, or all of a file of questions about its ``data.db``."""
    from querl.data import files
    from querl.launch.tasks import choose_tasks

    if questions is None:
        return choose_tasks(recipe)[1]
    if recipe.data.db is None:
        raise ConfigError(f"name the database that {questions} asks: data.db=FILE")
    return files.load(recipe.data.db, questions)


async def _play(
    recipe: Recipe, tasks: Sequence[Task], num_samples: int, console: Console
) -> list[Episode]:
    from querl.launch.local import load_reward_suite, open_databases, validate
    from querl.launch.needs import beyond_positions
    from querl.launch.tasks import check_own_golds

    suite = load_reward_suite(recipe)  # before the model: a wrong folder costs nothing then
    if suite is not None and not any(map(suite.databases, tasks)):
        _note(console, f"reward.suite={recipe.reward.suite} knows none of these questions")
    if (warning := beyond_positions(recipe)) is not None:
        _note(console, warning)
    opening = _opening(recipe, console)
    async with open_databases(recipe) as databases:
        await check_own_golds(recipe, tasks, databases)
    async with opening as player:
        if num_samples == 1:
            player = player.greedy()
        with progress(console, "episodes") as show:
            return await validate(
                player,
                tasks,
                seed=recipe.run.seed,
                step=0,
                num_samples=num_samples,
                on_done=counter(show, len(tasks) * num_samples),
            )


def _opening(recipe: Recipe, console: Console) -> AbstractAsyncContextManager[Player]:
    """Who plays: the recipe's own model, or one at an endpoint."""
    from querl.launch.endpoint import open_endpoint
    from querl.launch.engines import load_asked, open_player
    from querl.launch.needs import check_endpoint

    if recipe.engine.kind != "openai":
        return open_player(recipe, load_asked(recipe))
    check_endpoint(recipe)

    return open_endpoint(recipe, partial(_note, console))


def _note(console: Console, text: str) -> None:
    console.print(f"note: {text}", markup=False, soft_wrap=True)


def _print(console: Console, recipe: Recipe, summary: dict[str, Any], seconds: float) -> None:
    facts = {
        "model": recipe.model.path,
        "accuracy": f"{report.percent(summary['accuracy'])} of {summary['n']:,} tasks",
        "95 % over questions": report.percent_interval(summary["accuracy_interval"]),
        "95 % over databases": report.percent_interval(summary["accuracy_interval_databases"]),
        "pass@k": "  ".join(f"{k}: {report.percent(v)}" for k, v in summary["pass_at"].items()),
        "used a tool": report.percent(summary["used_tool"]),
        "wins that used a tool": report.percent(summary["wins_used_tool"]),
        "runs": report.percent(summary["runs"]),
        "over budget": report.percent(summary["over_budget"]),
        "no rows": report.percent(summary["empty"]),
        "truncated": report.percent(summary["truncated"]),
        "turns, tokens": f"{summary['mean_turns']:.2f}, {summary['mean_tokens']:.0f} an episode",
        "verdicts": ", ".join(f"{name} {n:,}" for name, n in summary["verdicts"].items()),
        "seconds": f"{seconds:.1f}",
    }
    if summary["suite_accuracy"] is not None:
        facts["right on the suite too"] = report.percent(summary["suite_accuracy"])
        facts["95 % (test suite)"] = report.percent_interval(summary["suite_accuracy_interval"])
    if summary["long_prompts"]:
        facts["prompts too long, hence wrong"] = f"{summary['long_prompts']:,}"
    shown = {name: value for name, value in facts.items() if value}
    console.print(report.facts_table(f"judge {recipe.reward.judge}", shown))
    for what in ("kind", "difficulty"):
        rows = {k: (v["n"], v["accuracy"]) for k, v in summary[f"by_{what}"].items()}
        if rows:
            console.print(report.groups_table(f"by {what}", rows))
