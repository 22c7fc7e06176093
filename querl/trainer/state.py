"""A learner's state on disk: the model, the optimizer, and how many steps were made.

The model is a plain folder, or a PEFT adapter's where one is trained, which names its base model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from querl.errors import CheckpointError, ModelError
from querl.trainer.checkpoint import read_json
from querl.trainer.lora import has_adapter, read_adapter
from querl.trainer.model import load_model, write_model

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from querl.trainer.optim import AdamW


def write_state(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: AdamW,
    step: int,
) -> None:
    """Write ``model/``, ``optimizer.safetensors`` and ``learner.json`` into an existing folder."""
    write_model(model, tokenizer, folder / "model")
    tensors = {name: tensor.detach().cpu() for name, tensor in optimizer.state().items()}
    save_file(tensors, folder / "optimizer.safetensors")
    state = {"format": 1, "step": step}
    (folder / "learner.json").write_text(json.dumps(state), encoding="utf-8")


def read_state(folder: Path, model: PreTrainedModel, optimizer: AdamW) -> int:
    """Restore weights and optimizer in place (whoever shares the module sees them); the step.

    Raises CheckpointError when the folder is damaged or of another model.
    """
    step = read_json(folder / "learner.json").get("step")
    if not isinstance(step, int):
        raise CheckpointError(f"{folder / 'learner.json'} is damaged: step = {step!r} is no number")
    try:
        tensors = load_file(folder / "optimizer.safetensors")
        if has_adapter(model):
            read_adapter(model, folder / "model")
        else:
            saved = load_model(folder / "model", device=torch.device("cpu"), dtype=model.dtype)
            model.load_state_dict(saved.state_dict())
        optimizer.load_state(tensors)
    except (OSError, SafetensorError, ModelError, RuntimeError) as error:
        raise CheckpointError(f"{folder} is damaged or of another model: {error}") from error
    return step
