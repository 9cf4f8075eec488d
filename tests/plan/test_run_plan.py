"""``alignment plan``: the shipped files, the report, the advice, errors for people, and the page."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment import methods
from alignment.arguments import PPOArguments, RewardArguments, SFTArguments
from alignment.errors import ArgumentsError, ModelError
from alignment.plan import run_plan
from alignment.plan.cards import CARDS, GIB


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run_plan.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def peak(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {phase["phase"]: phase["bytes"] for phase in found["memory"][0]["phases"]}


def test_the_reference_s_file_is_planned_by_the_names_of_its_models(
    repo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_plan.main([str(repo / "config/llama/ppo_argument.json")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("PPO: tensor 2 x sharding stage 1 of 4 (8 processes)")
    for words in ("actor      llama of 6.74 billion", "It fits:", "generate", "critic_values", "KV cache", "moved out"):
        assert words in text


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("config/llama/ppo_argument.json", "ppo"),
        ("config/llama/rm_argument.json", "reward"),
        ("config/llama/sft_argument.json", "sft"),
        ("config/demo/ppo_argument.json", "ppo"),
        ("config/demo/rm_argument.json", "reward"),
        ("config/demo/sft_argument.json", "sft"),
    ],
)
def test_every_stage_is_told_by_its_keys(repo: Path, capsys: pytest.CaptureFixture[str], file: str, stage: str) -> None:
    found = plan(capsys, str(repo / file), "--model_config", "Llama-2-7b", "--cards", "8")
    assert found["stage"] == stage
    assert found["peak_bytes"] > found["reserved_bytes"]
    assert found["seconds"] > 0
    assert len(found["memory"][0]["phases"]) == (6 if stage == "ppo" else 1)
    assert found["setting"]["roles"][0]["head"] == ("score" if stage == "reward" else "lm")


def test_files_that_do_not_tell_are_refused() -> None:
    with pytest.raises(ArgumentsError, match="--method sft or reward"):
        run_plan.stage_of(["model_name_or_path", "output_dir", "max_length"], "x.json")
    with pytest.raises(ArgumentsError, match="names no model"):
        run_plan.stage_of(["output_dir"], "x.json")
    assert run_plan.stage_of(["model_name_or_path", "src_length"], "x") is SFTArguments
    assert run_plan.stage_of(["model_name_or_path", "loss_type"], "x") is RewardArguments
    assert run_plan.stage_of(["actor_model_name_or_path"], "x") is PPOArguments


@pytest.fixture
def llama(repo: Path) -> str:
    return str(repo / "config/llama/ppo_argument.json")


def test_offloading_empties_the_phases_that_do_not_need_it(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    none = peak(plan(capsys, llama, "offload_level="))
    every = peak(plan(capsys, llama, "offload_level=freeze_model optimizer train_model"))
    seven = 2 * 6.74e9 / 2
    assert none["generate"]["parameters"] == pytest.approx(4 * seven, rel=0.05)
    assert every["generate"]["parameters"] == pytest.approx(seven, rel=0.05)
    assert every["generate"]["optimizer"] == 0 < none["generate"]["optimizer"]
    assert every["update"]["optimizer"] == none["update"]["optimizer"]


def test_layouts_change_what_they_should(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    two = peak(plan(capsys, llama))
    four = peak(plan(capsys, llama, "tensor_parallel_degree=4", "sharding_parallel_degree=2"))
    third = peak(plan(capsys, llama, "sharding=stage3"))
    assert four["generate"]["kv_cache"] == pytest.approx(two["generate"]["kv_cache"] / 2)
    assert four["generate"]["parameters"] == pytest.approx(two["generate"]["parameters"] / 2, rel=0.1)
    assert third["actor_logprobs"]["parameters"] < two["actor_logprobs"]["parameters"] / 3
    longer = peak(plan(capsys, llama, "max_dec_len=1024"))
    assert longer["generate"]["kv_cache"] == pytest.approx(1.5 * two["generate"]["kv_cache"])


def test_the_advice_fits_and_is_what_it_says(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [llama, "--memory", "44", "offload_level="]
    found = plan(capsys, *words)
    assert not found["fits"]
    advice = found["advice"]
    assert advice["fits"] and advice["peak_bytes"] <= 44 * GIB < found["peak_bytes"]
    again = plan(capsys, *words, *advice["arguments"])
    assert again["fits"]
    assert again["peak_bytes"] == advice["peak_bytes"]
    assert again["seconds"] == pytest.approx(advice["seconds"])
    single = [other for other in found["alternatives"] if other["fits"]]
    assert min(single, key=lambda other: other["seconds_per_row"]) == advice


def test_changes_are_made_together_where_none_is_enough(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [llama, "--memory", "36", "offload_level="]
    found = plan(capsys, *words)
    assert not any(other["fits"] for other in found["alternatives"])
    assert found["advice"]["fits"] and "--cards" not in found["advice"]["arguments"]
    again = plan(capsys, *words, *found["advice"]["arguments"])
    assert again["peak_bytes"] == found["advice"]["peak_bytes"] <= 36 * GIB


def test_more_cards_are_asked_for_when_nothing_else_helps(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(repo / "config/llama/ppo_argument.json")
    words = [file, "--model_config", "Llama-2-70b", "--cards", "8", "offload_level=freeze_model"]
    found = plan(capsys, *words)
    assert not found["fits"]
    arguments = found["advice"]["arguments"]
    assert int(arguments[arguments.index("--cards") + 1]) >= 16
    assert plan(capsys, *words, *arguments)["peak_bytes"] == found["advice"]["peak_bytes"]
    assert run_plan.main(words) == 0
    assert "A change that makes it fit: --cards" in capsys.readouterr().out


def test_changes_are_made_on_the_same_cards(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(repo / "config/llama/rm_argument.json"), "--card", "v100-32g"]
    found = plan(capsys, *words)
    assert found["layout"]["processes"] == 4 and not found["fits"]
    again = plan(capsys, *words, *found["advice"]["arguments"])
    assert again["layout"]["processes"] == 4
    assert again["peak_bytes"] == found["advice"]["peak_bytes"]


METHOD = """
from dataclasses import replace

from alignment.flow.flow import Call, Flow
from alignment.flow.online import ACTOR, OnlineMethod


class BestOfTwo(OnlineMethod):
    name, title, summary, base, Keys = "best_of_two", "Best of two", "learns from the better answer", "online", None

    def roles(self):
        return [ACTOR, self.reward_model]

    def flow(self):
        calls = [
            Call("generate", "generate", ("actor",), ("prompts",), "rollout"),
            Call("reward_scores", "infer", ("reward",), ("rollout",), "scores"),
            Call("update", "train", ("actor",), ("rollout", "scores"), "stats"),
        ]
        return Flow(calls, inputs=("prompts",))
"""


def test_any_method_is_planned_by_its_own_roles_and_flow(
    llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(METHOD)
    (tmp_path / "file.json").write_text(
        json.dumps({"actor_model_name_or_path": "Llama-2-7b", "reward_model_name_or_path": "beaver-7b"})
    )
    words = [str(tmp_path / "file.json"), "train_datasets=alpaca", "output_dir=o", "--cards", "1", "--card", "h200"]
    mine, ppo = plan(capsys, *words, "--method", f"{tmp_path}/mine.py:BestOfTwo"), plan(capsys, *words)
    assert mine["stage"] == "best_of_two"
    assert [role["name"] for role in mine["setting"]["roles"]] == ["actor", "reward"]
    assert list(peak(mine)) == [phase["phase"] for phase in mine["time"]] == ["generate", "reward_scores", "update"]
    # neither a reference nor a critic with its optimizer
    assert peak(mine)["update"]["parameters"] == pytest.approx(peak(ppo)["update"]["parameters"] / 2, rel=0.02)
    assert peak(mine)["update"]["optimizer"] == pytest.approx(peak(ppo)["update"]["optimizer"] / 2, rel=0.02)
    assert ppo["stage"] == "ppo" and ppo["seconds"] > mine["seconds"]


@pytest.mark.parametrize("name", methods.BUILT_IN)
def test_every_method_is_planned(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.json").write_text(json.dumps({"train_datasets": "alpaca", "output_dir": "o"}))
    named = methods.arguments_of(methods.find_method(name)).specs()
    models = [f"{key}=beaver-7b" for key in named if key.endswith("model_name_or_path")]
    found = plan(capsys, str(tmp_path / "file.json"), *models, "--method", name, "--cards", "1")
    assert found["stage"] == methods.arguments_of(methods.find_method(name)).STAGE
    assert "update" in peak(found) or "train" in peak(found)


def planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, *words: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The plan of a method for a 7-billion-parameter actor and reward model on one card, and its times by phase."""
    models = {"actor_model_name_or_path": "Llama-2-7b", "reward_model_name_or_path": "beaver-7b"}
    common = {"train_datasets": "alpaca", "output_dir": "o", "max_length": 512, "per_device_train_batch_size": 8}
    (tmp_path / "file.json").write_text(json.dumps({**models, **common}))
    found = plan(capsys, str(tmp_path / "file.json"), *words, "--method", name, "--cards", "1", "--card", "h200")
    return found, {phase["phase"]: phase for phase in found["time"]}


def test_without_a_kl_there_is_neither_reference_nor_critic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_kl, _ = planned(tmp_path, capsys, "grpo", "kl_coeff=0.1")
    without, times = planned(tmp_path, capsys, "grpo", "kl_coeff=0")
    assert [role["name"] for role in without["setting"]["roles"]] == ["actor", "reward"]
    assert list(peak(without)) == list(times) == ["generate", "actor_logprobs", "reward_scores", "update"]
    two, three = peak(without)["update"]["parameters"], peak(with_kl)["update"]["parameters"]
    assert two == pytest.approx(three * 2 / 3, rel=0.02)


def test_a_greedy_answer_to_each_prompt_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ReMax's baseline: a fourth of the sampled answers' work, and of the passes over them."""
    found, times = planned(tmp_path, capsys, "remax", "num_return_sequences=4", "rollout_token_budget=10000000")
    assert times["greedy_generate"]["flops"] < 0.4 * times["generate"]["flops"]
    assert times["greedy_reward_scores"]["flops"] == pytest.approx(times["reward_scores"]["flops"] / 4)
    assert peak(found)["greedy_generate"]["kv_cache"] < 0.5 * peak(found)["generate"]["kv_cache"]


def test_a_masking_policy_reads_every_token_too_and_is_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rollout_token_budget=4096", "offload_level=freeze_model optimizer train_model"]
    ppo, ppos = planned(tmp_path, capsys, "ppo", *words)
    found, times = planned(tmp_path, capsys, "nlpo", *words)
    assert list(peak(found)) == list(times) == [*peak(ppo), "mask_update"]
    assert peak(found)["generate"]["kv_cache"] == 2 * peak(ppo)["generate"]["kv_cache"]
    for phase, models in (("generate", 2), ("actor_logprobs", 1), ("mask_update", 2)):
        assert peak(found)[phase]["parameters"] == models * peak(ppo)["generate"]["parameters"], phase
    assert times["generate"]["flops"] == pytest.approx(2 * ppos["generate"]["flops"])
    assert times["mask_update"]["seconds"] > 0 == times["mask_update"]["flops"]
    alone, _ = planned(tmp_path, capsys, "nlpo", "top_mask=-1")
    assert list(peak(alone)) == list(peak(ppo))


def test_a_reward_model_that_a_rollout_asks_is_there_and_reads_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GRPO's dynamic sampling scores while it generates."""
    _, apart = planned(tmp_path, capsys, "grpo")
    found, times = planned(tmp_path, capsys, "grpo", "dynamic_sampling=true", "offload_level=freeze_model")
    assert "reward_scores" not in times
    assert times["generate"]["flops"] == pytest.approx(apart["generate"]["flops"] + apart["reward_scores"]["flops"])
    assert peak(found)["generate"]["parameters"] == pytest.approx(
        2 * peak(found)["actor_logprobs"]["parameters"], rel=0.02
    )


THRICE = """
from dataclasses import replace

from alignment.arguments.critic_keys import CriticKeys
from alignment.methods.ppo import PPO


class Thrice(PPO):
    name, title, summary, Arguments, Keys = "thrice", "Thrice", "learns three times", None, CriticKeys

    def flow(self):
        flow = super().flow()
        return flow.edit(change={"update": {"run": replace(flow["update"].run, passes=3)}})
"""


def test_a_methods_own_number_of_passes_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(THRICE)
    _, once = planned(tmp_path, capsys, "ppo", "update_iters=1")
    _, thrice = planned(tmp_path, capsys, f"{tmp_path}/own.py:Thrice", "update_iters=1")
    assert thrice["update"]["flops"] == pytest.approx(3 * once["update"]["flops"])


def test_adapters_alone_have_gradients_and_an_optimizer(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(repo / "config/llama/sft_argument.json"), "--cards", "1"]
    whole, lora = peak(plan(capsys, *words)), peak(plan(capsys, *words, "lora=true", "lora_rank=8"))
    # rank 8 on the seven matrices of 32 layers, (in + out) each
    adapters = 8 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert lora["train"]["gradients"] == 4 * adapters  # summed in float32
    assert lora["train"]["optimizer"] == 12 * adapters + 8 * 7 * 32
    assert lora["train"]["parameters"] == whole["train"]["parameters"] + 2 * adapters


def test_a_card_of_one_s_own(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = plan(capsys, llama), plan(capsys, llama, "--tflops", "1000", "--bandwidth", "8000", "--memory", "192")
    assert fast["seconds"] < slow["seconds"]
    assert fast["card"]["memory"] == 192


def test_the_cpu_computes_in_float32(repo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(repo / "config/llama/ppo_argument.json")
    found = plan(capsys, file, "--card", "cpu", "--model_config", "TinyLlama-1.1B")
    assert found["setting"]["item"] == 4
    assert any("float32" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--card", "h900"], ArgumentsError, "unknown card"),
        (["--memory", "-1"], ArgumentsError, "greater than 0"),
        (["tensor_parallel_degree=3", "--cards", "8"], ArgumentsError, "are needed, but the run has 8"),
        (["sharding=stage3", "pipeline_parallel_degree=2", "--cards", "16"], ArgumentsError, "stage3 with a pipeline"),
        (["learning_rat=1"], ArgumentsError, "learning_rate"),
        (["actor_model_name_or_path=checkpoints/mine"], ModelError, "--model_config"),
        (["--model_config", "gemma-2b"], ModelError, "tensor and pipeline parallelism"),
    ],
)
def test_errors_say_what_is_wrong(llama: str, words: list[str], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        run_plan.main([llama, *words])


def test_no_paddle_is_loaded(repo: Path) -> None:
    code = (
        "import sys; from alignment.plan import run_plan; "
        "run_plan.main(['config/llama/ppo_argument.json', '--json']); assert 'paddle' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repo, check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_the_page_has_the_cards_as_they_are(repo: Path) -> None:
    page = (repo / "docs/plan.md").read_text()
    for card in CARDS.values():
        row = f"| {card.name} | {card.memory:g} | {card.reserved:g} | {card.tflops:g}, {card.tflops_float32:g} | "
        row += f"{card.bandwidth:g} | {card.link:g}, {card.network:g}, {card.host_link:g} |"
        assert row in page, row
