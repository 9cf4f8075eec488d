"""What the reward model reads, and what is said of a rollout that teaches nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alignment.cli import main
from alignment.flow.notices import notices
from alignment.ppo.data import PromptTemplate
from alignment.ppo.models import load_tokenizer
from alignment.rollout.rewards import RewardBatch
from alignment.rollout.rewards.reward_model import RewardModelScorer
from alignment.rollout.rollout import Experience

from .conftest import experience_with, make_rollout, metric_rows


class Reads:
    """Stands for the reward model: remembers what it reads."""

    def score_rows(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        self.rows = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
        return np.zeros(len(lengths), dtype=np.float32)


def rollout_of(tokenizer: Any, answers: list[tuple[str, bool, str]]) -> Any:
    """Rows of ``(what was sampled, whether it ended by itself, its text)`` behind the template's prompt."""
    prompt = PromptTemplate.resolve(None, tokenizer).format_prompt("say the word")
    head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    bodies = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _, _ in answers]
    rollout = make_rollout([(len(head), len(body)) for body in bodies])
    tokens = rollout.tokens.copy()
    for row, body in zip(tokens, bodies, strict=True):
        row[: len(head) + len(body)] = head + body
    return rollout.add("token", tokens=tokens).add(
        finished=np.array([finished for _, finished, _ in answers]),
        prompts=["say the word"] * len(answers),
        responses=[text for _, _, text in answers],
        rows=[{} for _ in answers],
    )


def test_a_stopped_answer_reads_the_same_on_both_ways(policy_dir: Path) -> None:
    """rl 11: text before the stop string, then eos, whether the reward model has the actor's tokenizer or its own."""
    tokenizer = load_tokenizer(policy_dir)
    template = PromptTemplate.resolve(None, tokenizer)
    eos = tokenizer.eos_token
    rollout = rollout_of(
        tokenizer, [("a b\n\nUSER", True, "a b"), ("c d" + eos, True, "c d"), ("a b c", False, "a b c")]
    )
    read = []
    for anew in (False, True):
        role = Reads()
        scorer = RewardModelScorer(role, tokenizer, template, (0,), 100, anew=anew)
        scorer(RewardBatch.from_rollout(rollout))
        assert scorer.figures["truncated"].tolist() == [0, 0, 0]
        read.append([tokenizer.decode(row) for row in role.rows])
    assert read[0] == read[1]
    assert [text.partition("ASSISTANT:")[2] for text in read[0]] == ["a b" + eos, "c d" + eos, "a b c"]


def test_texts_beyond_the_reward_models_context_are_cut_and_counted(policy_dir: Path) -> None:
    """rl 10: a policy's text stops no run."""
    tokenizer = load_tokenizer(policy_dir)
    template, role = PromptTemplate.resolve(None, tokenizer), Reads()
    rollout = rollout_of(tokenizer, [("a b c d " * 30, False, "a b c d " * 30), ("a", False, "a")])
    scorer = RewardModelScorer(role, tokenizer, template, (0,), 40, anew=True)
    scorer(RewardBatch.from_rollout(rollout))
    assert scorer.figures["truncated"].tolist() == [1, 0]
    assert len(role.rows[0]) == 40


def experience_of(scores: list[float], finished: bool = True, text: str = "yes") -> Experience:
    rollout = make_rollout([(2, 2)] * len(scores))
    rollout = rollout.add(finished=np.full(len(scores), finished), responses=[text] * len(scores))
    zeros, shaped = np.zeros((len(scores), 2), np.float32), np.array(scores, np.float32)
    return experience_with(rollout, zeros, shaped)


ARGS = SimpleNamespace(clip_range_score=50.0, max_dec_len=9, top_k=3, top_p=1.0)


@pytest.mark.parametrize(
    ("experience", "figures", "kept", "kind", "words"),
    [
        (experience_of([60, 100]), {"reward/clipped_fraction": 1.0}, None, "clipped", "clip_range_score 50 cuts 100%"),
        (experience_of([60, 100]), {"reward/clipped_fraction": 1.0}, None, "clipped", "range from 60 to 100"),
        (experience_of([1, 2], finished=False), {}, None, "cut", "all 2 were cut at max_dec_len 9"),
        (experience_of([1, 2], text=" \n"), {}, None, "empty", "all 2 answers of this rollout are empty"),
        (
            experience_of([1, 2]),
            {"reward/truncated_fraction": 0.4},
            None,
            "reward truncated",
            "the reward model's context",
        ),
        (
            experience_of([1, 2]),
            {"cost/truncated_fraction": 0.4},
            None,
            "cost truncated",
            "40% of the texts are longer",
        ),
        (experience_of([1, 2]), {}, 0.3, "narrow", "top_k 3 and top_p 1 leave 30%"),
    ],
)
def test_what_spoils_learning_is_said_with_its_key(
    experience: Experience, figures: dict[str, float], kept: float | None, kind: str, words: str
) -> None:
    """P13 and its kind."""
    assert words in notices(experience, figures, ARGS, kept)[kind]


def test_nothing_is_said_of_a_sound_rollout() -> None:
    assert notices(experience_of([1, 2]), {"reward/clipped_fraction": 0.04}, ARGS, 0.8) == {}


def test_a_clip_that_flattens_the_scores_is_said_once(
    ppo_json: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P13: marks of 0 to 100 under the default clip of 50 are all the same to the policy."""
    marks = tmp_path / "marks.py"
    marks.write_text("def percent(prompts, responses):\n    return [60.0 + i for i in range(len(prompts))]\n")
    file = ppo_json(reward=f"{marks}:percent", normalize_reward=False, max_steps=8, top_k=2, do_eval=False,
                    evaluation_strategy="no", eval_datasets=None)  # fmt: skip
    assert main(["ppo", str(file)]) == 0
    said = capsys.readouterr().err
    assert said.count("clip_range_score 50 cuts 100% of the scores, which range from 60 to 67") == 1
    assert said.count("top_k 2 and top_p 1 leave") == 1
    assert metric_rows(tmp_path / "ppo")[-1]["reward/clipped_fraction"] == 1.0
