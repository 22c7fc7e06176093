"""A step of a run, trained on again: the same numbers, explained, and nothing changed on disk."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
from company import company_recipe, make_company
from console import Querl

from querl.algorithm.sample import LeftOut
from querl.errors import CheckpointError, ConfigError
from querl.launch.replay import Replay, replay
from querl.launch.training import train_locally
from querl.run import Run
from querl.trainer.guards import Reason

KEEPS_ALL = ("run.save_every=1", "run.keep_checkpoints=9")
MANY_PASSES = ("algorithm.minibatches=2", "algorithm.inner_epochs=2")


class Noting:
    """Implements ``querl.run.Watcher``: keeps each step's numbers to the last bit."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def stepped(self, step: int, values: dict[str, float]) -> None:
        self.steps[step] = values

    def evaluated(self, step: int, summary: object) -> None:
        pass

    def say(self, text: str) -> None:
        pass


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_company(tmp_path_factory.mktemp("company"))


def train(company: Path, folder: Path, *overrides: str) -> Noting:
    recipe, noting = company_recipe(company, *overrides), Noting()
    folder.mkdir()
    with Run(folder, recipe, noting, fresh=False) as run:
        asyncio.run(train_locally(recipe, run, noting.say))
    return noting


def replayed(folder: Path, step: int, *overrides: str) -> Replay:
    return asyncio.run(replay(folder, step, overrides))


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


@pytest.fixture(scope="module")
def whole(company: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Noting]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(company, folder, *KEEPS_ALL, "run.num_steps=3")


def assert_same_numbers(again: Replay, values: dict[str, float]) -> None:
    timed = ("time/", "speed/")
    assert again.has_its_weights
    names = {name for name in again.numbers if not name.startswith(timed)}
    # what only the stream knows, and the engine
    left = {n for n in values if not n.startswith((*timed, "probe/", "engine/"))} - names
    assert left == {"groups/replaced"}
    different = {n for n in names if not same(again.numbers[n], values[n])}
    assert different == set()
    assert len(again.compared()) == len([n for n in names if not math.isnan(values[n])])
    assert all(recorded == number for _, recorded, number in again.compared())


def same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_step_gives_its_numbers_again_to_the_bit(
    whole: tuple[Path, Noting], step: int
) -> None:
    folder, noting = whole
    before = contents(folder)
    again = replayed(folder, step)
    assert contents(folder) == before
    assert_same_numbers(again, noting.steps[step])
    assert again.numbers["tokens/trained"] > 0


def test_minibatches_and_epochs_give_their_numbers_again_to_the_bit(
    company: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    noting = train(company, folder, *KEEPS_ALL, *MANY_PASSES, "run.num_steps=2")
    again = replayed(folder, 2)
    assert_same_numbers(again, noting.steps[2])
    assert again.numbers["policy/ratio_max"] > 1


@pytest.mark.parametrize(
    "overrides",
    [
        ("lora.rank=4",),
        ("memory.tokens_per_microbatch=0",),
        ("algorithm.kl=0.1", "algorithm.reduction=sequence_mean", "algorithm.entropy=0.01"),
        ("env.history=stepwise", "env.keep_thoughts=false", 'algorithm.credit="token_tree"'),
    ],
    ids=["lora", "rows", "kl", "stepwise"],
)
def test_other_learners_and_losses_give_their_numbers_again_too(
    company: Path, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    noting = train(company, folder, *KEEPS_ALL, *overrides, "run.num_steps=2")
    again = replayed(folder, 2)
    assert_same_numbers(again, noting.steps[2])
    shares = [part.share for parts_G in again.parts_PG for part in parts_G if part.share]
    loss = sum(share.loss for share in shares)
    assert loss == pytest.approx(again.numbers["policy/loss"], abs=1e-6)


def test_shares_add_up_to_the_loss_and_tell_what_the_update_did(
    whole: tuple[Path, Noting],
) -> None:
    again = replayed(whole[0], 2)
    parts = [part for parts_G in again.parts_PG for part in parts_G]
    shares = [part.share for part in parts if part.share is not None]
    assert len(shares) == len(parts) == 4
    assert sum(s.loss for s in shares) == pytest.approx(again.numbers["policy/loss"], abs=1e-6)
    assert sum(s.grad_norm for s in shares) >= again.numbers["optimizer/grad_norm"]
    assert all(share.grad_norm > 0 for share in shares)
    assert all(share.abs_dlogprob < 1e-4 for share in shares)
    for part in parts:
        assert part.share is not None
        assert (part.share.ratio > 1) == (part.advantage > 0)  # praise makes likelier
        assert part.reward == pytest.approx(sum(part.reward_parts.values()))


def test_what_was_left_out_is_named(whole: tuple[Path, Noting]) -> None:
    again = replayed(whole[0], 1, "algorithm.leave_out=['truncated']")
    parts = [part for parts_G in again.parts_PG for part in parts_G]
    left_out = [part for part in parts if part.left_out is LeftOut.TRUNCATED]
    assert len(left_out) == again.left_out[LeftOut.TRUNCATED] > 0
    assert all(part.share is None and part.samples == () for part in left_out)


def test_without_the_steps_own_weights_the_nearest_before_it_are_taken(
    company: Path, tmp_path: Path
) -> None:
    train(company, tmp_path / "run", "run.save_every=2", "run.num_steps=4")
    weights = {step: replayed(tmp_path / "run", step).weights_step for step in (1, 2, 3, 4)}
    assert weights == {1: 0, 2: 0, 3: 2, 4: 2}


def test_what_is_no_run_or_no_step_of_it_is_refused(
    whole: tuple[Path, Noting], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        replayed(tmp_path, 1)
    with pytest.raises(CheckpointError, match="no step 9 that can be read"):
        replayed(whole[0], 9)


def test_the_command_explains_a_step_and_takes_changed_settings(
    querl: Querl, whole: tuple[Path, Noting]
) -> None:
    folder, _ = whole
    code, out, _ = querl("train", "--replay", folder, 2)
    assert code == 0
    assert f"step 2 of {folder} again, from the weights of update 1\n" in out
    for told in ("vowels 0.", "truncated", "left out: nothing", "numbers equal to the last digit"):
        assert told in out
    assert "differs" not in out
    code, out, _ = querl("train", "--replay", folder, 2, "optimizer.lr=0.5")
    assert code == 0
    assert "changed: optimizer.lr=0.5" in out
    assert [line.split()[0] for line in out.splitlines() if "differs" in line] == ["optimizer/lr"]


def test_a_divergence_may_be_charged_that_the_run_did_not_know(
    company: Path, tmp_path: Path, whole: tuple[Path, Noting]
) -> None:
    again = replayed(whole[0], 2, "algorithm.kl=0.1")
    assert again.numbers["policy/kl_coefficient"] == 0.1
    train(company, tmp_path / "run", *KEEPS_ALL, "algorithm.kl=0.1", "run.num_steps=2")
    assert replayed(tmp_path / "run", 2, "algorithm.kl=5.0").numbers["policy/kl_coefficient"] == 5


def test_a_target_that_the_run_did_not_follow_leaves_the_recipes_coefficient(
    whole: tuple[Path, Noting],
) -> None:
    with_target = ("algorithm.kl.coefficient=0.1", "algorithm.kl.target=0.05")
    again = replayed(whole[0], 2, *with_target)
    assert again.numbers["policy/kl_coefficient"] == 0.1
    plain = replayed(whole[0], 2, "algorithm.kl=0.1").numbers
    names = [name for name in plain if not name.startswith(("time/", "speed/"))]
    assert all(same(again.numbers[name], plain[name]) for name in names)


def test_a_coefficient_that_followed_a_target_stays_the_checkpoints(
    company: Path, tmp_path: Path
) -> None:
    with_target = ("algorithm.kl.coefficient=0.1", "algorithm.kl.target=0.05")
    noting = train(company, tmp_path / "run", *KEEPS_ALL, *with_target, "run.num_steps=2")
    followed = noting.steps[2]["policy/kl_coefficient"]
    assert followed != 0.1
    again = replayed(tmp_path / "run", 2, "algorithm.kl.coefficient=0.7")
    assert again.numbers["policy/kl_coefficient"] == followed


def test_an_anchor_that_the_run_did_not_have_pulls_to_its_first_adapter(
    company: Path, tmp_path: Path
) -> None:
    folders = {anchor: tmp_path / f"anchor-{anchor}" for anchor in ("0", "1e-9")}
    # both runs are at the same place after a step: the first is no distance from itself
    common = (*KEEPS_ALL, "lora.rank=4", "algorithm.entropy=1e-9", "run.num_steps=2")
    for anchor, folder in folders.items():
        train(company, folder, *common, f"lora.anchor={anchor}")
    alone = replayed(folders["0"], 2).numbers["optimizer/grad_norm"]
    pulled, expected = (
        replayed(folder, 2, "lora.anchor=5").numbers["optimizer/grad_norm"]
        for folder in folders.values()
    )
    assert pulled == expected
    assert pulled != pytest.approx(alone, rel=0.01)


def test_an_update_that_would_be_skipped_is_told(querl: Querl, whole: tuple[Path, Noting]) -> None:
    assert replayed(whole[0], 2).faults == ()
    broken = 'algorithm.loss={name="test_guards:Steep"}'
    (fault,) = replayed(whole[0], 2, broken).faults
    assert fault.refused.reason is Reason.GRADIENT
    code, out, _ = querl("train", "--replay", whole[0], 2, broken)
    assert code == 0
    assert f"skipped: minibatch 0, since {fault.refused.told}" in out


def test_settings_that_cannot_train_are_refused(whole: tuple[Path, Noting]) -> None:
    with pytest.raises(ConfigError, match=r"engine\.temperature=0"):
        replayed(whole[0], 2, "engine.temperature=0")


def test_the_command_refuses_another_recipe(querl: Querl, whole: tuple[Path, Noting]) -> None:
    code, _, err = querl("train", "recipes/demo.toml", "--replay", whole[0], 2)
    assert code == 2
    assert "--replay takes the recipe from the run's folder, not recipes/demo.toml" in err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--db", "shop.sqlite", "--questions", "q.csv"), "--db, --questions"),
        (("--model", "other"), "--model"),
        (("--out", "elsewhere"), "--out"),
        (("--fresh",), "--fresh"),
        (("--max-samples", 3), "--max-samples"),
    ],
)
def test_the_command_refuses_what_a_replay_does_not_use(
    querl: Querl, whole: tuple[Path, Noting], options: tuple[object, ...], named: str
) -> None:
    code, _, err = querl("train", *options, "--replay", whole[0], 2)
    assert code == 2
    assert err == (
        f"querl: --replay reads the run's folder and writes nothing: leave out {named}\n"
    )
