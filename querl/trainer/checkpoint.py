"""Checkpoints that survive a kill or a full disk at any moment, and the lock on a run's folder.

    <run>/checkpoints/step-000010/   what ``Learner.save`` wrote, and state.json
    <run>/checkpoints/last, best     links to two of them
    <run>/checkpoints/scores.json    validation scores by folder name

A folder is written under another name in the same place, flushed to disk, and renamed: it is there
whole or not at all. Nothing is pickled: safetensors and JSON only.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch

from querl.durable import UNFINISHED, flush, replace_text, saving
from querl.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType


class Saveable(Protocol):
    """A learner, as far as a checkpoint needs one."""

    @property
    def step(self) -> int:
        """How many updates have been made."""
        ...

    def save(self, folder: Path) -> None:
        """Write all state into an existing folder."""
        ...


_REPLACED = ".replaced-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One checkpoint on disk; ``cursor`` is what the caller saved with it, ``score`` if rated.

    ``num_threads`` is how many torch computed with on the CPU: sums round as their parts are cut.
    """

    folder: Path
    step: int
    cursor: dict[str, Any]
    num_threads: int
    score: float | None


class Checkpoints:
    """The checkpoints of one run: the last ``keep`` of them, and the best by validation."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep
        with saving(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _tidy(folder)

    def save(self, learner: Saveable, *, cursor: dict[str, Any]) -> Checkpoint:
        """Write the learner's state and make it the last; older ones beyond ``keep`` go.

        ``cursor`` must be JSON. Raises CheckpointError when it cannot be written: the checkpoints
        before it stay as they were.
        """
        folder = self._folder / f"step-{learner.step:06d}"
        with atomic_folder(folder) as unfinished:
            learner.save(unfinished)
            state = {"format": 2, "step": learner.step, "cursor": cursor}
            state["num_threads"] = torch.get_num_threads()
            (unfinished / "state.json").write_text(json.dumps(state), encoding="utf-8")
        self._point("last", folder)
        self._prune()
        return _read(folder)

    def rate(self, checkpoint: Checkpoint, score: float) -> bool:
        """Note a validation score, higher is better; True where it is the best so far."""
        scores = _scores(self._folder)
        is_best = all(
            score > other for name, other in scores.items() if name != checkpoint.folder.name
        )
        path = self._folder / "scores.json"
        with saving(path):
            replace_text(path, json.dumps(scores | {checkpoint.folder.name: score}, indent=1))
        if is_best:
            self._point("best", checkpoint.folder)
            self._prune()
        return is_best

    def last(self) -> Checkpoint | None:
        """The newest whole checkpoint. Raises CheckpointError when it is damaged."""
        return self._linked("last")

    @staticmethod
    def last_of(run: Path) -> Checkpoint | None:
        """``last`` of a run's folder, for who does not hold it.

        Puts nothing right that a killed writer left. Raises CheckpointError when it is damaged.
        """
        link = run / "checkpoints" / "last"
        return _read(link.parent / link.readlink()) if (link / "state.json").is_file() else None

    def best(self) -> Checkpoint | None:
        """The one with the highest score. Raises CheckpointError when it is damaged."""
        return self._linked("best")

    def _linked(self, name: str) -> Checkpoint | None:
        link = self._folder / name
        return _read(self._folder / link.readlink()) if link.is_symlink() else None

    def _point(self, name: str, folder: Path) -> None:
        unfinished = self._folder / f"{UNFINISHED}{name}"
        with saving(self._folder / name):
            unfinished.unlink(missing_ok=True)
            unfinished.symlink_to(folder.name)
            unfinished.replace(self._folder / name)
            flush(self._folder)

    def _prune(self) -> None:
        linked = {
            (self._folder / name).readlink().name
            for name in ("last", "best")
            if (self._folder / name).is_symlink()
        }
        folders = sorted(f for f in self._folder.iterdir() if f.name.startswith("step-"))
        for folder in folders[: -self._keep]:
            if folder.name not in linked:
                shutil.rmtree(folder)


def restore_threads(checkpoint: Checkpoint) -> bool:
    """Compute with as many threads as the checkpoint was; True where that is another number."""
    is_other = torch.get_num_threads() != checkpoint.num_threads
    if is_other:
        torch.set_num_threads(checkpoint.num_threads)
    return is_other


class RunLock:
    """Holds a run's folder for this process; the system frees it when the process dies."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: int | None = None

    def __enter__(self) -> Self:
        """Take the lock. Raises CheckpointError, with the other's pid, when it is taken."""
        with saving(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            pid = os.read(file, 32).decode() or "another process"
            os.close(file)
            raise CheckpointError(
                f"{self._path.parent} is in use by process {pid}: "
                "stop that one first, or name another run folder"
            ) from error
        self._file = file
        with saving(self._path):
            os.ftruncate(file, 0)
            os.write(file, str(os.getpid()).encode())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give the lock back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """An empty folder to write into; it becomes ``target`` when the block ends well.

    Raises CheckpointError when writing fails (a full disk, say); what was there before stays.
    """
    unfinished = target.with_name(UNFINISHED + target.name)
    replaced = target.with_name(_REPLACED + target.name)
    try:
        with saving(target):
            _restore(target, replaced)  # a writer may have been killed between the renames below
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            yield unfinished
            for path in (*unfinished.rglob("*"), unfinished):
                flush(path)
            if target.exists():
                target.rename(replaced)
            unfinished.rename(target)
            flush(target.parent)
    finally:
        _restore(target, replaced)
        shutil.rmtree(unfinished, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no object")
    return value


def _read(folder: Path) -> Checkpoint:
    state = read_json(folder / "state.json")
    try:
        return Checkpoint(
            folder=folder,
            step=state["step"],
            cursor=state["cursor"],
            num_threads=state["num_threads"],
            score=_scores(folder.parent).get(folder.name),
        )
    except KeyError as error:
        raise CheckpointError(
            f"{folder / 'state.json'} has no {error}: it is damaged, or of an older querl; "
            "start over with --fresh"
        ) from error


def _scores(folder: Path) -> dict[str, float]:
    path = folder / "scores.json"
    return read_json(path) if path.exists() else {}


def _tidy(folder: Path) -> None:
    """Undo what a killed writer left: half-written folders go, a folder put aside comes back."""
    for path in folder.iterdir():
        if path.name.startswith(_REPLACED):
            _restore(path.with_name(path.name.removeprefix(_REPLACED)), path)
        elif path.name.startswith(UNFINISHED) and not path.is_symlink():
            shutil.rmtree(path)


def _restore(target: Path, replaced: Path) -> None:
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.rename(target)
