"""Whether a run may take a folder: as a new one, as its own to go on with, or to start over in."""

from __future__ import annotations

from pathlib import Path

from querl import durable
from querl.config import Recipe, load_recipe
from querl.errors import CheckpointError, ConfigError
from querl.loggers import FOLDERS
from querl.sections import ModelConfig
from querl.sql.databases import without_password
from querl.trainer.checkpoint import RunLock

# What may differ between a run and its resumption: it changes how long, not what is learnt. What an
# engine's failure asks to change must be among it.
MAY_CHANGE = {
    *(("run", key) for key in ("keep_checkpoints", "save_every", "loggers")),
    *(("engine", key) for key in ("url", "python", "start_timeout_s", "heartbeat_s", "frontends")),
    ("engine", "memory_share"),
}
# Settings that name a file or a folder, which may be spelt in many ways.
NAME_PATHS = {
    ("data", "db"),
    ("data", "questions"),
    ("data", "source"),
    ("model", "path"),
    ("reward", "suite"),
}


def check_folder(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """Raise what a run would raise on taking the folder, and leave no trace in it.

    For who starts something costly before. Raises CheckpointError where another run holds it, or
    where ``fresh`` would delete what is no run's, ConfigError where it holds another recipe's run.
    """
    if (folder / "lock").exists():
        with RunLock(folder):
            pass
    if folder.is_dir():
        check_content(folder, without_secrets(recipe), fresh=fresh)


def check_content(folder: Path, recipe: Recipe, *, fresh: bool) -> None:
    """As ``check_folder``, of a recipe ``without_secrets`` and for who holds the folder."""
    if fresh:
        _check_only_run(folder)
    elif (folder / "recipe.toml").exists() and (folder / "checkpoints" / "last").is_symlink():
        _check_same(folder, load_recipe(folder / "recipe.toml"), recipe)


def without_secrets(recipe: Recipe) -> Recipe:
    """As a run's folder and its loggers keep it: a server's password belongs to the environment."""
    if recipe.data.db is None:
        return recipe
    data = recipe.data.model_copy(update={"db": without_password(recipe.data.db)})
    return recipe.model_copy(update={"data": data})


def _check_same(folder: Path, before: Recipe, recipe: Recipe) -> None:
    before = without_secrets(before)
    may_change = MAY_CHANGE
    if not _depends_on_length(before):
        may_change = MAY_CHANGE | {("run", "num_steps")}
    for name, section in recipe:
        for key, value in section:
            old = vars(vars(before)[name])[key]
            if (name, key) in may_change:
                continue
            is_path = (name, key) in NAME_PATHS
            if not (_same_path(value, old) if is_path else value == old):
                raise ConfigError(
                    f"{folder} holds a run with {name}.{key} = {old!r}, not {value!r}: "
                    "set it back to resume, name another --out, or start over with --fresh"
                )


def _check_only_run(folder: Path) -> None:
    """Raise CheckpointError where the folder holds anything that is no part of a run."""
    known = {"recipe.toml", "derived.json", "metrics.jsonl", "evaluations.jsonl", "slowest.jsonl"}
    known |= {"records", "dumps", "checkpoints", "lock"} | FOLDERS
    found = {path.name.removeprefix(durable.UNFINISHED) for path in folder.iterdir()}
    strange = sorted(found - known)
    if strange:
        raise CheckpointError(
            f"{folder} holds {strange[0]!r}, which is no part of a run: name another --out"
        )


def _same_path(one: str | None, other: str | None) -> bool:
    """Whether both name one file or folder, behind the same ``loader:``; no name is no file."""
    if one == other or one is None or other is None:
        return one == other
    if "://" in one + other or ModelConfig().path in (one, other):  # URLs; the package's own model
        return False
    (loader, _, path), (other_loader, _, other_path) = one.rpartition(":"), other.rpartition(":")
    return loader == other_loader and Path(path).resolve() == Path(other_path).resolve()


def _depends_on_length(recipe: Recipe) -> bool:
    """Whether what a step learns hangs on how many steps there will be."""
    is_annealed = any(part.until is not None for part in recipe.reward.parts.values())
    return recipe.optimizer.schedule != "constant" or is_annealed
