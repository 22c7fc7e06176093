"""What ``querl train`` runs: a recipe that is named, or one of ours for your own database."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import querl.data
from querl.cli.paths import names_model
from querl.cli.progress import progress
from querl.errors import ConfigError
from querl.sql.databases import DatabaseKind, database_kind

if TYPE_CHECKING:
    from rich.console import Console

    from querl.config import Recipe
    from querl.launch.warm import Report

_RECIPES = Path(querl.data.__file__).parent / "recipes"
TINY_RECIPE = _RECIPES / "own-tiny.toml"
MODEL_RECIPE = _RECIPES / "own.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """The options that stand for ``data.db``, ``data.questions`` and ``model.path``."""

    db: str | None
    questions: str | None
    model: str | None

    def overrides(self) -> list[str]:
        """What is named, as overrides; quoted, so that a name of digits stays text."""
        keys = {"data.db": self.db, "data.questions": self.questions, "model.path": self.model}
        return [
            f"{key}={json.dumps(value, ensure_ascii=False)}"
            for key, value in keys.items()
            if value is not None
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A recipe's file, the changes to it, and what the run's folder is called by default."""

    recipe: Path
    overrides: tuple[str, ...]
    name: str

    @property
    def warms_up(self) -> bool:
        """Whether the model must first be shown the database."""
        return self.recipe == TINY_RECIPE


def no_questions(db: str) -> ConfigError:
    """What to say where a database is named, and no questions about it."""
    make = ""
    if database_kind(db) is DatabaseKind.SQLITE:
        make = f", or let querl data synth --db {db} --out questions.jsonl make one"
    return ConfigError(f"--questions is missing: name a file of them{make}")


def choose(words: Sequence[str], named: Named) -> Chosen:
    """The recipe of a command line whose ``words`` are a recipe, or none, and overrides.

    Without a recipe, ``own-tiny.toml`` trains the tiny model and ``own.toml`` any other. An
    override wins over an option. Raises ConfigError when nothing says what to train on.
    """
    has_recipe = bool(words) and (words[0].endswith(".toml") or "=" not in words[0])
    settings = (*named.overrides(), *words[has_recipe:])
    if has_recipe:
        recipe = Path(words[0])
        return Chosen(recipe=recipe, overrides=settings, name=recipe.stem)
    if named.db is None:
        raise ConfigError(
            "name a recipe, such as recipes/demo.toml, or --db and --questions of your own"
        )
    if named.questions is None:
        raise no_questions(named.db)
    recipe = MODEL_RECIPE if names_model(settings) else TINY_RECIPE
    name = Path(named.db.partition("?")[0]).stem.strip(".") or "own"  # `--db .` has no name
    return Chosen(recipe=recipe, overrides=settings, name=name)


def with_warm_model(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the model that a warm start beside a run's ``folder`` gives it."""
    warm = _warm_folder(folder) / "checkpoints" / "last" / "model"
    model = recipe.model.model_copy(update={"path": str(warm)})
    return recipe.model_copy(update={"model": model})


def _warm_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-warm")


def warm_up(recipe: Recipe, folder: Path, console: Console, *, fresh: bool) -> bool:
    """Make the model of ``with_warm_model``, or go on with it; False after Ctrl-C."""
    from querl.launch.own import warm_start, warm_traces

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    with progress(console, "preparing the warm start") as show:
        traces = warm_traces(recipe, show)
    with progress(console, "warm start, step") as show:

        def report(done: Report) -> None:
            step, num_steps, metrics, _ = done
            show(step, num_steps, f"loss {metrics['sft/loss']:.3f}")

        return warm_start(
            recipe, traces, _warm_folder(folder), fresh=fresh, say=say, on_step=report
        )
