"""The ``alignment`` command, also ``python -m alignment``, and :func:`run_main`, with which every script ends.

Nothing heavy is imported before the task is known.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from alignment import __version__, runtime
from alignment.errors import AlignmentError, ArgumentsError

EXIT_BUG = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130  # what shells report for a process ended by Ctrl-C
EXIT_PIPE = 141  # 128 + SIGPIPE, as of a program that the signal ends


@dataclass(frozen=True)
class Task:
    """One subcommand.

    Attributes:
        target: ``"module:function"`` of a ``main(argv: list[str]) -> int``, imported when the task is asked for.
        usage: what comes after the task's name.
        summary: one line for the list of tasks.
    """

    target: str
    usage: str
    summary: str


TASKS = {
    "demo": Task("alignment.demo.run_demo:main", "[options]", "train a tiny model through all three stages"),
    "sft": Task("alignment.sft.run_sft:main", "FILE [key=value ...]", "supervised fine-tuning"),
    "rm": Task(
        "alignment.rm.run_reward:main", "FILE [key=value ...]", "train a reward model on preferences (also reward)"
    ),
    "cost": Task("alignment.rm.run_reward:main_cost", "FILE [key=value ...]", "train a cost model on safety labels"),
    "ppo": Task("alignment.ppo.run_ppo:main", "FILE [key=value ...]", "train a policy against rewards"),
    "methods": Task(
        "alignment.methods.start:list_command", "[plugins=...]", "list all methods, each of them a task too"
    ),
    "run": Task(
        "alignment.methods.start:run_command", "NAME [FILE] [key=value ...]", "train with a method of your own"
    ),
    "generate": Task("alignment.rollout.run_generate:main", "--model DIR [options]", "answer prompts with a model"),
    "score": Task(
        "alignment.rm.run_score:main", "--model DIR --file FILE", "score your answers with a reward or cost model"
    ),
    "merge_lora": Task(
        "alignment.cli:merge_lora_main",
        "--lora_path DIR --output_path DIR",
        "merge a LoRA checkpoint into its base model",
    ),
    "export": Task(
        "alignment.export.run_export:main",
        "--checkpoint DIR --output DIR [options]",
        "write a model for paddlenlp or transformers",
    ),
    "plan": Task(
        "alignment.plan.run_plan:main",
        "FILE [options] [key=value ...]",
        "predict memory and time of a run on given cards",
    ),
}
#: The tasks that are methods and have runners of their own.
RUNNERS = ("sft", "rm", "cost", "ppo")
#: What starts every other method: ``main([NAME, ...])``.
METHODS = "alignment.methods.start:main"
#: Other names of tasks.
ALIASES = {"reward": "rm"}


def help_text() -> str:
    """Return the text of ``alignment --help``."""
    width = max(len(f"{name} {task.usage}") for name, task in TASKS.items())
    lines = [f"  {f'{name} {task.usage}':<{width}}  {task.summary}" for name, task in TASKS.items()]
    return "\n".join(
        [
            "usage: alignment TASK ...",
            "",
            "Language-model alignment on PaddlePaddle: SFT -> reward model -> PPO and its kin.",
            "",
            "tasks:",
            *lines,
            "",
            "FILE is JSON or YAML.",
            "`alignment TASK --help` explains one task; `alignment --version` prints the version.",
            "Several processes:",
            "  python -m paddle.distributed.launch --nproc_per_node 2 alignment/__main__.py TASK ...",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the task that ``argv`` (default: the command line) names, and return the exit status."""
    return run_main(_dispatch, argv)


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"alignment {__version__}")
        return 0
    if argv[0] == "run" and task_named(argv[1:2]) in RUNNERS:
        argv = argv[1:]
    name = task_named(argv[:1])
    if name in TASKS:
        return load_task(TASKS[name].target)(argv[1:]) or 0
    return load_task(METHODS)([name, *argv[1:]])


def task_named(words: Sequence[str]) -> str:
    """The task or method that the first of ``words`` names; empty without words."""
    name = words[0].replace("-", "_") if words else ""
    return ALIASES.get(name, name)


def load_task(target: str) -> Callable[[list[str]], int | None]:
    """Import ``"module:function"``.

    Raises:
        AlignmentError: PaddlePaddle or PaddleNLP is not installed.
    """
    module, _, function = target.partition(":")
    with _missing_paddle_named():
        return getattr(importlib.import_module(module), function)


class _missing_paddle_named:
    """Turns a missing Paddle, which is an extra and easily forgotten, into a message that says how to get it."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, trace) -> bool:
        if isinstance(error, ModuleNotFoundError) and error.name in ("paddle", "paddlenlp"):
            package = {"paddle": "PaddlePaddle", "paddlenlp": "PaddleNLP"}[error.name]
            raise AlignmentError(
                f"{package} is not installed in this environment ({sys.prefix}).\n"
                "For a CPU: pip install '.[cpu]' in the checkout. For a GPU: see the README."
            ) from error
        return False


def run_main(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Call ``main(argv)`` as the outermost frame of a program and return the exit status.

    An :class:`~alignment.errors.AlignmentError` is printed to standard error without a traceback (status 2), and so is
    a file that may not be read or written; Ctrl-C gives 130, and anything else is a bug and keeps its traceback (status
    1). A process of a multi-process run does not return: after flushing, it ends at once with the status, because the
    teardown of gloo's threads may abort a process that has done its work.

    Args:
        main: takes the arguments behind the program's name; ``None`` counts as 0.
        argv: those arguments; the command line's when ``None``.
    """
    try:
        with _missing_paddle_named():
            status = main(list(sys.argv[1:] if argv is None else argv)) or 0
        sys.stdout.flush()
    except AlignmentError as error:
        _print_error(f"error: {error}")
        status = EXIT_USER
    except PermissionError as error:
        if error.filename is None:
            raise
        _print_error(f"error: {error.filename}: permission denied; give this user the right, or choose another place")
        status = EXIT_USER
    except BrokenPipeError:
        if _several_processes():
            raise
        # Who read the output has had enough (`| head`); what is left in the buffer must not be tried again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_PIPE
    except KeyboardInterrupt:
        _print_error("interrupted")
        status = EXIT_INTERRUPTED
    except SystemExit as leaving:
        status = _exit_status(leaving.code)
    except BaseException:
        if not _several_processes():
            raise
        _print_error(traceback.format_exc().rstrip())
        status = EXIT_BUG
    if _several_processes():
        leave(status)
    return status


def leave(status: int) -> None:
    """End this process at once with ``status``, after flushing logs and standard streams; exit handlers do not run."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _exit_status(code: object) -> int:
    """What Python would make of ``sys.exit(code)``."""
    if code is None or isinstance(code, int):
        return int(code or 0)
    _print_error(str(code))
    return EXIT_BUG


def _several_processes() -> bool:
    return os.environ.get("PADDLE_TRAINERS_NUM", "1") not in ("", "0", "1")


def _print_error(text: str) -> None:
    rank = f"[rank {os.environ.get('PADDLE_TRAINER_ID', '0')}] " if _several_processes() else ""
    sys.stdout.flush()
    print(f"{rank}{text}", file=sys.stderr, flush=True)


class CommandParser(argparse.ArgumentParser):
    """The parser of every subcommand with options: reports wrong ones as every other error is reported."""

    def error(self, message: str) -> NoReturn:
        raise ArgumentsError(f"{message}\n{self.format_usage().strip()}")


def merge_lora_main(argv: list[str]) -> int:
    """``alignment merge_lora``: write the base model with a LoRA checkpoint's weights added to it."""
    parser = CommandParser(prog="alignment merge_lora", description=merge_lora_main.__doc__, allow_abbrev=False)
    parser.add_argument("--lora_path", required=True, metavar="DIR", help="folder of the LoRA checkpoint")
    parser.add_argument("--output_path", required=True, metavar="DIR", help="folder for the merged model")
    parser.add_argument(
        "--model_name_or_path", metavar="DIR", help="base model (default: the one the checkpoint names)"
    )
    args = parser.parse_args(argv)

    with runtime.quiet_import():
        from alignment.ppo.models import merge_lora

    merge_lora(args.lora_path, args.output_path, base=args.model_name_or_path)
    print(f"merged model: {args.output_path}")
    return 0
