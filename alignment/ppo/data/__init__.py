"""Text to token rows: raw data sets registered by NAME, mixed by ratio, put into one prompt template, tokenised and
batched.

The way through the modules, in the order in which data meets them::

    files.py, readers.py         a path -> its files -> their rows
    rows.py, messages.py         rows -> RawSample: the layouts of columns and the spellings of messages
    base.py                      RawSample, RawDataset and the registry by NAME
    safe_rlhf.py alpaca.py gsm8k.py jsonl.py     the built-in raw data sets
    mixture.py                   "alpaca:0.5,jsonl::mine.jsonl" -> sources -> the rows that are taken from each
    template.py                  turns -> text segments, each either prompt or answer
    encode.py                    segments -> token rows with lengths; every cut and every drop is counted
    cache.py                     token rows on disk
    survey.py                    which samples are equal; columns that were not read
    tokenized.py                 the four above put together, shared by
    supervised.py preference.py prompt_only.py
    splits.py                    training and evaluation rows, kept apart
    summary.py                   what was kept, dropped and cut
    packing.py, collate.py       token rows -> batches (NumPy)

Importing this package is cheap: NumPy, Jinja and the rest are loaded when they are first needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

_EXPORTS = {
    "base": ("RawDataset", "RawSample", "known_names"),
    "collate": ("IGNORE_INDEX", "collate_packed", "collate_preference", "collate_prompts", "collate_supervised"),
    "encode": ("Encoder", "Limits"),
    "mixture": ("parse_dataset", "parse_mixture"),
    "packing": ("pack_supervised",),
    "preference": ("PreferenceDataset", "SafetyPreferenceDataset"),
    "prompt_only": ("PromptOnlyDataset",),
    "summary": ("DatasetSummary",),
    "supervised": ("SupervisedDataset",),
    "template": ("PromptTemplate", "check_same"),
    "splits": ("load_train_and_eval", "split_train_eval"),
    "tokenized": ("TokenizedDataset",),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
_SUBMODULES = (
    *_EXPORTS,
    "alpaca",
    "cache",
    "chat",
    "files",
    "gsm8k",
    "hub",
    "jsonl",
    "messages",
    "read_mixture",
    "readers",
    "rows",
    "safe_rlhf",
    "survey",
    "table",
    "workers",
)

__all__ = sorted(_HOME)


def alias(name: str) -> list[str]:
    """Let ``import data`` and ``from data.base import ...`` mean ``alignment.ppo.data``, so that there is one registry.

    A script that lives in ``alignment/ppo``, or a plug-in, may name this package ``data``. Were it executed a second
    time under that name, every class would exist twice, and data sets registered in one copy would be unknown in the
    other.

    Args:
        name: the other name.

    Returns:
        The names entered into ``sys.modules``.
    """
    real = {name: "alignment.ppo.data"} | {f"{name}.{module}": f"alignment.ppo.data.{module}" for module in _SUBMODULES}
    for alias_name, real_name in real.items():
        sys.modules[alias_name] = importlib.import_module(real_name)
    return list(real)


if __name__ == "alignment.ppo.data":
    from alignment.ppo.data import alpaca, gsm8k, jsonl, safe_rlhf  # noqa: F401  (importing them registers them)
    from alignment.ppo.data.base import RawDataset, RawSample, known_names  # noqa: F401

    def __getattr__(name: str) -> object:
        """Load the module that defines ``name`` when it is first asked for."""
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
else:
    from pathlib import Path as _Path

    _root = str(_Path(__file__).resolve().parents[3])
    if importlib.util.find_spec("alignment") is None:  # a script in alignment/ppo run without PYTHONPATH
        sys.path.append(_root)
    alias(__name__)
