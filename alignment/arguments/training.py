"""The arguments that all stages share.

Names are those of paddlenlp's ``TrainingArguments``; at the end come this toolkit's own.
Classes are groups: the documentation lists each under its ``GROUP``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alignment.arguments import values
from alignment.arguments.spec import argument

SCHEDULERS = ("linear", "cosine", "constant", "constant_with_warmup", "polynomial")
INTERVALS = ("no", "steps", "epoch")

BF16_ON_CPU = (
    "bf16 on a CPU: weights are rounded to bfloat16 (with float32 masters) and so is what layers hand on; products, "
    "gradients and the LM head are float32, and memory and time are those of float32"
)
NO_KERNELS_ON_CPU = "the fused kernels need a GPU"
ONE_PROCESS = "no effect with one process"


@dataclass
class RunFields:
    """Where the run lives and what it does."""

    GROUP = "Run"

    output_dir: str = argument("", "Folder of the run: models, checkpoints, metrics.", required=True)
    overwrite_output_dir: bool = argument(False, "Start afresh in an output_dir that holds an earlier run.")
    do_train: bool = argument(True, "Train; with false only the evaluation runs.")
    do_eval: bool = argument(
        False,
        "Evaluate.",
        derived="true when evaluation_strategy is not no; if true with strategy no: once, after training",
    )
    seed: int = argument(42, "Seed of data order, initialisation and sampling.", ge=0)
    device: str = argument("gpu", "gpu is used if there is one; cpu stays on the CPU.", choices=("gpu", "cpu"))
    resume_from_checkpoint: str | None = argument(
        None, "Continue from this checkpoint folder; true: from the newest one in output_dir.", parse=values.read_resume
    )
    allow_changed_arguments: bool = argument(
        False, "Resume although arguments differ that make it another run (docs/resume.md)."
    )
    dry_run: bool = argument(False, "Print the resolved arguments and the derived sizes, then stop.")
    plugins: list[str] = argument(
        [], "Modules or .py files (here or beside the JSON file) to import first: own data sets, rewards."
    )


@dataclass
class BatchFields:
    """Sizes of batches and length of training."""

    GROUP = "Batches and length of training"

    per_device_train_batch_size: int = argument(8, "Rows of one micro batch per process.", ge=1, unit="rows")
    per_device_eval_batch_size: int = argument(8, "Rows of one evaluation batch per process.", ge=1, unit="rows")
    gradient_accumulation_steps: int = argument(1, "Micro batches of one optimizer step.", ge=1, unit="micro batches")
    max_tokens_per_micro_batch: int = argument(
        0,
        "Cuts the rows of an optimizer step, grouped by length, into micro batches of at most this many padded tokens "
        "(at least one row each), and so the rows of passes without gradient; the loss stays the same. 0: fixed "
        "numbers of rows.",
        ge=0,
        unit="tokens",
    )
    eval_accumulation_steps: int | None = argument(
        None,
        "Evaluation batches kept on the device.",
        ge=1,
        no_effect="evaluation keeps sums only, so there is nothing to move",
    )
    num_train_epochs: float = argument(
        1.0, "Passes over the training data; a fraction is allowed.", gt=0, unit="epochs"
    )
    max_steps: int = argument(
        -1, "Optimizer steps in all; -1: as num_train_epochs says. Wins over it.", ge=-1, unit="optimizer steps"
    )
    shuffle: bool = argument(
        True, "Take rows in a fresh random order each epoch; false: in the data's own order, for curricula."
    )
    dataloader_drop_last: bool = argument(False, "Leave out the last batch of an epoch if it is not full.")


@dataclass
class OptimizerFields:
    """AdamW and its learning rate."""

    GROUP = "Optimizer"

    learning_rate: float = argument(5e-5, "Highest learning rate.", ge=0)
    min_learning_rate: float | None = argument(
        None, "Floor of the learning rate.", ge=0, derived="0 (polynomial: 1e-7)"
    )
    weight_decay: float = argument(0.0, "AdamW's weight decay; biases and norms are left out.", ge=0)
    adam_beta1: float = argument(0.9, "AdamW's beta1.", ge=0, lt=1)
    adam_beta2: float = argument(0.999, "AdamW's beta2.", ge=0, lt=1)
    adam_epsilon: float = argument(1e-8, "AdamW's epsilon.", gt=0)
    max_grad_norm: float = argument(1.0, "Gradients are clipped to this global norm; 0: not at all.", ge=0)
    lr_scheduler_type: str = argument("linear", "Course of the learning rate after the warm-up.", choices=SCHEDULERS)
    warmup_ratio: float = argument(0.0, "Share of all optimizer steps in which the rate rises.", ge=0, le=1)
    warmup_steps: int = argument(
        0, "Optimizer steps in which the rate rises; wins over warmup_ratio.", ge=0, unit="optimizer steps"
    )
    decay_steps: int = argument(
        0, "Optimizer step at which the floor is reached; 0: the last.", ge=0, unit="optimizer steps"
    )


@dataclass
class EvaluationFields:
    """When to evaluate and to save."""

    GROUP = "Evaluation and checkpoints"

    evaluation_strategy: str = argument("no", "When to evaluate.", choices=INTERVALS)
    eval_steps: int | None = argument(
        None, "Optimizer steps between two evaluations.", ge=1, unit="optimizer steps", derived="logging_steps"
    )
    eval_on_start: bool = argument(
        True, "Evaluate before the first step too, where the run evaluates at all; what training gains is seen by it."
    )
    save_strategy: str = argument("steps", "When to save a checkpoint.", choices=INTERVALS)
    save_steps: int = argument(500, "Optimizer steps between two checkpoints.", ge=1, unit="optimizer steps")
    save_total_limit: int | None = argument(
        None, "Checkpoints kept; the best and the newest complete one always stay.", ge=1
    )
    load_best_model_at_end: bool = argument(False, "The final model is the checkpoint with the best evaluation.")
    metric_for_best_model: str | None = argument(
        None,
        "Evaluation metric that decides which checkpoint is best.",
        derived="SFT: loss, reward model: accuracy, methods that generate: reward",
    )
    greater_is_better: bool | None = argument(
        None,
        "Whether a greater metric is better.",
        derived="false for a loss, perplexity, KL, cost, calibration error or truncation rate, else true",
    )
    checks: str = argument(
        "strict",
        "Whether gradients reach every tensor in the first optimizer step and frozen ones rest and, where answers are "
        "generated, the rollout's log-probs are the training network's and first ratios are 1: strict stops a run "
        "whose first iteration fails (later ones warn unless the error is gross), warn says it, off does not look. "
        "LoRA's first gradients are 0 by design and are not looked at.",
        choices=("strict", "warn", "off"),
    )
    early_stopping_patience: int | None = argument(
        None,
        "End the run when this many evaluations in a row have not improved metric_for_best_model.",
        ge=1,
        unit="evaluations",
        derived="off",
    )
    unified_checkpoint: bool = argument(
        False,
        "paddlenlp's unified checkpoints.",
        no_effect="checkpoints have one layout, which does not depend on the processes",
    )


@dataclass
class ReportingFields:
    """What is shown and recorded."""

    GROUP = "Logging"

    logging_steps: int = argument(500, "Optimizer steps between two rows of metrics.", ge=1, unit="optimizer steps")
    logging_dir: str | None = argument(None, "Folder of VisualDL's or TensorBoard's files.", derived="output_dir/runs")
    disable_tqdm: bool | None = argument(
        None, "Print a line per logging step instead of a progress bar.", derived="false"
    )
    report_to: list[str] | None = argument(
        None,
        "Where metrics go besides metrics.jsonl: visualdl, tensorboard, wandb, all or none.",
        parse=values.read_report_to,
        derived="visualdl",
    )


@dataclass
class PrecisionFields:
    """Precision, memory and kernels."""

    GROUP = "Precision and memory"

    bf16: bool = argument(
        False,
        "Weights and layers in bfloat16; float32 are the optimizer's masters, the sums of gradients and the LM head. "
        "On a CPU values are rounded to bfloat16, which saves neither memory nor time.",
    )
    fp16: bool = argument(False, "Refused: float16 needs a loss scale, which is not here; use bf16 or float32.")
    fp16_opt_level: str = argument(
        "O1",
        "paddlenlp's level of half precision. Here every level means what O2 means there: bfloat16 weights.",
        choices=("O0", "O1", "O2"),
    )
    recompute: bool = argument(False, "Recompute activations in the backward pass instead of keeping them.")
    offload_level: str = argument(
        "",
        "What leaves memory while a phase does not need it: any of freeze_model (models that never change: reference, "
        "reward model), optimizer (the optimizers' states), train_model (models that change). A method on given rows "
        "has one phase that needs all; there only evaluation gains by it.",
        parse=values.read_offload_level,
    )
    offload_dir: str | None = argument(
        None,
        "On a CPU: folder, on a disk, of the unnamed files that offload_level keeps tensors in.",
        derived="output_dir/.offload",
    )
    use_flash_attention: bool | None = argument(
        None,
        "Use FlashAttention.",
        derived="true with bf16 on a GPU of compute capability 8 or more",
        on_cpu=NO_KERNELS_ON_CPU,
    )


@dataclass
class ParallelFields:
    """Several processes, started with ``paddle.distributed.launch``."""

    GROUP = "Parallelism"

    sharding: str = argument(
        "",
        "What data ranks share of a model's training state: stage1 optimizer, stage2 gradients too, stage3 parameters "
        "too.",
        parse=values.read_sharding,
        alone=ONE_PROCESS,
    )
    sharding_parallel_degree: int = argument(
        -1,
        "Data ranks that share one optimizer.",
        ge=-1,
        neutral=(0, 1),
        aliases=("sharding_degree",),
        derived="with sharding: all that tensor and pipeline parallelism leave",
        alone=ONE_PROCESS,
    )
    tensor_parallel_degree: int = argument(
        -1, "Processes that share each layer's matrices.", ge=-1, neutral=(0, 1), alone=ONE_PROCESS
    )
    pipeline_parallel_degree: int = argument(
        -1, "Pipeline stages, each of which holds some of the layers.", ge=-1, neutral=(0, 1), alone=ONE_PROCESS
    )
    sequence_parallel: bool = argument(
        False,
        "Split activations between tensor-parallel layers along the sequence; needs tensor_parallel_degree.",
        alone=ONE_PROCESS,
    )
    hang_timeout: float = argument(
        1800.0,
        "A process that keeps the others waiting for longer than this in one phase fails the run; 0: never.",
        ge=0,
        unit="seconds",
    )
    join_timeout: float = argument(
        300.0,
        "At the start, processes that wait longer than this for others end and name those that are missing; 0: never.",
        ge=0,
        unit="seconds",
        alone=ONE_PROCESS,
    )
    pipeline_parallel_config: str = argument(
        "", "Options of the pipeline.", no_effect="shapes travel with every pass, so the pipeline needs no options"
    )


@dataclass
class ToolkitFields:
    """This toolkit's own arguments of all stages."""

    GROUP = "Text and data"

    tokenizer_name_or_path: str | None = argument(None, "Folder of the tokenizer.", derived="the model's")
    prompt_template: str = argument(
        "auto",
        "auto (the one saved with the model, else the tokenizer's chat template, else beaver), beaver, chat (the "
        "tokenizer's own), a Jinja string or the name of a .jinja file; one template serves all stages.",
    )
    enable_thinking: bool | None = argument(
        None,
        "What chat templates that can switch reasoning off are told, for prompts and for answers without reasoning; "
        "answers with reasoning always get it.",
        derived="as saved with the model, else false",
    )
    show_sample_ids: bool = argument(False, "Show the token ids of the sample that is shown at the start, too.")
    allow_template_mismatch: bool = argument(False, "Train although the model was made with another template.")
    eval_split_ratio: float | None = argument(
        None, "Without evaluation data: the share of the training data that is held out.", gt=0, lt=1
    )
    skip_bad_rows: bool = argument(False, "Skip and count malformed rows instead of stopping.")
    overlong_prompts: str = argument(
        "truncate",
        "Prompts over their limit are cut on the left or dropped; both are counted.",
        choices=("truncate", "drop"),
    )
    overlong_answers: str = argument(
        "truncate",
        "Answers that their row has no room for are cut (and then have no end to learn) or dropped; both are counted.",
        choices=("truncate", "drop"),
    )
    data_cache_dir: str | None = argument(
        None,
        "Folder of the tokenised data, shared by runs; the files longest unused go when they take more than 20 GB.",
        derived="data in $ALIGNMENT_CACHE, else in ~/.cache/alignment",
    )
    dataset_num_proc: int = argument(1, "Processes that tokenise.", ge=1, unit="processes")


@dataclass
class TrainingFields(
    ToolkitFields,
    ParallelFields,
    PrecisionFields,
    ReportingFields,
    EvaluationFields,
    OptimizerFields,
    BatchFields,
    RunFields,
):
    """All arguments that the three stages share, in the order of the groups above (the reverse of the bases)."""


def dataset_argument(help: str, **details: Any) -> Any:
    """Declare an argument that holds a mixture of data sets."""
    return argument(None, help, parse=values.read_datasets, **details)
