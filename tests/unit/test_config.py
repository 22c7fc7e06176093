from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from querl.config import Recipe, load_recipe
from querl.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    assert load_recipe(path) == load_recipe(path)


def test_a_resolved_recipe_reads_back_unchanged() -> None:
    recipe = load_recipe(None, ("run.seed=3", 'reward.parts={"binary"=0.5, "a:b"=1}', "data.db=x"))
    assert Recipe.model_validate(tomllib.loads(recipe.to_toml())) == recipe


def test_overrides_are_toml_or_text() -> None:
    recipe = load_recipe(None, ("optimizer.lr=1e-6", "data.source=spider:/some/where"))
    assert recipe.optimizer.lr == 1e-6
    assert recipe.data.source == "spider:/some/where"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.sed=3", "did you mean run.seed?"),
        ("env.max_lag=3", "did you mean run.max_lag?"),
        ("optimizr.lr=1", "did you mean optimizer?"),
        ("optimizer.lr=fast", "optimizer.lr = 'fast'"),
        ("run.group_size=1", "greater than or equal to 2"),
        ("nonsense", "write section.key=value"),
        ("run.seed.x=1\x00", "run.seed"),
        ("run.max_lag=1", "engine.placement=separate"),
        ("learner.offload=all", "set engine.placement=colocated, or learner.offload=optimizer"),
        ("learner.offload=true", "input should be 'none', 'optimizer' or 'all'"),
        ("env.max_prompt=30000", "could never start"),
        ("data.drop=['failing']", "add 'empty', or set reward.suite"),
        ("algorithm.minibatches=99", "run.groups_per_step"),
        ("optimizer.betas=[2.0, 0.9]", "optimizer.betas.0 = 2.0"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 = 1.0"),
        ("algorithm.loss={name=3}", "name = 3 is no text"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_remedy(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, (override,))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_greedy_sampling_is_refused_in_training_and_free_in_evaluation() -> None:
    greedy = load_recipe(None, ("engine.temperature=0",))
    with pytest.raises(ConfigError, match=r"temperature=0 .* set it above 0"):
        greedy.check_training()
    load_recipe(None, ("engine.temperature=0.6",)).check_training()


def test_a_cut_tail_is_warned_of_in_one_line_and_a_whole_one_is_not() -> None:
    (warning,) = load_recipe(None, ("engine.top_p=0.95",)).warnings()
    assert "engine.top_p=0.95" in warning
    assert "\n" not in warning
    assert load_recipe(None).warnings() == []


def test_a_missing_or_broken_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe"):
        load_recipe(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\nseed = 1")
    with pytest.raises(ConfigError, match="not readable TOML"):
        load_recipe(broken)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_at_most_sixty_keys_with_those_of_its_base(path: Path) -> None:
    assert 5 < num_keys(path) <= 60


def num_keys(path: Path) -> int:
    settings = tomllib.loads(path.read_text())
    base = settings.pop("base", None)
    inherited = num_keys(path.parent / base) if base else 0
    return inherited + sum(len(keys) for keys in settings.values())


def test_a_recipe_names_only_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "first.toml").write_text("[run]\nseed = 3\nnum_steps = 7\n[env]\nmax_turns = 2")
    second = tmp_path / "second.toml"
    second.write_text('base = "first.toml"\n[run]\nseed = 4')
    recipe = load_recipe(second, ("env.max_turns=5",))
    assert (recipe.run.seed, recipe.run.num_steps, recipe.env.max_turns) == (4, 7, 5)


def test_a_base_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('base = "own.toml"')
    with pytest.raises(ConfigError, match="its own base"):
        load_recipe(own)
    own.write_text("base = 3")
    with pytest.raises(ConfigError, match="base = 3 is no file name"):
        load_recipe(own)
    own.write_text('base = "none.toml"')
    with pytest.raises(ConfigError, match=r"no recipe .*none\.toml"):
        load_recipe(own)


def test_settings_that_are_not_built_yet_load_and_are_refused_by_training() -> None:
    recipe = load_recipe(None, ("engine.replicas=2", "learner.num_gpus=8"))
    assert recipe.unsupported() == [
        "engine.replicas=2 is not built yet",
        "learner.num_gpus=8 is not built yet",
    ]
    with pytest.raises(ConfigError, match=r"engine\.replicas=2 is not built yet"):
        recipe.check_training()


COLOCATED = ("engine.kind=vllm", "engine.placement=colocated")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("engine.kind=openai", "engine.url=http://a"), "tells no token ids"),
        (("engine.kind=vllm",), "set engine.placement=colocated"),
        (("engine.placement=colocated",), "for servers"),
        ((*COLOCATED, "lora.rank=8", "lora.quantise=nf4"), "another policy"),
        (("engine.kind=sglang", *COLOCATED[1:], "engine.top_p=0.9"), "set engine.top_p=1"),
        (("engine.kind=sglang", "engine.placement=separate"), "without engine.url is not built"),
    ],
)
def test_engines_that_cannot_train_are_refused_with_what_to_set(
    overrides: tuple[str, ...], complaint: str
) -> None:
    recipe = load_recipe(None, overrides)
    with pytest.raises(ConfigError, match=complaint):
        recipe.check_training()


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (("engine.url=http://a",), "the hf engine is none"),
        (("engine.options={seed=1}",), "for a server that querl starts"),
        (("engine.kind=vllm", "engine.url=http://a", "engine.python=python3"), "leave them out"),
        (("engine.kind=vllm", "engine.url=gpu2:8000"), "is no http:// or https:// URL"),
        (("engine.kind=vllm", "engine.url=http://me:pw@gpu2"), "password: .* set VLLM_API_KEY"),
        (("engine.kind=sglang", "engine.frontends=4"), "set engine.frontends=1"),
        (("engine.kind=vllm", "engine.url=http://a", "engine.frontends=4"), "that querl starts"),
        (("engine.kind=vllm", "lora.rank=8", "engine.frontends=4"), "every adapter"),
    ],
)
def test_settings_of_a_server_where_there_is_none_are_refused(
    overrides: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_recipe(None, overrides)
