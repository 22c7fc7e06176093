"""Where engine and learner live, and what happens between an update and the next episode."""

from __future__ import annotations

from typing import TYPE_CHECKING

from querl.metrics import Metrics

if TYPE_CHECKING:
    from querl.rollout.engine import Engine
    from querl.rollout.probe import Probe
    from querl.trainer.learner import Learner


class SideBySide:
    """Implements ``querl.train.Placement``: nobody has to give anything back."""

    def __init__(self, engine: Engine, learner: Learner, probe: Probe) -> None:
        self._engine = engine
        self._learner = learner
        self._probe = probe

    async def make_room(self) -> Metrics:
        """The learner may work."""
        return Metrics()

    async def publish(self, version: int) -> Metrics:
        """Load the weights, and compare engine and learner."""
        await self._engine.load_weights(self._learner.weights(), version)
        await self._probe.ask()
        metrics = await self._probe.compare()
        metrics.add_max("engine/restarts", self._engine.num_restarts)
        return metrics


class TakingTurns:
    """Implements ``querl.train.Placement`` on one set of GPUs: one works while the other sleeps.

    The learner's weights may be away while the engine samples, so the probe's answer is compared
    when both have been awake: before the next update, and before anything is learnt from episodes
    of an engine that has other weights.
    """

    def __init__(self, engine: Engine, learner: Learner, probe: Probe) -> None:
        self._engine = engine
        self._learner = learner
        self._probe = probe

    async def make_room(self) -> Metrics:
        """The engine sleeps, the learner wakes."""
        await self._engine.sleep()
        await self._learner.wake()
        return await self._probe.compare()

    async def publish(self, version: int) -> Metrics:
        """Weights into the engine while its cache is away, then the learner sleeps."""
        await self._engine.load_weights(self._learner.weights(), version)
        await self._learner.sleep()
        await self._engine.wake()
        await self._probe.ask()
        metrics = Metrics()
        metrics.add_max("engine/restarts", self._engine.num_restarts)
        return metrics
