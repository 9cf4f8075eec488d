"""Length limits against a model's context."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.arguments import PPOArguments, RewardArguments, SFTArguments, from_dict
from alignment.errors import ArgumentsError

TUNE = {"output_dir": "out", "model_name_or_path": "m", "train_datasets": "a"}
PPO = {"output_dir": "out", "actor_model_name_or_path": "m", "reward_model_name_or_path": "r", "train_datasets": "a"}
BASE = {SFTArguments: TUNE, RewardArguments: TUNE, PPOArguments: PPO}


@pytest.mark.parametrize(
    ("cls", "values", "context", "wanted"),
    [
        (SFTArguments, {}, None, {"max_length": 2048, "src_length": 1024}),
        (SFTArguments, {}, 4096, {"max_length": 2048, "src_length": 1024}),
        (SFTArguments, {}, 128, {"max_length": 128, "src_length": 64}),
        (SFTArguments, {"src_length": 100}, 128, {"max_length": 128, "src_length": 100}),
        (SFTArguments, {"max_length": 128}, 128, {"max_length": 128, "src_length": 64}),
        (RewardArguments, {}, 128, {"max_length": 128, "max_src_len": None}),
        (PPOArguments, {"max_length": 512}, 1024, {"max_src_len": 512, "max_dec_len": 512}),
        (PPOArguments, {"max_length": 512}, 768, {"max_src_len": 256, "max_dec_len": 512}),
        (PPOArguments, {"max_length": 512, "max_dec_len": 100}, 512, {"max_src_len": 412, "max_dec_len": 100}),
        (PPOArguments, {"max_length": 512, "max_src_len": 100}, 512, {"max_src_len": 100, "max_dec_len": 412}),
        (PPOArguments, {}, 128, {"max_src_len": 64, "max_dec_len": 64}),
        (PPOArguments, {"max_src_len": 64, "max_dec_len": 64}, 128, {"max_src_len": 64, "max_dec_len": 64}),
    ],
)
def test_limits_that_fit_or_can_be_lowered(
    cls: type, values: dict, context: int | None, wanted: dict[str, Any]
) -> None:
    args = from_dict(cls, {**BASE[cls], **values})
    args.check_context(context, "actor m")
    assert {key: getattr(args, key) for key in wanted} == wanted
    assert context is None or args.context_needed <= context


@pytest.mark.parametrize(
    ("cls", "values", "context", "parts"),
    [
        (SFTArguments, {"max_length": 256}, 128, ["max_length is 256 tokens, but actor m has a context of 128"]),
        (SFTArguments, {"src_length": 128}, 128, ["src_length is 128 tokens", "set src_length below 128"]),
        (RewardArguments, {"max_length": 256}, 128, ["set max_length to 128 or less"]),
        (RewardArguments, {"max_src_len": 200}, 128, ["max_src_len is 200 tokens", "below 128"]),
        (
            PPOArguments,
            {"max_src_len": 100, "max_dec_len": 100},
            128,
            ["max_src_len 100 + max_dec_len 100 = 200 tokens, but actor m has a context of 128", "at most 128"],
        ),
        (PPOArguments, {"max_length": 128}, 128, ["max_src_len 128 + max_dec_len 128 = 256 tokens"]),
        (PPOArguments, {"max_dec_len": 200}, 128, ["context of 128"]),
        (PPOArguments, {"max_src_len": 100, "min_dec_len": 60}, 128, ["context of 128"]),
    ],
)
def test_limits_that_do_not_fit(cls: type, values: dict, context: int, parts: list[str]) -> None:
    args = from_dict(cls, {**BASE[cls], **values})
    with pytest.raises(ArgumentsError) as caught:
        args.check_context(context, "actor m")
    for part in parts:
        assert part in str(caught.value)


def test_a_lowered_limit_is_said(said: list[tuple[str, str]]) -> None:
    args = from_dict(PPOArguments, {**PPO, "max_length": 500})
    args.check_context(801, "actor m")
    args.check_context(801, "actor m")
    text = (
        "max_src_len 500 + max_dec_len 500 = 1000 tokens: more than the context of actor m (801); "
        "now max_src_len 301 + max_dec_len 500"
    )
    assert said == [("INFO", text)]
