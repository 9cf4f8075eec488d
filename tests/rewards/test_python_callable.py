"""A user's function as a reward: how it is found and called, and what is said when it fails."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from alignment.arguments import parse_ppo
from alignment.errors import AlignmentError, RewardError
from alignment.rollout.rewards import RewardBatch, WeightedRewards, resolve_rewards
from alignment.rollout.rewards.python_callable import PythonReward

BATCH = RewardBatch(
    prompts=["first prompt", "second prompt", "third prompt"],
    responses=["first response", "second response", "third response"],
    rows=[{"answer": "a", "level": 1}, {"answer": "b", "level": 2}, {"answer": "c"}],
)


def score(function, batch: RewardBatch = BATCH) -> list[float]:
    return PythonReward("mine", function).score(batch).tolist()


# ---- what the function gets --------


def test_it_gets_only_the_columns_it_names() -> None:
    def f(prompts, responses, answer):
        assert (prompts, responses, answer) == (BATCH.prompts, BATCH.responses, ["a", "b", "c"])
        return [1, 2, 3]

    assert score(f) == [1, 2, 3]


def test_double_star_gets_all_columns_and_none_where_a_row_has_none() -> None:
    def f(prompts, responses, **row):
        assert row == {"answer": ["a", "b", "c"], "level": [1, 2, None]}
        return [1.0] * 3

    assert score(f) == [1, 1, 1]


def test_defaults_stand_for_columns_that_are_not_there() -> None:
    def f(prompts, responses, *, colour="red", level=None):
        assert (colour, level) == ("red", [1, 2, None])
        return [0.5] * 3

    assert score(f) == [0.5] * 3


def test_by_name_whatever_the_order() -> None:
    def f(responses, prompts):
        assert (prompts, responses) == (BATCH.prompts, BATCH.responses)
        return [0, 0, 0]

    assert score(f) == [0, 0, 0]


def test_trls_name_for_responses() -> None:
    def f(completions, **kwargs):
        assert completions == BATCH.responses
        assert kwargs["prompts"] == BATCH.prompts
        assert "responses" not in kwargs
        return [0, 0, 0]

    assert score(f) == [0, 0, 0]


def test_other_names_are_filled_by_position() -> None:
    def f(questions, texts, answer):
        assert (questions, texts, answer) == (BATCH.prompts, BATCH.responses, ["a", "b", "c"])
        return [0, 0, 0]

    assert score(f) == [0, 0, 0]
    assert score(lambda *both: [len(both)] * 3) == [2, 2, 2]


def test_a_column_called_like_a_parameter_of_ours_does_not_hide_it() -> None:
    def f(prompts, responses, **row):
        assert (prompts, responses) == (["p"], ["r"])
        return [1]

    assert score(f, RewardBatch(["p"], ["r"], [{"prompts": "x", "responses": "y"}])) == [1]


def test_changing_what_it_got_changes_nothing_here() -> None:
    def f(prompts, responses, **row):
        prompts.clear()
        responses.sort(reverse=True)
        return [0, 0, 0]

    score(f)
    assert len(BATCH.prompts) == 3
    assert BATCH.responses[0] == "first response"


def test_callable_objects_and_partials() -> None:
    class Scorer:
        def __call__(self, prompts, responses):
            return [3.0] * len(responses)

    def f(prompts, responses, weight):
        return [weight] * len(responses)

    assert score(Scorer()) == [3, 3, 3]
    assert score(functools.partial(f, weight=2)) == [2, 2, 2]


# ---- what it may return
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        [1, 0, 1],
        (1.0, 0.0, 1.0),
        [True, False, True],
        np.array([1, 0, 1]),
        list(np.float64([1, 0, 1])),
        np.bool_([1, 0, 1]),
    ],
)
def test_numbers_of_all_kinds(values: object) -> None:
    assert score(lambda prompts, responses: values) == [1, 0, 1]


def test_a_tensor() -> None:
    import paddle

    assert score(lambda prompts, responses: paddle.to_tensor([1.0, 0.0, 1.0])) == [1, 0, 1]
    assert score(lambda prompts, responses: [paddle.to_tensor(1.0)] * 3) == [1, 1, 1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "returned None; it must return a list of 3 numbers, one per response"),
        (1.0, r"returned 1.0 \(float\)"),
        ("abc", r"returned 'abc' \(str\)"),
        ({"reward": [1, 2, 3]}, r"\(dict\)"),
        ((x for x in (1, 2, 3)), r"\(generator\)"),
        ([1, 2], "returned 2 numbers for 3 responses"),
        ([1, 2, 3, 4], "returned 4 numbers for 3 responses"),
        ([], "returned 0 numbers for 3 responses"),
        (np.zeros((3, 1)), r"array of shape \[3, 1\]"),
        (np.float64(3), r"shape \[\]|\(float64\)"),
        ([1, None, 3], "gave None instead of a number for sample 1"),
        ([1, "2", 3], r"gave '2' \(str\) instead of a number for sample 1"),
        ([1, [2], 3], r"gave \[2\] \(list\) instead of a number for sample 1"),
        ([1, 2j, 3], r"gave 2j \(complex\) instead of a number for sample 1"),
        ([1, float("nan"), 3], "gave nan, which is not a finite float32, for sample 1"),
        ([1, float("inf"), 3], "gave inf, which is not a finite float32, for sample 1"),
        ([1, -1e39, 3], "gave -1e[+]39, which is not a finite float32, for sample 1"),
        (np.array([1, np.nan, 3]), "gave nan, which is not a finite float32, for sample 1"),
    ],
)
def test_what_is_no_reward_is_an_error_with_the_sample(values: object, message: str) -> None:
    with pytest.raises(RewardError, match=message) as failure:
        score(lambda prompts, responses: values)
    text = str(failure.value)
    assert text.startswith("reward 'mine' ")
    if "for sample 1" in text:
        assert "prompt   [1]: second prompt\n  response [1]: second response" in text


def test_long_samples_are_cut() -> None:
    batch = RewardBatch(["p" * 5000], ["line one\nline two"], [{}])
    with pytest.raises(RewardError) as failure:
        score(lambda prompts, responses: [None], batch)
    text = str(failure.value)
    assert len(text) < 800
    assert "pppp ... pppp" in text
    assert "line one\\nline two" in text


# ---- failures in the user's code
# -----------------------------------------------------------------------------------------

FAILING = """
def helper(response):
    return int(response.split()[0])

def in_loop(prompts, responses, **row):
    scores = []
    for prompt, response in zip(prompts, responses):
        if response == "second response":
            raise KeyError("no such thing")
        scores.append(1.0)
    return scores

def at_once(prompts, responses):
    import json
    return json.loads("{")

def in_helper(prompts, responses):
    scores = []
    for text in responses:
        scores.append(helper(text))
    return scores
"""


@pytest.fixture
def failing(tmp_path: Path) -> Path:
    file = tmp_path / "failing_rewards.py"
    file.write_text(FAILING)
    return file


def failure_of(file: Path, name: str, batch: RewardBatch = BATCH) -> RewardError:
    with pytest.raises(RewardError) as failure:
        resolve_rewards(f"{file}:{name}").score(batch)
    return failure.value


def test_an_exception_names_reward_type_and_line(failing: Path) -> None:
    error = failure_of(failing, "in_loop")
    text = str(error)
    assert "in_loop' failed: KeyError: 'no such thing'" in text
    assert f'{failing}, line 9 (raise KeyError("no such thing"))' in text
    assert "in a batch of 3. Its first sample:\n  prompt   [0]: first prompt" in text
    assert isinstance(error.__cause__, KeyError)


def test_the_line_is_the_users_and_not_a_librarys(failing: Path) -> None:
    text = str(failure_of(failing, "at_once"))
    assert "failed: JSONDecodeError" in text
    assert f"{failing}, line 15" in text
    assert "in a batch of 3. Its first sample:\n  prompt   [0]: first prompt" in text


def test_a_failure_names_the_right_sample_or_none(failing: Path) -> None:
    """rl 20: which of several samples was at fault cannot be told, so none is blamed; of one it is that one."""
    batch = RewardBatch(["one prompt", "two prompt"], ["1 ok", "x bad"], [{}, {}])
    text = str(failure_of(failing, "in_helper", batch))
    assert "failed: ValueError" in text
    assert f"{failing}, line 3" in text
    assert "worked on sample" not in text and "in a batch of 2" in text
    text = str(failure_of(failing, "in_helper", RewardBatch(["two prompt"], ["x bad"], [{}])))
    assert "on this sample:" in text and "response [0]: x bad" in text


def test_a_missing_column_is_named_with_those_there_are() -> None:
    def f(prompts, responses, solution, hint):
        return [0, 0, 0]

    with pytest.raises(RewardError, match="needs the columns 'solution', 'hint', .* they have: 'answer', 'level'"):
        score(f)


def test_an_error_that_speaks_for_itself_is_not_wrapped() -> None:
    def f(prompts, responses):
        raise RewardError("row 7 has no answer")

    with pytest.raises(RewardError, match="^row 7 has no answer$"):
        score(f)


def test_ctrl_c_in_a_reward_is_ctrl_c() -> None:
    def f(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(f)


# ---- functions that cannot be called like this
# -----------------------------------------------------------------------------


async def asynchronous(prompts, responses):
    return [0.0]


def generating(prompts, responses):
    yield 0.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "not a function"),
        (asynchronous, "async function or a generator"),
        (generating, "async function or a generator"),
        (lambda: [0.0], "does not take prompts and responses"),
        (lambda text: [0.0], "does not take prompts and responses"),
        (lambda prompts: [0.0], "has no parameter `responses`"),
        (lambda prompts, response: [0.0], "has no parameter `responses`"),
    ],
)
def test_wrong_functions_are_refused_before_the_run(function: object, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        PythonReward("mine", function)


# ---- loading --------

GOOD = "def helpfulness(prompts, responses, **row):\n    return [float(len(r)) for r in responses]\nNUMBER = 3\n"


def test_a_file_in_the_current_folder_then_beside_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, beside = tmp_path / "here", tmp_path / "beside"
    here.mkdir()
    beside.mkdir()
    (beside / "my_rewards.py").write_text(GOOD)
    monkeypatch.chdir(here)
    values = {
        "output_dir": "out", "actor_model_name_or_path": "m", "train_datasets": "a",
        "reward": "my_rewards.py:helpfulness",
    }  # fmt: skip

    (beside / "ppo.json").write_text(json.dumps(values))

    def found() -> WeightedRewards:
        return resolve_rewards(parse_ppo([str(beside / "ppo.json")]).reward)

    assert found().score(BATCH).parts["helpfulness"].tolist() == [14, 15, 14]
    (here / "my_rewards.py").write_text(GOOD.replace("float(len(r))", "1.0"))
    assert found().score(BATCH).total.tolist() == [1, 1, 1]


def test_a_modules_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reward_module_for_test.py").write_text(GOOD)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_rewards("reward_module_for_test:helpfulness").score(BATCH).total.tolist() == [14, 15, 14]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.py:f", "there is no such file"),
        ("my_rewards.py", "name the function too"),
        ("my_rewards.py:", "name the function too"),
        ("my_rewards.py:helpfulnes", "helpfulness"),
        ("my_rewards.py:NUMBER", "is 3 .*not a function"),
        ("there_is_no_such_module:f", "there_is_no_such_module"),
        ("broken.py:f", "broken.py"),
    ],
)
def test_what_cannot_be_loaded_is_named(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(GOOD)
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlignmentError, match=message) as failure:
        resolve_rewards(spec)
    assert "Traceback" not in str(failure.value)


def test_a_missing_column_is_decided_by_all_rows_and_not_by_a_batch() -> None:
    """rl 19: a batch that happens to hold rows of one kind only gets None for the others' column."""
    seen = []

    def f(prompts, responses, want):
        seen.append(want)
        return [0.0] * len(responses)

    reward = PythonReward("f", f)
    reward.settle_columns(["want", "level"])
    reward.score(RewardBatch(["a"], ["b"], [{"level": 1}]))
    reward.score(RewardBatch(["a"], ["b"], [{"want": "x"}]))
    assert seen == [[None], ["x"]]
    with pytest.raises(RewardError, match="needs the column 'want', .* did you mean 'wants'"):
        PythonReward("f", f).settle_columns(["wants", "level"])


def test_a_function_may_ask_for_the_answers_tokens() -> None:
    """P9: beside the text, by the name `response_ids`."""
    from tests.ppo.conftest import make_rollout

    def f(prompts, responses, response_ids):
        return [float(len(ids)) for ids in response_ids]

    rollout, reward = make_rollout([(2, 3), (4, 1)]), PythonReward("f", f)
    reward.settle_columns([])
    batch = RewardBatch.from_rollout(rollout)
    assert reward.score(batch).tolist() == [3.0, 1.0]
    assert batch.response_ids()[0] == rollout.tokens[0, 2:5].tolist()
    with pytest.raises(RewardError, match="this batch has only texts"):
        reward.score(RewardBatch(["a"], ["b"], [{}]))
