"""What the runners of SFT and reward modelling share, from the command line to the trainer.

Everything that can be wrong is checked in the order in which it is cheap: arguments, folder, model folder, tokenizer,
template, data, sizes; the model loads last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from alignment.arguments import Arguments
from alignment.flow.checkpoint import write_json
from alignment.flow.output import claimed
from alignment.log import get_logger, say_once
from alignment.parallel import World, init_world
from alignment.parallel.monitor import Monitor
from alignment.parallel.world import FOR_EVER
from alignment.ppo.data import PromptTemplate, check_same

if TYPE_CHECKING:
    from alignment.flow.stage import Stage

T = TypeVar("T")
LOG_WIDTH = 160


@dataclass
class Data:
    """A stage's rows.

    Attributes:
        train: training rows; None without training.
        evaluation: evaluation rows; None where there are none.
        sets: the data sets behind them, for summaries: "train", "eval" -> a data set with ``summary`` and
            ``mixture_record()``.
    """

    train: Sequence[Any] | None
    evaluation: Sequence[Any] | None
    sets: dict[str, Any]


def run_stage(argv: list[str], parse: Callable[[list[str]], Any], body: Callable[[Any, World, list[str]], int]) -> int:
    """Parse, load plug-ins, join the run, and call ``body(args, world, argv)``; a failing rank tells the others, which
    stop (:mod:`alignment.parallel.monitor`).

    Returns:
        The exit status of ``body``.
    """
    args = parse(argv)
    use_device(args)  # before anything loads Paddle
    if args.plugins:
        from alignment.plugins import load_plugins

        load_plugins(args.plugins)
    # Who is late in a collective, the monitor judges.
    world = init_world(args.topology(), patience=FOR_EVER, join_timeout=args.join_timeout)
    heartbeats = None if args.dry_run else Path(args.output_dir) / "heartbeat"
    # The folder first: a second run there must not disturb the first one's heartbeats either.
    with world.guard(), claimed(args, world), Monitor(world, heartbeats, hang_timeout=args.hang_timeout):
        args.report()
        if world.processes > 1:
            get_logger().info("layout: %s", world.topology.describe())
        code = body(args, world, argv)
    world.close()
    return code


def train_stage(
    args: Any,
    world: World,
    argv: list[str],
    *,
    role: str,
    build_data: Callable[..., Data],
    load_model: Callable[[], Any],
    make_stage: Callable[[Any, Any, Callable[[Path], None]], Stage],
) -> int:
    """Everything from checked arguments to the trained model, for the stages that :class:`StageTrainer` runs.

    Args:
        args: of SFT or reward modelling.
        world: the processes of the run.
        argv: the command's arguments, to say how to resume.
        role: what the model is, for messages.
        build_data: ``(args, tokenizer, template, show_progress=) -> Data``.
        load_model: gives the model of ``model_name_or_path``.
        make_stage: ``(engine, tokenizer, save) -> Stage``.

    Returns:
        The exit status: 0, or 130 after an interruption.
    """
    from alignment import runtime
    from alignment.engine.engine import Engine, OptimizerSettings
    from alignment.flow.checkpoint import CheckpointStore
    from alignment.flow.output import prepare_output_dir
    from alignment.flow.resume import check_resumable, check_same_data
    from alignment.flow.sample import show_sample
    from alignment.flow.stage_trainer import StageTrainer
    from alignment.ppo.models import (
        check_layout,
        check_model_folder,
        check_tokenizer_fits,
        load_tokenizer,
        model_context_length,
        save_tokenizer,
    )

    store = CheckpointStore(args.output_dir, args.save_total_limit)
    resume = None if args.dry_run else prepare_output_dir(args, world, store)
    source = args.model_name_or_path
    found = check_model_folder(source, role=role)
    if found is not None:
        check_layout(found.config, world.topology, f"{role} {source}")
    args.check_context(model_context_length(source), f"model {source}")
    check_resumable(args, world, resume)
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or source, role=f"{role}'s tokenizer")
    check_tokenizer_fits(tokenizer, source, role=role)
    template = stage_template(args, tokenizer, source, resume)
    world.phase("data")
    data = main_first(world, lambda: build_data(args, tokenizer, template, show_progress=world.is_main))
    check_same_data(args, world, resume, data.sets)
    if world.is_main:
        show_sample(next(iter(data.sets.values())), role, with_ids=args.show_sample_ids)
    sizes = args.derive_sizes(len(data.train), world.size) if data.train is not None else None
    if args.dry_run:
        if world.is_main:
            print(args.dry_run_text(sizes))
        return 0
    describe_run(args, world, data, sizes)

    runtime.seed_everything(args.seed)
    world.phase("models")
    model = load_model()
    settings = OptimizerSettings(**args.optimizer(sizes.total_steps)) if sizes is not None else None
    engine = Engine(role, model, world, settings, recompute=args.recompute)
    if args.lora_path:
        engine.load_weights(args.lora_path)

    def save(folder: Path) -> None:
        engine.save_weights(folder)
        if world.is_main:
            save_tokenizer(tokenizer, folder, template)

    stage = make_stage(engine, tokenizer, save)
    return StageTrainer(stage, args, world, data.train, data.evaluation, argv=argv, resume=resume).run()


def model_flags(args: Arguments) -> dict[str, Any]:
    """Config attributes of the model that arguments change; call it when Paddle is loaded and has its device."""
    wanted = args.use_flash_attention
    if wanted is None:
        wanted = args.dtype == "bfloat16" and flash_attention_runs()
    return {"use_flash_attention": True} if wanted and not args.on_cpu else {}


def flash_attention_runs() -> bool:
    """Whether Paddle's device is a GPU of compute capability 8 or more, as FlashAttention-2 needs (Dao 2023)."""
    from alignment import runtime

    if runtime.is_cpu():
        return False
    import paddle

    return paddle.device.cuda.get_device_capability()[0] >= 8


def use_device(args: Arguments) -> None:
    """Load Paddle and make it compute on the CPU where the arguments say so, or where there is no GPU; say which device
    was taken.
    """
    from alignment import runtime

    if args.device == "cpu":
        runtime.stay_on_cpu()
    with runtime.quiet_import():
        import paddle

    get_logger().info(runtime.describe())
    if args.on_cpu:
        other = paddle.get_device()
        if args.device != "cpu" and other != "cpu":
            get_logger().warning("%s is no CPU and no GPU of NVIDIA's: it is left alone, and the CPU is used", other)
        paddle.set_device("cpu")
    taken = paddle.get_device()
    name = f" ({paddle.device.cuda.get_device_name()})" if taken.startswith("gpu") else ""
    get_logger().info("device: %s%s", taken, name)


def main_first(world: World, build: Callable[[], T]) -> T:
    """Call ``build`` on the main process, then on the others, which find its caches ready."""
    if world.is_main:
        built = build()
    world.barrier()
    if not world.is_main:
        built = build()
    return built


def stage_template(args: Arguments, tokenizer: Any, model_folder: str, resume: Path | None = None) -> PromptTemplate:
    """The prompt template of this run: the given one, else the model's (see :meth:`PromptTemplate.choose`); one line
    says which and why. A run that goes on keeps its day, and its template where none is given.

    Args:
        args: of any stage.
        tokenizer: the model's.
        model_folder: as given; of a hub's name the tokenizer's folder stands for it.
        resume: the checkpoint that the run goes on from, or None.

    Raises:
        DataError: it differs from the one that the model was trained with, and ``allow_template_mismatch`` is not set.
    """
    given = args.prompt_template
    folders = (resume, resume / "policy") if resume is not None else ()
    kept = next((found for folder in folders if (found := PromptTemplate.load(folder)) is not None), None)
    goes_on = kept is not None and given == "auto"
    template, saved, why = PromptTemplate.for_model(
        kept if goes_on else given, tokenizer, model_folder, args.enable_thinking
    )
    template = template.with_choices_of(kept)
    if goes_on:
        why = "as the run began"
    else:
        check_same(saved, template, f"the model {model_folder}", "this run", args.allow_template_mismatch)
    say_once(f"prompt template: {template.describe()} ({why})")
    return template


def describe_run(args: Arguments, world: World, data: Data, sizes: Any) -> None:
    """Print the data tables and derived sizes; write ``arguments.json``, ``data_mixture.json`` and
    ``data_summary.json``.
    """
    if not world.is_main:
        return
    from rich.console import Console

    from alignment.ppo.data.summary import summary_table

    console = Console()
    if not console.is_terminal:
        console.width = LOG_WIDTH  # a log file has no width of its own
    console.print(summary_table([dataset.summary for dataset in data.sets.values()]))
    if sizes is not None:
        print(sizes.render(), flush=True)
    folder = Path(args.output_dir)
    write_json(folder / "arguments.json", args.to_dict())
    write_json(folder / "data_mixture.json", {name: dataset.mixture_record() for name, dataset in data.sets.items()})
    write_json(folder / "data_summary.json", {name: dataset.summary.to_dict() for name, dataset in data.sets.items()})


def lora_settings(args: Any) -> Any:
    """The arguments' LoRA settings, or None."""
    if not args.lora:
        return None
    from alignment.ppo.models import LoRASettings

    targets = tuple(args.lora_target_modules) if args.lora_target_modules else None
    return LoRASettings(rank=args.lora_rank, alpha=args.lora_alpha, target_modules=targets)
