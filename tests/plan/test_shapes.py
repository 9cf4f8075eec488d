"""Shapes by name and by config, and the parts of a divided model against the models that are really built."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.errors import ModelError
from alignment.parallel.topology import Topology
from alignment.plan.memory import part_of, telling_processes
from alignment.plan.setting import RolePlan, Setting
from alignment.plan.shapes import MODELS, find_shape, known_shape, part_tensors

#: Parameters as the models' publishers state them, in millions.
PUBLISHED = {
    "Llama-2-7b": 6738.4,
    "Llama-2-13b": 13015.9,
    "Llama-2-70b": 68976.6,
    "Meta-Llama-3-8B": 8030.3,
    "TinyLlama-1.1B": 1100.0,
    "Qwen2-0.5B": 494.0,
    "Qwen2-1.5B": 1543.7,
    "Qwen2-7B": 7615.6,
    "Qwen2-72B": 72706.2,
    "Mistral-7B": 7241.7,
    "gemma-2b": 2506.2,
    "gemma-7b": 8537.7,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str) -> None:
    assert MODELS[name].parameters / 1e6 == pytest.approx(PUBLISHED[name], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("PKU-Alignment/alpaca-7b-reproduced", "alpaca-7b-reproduced"),
        ("PKU-Alignment/beaver-7b-v1.0-reward", "beaver-7b"),
        ("meta-llama/Llama-2-7b-chat-hf", "Llama-2-7b"),
        ("Qwen/Qwen2-7B-Instruct", "Qwen2-7B"),
        ("mistralai/Mistral-7B-v0.1", "Mistral-7B"),
        ("google/gemma-2b-it", "gemma-2b"),
    ],
)
def test_names_are_known_with_their_suffixes(name: str, known: str) -> None:
    assert known_shape(name) == MODELS[known]


@pytest.mark.parametrize("name", ["checkpoints/qwen_sft", "Llama-2-7bx", "gpt2"])
def test_unknown_names_are_unknown(name: str) -> None:
    assert known_shape(name) is None
    with pytest.raises(ModelError, match=r"--model_config FILE"):
        find_shape(name, "actor_model_name_or_path")


def test_a_folder_wins_over_the_table_and_a_named_file_over_both(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    folder = tmp_path / "Llama-2-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert find_shape(str(folder), "actor").layers == 2
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert find_shape(str(folder), "actor", str(other)).layers == 3
    assert find_shape(str(folder), "actor", "Llama-2-7b").layers == 32
    other.write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="vocab_size, hidden_size"):
        find_shape("x", "actor", str(other))


def test_the_parts_of_all_processes_make_the_model_once() -> None:
    shape = replace(MODELS["Qwen2-0.5B"], kv_heads=2)
    for head in ("lm", "score"):
        whole = part_tensors(shape, head)
        layout = {"processes": 8, "tensor": 2, "pipeline": 4}
        seen: dict[str, int] = {}
        for process in range(8):
            for name, tensor in part_tensors(shape, head, Topology(process=process, **layout)).items():
                if not tensor.duplicate and (tensor.split or process % 2 == 0):
                    seen[name] = seen.get(name, 0) + tensor.elements
        assert seen == {name: tensor.elements for name, tensor in whole.items()}


def test_the_fullest_process_is_among_the_telling_ones() -> None:
    shape = MODELS["TinyLlama-1.1B"]
    roles = (RolePlan("actor", shape, "lm", True), RolePlan("critic", shape, "score", True))
    topology = Topology(24, 0, tensor=2, sharding=12, sharding_stage=1)
    setting = Setting("ppo", roles, topology)

    def owned(where: Topology) -> int:
        return sum(part_of(role, where).owned_elements for role in roles)

    every = [replace(topology, process=process) for process in range(24)]
    assert max(map(owned, every)) == max(map(owned, telling_processes(setting)))
