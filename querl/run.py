"""One training run on disk: its recipe, numbers, trajectories, checkpoints, and who may write.

FOLDER/recipe.toml           the resolved recipe, without a database server's password
FOLDER/derived.json          numbers that follow from it
FOLDER/metrics.jsonl         a line a step
FOLDER/evaluations.jsonl     a line a validation
FOLDER/slowest.jsonl         a line a step: the episodes that it waited for longest
FOLDER/records/              the trajectories (``querl.records``)
FOLDER/dumps/                batches that no update was made from (``querl.trainer.guards``)
FOLDER/checkpoints/          last and best (``querl.trainer.checkpoint``)
FOLDER/tensorboard/, wandb/  where ``run.loggers`` asks for them (``querl.loggers``)
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from querl import durable, records
from querl.config import Recipe
from querl.durable import saving
from querl.errors import ConfigError
from querl.eval.run import rating
from querl.loggers import open_loggers
from querl.metrics import JsonlSink, Metrics
from querl.run_check import check_content, without_secrets
from querl.trainer.checkpoint import Checkpoint, Checkpoints, RunLock, restore_threads
from querl.trainer.guards import FaultLog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from querl.loggers import Logger
    from querl.trainer.checkpoint import Saveable
    from querl.trainer.guards import Fault
    from querl.trainer.learner import Learner
    from querl.types import Group

EVALUATIONS = "evaluations.jsonl"


class Watcher(Protocol):
    """Whoever shows the run to a person."""

    def stepped(self, step: int, values: dict[str, float]) -> None:
        """A step has ended."""
        ...

    def evaluated(self, step: int, summary: dict[str, Any]) -> None:
        """A validation has ended."""
        ...

    def say(self, text: str) -> None:
        """One line for the person."""
        ...


class RunFolder:
    """The folder of a supervised run, and what every run's has: a context manager that holds it.

    Ctrl-C once asks the loop to stop after the step, which saves; a second one stops at once, and
    the checkpoint before it stays good.
    """

    checkpoints: Checkpoints

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        say: Callable[[str], None],
        *,
        derived: Mapping[str, int],
        fresh: bool,
    ) -> None:
        self.folder = folder
        self._recipe = without_secrets(recipe)
        self._say = say
        self._derived = derived
        self._fresh = fresh
        self._learns_from = ""
        self._wants_to_stop = False
        self._held = ExitStack()

    def __enter__(self) -> Self:
        """Take the folder. Raises CheckpointError when another run holds it."""
        with ExitStack() as held:  # a refusal below gives the lock back
            held.enter_context(RunLock(self.folder))
            with saving(self.folder):
                check_content(self.folder, self._recipe, fresh=self._fresh)
                if self._fresh:
                    _empty(self.folder)
                durable.replace_text(self.folder / "recipe.toml", self._recipe.to_toml())
                text = json.dumps(dict(self._derived), indent=1)
                durable.replace_text(self.folder / "derived.json", text)
            self.checkpoints = Checkpoints(
                self.folder / "checkpoints", keep=self._recipe.run.keep_checkpoints
            )
            held.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
            signal.signal(signal.SIGINT, self._on_interrupt)
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give folder and keyboard back."""
        self._held.close()

    @property
    def wants_to_stop(self) -> bool:
        """Whether Ctrl-C was pressed."""
        return self._wants_to_stop

    def resume(self, learns_from: str, *, num_steps: int) -> Checkpoint | None:
        """The last checkpoint; from here on torch computes with as many threads as it was.

        ``learns_from`` is a ``fingerprint``, kept in each checkpoint. Raises ConfigError when the
        run in the folder learnt from something else.
        """
        self._learns_from = learns_from
        last = self.checkpoints.last()
        if last is None:
            return None
        check_learnt_from(self.folder, last, learns_from)
        if restore_threads(last):
            self._say(f"computing with {last.num_threads} threads, as the run so far")
        if last.step < num_steps:
            self._say(f"resuming after step {last.step}")
        else:
            self._say(finished(self.folder))
        return last

    def write(self, learner: Saveable, **cursor: int) -> Checkpoint:
        """Write a checkpoint from which the run can go on."""
        return self.checkpoints.save(learner, cursor={**cursor, "learns_from": self._learns_from})

    def _on_interrupt(self, *_: object) -> None:
        if self._wants_to_stop:
            raise KeyboardInterrupt
        self._wants_to_stop = True
        self._say("stopping after this step; Ctrl-C again stops at once")


class Run(RunFolder):
    """Implements ``querl.train.Log`` over a folder."""

    def __init__(self, folder: Path, recipe: Recipe, watcher: Watcher, *, fresh: bool) -> None:
        super().__init__(folder, recipe, watcher.say, derived=recipe.derived(), fresh=fresh)
        self._watcher = watcher
        self._metrics = JsonlSink(folder / "metrics.jsonl")
        self._evaluations = folder / EVALUATIONS
        self._slowest = folder / "slowest.jsonl"
        digest = fingerprint("recipe", self._recipe.to_toml().encode())
        self._faults = FaultLog(folder / "dumps", digest, watcher.say)
        self._latest: tuple[int, float] | None = None
        self._loggers: list[Logger] = []

    def resume_point(self, learns_from: str) -> Checkpoint | None:
        """As ``resume``; what was written after it is cut off, since it is made again."""
        last = self.resume(learns_from, num_steps=self._recipe.run.num_steps)
        self._return_to(last)
        settings = self._recipe.model_dump(mode="json")
        names = self._recipe.run.loggers
        with saving(self.folder):
            first_step = last.step + 1 if last else 0
            self._loggers = open_loggers(names, self.folder, settings, first_step=first_step)
        for logger in self._loggers:
            self._held.callback(logger.close)
        return last

    def stay_finished(self) -> None:
        """As ``resume_point`` where ``is_finished``, whatever the run learnt from."""
        self._say(finished(self.folder))
        self._return_to(self.checkpoints.last())

    def evaluations(self) -> list[dict[str, Any]]:
        """Every validation so far, oldest first."""
        return durable.read_lines(self._evaluations)

    def has_evaluation(self, step: int) -> bool:
        """Whether the policy after ``step`` updates has been validated."""
        return any(line["step"] == step for line in self.evaluations())

    def groups(self, step: int, groups: Sequence[Group]) -> None:
        """Write the step's trajectories, and name the slowest."""
        with saving(self.folder / "records"):
            records.write_step(self.folder / "records", step, groups)
        with saving(self._slowest), self._slowest.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "episodes": slowest(groups)}) + "\n")

    def evaluation(self, step: int, summary: dict[str, Any]) -> None:
        """Write a validation; a checkpoint of that step, which had none, is rated by it."""
        with saving(self._evaluations), self._evaluations.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **summary}) + "\n")
        self._latest = step, rating(summary)
        last = self.checkpoints.last()
        if last is not None and last.step == step:
            self.checkpoints.rate(last, rating(summary))
        numbers = {f"eval/{k}": v for k, v in summary.items() if isinstance(v, int | float)}
        self._report(step, numbers)
        self._watcher.evaluated(step, summary)

    def end_step(self, step: int, metrics: Metrics) -> None:
        """Write the step's numbers."""
        values = metrics.values()
        with saving(self.folder / "metrics.jsonl"):
            self._metrics.write(step, values)
        self._report(step, values)
        self._watcher.stepped(step, values)

    def faults(self, step: int, faults: Sequence[Fault]) -> None:
        """Tell what was skipped. Raises TrainingError where it goes on and on."""
        self._faults.note(step, faults)

    def save(self, step: int, learner: Learner, cursor: int) -> None:
        """Write a checkpoint, rated if the policy was validated at this very step."""
        checkpoint = self.write(learner, group=cursor)
        if self._latest is not None and self._latest[0] == step:
            self.checkpoints.rate(checkpoint, self._latest[1])

    def _return_to(self, last: Checkpoint | None) -> None:
        step = last.step if last else -1
        with saving(self.folder):
            self._metrics.truncate_after(step)
            records.truncate_after(self.folder / "records", step)
            durable.truncate_after(self._evaluations, step)
            durable.truncate_after(self._slowest, step)
        for line in self.evaluations():
            if last is not None and line["step"] == step:  # a kill may have come before its rating
                self.checkpoints.rate(last, rating(line))

    def _report(self, step: int, values: Mapping[str, float]) -> None:
        with saving(self.folder):
            for logger in self._loggers:
                logger.write(step, values)


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether a run has made all its steps and validated the last, so that only its report is left.

    For who prepares something costly before; leaves no trace. The recipe is one that
    ``check_folder`` lets pass. Raises CheckpointError where the last checkpoint is damaged.
    """
    last = Checkpoints.last_of(folder)
    validated = [line["step"] for line in durable.read_lines(folder / EVALUATIONS)]
    return last is not None and last.step >= recipe.run.num_steps and last.step in validated


def finished(folder: Path) -> str:
    """What to say of a run that is."""
    return f"{folder} holds a finished run: to start over, add --fresh"


def check_learnt_from(folder: Path, last: Checkpoint, learns_from: str) -> None:
    """Raises ConfigError where the checkpoint was learnt from what has another ``fingerprint``."""
    before = last.cursor.get("learns_from")
    if before != learns_from:
        raise ConfigError(
            f"{folder} holds a run on {before}, not on {learns_from}: give it the same "
            "data to resume, name another --out, or start over with --fresh"
        )


def slowest(groups: Sequence[Group], most: int = 10) -> list[dict[str, Any]]:
    """The episodes that took longest, the slowest first: where, how long, and with what."""
    episodes = [
        (trajectory, group.id, sample)
        for group in groups
        for sample, trajectory in enumerate(group.trajectories)
    ]
    episodes.sort(key=lambda episode: -episode[0].seconds)
    return [
        {
            "task": trajectory.task_id,
            "group": group,
            "sample": sample,
            "seconds": round(trajectory.seconds, 3),
            "sql_seconds": round(sum(t.result.seconds for t in trajectory.turns if t.result), 3),
            "turns": len(trajectory.turns),
            "tokens": sum(len(turn.completion.token_ids) for turn in trajectory.turns),
            "stop": trajectory.stop,
        }
        for trajectory, group, sample in episodes[:most]
    ]


def fingerprint(what: str, content: bytes) -> str:
    """What a run learns from, in words and a digest: equal where nothing has changed."""
    return f"{what} ({hashlib.sha256(content).hexdigest()[:16]})"


def _empty(folder: Path) -> None:
    """Remove an earlier run."""
    # first what makes it a run that can go on: a kill in the middle leaves none, not half of one
    (folder / "checkpoints" / "last").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != "lock":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
