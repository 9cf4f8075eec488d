"""``alignment plan FILE``: predict what a run takes, before it is started.

::

    alignment plan config/llama/ppo_argument.json --card a100-80g
    alignment plan FILE.json --cards 16 --card h100-80g tensor_parallel_degree=4 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: make the checkout importable
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from alignment import methods
from alignment.arguments import Arguments, PPOArguments
from alignment.arguments.checks import Problems, check_processes
from alignment.arguments.layout import topology_of
from alignment.arguments.parser import STAGES, build, find
from alignment.arguments.sources import COMMAND_LINE, Given, read_argv, read_file
from alignment.cli import CommandParser, run_main
from alignment.errors import ArgumentsError
from alignment.flow.method import Method
from alignment.parallel.topology import Topology
from alignment.plan import plan_report
from alignment.plan.advise import alternatives, predict
from alignment.plan.cards import CARDS, Card, card_named
from alignment.plan.setting import Setting, setting_of
from alignment.plan.shapes import ModelShape, find_shape

_CHANGES = ("memory", "tflops", "bandwidth", "link", "network", "host_link", "efficiency", "node")
# A plan needs no data, evaluates nothing and may be made beside a run's output.
_QUIET = {
    "dry_run": True,
    "do_eval": False,
    "evaluation_strategy": "no",
    "load_best_model_at_end": False,
    "resume_from_checkpoint": None,
}
_DATA_FOLDER = ("dataset_name_or_path", "dataset", "task_name_or_path")


@dataclass
class Request:
    """What is to be planned.

    Attributes:
        given: keys and values of the argument file and the command line.
        file: the argument file.
        stage: its arguments' class.
        method: whose roles and flow are planned; None: SFT or a reward model.
        options: the plan's own.
    """

    given: list[Given]
    file: str | None
    stage: type[Arguments]
    method: type[Method] | None
    options: argparse.Namespace


def main(argv: list[str]) -> int:
    """Print the plan of an argument file.

    Returns:
        0, whether or not the run fits.

    Raises:
        AlignmentError: the arguments are wrong, or a model's sizes are not known.
    """
    parser = _parser()
    if not argv or {"-h", "--help"}.intersection(argv):
        print(parser.format_help(), end="")
        return 0
    own, rest = parser.parse_known_args(argv)
    request = _request(own, rest)
    card = card_named(own.card, {name: getattr(own, name) for name in _CHANGES if getattr(own, name) is not None})
    setting, notes = build_setting(request, card)
    own.cards = setting.topology.processes  # the same for everything that is tried
    plan = predict(setting, card)
    others = alternatives(plan, lambda words: build_setting(request, card, words)[0], args_of(request))
    if own.json:
        print(json.dumps(plan_report.as_json(plan, others, notes), indent=2))
    else:
        print(plan_report.as_text(plan, others, notes))
    return 0


def args_of(request: Request, words: Sequence[str] = ()) -> Any:
    """The resolved arguments of a request with further ``key=value`` words.

    Raises:
        ArgumentsError: they are wrong.
    """
    extra = [Given(*word.split("=", 1), where=COMMAND_LINE, is_text=True) for word in words]
    quiet = [Given(key, value, "plan") for key, value in _QUIET.items() if find(request.stage, key) is not None]
    return build(request.stage, [*request.given, *extra, *quiet], request.file)


def build_setting(request: Request, card: Card, words: Sequence[str] = ()) -> tuple[Setting, list[str]]:
    """The setting of a request, with remarks.

    Args:
        request: what is to be planned.
        card: what it would run on.
        words: further ``key=value``; ``cards=N`` is the number of processes.

    Raises:
        AlignmentError: the layout cannot be, or a model's sizes are not known.
    """
    cards = [int(word.split("=")[1]) for word in words if word.startswith("cards=")]
    args = args_of(request, [word for word in words if not word.startswith("cards=")])
    options, notes = request.options, list[str]()
    processes = cards[-1] if cards else options.cards or _processes(args, notes)
    problems = Problems(Path(request.file).name if request.file else "")
    check_processes(args, problems, processes)
    problems.raise_all()
    topology = topology_of(args, processes)

    def shape(path: str, key: str) -> ModelShape:
        scores = not key.startswith(("actor", "model")) and options.reward_model_config
        config = options.reward_model_config if scores else options.model_config
        found = find_shape(path, key, config)
        _check_divisible(found, topology, f"{key}={path}")
        return found

    if args.bf16 and card.is_cpu:
        notes.append(f"{card.name} computes in float32; bf16 only rounds there")
    setting = setting_of(
        args,
        topology,
        shape,
        half=not card.is_cpu,
        kernels=card.is_cpu,
        cache_bytes=card.cache_bytes,
        mean_prompt=options.prompt_tokens,
        mean_response=options.response_tokens,
        method=request.method and request.method(args),
    )
    if topology.tensor > card.node:
        notes.append(f"tensor parallelism over {topology.tensor} cards leaves a node of {card.node}")
    return setting, notes


def _processes(args: Any, notes: list[str]) -> int:
    """As many as the degrees of the file make."""
    degrees = [args.tensor_parallel_degree, args.pipeline_parallel_degree]
    product = max(1, degrees[0]) * max(1, degrees[1])
    if args.sharding and args.sharding_parallel_degree < 1:
        count = max(8, product)
        notes.append(f"sharding without sharding_parallel_degree: planned for {count} cards; --cards says otherwise")
        return count
    return product * (max(1, args.sharding_parallel_degree) if args.sharding else 1)


def _check_divisible(shape: ModelShape, topology: Topology, where: str) -> None:
    from alignment.ppo.models.divisible import check_layout

    config = {
        "model_type": shape.model_type,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
    }
    check_layout(config, topology, where)


def _request(own: argparse.Namespace, rest: list[str]) -> Request:
    kinds = {}
    for stage in _known():
        kinds.update({key: spec.kind for key, spec in stage.specs().items()})
    file, overrides = read_argv(rest, lambda key: kinds.get(key))
    if file is None:
        raise ArgumentsError(
            "alignment plan needs an argument file: alignment plan FILE.json [options] [key=value ...]"
        )
    given = [*read_file(file), *overrides]
    if own.method:
        stage, method = _named(own.method)
    else:
        stage = stage_of([item.key for item in given], file)
        method = _known()[stage]
    if own.method and methods.with_preset(own.method):
        given.append(Given("preset", own.method, COMMAND_LINE, is_text=True))
    given = [replace(item, value="planned") if item.key in _DATA_FOLDER else item for item in given]
    return Request(given, file, stage, method, own)


def _known() -> dict[type[Arguments], type[Method] | None]:
    """The arguments of every stage and method, and the method."""
    known: dict[type[Arguments], Any] = dict.fromkeys(STAGES)
    for method in methods.known_methods().values():
        stage = methods.arguments_of(method)
        if stage in known or stage.STAGE not in {other.STAGE for other in known}:  # a cost model is a reward model here
            known[stage] = method
    return known


def _named(name: str) -> tuple[type[Arguments], type[Method] | None]:
    """The arguments and the method of a name, a preset or ``file.py:Class``."""
    for stage, method in _known().items():
        if methods.ALIASES.get(name, name) == stage.STAGE:
            return stage, method
    found = methods.with_preset(name) or methods.find_method(name)
    return methods.arguments_of(found), found


def stage_of(keys: Sequence[str], file: str) -> type[Arguments]:
    """Which stage or method an argument file is for: the runners are different commands, so its keys must tell. What
    could be PPO's is.

    Raises:
        ArgumentsError: they do not.
    """
    names = set(keys)
    possible = []
    for stage in _known():
        required = [key for key, spec in stage.specs().items() if spec.required and key != "output_dir"]
        unknown = [key for key in names if find(stage, key) is None]
        if names.intersection(required):
            possible.append((len(unknown), stage))
    possible.sort(key=lambda item: item[0])
    if not possible:
        raise ArgumentsError(
            f"{file} names no model (actor_model_name_or_path or model_name_or_path), so it is no argument file of "
            "SFT, reward model or PPO"
        )
    best = [stage for unknown, stage in possible if unknown == possible[0][0]]
    if len(best) > 1 and PPOArguments not in best:
        names = " or ".join(stage.STAGE for stage in best)
        raise ArgumentsError(f"{file} could be for {' or '.join(stage.TITLE for stage in best)}: say --method {names}")
    return PPOArguments if PPOArguments in best else best[0]


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="alignment plan",
        usage="alignment plan FILE.json [options] [key=value ...]",
        description="Predict memory and time of a run, phase by phase, from its argument file.",
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add("--cards", type=_positive, help="processes of the run (default: the product of the file's degrees)")
    add("--card", default="a100-80g", help=f"one of {', '.join(CARDS)} (default a100-80g)")
    add("--memory", type=float, metavar="GIB", help="memory of a card")
    add("--tflops", type=float, help="its peak in matrix products, 10^12 FLOPs per second")
    add("--bandwidth", type=float, metavar="GB/s", help="of its memory")
    add("--link", type=float, metavar="GB/s", help="to cards of the same node, one direction")
    add("--network", type=float, metavar="GB/s", help="to cards of other nodes, per card")
    add("--host_link", "--host-link", type=float, metavar="GB/s", help="to the host's memory")
    add("--efficiency", type=float, help="share of the peak that whole passes reach")
    add("--node", type=_positive, metavar="N", help="cards of a node")
    add("--model_config", "--model-config", metavar="FILE|NAME", help="config.json or well-known name of the models")
    add("--reward_model_config", "--reward-model-config", metavar="FILE|NAME", help="of models that score, and critics")
    add("--prompt_tokens", "--prompt-tokens", type=float, help="average prompt, for the times (default: the limit)")
    add("--response_tokens", "--response-tokens", type=float, help="average answer, for the times")
    add("--method", "--stage", metavar="NAME", help="what FILE is for, where its keys do not tell: sft, rm, ppo, ...")
    add("--json", action="store_true", help="print JSON")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(run_main(main))
