"""What every rollout engine offers: token ids in, sampled ids with exact log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from querl.rollout.dialect import Weights
    from querl.types import Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one completion is sampled. ``temperature = 0`` is greedy; ``stop`` strings are kept."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class RequestKey:
    """Names one completion of a run; with the sampling it fixes every random number it uses."""

    seed: int
    step: int
    group: int
    sample: int
    turn: int


class Engine(Protocol):
    """A policy that can be sampled. All implementations pass ``tests/contract/test_engine.py``."""

    @property
    def version(self) -> int:
        """The policy step of the weights now loaded."""
        ...

    @property
    def num_restarts(self) -> int:
        """How often it was started anew because it had failed."""
        ...

    async def generate(
        self, prompt_ids: tuple[int, ...], sampling: Sampling, key: RequestKey
    ) -> Completion:
        """Sample one completion. Safe to call concurrently; cancelling the await frees its place.

        Raises EngineError when the engine is closed or broken, TimeoutError with its cause when
        this one completion is lost and others are not.
        """
        ...

    def enter(self, num_episodes: int) -> None:
        """Announce live episodes: an engine of static batches waits until all of them ask.

        Every live episode either awaits ``generate`` or is about to; engines that batch
        continuously ignore it. It makes a batch a function of the step and not of timing.
        """
        ...

    def leave(self, num_episodes: int) -> None:
        """Take back ``enter`` for episodes that will not ask again."""
        ...

    async def load_weights(self, weights: Weights, version: int) -> None:
        """Load what ``Learner.weights()`` gave as ``version``; no cached prefix survives."""
        ...

    async def sleep(self) -> None:
        """Give memory back before an update; a no-op where nothing can be given back."""
        ...

    async def wake(self) -> None:
        """Take the memory again; called before ``load_weights``."""
        ...

    async def close(self) -> None:
        """Free everything; further calls raise EngineError."""
        ...
