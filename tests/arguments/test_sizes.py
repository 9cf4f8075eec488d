"""Numbers of steps, rollouts and tokens."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.arguments import PPOArguments, RewardArguments, SFTArguments, from_dict
from alignment.errors import ArgumentsError

TUNE = {"output_dir": "out", "model_name_or_path": "m", "train_datasets": "a", "max_length": 32, "src_length": 16}
PPO = {
    "output_dir": "out",
    "actor_model_name_or_path": "m",
    "reward_model_name_or_path": "r",
    "train_datasets": "a",
    "max_src_len": 20,
    "max_dec_len": 12,
}


@pytest.mark.parametrize(
    ("values", "rows", "world", "wanted"),
    [
        ({"per_device_train_batch_size": 4}, 10, 1, (3, 3)),
        ({"per_device_train_batch_size": 4, "dataloader_drop_last": True}, 10, 1, (2, 2)),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 10, 1, (2, 2)),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 17, 2, (2, 2)),
        ({"per_device_train_batch_size": 4, "num_train_epochs": 2.5}, 10, 1, (3, 8)),
        ({"per_device_train_batch_size": 4, "max_steps": 5, "num_train_epochs": 9}, 10, 1, (3, 5)),
        ({"per_device_train_batch_size": 64}, 10, 1, (1, 1)),
    ],
)
def test_steps_of_supervised_training(values: dict[str, Any], rows: int, world: int, wanted: tuple[int, int]) -> None:
    sizes = from_dict(SFTArguments, {**TUNE, **values}).derive_sizes(rows, world)
    assert (sizes.steps_per_epoch, sizes.total_steps) == wanted


def test_tokens_and_warmup() -> None:
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_ratio": 0.25}
    sizes = from_dict(SFTArguments, {**TUNE, **values}).derive_sizes(80, 2)
    assert (sizes.rows_per_step, sizes.tokens_per_step, sizes.micro_batches_per_step) == (16, 16 * 32, 2)
    assert (sizes.total_steps, sizes.warmup_steps, sizes.micro_batches_per_step) == (5, 2, 2)
    constant = from_dict(SFTArguments, {**TUNE, **values, "lr_scheduler_type": "constant"}).derive_sizes(80, 2)
    assert constant.warmup_steps == 0


def test_a_budget_of_tokens_changes_no_step() -> None:
    values = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    fixed = from_dict(SFTArguments, {**TUNE, **values}).derive_sizes(80, 2)
    budget = from_dict(SFTArguments, {**TUNE, **values, "max_tokens_per_micro_batch": 100}).derive_sizes(80, 2)
    assert (budget.total_steps, budget.rows_per_step) == (fixed.total_steps, fixed.rows_per_step)
    assert budget.micro_batches_per_step == 8  # at worst each row alone
    assert "at most 100 padded tokens each" in budget.render()


def test_a_pair_has_two_sequences() -> None:
    values = {key: value for key, value in TUNE.items() if key != "src_length"}
    sizes = from_dict(RewardArguments, {**values, "per_device_train_batch_size": 4}).derive_sizes(8, 1)
    assert sizes.tokens_per_step == 2 * 4 * 32


def ppo(prompts: int, samples: int, batch: int, accumulation: int, **more: Any) -> PPOArguments:
    values = {
        "per_device_prompt_batch_size": prompts,
        "num_return_sequences": samples,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        **more,
    }
    return from_dict(PPOArguments, {**PPO, **values})


@pytest.mark.parametrize(
    ("args", "rows", "world", "wanted"),
    [
        # prompts and samples of a rollout, steps of a rollout, rollouts and steps of an epoch
        (ppo(16, 1, 16, 1), 1000, 1, (16, 16, 1, 63, 63)),
        (ppo(16, 1, 4, 1), 64, 1, (16, 16, 4, 4, 16)),
        (ppo(16, 1, 4, 2, update_iters=3), 64, 1, (16, 16, 6, 4, 24)),
        (ppo(8, 4, 4, 2), 64, 2, (16, 64, 4, 4, 16)),
        # gradient accumulation beyond one batch of prompts: several batches make one rollout
        (ppo(4, 1, 4, 4), 64, 1, (16, 16, 1, 4, 4)),
        (ppo(2, 2, 4, 4, update_iters=2), 64, 2, (16, 32, 2, 4, 8)),
        # the last rollout is not full: 70 = 4 * 16 + 6 prompts, 6 samples in windows of 4
        (ppo(16, 1, 4, 1), 70, 1, (16, 16, 4, 5, 18)),
        (ppo(16, 1, 4, 1, dataloader_drop_last=True), 70, 1, (16, 16, 4, 4, 16)),
        (ppo(16, 1, 4, 1, update_iters=2), 70, 1, (16, 16, 8, 5, 36)),
        (ppo(4, 1, 4, 4), 70, 1, (16, 16, 1, 5, 5)),
    ],
)
def test_rollouts_and_steps_of_ppo(args: PPOArguments, rows: int, world: int, wanted: tuple[int, ...]) -> None:
    sizes = args.derive_sizes(rows, world)
    found = (
        sizes.prompts_per_rollout,
        sizes.rows_per_rollout,
        sizes.steps_per_rollout,
        sizes.rollouts_per_epoch,
        sizes.steps_per_epoch,
    )
    assert found == wanted
    assert (sizes.rollouts, sizes.total_steps) == wanted[3:]


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"num_train_epochs": 2}, (10, 36)),
        ({"num_train_epochs": 0.5}, (3, 9)),
        ({"max_steps": 1}, (1, 1)),
        ({"max_steps": 18}, (5, 18)),
        ({"max_steps": 19}, (6, 19)),
        ({"max_steps": 40}, (11, 40)),
    ],
)
def test_max_steps_counts_optimizer_steps(more: dict[str, Any], wanted: tuple[int, int]) -> None:
    sizes = ppo(16, 1, 4, 1, **more).derive_sizes(70, 1)
    assert (sizes.rollouts, sizes.total_steps) == wanted


def test_rollouts_agree_with_a_walk_over_the_data() -> None:
    """Count rollouts and steps one by one, as a trainer meets them."""
    for accumulation in (1, 2, 8):
        for rows in (1, 7, 16, 33, 100):
            for world in (1, 2):
                args = ppo(4, 2, 2, accumulation, update_iters=2, num_train_epochs=3)
                per_rollout = 4 * max(1, 2 * accumulation // 8) * world
                steps = rollouts = 0
                for _ in range(3):
                    left = rows
                    while left > 0:
                        taken = min(left, per_rollout)
                        left -= taken
                        rollouts += 1
                        samples = taken * 2
                        for _ in range(2):
                            open_samples = samples
                            while open_samples > 0:
                                open_samples -= 2 * accumulation * world
                                steps += 1
                sizes = args.derive_sizes(rows, world)
                assert (sizes.rollouts, sizes.total_steps) == (rollouts, steps)


def test_tokens_and_ptx_rows() -> None:
    sizes = ppo(16, 1, 4, 2, ptx_datasets="b", ptx_coeff=2.0).derive_sizes(64, 2)
    assert (sizes.tokens_per_step, sizes.ptx_rows_per_step) == (16 * 32, 16)
    assert ppo(16, 1, 4, 2).derive_sizes(64, 2).ptx_rows_per_step == 0


def test_nothing_to_train_on() -> None:
    with pytest.raises(ArgumentsError, match="there are no training prompts: the data sets are empty"):
        ppo(16, 1, 4, 1).derive_sizes(0, 1)
    with pytest.raises(ArgumentsError, match="dataloader_drop_last leaves nothing to train on: 5 prompts, .* takes 16"):
        ppo(16, 1, 4, 1, dataloader_drop_last=True).derive_sizes(5, 1)
    with pytest.raises(ArgumentsError, match="there are no training rows"):
        from_dict(SFTArguments, TUNE).derive_sizes(0, 1)


def test_a_critic_warmup_as_long_as_the_run() -> None:
    with pytest.raises(ArgumentsError, match="critic_warmup_steps is 16, but the run has 16 optimizer steps"):
        ppo(16, 1, 4, 1, critic_warmup_steps=16).derive_sizes(64, 1)


def test_the_sizes_in_words() -> None:
    text = ppo(16, 1, 4, 1, warmup_ratio=0.5).derive_sizes(64, 1).render()
    lines = {" ".join(line.split()) for line in text.splitlines()}
    assert {
        "training prompts 64",
        "samples per rollout 16",
        "optimizer steps 16 (1 epochs, 8 of warm-up)",
        "tokens per optimizer step at most 128",
    } <= lines


def test_dry_run_text_marks_what_differs() -> None:
    args = ppo(16, 1, 4, 1, unified_checkpoint=True, kl_target=3)
    lines = [" ".join(line.split()) for line in args.dry_run_text(args.derive_sizes(64, 1)).splitlines()]
    assert "* per_device_train_batch_size 4" in lines
    assert "per_device_prompt_batch_size 16" in lines, "given, but the default"
    assert "kl_coeff 0.02" in lines
    assert "- kl_target: not used, because adaptive_kl is false" in lines
    assert any(line.startswith("- unified_checkpoint: checkpoints have one layout") for line in lines)
    assert "optimizer steps 16 (1 epochs, 0 of warm-up)" in lines
