"""Readers for the values that have more than one form."""

from __future__ import annotations

import math
from typing import Any

from alignment.arguments.spec import FALSE_WORDS, TRUE_WORDS, read_json, read_list

REPORT_TARGETS = ("visualdl", "tensorboard", "wandb")
OFFLOAD_PARTS = ("freeze_model", "optimizer", "train_model")
LATEST = "latest"


def read_datasets(value: Any, is_text: bool) -> str | dict[str, Any]:
    """Read a mixture of data sets.

    It is a string ``"a:0.5,b"``, a list of such strings (joined), or an object
    ``{"a": 0.5, "b": {"proportion": 1, "path": ...}}``.
    """
    if is_text and str(value).lstrip().startswith(("{", "[")):
        value = read_json(value, True)
    if isinstance(value, list) and value and all(isinstance(item, str) and item.strip() for item in value):
        return ",".join(item.strip() for item in value)
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, dict) and value:
        for name, share in value.items():
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not name.strip() or not (number or isinstance(share, (str, dict))):
                raise ValueError(f"{name!r}: a mixture maps NAME to its proportion or to an object, not to {share!r}")
        return value
    raise ValueError(
        f'must be a string such as "alpaca:0.5,PKU-SafeRLHF/train" or an object NAME -> proportion, not {value!r}'
    )


def read_reward(value: Any, is_text: bool) -> str | dict[str, float]:
    """Read reward sources: one name, a list of names (weight 1 each), or an object NAME -> weight.

    ``file.py:function`` is a name.
    """
    if is_text:
        text = str(value)
        value = read_json(text, True) if text.lstrip().startswith(("{", "[")) else text
        if isinstance(value, str) and "," in value:
            value = read_list(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, list) and value and all(isinstance(item, str) and item.strip() for item in value):
        if len(set(value)) < len(value):
            raise ValueError(f"names a reward twice: {value}")
        return {item.strip(): 1.0 for item in value}
    if isinstance(value, dict) and value:
        for name, weight in value.items():
            if not name.strip():
                raise ValueError("has an empty reward name")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"weight of {name!r} must be a finite number, not {weight!r}")
        if not any(value.values()):
            raise ValueError("gives every reward the weight 0")
        return {name.strip(): float(weight) for name, weight in value.items()}
    raise ValueError(
        'must be "model", "file.py:function", a registered name, a list of names or an object NAME -> weight, '
        f"not {value!r}"
    )


def read_resume(value: Any, is_text: bool) -> str | None:
    """Read ``resume_from_checkpoint``.

    True means the newest checkpoint in output_dir, a string is a checkpoint's folder.
    """
    if (
        value is True
        or (isinstance(value, str) and value.lower() in (TRUE_WORDS | {LATEST}) - {"1"})
        or str(value) == "1"
    ):
        return LATEST
    if (
        value is False
        or value == ""
        or (isinstance(value, str) and value.lower() in FALSE_WORDS | {"none"})
        or value == 0
    ):
        return None
    if isinstance(value, str):
        return value
    raise ValueError(f"must be a checkpoint's folder or true (the newest in output_dir), not {value!r}")


def read_report_to(value: Any, is_text: bool) -> list[str]:
    """Read ``report_to``: a name, several, ``all`` or ``none``."""
    names = [name.lower() for name in read_list(value, is_text)]
    if names == ["none"] or not names:
        return []
    if names == ["all"]:
        return ["all"]  # everything that is installed, which the writer finds out
    for name in names:
        if name not in REPORT_TARGETS:
            raise ValueError(f"{name!r} is not one of {', '.join(map(repr, REPORT_TARGETS))}, 'all', 'none'")
    return list(dict.fromkeys(names))


def read_sharding(value: Any, is_text: bool) -> str:
    """Read ``sharding``: empty, stage1, stage2 or stage3, the latter two with ``offload``."""
    if value in (True, False) and isinstance(value, bool):
        return "stage1" if value else ""
    text = str(value).strip()
    text = f"stage{text}" if text in ("1", "2", "3") else text
    words = text.split()
    stages = [word for word in words if word in ("stage1", "stage2", "stage3")]
    if not isinstance(value, (str, int)) or len(stages) > 1 or set(words) - set(stages) - {"offload"}:
        raise ValueError(f"must be stage1, stage2, stage3, 'stage2 offload', 'stage3 offload' or empty, not {value!r}")
    if "offload" in words and stages not in (["stage2"], ["stage3"]):
        raise ValueError(f"offload works with stage2 or stage3 only: {value!r}")
    return text


def read_offload_level(value: Any, is_text: bool) -> str:
    """Read ``offload_level``.

    Any of freeze_model, optimizer, train_model, separated by spaces (a JSON list works too).
    """
    words = value if isinstance(value, list) else str(value).split()
    for word in words:
        if word not in OFFLOAD_PARTS:
            raise ValueError(
                f"{word!r} is not one of {', '.join(map(repr, OFFLOAD_PARTS))} (several are separated by spaces)"
            )
    return " ".join(dict.fromkeys(words))


def short_names(names: list[str]) -> list[str]:
    """How metrics call the sources of ``reward``: ``"my_rewards.py:helpfulness"`` is ``"helpfulness"``, unless two
    sources would then share a name.
    """
    short = [name.rpartition(":")[2] for name in names]
    return [last if short.count(last) == 1 else name for last, name in zip(short, names, strict=True)]
