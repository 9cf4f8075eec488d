"""From a command line to resolved arguments, or to one error that names every mistake."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignment.arguments import checks, effects, foreign, resolve
from alignment.arguments.ppo_arguments import PPOArguments
from alignment.arguments.reward_arguments import CostArguments, RewardArguments
from alignment.arguments.sft_arguments import SFTArguments
from alignment.arguments.sources import Given, read_argv, read_file
from alignment.arguments.spec import Spec, read_value
from alignment.arguments.stage_arguments import Arguments, help_text
from alignment.errors import nearest

STAGES: tuple[type[Arguments], ...] = (SFTArguments, RewardArguments, PPOArguments)
_FOREIGN = {"sft": foreign.SFT, "reward": foreign.REWARD, "ppo": foreign.PPO}
_NO_LORA = "LoRA is trained in SFT and reward models only; merge the adapters first (`alignment merge_lora`)"

A = TypeVar("A", bound=Arguments)


def parse_sft(argv: Sequence[str]) -> SFTArguments:
    """Parse the arguments of SFT; see :func:`parse`."""
    return parse(SFTArguments, argv)


def parse_reward(argv: Sequence[str]) -> RewardArguments:
    """Parse the arguments of reward-model training; see :func:`parse`."""
    return parse(RewardArguments, argv)


def parse_cost(argv: Sequence[str]) -> CostArguments:
    """Parse the arguments of cost-model training; see :func:`parse`."""
    return parse(CostArguments, argv)


def parse_ppo(argv: Sequence[str]) -> PPOArguments:
    """Parse the arguments of PPO; see :func:`parse`."""
    return parse(PPOArguments, argv)


def parse(cls: type[A], argv: Sequence[str]) -> A:
    """Read ``[FILE.json] [key=value | --key value | --key=value | --flag]...``; the command line wins over the file.

    Args:
        cls: the stage's class.
        argv: the words after the program's name.

    Raises:
        ArgumentsError: anything wrong with the file, a key, a value or a combination; all mistakes at once.
        SystemExit: with status 0, after ``--help`` or ``-h`` has been answered.
    """
    if {"-h", "--help"}.intersection(argv):
        print(help_text(cls))
        raise SystemExit(0)
    file, overrides = read_argv(argv, lambda key: _kind(cls, key))
    return build(cls, [*(read_file(file) if file else []), *overrides], file)


def from_dict(cls: type[A], values: Mapping[str, Any], where: str = "the given arguments") -> A:
    """Build arguments from a dict of keys and JSON values, with the same checks as :func:`parse`."""
    return build(cls, [Given(key, value, where) for key, value in values.items()], None)


def build(cls: type[A], given: Sequence[Given], file: str | None) -> A:
    """Turn what was given, in order of rising precedence, into checked and resolved arguments."""
    problems = checks.Problems(Path(file).name if file else "")
    values: dict[str, Any] = {}
    origin: dict[str, Given] = {}
    foreign_values: dict[str, Any] = {}
    for item in given:
        spec = find(cls, item.key)
        if spec is None:
            problems.add(f"{item.where}: {item.key}: {_unknown(cls, item.key)}", item.key)
            continue
        try:
            value = read_value(spec, item.value, is_text=item.is_text)
        except ValueError as error:
            problems.add(f"{item.where}: {item.key}: {error}", spec.name)
            continue
        if spec.unavailable and not spec.is_neutral(value):
            problems.add(f"{item.where}: {item.key}: {item.value!r} cannot be used: {spec.unavailable}", spec.name)
            continue
        earlier = origin.get(spec.name)
        if earlier and earlier.key != item.key and earlier.is_text == item.is_text and earlier.value != item.value:
            problems.add(
                f"{item.where}: {item.key} and {earlier.key} are two names of one argument, but differ: "
                f"{item.value!r} and {earlier.value!r}",
                spec.name,
            )
        origin[spec.name] = item
        (values if spec.name in cls.specs() else foreign_values)[spec.name] = value
    args = _construct(cls, values)
    args.raw = {item.key: item.value for item in given}
    args.given = frozenset(key for key, value in {**values, **foreign_values}.items() if value is not None)
    args.passthrough = {key: value for key, value in foreign_values.items() if value is not None}
    args.file = file
    resolve.resolve(args)
    checks.check(args, problems)
    problems.raise_all()
    args.unused = effects.unused(args)
    return args


def _construct(cls: type[A], values: Mapping[str, Any]) -> A:
    return cls(**{key: value for key, value in values.items() if value is not None})


def find(cls: type[Arguments], key: str) -> Spec | None:
    """Return the description of a key or alias of a stage; of a foreign key too; None if it is unknown."""
    own = cls.specs()
    if key in own:
        return own[key]
    for spec in own.values():
        if key in spec.aliases:
            return spec
    return _FOREIGN[cls.STAGE].get(key) or foreign.COMMON.get(key) or foreign.paddlenlp_keys().get(key)


def known_keys(cls: type[Arguments]) -> list[str]:
    """Return every key and alias that a stage accepts."""
    own = cls.specs()
    names = [*own, *(alias for spec in own.values() for alias in spec.aliases)]
    tables = (_FOREIGN[cls.STAGE], foreign.COMMON, foreign.paddlenlp_keys())
    return list(dict.fromkeys([*names, *(key for table in tables for key in table)]))


def foreign_specs(cls: type[Arguments]) -> dict[str, Spec]:
    """Return the accepted keys of a stage that have no attribute."""
    own = cls.specs()
    merged = {**foreign.paddlenlp_keys(), **foreign.COMMON, **_FOREIGN[cls.STAGE]}
    aliases = {alias for spec in own.values() for alias in spec.aliases}
    return {key: spec for key, spec in merged.items() if key not in own and key not in aliases}


def _kind(cls: type[Arguments], key: str) -> str | None:
    spec = find(cls, key)
    return None if spec is None else spec.kind


def _unknown(cls: type[Arguments], key: str) -> str:
    if key.startswith("lora") and cls.STAGE == "ppo":
        return f"unknown argument: {_NO_LORA}"
    others = [
        other.TITLE for other in STAGES if other is not cls and (key in other.specs() or key in _FOREIGN[other.STAGE])
    ]
    if others:
        return f"is an argument of {' and '.join(others)}, not of {cls.TITLE}{nearest(key, known_keys(cls))}"
    here = [known for known in foreign.named_elsewhere(key) if known in cls.specs()]
    if here:
        return f"unknown argument; here that is {' or '.join(map(repr, here))}"
    missing = (
        "" if foreign.paddlenlp_keys() else " (paddlenlp is not installed here, so its TrainingArguments are not known)"
    )
    return f"unknown argument{nearest(key, known_keys(cls))}{missing}"
