"""How much memory an update and its sampling take, from a model's shape: formulas, no tensors.

Letters: N parameters, n those that are trained, b bytes of a number that the model computes in (2
or 4), T tokens of a microbatch, L layers, h hidden, i intermediate, q and k the widths of a token's
queries and keys, V vocabulary, c rows of a chunk of logits, S GPUs that share the state. Bytes:

    weights       N b / S; in four bits 0.516 a parameter of the layers (QLoRA, arXiv 2305.14314)
    masters       4 n / S, where b = 2, unless weights are rounded at random
    gradients     4 n / S; they add up in float32
    moments       8 n / S, or in 8 bits (2 + 8 / 256) n / S
    activations   T (L a + (d + b) h), a bytes a token and layer:
                    b h, where layers are recomputed
                    m d h + 2 b h + b (2q + 2k) + 4 heads + 4 b i, as they run: each of m norms
                      keeps d bytes of what it reads, its float32 input and, where it is trained,
                      what it scales, in b bytes or in float32; matrices keep what they read,
                      attention its inputs, result and sums, the feed-forward gate, its activation,
                      the other branch and their product. Norms of queries and keys: d (q + k).
                      An adapter of rank r: 7 b r
                      Where attention gathers keys, g positions a token, b (2g + 1) q for 2 b k
                    (3 + m / 2) b h + b (2q + 2k) + 4 heads + 3 b i, compiled: the float32 inputs,
                      scaled numbers and activations are made again; b (q + k) and 7 b r as above
    working       the larger of the head's chunks and one layer's backward pass
      head        4 V h + max(17 c V, 4 V h + b c V): its gradient in float32, with the chunk's
                  logits, probabilities and gradients (10 c V compiled; 24 and 16 where entropy is
                  paid for), or with the next summand; V h / S is gathered. With an adapter it is
                  frozen: without 4 V h.
      layer       3 b i T, and a T where the layer is recomputed
    reference     N b / S; an adapter needs none, but for its first values where they are the anchor
    engine        its own weights, and 2 L k b a token of the sequences at full length; a server's
                  cache ends with its share of the GPU, or with what a state that stays leaves of
                  it. The hf engine's buffer grows, with one layer of it twice, and what finished
                  turns have computed is kept beside it, up to 2 GiB

    host          masters and moments, where they are offloaded, and a pinned buffer for gradients:
                  the largest weight in float32, up to a power of two; where all is offloaded, the
                  rest of the state too

The state stays, or leaves for the host while an engine samples; activations and sampling take
turns, unless the engine runs beside the update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from querl.trainer.shapes import DecoderShape

# Of `querl.algorithm.logprobs`, which imports torch: a test holds them equal.
CHUNK_ELEMENTS = 2**25
MIN_CHUNK_TOKENS = 512
# Four bits, and a scale for 64 of them that is quantised again (QLoRA, section 3).
NF4_BYTES = (4 + 0.127) / 8
FLOAT32 = 4
# Two codes, and two float32 scales for 256 of each.
EIGHT_BIT_MOMENTS = 2 + 2 * FLOAT32 / 256
EVERY_MATRIX = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """LoRA: rank and the matrices it stands beside; ``is_anchored`` keeps its first values."""

    rank: int
    targets: tuple[str, ...] = (EVERY_MATRIX,)
    is_quantised: bool = False  # the frozen weights
    is_anchored: bool = False

    def num_parameters(self, shape: DecoderShape) -> int:
        """Rank times inputs and outputs of each matrix, in all layers."""
        return self.rank * sum(map(sum, self._matrices(shape))) * shape.num_layers

    def num_matrices(self, shape: DecoderShape) -> int:
        """Of one layer, that it stands beside."""
        return len(self._matrices(shape))

    def _matrices(self, shape: DecoderShape) -> list[tuple[int, int]]:
        wanted = shape.matrices.keys() if EVERY_MATRIX in self.targets else self.targets
        return [shape.matrices[name] for name in wanted if name in shape.matrices]


REUSE_BYTES = 2**31  # of `querl.rollout.hf`, which imports torch: a test holds them equal
CONTEXT_BYTES = 2**29  # CUDA's own in a process
SERVER_BYTES = 3 * 2**29  # CUDA's context and graphs in a server's process, as seen on an H200
PREFILL_TOKENS = 8192  # that a server computes at once


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """What samples, per GPU: its weights' bytes, if its own, and sequences at full length."""

    has_own_weights: bool = False
    weight_bytes: float = 2.0
    tensor_parallel: int = 1
    num_sequences: int = 1
    context: int = 1  # tokens of the longest
    num_kept: int = 0  # sequences whose finished turns the hf engine keeps
    most_bytes: int | None = None  # a server's share of the GPU
    room: int | None = None  # of a GPU that it takes turns on with a learner
    is_beside: bool = False  # samples during the update, on the same GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """What an update is made of. ``compute_bytes`` is 2 for bfloat16, 4 for float32."""

    tokens_per_microbatch: int
    compute_bytes: int = 2
    is_compiled: bool = False
    is_recomputed: bool = False
    fp32_head: bool = False
    shards: int = 1  # GPUs that hold a part of the state each
    sequence_parallel: int = 1  # GPUs that hold a part of each row
    offload: Literal["none", "optimizer", "all"] = "none"
    has_masters: bool = True  # where compute_bytes is 2
    moment_bytes: float = 2.0 * FLOAT32  # a trained parameter
    adapter: Adapter | None = None
    has_reference: bool = False
    has_entropy: bool = False  # that is paid for
    gathered_keys: float = 0.0  # a token, by attention that has no other way to share a prefix
    engine: EnginePlan = EnginePlan()


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes on one GPU, or in the machine's memory without one, in the steps after the first."""

    weights: int
    masters: int
    gradients: int
    moments: int
    activations: int
    working: int
    reference: int
    engine_weights: int
    engine_working: int
    kv_cache: int
    is_beside: bool  # sampling and update at once
    leaves: bool  # the state is on the host while an engine samples
    offloaded: int  # bytes of the host's memory that the state takes, then or always
    checkpoint: int  # bytes of one on disk

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.masters + self.moments + self.reference

    @property
    def staying(self) -> int:
        """Of the state what stays while an engine samples."""
        return 0 if self.leaves else self.state

    @property
    def update(self) -> int:
        """What an update takes beside the state: the gradients grow as the activations go."""
        return self.gradients + self.activations + self.working

    @property
    def sampling(self) -> int:
        """What sampling takes beside the state."""
        return self.engine_weights + self.engine_working + self.kv_cache

    @property
    def while_updating(self) -> int:
        """The state and an update, with what an engine that goes on sampling takes."""
        return self.state + self.update + (self.sampling if self.is_beside else 0)

    @property
    def while_sampling(self) -> int:
        """What an engine takes, with the state where it stays."""
        return self.sampling + self.staying

    @property
    def peak(self) -> int:
        """The most at any time; weights are published while both learner and engine have theirs."""
        publishing = self.state + self.engine_weights
        return max(self.while_updating, self.while_sampling, publishing)

    def lines(self) -> list[tuple[str, int]]:
        """(part, bytes) for each part on the GPU that is not zero."""
        parts = [field.name for field in fields(self)]
        parts = parts[: parts.index("is_beside")]
        named = [(name.replace("_", " "), int(getattr(self, name))) for name in parts]
        return [(name, size) for name, size in named if size]


def plan(shape: DecoderShape, settings: PlanSettings) -> MemoryPlan:
    """The memory of a model of that shape under these settings, in bytes a GPU."""
    trained = (
        shape.num_parameters if settings.adapter is None else settings.adapter.num_parameters(shape)
    )
    num_masters = trained if settings.has_masters and settings.compute_bytes < FLOAT32 else 0
    masters = FLOAT32 * num_masters // settings.shards
    moments = int(settings.moment_bytes * trained) // settings.shards
    engine = settings.engine
    weights, reference = (find(shape, settings, trained) for find in (_weights, _reference))
    is_here, leaves = settings.offload == "none", settings.offload == "all"
    on_host = 0 if is_here else masters + moments + _buffer(shape, settings)
    staying = 0 if leaves else weights + reference + (masters + moments if is_here else 0)
    return MemoryPlan(
        weights=weights,
        masters=masters if is_here else 0,
        gradients=FLOAT32 * trained // settings.shards,
        moments=moments if is_here else 0,
        activations=_activations(shape, settings),
        working=max(_head(shape, settings), _layer_backward(shape, settings)),
        reference=reference,
        engine_weights=_engine_weights(shape, engine),
        engine_working=_engine_working(shape, settings),
        kv_cache=_kv_cache(shape, settings, staying),
        is_beside=engine.is_beside,
        leaves=leaves,
        offloaded=on_host + (weights + reference if leaves else 0),
        checkpoint=settings.compute_bytes * trained + (masters + moments) * settings.shards,
    )


def activations_a_layer(shape: DecoderShape, settings: PlanSettings) -> int:
    """Bytes that one layer keeps of one token for its backward pass, where it is not recomputed."""
    b, hidden = settings.compute_bytes, shape.hidden_size
    keys_and_values = 2.0 * shape.kv_width
    if settings.gathered_keys:  # with their heads repeated; the result is put back into its row
        keys_and_values = (2 * settings.gathered_keys + 1) * shape.query_width
    kept = int(b * (2 * shape.query_width + keys_and_values)) + FLOAT32 * shape.num_heads
    if settings.adapter is not None:
        kept += b * settings.adapter.rank * settings.adapter.num_matrices(shape)
    normed_heads = shape.query_width + shape.kv_width if shape.has_qk_norm else 0
    if settings.is_compiled:
        norms = (3 + shape.num_norms // 2) * hidden + normed_heads
        return kept + b * (norms + 3 * shape.intermediate_size)
    norms = _norm(shape, settings) * (shape.num_norms * hidden + normed_heads)
    return kept + norms + b * (2 * hidden + 4 * shape.intermediate_size)


def _norm(shape: DecoderShape, settings: PlanSettings) -> int:
    """Bytes that a norm keeps of each number it reads."""
    if settings.adapter is not None:
        return FLOAT32
    return FLOAT32 + (FLOAT32 if shape.norm_in_float32 else settings.compute_bytes)


def _tokens(settings: PlanSettings) -> int:
    return settings.tokens_per_microbatch // settings.sequence_parallel


def _activations(shape: DecoderShape, settings: PlanSettings) -> int:
    a_layer = (
        settings.compute_bytes * shape.hidden_size
        if settings.is_recomputed
        else activations_a_layer(shape, settings)
    )
    last_norm = (_norm(shape, settings) + settings.compute_bytes) * shape.hidden_size
    return _tokens(settings) * (shape.num_layers * a_layer + last_norm)


def _head(shape: DecoderShape, settings: PlanSettings) -> int:
    rows = min(max(CHUNK_ELEMENTS // shape.vocab_size, MIN_CHUNK_TOKENS), _tokens(settings))
    chunk = rows * shape.vocab_size
    head_bytes = FLOAT32 if settings.fp32_head else settings.compute_bytes
    bytes_a_logit = {False: (17, 10), True: (24, 16)}[settings.has_entropy]
    logits = bytes_a_logit[settings.is_compiled] * chunk
    copy = FLOAT32 * shape.num_head_parameters
    gathered = head_bytes * shape.num_head_parameters if settings.shards > 1 else 0
    if settings.fp32_head and settings.compute_bytes < FLOAT32:
        gathered += copy
    if settings.adapter is not None:
        return gathered + logits
    return gathered + copy + max(logits, copy + head_bytes * chunk)


def _layer_backward(shape: DecoderShape, settings: PlanSettings) -> int:
    a_token = 3 * settings.compute_bytes * shape.intermediate_size
    if settings.is_recomputed:
        a_token += activations_a_layer(shape, settings)
    # two layers at a time: one in use, the next on its way
    gathered = 2 * shape.num_layer_parameters if settings.shards > 1 else 0
    if settings.adapter is not None and settings.adapter.is_quantised:
        gathered += max(inputs * outputs for inputs, outputs in shape.matrices.values())
    return a_token * _tokens(settings) + settings.compute_bytes * gathered


def _weights(shape: DecoderShape, settings: PlanSettings, trained: int) -> int:
    b = settings.compute_bytes
    in_layers = shape.num_layers * shape.num_layer_parameters
    is_quantised = settings.adapter is not None and settings.adapter.is_quantised
    total = in_layers * (NF4_BYTES if is_quantised else b) + shape.num_embedding_parameters * b
    if settings.adapter is not None:
        total += trained * b
    return int(total / settings.shards)


def _reference(shape: DecoderShape, settings: PlanSettings, trained: int) -> int:
    if settings.adapter is not None:
        return FLOAT32 * trained // settings.shards if settings.adapter.is_anchored else 0
    if not settings.has_reference:
        return 0
    return settings.compute_bytes * shape.num_parameters // settings.shards


def _buffer(shape: DecoderShape, settings: PlanSettings) -> int:
    largest = max(shape.num_head_parameters, *map(math.prod, shape.matrices.values()))
    if settings.adapter is not None:
        largest = settings.adapter.rank * max(map(max, shape.matrices.values()))
    return 1 << math.ceil(math.log2(FLOAT32 * largest / settings.shards))


def _engine_weights(shape: DecoderShape, engine: EnginePlan) -> int:
    if not engine.has_own_weights:
        return 0
    return int(engine.weight_bytes * shape.num_parameters / engine.tensor_parallel)


def _engine_working(shape: DecoderShape, settings: PlanSettings) -> int:
    """Of a process of its own: CUDA's context and graphs, a prefill, and logits to sample from.

    Sampling holds the logits of all sequences, their processed copy and their order: four numbers
    of 4 bytes for each. The hf engine in this process has a layer twice, and what it keeps.
    """
    engine = settings.engine
    if engine.most_bytes is None:
        kept = cache_bytes(shape, settings, num_sequences=engine.num_kept)
        batch = cache_bytes(shape, settings, num_sequences=engine.num_sequences)
        return batch // shape.num_layers + min(kept, REUSE_BYTES)
    logits = 4 * FLOAT32 * engine.num_sequences * shape.vocab_size
    prefill = 2 * PREFILL_TOKENS * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    return SERVER_BYTES + (logits + prefill) // engine.tensor_parallel


def cache_bytes(shape: DecoderShape, settings: PlanSettings, *, num_sequences: int) -> int:
    """Keys and values of so many sequences of the engine's at full length."""
    engine = settings.engine
    a_token = 2 * shape.num_layers * shape.kv_width * settings.compute_bytes
    return a_token * num_sequences * engine.context // engine.tensor_parallel


def _kv_cache(shape: DecoderShape, settings: PlanSettings, staying: int) -> int:
    engine = settings.engine
    wanted = cache_bytes(shape, settings, num_sequences=engine.num_sequences)
    if engine.most_bytes is None:
        return wanted
    room = engine.most_bytes if engine.room is None else engine.room - staying
    taken = _engine_weights(shape, engine) + _engine_working(shape, settings)
    return max(min(wanted, engine.most_bytes - taken, room - taken), 0)
