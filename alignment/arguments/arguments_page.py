"""``docs/arguments.md`` from the declarations."""

from __future__ import annotations

import json

from alignment.arguments import foreign, presets
from alignment.arguments.online_arguments import OnlineArguments
from alignment.arguments.parser import all_stages, foreign_specs
from alignment.arguments.spec import Spec
from alignment.arguments.stage_arguments import Arguments

_TYPES = {
    "bool": "true/false",
    "int": "integer",
    "float": "number",
    "str": "string",
    "list": "list",
    "json": "string, list or object",
}

_HEAD = """# Arguments

Made from the declarations by `python -m alignment.arguments`; do not edit it by hand.

Each method takes a JSON or YAML file, then overrides, which win: `key=value`, `--key value`, `--key=value`, or
`--flag`. Truth values may be written true/false, yes/no, on/off, y/n, t/f or 1/0; `null` means "as if it were not
given". An unknown key, a wrong type, a value out of range and a contradiction are errors; all are told at once, before
any model is loaded. `--dry_run` prints the resolved arguments and the derived sizes.

The column *methods* says which methods take the key; *online* are all those that generate: {online}. The column
*effect here* says where a key changes nothing. A method's own keys stand under its name.
"""


def markdown() -> str:
    """Return the whole page."""
    stages = all_stages()
    parts = [_HEAD.replace("{online}", ", ".join(_words(stage) for stage in _online(stages)))]
    for group, rows in _groups(stages).items():
        parts += [f"## {group}\n", _table(rows, stages), *_settings(rows)]
    parts.append(_foreign_page(stages))
    return "\n".join(parts).rstrip() + "\n"


def _online(stages: list[type[Arguments]]) -> list[type[Arguments]]:
    return [stage for stage in stages if issubclass(stage, OnlineArguments)]


def _words(stage: type[Arguments]) -> str:
    return "RM" if stage.STAGE == "reward" else stage.TITLE


def _groups(stages: list[type[Arguments]]) -> dict[str, list[tuple[Spec, list[type[Arguments]]]]]:
    """Return group -> [(argument, stages)]; an argument that differs between stages appears once for each form."""
    found: dict[str, list[tuple[Spec, list[type[Arguments]]]]] = {}
    for stage in stages:
        for spec in stage.specs().values():
            rows = found.setdefault(spec.group, [])
            same = next((having for other, having in rows if other == spec), None)
            if same is None:
                rows.append((spec, [stage]))
            else:
                same.append(stage)
    return found


def _table(rows: list[tuple[Spec, list[type[Arguments]]]], every: list[type[Arguments]]) -> str:
    lines = ["| key | methods | type | default | range | meaning | effect here |", "|---|---|---|---|---|---|---|"]
    for spec, stages in rows:
        key = f"`{spec.name}`" + "".join(f"<br>also `{alias}`" for alias in spec.aliases)
        cells = [key, _stages(stages, every), _type(spec), _default(spec), _range(spec), spec.help, _effect(spec)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _stages(having: list[type[Arguments]], every: list[type[Arguments]]) -> str:
    if having == every:
        return "all"
    if having == _online(every):
        return "online"
    return ", ".join(_words(stage) for stage in having)


def _settings(rows: list[tuple[Spec, list[type[Arguments]]]]) -> list[str]:
    """What the values of keys such as ``preset`` set, a list under the group's table."""
    lines = []
    for spec, stages in rows:
        for stage in stages:
            for value, settings in presets.settings_of(stage, spec).items():
                if settings:
                    lines.append(f"- `{spec.name}={value}` ({_words(stage)}): {presets.in_words(settings)}")
    return ["\n".join(lines) + "\n"] if lines else []


def _type(spec: Spec) -> str:
    return _TYPES[spec.kind] + (f", {spec.unit}" if spec.unit else "")


def _default(spec: Spec) -> str:
    if spec.required:
        return "must be given"
    return spec.derived if spec.derived else "none" if spec.default is None else f"`{json.dumps(spec.default)}`"


def _range(spec: Spec) -> str:
    return "" if spec.kind == "bool" else spec.range_text()


def _effect(spec: Spec) -> str:
    texts = []
    if spec.unavailable:
        texts.append(f"Refused unless it is the default: {spec.unavailable}.")
    if spec.no_effect:
        texts.append(f"None: {spec.no_effect}.")
    if spec.on_cpu:
        texts.append(f"On a CPU none: {spec.on_cpu}.")
    if spec.alone:
        texts.append("With one process none.")
    if spec.together:
        texts.append(f"With several: {spec.together}.")
    return " ".join(texts)


def _foreign_page(stages: list[type[Arguments]]) -> str:
    lines = [
        "## Accepted from the reference's files\n",
        "These keys are read and checked for their type; a run says once which of them it does not use.\n",
    ]
    seen: dict[Spec, list[type[Arguments]]] = {}
    for stage in stages:
        for spec in foreign_specs(stage).values():
            if spec.name not in foreign.paddlenlp_keys() or spec.group == "Reference":
                seen.setdefault(spec, []).append(stage)
    lines.append(_table(list(seen.items()), stages))
    lines += [
        "## Other keys of paddlenlp's `TrainingArguments`\n",
        "Accepted by all methods, checked for their type, without effect:\n",
        ", ".join(f"`{key}`" for key in sorted(_common_foreign(stages))) + ".",
    ]
    return "\n".join(lines)


def _common_foreign(stages: list[type[Arguments]]) -> set[str]:
    keys = [{key for key, spec in foreign_specs(stage).items() if spec.group == "paddlenlp"} for stage in stages]
    return set.intersection(*keys)
