"""From a command line to resolved arguments, or to one error that names every mistake."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignment.arguments import checks, effects, foreign, presets, resolve
from alignment.arguments.critic_keys import CriticKeys
from alignment.arguments.online_arguments import OnlineArguments
from alignment.arguments.ppo_arguments import PPOArguments
from alignment.arguments.reward_arguments import CostArguments, RewardArguments
from alignment.arguments.row_arguments import RowArguments
from alignment.arguments.sft_arguments import LoRAFields, SFTArguments
from alignment.arguments.sources import Given, read_argv, read_file
from alignment.arguments.spec import Spec, read_value, specs
from alignment.arguments.stage_arguments import Arguments, help_text
from alignment.errors import nearest

#: The classes that this room makes itself; :func:`all_stages` has the others.
STAGES: tuple[type[Arguments], ...] = (SFTArguments, RewardArguments, PPOArguments)
#: The registry of methods: by its name, since it is the room above.
METHODS = "alignment.methods"
#: Whose the keys are that many methods share.
_SHARED = {
    "methods that generate": OnlineArguments,
    "methods with a critic": CriticKeys,
    "methods on given rows": RowArguments,
}
_NO_LORA = (
    "LoRA is trained in SFT, reward models and other methods on given rows only; merge the adapters first "
    "(`alignment merge_lora`)"
)

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
    """Read ``[FILE] [key=value | --key value | --key=value | --flag]...``; the command line wins over the file.

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
    given_values = {key: value for key, value in {**values, **foreign_values}.items() if value is not None}
    settings = presets.settings_for(cls, {**foreign_specs(cls), **cls.specs()}, given_values)
    args = cls(**settings.values, **{key: value for key, value in given_values.items() if key in values})
    args.set_by, args.remarks = settings.set_by, settings.remarks
    args.raw = {item.key: item.value for item in given}
    args.given = frozenset(given_values)
    args.passthrough = {key: value for key, value in given_values.items() if key in foreign_values}
    args.file = file
    resolve.resolve(args)
    checks.check(args, problems)
    problems.raise_all()
    args.unused = effects.unused(args)
    return args


def find(cls: type[Arguments], key: str) -> Spec | None:
    """Return the description of a key or alias of a stage; of a foreign key too; None if it is unknown."""
    own = cls.specs()
    if key in own:
        return own[key]
    for spec in own.values():
        if key in spec.aliases:
            return spec
    return cls.FOREIGN.get(key) or foreign.COMMON.get(key) or foreign.paddlenlp_keys().get(key)


def known_keys(cls: type[Arguments]) -> list[str]:
    """Return every key and alias that a stage accepts."""
    own = cls.specs()
    names = [*own, *(alias for spec in own.values() for alias in spec.aliases)]
    tables = (cls.FOREIGN, foreign.COMMON, foreign.paddlenlp_keys())
    return list(dict.fromkeys([*names, *(key for table in tables for key in table)]))


def foreign_specs(cls: type[Arguments]) -> dict[str, Spec]:
    """Return the accepted keys of a stage that have no attribute."""
    own = cls.specs()
    merged = {**foreign.paddlenlp_keys(), **foreign.COMMON, **cls.FOREIGN}
    aliases = {alias for spec in own.values() for alias in spec.aliases}
    return {key: spec for key, spec in merged.items() if key not in own and key not in aliases}


def all_stages() -> list[type[Arguments]]:
    """The classes of all methods, registered ones too. Their modules are imported for it, so it is asked only where
    something is to be said of them all: in an error, in the documentation.
    """
    registry = importlib.import_module(METHODS)
    return list({**{cls.STAGE: cls for cls in STAGES}, **registry.all_arguments()}.values())


def _and(names: list[str]) -> str:
    """``"PPO, GRPO and RLOO"``."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _kind(cls: type[Arguments], key: str) -> str | None:
    spec = find(cls, key)
    return None if spec is None else spec.kind


def _unknown(cls: type[Arguments], key: str) -> str:
    if key.startswith("lora") and not issubclass(cls, LoRAFields):
        return f"unknown argument: {_NO_LORA}"
    owner = next((words for words, shared in _SHARED.items() if key in specs(shared)), None)
    others = [other.TITLE for other in all_stages() if key in other.specs() or key in other.FOREIGN]
    if owner or others:
        return f"is an argument of {owner or _and(others)}, not of {cls.TITLE}{nearest(key, known_keys(cls))}"
    here = [known for known in foreign.named_elsewhere(key) if known in cls.specs()]
    if here:
        return f"unknown argument; here that is {' or '.join(map(repr, here))}"
    missing = (
        "" if foreign.paddlenlp_keys() else " (paddlenlp is not installed here, so its TrainingArguments are not known)"
    )
    return f"unknown argument{nearest(key, known_keys(cls))}{missing}"
