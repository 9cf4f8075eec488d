"""Reward-model training: ``alignment rm FILE.json [key=value ...]``, or this file as a script, alone or under the
launcher; with ``score_type=cost`` (or as ``alignment cost FILE.json``) a cost model from safety labels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: make the checkout importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.arguments import RewardArguments, parse_cost, parse_reward
from alignment.cli import run_main


def main(argv: list[str]) -> int:
    """Run the stage and return its exit status: 0, or 130 after an interruption.

    Raises:
        AlignmentError: whatever the user can mend.
    """
    from alignment.flow.runner import run_stage

    return run_stage(argv, parse_reward, _run)


def main_cost(argv: list[str]) -> int:
    """:func:`main` for a cost model."""
    from alignment.flow.runner import run_stage

    return run_stage(argv, parse_cost, _run)


def _run(args: RewardArguments, world: Any, argv: list[str]) -> int:
    from alignment.flow.runner import lora_settings, model_flags, train_stage
    from alignment.ppo.models import load_score_model
    from alignment.rm.reward_data import build_data
    from alignment.rm.reward_trainer import RewardStage

    role = f"{args.score_type} model"
    return train_stage(
        args,
        world,
        argv,
        role=role,
        build_data=build_data,
        load_model=lambda: load_score_model(
            args.model_name_or_path,
            score_type=args.score_type,
            do_normalize=args.normalize_score_during_training,
            normalizer_type=args.normalizer_type,
            momentum=args.normalizer_momentum,
            dtype=args.dtype,
            config_overrides=model_flags(args),
            lora=lora_settings(args),
            topology=world.topology,
            seed=args.seed,
            new_head="trained" if args.do_train else "used",
            role=role,
        ),
        make_stage=lambda engine, tokenizer, save: RewardStage(
            engine,
            world,
            tokenizer,
            loss_type=args.loss_type,
            regularization=args.regularization,
            name=role,
            save=save,
        ),
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
