"""The same run on every layout: what is run, and how two runs are compared.

files = make_files(folder)
one = run(files, "ppo", LAYOUTS["1 process"])
other = run(files, "ppo", LAYOUTS["TP2 x PP2"])
compare(one, other).worst          # (largest difference, where)
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment import cli
from tests import tiny
from tests.parallel.forked import run_ranks
from tests.precision import ARGUMENTS
from tests.small_methods import METHODS

GLOBAL_BATCH = 8
TOLERANCE = 1e-4
# Rewards that write down what they are asked to judge, so that two runs' answers can be compared word for word.
_RECORDER = """
import json, os
def record(prompts, responses, **row):
    if os.environ.get("PADDLE_TRAINER_ID", "0") in os.environ["RECORDED_RANKS"].split():
        with open(os.environ["RECORD_FILE"], "a") as file:
            file.writelines(json.dumps(pair) + "\\n" for pair in zip(prompts, responses))
    return [0.0] * len(responses)
"""


@dataclass(frozen=True)
class Layout:
    """Degrees as in the JSON files.

    Attributes:
        tensor, pipeline, sharding, data: degrees; ``data`` counts replicas.
        stage: of the sharding.
        sequence_parallel, eval_mode: as the arguments of these names.
    """

    tensor: int = 1
    pipeline: int = 1
    sharding: int = 1
    data: int = 1
    stage: int = 0
    sequence_parallel: bool = False
    eval_mode: str = ""

    @property
    def processes(self) -> int:
        return self.tensor * self.pipeline * self.sharding * self.data

    @property
    def data_ranks(self) -> int:
        return self.sharding * self.data

    @property
    def arguments(self) -> list[str]:
        words = []
        if self.tensor > 1:
            words.append(f"tensor_parallel_degree={self.tensor}")
        if self.pipeline > 1:
            words.append(f"pipeline_parallel_degree={self.pipeline}")
        if self.stage:
            words += [f"sharding=stage{self.stage}", f"sharding_parallel_degree={self.sharding}"]
        if self.sequence_parallel:
            words.append("sequence_parallel=true")
        return words


LAYOUTS = {
    "1 process": Layout(),
    "DP2": Layout(data=2),
    "sharding stage 1 x2": Layout(sharding=2, stage=1),
    "sharding stage 2 x2": Layout(sharding=2, stage=2),
    "sharding stage 3 x2": Layout(sharding=2, stage=3),
    "TP2": Layout(tensor=2),
    "TP2, sequence parallel": Layout(tensor=2, sequence_parallel=True),
    "PP2": Layout(pipeline=2),
    "TP2 x PP2": Layout(tensor=2, pipeline=2),
    "PP2 x sharding stage 2 x2": Layout(pipeline=2, sharding=2, stage=2),
    "TP2 x PP2 x sharding stage 1 x2": Layout(tensor=2, pipeline=2, sharding=2, stage=1),
}
ROLLOUT_LAYOUTS = {
    "TP2, eval_mode single": Layout(tensor=2, eval_mode="single"),
    "PP2, eval_mode tensor_parallel": Layout(pipeline=2, eval_mode="tensor_parallel"),
    "TP2 x PP2, eval_mode tensor_parallel": Layout(tensor=2, pipeline=2, eval_mode="tensor_parallel"),
    "TP2 x PP2, eval_mode single": Layout(tensor=2, pipeline=2, eval_mode="single"),
    "TP2, sequence parallel, eval_mode single": Layout(tensor=2, sequence_parallel=True, eval_mode="single"),
    "TP2 x sharding stage 3 x2, eval_mode single": Layout(tensor=2, sharding=2, stage=3, eval_mode="single"),
}


@dataclass(frozen=True)
class Trace:
    """What a run left.

    Attributes:
        rows: of ``metrics.jsonl``.
        answers: ``[prompt, answer]`` of every rollout and evaluation in the order of their scoring.
        output: the run's folder.
    """

    rows: list[dict[str, Any]]
    answers: list[list[str]]
    output: Path


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart.

    Attributes:
        worst: the largest ``|a - b| / max(1, |a|)`` over all figures but timings, and which one it is.
        steps: rows compared.
        same_answers: whether all answers are equal, word for word.
        answers: how many were compared.
    """

    worst: tuple[float, str]
    steps: int
    same_answers: bool
    answers: int

    @property
    def agrees(self) -> bool:
        """Whether every figure is within the tolerance and every answer is the same."""
        return self.worst[0] <= TOLERANCE and self.same_answers


def make_files(folder: Path, arch: str = "qwen2", **config: Any) -> Path:
    """Write a random model of four layers, others as reward and as cost model, and data; returns ``folder``.

    The last batch of each epoch has one prompt or row, so that a data rank goes empty-handed.
    """
    settings = {"layers": 4, "initializer_range": 0.1, **config}
    for seed, name in enumerate(("model", "reward", "cost")):
        tiny.tiny_model_dir(folder / name, arch, seed=seed, **settings)
    rows = 5 * GLOBAL_BATCH + 1
    tiny.write_jsonl(folder / "sft.jsonl", tiny.copy_rows(rows))
    tiny.write_jsonl(folder / "one_batch.jsonl", tiny.copy_rows(GLOBAL_BATCH, seed=2))
    tiny.write_jsonl(folder / "sft_dev.jsonl", tiny.copy_rows(19, seed=1))
    tiny.write_jsonl(folder / "rm.jsonl", tiny.preference_rows(rows))
    tiny.write_jsonl(folder / "rm_dev.jsonl", tiny.preference_rows(19, seed=1))
    tiny.write_jsonl(folder / "cost.jsonl", tiny.safety_rows(rows))
    tiny.write_jsonl(folder / "cost_dev.jsonl", tiny.safety_rows(19, seed=1))
    prompts = [{"prompt": f"{row['src']} {i}"} for i, row in enumerate(tiny.copy_rows(24))]
    for answers in {method.answers for method in METHODS.values()}:
        tiny.write_jsonl(folder / f"prompts_{answers}.jsonl", prompts[: 2 * GLOBAL_BATCH // answers + 1])
    tiny.write_jsonl(folder / "prompts_dev.jsonl", prompts[-7:])
    (folder / "recorder.py").write_text(_RECORDER)
    return folder


def arguments(files: Path, stage: str, layout: Layout, output: Path) -> list[str]:
    """The command line of a stage or method: the same global batches on any layout."""
    rows = GLOBAL_BATCH // layout.data_ranks
    micro = max(1, rows // 2)
    model, train, dev = files / "model", stage, f"{stage}_dev"
    if stage in METHODS:
        train, dev = f"prompts_{METHODS[stage].answers}", "prompts_dev"
    words = [
        f"train_datasets=jsonl::{files / train}.jsonl",
        f"eval_datasets=jsonl::{files / dev}.jsonl",
        f"output_dir={output}",
        f"per_device_train_batch_size={micro}",
        f"gradient_accumulation_steps={rows // micro}",
        "per_device_eval_batch_size=4",
        "evaluation_strategy=steps",
        "eval_steps=3",
        "max_steps=6",
        "logging_steps=1",
        "learning_rate=0.0005",
        "lr_scheduler_type=cosine",
        "save_strategy=no",
        "disable_tqdm=true",
        "report_to=none",
        "device=cpu",
        "seed=3",
        *(f"{key}={json.dumps(value)}" for key, value in ARGUMENTS.items()),
    ]
    if stage in METHODS:
        words += [
            f"actor_model_name_or_path={model}",
            f"reward_model_name_or_path={files / 'reward'}",
            'reward={"model": 1.0, "' + str(files / "recorder.py") + ':record": 0.0}',
            "max_src_len=48",
            "max_dec_len=10",
            *METHODS[stage].words(files, rows),
        ]
        if layout.eval_mode:
            words.append(f"eval_mode={layout.eval_mode}")
    else:
        words += [f"model_name_or_path={model}", "max_length=96"]
        if stage == "sft":
            words.append("src_length=64")
    return [*words, *layout.arguments]


def one_batch(files: Path, packed: bool = False) -> list[str]:
    """Further arguments of SFT: a data set that one step reads whole, padded or packed two rows to a pack."""
    words = [f"train_datasets=jsonl::{files / 'one_batch'}.jsonl"]
    return [*words, "zero_padding=true", "per_device_train_batch_size=2"] if packed else words


def run(files: Path, stage: str, layout: Layout, extra: Sequence[str] = (), timeout: float = 120.0) -> Trace:
    """Run a stage or method on forked ranks; the same code as ``python -m alignment STAGE``.

    Raises:
        RankError: a rank failed.
    """
    output = Path(tempfile.mkdtemp(prefix=f"{stage}-", dir=files)) / "run"
    record = output.parent / "answers"
    os_environ = {"RECORD_FILE": str(record), "RECORDED_RANKS": " ".join(map(str, representatives(layout)))}
    words = [*arguments(files, stage, layout, output), *extra]
    run_ranks(layout.processes, _job, stage, words, os_environ, timeout=timeout)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    answers: list[list[str]] = []
    for file in sorted(record.parent.glob("answers.*")):
        answers += [json.loads(line) for line in file.read_text().splitlines()]
    return Trace(rows, sorted(answers), output)


def run_words(stage: str, words: list[str], processes: int, output: Path) -> list[dict[str, Any]]:
    """Run any command line of a stage on forked ranks; returns the rows of its ``metrics.jsonl``."""
    run_ranks(processes, _job, stage, words, {"RECORD_FILE": "unused", "RECORDED_RANKS": ""}, timeout=240.0)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def representatives(layout: Layout) -> list[int]:
    """One process of each data rank."""
    from alignment.parallel import Topology

    topology = Topology(layout.processes, 0, layout.tensor, layout.pipeline, layout.sharding, layout.stage)
    return topology.representatives()


def _job(stage: str, words: list[str], environ: dict[str, str]) -> int:
    """One rank's share; runs in a forked process."""
    import paddle

    rank = os.environ.get("PADDLE_TRAINER_ID", "0")
    os.environ.update(environ)
    os.environ["RECORD_FILE"] += f".{rank}"
    paddle.set_device("cpu")
    code = started(stage, words)
    assert code == 0, code
    return code


def started(name: str, words: list[str]) -> int | None:
    """Run ``alignment NAME WORDS`` in this process; what goes wrong is raised."""
    task = cli.TASKS.get(name)
    return cli.load_task(task.target)(words) if task else cli.load_task(cli.METHODS)([name, *words])


def compare(one: Trace, other: Trace) -> Difference:
    """Compare two runs figure by figure and answer by answer."""
    worst = (0.0, "nothing")
    if len(one.rows) != len(other.rows):
        worst = (float("inf"), f"{len(one.rows)} rows against {len(other.rows)}")
    for a, b in zip(one.rows, other.rows, strict=False):
        for name, value in a.items():
            if not isinstance(value, int | float) or _is_a_timing(name):
                continue
            far = abs(value - b.get(name, float("inf"))) / max(1.0, abs(value))
            worst = max(worst, (far, f"{name} at step {a['step']}"))
    return Difference(worst, len(one.rows), one.answers == other.answers, len(one.answers))


def _is_a_timing(name: str) -> bool:
    return name == "time" or "second" in name or "runtime" in name or name.startswith(("time/", "reshard/"))


def remove(trace: Trace) -> None:
    """Delete what a run left."""
    with contextlib.suppress(OSError):
        shutil.rmtree(trace.output.parent)
