"""What a run does when its engine is killed, frozen or left without memory, and how soon.

Each fault is done to the real server of a real run, in the middle of the second step's rollout: its
largest process gets SIGKILL or SIGSTOP. Without memory: before the engine wakes after the second
update, another process takes all but 2 GiB of what is free of the GPU, and keeps it. One line of
JSON a fault: whether the run went on or stopped, after how many seconds, why, and what was lost.

    python benchmarks/engine_faults.py --faults kill freeze memory --run /tmp/faults \
        --out faults.jsonl model.path=MODEL data.source=spider:FOLDER run.groups_per_step=32 \
        engine.heartbeat_s=5 'engine.options={enforce_eager=true}'

``goes_on_s`` counts from the fault to the first answer of the engine that was started anew,
``ended_s`` from the last fault to the end of the run, its steps saved; ``start_s`` is what a first
start took. ``twice`` kills the new server too, which no run should survive.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from spider_step import Lines
from spider_work import first_tasks, read_recipe

from querl.errors import EngineError
from querl.launch.engines import starting_engine
from querl.launch.training import prepare, train_prepared
from querl.rollout.engine import RequestKey, Sampling
from querl.rollout.http_engine import HttpEngine
from querl.run import Run
from querl.trainer.checkpoint import Checkpoints
from querl.types import Completion

FAULTS = ("kill", "freeze", "memory", "twice")
STEPS = 3
FAULTY_VERSION = 1  # of the weights that the second step samples from
SHARE_BEFORE = 0.25  # of a step's episodes are answered once before the fault

# Takes what is free of the GPU when it is told to, and keeps it until it is ended. The learner is
# left a little: it is to save what it has.
HOG = """
import sys, torch
has_gpu = torch.cuda.is_available()
held = [torch.empty(1, device="cuda" if has_gpu else "cpu")]
print("ready", flush=True)
sys.stdin.readline()
while has_gpu and torch.cuda.mem_get_info()[0] > 2 * 2**30:
    held.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))
print("held", flush=True)
sys.stdin.readline()
"""


class Watched:
    """Implements ``querl.rollout.engine.Engine`` by another, and does a fault to it."""

    def __init__(self, engine: HttpEngine, *, fault: str, hog: Callable[[], None], after: int):
        self._engine = engine
        self._fault = fault
        self._hog = hog
        self._after = after  # answers of the faulty version
        self._num_answers = 0
        self._num_open = 0
        self.faults: list[float] = []  # when
        self.goes_on: float | None = None  # when it answered again
        self.first_answer: float | None = None
        self.open_then = 0  # requests that were open when the fault was done

    @property
    def version(self) -> int:
        """The policy step of the weights now loaded."""
        return self._engine.version

    @property
    def num_restarts(self) -> int:
        """How often the server was started anew."""
        return self._engine.num_restarts

    async def generate(
        self, prompt_ids: tuple[int, ...], sampling: Sampling, key: RequestKey
    ) -> Completion:
        """Sample one completion; after some of them the fault happens."""
        self._num_open += 1
        try:
            completion = await self._engine.generate(prompt_ids, sampling, key)
        finally:
            self._num_open -= 1
        self.first_answer = self.first_answer or time.perf_counter()
        self._answered(is_of_episode=key.group >= 0)
        return completion

    def _answered(self, *, is_of_episode: bool) -> None:
        if self.faults and self._engine.num_restarts and self.goes_on is None:
            self.goes_on = time.perf_counter()
            if self._fault == "twice":
                self._do(signal.SIGKILL)
        self._num_answers += is_of_episode and self.version == FAULTY_VERSION
        if self._num_answers == self._after and not self.faults:
            if self._fault in ("kill", "twice"):
                self._do(signal.SIGKILL)
            elif self._fault == "freeze":
                self._do(signal.SIGSTOP)

    def _do(self, number: signal.Signals) -> None:
        self.open_then = self._num_open
        self.faults.append(time.perf_counter())
        os.kill(largest_server_process(), number)

    def enter(self, num_episodes: int) -> None:
        """As the other."""
        self._engine.enter(num_episodes)

    def leave(self, num_episodes: int) -> None:
        """As the other."""
        self._engine.leave(num_episodes)

    async def load_weights(self, weights: Any, version: int) -> None:
        """As the other."""
        await self._engine.load_weights(weights, version)

    async def sleep(self) -> None:
        """As the other."""
        await self._engine.sleep()

    async def wake(self) -> None:
        """As the other, with nothing left to take where memory is the fault."""
        if self._fault == "memory" and self.version == FAULTY_VERSION + 1 and not self.faults:
            await asyncio.to_thread(self._hog)
            self.faults.append(time.perf_counter())
        await self._engine.wake()

    async def close(self) -> None:
        """As the other."""
        await self._engine.close()


def largest_server_process() -> int:
    """Of those in the process groups that this process has started servers in."""
    sizes: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdigit() and _is_of_a_server(int(folder.name)):
                pages = int((folder / "statm").read_text(encoding="ascii").split()[1])
                sizes[int(folder.name)] = pages
    return max(sizes, key=lambda pid: sizes[pid])


def _is_of_a_server(pid: int) -> bool:
    leader = os.getpgid(pid)
    command = Path(f"/proc/{leader}/cmdline").read_bytes()
    status = Path(f"/proc/{leader}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    return b"keeper.py" in command and int(status.split()[1]) == os.getpid()


@contextmanager
def standing_hog() -> Iterator[Callable[[], None]]:
    """A process that takes the GPU's free memory when it is called."""
    with subprocess.Popen(
        [sys.executable, "-c", HOG], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told, heard = process.stdin, process.stdout
        heard.readline()

        def take_all() -> None:
            told.write("take\n")
            told.flush()
            heard.readline()

        try:
            yield take_all
        finally:
            process.kill()


class Steps:
    """Implements ``querl.run.Watcher``: seconds and failed episodes of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.failed: list[float] = []

    def stepped(self, step: int, values: dict[str, float]) -> None:  # noqa: ARG002
        """A step has ended."""
        if "rollout/failed" in values:
            self.seconds.append(values["time/step_s"])
            self.failed.append(values["rollout/failed"])

    def evaluated(self, step: int, summary: dict[str, Any]) -> None:
        """One question says nothing."""

    def say(self, text: str) -> None:
        """What the run tells a person."""
        print(text, flush=True)


def measure(fault: str, args: argparse.Namespace, lines: Lines) -> None:
    """One run with one fault."""
    recipe = read_recipe(args.recipe, args.overrides, num_steps=STEPS)
    steps, folder = Steps(), args.run / fault
    started = time.perf_counter()
    with standing_hog() as hog, starting_engine(recipe) as engine:
        if not isinstance(engine, HttpEngine):
            raise SystemExit(f"engine.kind={recipe.engine.kind} is no server: there is none to end")
        prepared = asyncio.run(prepare(recipe))
        prepared = replace(prepared, training=first_tasks(recipe, prepared.training))
        num_episodes = recipe.run.groups_per_step * recipe.run.group_size
        after = max(int(SHARE_BEFORE * num_episodes), 1)
        watched = Watched(engine, fault=fault, hog=hog, after=after)

        async def train() -> None:
            async with asyncio.timeout(args.deadline):
                await train_prepared(recipe, prepared, run, steps.say, engine=watched)

        outcome, why = "went on", ""
        try:
            with Run(folder, recipe, steps, fresh=True) as run:
                asyncio.run(train())
        except EngineError as error:
            outcome, why = "stopped", str(error)
        except torch.OutOfMemoryError as error:
            outcome, why = "learner out of memory", str(error)
        except TimeoutError:
            outcome, why = "hung", f"nothing within {args.deadline:g} s"
        ended = time.perf_counter()
    last = Checkpoints(folder / "checkpoints", keep=2).last()
    since = watched.faults[0] if watched.faults else ended
    lines.write(
        what="fault",
        fault=fault,
        outcome=outcome,
        why=why[-2000:],
        was_done=bool(watched.faults),
        start_s=(watched.first_answer or ended) - started,
        goes_on_s=watched.goes_on - since if watched.goes_on else None,
        ended_s=ended - (watched.faults[-1] if watched.faults else started),
        restarts=watched.num_restarts,
        open_requests=watched.open_then,
        step_s=steps.seconds,
        failed_share=steps.failed,
        saved_step=last.step if last else None,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    )


def main() -> None:
    """A run for each fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="settings of the recipe: section.key=value")
    parser.add_argument("--recipe", type=Path, default=Path("recipes/spider-qwen-0.5b.toml"))
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=["kill"])
    parser.add_argument("--run", type=Path, required=True, help="folder of the runs, begun anew")
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds for one run")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    args = parser.parse_args()
    for fault in args.faults:
        measure(fault, args, Lines(args.out))


if __name__ == "__main__":
    main()
