"""What the runners of SFT and reward modelling share, from the command line to the trainer.

Everything that can be wrong is checked in the order in which it is cheap: arguments, folder, model folder, tokenizer,
template, data, sizes; the model loads last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from alignment.arguments import Arguments
from alignment.parallel import World, init_world
from alignment.ppo.data import PromptTemplate, check_same
from alignment.training.checkpoint import write_json

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
    """Parse, load plug-ins, join the run, and call ``body(args, world, argv)``; a failing rank tells the others.

    Returns:
        The exit status of ``body``.
    """
    args = parse(argv)
    if args.plugins:
        from alignment.plugins import load_plugins

        load_plugins(args.plugins)
    use_device(args)
    world = init_world()
    with world.guard():
        args.report()
        code = body(args, world, argv)
    world.close()
    return code


def use_device(args: Arguments) -> None:
    """Make Paddle compute on the CPU where the arguments say so (or there is nothing else)."""
    import paddle

    if args.on_cpu:
        paddle.set_device("cpu")


def main_first(world: World, build: Callable[[], T]) -> T:
    """Call ``build`` on the main process, then on the others, which find its caches ready."""
    if world.is_main:
        built = build()
    world.barrier()
    if not world.is_main:
        built = build()
    return built


def stage_template(args: Arguments, tokenizer: Any, model_folder: str) -> PromptTemplate:
    """The prompt template of this run: the given one, else the one saved with the model, else Beaver.

    Raises:
        DataError: it differs from the one that the model was trained with, and ``allow_template_mismatch`` is not set.
    """
    saved = PromptTemplate.load(model_folder) if Path(model_folder).is_dir() else None
    template = PromptTemplate.resolve(args.prompt_template or saved, tokenizer)
    check_same(saved, template, f"the model {model_folder}", "this run", args.allow_template_mismatch)
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
