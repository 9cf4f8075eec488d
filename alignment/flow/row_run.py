"""A method on given rows, from checked arguments to the exit status.

Everything that can be wrong is checked in the order in which it is cheap: folder, model folder, tokenizer, template,
data, sizes; the model loads last.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from alignment import runtime
from alignment.engine.engine import Engine, OptimizerSettings
from alignment.flow.checkpoint import CheckpointStore
from alignment.flow.flow import optimizer_of
from alignment.flow.loop import Given, Loop
from alignment.flow.method import offload_levels
from alignment.flow.order import TrainingOrder
from alignment.flow.output import prepare_output_dir
from alignment.flow.resume import check_resumable, check_same_data
from alignment.flow.row_method import RowData, RowFeed, RowMethod, RowRole
from alignment.flow.runner import describe_run, main_first, stage_template
from alignment.flow.sample import show_sample
from alignment.parallel import World
from alignment.parallel.offload import build_residency
from alignment.ppo.models import (
    check_layout,
    check_model_folder,
    check_tokenizer_fits,
    load_tokenizer,
    model_context_length,
    save_tokenizer,
)


def run_rows(method: RowMethod, world: World, argv: list[str]) -> int:
    """Train and evaluate as the method's arguments say.

    Returns:
        The exit status: 0, or 130 after an interruption.

    Raises:
        AlignmentError: whatever the user can mend.
    """
    args, label = method.args, method.label
    store = CheckpointStore(args.output_dir, args.save_total_limit)
    resume = None if args.dry_run else prepare_output_dir(args, world, store)
    source = args.model_name_or_path
    found = check_model_folder(source, role=label)
    if found is not None:
        check_layout(found.config, world.topology, f"{label} {source}")
    args.check_context(model_context_length(source), f"model {source}")
    check_resumable(args, world, resume)
    method.tokenizer = load_tokenizer(args.tokenizer_name_or_path or source, role=f"{label}'s tokenizer")
    check_tokenizer_fits(method.tokenizer, source, role=label)
    template = stage_template(args, method.tokenizer, source, resume)
    world.phase("data")
    data = main_first(world, lambda: method.build_data(method.tokenizer, template, world.is_main))
    check_same_data(args, world, resume, data.sets)
    if world.is_main:
        show_sample(next(iter(data.sets.values())), label, with_ids=args.show_sample_ids)
    sizes = args.derive_sizes(len(data.train), world.size) if data.train is not None else None
    if args.dry_run:
        if world.is_main:
            print(args.dry_run_text(sizes))
        return 0
    describe_run(args, world, data, sizes)
    runtime.seed_everything(args.seed)
    world.phase("models")
    return build_loop(method, world, data, sizes, template, argv).train(resume)


def build_loop(method: RowMethod, world: World, data: RowData, sizes: Any, template: Any, argv: list[str]) -> Loop:
    """Load the model and put the loop together."""
    args = method.args
    settings = OptimizerSettings(**args.optimizer(sizes.total_steps)) if sizes is not None else None
    residency = build_residency(
        args.offload_level,
        method.flow().residency(),
        method.between(),
        args.offload_dir,
        args.on_cpu,
        offload_levels(method.roles()),
    )
    engine = Engine(method.label, method.load_model(world), world, settings, recompute=args.recompute)
    if args.lora_path:
        engine.load_weights(args.lora_path)
    if residency is not None:
        residency.add("model", engine.model.parameters)
        if engine.trainable:
            residency.add(optimizer_of("model"), engine.optimizer_tensors)

    def save_extras(folder: Path) -> None:
        save_tokenizer(method.tokenizer, folder, template)

    given = Given(decode=method.tokenizer.decode, extras={"data": data})
    feed = RowFeed(training_order(args, world.size, len(data.train)) if data.train is not None else None, args)
    sizes = SimpleNamespace(total_steps=feed.steps)
    return Loop(method, world, {"model": RowRole(engine)}, feed, sizes, save_extras, argv, given, residency=residency)


def training_order(args: Any, world_size: int, rows: int) -> TrainingOrder:
    """The run's order of rows from its arguments."""
    batch = args.per_device_train_batch_size * world_size * args.gradient_accumulation_steps
    return TrainingOrder(rows, batch, args.seed, bool(args.dataloader_drop_last), args.shuffle)
