"""The policy that training began with, for the KL divergence from it."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from querl.errors import CheckpointError
from querl.trainer.attention import tree_attention
from querl.trainer.checkpoint import read_json
from querl.trainer.lora import without_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import PreTrainedModel


class Reference(Protocol):
    """A policy that no update moves. It is no part of a checkpoint: a run makes it anew."""

    @property
    def model(self) -> PreTrainedModel:
        """Where its weights are: the policy's own module, or another."""
        ...

    def active(self) -> AbstractContextManager[PreTrainedModel]:
        """While it is open: a model for packed rows that answers as the reference does."""
        ...


class FrozenCopy:
    """A copy of a model's weights as they are now: make it before a checkpoint is loaded.

    It takes as much memory as the model's weights in their own dtype.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = copy.deepcopy(model)
        self._model.requires_grad_(False)

    @property
    def model(self) -> PreTrainedModel:
        """The copy."""
        return self._model

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The copy."""
        with tree_attention(self._model):
            yield self._model


class AdapterOff:
    """The frozen weights below an adapter, which are the first policy; no second model.

    For use inside the learner's own ``tree_attention``.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @property
    def model(self) -> PreTrainedModel:
        """The policy's own."""
        return self._model

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        """The model itself, its adapter off while this is open."""
        with without_adapter(self._model):
            yield self._model


def write_coefficient(folder: Path, coefficient: float) -> None:
    """Write a KL coefficient that follows a target into a checkpoint: ``kl.json``."""
    text = json.dumps({"coefficient": coefficient})
    (folder / "kl.json").write_text(text, encoding="utf-8")


def read_coefficient(folder: Path) -> float:
    """What ``write_coefficient`` wrote, to the bit. Raises CheckpointError when there is none."""
    state = read_json(folder / "kl.json")
    if not isinstance(state.get("coefficient"), float):
        raise CheckpointError(f"{folder / 'kl.json'} holds no coefficient")
    return float(state["coefficient"])
