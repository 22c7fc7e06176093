"""What every learner offers: samples in, better weights out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from querl.metrics import Metrics
    from querl.rollout.dialect import ModuleWeights
    from querl.trainer.guards import Fault
    from querl.types import Sample


class Learner(Protocol):
    """A policy that can be improved; ``tests/contract/test_learner.py`` holds for all."""

    @property
    def step(self) -> int:
        """How many updates have been made; 0 before the first."""
        ...

    async def update(self, samples: Sequence[Sample]) -> Metrics:
        """One policy update on one step's samples (possibly several minibatches and epochs)."""
        ...

    @property
    def faults(self) -> Sequence[Fault]:
        """The optimizer steps that the last update did not make: see ``querl.trainer.guards``."""
        ...

    async def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Log-probability of each trained token under the current weights: [N][loss tokens]."""
        ...

    async def sleep(self) -> None:
        """Give the GPU's memory back while an engine samples; a no-op where nothing can be.

        Asleep it can be saved; whatever computes or loads wakes it first.
        """
        ...

    async def wake(self) -> None:
        """Take the memory again: before an update, and before ``weights`` are published."""
        ...

    def weights(self) -> ModuleWeights:
        """A handle that every engine knows how to load."""
        ...

    def save(self, folder: Path) -> None:
        """Write the model (a plain Hugging Face folder under ``model/``) and all training state."""
        ...

    def load(self, folder: Path) -> None:
        """Restore exactly what ``save`` wrote. Raises CheckpointError when it is damaged."""
        ...
