"""A tiny policy, its data and a PPO argument file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.losses.token_sets import TokenSets
from alignment.methods.ppo import PPO
from alignment.rollout.rollout import Experience, Rollout
from tests.precision import ARGUMENTS


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of about 300 tokens in Qwen2's layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|pad|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["BEGINNING OF CONVERSATION: USER: ASSISTANT: say the word a b c d"] * 9, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Qwen2 with its tokenizer."""
    import paddle
    from paddlenlp.transformers import Qwen2Config, Qwen2ForCausalLM

    from alignment.ppo.models import load_tokenizer, save_model

    folder = tmp_path_factory.mktemp("policy")
    write_tokenizer(folder)
    paddle.seed(0)
    config = Qwen2Config(
        vocab_size=len(load_tokenizer(folder)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
        initializer_range=0.1,
    )
    save_model(Qwen2ForCausalLM(config), folder)
    return folder


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 prompts."""
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": f"say the word {'abcd'[i % 4]} {i}", "want": "abcd"[i % 4]} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="session")
def supervised_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 supervised rows for ptx."""
    file = tmp_path_factory.mktemp("data") / "sft.jsonl"
    file.write_text("".join(json.dumps({"src": f"say the word {i}", "tgt": "a b c d"}) + "\n" for i in range(16)))
    return file


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python reward that likes short answers with many vowels."""
    file = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    file.write_text(
        "def vowels(prompts, responses, **row):\n"
        # a random model samples the pad token too, which is text only where it is no special token
        "    texts = [r.replace('<|pad|>', '') for r in responses]\n"
        "    return [sum(c in 'aeiou' for c in r) - 0.1 * len(r) for r in texts]\n"
        "def wanted(prompts, responses, want):\n"
        "    return [float(w in r) for w, r in zip(want, responses)]\n"
        "def broken(prompts, responses, **row):\n"
        "    return [1.0 / len(prompts[0][:0])]\n"
    )
    return file


def copied(file: Path) -> Path:
    """A copy: the tests evaluate on the prompts they train on, and the same file is refused."""
    return Path(shutil.copyfile(file, file.with_name(f"eval_{file.name}")))


@pytest.fixture
def ppo_json(
    tmp_path: Path, policy_dir: Path, prompt_file: Path, supervised_file: Path, reward_file: Path
) -> Callable[..., Path]:
    """Writes a PPO argument file; keywords change or (``None``) remove keys."""

    def write(name: str = "ppo", **changes: Any) -> Path:
        values: dict[str, Any] = {
            "train_datasets": f"jsonl::{prompt_file}",
            "eval_datasets": f"jsonl:6/-1:{copied(prompt_file)}",
            "ptx_datasets": f"jsonl::{supervised_file}",
            "ptx_coeff": 0.5,
            "actor_model_name_or_path": str(policy_dir),
            "reward": f"{reward_file}:vowels",
            "output_dir": str(tmp_path / name),
            "max_src_len": 32,
            "max_dec_len": 10,
            "per_device_prompt_batch_size": 8,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "update_iters": 2,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "num_train_epochs": 2,
            "normalize_advantage": True,
            "normalize_reward": True,
            "top_p": 1.0,
            "do_train": True,
            "do_eval": True,
            "evaluation_strategy": "epoch",
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            **ARGUMENTS,
        }
        values.update(changes)
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
        return file

    return write


PPO_ARGS = SimpleNamespace(critic_warmup_steps=0, reward="model")
PPO_ITERATION, PPO_BETWEEN = PPO(PPO_ARGS).flow(), PPO(PPO_ARGS).between()


def make_rollout(
    lengths: list[tuple[int, int]], vocab: int = 300, seed: int = 0, pad_id: int = 1, masked: bool = False
) -> Rollout:
    """Rows of the given (prompt, response) lengths with random tokens, and with ``masked`` random sets of allowed
    tokens.
    """
    rng = np.random.default_rng(seed)
    width = max(prompt + response for prompt, response in lengths)
    tokens = np.full((len(lengths), width), pad_id, dtype=np.int64)
    for i, (prompt, response) in enumerate(lengths):
        tokens[i, : prompt + response] = rng.integers(2, vocab, prompt + response)
    response_len = np.array([response for _, response in lengths], dtype=np.int64)
    allowed = rng.random((int(response_len.sum()), vocab)) < 0.1
    chosen = [tokens[i, prompt : prompt + response] for i, (prompt, response) in enumerate(lengths)]
    allowed[np.arange(len(allowed)), np.concatenate(chosen)] = True
    return Rollout(
        tokens=tokens,
        prompt_len=np.array([prompt for prompt, _ in lengths], dtype=np.int64),
        response_len=response_len,
        finished=np.ones(len(lengths), dtype=bool),
        logprobs=np.zeros((len(lengths), max(1, int(response_len.max()))), dtype=np.float32),
        sampler_logprobs=np.zeros((len(lengths), max(1, int(response_len.max()))), dtype=np.float32),
        prompt_index=np.arange(len(lengths), dtype=np.int64),
        sample_index=np.zeros(len(lengths), dtype=np.int64),
        prompts=[f"prompt {i}" for i in range(len(lengths))],
        responses=[f"response {i}" for i in range(len(lengths))],
        rows=[{"i": i} for i in range(len(lengths))],
        allowed=TokenSets.of(allowed) if masked else None,
        pad_id=pad_id,
    )


def experience_with(rollout: Rollout, tokens: np.ndarray, scores: np.ndarray) -> Experience:
    """PPO's columns: ``tokens`` ``[B, R]`` in each that has a number per token, ``scores`` ``[B]`` as the scores."""
    per_token = ("logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns")
    return Experience(rollout, scores=scores, shaped_scores=scores, **dict.fromkeys(per_token, tokens))


def metric_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_metrics(first: list[dict], second: list[dict], tolerance: float) -> None:
    """Equal but for what depends on time."""
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one["step"] == other["step"]
        for key, value in one.items():
            if key.startswith(("train/", "eval/")) and "seconds" not in key:
                assert other[key] == pytest.approx(value, abs=tolerance, rel=tolerance), (one["step"], key)
