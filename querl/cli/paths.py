"""What a user names, recipes and paths, looked at before the work whose result they hold."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from querl.errors import ConfigError


class Kept(StrEnum):
    """A checkpoint that a run's folder names."""

    BEST = "best"
    LAST = "last"


Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change: section.key=value ...")
]
CheckpointOption = Annotated[
    Kept | None,
    typer.Option(help="Of a run's folder: whose model; by default best, where there is one."),
]


def recipe_of(
    named: Path, checkpoint: Kept | None, overrides: Sequence[str]
) -> tuple[Path, tuple[str, ...]]:
    """(the recipe's file, its overrides): of a run's folder, its recipe with the model it made.

    A ``model.path`` among the overrides wins. Raises ConfigError for a folder that holds no run, or
    no such checkpoint.
    """
    if not named.is_dir():
        if checkpoint is not None:
            raise ConfigError(f"--checkpoint {checkpoint}: {named} is no run's folder, name one")
        return named, tuple(overrides)
    if not (named / "recipe.toml").is_file():
        raise ConfigError(f"{named} is no run's folder: it holds no recipe.toml")
    wanted = (Kept.BEST, Kept.LAST) if checkpoint is None else (checkpoint,)
    models = [named / "checkpoints" / name / "model" for name in wanted]
    model = next((path for path in models if path.is_dir()), None)
    if model is None and not names_model(overrides):
        raise ConfigError(
            f"{named} holds no checkpoint {' or '.join(wanted)}: train first, or set model.path"
        )
    made = () if model is None else (f"model.path={json.dumps(str(model), ensure_ascii=False)}",)
    return named / "recipe.toml", (*made, *overrides)


def start_note(recipe: Path, overrides: Sequence[str]) -> str | None:
    """What to tell who names the recipe inside a run's folder, whose model is the one before it."""
    is_in_run = recipe.name == "recipe.toml" and (recipe.parent / "checkpoints").is_dir()
    if not is_in_run or names_model(overrides):
        return None
    return f"note: this is the model that the run began with; for its result name {recipe.parent}"


def names_model(overrides: Sequence[str]) -> bool:
    """Whether one of the overrides sets ``model.path``."""
    return any(one.partition("=")[0].strip() == "model.path" for one in overrides)


def new_file(path: Path) -> Path:
    """The file, which must not exist: it may hold work of your hands. Raises ConfigError."""
    if path.exists():
        raise ConfigError(f"--out {path} exists: name another file, or remove it first")
    return path


def file_to_be(option: str, file: Path | None) -> None:
    """Raise ConfigError where a folder stands in the file's place, or a file in its folder's."""
    if file is None:
        return
    if file.is_dir():
        raise ConfigError(f"{option} {file} is a folder, name a file")
    nearest = next(path for path in file.absolute().parents if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{option} {file}: {nearest} is a file, name another place")
    if not os.access(nearest, os.W_OK):
        raise ConfigError(f"{option} {file}: {nearest} cannot be written to, name another place")


def folder_to_be(folder: Path) -> Path:
    """The folder, which need not exist. Raises ConfigError where a file stands in its way."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"--out {folder}: {nearest} is a file, name a folder")
    return folder
