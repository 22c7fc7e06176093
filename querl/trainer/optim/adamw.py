"""AdamW over a model's trained weights, with clipping and a guard against broken gradients."""

from __future__ import annotations

import functools
import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from querl.errors import CheckpointError, ConfigError
from querl.trainer.optim.eight_bit import EightBitMoments
from querl.trainer.optim.home import Beside, Host
from querl.trainer.optim.moments import Float32Moments, Moments, Rates
from querl.trainer.optim.rounding import round_stochastically
from querl.trainer.optim.scale import LossScale
from querl.trainer.optim.settings import learning_rate

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from querl.trainer.optim.home import Home
    from querl.trainer.optim.settings import AdamWSettings

MOMENTS: dict[str, type[Moments]] = {"adamw": Float32Moments, "adamw8bit": EightBitMoments}
_LOSS_SCALE = "loss_scale"
_NUM_ROUNDINGS = "num_roundings"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one step did; ``was_skipped`` where the gradient was not finite and nothing changed.

    ``loss_scale`` is the one of this step: 1 unless the weights are float16. ``broken`` names the
    weights whose gradient was not finite.
    """

    grad_norm: float
    lr: float
    was_skipped: bool
    loss_scale: float = 1.0
    broken: tuple[str, ...] = ()


class AdamW:
    """Optimizes a model's trainable weights in place.

    Weights that are not float32 get a float32 master, and their gradients add up in float32 across
    the microbatches of a step: between steps the model holds the master's rounded values. Without
    masters the value is the weight itself, rounded at random after each step. Raises ConfigError
    where that is not bfloat16.
    """

    def __init__(self, model: torch.nn.Module, settings: AdamWSettings) -> None:
        self._settings = settings
        self._weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        rounded = {n: p for n, p in self._weights.items() if p.dtype != torch.float32}
        dtypes = {weight.dtype for weight in rounded.values()}
        has_masters = settings.masters == "fp32"
        if not has_masters and dtypes - {torch.bfloat16}:
            raise ConfigError(
                "optimizer.masters='stochastic' rounds to bf16, and the model is in fp16: set "
                "masters='fp32', or model.dtype='bf16'"
            )
        self._moment_kind: Moments = MOMENTS[settings.kind]()
        self._home: Home = Host(self._weights.values()) if settings.offload else Beside()
        self._masters = {n: self._home.value(p) for n, p in rounded.items() if has_masters}
        self._anchors = {
            name: weight.detach().float().clone()
            for name, weight in self._weights.items()
            if settings.anchor
        }
        self._gradients: dict[str, Tensor] = {}  # of weights that are not float32
        self._moments: dict[str, dict[str, Tensor]] = {name: {} for name in self._weights}
        self._scale = LossScale() if torch.float16 in dtypes else None
        self._num_roundings = 0  # of weights at random, so that none has another's noise

    @property
    def loss_scale(self) -> float:
        """What to multiply the loss with before its backward pass; ``step`` divides by it."""
        return 1.0 if self._scale is None else self._scale.value

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Must enclose the backward passes of a step: gradients add up in float32 as they come.

        So the gradient of no more than a weight is ever there in the weight's own dtype.
        """
        hooks = []
        for name, weight in self._weights.items():
            if weight.dtype != torch.float32:
                gather = functools.partial(self._gather, name)
                hooks.append(weight.register_post_accumulate_grad_hook(gather))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def step(self, step: int) -> StepReport:
        """Apply the gathered gradients with the rate of that step (from 1), and drop them."""
        gradients = self._take_gradients()
        scale = self.loss_scale
        if scale != 1:
            torch._foreach_mul_(list(gradients.values()), 1 / scale)
        for name, first in self._anchors.items():
            if name in gradients:
                distance = self._weights[name] - first
                gradients[name].add_(distance, alpha=2 * self._settings.anchor)
        grad_norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
        is_finite = math.isfinite(grad_norm)
        if self._scale is not None:
            self._scale.update(is_finite=is_finite)
        rate = learning_rate(self._settings, step)
        if is_finite:
            if grad_norm > self._settings.max_grad_norm:
                factor = self._settings.max_grad_norm / grad_norm
                torch._foreach_mul_(list(gradients.values()), factor)
            for name, gradient in gradients.items():
                self._change(name, gradient, rate)
        broken = [] if is_finite else [n for n, g in gradients.items() if not g.isfinite().all()]
        return StepReport(
            grad_norm=grad_norm,
            lr=rate,
            was_skipped=not is_finite,
            loss_scale=scale,
            broken=tuple(broken),
        )

    @torch.no_grad()
    def discard(self) -> float:
        """Drop the gathered gradients, so that no step is made from them; their norm."""
        norm = torch.nn.utils.get_total_norm(list(self._take_gradients().values()))
        return float(norm) / self.loss_scale

    def state(self) -> dict[str, Tensor]:
        """Everything that a resume needs, by name; masters only where they differ from weights."""
        tensors = {f"master.{name}": master for name, master in self._masters.items()}
        tensors |= {f"anchor.{name}": anchor for name, anchor in self._anchors.items()}
        for name, moments in self._moments.items():
            tensors |= {f"{key}.{name}": value for key, value in moments.items()}
        if self._scale is not None:
            tensors[_LOSS_SCALE] = self._scale.state()
        if self._num_roundings:
            tensors[_NUM_ROUNDINGS] = torch.tensor(self._num_roundings)
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` gave. Raises CheckpointError when it is of another model."""
        for name, weight in self._weights.items():
            fresh = self._moment_kind.start(self._home.value(weight))
            found = {key: tensors[f"{key}.{name}"] for key in fresh if f"{key}.{name}" in tensors}
            if any(found[key].shape != fresh[key].shape for key in found):
                raise CheckpointError(f"the optimizer's {name} is of a model of another shape")
            if found and found.keys() != fresh.keys():
                raise CheckpointError(f"the optimizer's {name} is of another optimizer.kind")
            for key, value in found.items():
                fresh[key].copy_(value)
            self._moments[name] = fresh if found else {}
        for name, master in self._masters.items():
            if f"master.{name}" not in tensors:
                raise CheckpointError(
                    f"the optimizer has no master of {name}: of another dtype, or settings?"
                )
            master.copy_(tensors[f"master.{name}"])
        for name, first in self._anchors.items():
            # a replay may charge a distance that the run did not: from the values of its start
            first.copy_(tensors.get(f"anchor.{name}", first))
        for name, master in self._masters.items():
            self._home.publish(master, self._weights[name])
        if self._scale is not None and _LOSS_SCALE in tensors:
            self._scale.load_state(tensors[_LOSS_SCALE])
        self._num_roundings = int(tensors.get(_NUM_ROUNDINGS, 0))

    def _gather(self, name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        if name in self._gradients:
            self._gradients[name] += weight.grad
        else:
            self._gradients[name] = weight.grad.float()
        weight.grad = None

    def _take_gradients(self) -> dict[str, Tensor]:
        """Those of all weights that have one, by name, in the weights' order."""
        taken = {}
        for name, weight in self._weights.items():
            gradient = self._gradients.pop(name, weight.grad)
            if gradient is not None:
                taken[name] = gradient
            weight.grad = None
        return taken

    def _change(self, name: str, gradient: Tensor, lr: float) -> None:
        weight, master = self._weights[name], self._masters.get(name)
        value = self._home.value(weight) if master is None else master
        self._moments[name] = self._moments[name] or self._moment_kind.start(value)
        rates = Rates(
            lr=lr,
            betas=self._settings.betas,
            eps=self._settings.eps,
            weight_decay=self._settings.weight_decay if weight.ndim >= 2 else 0.0,
        )
        gradient = self._home.gradient(gradient)
        self._moment_kind.step(value, gradient, self._moments[name], rates)
        if master is None and weight.dtype == torch.bfloat16:
            value = round_stochastically(value, seed=self._num_roundings)
            self._num_roundings += 1
        self._home.publish(value, weight)
