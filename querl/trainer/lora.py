"""LoRA: a small trained adapter beside frozen matrices (arXiv 2106.09685), held by PEFT.

The adapter is put into the model in place, unmerged, so whoever shares the module samples with it,
and switching it off gives the policy that training began with. An adapter computes in the model's
own dtype; where that is half precision, the optimizer's masters are its float32 values.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from querl.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
EVERY_MATRIX = "all-linear"
NAME = "default"  # PEFT's own for a model's only adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """``W x + alpha / rank * B A x``, or ``alpha / sqrt(rank)`` where ``is_rank_stable``.

    (rsLoRA: arXiv 2312.03732.) ``targets`` are the ends of layers' names, or ``all-linear``: all
    matrices but the head. A is random and B zero, so the first policy is the base model's.
    """

    rank: int
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (EVERY_MATRIX,)
    is_rank_stable: bool = False


def add_adapter(
    model: PreTrainedModel, settings: LoraSettings, *, base: Path, seed: int = 0
) -> None:
    """Freeze the model and put an adapter into it, a function of the seed.

    ``base`` is what the adapter's own folder will name as its base model. Raises ConfigError for
    targets that the model does not have.
    """
    from peft import LoraConfig

    is_everywhere = settings.targets == (EVERY_MATRIX,)
    if not is_everywhere:
        _check_targets(model, settings.targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides it: any number will do
        lora_dropout=settings.dropout,
        target_modules=EVERY_MATRIX if is_everywhere else list(settings.targets),
        use_rslora=settings.is_rank_stable,
    )
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(seed)
        model.add_adapter(config)
    config.base_model_name_or_path = str(base.resolve())
    _settle(model)


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether there is one in the model."""
    return any("lora_" in name for name, _ in model.named_parameters())


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """While it is open the model is the frozen one."""
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()


@contextmanager
def dropping_out(model: PreTrainedModel, *, seed: int) -> Iterator[None]:
    """While it is open the adapter's dropout acts, as a function of the seed.

    For supervised training. Never for a policy: new/old would not be 1 at the first inner step.
    """
    dropouts = [
        module
        for name, module in model.named_modules()
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
    ]
    with torch.random.fork_rng(devices=[] if model.device.type == "cpu" else [model.device]):
        torch.manual_seed(seed)
        for module in dropouts:
            module.train()
        try:
            yield
        finally:
            for module in dropouts:
                module.eval()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    return (folder / ADAPTER_CONFIG).exists()


def base_of(folder: Path) -> Path:
    """The base model that an adapter's folder names. Raises ModelError when it is not there."""
    try:
        named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = Path(named["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} names no base model: {error}") from error
    if not base.exists():
        raise ModelError(
            f"{folder} is an adapter to {base}, which is not here: put the base model there, or "
            f"name its folder as base_model_name_or_path in {folder / ADAPTER_CONFIG}"
        )
    return base


def adapter_rank(folder: Path) -> int:
    """The largest rank in an adapter's folder. Raises ModelError when none is named."""
    try:
        named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return max(int(rank) for rank in (named["r"], *named.get("rank_pattern", {}).values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} names no rank: {error}") from error


def attach_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put a folder's adapter into its base model.

    Raises ModelError where it does not fit, and where it is more or other than LoRA: such an
    adapter could be switched on, and neither off nor merged.
    """
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config, LoraConfig) or config.modules_to_save:
            raise ModelError(
                f"the adapter {folder} is not LoRA alone: merge it into its base by the tool that "
                "made it, and name the merged model"
            )
        model.add_adapter(config)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"the adapter {folder} cannot be put into its base: {error}") from error
    read_adapter(model, folder)
    _settle(model)


@torch.no_grad()
def read_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Copy a folder's adapter into the one that the model has, in place.

    Raises ModelError when it is damaged or of another shape.
    """
    path = folder / ADAPTER_WEIGHTS
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is missing or damaged: {error}") from error
    own = _adapter_weights(model)
    if own.keys() != saved.keys():
        raise ModelError(f"{path} is of another adapter: other matrices, or not LoRA alone")
    for name, weight in own.items():
        if weight.shape != saved[name].shape:
            raise ModelError(f"{path} is of another adapter: {name} is {list(saved[name].shape)}")
        weight.copy_(saved[name])


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> None:
    """Make the model a plain one: each matrix plus what its adapter adds, in float32.

    Raises ModelError where that is no number.
    """
    from peft.tuners.lora import LoraLayer

    dtype = model.get_input_embeddings().weight.dtype
    assert isinstance(dtype, torch.dtype)
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, layer in layers:
        layer.float()
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"the adapter of {name} cannot be merged: {error}") from error
        parent, _, own_name = name.rpartition(".")
        model.get_submodule(parent).register_module(own_name, layer.get_base_layer().to(dtype))
    model._hf_peft_config_loaded = False
    del model.peft_config


def _check_targets(model: PreTrainedModel, targets: Sequence[str]) -> None:
    """Refuse what PEFT passes over, a name that fits nothing, and the head: its product is ours."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"lora.targets={list(targets)}: {target!r} is no matrix of the layers: use some of "
                f"{', '.join(known)}, or {EVERY_MATRIX} alone"
            )


def _adapter_weights(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The adapter's weights by the names that its folder has for them."""
    from peft import get_peft_model_state_dict

    # not the head, whatever PEFT thinks of it: we never train it
    found: dict[str, Tensor] = get_peft_model_state_dict(
        model, adapter_name=NAME, save_embedding_layers=False
    )
    return {f"base_model.model.{name}": weight for name, weight in found.items()}


def _settle(model: PreTrainedModel) -> None:
    """The adapter in the model's dtype, and in eval mode: PEFT makes it in float32, training."""
    dtype = model.get_input_embeddings().weight.dtype
    assert isinstance(dtype, torch.dtype)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(dtype)
    model.eval()  # type: ignore[no-untyped-call]
