"""Names, errors that list them, and that the losses can be imported without Paddle."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import alignment.losses
from alignment.errors import ArgumentsError
from alignment.losses.aggregation import AGGREGATIONS
from alignment.losses.compat import COMPAT, compat_settings
from alignment.losses.correction import CORRECTIONS
from alignment.losses.estimators import ADVANTAGES, AdvantageOptions
from alignment.losses.kl import KL_CONTROLLERS, KL_ESTIMATORS, kl_estimate, kl_terms
from alignment.losses.policy import LOSS_DEFAULTS, POLICY_LOSSES, PolicyOptions, loss_defaults
from alignment.losses.vocabulary_mask import VOCABULARY_MASKS
from alignment.named import Named
from alignment.runtime import lazy

REGISTRIES = [ADVANTAGES, AGGREGATIONS, CORRECTIONS, KL_CONTROLLERS, KL_ESTIMATORS, POLICY_LOSSES, VOCABULARY_MASKS]


def test_no_module_of_the_losses_loads_paddle() -> None:
    names = [path.stem for path in Path(alignment.losses.__file__).parent.glob("*.py")]
    assert len(names) > 10
    code = "import sys, importlib\n" + "".join(
        f"importlib.import_module('alignment.losses.{name}')\n" for name in names if name != "__init__"
    )
    code += "loaded = [name for name in sys.modules if name.partition('.')[0] == 'paddle']\nassert not loaded, loaded\n"
    # ... and what is called afterwards finds it, without a word on standard error
    code += (
        "from alignment.losses.kl import kl_terms\nimport paddle\n"
        "one = paddle.ones([1, 1])\nassert float(kl_terms(one, one, one)) == 0.0\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_lazy_module_loads_at_first_use() -> None:
    module = lazy("json")
    assert module.loads("[1]") == [1]
    with pytest.raises(AttributeError, match="no attribute 'load_all'"):
        _ = module.load_all
    missing = lazy("there_is_no_such_module")
    with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
        _ = missing.anything


@pytest.mark.parametrize("registry", REGISTRIES, ids=lambda registry: registry.what)
def test_an_unknown_name_lists_the_known_ones(registry: Named) -> None:
    first = next(iter(registry))
    with pytest.raises(ArgumentsError) as caught:
        registry[first + "x"]
    message = str(caught.value)
    assert registry.what in message and repr(first + "x") in message and "did you mean" in message
    assert all(name in message for name in registry)
    assert len(registry) == len(list(registry)) and first in registry and "x" not in registry


def test_a_name_is_not_taken_away() -> None:
    registry: Named = Named("thing")

    @registry.register("a", "b")
    def first() -> None: ...

    def second() -> None: ...

    assert registry["a"] is registry["b"] is first
    assert registry.register("a")(first) is first  # a file that is loaded twice
    with pytest.raises(ArgumentsError, match="thing 'a' is registered twice: by .*first and by .*second"):
        registry.register("a")(second)


def test_unknown_estimators_are_told_by_the_functions_too() -> None:
    import numpy as np
    import paddle

    with pytest.raises(ArgumentsError, match="Known: k1, k2, k3"):
        kl_estimate(np.zeros((1, 1)), np.zeros((1, 1)), "k4")
    one = paddle.ones([1, 1])
    with pytest.raises(ArgumentsError, match="did you mean"):
        kl_terms(one, one, one, "k3-")


def test_every_policy_loss_has_defaults_that_exist() -> None:
    assert LOSS_DEFAULTS.keys() == set(POLICY_LOSSES)
    fields = {field.name for field in dataclasses.fields(PolicyOptions)}
    for values in LOSS_DEFAULTS.values():
        assert values["aggregation"] in AGGREGATIONS
        assert values.keys() - {"aggregation"} <= fields
    assert loss_defaults("gspo") == {"aggregation": "sequence", "clip_range_low": 3e-4, "clip_range_high": 4e-4}
    with pytest.raises(ArgumentsError, match="unknown policy_loss 'gpso'; did you mean 'gspo'"):
        loss_defaults("gpso")


def test_every_compat_setting_is_one_of_a_function_here() -> None:
    fields = {field.name for kind in (AdvantageOptions, PolicyOptions) for field in dataclasses.fields(kind)}
    names = {
        "advantage": ADVANTAGES,
        "policy_loss": POLICY_LOSSES,
        "aggregation": AGGREGATIONS,
        "kl_estimator": KL_ESTIMATORS,
    }
    for methods in COMPAT.values():
        for settings in methods.values():
            assert settings.keys() <= fields | names.keys() | {"kl_log_ratio_clamp", "kl_clamp"}
            assert all(value in names[key] for key, value in settings.items() if key in names)
    assert COMPAT["trl"] is COMPAT["trl1"]
    assert compat_settings("nemo", "grpo")["leave_one_out"]
    assert compat_settings("verl", "grpo")["aggregation"] == "token"
    assert "aggregation" not in compat_settings("verl", "grpo", "gspo")  # always the mean over answers there
    assert compat_settings("trl", "rloo", "rloo")["aggregation"] == "sequence"
    compat_settings("verl", "grpo").clear()
    assert COMPAT["verl"]["grpo"]
    with pytest.raises(ArgumentsError, match="did you mean 'verl'.*\nKnown: .*openrlhf"):
        compat_settings("ver", "grpo")
    with pytest.raises(ArgumentsError, match="says nothing of 'remax': it knows grpo, rloo"):
        compat_settings("trl", "remax")


def test_the_page_about_compat_states_every_setting() -> None:
    page = (Path(alignment.losses.__file__).parents[2] / "docs" / "compat.md").read_text()
    for peer, methods in COMPAT.items():
        for method, settings in methods.items():
            if peer != "trl":
                assert f"| {peer} | `{method}` | {stated(settings)} |" in page


def stated(settings: dict) -> str:
    return ", ".join(f"`{key}: {'off' if value is None else value}`" for key, value in settings.items())
