"""Golden PPO runs: four short ones whose every number is known.

``one`` (one process), ``tp2pp2`` (four processes under the launcher, tensor and pipeline parallel), ``resumed``
(``one`` gone on with from its checkpoint in the middle of an update) and ``offloaded`` (``one`` with everything
offloaded that can be). They start public commands only and make their files with numpy, so that they outlive any change
inside the package.

::

    python -m tests.e2e.golden --record           # write golden.json beside this file, the figures of test_golden.py
    python -m tests.e2e.golden --against COMMIT   # run COMMIT and this checkout: are all bits equal?

A figure that only the later record has is no difference: a run may tell more than it did.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.tiny import copy_rows, tiny_tokenizer_dir, write_jsonl

REPO = Path(__file__).resolve().parents[2]
FIGURES = Path(__file__).with_suffix(".json")
RUNS = ("one", "resumed", "offloaded", "tp2pp2")
#: The runs whose figures are stored; the others are told to give the same.
STORED = ("one", "tp2pp2")
#: ``resumed`` starts behind this optimizer step: in the second pass over the first rollout, which has four.
RESUMED_AT = 3
#: Of stored figures, absolute and relative: sums in another order, on another processor, move them by less.
TOLERANCE = 2e-6
TIMEOUT = 180.0
_REWARD = """
def vowels(prompts, responses, **row):
    return [sum(letter in "aeiou" for letter in text) - 0.05 * len(text) for text in responses]
"""


class GoldenError(RuntimeError):
    """A run failed; the message has the end of its output."""


class Difference(NamedTuple):
    """The first place where two records differ.

    Attributes:
        step: optimizer step; -1 for the final weights.
        key: of the metrics' row, or ``MODEL/TENSOR``.
        one, other: what each record has there.
    """

    step: int
    key: str
    one: Any
    other: Any


@dataclass(frozen=True)
class Record:
    """What a run left.

    Attributes:
        rows: of ``metrics.jsonl``, without what depends on time or memory.
        weights: ``policy/TENSOR`` and ``value/TENSOR`` -> SHA-256 of its type, shape and bytes.
        seconds: how long the run took, with its start.
    """

    rows: list[dict[str, Any]]
    weights: dict[str, str]
    seconds: float


def make_files(folder: Path) -> Path:
    """Write a model of four layers, a second one as reward model, data and a reward; returns ``folder``."""
    for seed, name in enumerate(("model", "reward")):
        _write_model(folder / name, seed)
    prompts = [{"prompt": f"{row['src']} {i}"} for i, row in enumerate(copy_rows(17))]
    write_jsonl(folder / "prompts.jsonl", prompts[:12])  # 8 and 4: the second rollout of an epoch is half as large
    write_jsonl(folder / "prompts_dev.jsonl", prompts[12:])
    write_jsonl(folder / "sft.jsonl", copy_rows(10, seed=1))
    (folder / "golden_rewards.py").write_text(_REWARD)
    return folder


def _write_model(folder: Path, seed: int) -> None:
    """A random Qwen2 in the published files' layout: linear weights are ``[out, in]``."""
    from safetensors.numpy import save_file

    tiny_tokenizer_dir(folder)
    vocabulary, hidden, heads, kv_heads, layers = 320, 32, 4, 2, 4
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocabulary, "hidden_size": hidden,
        "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "max_position_embeddings": 256, "rope_theta": 10000.0, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "initializer_range": 0.1,
    }  # fmt: skip
    narrow = hidden * kv_heads // heads
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        for name, width in (("q", hidden), ("k", narrow), ("v", narrow)):
            shapes |= {f"{attention}.{name}_proj.weight": (width, hidden), f"{attention}.{name}_proj.bias": (width,)}
        shapes[f"{attention}.o_proj.weight"] = (hidden, hidden)
        shapes |= {f"{mlp}.{name}_proj.weight": (2 * hidden, hidden) for name in ("gate", "up")}
        shapes[f"{mlp}.down_proj.weight"] = (hidden, 2 * hidden)
    draw = np.random.default_rng(seed)
    weights = {name: draw.normal(0.0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    for norm in [
        f"layers.{i}.{name}" for i in range(layers) for name in ("input_layernorm", "post_attention_layernorm")
    ]:
        weights[f"model.{norm}.weight"] = np.ones(hidden, np.float32)
    weights["model.norm.weight"] = np.ones(hidden, np.float32)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def arguments(files: Path, output: Path) -> list[str]:
    """Of all runs: rollouts of four, two, and four optimizer steps, of which the run's end leaves two."""
    values: dict[str, Any] = {
        "actor_model_name_or_path": files / "model", "reward_model_name_or_path": files / "reward",
        "train_datasets": f"jsonl::{files / 'prompts.jsonl'}", "eval_datasets": f"jsonl::{files / 'prompts_dev.jsonl'}",
        "ptx_datasets": f"jsonl::{files / 'sft.jsonl'}", "ptx_coeff": 0.5, "data_cache_dir": output.parent / "cache",
        "reward": json.dumps({"model": 1.0, f"{files / 'golden_rewards.py'}:vowels": 0.5}), "output_dir": output,
        "max_src_len": 48, "max_dec_len": 12, "stop_strings": '["a", "o", "1"]', "top_p": 0.9,
        "num_return_sequences": 2,
        "per_device_prompt_batch_size": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 4, "update_iters": 2, "max_steps": 8, "learning_rate": 2e-4,
        "critic_learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_steps": 1, "weight_decay": 0.01,
        "kl_coeff": 0.05, "adaptive_kl": "true", "kl_target": 0.1, "kl_horizon": 100, "normalize_reward": "true",
        "normalize_advantage": "true", "evaluation_strategy": "steps", "eval_steps": 4, "save_strategy": "steps",
        "save_steps": RESUMED_AT, "logging_steps": 1, "report_to": "none", "disable_tqdm": "true", "device": "cpu",
        "seed": 3,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def run(name: str, files: Path, output: Path, root: Path = REPO) -> Record:
    """Make one of :data:`RUNS` with the package that lies in ``root``.

    Args:
        name: ``resumed`` needs the folder of ``one`` beside ``output``.
        files: of :func:`make_files`.
        output: the run's folder, new.

    Raises:
        GoldenError: the command failed, or has not ended in time.
    """
    words, command = arguments(files, output), [sys.executable, "-m", "alignment", "ppo"]
    if name == "resumed":
        words.append(f"resume_from_checkpoint={output.parent / 'one' / f'checkpoint-{RESUMED_AT}'}")
    elif name == "offloaded":
        offloads = ["offload_level=freeze_model optimizer train_model", f"offload_dir={output.parent / 'offload'}"]
        words += [*offloads, "save_strategy=no"]
    elif name == "tp2pp2":
        words += ["tensor_parallel_degree=2", "pipeline_parallel_degree=2", "save_strategy=no"]
        launcher = ["-m", "paddle.distributed.launch", "--nproc_per_node", "4", "--log_dir", f"{output}-logs"]
        command = [sys.executable, *launcher, str(root / "alignment" / "ppo" / "run_ppo.py")]
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("PADDLE_", "FLAGS_"))}
    environ |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *words], cwd=output.parent, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise GoldenError(f"{name} with {root} has not ended in {TIMEOUT:.0f} s") from error
    if done.returncode:
        raise GoldenError(f"{name} with {root} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    if name == "resumed":  # its file begins with the rows that came with the checkpoint
        rows = behind(rows)
    return Record([_timeless(row) for row in rows], _digests(output), time.monotonic() - began)


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    def lasts(key: str) -> bool:
        of_time = key == "time" or key.startswith(("time/", "offload/", "reshard/"))
        return not of_time and not any(word in key for word in ("second", "runtime", "memory", "bytes", "_gib"))

    return {key: value for key, value in row.items() if lasts(key)}


def _digests(output: Path) -> dict[str, str]:
    from safetensors.numpy import load_file

    found = {}
    for model in ("policy", "value"):
        for file in sorted((output / model).glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                head = f"{tensor.dtype} {tensor.shape} ".encode()
                found[f"{model}/{name}"] = hashlib.sha256(head + np.ascontiguousarray(tensor).tobytes()).hexdigest()
    return dict(sorted(found.items()))


def first_difference(
    one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], tolerance: float = 0.0
) -> Difference | None:
    """Compare metrics row by row; ``one`` is the earlier record, whose figures ``other`` must have too."""
    for a, b in zip(one, other, strict=False):
        for key, value in a.items():
            if key not in b or not _equal(value, b[key], tolerance):
                return Difference(a["step"], key, value, b.get(key, "missing"))
    if len(one) != len(other):
        return Difference(max(row["step"] for row in [*one, *other]), "rows", len(one), len(other))
    return None


def _equal(one: Any, other: Any, tolerance: float) -> bool:
    if one == other or (one != one and other != other):
        return True
    numbers = all(isinstance(value, int | float) for value in (one, other))
    return numbers and abs(one - other) <= tolerance * max(1.0, abs(one))


def behind(rows: Sequence[dict[str, Any]], step: int = RESUMED_AT) -> list[dict[str, Any]]:
    """The rows that come after a step."""
    return [row for row in rows if row["step"] > step]


def stored_rows() -> dict[str, list[dict[str, Any]]]:
    """Run -> its rows, as :func:`record` has stored them."""
    return json.loads(FIGURES.read_text())


def record(folder: Path) -> None:
    """Run :data:`STORED` and write their figures, a line for each row."""
    files = make_files(folder / "files")
    texts = []
    for name in STORED:
        made = run(name, files, folder / name)
        print(f"{name}: {len(made.rows)} rows, {made.seconds:.1f} s", flush=True)
        texts.append(f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(row) for row in made.rows) + "\n]")
    FIGURES.write_text("{\n" + ",\n".join(texts) + "\n}\n")


def compare(commit: str, folder: Path, names: Sequence[str] = RUNS) -> dict[str, Difference | None]:
    """Run ``commit`` and this checkout, one after the other for each run; returns the first difference of each."""
    files, found = make_files(folder / "files"), {}
    with checked_out(commit, folder / "base") as base:
        roots = {folder / "runs-then": base, folder / "runs-now": REPO}
        for output, root in roots.items():
            output.mkdir()
            _check_package(root, output)
        for name in names:
            then, now = (run(name, files, output / name, root) for output, root in roots.items())
            found[name] = first_difference(then.rows, now.rows) or first_other_tensor(then.weights, now.weights)
            told = f"{len(then.rows)} rows, {len(then.weights)} tensors, {then.seconds:.1f} s and {now.seconds:.1f} s"
            if found[name] is None:
                print(f"{name}: equal bit by bit ({told})", flush=True)
            else:
                step, key, one, other = found[name]
                where = f"step {step}, {key}" if step >= 0 else f"final weights, {key}"
                print(f"{name}: DIFFERENT at {where}: {one!r} at {commit}, {other!r} now ({told})", flush=True)
    return found


def first_other_tensor(one: dict[str, str], other: dict[str, str]) -> Difference | None:
    """Compare the digests of two records' final weights."""
    for key in sorted({*one, *other}):
        if one.get(key) != other.get(key):
            return Difference(-1, key, one.get(key, "missing"), other.get(key, "missing"))
    return None


def _check_package(root: Path, cwd: Path) -> None:
    """Make sure that a run in ``cwd`` uses the package in ``root``, not an installed one."""
    words = [sys.executable, "-c", "import alignment; print(alignment.__file__)"]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    found = subprocess.run(words, cwd=cwd, env=environ, capture_output=True, text=True, check=True).stdout.strip()
    if Path(found).parent.parent != root:
        raise GoldenError(f"the package in {root} is to be run, but Python finds {found}")


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A commit's tree in ``folder``, until the end of the block."""
    git = ["git", "-C", str(REPO), "worktree"]
    done = subprocess.run([*git, "add", "--detach", str(folder), commit], capture_output=True, text=True)
    if done.returncode:
        raise GoldenError(f"git cannot check out {commit}: {done.stderr.strip()}")
    try:
        yield folder.resolve()
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True, capture_output=True)


def main(argv: list[str] | None = None) -> int:
    """Record, or compare; returns the exit status, 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--record", action="store_true", help=f"write {FIGURES.name}")
    what.add_argument("--against", metavar="COMMIT", help="compare this checkout with a commit, bit by bit")
    parser.add_argument("--run", action="append", choices=RUNS, help="with --against; default: each of them")
    options = parser.parse_args(argv)
    names = [name for name in RUNS if not options.run or name in options.run]
    if "resumed" in names and "one" not in names:
        parser.error("resumed goes on from a checkpoint of one: give --run one too")
    with tempfile.TemporaryDirectory(prefix="golden-") as temporary:
        try:
            if options.record:
                record(Path(temporary))
                return 0
            found = compare(options.against, Path(temporary).resolve(), names)
        except GoldenError as error:
            print(error, file=sys.stderr)
            return 1
    differing = [name for name, difference in found.items() if difference]
    told = (
        f"{len(differing)} of {len(found)} runs differ: {', '.join(differing)}" if differing else "all bits are equal"
    )
    print(f"{told} (against {options.against})")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
