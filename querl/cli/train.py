"""``querl train``: reinforcement learning from a recipe, resumable at any moment."""

from __future__ import annotations

import asyncio
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from querl import records
from querl.cli import own
from querl.cli.again import command_again
from querl.cli.panel import Progresses, spark
from querl.cli.paths import Overrides, folder_to_be
from querl.cli.progress import progress
from querl.cli.replay import refuse_options, show_replay
from querl.config import Recipe, load_recipe
from querl.errors import ConfigError
from querl.eval.run import rating
from querl.sql.databases import name_to_show

if TYPE_CHECKING:
    from querl.launch.training import Prepared
    from querl.rollout.engine import Engine
    from querl.run import Run

SHOWN_EPISODES = 3


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A .toml file, such as recipes/demo.toml; not needed with --db."),
    ] = None,
    overrides: Overrides = None,
    db: Annotated[
        str | None, typer.Option(help="Your database: a file, a folder of them, or a server's URL.")
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Your questions: csv, tsv, json, jsonl or parquet (with --db)."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model's folder; else the recipe's, or the tiny one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The run's folder; by default runs/<name of the recipe, or database>."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over, and delete the run in the folder.")
    ] = False,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="Train on so many tasks only, for a quick look.")
    ] = None,
    replay: Annotated[
        tuple[Path, int] | None,
        typer.Option(metavar="RUN STEP", help="Explain a run's stored step: train on it again."),
    ] = None,
) -> None:
    """Sample groups of episodes, reward them by execution, improve the model, repeat.

    The same command again resumes the run in its folder. Ctrl-C finishes the step and saves.

    Example: querl train recipes/demo.toml run.seed=1 --out runs/demo-1

    Example: querl train --db shop.sqlite --questions questions.csv

    Example: querl train --replay runs/demo 12
    """
    words = [word for word in (recipe, *(overrides or ())) if word is not None]
    if replay is not None:
        named = {"--db": db, "--questions": questions, "--model": model, "--out": out}
        refuse_options(named | {"--fresh": fresh or None, "--max-samples": max_samples})
        show_replay(Console(highlight=False), *replay, words)
        return
    chosen = own.choose(words, own.Named(db=db, questions=questions, model=model))
    quick = () if max_samples is None else (f"data.max_samples={max_samples}",)
    resolved = load_recipe(chosen.recipe, (*chosen.overrides, *quick))
    folder = folder_to_be(out or Path("runs") / chosen.name)
    console = Console(highlight=False)
    _announce(console, resolved, folder)
    ready = own.with_warm_model(resolved, folder) if chosen.warms_up else resolved
    if _is_told(console, ready, folder, fresh=fresh):
        return
    if chosen.warms_up and not own.warm_up(resolved, folder, console, fresh=fresh):
        console.print(f"stopped. To go on: {command_again()}", soft_wrap=True)
        return
    _train(console, ready, folder, fresh=fresh)


def _is_told(console: Console, resolved: Recipe, folder: Path, *, fresh: bool) -> bool:
    """Report the folder's run if it is finished: nothing must be prepared for that.

    False where there is something to train. Raises what ``check_folder`` raises.
    """
    from querl.run import Run, is_finished
    from querl.run_check import check_folder

    # or an engine would take the memory of a run that is there, and load for one that is refused
    check_folder(folder, resolved, fresh=fresh)
    if fresh or not is_finished(folder, resolved):
        return False
    watcher = Progresses(num_steps=resolved.run.num_steps, console=console)
    with Run(folder, resolved, watcher, fresh=False) as run:
        run.stay_finished()
        _report(console, run)
    return True


def _train(console: Console, resolved: Recipe, folder: Path, *, fresh: bool) -> None:
    """Prepare, train and report."""
    from querl.launch.engines import starting_engine

    resolved.check_training()
    with starting_engine(resolved) as engine:
        _train_with(engine, console, resolved, folder, fresh=fresh)


def _train_with(
    engine: Engine | None, console: Console, resolved: Recipe, folder: Path, *, fresh: bool
) -> None:
    from querl.launch.training import prepare, train_prepared
    from querl.run import Run

    with progress(console, "preparing") as show:
        prepared = asyncio.run(prepare(resolved, show))  # first: a mistake leaves no trace
    if resolved.data.db is not None:
        _warn_of_few(console, prepared)
    watcher = Progresses(num_steps=resolved.run.num_steps, console=console)
    start = time.monotonic()
    with Run(folder, resolved, watcher, fresh=fresh) as run:
        with watcher:
            training = train_prepared(
                resolved, prepared, run, watcher.say, watcher.validating, engine=engine
            )
            asyncio.run(training)
        _report(console, run, took=f", in {time.monotonic() - start:,.0f} s")
        if run.wants_to_stop:
            watcher.say(f"stopped. To go on: {command_again()}")


def _warn_of_few(console: Console, prepared: Prepared) -> None:
    from querl.launch.tasks import too_little

    warning = too_little(prepared.training, prepared.validation)
    if warning is not None:
        console.print(f"warning: {warning}", soft_wrap=True)


def _announce(console: Console, recipe: Recipe, folder: Path) -> None:
    """The settings that differ from the defaults, and the numbers that follow."""
    table = Table.grid(padding=(0, 2))
    default = Recipe()
    for name, section in recipe:
        changed = [
            f"{key}={name_to_show(value) if key == 'db' else value}"
            for key, value in section
            if value != vars(vars(default)[name])[key]
        ]
        if changed:
            table.add_row(name, escape("  ".join(changed)))
    derived = "  ".join(f"{name} {number:,}" for name, number in recipe.derived().items())
    table.add_row("so", derived)
    table.add_row("folder", str(folder))
    console.print(table)


def _report(console: Console, run: Run, *, took: str = "") -> None:
    """Before and after, the curve, and episodes to read."""
    evaluations = run.evaluations()
    if not evaluations:
        raise ConfigError(f"{run.folder} holds no validation yet: nothing to report")
    first, last = evaluations[0], evaluations[-1]
    console.print(
        f"\nvalidation accuracy {_percent(first)} before, {_percent(last)} after "
        f"{last['step']} steps ({100 * (last['accuracy'] - first['accuracy']):+.1f} points){took}",
        soft_wrap=True,
    )
    curve = f"by validation: {spark([line['accuracy'] for line in evaluations])}"
    wins = last["wins_used_tool"]  # None where nothing was right
    used = "" if wins is None else f"   right answers that ran SQL before they answered: {wins:.0%}"
    console.print(curve + used, soft_wrap=True)
    for record in _some_episodes(run.folder):
        console.print(f"\n[bold]{escape(record['question'])}[/bold]  {record['verdict']}")
        for turn in record["turns"]:
            console.print(turn["text"], markup=False, soft_wrap=True)
            if turn["observation"]:
                console.print(turn["observation"], markup=False, style="dim", soft_wrap=True)
    best = run.checkpoints.best()
    if best is not None and best.score is not None:
        for line in about_the_model(run.folder, best.step, best.score, before=rating(first)):
            console.print(line, markup=False, soft_wrap=True)


def about_the_model(folder: Path, step: int, accuracy: float, *, before: float) -> list[str]:
    """Where the best checkpoint's model lies, what it is worth, and how to validate it again."""
    model = folder / "checkpoints" / "best" / "model"
    again = ["querl", "eval", str(folder)]
    worth = "" if accuracy > before else f", no better than the {before:.1%} before"
    return [
        f"\nthe model: {model}",
        f"of the checkpoints the best by validation, after {step} steps: {accuracy:.1%}{worth}",
        f"to validate it again: {shlex.join(again)}",
    ]


def _percent(line: dict[str, Any]) -> str:
    low, high = line["accuracy_interval"]
    return f"{line['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


def _some_episodes(folder: Path) -> list[dict[str, Any]]:
    """Three of the last step's: those with most turns, right ones first."""
    steps = records.steps(folder / "records")
    if not steps:
        return []
    last = records.read_step(folder / "records", steps[-1])
    by_task = {record["task"]: record for record in last}
    ranked = sorted(
        by_task.values(), key=lambda r: (r["verdict"] != "match", -len(r["turns"]), r["task"])
    )
    return ranked[:SHOWN_EPISODES]
