"""Supervised fine-tuning: ``alignment sft FILE.json [key=value ...]``, or this file as a script, alone or under the
launcher.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: make the checkout importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment.arguments import SFTArguments, parse_sft
from alignment.cli import run_main


def main(argv: list[str]) -> int:
    """Run the stage and return its exit status: 0, or 130 after an interruption.

    Raises:
        AlignmentError: whatever the user can mend.
    """
    from alignment.flow.runner import run_stage

    return run_stage(argv, parse_sft, _run)


def _run(args: SFTArguments, world: Any, argv: list[str]) -> int:
    from alignment.flow.runner import lora_settings, model_flags, train_stage
    from alignment.ppo.models import load_causal_lm
    from alignment.sft.sft_data import build_data
    from alignment.sft.sft_trainer import SFTStage

    return train_stage(
        args,
        world,
        argv,
        role="SFT model",
        build_data=build_data,
        load_model=lambda: load_causal_lm(
            args.model_name_or_path,
            dtype=args.dtype,
            config_overrides=model_flags(args),
            lora=lora_settings(args),
            topology=world.topology,
            role="SFT model",
        ),
        make_stage=lambda engine, tokenizer, save: SFTStage(
            engine,
            tokenizer,
            packed=args.zero_padding,
            pad_to=args.max_length if args.pad_to_max_length else None,
            pad_to_multiple_of=args.pad_to_multiple_of,
            save=save,
        ),
    )


if __name__ == "__main__":
    sys.exit(run_main(main))
