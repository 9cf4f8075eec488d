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
    from alignment.training.runner import run_stage

    return run_stage(argv, parse_sft, _run)


def _run(args: SFTArguments, world: Any, argv: list[str]) -> int:
    from alignment import runtime
    from alignment.ppo.engine import Engine, OptimizerSettings
    from alignment.ppo.models import (
        check_model_folder,
        load_causal_lm,
        load_tokenizer,
        model_context_length,
        save_model,
        save_tokenizer,
    )
    from alignment.sft.data import build_data
    from alignment.sft.sft_trainer import SFTStage
    from alignment.training.checkpoint import CheckpointStore
    from alignment.training.loop import StageTrainer
    from alignment.training.output import prepare_output_dir
    from alignment.training.runner import describe_run, lora_settings, main_first, stage_template

    store = CheckpointStore(args.output_dir, args.save_total_limit)
    resume = None if args.dry_run else prepare_output_dir(args, world, store)
    source = args.model_name_or_path
    check_model_folder(source, role="SFT model")
    args.check_context(model_context_length(source), f"model {source}")
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or source, role="SFT tokenizer")
    template = stage_template(args, tokenizer, source)
    data = main_first(world, lambda: build_data(args, tokenizer, template, show_progress=world.is_main))
    sizes = args.derive_sizes(len(data.train), world.size) if data.train is not None else None
    if args.dry_run:
        if world.is_main:
            print(args.dry_run_text(sizes))
        return 0
    describe_run(args, world, data, sizes)

    runtime.seed_everything(args.seed)
    model = load_causal_lm(source, dtype=args.dtype, config_overrides=model_flags(args), lora=lora_settings(args))
    settings = OptimizerSettings(**args.optimizer(sizes.total_steps)) if sizes is not None else None
    engine = Engine("SFT model", model, world, settings, recompute=args.recompute)
    if args.lora_path:
        engine.load_weights(args.lora_path)

    def save(folder: Path) -> None:
        save_model(model, folder)
        save_tokenizer(tokenizer, folder)
        template.save(folder)

    stage = SFTStage(
        engine,
        tokenizer,
        packed=args.zero_padding,
        pad_to=args.max_length if args.pad_to_max_length else None,
        pad_to_multiple_of=args.pad_to_multiple_of,
        save=save,
    )
    return StageTrainer(stage, args, world, data.train, data.evaluation, argv=argv, resume=resume).run()


def model_flags(args: SFTArguments) -> dict[str, Any]:
    """Config attributes of the model that arguments change."""
    return {"use_flash_attention": True} if args.use_flash_attention and not args.on_cpu else {}


if __name__ == "__main__":
    sys.exit(run_main(main))
