"""A run's memory: rows that fit it, the plan before the first step, and what was measured.

The plan is ``querl.trainer.plan``; docs/memory.md tells what is compared with what.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from querl.config import Recipe
from querl.launch.local import model_path
from querl.launch.needs import ASSUMED_GPU_BYTES, num_gpus, plan_settings
from querl.trainer.plan import CONTEXT_BYTES, SERVER_BYTES, MemoryPlan, PlanSettings, plan
from querl.trainer.shapes import DecoderShape, shape_of

if TYPE_CHECKING:
    from querl.metrics import Metrics
    from querl.train import Placement
    from querl.trainer.full import FullLearner

# Rows beyond the longest are no faster; shorter than the shortest, and most samples are rows of
# their own anyway. Powers of two, so that a little more or less free memory cuts a step alike.
ROW_SIZES = (32768, 16384, 8192, 4096, 2048, 1024)
UNKNOWN_SHAPE_TOKENS = 8192
HEADROOM = 0.9  # of the memory; the rest is for what allocators lose between blocks
FAR = 0.1  # a plan that is further off is told as wrong
CPU_NOISE = 256 * 2**20  # bytes that threads and allocators of a process come and go by


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a run's updates are planned with; the model's shape is known."""

    shape: DecoderShape
    settings: PlanSettings
    longest: int  # tokens of the longest trajectory that may come
    room: int  # bytes that the run may take

    @property
    def plan(self) -> MemoryPlan:
        """With rows as long as the recipe allows."""
        return plan(self.shape, self.settings)

    def of_rows(self, num_tokens: int) -> MemoryPlan:
        """With rows of so many tokens."""
        return plan(self.shape, replace(self.settings, tokens_per_microbatch=num_tokens))

    def rows_that_fit(self) -> int:
        """The longest of ``ROW_SIZES`` whose update fits the room; else the shortest.

        A longer trajectory is a row of its own whatever is chosen: ``table`` tells of it.
        """
        most = HEADROOM * self.room
        fitting = (n for n in ROW_SIZES if self.of_rows(n).while_updating <= most)
        return next(fitting, ROW_SIZES[-1])

    def table(self) -> str:
        """The plan, a line a part, for the eye."""
        planned = self.plan
        lines = [f"memory plan, rows of {self.settings.tokens_per_microbatch:,} tokens:"]
        lines += [f"  {part:<15} {size_text(size):>12}" for part, size in planned.lines()]
        sums = {
            "while updating": planned.while_updating,
            "while sampling": planned.while_sampling,
            "at most": planned.peak,
        }
        lines += [f"  {when:<15} {size_text(size):>12}" for when, size in sums.items()]
        if self.longest > self.settings.tokens_per_microbatch:
            lines.append(f"  {self._of_longest()}")
        return "\n".join(lines)

    def _of_longest(self) -> str:
        alone = self.of_rows(self.longest).peak
        told = f"a trajectory of {self.longest:,} tokens would be a longer row: {size_text(alone)}"
        if alone <= self.room:
            return told
        remedy = "set a smaller env.max_input"
        if not self.settings.is_recomputed:
            remedy += ", or memory.checkpoint_activations"
        return f"warning: {told}, more than the {size_text(self.room)} here; {remedy}"


def plan_memory(recipe: Recipe) -> Memory | None:
    """None where the model's shape is unknown. Raises ModelError for a damaged config.json."""
    shape = shape_of(model_path(recipe))
    if shape is None:
        return None
    longest = recipe.env.max_input + recipe.env.max_turn_tokens
    return Memory(
        shape=shape, settings=plan_settings(recipe), longest=longest, room=room_bytes(recipe)
    )


def with_rows(recipe: Recipe) -> Recipe:
    """The recipe with ``memory.tokens_per_microbatch`` as it is, or chosen where it is 0."""
    if recipe.memory.tokens_per_microbatch:
        return recipe
    memory = plan_memory(recipe)
    num_tokens = UNKNOWN_SHAPE_TOKENS if memory is None else memory.rows_that_fit()
    section = recipe.memory.model_copy(update={"tokens_per_microbatch": num_tokens})
    return recipe.model_copy(update={"memory": section})


def room_bytes(recipe: Recipe) -> int:
    """What a run may take: on a GPU what is free or its own; else the machine's memory.

    Not the free part of the latter: a run that is resumed must cut its steps as before. Nor that of
    a GPU where a server is starting: all that this one does not hold while it sleeps.
    """
    if num_gpus(recipe) and torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        if recipe.engine.placement == "colocated":
            return int(whole) - SERVER_BYTES - CONTEXT_BYTES
        return int(free) + torch.cuda.memory_reserved()
    if num_gpus(recipe):
        return ASSUMED_GPU_BYTES
    return int(os.sysconf("SC_PAGE_SIZE")) * int(os.sysconf("SC_PHYS_PAGES"))


def size_text(size: int) -> str:
    """``1.25 GiB``, or ``310.2 MiB``."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


class GpuMeter:
    """All that torch has allocated on a GPU."""

    what = "the GPU held"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> bool:
        """The peak begins anew."""
        torch.cuda.reset_peak_memory_stats(self._device)
        return True

    def peak(self) -> int:
        """Bytes in tensors."""
        return torch.cuda.max_memory_allocated(self._device)

    def planned(self, plan: MemoryPlan) -> int:
        """The state is there, and all else that an update is beside."""
        return plan.while_updating

    def is_far(self, measured: int, planned: int) -> bool:
        """By a tenth, either way."""
        return abs(measured - planned) > FAR * planned


class ProcessMeter:
    """By how much this process's resident memory has grown, as Linux tells it.

    It counts from where the meter is made, before anything is sampled or trained. A process keeps
    much of what it frees, so what sampling took is still there in an update, unused or used again.
    ``has_moments`` tells whether the optimizer's are there when the meter is made.
    """

    what = "the process has grown by"

    def __init__(self, *, has_moments: bool) -> None:
        self._has_moments = has_moments
        self._before = _status("VmRSS")

    def start(self) -> bool:
        """The peak begins anew."""
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return False
        return True

    def peak(self) -> int:
        """Bytes beyond those when the meter was made."""
        return _status("VmHWM") - self._before

    def planned(self, plan: MemoryPlan) -> int:
        """All but the weights, which were there before, as the moments are after a resume."""
        moments = 0 if self._has_moments else plan.moments
        return plan.update + plan.sampling + moments

    def is_far(self, measured: int, planned: int) -> bool:
        """By a tenth above, and by more than what comes and goes anyway.

        Never below: what was freed before may be used again.
        """
        return measured - planned > max(FAR * planned, CPU_NOISE)


class MeasuredUpdates:
    """Implements ``querl.train.Placement`` by another, and holds one update against the plan.

    That is the second one with anything to train, since a plan is of the steps after the first; of
    a run with a single step to go it is that one.
    """

    def __init__(
        self,
        placement: Placement,
        learner: FullLearner,
        memory: Memory,
        *,
        say: Callable[[str], None],
        num_steps: int,
    ) -> None:
        device = learner.weights().module.device
        self._placement = placement
        self._meter = (
            GpuMeter(device)
            if device.type == "cuda"
            else ProcessMeter(has_moments=learner.step > 0)
        )
        self._memory = memory
        self._learner = learner
        self._say = say
        self._num_to_pass = 1 if num_steps > 1 else 0
        self._is_watching = False
        self._is_done = False

    async def make_room(self) -> Metrics:
        """The learner may work, and is watched until one update has been told of."""
        metrics = await self._placement.make_room()
        self._is_watching = not self._is_done and self._meter.start()
        return metrics

    async def publish(self, version: int) -> Metrics:
        """Tell what the update took, and publish."""
        longest_row = self._learner.longest_row
        if self._is_watching and longest_row:
            self._is_done = self._num_to_pass == 0
            self._num_to_pass -= 1
            if self._is_done:
                self._say(self._told(self._meter.peak(), longest_row))
        self._is_watching = False
        return await self._placement.publish(version)

    def _told(self, measured: int, longest_row: int) -> str:
        planned = self._meter.planned(self._memory.of_rows(longest_row))
        line = (
            f"memory: {self._meter.what} {size_text(measured)} in an update with rows of up to "
            f"{longest_row:,} tokens, planned {size_text(planned)}: {measured / planned:.2f} of it"
        )
        is_far = self._meter.is_far(measured, planned)
        return f"warning: {line}; the plan is wrong here" if is_far else line


def _status(name: str) -> int:
    """A size in bytes out of what Linux says of this process; 0 on another system."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
