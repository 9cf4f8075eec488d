"""The arguments of a method: its own keys on top of what all methods of its sort have."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from alignment.arguments import (
    CriticKeys,
    OnlineArguments,
    PPOArguments,
    RowArguments,
    argument,
    compose,
    from_dict,
    parse,
)
from alignment.arguments.stage_arguments import help_text
from alignment.errors import ArgumentsError
from alignment.losses.correction import CorrectionOptions
from alignment.losses.policy import POLICY_LOSSES

ONLINE = {"output_dir": "out", "actor_model_name_or_path": "m", "reward_model_name_or_path": "r", "train_datasets": "a"}
ROWS = {"output_dir": "out", "model_name_or_path": "m", "train_datasets": "a"}


@dataclass
class Keys:
    """Keys of a method as its author writes them."""

    GROUP = "Grouped"

    scale: str = argument("group", "What advantages are divided by.", choices=("group", "batch", "none"))
    divisor: int | None = argument(None, "Constant divisor of the loss.", ge=1, derived="max_dec_len")

    def resolve_keys(self) -> None:
        self.divisor = self.divisor or self.max_dec_len

    def check_keys(self, problems: Any) -> None:
        if self.scale == "none" and self.normalize_advantage:
            problems.add("scale none and normalize_advantage contradict each other", "scale", "normalize_advantage")


GROUPED = compose(
    Keys,
    OnlineArguments,
    "grouped",
    "Grouped",
    changes={
        "num_return_sequences": {"default": 8, "ge": 2},
        "kl_coeff": {"default": 0.0, "aliases": ("kl_loss_coeff",)},
    },
    presets={
        "plain": {"scale": "none", "kl_coeff": 0.5},
        "sharp": {"scale": "batch", "clip_range_ratio_high": 0.28},
    },
    metrics=("spread",),
)


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def made(**values: Any) -> Any:
    return from_dict(GROUPED, {**ONLINE, **values})


def refused(cls: type, values: dict[str, Any]) -> str:
    with pytest.raises(ArgumentsError) as caught:
        from_dict(cls, values)
    return str(caught.value)


def test_own_keys_and_shared_ones_are_attributes() -> None:
    args = made(max_dec_len=7, gamma=0.5)
    assert (args.scale, args.divisor, args.gamma) == ("group", 7, 0.5)
    assert (args.num_return_sequences, args.kl_coeff) == (8, 0.0)
    assert (args.STAGE, args.TITLE, isinstance(args, OnlineArguments)) == ("grouped", "Grouped", True)
    assert args.clip_range_ratio_low == 0.2, "what follows for the shared keys is filled in too"
    assert OnlineArguments.specs()["num_return_sequences"].default == 1


def test_a_method_without_a_critic_has_nothing_of_one() -> None:
    args = made()
    assert not hasattr(args, "gae_lambda") and not hasattr(args, "reward_critic_model_name_or_path")
    assert args.derive_sizes(64, 1).rows_per_rollout == 16 * 8
    text = refused(GROUPED, {**ONLINE, "gae_lambda": 0.9})
    assert "gae_lambda: is an argument of methods with a critic, not of Grouped" in text


def test_own_keys_are_checked_as_all_are() -> None:
    text = refused(GROUPED, {**ONLINE, "scale": "groups", "divisor": 0, "num_return_sequences": 1, "scal": 1})
    assert "scale: 'groups' is not one of 'group', 'batch', 'none'" in text
    assert "divisor: must be >= 1, not 0" in text
    assert "num_return_sequences: must be >= 2, not 1" in text
    assert "scal: unknown argument; did you mean 'scale'?" in text
    text = refused(GROUPED, {**ONLINE, "scale": "none", "normalize_advantage": True})
    assert text == "scale none and normalize_advantage contradict each other"


def test_the_critics_keys_are_mixed_in() -> None:
    @dataclass
    class Own(CriticKeys):
        masks: int = argument(3, "Masks.", ge=1)

    args = from_dict(compose(Own, OnlineArguments, "mine", "Mine"), {**ONLINE, "learning_rate": 0.1})
    assert (args.masks, args.critic_learning_rate, args.reward_critic_model_name_or_path) == (3, 0.1, "r")
    assert type(args).GROUP == "Mine"
    groups = {name: spec.group for name, spec in type(args).specs().items()}
    assert (groups["masks"], groups["gae_lambda"], groups["gamma"]) == ("Mine", "Critic", "Online methods: objective")


def test_ppo_is_the_critics_keys_on_the_shared_ones() -> None:
    assert set(PPOArguments.specs()) == set(CriticKeys.__dataclass_fields__) | set(OnlineArguments.specs())


def test_a_method_on_rows() -> None:
    args = from_dict(compose(None, RowArguments, "pairs", "Pairs", metrics=("accuracy",)), {**ROWS, "lora": True})
    assert (args.lora_alpha, args.metric_for_best_model, args.greater_is_better) == (16, "accuracy", True)
    assert "there are no training data" in refused(type(args), {k: v for k, v in ROWS.items() if k != "train_datasets"})


def test_its_metrics_come_first() -> None:
    args = made(evaluation_strategy="steps", eval_datasets="b")
    assert args.metric_for_best_model == "spread"
    text = refused(
        GROUPED,
        {
            **ONLINE,
            "evaluation_strategy": "steps",
            "eval_datasets": "b",
            "metric_for_best_model": "spred",
            "load_best_model_at_end": True,
        },
    )
    assert "there are spread, reward, mean_generated_length" in text and "did you mean 'spread'?" in text


# ---- presets --------


def test_a_preset_lies_below_what_is_given_and_is_said() -> None:
    args = made(preset="plain", kl_coeff=0.25)
    assert (args.scale, args.kl_coeff) == ("none", 0.25)
    assert args.set_by == {"scale": "preset plain"}
    assert args.remarks == ["preset plain sets scale none; kl_coeff: as given"]
    text = args.dry_run_text()
    assert re.search(r'\n\* scale +"none"  \(by preset plain\)\n', text)
    assert "- preset plain sets scale none; kl_coeff: as given" in text


def test_an_alias_that_is_given_wins_over_a_preset() -> None:
    assert made(preset="plain", kl_loss_coeff=0.125).kl_coeff == 0.125


def test_an_unknown_preset_lists_the_names() -> None:
    assert "preset: 'plane' is not one of 'plain', 'sharp'" in refused(GROUPED, {**ONLINE, "preset": "plane"})


def test_arguments_that_were_saved_with_a_preset_can_be_given_again(tmp_path: Path) -> None:
    args = made(preset="sharp")
    again = parse(GROUPED, [str(args.save(tmp_path / "arguments.json"))])
    assert again.to_dict() == args.to_dict() and again.clip_range_ratio_high == 0.28


def test_help_says_what_the_presets_set() -> None:
    text = help_text(GROUPED)
    assert '\nGrouped\n  scale  (default: "group") [group, batch, none]' in text
    assert "      sharp: scale batch, clip_range_ratio_high 0.28" in text


def test_compat_sets_a_peers_constants(said: list[tuple[str, str]]) -> None:
    args = from_dict(PPOArguments, {**ONLINE, "compat": "nemo", "clip_range_ratio_high": 0.3})
    assert (args.dual_clip, args.clip_range_ratio_low, args.clip_range_ratio_high) == (10.0, 0.2, 0.3)
    assert args.set_by["dual_clip"] == "compat nemo" and "clip_range_ratio_high" not in args.set_by
    (remark,) = args.remarks
    assert remark.startswith("compat nemo sets ") and "dual_clip 10.0" in remark.partition(";")[0]
    assert "; clip_range_ratio_high: as given; there is no key for kl_log_ratio_clamp" in remark
    args.report()
    assert ("INFO", remark) in said


def test_compat_of_a_peer_without_the_method_is_refused() -> None:
    text = refused(PPOArguments, {**ONLINE, "compat": "trl1"})
    assert "compat 'trl1' says nothing of 'ppo': it knows grpo, rloo" in text
    assert "compat: 'trlx' is not one of 'trl0.24', " in refused(PPOArguments, {**ONLINE, "compat": "trlx"})


def test_compat_finds_a_key_by_its_other_name_and_yields_to_a_preset() -> None:
    @dataclass
    class Own:
        advantage_eps: float = argument(1e-6, "Added to the deviation.", aliases=("eps",))
        std: str = argument("unbiased", "Deviation.", choices=("unbiased", "biased"))
        policy_loss: str = argument("ppo", "The loss.", choices=POLICY_LOSSES)

    cls = compose(Own, OnlineArguments, "grpo", "GRPO", presets={"ours": {"std": "unbiased"}})
    args = from_dict(cls, {**ONLINE, "compat": "compose"})
    assert (args.advantage_eps, args.std, args.policy_loss_mean) == (1e-4, "biased", "sequence")
    args = from_dict(cls, {**ONLINE, "compat": "compose", "preset": "ours"})
    assert (args.std, args.set_by["std"]) == ("unbiased", "preset ours")
    assert not any("std biased" in line for line in args.remarks)
    args = from_dict(cls, {**ONLINE, "compat": "compose", "policy_loss": "gspo"})
    assert args.policy_loss_mean == "token", "another loss keeps its own paper's aggregation"


def test_what_a_peer_asks_for_and_the_method_does_not_take_is_said() -> None:
    @dataclass
    class Own:
        std: str = argument("unbiased", "Deviation.", choices=("unbiased",))

    cls = compose(Own, OnlineArguments, "grpo", "GRPO")
    text = refused(cls, {**ONLINE, "compat": "compose"})
    assert text.startswith("compat compose asks for std biased, which GRPO does not take ('biased' is not one of")
    assert from_dict(cls, {**ONLINE, "compat": "compose", "std": "unbiased"}).std == "unbiased"


# ---- what authors get wrong --------


def test_what_authors_get_wrong_is_said() -> None:
    @dataclass
    class Plain:
        scale: str = "group"

    @dataclass
    class Clash:
        gamma: str = argument("x", "Not the discount.")

    @dataclass
    class Taken:
        optimizer: str = argument("adamw", "Which optimizer.")

    class NoDataclass:
        scale: str = argument("group", "What.")

    def message(keys: type | None = None, **more: Any) -> str:
        with pytest.raises(ArgumentsError) as caught:
            compose(keys, OnlineArguments, "mine", "Mine", **more)
        return str(caught.value)

    assert message(Plain) == ("Mine: scale: a key is made by argument(default, help), from alignment.arguments.spec")
    assert message(Clash).startswith("Mine: gamma is a key of all such methods, of another type")
    assert message(Taken) == "Mine: optimizer is something that all arguments have; give the key another name"
    assert message(NoDataclass) == "Mine: its Keys are no dataclass; write @dataclass above the class"
    assert message(changes={"gama": {"default": 0}}) == "Mine: there is no key 'gama' to change; did you mean 'gamma'?"
    assert message(changes={"gamma": {"defualt": 0}}) == "Mine: gamma has no 'defualt'; did you mean 'default'?"
    assert message(presets={"a": {"gama": 1}}).startswith("Mine: the preset a sets 'gama', which is no key; did you")
    assert message(presets={"a": {"gamma": 2}}) == "Mine: the preset a sets 'gamma': must be 0 to 1, not 2.0"


# ---- shared keys --------


def test_early_stopping_needs_evaluations() -> None:
    text = refused(PPOArguments, {**ONLINE, "early_stopping_patience": 2})
    assert text == "early_stopping_patience counts evaluations: set evaluation_strategy to steps or epoch"
    evaluated = {**ONLINE, "evaluation_strategy": "steps", "eval_datasets": "b"}
    assert from_dict(PPOArguments, {**evaluated, "early_stopping_patience": 2}).early_stopping_patience == 2
    assert from_dict(PPOArguments, evaluated).early_stopping_patience is None
    assert from_dict(PPOArguments, {**evaluated, "early_stopping": True}).early_stopping_patience == 4


def test_early_stopping_that_a_reference_file_switches_off_stays_off() -> None:
    args = from_dict(PPOArguments, {**ONLINE, "early_stopping": False, "early_stopping_patience": 4})
    assert args.early_stopping_patience is None
    assert args.remarks == ["early_stopping_patience is not used, because early_stopping is false"]


@pytest.mark.parametrize(
    ("mode", "bounds"),
    [("none", (None, None)), ("tis", (None, 2.0)), ("icepop", (0.5, 5.0)), ("mask", (0.99, 1.01))],
)
def test_bounds_of_the_correction_follow_from_its_kind(mode: str, bounds: tuple[Any, Any]) -> None:
    args = made(rollout_correction=mode)
    assert (args.rollout_correction_low, args.rollout_correction_high) == bounds
    assert CorrectionOptions(**args.correction_bounds()) == CorrectionOptions(), "the same as in the function"


def test_the_correction_is_checked() -> None:
    assert made(rollout_correction="tis", rollout_correction_cap=3).rollout_correction_high == 3.0
    text = refused(GROUPED, {**ONLINE, "rollout_correction": "icepop", "rollout_correction_low": 6})
    assert text == "rollout_correction_low 6 is not below rollout_correction_high 5"
    notes = made(rollout_correction_cap=3).notes
    assert notes == ["rollout_correction_high: not used, because rollout_correction is none"]
    assert "bounds weights from above only" in made(rollout_correction="tis", rollout_correction_low=0.5).notes[0]
