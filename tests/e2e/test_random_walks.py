"""PPO learns: from random walks to shortest ways, with a Python reward, through the public commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from alignment.cli import main
from tests.e2e.random_walks import GOAL, NAMES, NODES, make_graph, optimality, random_walk, reward, shortest_ways
from tests.tiny import tiny_model_dir

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'user' %}:{% endif %}{% endfor %}"
)
# Mean optimality of sampled answers, as measured on a 2-core CPU:
# seed 1 0.128 -> 0.900 (0.875 with two threads), seed 2 0.041 -> 0.975, seed 3 0.074 -> 1.000.
SFT_AT_MOST, PPO_AT_LEAST, GAIN_AT_LEAST = 0.35, 0.8, 0.6


def test_the_task_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    edges = make_graph(1)
    ways = shortest_ways(edges)
    assert all(ways[i] == 1 + min(ways[j] for j in edges[i]) for i in range(1, NODES))
    start = next(i for i in range(1, NODES) if ways[i] == 1)
    goal, name = NAMES[GOAL], NAMES[start]
    assert optimality(edges, name, goal) == 1.0
    assert optimality(edges, name, "") == 0.0
    assert optimality(edges, name, goal + goal) == -1.0
    assert optimality(edges, name, "?") == -1.0
    walks = [random_walk(edges, start, np.random.default_rng(i)) for i in range(50)]
    assert {optimality(edges, name, walk) for walk in walks} <= {0.0, *(1.0 / n for n in range(1, 11))}
    monkeypatch.setenv("RANDOM_WALK_SEED", "1")
    assert reward([name], [goal]) == [1.0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ppo_finds_the_shortest_ways(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANDOM_WALK_SEED", str(seed))
    edges, rng = make_graph(seed), np.random.default_rng(seed)
    starts = [int(rng.integers(1, NODES)) for _ in range(1500)]
    rows = [{"src": NAMES[start], "tgt": random_walk(edges, start, rng)} for start in starts]
    (tmp_path / "walks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": NAMES[start]} for start in range(1, NODES)]
    for name in ("starts", "eval_starts"):  # there are no other nodes to start from; the same file would be refused
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    base = tiny_model_dir(tmp_path / "base", "qwen2", hidden_size=64, layers=2, seed=seed)
    common = {
        "prompt_template": TEMPLATE, "seed": seed, "report_to": "none", "disable_tqdm": True, "logging_steps": 20,
        "do_train": True, "save_strategy": "no",
    }  # fmt: skip
    sft = {
        **common, "model_name_or_path": str(base), "train_datasets": f"jsonl::{tmp_path / 'walks.jsonl'}",
        "output_dir": str(tmp_path / "sft"), "max_length": 32, "src_length": 8, "per_device_train_batch_size": 64,
        "num_train_epochs": 12, "learning_rate": 5e-3, "lr_scheduler_type": "cosine", "do_eval": False,
    }  # fmt: skip
    ppo = {
        **common, "actor_model_name_or_path": str(tmp_path / "sft"), "output_dir": str(tmp_path / "ppo"),
        "train_datasets": f"jsonl:8:{tmp_path / 'starts.jsonl'}",
        "eval_datasets": f"jsonl:4:{tmp_path / 'eval_starts.jsonl'}",
        "reward": "tests.e2e.random_walks:reward", "max_src_len": 8, "max_dec_len": 12, "top_p": 1.0,
        "per_device_prompt_batch_size": 80, "per_device_train_batch_size": 80, "num_return_sequences": 2,
        "per_device_eval_batch_size": 80, "update_iters": 3, "max_steps": 240, "learning_rate": 1e-3,
        "critic_learning_rate": 3e-3, "lr_scheduler_type": "constant", "kl_coeff": 0.0, "normalize_advantage": True,
        "clip_range_value": 1.0, "evaluation_strategy": "steps", "eval_steps": 60, "do_eval": True,
        "sample_table_rows": 3,
    }  # fmt: skip
    for stage, values in (("sft", sft), ("ppo", ppo)):
        (tmp_path / f"{stage}.json").write_text(json.dumps(values))
        assert main([stage, str(tmp_path / f"{stage}.json")]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row["eval/reward"] for row in metrics if "eval/reward" in row]
    before, after = evaluations[0], evaluations[-1]
    print(f"random walks, seed {seed}: optimality {before:.3f} -> {after:.3f}")
    assert before <= SFT_AT_MOST
    assert after >= PPO_AT_LEAST
    assert after - before >= GAIN_AT_LEAST
