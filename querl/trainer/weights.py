"""What a learner publishes: its module, and names and tensors for servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from querl.errors import ConfigError
from querl.trainer.lora import has_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

_WRAPPED = ".base_layer."  # PEFT's, between a matrix and the layer that it put an adapter beside
_ADAPTER = ".lora_"


class PublishedWeights:
    """Implements ``rollout.dialect.ModuleWeights`` for a model, with or without an adapter."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.module = model

    @property
    def is_adapter(self) -> bool:
        """Whether only an adapter is trained."""
        return has_adapter(self.module)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by their names in a Hugging Face folder, tied ones once, adapters left out.

        On whatever device they lie; valid until the next update. Raises ConfigError for weights in
        4 bits, which are no tensors of that folder.
        """
        if any("quant_state" in vars(weight) for weight in self.module.parameters()):
            raise ConfigError(
                "lora.quantise='nf4': its weights are in 4 bits and cannot be sent to an engine: "
                "set lora.quantise = 'none'"
            )
        from transformers.core_model_loading import revert_weight_conversion

        # some models lie in memory by other names, or as other tensors, than in their folder
        yield from revert_weight_conversion(self.module, self._own()).items()

    def _own(self) -> dict[str, Tensor]:
        """Parameters and saved buffers by the names that they would have without an adapter."""
        found: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if _ADAPTER not in name and id(tensor) not in seen:
                seen.add(id(tensor))
                found[name.replace(_WRAPPED, ".")] = tensor.detach()
        return found

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as PEFT does. Only where ``is_adapter``."""
        assert self.is_adapter, "a model without an adapter has none to save"
        self.module.save_pretrained(folder)
