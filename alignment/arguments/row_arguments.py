"""Arguments of methods that learn from given rows: pairs, labelled answers, dialogues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.arguments.sft_arguments import LoRAFields
from alignment.arguments.spec import argument
from alignment.arguments.stage_arguments import Arguments
from alignment.arguments.training import dataset_argument


@dataclass
class RowFields:
    """Model and rows."""

    GROUP = "Methods on rows: model and data"

    model_name_or_path: str = argument(
        "", "Folder (or name) of the model to start from, usually the SFT model.", required=True
    )
    train_datasets: str | dict[str, Any] | None = dataset_argument("Training mixture.")
    eval_datasets: str | dict[str, Any] | None = dataset_argument("Evaluation mixture.")
    max_length: int = argument(2048, "Longest row: prompt and answer.", ge=2, unit="tokens")
    max_src_len: int | None = argument(
        None, "Longest prompt.", ge=1, unit="tokens", aliases=("max_prompt_len",), derived="only max_length limits"
    )


@dataclass
class RowArguments(LoRAFields, RowFields, Arguments):
    """What every method on given rows has; see :class:`~alignment.arguments.stage_arguments.Arguments`.

    A method adds its own keys with :func:`~alignment.arguments.compose.compose`.
    """
