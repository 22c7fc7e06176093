"""A run as data: one small frozen model per component, read from TOML and ``a.b=c`` overrides.

Unknown keys are refused with the nearest known name. Nothing here imports torch, and nothing deeper
in querl reads a ``Recipe``: ``querl.launch`` hands each component only what it asks for.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from querl.errors import ConfigError
from querl.sections import (
    AlgorithmConfig,
    DataConfig,
    EngineConfig,
    EnvConfig,
    InitConfig,
    LearnerConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    Section,
    SftConfig,
    SqlConfig,
)

SERVERS = ("vllm", "sglang")  # engines that are processes of their own
_WHY_STAY = {"shared": "reads those very weights", "separate": "has GPUs of its own"}


class Recipe(Section):
    """All of a run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    env: EnvConfig = EnvConfig()
    sql: SqlConfig = SqlConfig()
    engine: EngineConfig = EngineConfig()
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    learner: LearnerConfig = LearnerConfig()
    lora: LoraConfig = LoraConfig()
    memory: MemoryConfig = MemoryConfig()
    sft: SftConfig = SftConfig()
    init: InitConfig = InitConfig()

    def check(self) -> None:
        """Refuse settings that contradict each other. Raises ConfigError."""
        if self.run.max_lag and self.engine.placement == "shared":
            raise ConfigError(
                f"run.max_lag={self.run.max_lag} samples while the weights change: "
                "set engine.placement=separate, or run.max_lag=0"
            )
        if self.env.max_prompt > self.env.max_input:
            raise ConfigError(
                f"env.max_prompt={self.env.max_prompt} is larger than "
                f"env.max_input={self.env.max_input}: a first turn could never start"
            )
        if self.reward.suite is None and "suite" in self.reward.parts:
            raise ConfigError(
                "the reward suite needs databases to be right on: set reward.suite to a folder of "
                "querl suite build"
            )
        if self.reward.suite is None and "empty" not in self.data.drop:
            raise ConfigError(
                f"data.drop={list(self.data.drop)} keeps golds that find nothing, and so would any "
                "query that finds nothing be right: add 'empty', or set reward.suite"
            )
        if (self.algorithm.reduction == "constant") != (self.algorithm.normaliser > 0):
            raise ConfigError(
                f"algorithm.normaliser={self.algorithm.normaliser:g} does not go with "
                f"algorithm.reduction={self.algorithm.reduction}: constant divides by it, "
                "the others by counts of their own and want it 0"
            )
        if self.algorithm.kl.target is not None and not self.algorithm.kl.coefficient:
            raise ConfigError(
                f"algorithm.kl.target={self.algorithm.kl.target:g} changes a coefficient, and 0 "
                "stays 0: set algorithm.kl.coefficient to begin with, such as 0.01"
            )
        if self.algorithm.minibatches > self.run.groups_per_step:
            raise ConfigError(
                f"algorithm.minibatches={self.algorithm.minibatches} needs as many groups: "
                f"run.groups_per_step is {self.run.groups_per_step}"
            )

        if not self.lora.rank and (self.lora.quantise != "none" or self.lora.anchor):
            raise ConfigError(
                f"lora.quantise={self.lora.quantise!r} and lora.anchor={self.lora.anchor:g} need "
                "an adapter: set lora.rank, such as 16"
            )

        self._check_engine()
        if self.learner.offload == "all" and self.engine.placement != "colocated":
            raise ConfigError(
                f"learner.offload='all' would take the learner's weights off the GPU while an "
                f"engine of placement={self.engine.placement!r} samples, which "
                f"{_WHY_STAY[self.engine.placement]}: set engine.placement=colocated, or "
                "learner.offload=optimizer"
            )

    def _check_engine(self) -> None:
        engine = self.engine
        if engine.url is not None and engine.kind == "hf":
            raise ConfigError(
                f"engine.url={engine.url!r} is a server's, and the hf engine is none: set "
                "engine.kind=vllm, sglang or openai"
            )
        if engine.url is not None:
            _check_url(engine.url, key=f"{engine.kind.upper()}_API_KEY")
        is_ours = engine.kind in SERVERS and engine.url is None
        if not is_ours and (engine.options or engine.python is not None):
            raise ConfigError(
                "engine.options and engine.python are for a server that querl starts: leave them "
                f"out, or set engine.kind=vllm or sglang (now {engine.kind}) and no engine.url"
            )
        if engine.frontends > 1 and (engine.kind != "vllm" or engine.url is not None):
            raise ConfigError(
                f"engine.frontends={engine.frontends} is for a vllm server that querl starts: set "
                f"engine.frontends=1, or engine.kind=vllm (now {engine.kind}) and no engine.url"
            )
        if engine.frontends > 1 and self.lora.rank:
            raise ConfigError(
                f"engine.frontends={engine.frontends}: each would have to be given every adapter, "
                f"and vllm gives it to one: set engine.frontends=1 (lora.rank={self.lora.rank})"
            )

    def check_training(self) -> None:
        """Refuse what an evaluation may do and training may not. Raises ConfigError."""
        kind, placement = self.engine.kind, self.engine.placement
        if kind == "openai":
            raise ConfigError(
                "engine.kind=openai tells no token ids, so nothing can be learnt from it: set "
                "engine.kind=hf, vllm or sglang (querl eval may use it)"
            )
        if kind in SERVERS and placement == "shared":
            raise ConfigError(
                f"engine.kind={kind} has weights of its own: set engine.placement=colocated, or "
                "separate with engine.url"
            )
        if kind in SERVERS and self.lora.quantise != "none":
            raise ConfigError(
                f"lora.quantise={self.lora.quantise!r} trains on weights in 4 bits, and "
                f"engine.kind={kind} would sample from the unrounded ones, another policy: set "
                "lora.quantise=none, or engine.kind=hf"
            )
        if kind == "sglang" and self.engine.top_p < 1:
            raise ConfigError(
                f"engine.top_p={self.engine.top_p}: sglang tells log-probabilities of the whole "
                "vocabulary, whatever it samples from: set engine.top_p=1"
            )
        if kind == "hf" and placement == "colocated":
            raise ConfigError(
                "engine.placement=colocated is for servers: the hf engine samples from the "
                "learner's own weights (shared) or from a copy beside them (separate)"
            )
        if self.engine.temperature == 0:
            raise ConfigError(
                "engine.temperature=0 plays all episodes of a group alike, and log-probabilities "
                "at 0 are no numbers: set it above 0 (validation is greedy whatever it says)"
            )

        if self.lora.rank and self.lora.dropout:
            raise ConfigError(
                f"lora.dropout={self.lora.dropout:g} would make new/old differ from 1 before any "
                "step: set it to 0 (querl sft may use it)"
            )
        if self.unsupported():
            raise ConfigError(self.unsupported()[0])

    def check_playing(self) -> None:
        """Refuse what no engine can do yet, with a learner or without. Raises ConfigError."""
        for setting in self._unsupported_in_engines():
            raise ConfigError(f"{setting}: leave it out")

    def unsupported(self) -> list[str]:
        """Settings whose meaning is fixed and whose code is still to come, a line each."""
        engine, learner = self.engine, self.learner
        wanted = {
            f"engine.placement={engine.placement!r} of a server without engine.url": (
                engine.placement == "separate" and engine.kind in SERVERS and engine.url is None
            ),
            f"learner.kind={learner.kind!r}": learner.kind != "full",
            f"learner.num_gpus={learner.num_gpus}": learner.num_gpus > 1,
            f"learner.num_nodes={learner.num_nodes}": learner.num_nodes > 1,
            f"learner.tensor_parallel={learner.tensor_parallel}": learner.tensor_parallel > 1,
            f"learner.sequence_parallel={learner.sequence_parallel}": learner.sequence_parallel > 1,
        }
        return [*self._unsupported_in_engines(), *_not_built(wanted)]

    def _unsupported_in_engines(self) -> list[str]:
        engine = self.engine
        return _not_built(
            {
                f"engine.replicas={engine.replicas}": engine.replicas > 1,
                f"engine.tensor_parallel={engine.tensor_parallel}": engine.tensor_parallel > 1,
                f"engine.dtype={engine.dtype!r}": engine.dtype != "auto",
            }
        )

    def warnings(self) -> list[str]:
        """What training allows and may regret, a line each."""
        if self.engine.top_p == 1:
            return []
        return [
            f"engine.top_p={self.engine.top_p} biases every ratio: what is sampled is weighed "
            "within the nucleus, what is trained over the whole vocabulary; 1.0 is exact"
        ]

    def derived(self) -> dict[str, int]:
        """Numbers that follow from the settings, for the eye."""
        return {
            "trajectories a step": self.run.groups_per_step * self.run.group_size,
            "trajectories in all": self.run.groups_per_step
            * self.run.group_size
            * self.run.num_steps,
            "updates": self.run.num_steps
            * self.algorithm.minibatches
            * self.algorithm.inner_epochs,
            "longest trajectory, tokens": self.env.max_input + self.env.max_turn_tokens,
        }

    def to_toml(self) -> str:
        """The whole recipe as TOML, defaults included; ``load_recipe`` reads it back unchanged."""
        lines: list[str] = []
        for name, section in self:
            lines.append(f"[{name}]")
            lines += [
                f"{key} = {_toml_value(value)}" for key, value in section if value is not None
            ]
            lines.append("")
        return "\n".join(lines)


def _not_built(wanted: Mapping[str, bool]) -> list[str]:
    return [f"{setting} is not built yet" for setting, is_set in wanted.items() if is_set]


def _check_url(url: str, *, key: str) -> None:
    """Raise ConfigError where it is no server's, or tells what a run's folder must not hold."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"engine.url holds a password: take it out, and set {key}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"engine.url={url!r} is no http:// or https:// URL of a server")


def _toml_value(value: object) -> str:
    match value:
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case BaseModel():
            return _toml_value(value.model_dump(exclude_none=True))
        case dict():
            return "{" + ", ".join(f'"{k}" = {_toml_value(v)}' for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(_toml_value(v) for v in value) + "]"
        case _:
            escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            return f'"{escaped}"'


def load_recipe(path: Path | None, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a TOML file (None: all defaults) and apply ``a.b=c`` overrides.

    A file may begin with ``base = "other.toml"``, a recipe beside it from which it then names only
    what differs, key by key. An override's value is TOML, or else text. Raises ConfigError with
    one line that names the key and the remedy.
    """
    settings = _read(path) if path is not None else {}
    for override in overrides:
        _apply(settings, override)
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"{path or 'recipe'}: {_explain(error)}") from error
    recipe.check()
    return recipe


def _read(path: Path, *, seen: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """The settings of a file on top of those of its base."""
    if path in seen:
        raise ConfigError(f"{path} is its own base: name another recipe, or none")
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"no recipe {path}: name a .toml file, such as recipes/demo.toml"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not readable TOML: {error}") from error
    base = settings.pop("base", None)
    if base is None:
        return settings
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base = {base!r} is no file name")
    merged = _read(path.parent / base, seen=seen | {path})
    for section, keys in settings.items():
        is_table = isinstance(keys, dict) and isinstance(merged.get(section), dict)
        merged[section] = merged[section] | keys if is_table else keys
    return merged


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r} is no override: write section.key=value")
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise ConfigError(f"{override!r}: {section} is a value, not a section")
    settings[last] = value


def _explain(error: ValidationError) -> str:
    """The first problem, in one line; a misspelt key gets the nearest known one."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{where} = {problem['input']!r}: {problem['msg'].lower()}"
    known = known_keys()
    nearest = difflib.get_close_matches(where, known, n=1, cutoff=0.0)
    last = where.rsplit(".", 1)[-1]
    same_name = [key for key in known if key.rsplit(".", 1)[-1] == last]
    return f"unknown key {where}; did you mean {(same_name or nearest)[0]}?"


def known_keys() -> list[str]:
    """Every key a recipe may hold, as ``section.key``, and the section names themselves."""
    keys = list(Recipe.model_fields)
    for name, field in Recipe.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Section):
            keys += [f"{name}.{key}" for key in section.model_fields]
    return keys
