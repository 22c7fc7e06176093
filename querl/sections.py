"""The sections of a recipe: one small frozen model per component, and nothing that acts.

Each key has its default here. ``querl.config`` reads them from TOML and checks them together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]  # of a running mean


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunConfig(Section):
    """How long and how large. ``groups_per_step`` tasks are sampled ``group_size`` times a step."""

    seed: int = 0
    num_steps: int = Field(default=50, ge=1)
    groups_per_step: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=2)
    max_lag: int = Field(default=0, ge=0)
    max_refill: float = Field(default=1.0, ge=0.0)  # groups without signal replaced, per group kept
    eval_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=10, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()  # beside the JSON lines
    num_threads: int = Field(default=0, ge=0)  # 0: one a core; fixed for bit-equal resumes


class DataConfig(Section):
    """Where tasks come from.

    ``source`` is ``demo``, ``spider:FOLDER``, ``module:function`` or another of ``docs/data.md``;
    ``validation`` is the split to validate on, or ``databases:0.1`` to hold a tenth of the
    databases out. ``made`` questions of ``querl data synth`` join the training tasks of your own
    SQLite files. ``drop`` names the faults of golds that keep a task out of training: see
    ``querl data audit``.
    """

    source: str = "demo"
    split: str = "train"
    validation: str = "val"
    made: int = Field(default=0, ge=0)
    max_samples: int | None = Field(default=None, ge=1)
    max_validation: int | None = Field(default=None, ge=1)
    db: str | None = None
    questions: str | None = None
    drop: tuple[Literal["failing", "slow", "huge", "empty", "null", "zero", "unstable"], ...] = (
        "failing",
        "empty",
    )


class ModelConfig(Section):
    """The policy: a Hugging Face folder (or GGUF file), or ``tiny``, the model in this package.

    ``dtype = "auto"`` is float32 on a CPU, bfloat16 on a GPU that has it, else float16.
    """

    path: str = "tiny"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"


class PromptConfig(Section):
    """What the model is shown before its first turn. ``max_schema_tokens = 0`` leaves it uncut."""

    style: Literal["short", "full", "skyrl"] = "short"
    values: Literal["none", "matched", "sample"] = "matched"
    max_schema_tokens: int = Field(default=0, ge=0)


class EnvConfig(Section):
    """The episode. Three token limits: the first prompt, one turn, and any turn's start.

    ``kind`` is ``text2sql``, ``explore`` (the schema is hidden) or ``module:function``. With
    ``stepwise`` history each turn's prompt is rendered anew, by ``keep_thoughts`` with what the
    model thought before. ``final_answer`` asks for one turn more where the last brought no answer.
    ``early_exit`` ends an episode after so many turns in a row that bring nothing new, 0 never.
    What is not over ``timeout_s`` after it began is cut, and teaches nothing.
    """

    kind: str = "text2sql"
    history: Literal["conversation", "single", "stepwise"] = "conversation"
    keep_thoughts: bool = True
    max_turns: int = Field(default=3, ge=1)
    final_answer: bool = False
    reminders: bool = True  # whether observations tell how many turns are left
    early_exit: int = Field(default=0, ge=0)
    timeout_s: float = Field(default=3600.0, gt=0)
    max_prompt: int = Field(default=6000, ge=1)
    max_turn_tokens: int = Field(default=3000, ge=1)
    max_input: int = Field(default=29000, ge=1)
    observation_rows: int = Field(default=50, ge=1)
    observation_chars: int = Field(default=9000, ge=1)


class SqlConfig(Section):
    """Execution limits, the same for the tool and for the reward."""

    workers: int = Field(default=2, ge=1)
    max_steps: int = Field(default=50_000_000, ge=1000)
    timeout_s: float = Field(default=5.0, gt=0)
    max_rows: int = Field(default=100_000, ge=1)


class EngineConfig(Section):
    """How completions are sampled.

    A ``shared`` engine reads the learner's weights, a ``colocated`` one has its own on the same
    GPUs and takes turns with the learner, a ``separate`` one has GPUs of its own. ``vllm`` and
    ``sglang`` are servers, started with the interpreter ``python`` (None: this one) or found at
    ``url``; ``options`` are passed on to a started one. ``openai`` is any endpoint of that kind, to
    evaluate at. A server from which nothing comes for ``heartbeat_s`` is asked whether it lives.
    ``frontends`` are processes that take vLLM's requests, 0 as many as will serve: one takes up to
    17,000 tokens a second.
    """

    kind: Literal["hf", "vllm", "sglang", "openai"] = "hf"
    placement: Literal["shared", "colocated", "separate"] = "shared"
    url: str | None = None
    python: str | None = None
    options: dict[str, Any] = {}
    start_timeout_s: float = Field(default=600.0, gt=0)
    heartbeat_s: float = Field(default=15.0, gt=0)
    frontends: int = Field(default=0, ge=0)
    replicas: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)  # GPUs a replica
    dtype: Literal["auto", "fp8"] = "auto"
    memory_share: float = Field(default=0.8, gt=0.0, le=1.0)  # of a GPU, weights and cache
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_batch: int = Field(default=256, ge=1)


class RewardPart(Section):
    """A part's weight; it falls linearly to 0 ``until`` that share of the steps, if given."""

    weight: float = 1.0
    until: float | None = Field(default=None, gt=0.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        """A number alone is a weight that stays."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"weight": value} if is_number else value


class RewardConfig(Section):
    """Weighted reward parts (our name or ``module:function``) and the comparison behind them.

    ``suite`` is a folder of ``querl suite build``: what is right must be right on its databases.
    ``turn_parts`` reward single turns, for credits that read them. A right answer's reward is
    multiplied by ``discount`` for each turn after the first.
    """

    parts: dict[str, RewardPart] = Field(default={"binary": RewardPart()}, min_length=1)
    turn_parts: dict[str, RewardPart] = {}
    discount: float = Field(default=1.0, gt=0.0, le=1.0)
    judge: Literal["strict", "spider", "bird", "skyrl"] = "strict"
    suite: str | None = None


class CorrectionConfig(Section):
    """Old / sampled as a weight, capped or masked where it leaves [low, high]; or none.

    ``querl.algorithm.loss.correction`` says more.
    """

    kind: Literal["cap", "mask", "none"] = "cap"
    level: Literal["token", "sequence"] = "token"
    low: float = Field(default=0.0, ge=0.0, le=1.0)
    high: float = Field(default=2.0, ge=1.0)


class KlConfig(Section):
    """The divergence from the model that training began with: its weight, and where it is charged.

    A number alone is the ``coefficient``. With a ``target``, in nats a token, the coefficient
    follows it. ``querl.algorithm.loss.kl`` tells what the estimators' gradients are.
    """

    coefficient: float = Field(default=0.0, ge=0.0)
    estimator: Literal["k1", "k2", "k3"] = "k3"
    place: Literal["loss", "reward"] = "loss"
    target: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, value: object) -> object:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"coefficient": value} if is_number else value


class AlgorithmConfig(Section):
    """Credit, loss, what is charged beside it, and what is left out. See docs/algorithms.md.

    ``credit`` and ``loss`` hold a name and its own settings, which ``make_credit`` and
    ``make_loss`` check. The reduction ``constant`` divides by ``normaliser``. A group whose
    advantages are all 0 is left out where nothing else would move it. ``leave_out`` drops whole
    trajectories, or by ``..._turns`` only the turns at fault. An update is skipped where sampler
    and learner are more than ``max_dlogprob`` nats a token apart: docs/guards.md has what is usual.
    """

    credit: dict[str, Any] = {"name": "grpo_batch_std"}
    loss: dict[str, Any] = {"name": "clip"}
    correction: CorrectionConfig = CorrectionConfig()
    kl: KlConfig = KlConfig()
    entropy: float = Field(default=0.0, ge=0.0)  # the weight of the mean entropy, nats a token
    leave_out: tuple[Literal["void", "truncated", "void_turns", "truncated_turns"], ...] = (
        "void",
        "truncated",
    )
    reduction: Literal["token_mean", "constant", "sequence_mean"] = "token_mean"
    normaliser: float = Field(default=0.0, ge=0.0)
    minibatches: int = Field(default=1, ge=1)
    inner_epochs: int = Field(default=1, ge=1)
    max_dlogprob: float = Field(default=0.25, ge=0.0)  # 0: however far

    @field_validator("credit", mode="before")
    @classmethod
    def _from_name(cls, credit: object) -> object:
        """A name alone is a credit with its own defaults."""
        return {"name": credit} if isinstance(credit, str) else credit

    @field_validator("credit", "loss")
    @classmethod
    def _has_a_name(cls, chosen: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(chosen.get("name", ""), str):
            raise ValueError(f"name = {chosen['name']!r} is no text, such as 'clip'")
        return chosen


class OptimizerConfig(Section):
    """AdamW and its schedule; ``adamw8bit`` keeps its moments in 8 bits (arXiv 2110.02861).

    Weights in bfloat16 have float32 ``masters``, or are rounded at random after each step.
    """

    kind: Literal["adamw", "adamw8bit"] = "adamw"
    masters: Literal["fp32", "stochastic"] = "fp32"
    lr: float = Field(default=1e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    max_grad_norm: float = Field(default=1.0, gt=0)


class LearnerConfig(Section):
    """Where the update runs: GPUs a node, how a model and a sequence are cut over them.

    ``offload`` keeps the ``optimizer`` state in the host's memory, where its step is then made;
    with ``all`` the weights are there too while a colocated engine samples.
    """

    kind: Literal["full", "fsdp", "megatron"] = "full"
    num_gpus: int = Field(default=1, ge=1)
    num_nodes: int = Field(default=1, ge=1)
    tensor_parallel: int = Field(default=1, ge=1)
    sequence_parallel: int = Field(default=1, ge=1)
    offload: Literal["none", "optimizer", "all"] = "none"


class LoraConfig(Section):
    """A trained adapter on frozen weights (arXiv 2106.09685); ``rank = 0`` trains all weights.

    ``quantise`` stores the frozen weights in 4 bits (QLoRA, arXiv 2305.14314). ``anchor`` weighs
    the squared distance from the first adapter, which is no KL divergence. ``dropout`` acts in
    supervised training only.
    """

    rank: int = Field(default=0, ge=0)
    alpha: float = Field(default=32.0, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    quantise: Literal["none", "nf4"] = "none"
    anchor: float = Field(default=0.0, ge=0.0)


class MemoryConfig(Section):
    """How an update fits: tokens a microbatch, prompts once a group, recomputed activations.

    ``compile`` fuses what is done to each token, worth its half minute on a GPU. ``fp32_head``
    computes logits from float32 copies of the head and of its inputs.
    """

    tokens_per_microbatch: int = Field(default=8192, ge=0)  # 0: as many as the plan fits
    share_prefix: bool = True
    checkpoint_activations: bool = False
    compile: bool = False
    fp32_head: bool = False


class SftConfig(Section):
    """The warm start, ``querl sft``: traces, how often they are seen, their learning rate."""

    shares: dict[
        Literal["direct", "probe_confirm", "look_up", "repair", "sampled", "own_repair"], float
    ] = {
        "direct": 0.2,
        "probe_confirm": 0.5,
        "repair": 0.3,
    }
    thoughts: Literal["plan", "tables"] = "plan"
    epochs: float = Field(default=3.0, gt=0)
    batch_tokens: int = Field(default=32768, ge=1)
    lr: float = Field(default=3e-4, gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(default=20, ge=0)


class InitConfig(Section):
    """A new model for ``querl init``: a Llama-shaped decoder and its byte-level vocabulary."""

    vocab_size: int = Field(default=1024, ge=300)
    hidden_size: int = Field(default=128, ge=8)
    intermediate_size: int = Field(default=384, ge=8)
    num_layers: int = Field(default=6, ge=1)
    num_heads: int = Field(default=4, ge=1)
    num_kv_heads: int = Field(default=2, ge=1)
    max_positions: int = Field(default=2048, ge=64)
