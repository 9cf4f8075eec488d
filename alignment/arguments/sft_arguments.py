"""Arguments of supervised fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.arguments import foreign
from alignment.arguments.spec import argument
from alignment.arguments.stage_arguments import Arguments
from alignment.arguments.training import dataset_argument

NO_GENERATION = "evaluation by generation is not available yet in this version; `alignment generate` answers prompts"


@dataclass
class LoRAFields:
    """Low-rank adapters (Hu et al. 2021)."""

    GROUP = "LoRA"

    lora: bool = argument(False, "Train low-rank adapters only.")
    lora_rank: int = argument(8, "Rank of the adapters.", ge=1)
    lora_alpha: int | None = argument(
        None, "The adapters are scaled by lora_alpha / lora_rank.", ge=1, derived="2 * lora_rank"
    )
    lora_path: str | None = argument(None, "Folder of adapters to start from.")
    lora_target_modules: list[str] | None = argument(
        None,
        "Regular expressions of the layers that get adapters.",
        derived="all linear layers of attention and feed-forward",
    )


@dataclass
class SFTFields:
    """Model, data and tokens of SFT."""

    GROUP = "Supervised fine-tuning"

    model_name_or_path: str = argument("", "Folder (or name) of the model to train.", required=True)
    dataset_name_or_path: str | dict[str, Any] | None = dataset_argument(
        "Folder with train.json and dev.json (rows with src and tgt), or a mixture of data sets by NAME.",
        aliases=("dataset", "task_name_or_path"),
    )
    train_datasets: str | dict[str, Any] | None = dataset_argument("Training mixture, as in the other stages.")
    eval_datasets: str | dict[str, Any] | None = dataset_argument("Evaluation mixture.")
    src_length: int = argument(1024, "Longest prompt.", ge=1, unit="tokens", aliases=("max_src_len",))
    max_length: int = argument(2048, "Longest row: prompt and answer.", ge=2, unit="tokens")
    zero_padding: bool = argument(
        False, "Pack several samples into one row; attention stays inside each.", aliases=("intokens",)
    )
    greedy_zero_padding: bool = argument(False, "With zero_padding: pack best-fit instead of in order.")
    pad_to_multiple_of: int | None = argument(None, "Pad rows to a multiple of this.", ge=1, unit="tokens")
    pad_to_max_length: bool = argument(False, "Pad every row to max_length.")
    eval_with_do_generation: bool = argument(False, "Evaluate by generating answers.", unavailable=NO_GENERATION)
    save_generation_output: bool = argument(
        False, "Save the answers generated in evaluation.", unavailable=NO_GENERATION
    )
    top_k: int = argument(1, "For eval_with_do_generation.", ge=0, no_effect=NO_GENERATION)
    top_p: float = argument(1.0, "For eval_with_do_generation.", gt=0, le=1, no_effect=NO_GENERATION)


@dataclass
class SFTArguments(LoRAFields, SFTFields, Arguments):
    """Arguments of ``run_sft.py``; see :class:`~alignment.arguments.stage_arguments.Arguments`."""

    STAGE = "sft"
    TITLE = "SFT"
    FOREIGN = foreign.SFT
    METRICS = ("loss", "perplexity", "accuracy")
