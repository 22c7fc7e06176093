"""Updates in one process: of all weights, or of the adapter in the model."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeVar

import torch

from querl.algorithm.logprobs import selected_logprobs
from querl.algorithm.loss import Loss
from querl.algorithm.loss.correction import Correction
from querl.algorithm.loss.kl import KlPenalty
from querl.algorithm.loss.objective import Objective
from querl.algorithm.loss.reduction import Reduction
from querl.algorithm.pack import MicroBatch, pack
from querl.metrics import Metrics
from querl.trainer.attention import (
    compiled_layers,
    hidden_states,
    recomputed_activations,
    tree_attention,
)
from querl.trainer.guards import Seen, Watch, broken_gradient, check_ratio, refuse
from querl.trainer.offload import Movable, NoOffload, tensors_of
from querl.trainer.optim import AdamW, AdamWSettings
from querl.trainer.parts import backward, split_groups
from querl.trainer.reference import read_coefficient, write_coefficient
from querl.trainer.state import read_state, write_state
from querl.trainer.stats import TokenStats, report_tokens
from querl.trainer.weights import PublishedWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from querl.trainer.guards import Fault, Refused
    from querl.trainer.offload import Offload
    from querl.trainer.reference import Reference
    from querl.types import Sample

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSettings:
    """How one step's samples become optimizer steps.

    ``temperature`` is the one they were sampled with. ``minibatches`` splits the groups, and
    ``inner_epochs`` goes over them again: with 1 and 1 the old policy is the new one, detached.
    ``correction`` to ``entropy`` make an ``Objective`` of the loss. A step is skipped where sampler
    and learner are more than ``max_dlogprob`` nats a token apart (0: never).
    """

    temperature: float = 1.0
    correction: Correction = field(default_factory=Correction)
    reduction: Reduction = field(default_factory=Reduction)
    kl: KlPenalty = field(default_factory=KlPenalty)
    entropy: float = 0.0
    minibatches: int = 1
    inner_epochs: int = 1
    tokens_per_microbatch: int = 8192
    share_prefix: bool = True
    checkpoint_activations: bool = False
    compile_layers: bool = False
    fp32_head: bool = False
    max_dlogprob: float = 0.0


class FullLearner:
    """Implements ``querl.trainer.learner.Learner``; the weights that require gradients are trained.

    The work runs in a thread of its own, so that queries and deadlines of episodes still under way
    go on; as a context manager it gives the thread back. On the CPU an update is a function of
    (weights, state, samples, thread count), bit for bit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        loss: Loss,
        optimizer: AdamWSettings,
        update: UpdateSettings,
        reference: Reference | None = None,
        offload: Offload | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._settings = update
        self._objective = Objective(
            loss=loss,
            correction=update.correction,
            reduction=update.reduction,
            kl=update.kl,
            entropy=update.entropy,
        )
        self._reference = reference
        self._offload = offload or NoOffload()
        self._kl_coefficient = update.kl.coefficient
        self._optimizer = AdamW(model, optimizer)
        self._step = 0
        self._faults: list[Fault] = []
        self._is_checked = False  # that two passes give the same
        self._longest_row = 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="learner")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown()

    @property
    def step(self) -> int:
        """How many updates have been made; 0 before the first."""
        return self._step

    @property
    def faults(self) -> Sequence[Fault]:
        """The optimizer steps that the last update did not make."""
        return self._faults

    @property
    def longest_row(self) -> int:
        """Tokens of the last update's longest row; 0 where nothing was trained."""
        return self._longest_row

    async def update(self, samples: Sequence[Sample]) -> Metrics:
        """One policy update; with no samples only the step count advances.

        When cancelled it still finishes first: weights are never left between two states.
        """
        return await self._in_thread(lambda: self._update(samples))

    async def logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Log-probability of each trained token under the current weights: [N][loss tokens]."""
        return await self._in_thread(lambda: self._logprobs(samples))

    async def explain(
        self, sets: Sequence[Sequence[Sample]], old: Sequence[Sequence[Sequence[float]]]
    ) -> list[Metrics]:
        """The first pass's numbers of each set of samples alone, and its gradient's norm.

        ``old`` [sets][N][loss tokens] are the old policy's log-probs. Each is divided as a step on
        all sets would be; nothing changes.
        """
        return await self._in_thread(lambda: self._explain(sets, old))

    async def sleep(self) -> None:
        """Weights and optimizer state go where ``offload`` puts them; whatever computes wakes."""
        await self._in_thread(lambda: self._offload.sleep(self._movables()))

    async def wake(self) -> None:
        """They come back."""
        await self._in_thread(self._offload.wake)

    def weights(self) -> PublishedWeights:
        """A handle to the weights; its ``module`` is the one that is trained."""
        return PublishedWeights(self._model)

    def save(self, folder: Path) -> None:
        """Write ``model/``, ``optimizer.safetensors`` and ``learner.json`` into a folder."""
        write_state(folder, self._model, self._tokenizer, self._optimizer, self._step)
        if self._settings.kl.target is not None:
            write_coefficient(folder, self._kl_coefficient)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote, into the same module and tensors.

        Raises CheckpointError when it is damaged or of another model.
        """
        self._offload.wake()
        self._step = read_state(folder, self._model, self._optimizer)
        if self._settings.kl.target is not None:
            self._kl_coefficient = read_coefficient(folder)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        future = asyncio.get_running_loop().run_in_executor(self._thread, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise

    def _movables(self) -> Iterator[Movable]:
        yield from tensors_of(self._model)
        yield from map(Movable, self._optimizer.state().values())
        if self._reference is not None:
            yield from tensors_of(self._reference.model)

    def _update(self, samples: Sequence[Sample]) -> Metrics:
        metrics = Metrics()
        start = time.perf_counter()
        self._offload.wake()
        device = self._model.device
        trained = [sample for sample in samples if sample.num_loss_tokens]
        parts = split_groups(trained, self._settings.minibatches)
        minibatches = [[row.to(device) for row in self._pack(part)] for part in parts]
        self._faults = []
        with self._training():
            if minibatches and not self._is_checked:
                self._check_passes(minibatches[0][0])
            is_one_step = len(minibatches) * self._settings.inner_epochs <= 1
            if self._reference is not None:
                with self._reference.active() as model:
                    minibatches = [[self._with_ref(row, model) for row in p] for p in minibatches]
            if not is_one_step:
                minibatches = [[self._with_old(row) for row in rows] for rows in minibatches]
            minibatches = [self._objective.prepare(rows) for rows in minibatches]
            for epoch in range(self._settings.inner_epochs):
                for number, rows in enumerate(minibatches):
                    stats, watch = self._stats(epoch), Watch()
                    refused = self._optimize(rows, stats, watch, metrics, old_is_new=is_one_step)
                    stats.report(metrics)
                    if refused is not None:
                        place = epoch * len(minibatches) + number
                        self._faults.append(watch.fault(refused, parts[number], place))
                    elif epoch == number == 0:
                        check_ratio(watch.checks().moved, is_exact=self._is_exact)
        self._adapt_kl(metrics)
        self._step += 1
        seconds = time.perf_counter() - start
        rows = [row for rows in minibatches for row in rows]
        self._longest_row = max((row.num_tokens for row in rows), default=0)
        report_tokens(metrics, rows, num_passes=self._settings.inner_epochs, seconds=seconds)
        return metrics

    @contextmanager
    def _training(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self._optimizer.gathering())
            stack.enter_context(tree_attention(self._model))
            if self._settings.compile_layers:
                stack.enter_context(compiled_layers(self._model))
            if self._settings.checkpoint_activations:
                stack.enter_context(recomputed_activations(self._model))
            yield

    def _stats(self, epoch: int) -> TokenStats:
        has_reference = self._reference is not None
        device = self._model.device
        return TokenStats(device, counts_sampler=epoch == 0, has_reference=has_reference)

    def _optimize(
        self,
        rows: Sequence[MicroBatch],
        stats: TokenStats,
        watch: Watch,
        metrics: Metrics,
        *,
        old_is_new: bool,
    ) -> Refused | None:
        """One optimizer step on one minibatch, unless a guard refuses it."""
        normaliser = self._objective.reduction.divisor(rows)
        for row in rows:
            watch.add(self._differentiate(row, normaliser, stats, old_is_new=old_is_new))
        refused = refuse(watch.checks(), max_dlogprob=self._settings.max_dlogprob)
        if refused is not None:
            self._optimizer.discard()
            metrics.add_sum("optimizer/skipped_steps", 1)
            return refused
        report = self._optimizer.step(self._step + 1)
        metrics.add_mean("optimizer/grad_norm", report.grad_norm)
        metrics.add_max("optimizer/lr", report.lr)
        metrics.add_sum("optimizer/skipped_steps", report.was_skipped)
        metrics.add_max("optimizer/loss_scale", report.loss_scale)
        return broken_gradient(report)

    def _differentiate(
        self, row: MicroBatch, normaliser: float, stats: TokenStats, *, old_is_new: bool
    ) -> Seen:
        """Add a row's gradient to the optimizer's."""
        logprobs_T, entropies_T = self._forward(row, self._model)
        if old_is_new:
            row = replace(row, old_logprobs_T=logprobs_T.detach())
        row = self._objective.settle(row, self._kl_coefficient)
        # In two stages, so that what the loss did to each token can be measured.
        found = self._objective.differentiate(
            logprobs_T, entropies_T, row, normaliser, self._kl_coefficient
        )
        backward(logprobs_T, entropies_T, found, scale=self._optimizer.loss_scale)
        stats.add(logprobs_T, entropies_T, row, found, normaliser=normaliser)
        return Seen(row, logprobs_T.detach(), found)

    def _forward(self, row: MicroBatch, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [T], zero where nothing is trained. Inside ``tree_attention``."""
        trained_M = row.loss_mask_T.nonzero().squeeze(1)
        hidden = hidden_states(model, row).index_select(0, row.source_T[trained_M])
        head = model.get_output_embeddings().weight  # type: ignore[no-untyped-call]
        logprobs_M, entropies_M = selected_logprobs(
            hidden,
            head.float() if self._settings.fp32_head else head,
            row.token_ids_T[trained_M],
            temperature=self._settings.temperature,
            fused=self._settings.compile_layers,
        )
        empty_T = torch.zeros(row.num_tokens, device=hidden.device)
        where = (trained_M,)
        return empty_T.index_put(where, logprobs_M), empty_T.index_put(where, entropies_M)

    @property
    def _is_exact(self) -> bool:
        """Whether all passes run the same kernels, with a graph or without."""
        return self._model.device.type == "cpu" and not self._settings.compile_layers

    def _check_passes(self, row: MicroBatch) -> None:
        """Once: two passes with the same weights must give the same. Raises TrainingError."""
        first_T, again_T = (self._forward(row, self._model)[0].detach() for _ in range(2))
        moved = float((first_T - again_T).abs().sum()) / max(row.num_loss_tokens, 1)
        check_ratio(moved, is_exact=self._is_exact)
        self._is_checked = True

    @torch.no_grad()
    def _with_old(self, row: MicroBatch) -> MicroBatch:
        return replace(row, old_logprobs_T=self._forward(row, self._model)[0])

    @torch.no_grad()
    def _with_ref(self, row: MicroBatch, reference: PreTrainedModel) -> MicroBatch:
        return replace(row, ref_logprobs_T=self._forward(row, reference)[0])

    def _adapt_kl(self, metrics: Metrics) -> None:
        """Follow the divergence that is wanted, where the step has seen one."""
        observed = metrics.values().get("policy/kl")
        if observed is None:
            return
        metrics.add_mean("policy/kl_coefficient", self._kl_coefficient)
        if math.isfinite(observed):  # else a guard has skipped a step: nothing to learn from it
            self._kl_coefficient = self._settings.kl.adapted(self._kl_coefficient, observed)

    @torch.no_grad()
    def _logprobs(self, samples: Sequence[Sample]) -> list[list[float]]:
        self._offload.wake()
        found: list[list[float]] = [[] for _ in samples]
        with tree_attention(self._model):
            for row in self._pack(samples):
                row = row.to(self._model.device)
                values = self._forward(row, self._model)[0][row.loss_mask_T].tolist()
                for number in row.members:
                    count = samples[number].num_loss_tokens
                    found[number], values = values[:count], values[count:]
        return found

    def _explain(
        self, sets: Sequence[Sequence[Sample]], old: Sequence[Sequence[Sequence[float]]]
    ) -> list[Metrics]:
        self._offload.wake()
        divisors: dict[int, float] = {}  # by group
        every = [sample for samples in sets for sample in samples]
        for part in split_groups(every, self._settings.minibatches):
            divisor = self._objective.reduction.divisor(self._pack(part))
            divisors |= {sample.group_id: divisor for sample in part}
        found = []
        with self._training():
            for samples, logprobs in zip(sets, old, strict=True):
                stats, metrics = self._stats(0), Metrics()
                rows = [self._alone(*one) for one in zip(samples, logprobs, strict=True)]
                for row in self._objective.prepare(rows):
                    normaliser = divisors[samples[0].group_id]
                    self._differentiate(row, normaliser, stats, old_is_new=False)
                stats.report(metrics)
                metrics.add_mean("optimizer/grad_norm", self._optimizer.discard())
                found.append(metrics)
        return found

    def _alone(self, sample: Sample, old: Sequence[float]) -> MicroBatch:
        """A row of one sample with its old log-probs [loss tokens]."""
        (row,) = self._pack([sample])
        row = row.to(self._model.device)
        place = (row.loss_mask_T.nonzero().squeeze(1),)
        known_T = row.old_logprobs_T.index_put(place, row.old_logprobs_T.new_tensor(old))
        row = replace(row, old_logprobs_T=known_T)
        if self._reference is None:
            return row
        with self._reference.active() as model:
            return self._with_ref(row, model)

    def _pack(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        budget = self._settings.tokens_per_microbatch
        return pack(samples, budget, share_prefix=self._settings.share_prefix)
