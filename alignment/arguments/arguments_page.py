"""``docs/arguments.md`` from the declarations."""

from __future__ import annotations

import json

from alignment.arguments import foreign
from alignment.arguments.parser import STAGES, foreign_specs
from alignment.arguments.spec import Spec
from alignment.arguments.stage_arguments import Arguments

_STAGE_WORDS = {"sft": "SFT", "reward": "RM", "ppo": "PPO"}
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

Each stage takes a JSON file, then overrides, which win: `key=value`, `--key value`, `--key=value`, or `--flag`.
Truth values may be written true/false, yes/no, y/n, t/f or 1/0; `null` means "as if it were not given".
An unknown key, a wrong type, a value out of range and a contradiction are errors; all are told at once, before any
model is loaded. `--dry_run` prints the resolved arguments and the derived sizes.

The column *stages* says which stages take the key: SFT, RM (reward model), PPO. The column *effect here* says where a
key changes nothing.
"""


def markdown() -> str:
    """Return the whole page."""
    parts = [_HEAD]
    for group, rows in _groups().items():
        parts += [f"## {group}\n", _table(rows)]
    parts.append(_foreign_page())
    return "\n".join(parts).rstrip() + "\n"


def _groups() -> dict[str, list[tuple[Spec, list[type[Arguments]]]]]:
    """Return group -> [(argument, stages)]; an argument that differs between stages appears once for each form."""
    found: dict[str, list[tuple[Spec, list[type[Arguments]]]]] = {}
    for stage in STAGES:
        for spec in stage.specs().values():
            rows = found.setdefault(spec.group, [])
            same = next((stages for other, stages in rows if other == spec), None)
            if same is None:
                rows.append((spec, [stage]))
            else:
                same.append(stage)
    return found


def _table(rows: list[tuple[Spec, list[type[Arguments]]]]) -> str:
    lines = ["| key | stages | type | default | range | meaning | effect here |", "|---|---|---|---|---|---|---|"]
    for spec, stages in rows:
        key = f"`{spec.name}`" + "".join(f"<br>also `{alias}`" for alias in spec.aliases)
        cells = [key, _stages(stages), _type(spec), _default(spec), _range(spec), spec.help, _effect(spec)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _stages(stages: list[type[Arguments]]) -> str:
    return "all" if len(stages) == len(STAGES) else ", ".join(_STAGE_WORDS[stage.STAGE] for stage in stages)


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


def _foreign_page() -> str:
    lines = [
        "## Accepted from the reference's files\n",
        "These keys are read and checked for their type; a run says once which of them it does not use.\n",
    ]
    seen: dict[Spec, list[type[Arguments]]] = {}
    for stage in STAGES:
        for spec in foreign_specs(stage).values():
            if spec.name not in foreign.paddlenlp_keys() or spec.group == "Reference":
                seen.setdefault(spec, []).append(stage)
    lines.append(_table(list(seen.items())))
    lines += [
        "## Other keys of paddlenlp's `TrainingArguments`\n",
        "Accepted in all stages, checked for their type, without effect:\n",
        ", ".join(f"`{key}`" for key in sorted(_common_foreign())) + ".",
    ]
    return "\n".join(lines)


def _common_foreign() -> set[str]:
    keys = [{key for key, spec in foreign_specs(stage).items() if spec.group == "paddlenlp"} for stage in STAGES]
    return set.intersection(*keys)
