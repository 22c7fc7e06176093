"""Where tasks come from: a known name or your ``module:function``, each with a folder or none."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

from querl.data import demo
from querl.data.demo import worlds
from querl.data.synth import Question
from querl.errors import ConfigError, DataError
from querl.types import Task


def load_tasks(source: str, split: str) -> list[Task]:
    """All tasks of one split, e.g. of ``demo``, ``bird:FOLDER`` or ``my_module:load:FOLDER``.

    A loader is ``load(root, split) -> Iterable[Task]``. Without a folder, ``spider``, ``bird``,
    ``skyrl`` and ``omnisql`` look into the folder of that name in ``$QUERL_DATA``. Raises
    ConfigError for an unknown source, DataError for what the loader finds wrong or a split without
    tasks.
    """
    name, _, rest = source.partition(":")
    if name == "worlds":
        raise ConfigError(
            f"data source {source!r} is for querl data traces alone: name another, such as demo"
        )
    if name in LOADERS:
        target, root = LOADERS[name], rest
        if not root and name in FOLDER_IN_QUERL_DATA:
            root = str(_shared_folder(name))
        if not root and name in NEEDS_FOLDER:
            raise ConfigError(f"data source {source!r} needs a folder: write {name}:FOLDER")
    elif rest:
        function, _, root = rest.partition(":")
        target = f"{name}:{function}"
    else:
        raise ConfigError(
            f"data source {source!r} is unknown: use {', '.join(LOADERS)} or module:function"
        )
    module_name, _, function_name = target.partition(":")
    try:
        loader = vars(importlib.import_module(module_name))[function_name]
    except ModuleNotFoundError as error:
        raise ConfigError(f"data source {source!r}: no module {error.name!r}") from error
    except KeyError as error:
        raise ConfigError(
            f"data source {source!r}: {module_name} has no {function_name!r}"
        ) from error
    tasks = list(loader(Path(root) if root else None, split))
    if not tasks:
        raise DataError(f"data source {source!r} has no task in split {split!r}")
    (task_id, number), *_ = Counter(task.id for task in tasks).most_common(1)
    if number > 1:
        raise DataError(
            f"data source {source!r} has {number} tasks of id {task_id!r} in split {split!r}: "
            "ids must differ"
        )
    return tasks


def load_questions(source: str, split: str) -> list[Question]:
    """As ``load_tasks``, with the look at values that a question needs where its maker knows it.

    ``worlds:N`` are N random databases with 40 questions each (``querl.data.demo.worlds``).
    """
    name, _, rest = source.partition(":")
    if name == "worlds":
        if not rest.isdigit():
            raise ConfigError(f"data source {source!r}: write worlds:N for N random databases")
        return list(worlds.questions(int(rest)))
    if name == "demo":
        return list(demo.questions(Path(rest) if rest else None, split))
    return [Question(task=task) for task in load_tasks(source, split)]


def hold_out_databases(tasks: Iterable[Task], share: float) -> tuple[list[Task], list[Task]]:
    """(tasks to train on, tasks to validate on) with no database in both.

    About ``share`` of the databases are held out: those whose name hashes low, so that the choice
    stays the same when tasks or databases are added.
    """
    kept: list[Task] = []
    held_out: list[Task] = []
    for task in tasks:
        is_held_out = crc32(task.db_id.encode()) < share * 2**32
        (held_out if is_held_out else kept).append(task)
    return kept, held_out


def _shared_folder(name: str) -> Path:
    folder = os.environ.get("QUERL_DATA")
    if not folder:
        raise DataError(f"name the folder as {name}:FOLDER, or set QUERL_DATA to the one above it")
    return Path(folder) / name


LOADERS = {
    "demo": "querl.data.demo:load",
    "spider": "querl.data.spider:load",
    "bird": "querl.data.bird:load",
    "skyrl": "querl.data.skyrl:load",
    "omnisql": "querl.data.omnisql:load",
    "files": "querl.data.files:load_folder",
}
FOLDER_IN_QUERL_DATA = frozenset({"spider", "bird", "skyrl", "omnisql"})
NEEDS_FOLDER = frozenset({"files"})
