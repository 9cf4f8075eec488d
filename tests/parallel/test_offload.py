"""Offloading: the same objects, the same bits, less memory; and a PPO run that cannot tell the difference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.cli import main
from alignment.parallel.offload import LEVELS, Residency, build_residency
from alignment.parallel.offload_gpu import PinnedMemory, SideStream, fuse
from tests.ppo.conftest import PPO_BETWEEN, PPO_ITERATION
from tests.tiny import tiny_model_dir, write_jsonl

ALL = " ".join(LEVELS)


# -- what moves when


class Recorder:
    """A back end that notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    def move_out(self, group: str, tensors: Any, frozen: bool) -> int:
        self.calls.append(("out", group))
        return 1

    def move_in(self, group: str, tensors: Any) -> int:
        self.calls.append(("in", group))
        return 1

    def prefetch(self, group: str) -> None:
        self.calls.append(("ahead", group))

    def close(self) -> None:
        self.calls.append(("close", ""))

    def drain(self) -> list[tuple[str, str]]:
        calls, self.calls = self.calls, []
        return calls


def residency_of(levels: str, roles: tuple[str, ...] = ("actor", "reference", "critic", "reward")) -> Any:
    recorder = Recorder()
    residency = Residency(levels, PPO_ITERATION.residency(), PPO_BETWEEN, recorder)
    for role in roles:
        residency.add(role, list, frozen=role in ("reference", "reward"))
        if role in ("actor", "critic"):
            residency.add(f"{role}_optimizer", list)
    return residency, recorder


def test_the_dataflow_says_what_each_phase_needs() -> None:
    assert {name: " ".join(sorted(groups)) for name, groups in PPO_ITERATION.residency()} == {
        "generate": "actor",
        "actor_logprobs": "actor",
        "reference_logprobs": "reference",
        "reward_scores": "reward",
        "critic_values": "critic",
        "advantages": "critic",
        "update": "actor actor_optimizer critic critic_optimizer",
    }


def test_with_all_levels_each_phase_has_what_it_needs_and_no_more() -> None:
    residency, recorder = residency_of(ALL)
    assert residency.resident() == frozenset()
    for iteration in range(2):
        for phase, needed in PPO_ITERATION.residency():
            recorder.drain()
            residency.enter(phase)
            assert residency.resident() == needed
            moved = [call for call in recorder.drain() if call[0] != "ahead"]
            assert len(moved) == len(set(moved)), "a group moves once"
            kinds = [kind for kind, _ in moved]
            assert kinds == sorted(kinds, reverse=True), "room is made before it is taken"
            if phase == "advantages" or (phase == "actor_logprobs"):
                assert moved == []
            if iteration and phase == "generate":
                assert sorted(moved) == [("out", "actor_optimizer"), ("out", "critic"), ("out", "critic_optimizer")]


@pytest.mark.parametrize("levels", ["freeze_model", "optimizer", "train_model", "optimizer freeze_model"])
def test_only_the_groups_of_the_levels_move(levels: str) -> None:
    residency, recorder = residency_of(levels)
    allowed = {group for level in levels.split() for group in LEVELS[level]}
    for phase, needed in [*PPO_ITERATION.residency(), *PPO_BETWEEN.items()]:
        residency.enter(phase)
        others = {"actor", "critic", "reference", "reward", "actor_optimizer", "critic_optimizer"} - allowed
        assert residency.resident() == (needed & allowed) | others
    assert {group for _, group in recorder.drain()} <= allowed


def test_the_next_phase_is_prefetched() -> None:
    residency, recorder = residency_of("freeze_model")
    recorder.drain()
    residency.enter("actor_logprobs")
    assert recorder.drain() == [("ahead", "reference")]
    residency.enter("reference_logprobs")
    assert recorder.drain() == [("in", "reference"), ("ahead", "reward")]
    residency.enter("checkpoint")
    assert recorder.drain() == [("out", "reference")]


def test_a_group_can_be_used_out_of_turn() -> None:
    residency, recorder = residency_of(ALL, ("actor", "critic", "reference"))
    residency.enter("update")
    recorder.drain()
    with residency.using("reference", "actor", "reward"):
        assert "reference" in residency.resident()
    assert recorder.drain() == [("in", "reference"), ("out", "reference")]
    assert residency.resident() == {"actor", "critic", "actor_optimizer", "critic_optimizer"}


def test_moves_are_counted_by_phase() -> None:
    residency, _ = residency_of("freeze_model")
    assert residency.drain()["offload/start_bytes_out"] == 2
    for phase, _ in PPO_ITERATION.residency():
        residency.enter(phase)
    drained = residency.drain()
    assert {key: value for key, value in drained.items() if "seconds" not in key} == {
        "offload/reference_logprobs_bytes_in": 1,
        "offload/reference_logprobs_bytes_out": 0,
        "offload/reward_scores_bytes_in": 1,
        "offload/reward_scores_bytes_out": 1,
        "offload/critic_values_bytes_in": 0,
        "offload/critic_values_bytes_out": 1,
    }
    assert all(drained[key] >= 0 for key in drained) and residency.drain() == {}


def test_mistakes_of_the_caller_are_named(tmp_path: Path) -> None:
    residency, _ = residency_of(ALL)
    with pytest.raises(ValueError, match="unknown phase 'rollout'; known are generate"):
        residency.enter("rollout")
    with pytest.raises(ValueError, match="there is a group 'actor' already"):
        residency.add("actor", list)
    with pytest.raises(ValueError, match="unknown offload level 'models'"):
        Residency("models", [], {}, Recorder())
    assert build_residency(" ", [], {}, tmp_path / "none", on_cpu=True) is None
    assert not (tmp_path / "none").exists()


# -- the GPU back end, as far as it goes without one


class PlainCopies:
    """Copies at once, in ordinary memory.

    Args:
        elsewhere: names of tensors that are taken for those of another place than the device.
    """

    def __init__(self, elsewhere: tuple[str, ...] = ()) -> None:
        self.elsewhere = elsewhere

    def moves(self, tensor: Any) -> bool:
        return tensor.name not in self.elsewhere

    def to_host(self, source: Any, target: Any) -> Any:
        return source.clone() if target is None else paddle.assign(source, target)

    def to_device(self, source: Any) -> Any:
        return source.clone()

    def wait(self) -> None: ...


def test_buckets_hold_a_model_in_training() -> None:
    def train(offload: bool) -> list[np.ndarray]:
        paddle.seed(1)
        model = paddle.nn.Sequential(paddle.nn.Linear(33, 65), paddle.nn.Tanh(), paddle.nn.Linear(65, 3))
        optimizer = paddle.optimizer.AdamW(1e-2, parameters=model.parameters())
        backend, parameters = PinnedMemory(PlainCopies()), model.parameters()
        for _ in range(4):
            if offload:
                assert backend.move_out("actor", parameters, frozen=False) > 0
                with pytest.raises(Exception, match="[Ii]nitialized|[Aa]llocat|[Hh]older"):
                    model(paddle.ones([2, 33]))
                backend.prefetch("actor")
                backend.move_in("actor", parameters)
            model(paddle.ones([2, 33])).square().sum().backward()
            optimizer.step()
            optimizer.clear_grad()
        if offload:
            backend.move_out("actor", parameters, frozen=False)
            backend.close()
        return [parameter.numpy() for parameter in model.parameters()]

    for one, other in zip(train(True), train(False), strict=True):
        np.testing.assert_array_equal(one, other)


def test_tensors_of_another_place_stay_there() -> None:
    """B15: AdamW's beta powers are on the CPU; a copy in a block of the GPU would change what the operator does."""
    layer = paddle.nn.Linear(8, 8)
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=layer.parameters())
    layer(paddle.ones([2, 8])).sum().backward()
    optimizer.step()
    tensors = [tensor for slot in optimizer._accumulators.values() for tensor in slot.values()]
    powers = [tensor for tensor in tensors if "pow_acc" in tensor.name]
    assert 0 < len(powers) < len(tensors)
    places = [tensor.data_ptr() for tensor in powers]
    backend = PinnedMemory(PlainCopies(elsewhere=tuple(tensor.name for tensor in powers)))
    moved = backend.move_out("actor optimizer", tensors, frozen=False)
    assert moved > 0 and [float(tensor) for tensor in powers] and [t.data_ptr() for t in powers] == places
    backend.move_in("actor optimizer", tensors)
    assert [tensor.data_ptr() for tensor in powers] == places
    optimizer.step()
    cpu = paddle.to_tensor([1.0], place=paddle.CPUPlace())
    assert not SideStream.moves(object.__new__(SideStream), cpu)


def test_fusing_keeps_values_shapes_and_ties() -> None:
    tensors = [*(paddle.rand([size]) for size in (10, 2000, 70)), paddle.arange(5)]
    tied = paddle.empty([0])
    tensors[1]._share_buffer_to(tied)
    tied.get_tensor()._set_dims([2000])
    before = [tensor.numpy() for tensor in tensors]
    buckets = fuse([*tensors, tied], most=4096)
    assert [len(bucket.tensors) for bucket in buckets] == [1, 2, 1, 1]
    for tensor, values in zip(tensors, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), values)
    assert tied.data_ptr() == tensors[1].data_ptr()


# -- a run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from alignment.ppo.models import load_score_model, load_tokenizer, save_model, save_tokenizer

    folder = tmp_path_factory.mktemp("models")
    actor = tiny_model_dir(folder / "actor", hidden_size=64)
    save_model(load_score_model(str(actor), score_type="reward"), folder / "reward")
    save_tokenizer(load_tokenizer(actor), folder / "reward")
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"the cat is {i}"} for i in range(16)])
    write_jsonl(folder / "prompts_dev.jsonl", [{"prompt": f"the dog is {i}"} for i in range(4)])
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path) -> Callable[..., Path]:
    def start(name: str, **changes: Any) -> Path:
        values = {
            "train_datasets": f"jsonl::{models / 'prompts.jsonl'}",
            "eval_datasets": f"jsonl::{models / 'prompts_dev.jsonl'}",
            "actor_model_name_or_path": str(models / "actor"),
            "reward_model_name_or_path": str(models / "reward"),
            "output_dir": str(tmp_path / name),
            "max_src_len": 32, "max_dec_len": 6, "per_device_prompt_batch_size": 8, "per_device_train_batch_size": 4,
            "update_iters": 2, "learning_rate": 1e-3, "num_train_epochs": 2, "top_p": 1.0, "logging_steps": 1,
            "evaluation_strategy": "steps", "eval_steps": 8, "save_strategy": "steps", "save_steps": 8,
            "report_to": "none", "disable_tqdm": True, "sample_table_rows": 0, **changes,
        }  # fmt: skip
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(values))
        assert main(["ppo", str(file)]) == 0
        return tmp_path / name

    return start


def timeless(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` without times and without what offloading itself reports."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def kept(key: str) -> bool:
        return key != "time" and "second" not in key and not key.startswith("offload/")

    return [{key: value for key, value in row.items() if kept(key)} for row in rows]


def states(folder: Path) -> dict[str, bytes]:
    """The bytes of all saved weights and optimizer states by file and name."""
    from safetensors.numpy import load_file

    return {
        f"{path.relative_to(folder)}:{name}": array.tobytes()
        for path in sorted(folder.rglob("*.safetensors"))
        for name, array in load_file(path).items()
    }


def test_a_run_is_bit_equal_with_and_without_offloading(run: Callable[..., Path], tmp_path: Path) -> None:
    plain, offloaded = run("plain"), run("offloaded", offload_level=ALL, offload_dir=str(tmp_path / "elsewhere"))
    assert timeless(plain) == timeless(offloaded)
    assert any("train/actor_loss" in row for row in timeless(plain))
    assert (plain / "eval_samples.jsonl").read_text() == (offloaded / "eval_samples.jsonl").read_text()
    assert states(plain) == states(offloaded)
    assert sum("_optimizer" in name for name in states(plain)) > 100
    assert not (tmp_path / "elsewhere").exists(), "the folder goes with the run"

    rows = [json.loads(line) for line in (offloaded / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "offload/update_bytes_in" in row][-1]
    assert last["offload/update_bytes_in"] > last["offload/reference_logprobs_bytes_in"] > 0
    assert last["offload/generate_bytes_out"] > 0, "what was trained is written"
    assert last["offload/reward_scores_bytes_out"] == 0, "the reference is not"
    assert "offload/" not in (plain / "metrics.jsonl").read_text()

    # a checkpoint of one goes on as the other
    resumed = run("resumed", offload_level=ALL, resume_from_checkpoint=str(plain / "checkpoint-8"))
    finals = ("policy/", "value/", "checkpoint-16/")
    wanted = {name: data for name, data in states(plain).items() if name.startswith(finals)}
    assert states(resumed) == wanted and len(wanted) > 100
