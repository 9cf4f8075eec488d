"""A plan as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from alignment.plan.activations import FLOAT
from alignment.plan.advise import Alternative, Alternatives, Plan
from alignment.plan.cards import GIB
from alignment.plan.memory import KINDS, optimizer_bytes, parameter_bytes, part_of

_HEADINGS = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "gradients": "gradients",
    "activations": "activations",
    "kv_cache": "KV cache",
    "workspace": "workspace",
    "buffers": "kernels",
    "other": "other",
}
#: Alternatives of the same kind that the text shows; JSON has all.
_SHOWN = 12


def as_text(plan: Plan, alternatives: Alternatives, notes: Sequence[str] = ()) -> str:
    """The plan for people."""
    parts = [
        _headline(plan, notes),
        _table("What one process holds, GiB (tensor rank 0 of each pipeline stage, sharding rank 0)", *_holdings(plan)),
        _table("Memory at the peak of each phase, GiB, on the process that holds most", *_memory(plan)),
        _verdict(plan, alternatives),
        _table(_time_title(plan), *_times(plan)),
        _table("What would change (one change at a time)", *_changes(plan, alternatives)),
        "GiB are 2^30 bytes. Estimates: docs/plan.md says how they are made and how far they were from measurements.",
    ]
    return "\n\n".join(part for part in parts if part)


def _headline(plan: Plan, notes: Sequence[str]) -> str:
    setting, card = plan.setting, plan.card
    lines = [f"{setting.title}: {setting.topology.describe()}"]
    for role in setting.roles:
        words = ["trained" if role.trained else "frozen"]
        words += ["recompute"] * role.recompute + [f"LoRA of rank {role.lora_rank}"] * bool(role.lora_rank)
        size = role.shape.parameters / 1e9
        lines.append(f"  {role.name:<10} {role.shape.model_type} of {size:.2f} billion parameters, {', '.join(words)}")
    precision = "half precision" if setting.item == 2 else "float32"
    rows, width = setting.micro_batch_at(setting.mean_width), setting.mean_width
    batch = f"micro batches of {rows} rows x {setting.micro_batches_at(width)} a step"
    if setting.online:
        batch += (
            f", prompts up to {setting.prompt_tokens} and answers up to {setting.response_tokens} tokens, "
            f"{setting.samples} answers per rollout and data rank"
        )
        lines.append(
            f"  offload_level: {setting.offload_level or '(none)'}; eval_mode: {setting.eval_mode or '(none)'}"
        )
    else:
        batch += f", rows up to {setting.row_tokens} tokens"
    lines.append(f"  {precision}; {batch}")
    lines.append(f"Card: {card.name}, {card.memory:g} GiB, of which {card.reserved:g} are taken before any tensor is")
    lines += [f"Note: {note}" for note in notes]
    return "\n".join(lines)


def _holdings(plan: Plan) -> tuple[list[str], list[list[str]]]:
    setting = plan.setting
    rows, step = [], setting.topology.tensor * setting.topology.sharding
    for stage in range(setting.topology.pipeline):
        topology = replace(setting.topology, process=stage * step)
        for role in setting.roles:
            part = part_of(role, topology)
            gradients = FLOAT * part.trained_elements
            rows.append(
                [
                    role.name,
                    str(topology.process),
                    f"{part.elements / 1e6:,.1f}",
                    _gib(parameter_bytes(part, topology, setting.item)),
                    _gib(gradients) if role.trained else "-",
                    _gib(optimizer_bytes(part, setting.item)) if role.trained else "-",
                ]
            )
    return ["model", "process", "million", "parameters", "gradients", "optimizer"], rows


def _memory(plan: Plan) -> tuple[list[str], list[list[str]]]:
    rows = []
    for process, phase in plan.worst_of_phases():
        cells = [_gib(phase.kinds[kind]) if phase.kinds[kind] else "-" for kind in KINDS]
        total = _gib(phase.total + plan.reserved)
        rows.append([phase.phase, str(process), *cells, total, " ".join(phase.away) or "-"])
    return ["phase", "process", *(_HEADINGS[kind] for kind in KINDS), "in all", "moved out"], rows


def _verdict(plan: Plan, alternatives: Alternatives) -> str:
    process, phase = plan.worst
    room = plan.card.memory * GIB - plan.peak
    where = f"{_gib(plan.peak)} of {plan.card.memory:g} GiB at the peak ({phase.phase}, process {process})"
    if plan.fits:
        return f"It fits: {where}, {_gib(room)} GiB are free."
    lines = [f"It does not fit: {where}, {_gib(-room)} GiB too much."]
    advice = alternatives.advice
    if advice is None:
        lines.append("No change that was tried makes it fit: take larger cards or a smaller model.")
    else:
        factor = advice.plan.seconds_per_row() / plan.seconds_per_row()
        lines.append(f"A change that makes it fit: {' '.join(_quoted(word) for word in advice.words)}")
        lines.append(
            f"  {_gib(advice.plan.peak)} GiB at the peak ({advice.plan.worst[1].phase}), "
            f"{factor:.2f} times the time per row, on {advice.plan.setting.topology.describe()}"
        )
    return "\n".join(lines)


def _quoted(word: str) -> str:
    """A word as it is typed: ``cards=N`` is the option, what has blanks is quoted."""
    if word.startswith("cards="):
        return f"--cards {word.removeprefix('cards=')}"
    return f'"{word}"' if " " in word else word


def _typed(word: str) -> list[str]:
    """A word as the command line takes it."""
    return ["--cards", word.removeprefix("cards=")] if word.startswith("cards=") else [word]


def _time_title(plan: Plan) -> str:
    setting = plan.setting
    if setting.online:
        what = f"One iteration: {plan.rows} answers of {setting.mean_response:g} tokens to prompts of "
        steps = sum(setting.of_call(call).steps for call in setting.flow.calls if call.kind == "train")
        what += f"{setting.mean_prompt:g}, {steps} optimizer steps"
    else:
        what = f"One optimizer step: {plan.rows} {'pairs' if setting.stage == 'reward' else 'rows'} of "
        what += f"{setting.row_tokens} tokens"
    return f"{what}: {plan.seconds:.3g} s, {plan.tokens_per_second:,.0f} tokens/s"


def _times(plan: Plan) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            time.phase,
            _seconds(time.seconds),
            _seconds(time.compute),
            _seconds(time.messages),
            _seconds(time.waiting),
            _seconds(time.offload),
            f"{time.flops / 1e12:,.3g}",
            f"{time.sent / 1e9:,.3g}",
        ]
        for time in plan.times
    ]
    return ["phase", "seconds", "compute", "messages", "waiting", "offload", "TFLOP", "GB sent"], rows


def _changes(plan: Plan, alternatives: Alternatives) -> tuple[list[str], list[list[str]]]:
    rows = [["(as it is)", *_figures(plan, plan)]]
    layouts = [a for a in alternatives.single if a.words[0].startswith("tensor_parallel")]
    others = [a for a in alternatives.single if a not in layouts]
    layouts = sorted(layouts, key=lambda a: (not a.plan.fits, a.plan.seconds_per_row()))[:_SHOWN]
    for found in others + layouts:
        words = " ".join(filter(None, map(_short, found.words)))
        rows.append([words, *_figures(found.plan, plan)])
    return ["change", "peak GiB", "at", "fits", "time per row"], rows


def _short(word: str) -> str:
    if word.startswith("sharding_parallel_degree="):
        return ""
    return "no sharding" if word == "sharding=" else word


def _figures(plan: Plan, base: Plan) -> list[str]:
    factor = plan.seconds_per_row() / base.seconds_per_row()
    return [_gib(plan.peak), plan.worst[1].phase, "yes" if plan.fits else "no", f"{factor:.2f}x"]


def _gib(size: float) -> str:
    gib = size / GIB
    return f"{gib:.1f}" if gib >= 10 else f"{gib:.2f}" if gib >= 0.01 else f"{gib:.1g}"


def _seconds(value: float) -> str:
    return "-" if not value else f"{value:.3g}"


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
    left = {i for i in range(len(head)) if head[i] in ("phase", "model", "what", "how", "change", "moved out", "at")}
    lines = [title]
    for line in [head, *rows]:
        cells = [
            f"{cell:<{w}}" if i in left else f"{cell:>{w}}"
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def as_json(plan: Plan, alternatives: Alternatives, notes: Sequence[str] = ()) -> dict[str, Any]:
    """The plan for programs; bytes and seconds."""
    return {
        "stage": plan.setting.stage,
        "card": asdict(plan.card),
        "layout": asdict(plan.setting.topology),
        "setting": _setting_json(plan),
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "reserved_bytes": plan.reserved,
        "peak_phase": plan.worst[1].phase,
        "peak_process": plan.worst[0],
        "seconds": plan.seconds,
        "rows": plan.rows,
        "tokens_per_second": plan.tokens_per_second,
        "memory": [
            {
                "process": process,
                "phases": [
                    {"phase": p.phase, "bytes": dict(p.kinds), "total": p.total, "moved_out": list(p.away)}
                    for p in phases
                ],
            }
            for process, phases in plan.memory
        ],
        "time": [{**asdict(time), "seconds": time.seconds} for time in plan.times],
        "alternatives": [_alternative(found) for found in alternatives.single],
        "advice": None if alternatives.advice is None else _alternative(alternatives.advice),
        "notes": list(notes),
    }


def _setting_json(plan: Plan) -> dict[str, Any]:
    values = {field.name: getattr(plan.setting, field.name) for field in fields(plan.setting)}
    del values["topology"], values["calls"]
    roles = [{**asdict(role), "parameters": role.shape.parameters} for role in plan.setting.roles]
    return {**values, "roles": roles}


def _alternative(found: Alternative) -> dict[str, Any]:
    return {
        "arguments": [word for given in found.words for word in _typed(given)],
        "fits": found.plan.fits,
        "peak_bytes": found.plan.peak,
        "peak_phase": found.plan.worst[1].phase,
        "seconds": found.plan.seconds,
        "seconds_per_row": found.plan.seconds_per_row(),
    }
