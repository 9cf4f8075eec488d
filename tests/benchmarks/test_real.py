"""``make real``: its data, its argument files, how it goes on after an interruption, its report, and a quick run."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment.arguments import parse, parse_ppo, parse_reward, parse_sft
from alignment.errors import AlignmentError, ArgumentsError
from alignment.methods import arguments_of
from alignment.methods.grpo import GRPO
from alignment.paths import CACHE, cache_folder
from benchmarks.real import data, greedy, report, run
from benchmarks.real.fetch import MEMBER, model_file
from config.smollm2.sum_reward import right_sum


def test_sums_come_from_the_seed_and_none_is_on_both_sides() -> None:
    rows = data.sums(1)
    assert rows == data.sums(1) != data.sums(2)

    def numbers(row: dict[str, Any]) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", row["prompt"])]

    assert len(rows["dev"]) == data.HELD_OUT_SUMS and len(rows["train"]) > 2000
    held_out, trained = ({tuple(sorted(numbers(row))) for row in rows[part]} for part in ("dev", "train"))
    assert not held_out & trained
    for row in rows["dev"] + rows["train"]:
        a, b = numbers(row)
        assert 2 <= a <= 49 and 2 <= b <= 49 and row["answer"] == str(a + b)


def test_the_reward_reads_the_last_number() -> None:
    answers = ["54", "26 + 28 = 54.", "54 is 26 + 28", "fifty-four", "", "154", "054"]
    assert right_sum([""] * 7, answers, ["54"] * 7) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_real_rows_where_a_path_gives_them_and_generated_ones_else(tmp_path: Path) -> None:
    data.write(tmp_path / "made", None, None)
    lines = {p.stem: p.read_text(encoding="utf-8").splitlines() for p in (tmp_path / "made").iterdir()}
    assert {name: len(rows) for name, rows in lines.items() if "sums" not in name} == {
        "gsm8k_train": 400, "gsm8k_dev": 100, "hh_train": 600, "hh_dev": 200,
    }  # fmt: skip
    for kind in ("gsm8k", "hh"):
        assert not set(lines[f"{kind}_train"]) & set(lines[f"{kind}_dev"])
    with gzip.open(tmp_path / "own.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"question": f"q{i}", "answer": f"#### {i}", "more": 1}) + "\n" for i in range(600))
    own = data.solutions(tmp_path / "own.jsonl.gz", 1)
    assert {name: len(rows) for name, rows in own.items()} == data.SFT_ROWS
    assert set(own["dev"][0]) == {"question", "answer"}
    with pytest.raises(AlignmentError, match="line 1: the row has no chosen and rejected"):
        data.pairs(tmp_path / "own.jsonl.gz", 1)
    with pytest.raises(AlignmentError, match="gone.jsonl cannot be read"):
        data.pairs(tmp_path / "gone.jsonl", 1)
    (tmp_path / "few.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(AlignmentError, match="few.jsonl has 1 usable rows; 500 are needed"):
        data.solutions(tmp_path / "few.jsonl", 1)


@pytest.mark.parametrize(("name", "parse"), [("sft", parse_sft), ("rm", parse_reward), ("ppo", parse_ppo)])
def test_the_argument_files_parse(name: str, parse: Any) -> None:
    parse([str(run.CONFIG / f"{name}_argument.json")])


def test_grpo_does_the_task_of_ppo_without_critic_and_reference() -> None:
    """Two files, one task: as many sampled answers and optimizer steps, and the same prompts, reward and sampling."""
    ppo = parse_ppo([str(run.CONFIG / "ppo_argument.json")])
    args = parse(arguments_of(GRPO), [str(run.CONFIG / "grpo_argument.json")])
    assert not args.remarks and [role.name for role in GRPO(args).roles() if role.present] == ["actor"]
    answers = args.per_device_prompt_batch_size * args.num_return_sequences
    assert answers == ppo.per_device_prompt_batch_size * ppo.num_return_sequences
    same = ("train_datasets", "eval_datasets", "reward", "prompt_template", "max_dec_len", "temperature", "top_p")
    same += ("per_device_train_batch_size", "update_iters", "max_steps", "eval_steps", "seed")
    assert {key: getattr(args, key) for key in same} == {key: getattr(ppo, key) for key in same}


def test_an_interrupted_stage_goes_on_and_a_finished_one_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = run.parse(["--output_dir", str(tmp_path), "--seeds", "3,4", "--only", "grpo,ppo,rm"])
    assert run.stages(options) == ["rm", "ppo-3", "ppo-4", "grpo-3", "grpo-4"]
    assert {"seed=4", f"output_dir={tmp_path / 'grpo-4'}"} <= set(run.overrides("grpo-4", tmp_path, options))
    changed = run.overrides("ppo-3", tmp_path, options)
    assert {"seed=3", f"output_dir={tmp_path / 'ppo-3'}", "overwrite_output_dir=true"} <= set(changed)
    assert f"actor_model_name_or_path={tmp_path / 'base'}" in changed
    (tmp_path / "ppo-3" / "checkpoint-20").mkdir(parents=True)
    assert "resume_from_checkpoint=true" in run.overrides("ppo-3", tmp_path, options)
    assert "overwrite_output_dir=true" in run.overrides("ppo-4", tmp_path, options)
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "done.json").write_text('{"quick": false}')
    assert run.run_stage("rm", tmp_path, options) == 0 and "done before" in capsys.readouterr().out
    assert run.overrides("rm", Path(run.WRITTEN_IN), options) == ["overwrite_output_dir=true"]


def test_a_stage_that_fails_is_not_done(tmp_path: Path) -> None:
    options = run.parse(["--output_dir", str(tmp_path)])
    assert run.run_stage("greedy", tmp_path, options) == 2  # there is no model
    assert not (tmp_path / "greedy" / "done.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "sft,dpo"], "dpo is no stage; the stages are greedy, sft, rm, ppo, grpo"),
        (["--seeds", "one"], "--seeds must be numbers"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_wrong_options(argv: list[str], message: str) -> None:
    with pytest.raises(ArgumentsError, match=message):
        run.parse(argv)


def test_the_report_of_two_seeds_and_two_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {
        "seconds": 61.2,
        "cpu_seconds": 93.4,
        "peak_mib": 2048,
        "quick": False,
        "resumed": True,
        "data": {"gsm8k": "g.jsonl", "hh": "h.jsonl"},
    }
    for name, seed in (("ppo-1", 1), ("ppo-2", 2), ("grpo-1", 1)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "done.json").write_text(json.dumps(facts))
        rows: list[dict[str, Any]] = [{"step": 0, "eval/reward": 0.1, "eval/reward_greedy": 0.3}]
        for step in (4, 8):
            row = {"step": step, "time/update_seconds": 2.0, "train/mean_generated_length": 9.0}
            with_critic = {"train/kl_divergence": 1.0, "train/explained_variance": 0.5}
            own = {"train/groups_without_spread": 0.5} if name == "grpo-1" else with_critic
            rows.append(row | {"train/reward": 0.1 * seed} | own)
        rows[-1] |= {"eval/reward": 0.5, "eval/reward_greedy": 0.7}
        rows[0]["eval/mean_generated_length"] = rows[-1]["eval/mean_generated_length"] = 9.0
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        samples = [
            {"step": step, "mode": "greedy", "index": 0, "prompt": "What is 2 + 2?", "response": text, "score": score}
            for step, text, score in ((0, "five", 0.0), (8, "4", 1.0))
        ]
        (folder / "eval_samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (tmp_path / "greedy").mkdir()
    (tmp_path / "greedy" / "done.json").write_text(json.dumps(facts))
    found = {"prompts": 20, "equal": 19, "ties": 1, "tokens": 578, "different": []}
    (tmp_path / "greedy" / "answers.json").write_text(json.dumps(found))
    report.show(tmp_path, [1, 2, 3])
    results = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert list(results) == ["greedy", "ppo-1", "ppo-2", "grpo-1"]
    assert results["ppo-2"]["greedy"] == {"before": 0.3, "after": 0.7} and results["ppo-2"]["kl"] == 1.0
    assert results["grpo-1"]["greedy"] == {"before": 0.3, "after": 0.7} and "kl" not in results["grpo-1"]
    assert results["ppo-1"]["seconds_of_phases"] == {"update": 4.0}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    for text in (
        "20 of 20",
        "five [wrong]",
        "4 [right]",
        "2.0 GiB",
        "61 s",
        "93 s",
        "0.700",
        "was interrupted",
        "ppo-1: greedy answers",
        "grpo-1: greedy answers",
        "4 minutes and 2.0 GiB",
    ):
        assert text in shown


@pytest.mark.slow
def test_a_quick_run_of_every_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real model: greedy answers are transformers' token for token, every stage runs by the ordinary runners on
    rows from the generators, and a second start finds everything done.
    """
    file = model_file()
    assert file == cache_folder() / "models" / Path(MEMBER).name
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))  # unpacked anew, whatever the user's cache holds
    argv = ["--quick", "--seeds", "1", "--output_dir", str(tmp_path / "out"), "--model", str(file)]
    options = run.parse(argv)
    options.gsm8k = options.hh = None
    run.prepare(tmp_path / "out", options)
    for name in run.stages(options):
        assert run.run_stage(name, tmp_path / "out", options) == 0, name
    answers = json.loads((tmp_path / "out" / "greedy" / "answers.json").read_text())
    assert answers["prompts"] == answers["prompts_equal"] == answers["equal"] + answers["ties"] == 20
    assert answers["different"] == [] and greedy.TIE == 1e-3
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/done.json")}
    assert run.main(argv) == 0
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/done.json")}
    results = json.loads((tmp_path / "out" / "results.json").read_text())["stages"]
    assert list(results) == ["greedy", "sft", "rm", "ppo-1", "grpo-1"]
    assert results["sft"]["loss"]["before"] > 0 and results["ppo-1"]["optimizer_steps"] == 2
    assert results["grpo-1"]["optimizer_steps"] == 2 and "kl" not in results["grpo-1"]
    assert all(facts["seconds"] > 0 < facts["cpu_seconds"] and facts["peak_mib"] > 500 for facts in results.values())
