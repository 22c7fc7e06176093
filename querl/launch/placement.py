"""Where engine and learner live, and what happens between an update and the next episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from querl.metrics import Metrics

if TYPE_CHECKING:
    from querl.rollout.engine import Engine
    from querl.rollout.probe import Probe
    from querl.trainer.learner import Learner


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Implements ``querl.train.Placement``: nobody has to give anything back."""

    engine: Engine
    learner: Learner
    probe: Probe

    async def make_room(self) -> Metrics:
        """The learner may work."""
        return Metrics()

    async def publish(self, version: int) -> Metrics:
        """Load the weights, and compare engine and learner."""
        await self.engine.load_weights(self.learner.weights(), version)
        await self.probe.ask()
        metrics = await self.probe.compare()
        metrics.add_max("engine/restarts", self.engine.num_restarts)
        return metrics


@dataclass(frozen=True, slots=True)
class TakingTurns:
    """Implements ``querl.train.Placement`` on one set of GPUs: one works while the other sleeps.

    The learner's weights may be away while the engine samples, so the probe's answer is compared
    when both have been awake: before the next update, and before anything is learnt from episodes
    of an engine that has other weights.
    """

    engine: Engine
    learner: Learner
    probe: Probe

    async def make_room(self) -> Metrics:
        """The engine sleeps, the learner wakes."""
        await self.engine.sleep()
        await self.learner.wake()
        return await self.probe.compare()

    async def publish(self, version: int) -> Metrics:
        """Weights into the engine while its cache is away, then the learner sleeps."""
        torch.cuda.empty_cache()  # what an update took, and torch kept: the engine's weights wake
        await self.engine.load_weights(self.learner.weights(), version)
        await self.learner.sleep()
        await self.engine.wake()
        await self.probe.ask()
        metrics = Metrics()
        metrics.add_max("engine/restarts", self.engine.num_restarts)
        return metrics
