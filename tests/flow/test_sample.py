"""One row of a run is shown as each model reads it, and its ids are compared with the tokenizer's own file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import alignment.log
from alignment.errors import DataError
from alignment.flow.sample import show_sample
from alignment.ppo.data import PreferenceDataset, PromptOnlyDataset, SupervisedDataset
from alignment.ppo.models import load_tokenizer
from tests.published import FAMILIES, write_model, write_tokenizer
from tests.tiny import write_jsonl

QUESTION = "How many?\n 12 🙂"
ROWS = {
    SupervisedDataset: [
        {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "three"}]}
    ],
    PreferenceDataset: [{"prompt": QUESTION, "chosen": "three", "rejected": "four"}],
    PromptOnlyDataset: [{"prompt": QUESTION}],
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """All that was logged."""
    monkeypatch.setattr(alignment.log, "_SAID", set())
    monkeypatch.setattr(alignment.log.get_logger(), "propagate", True)
    caplog.set_level("INFO", logger="alignment")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def dataset(kind: Any, tokenizer: Any, folder: Path, **options: Any) -> Any:
    file = write_jsonl(folder / "rows.jsonl", ROWS[kind])
    return kind(f"jsonl::{file}", tokenizer, show_progress=False, **options)


def test_what_is_shown(tmp_path: Path, said: Callable[[], str]) -> None:
    """P6, P12 (the rule): roles, text and the trained part, decoded from the ids."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", "smollm2"))
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n"
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    show_sample(dataset(SupervisedDataset, tokenizer, tmp_path), "SFT model")
    assert f"is trained):\n{prompt}[[T: three<|im_end|>]]" in said() and "sample as the SFT model reads it (" in said()
    show_sample(dataset(PreferenceDataset, tokenizer, tmp_path), "reward model", with_ids=True)
    assert f"better: {prompt}[[T: three<|im_end|>]]\nids: [" in said() and "worse: [[T: four<|im_end|>]]" in said()
    show_sample(dataset(PromptOnlyDataset, tokenizer, tmp_path), "actor, critic", what=" [[the actor's answer]]")
    assert f"{prompt} [[the actor's answer]]" in said()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_families_pass(tmp_path: Path, said: Callable[[], str], family: str) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", family))
    for kind in ROWS:
        show_sample(dataset(kind, tokenizer, tmp_path), "model")
    assert "would have other tokens" not in said()


def test_other_ids_than_the_files_stop_the_run(tmp_path: Path) -> None:
    """D1, D2: the first place is named."""
    folder = write_tokenizer(tmp_path / "t", "qwen3")
    rows = dataset(SupervisedDataset, load_tokenizer(folder), tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:  # as the slow classes read it: white space around special tokens goes
        token["rstrip"] = token["special"]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"SFT model: the tokenizer that trains and .*first after '.*12 .*<\|im_end\|>'"
    ):
        show_sample(rows, "SFT model")


def test_a_border_inside_a_token_is_said(tmp_path: Path, said: Callable[[], str]) -> None:
    """Prompt and answer are kept apart where a token would reach over their border."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "t", "smollm2"))
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}th{% endif %}"
    with pytest.raises(DataError):  # the header is not before the answer in the finished turn
        dataset(SupervisedDataset, tokenizer, tmp_path, template="{{ messages[0].content }}")
    template = "{% for m in messages %}{{ m.content + 'th' if m.role == 'user' else m.content }}{% endfor %}"
    rows = [{"src": "so ", "tgt": "e dog"}]
    file = write_jsonl(tmp_path / "border.jsonl", rows)
    show_sample(SupervisedDataset(f"jsonl::{file}", tokenizer, template=template, show_progress=False), "SFT model")
    assert "the text as a whole would have other tokens" in said() and "[[T: e dog<|im_end|>]]" in said()


def test_a_reward_model_of_another_family_reads_its_own_template(tmp_path: Path, said: Callable[[], str]) -> None:
    """D7, P12: by itself, unless reward_prompt_template says otherwise; both readings are shown."""
    from alignment.arguments import parse_ppo
    from alignment.flow.online_run import load_data, show_samples
    from alignment.methods.ppo import PPO

    actor = write_model(tmp_path / "actor", "qwen2.5")
    reward = write_model(tmp_path / "reward", "llama3", score=True)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", ROWS[PromptOnlyDataset] * 2)

    def run(**more: str) -> str:
        alignment.log._SAID.clear()
        before = len(said())
        args = parse_ppo(
            [
                f"actor_model_name_or_path={actor}",
                f"reward_model_name_or_path={reward}",
                f"reward_critic_model_name_or_path={actor}",
                f"train_datasets=jsonl::{prompts}",
                f"output_dir={tmp_path / 'run'}",
                "max_src_len=400",
                "max_dec_len=20",
                "do_eval=false",
                *(f"{key}={value}" for key, value in more.items()),
            ]
        )
        show_samples(PPO(args), load_data(PPO(args), show_progress=False))
        return said()[before:]

    text = run()
    assert "sample as the actor, critic read it" in text and f"<|im_start|>user\n{QUESTION}<|im_end|>" in text
    scored = text.partition("sample as the reward model reads it")[2]
    assert f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>" in scored and "im_start" not in scored
    assert scored.rstrip().endswith("(an answer)<|eot_id|>")
    assert "reward model's prompt template: the tokenizer's chat template" in text
    assert "reward model: " in text and "its tokenizer" in text  # rl.md 8: for every role
    assert "ASSISTANT:(an answer)<|eot_id|>" in run(reward_prompt_template="beaver").partition("reward model reads")[2]
