"""What every run shares before its models load: from the command line to a process that has joined the others, the
device, the template, what is said about data and sizes.
"""

from __future__ import annotations

from collections.abc import Callable
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
    pass

T = TypeVar("T")
LOG_WIDTH = 160


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


def describe_run(args: Arguments, world: World, data: Any, sizes: Any) -> None:
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
