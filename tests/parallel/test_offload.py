"""Offloading: the same objects, the same bits, less memory; and a PPO run that cannot tell the difference."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.cli import main
from alignment.errors import AlignmentError
from alignment.parallel.offload import LEVELS, Residency, build_residency
from alignment.parallel.offload_cpu import PAGE, MappedFiles, changed_parts, resident_bytes, spans_of
from alignment.parallel.offload_gpu import PinnedMemory, fuse
from alignment.ppo.dataflow import PPO_BETWEEN, PPO_ITERATION
from tests.tiny import tiny_model_dir, write_jsonl

ALL = " ".join(LEVELS)
MIB = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> Iterator[MappedFiles]:
    backend = MappedFiles(tmp_path / "offload")
    yield backend
    backend.close()


def make_tensors(*sizes: int) -> list[Any]:
    """Random float32 vectors."""
    draw = np.random.default_rng(0)
    return [paddle.to_tensor(draw.standard_normal(size).astype(np.float32)) for size in sizes]


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


# -- the files


def test_a_group_leaves_memory_and_comes_back_bit_for_bit(files: MappedFiles) -> None:
    tensors = make_tensors(5 * MIB, 3, 2 * MIB + 7, 1000)
    before, pointers = [tensor.numpy() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    whole = resident_bytes(tensors)
    assert whole is not None and 27 * MIB < whole <= 28 * MIB
    resident = rss()
    written = files.move_out("actor", tensors, frozen=False)
    assert written == whole
    assert resident_bytes(tensors) == 0
    assert resident - rss() > 0.9 * whole, "the memory has left the process, not only the tensors"
    assert files.move_in("actor", tensors) == whole == resident_bytes(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == pointers
    for tensor, values in zip(tensors, before, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), values)


def test_only_what_changed_is_written_again(files: MappedFiles) -> None:
    (tensor,) = make_tensors(MIB)
    files.move_out("actor", [tensor], frozen=False)
    for _ in range(2):  # a model that was only used
        files.move_in("actor", [tensor])
        assert float(tensor.sum()) != 0
        assert files.move_out("actor", [tensor], frozen=False) == 0
    files.move_in("actor", [tensor])
    expected = tensor.numpy()
    tensor[1000:1010] = 7.0
    expected[1000:1010] = 7.0
    if changed_parts(spans_of([tensor]).popitem()[0]) != list(spans_of([tensor])):  # the kernel shows its pages
        assert files.move_out("actor", [tensor], frozen=False) <= 2 * PAGE
    tensor.scale_(2.0)
    assert files.move_out("actor", [tensor], frozen=False) > 0.99 * 4 * MIB
    assert resident_bytes([tensor]) == 0
    np.testing.assert_array_equal(tensor.numpy(), 2 * expected)


def test_reading_and_writing_at_the_wrong_time_is_harmless(files: MappedFiles) -> None:
    (tensor,) = make_tensors(MIB)
    values = tensor.numpy()
    files.move_out("critic", [tensor], frozen=False)
    np.testing.assert_array_equal(tensor.numpy(), values)
    tensor.scale_(3.0)
    files.move_in("critic", [tensor])
    np.testing.assert_array_equal(tensor.numpy(), 3 * values)
    files.move_out("critic", [tensor], frozen=False)
    np.testing.assert_array_equal(tensor.numpy(), 3 * values)


def test_what_lies_beside_a_group_stays(files: MappedFiles) -> None:
    """Whole pages alone move: neighbours in memory keep their bytes, and tensors below a page never move."""
    tensors = make_tensors(*[3000] * 40)
    values = [tensor.numpy() for tensor in tensors]
    files.move_out("actor", tensors[::2], frozen=False)
    for tensor in tensors[1::2]:
        tensor.scale_(2.0)
    files.move_in("actor", tensors[::2])
    for i, tensor in enumerate(tensors):
        np.testing.assert_array_equal(tensor.numpy(), values[i] * (1 + i % 2))
    small = make_tensors(10)
    assert spans_of(small) == {} and files.move_out("reward", small, frozen=True) == 0


def test_shared_memory_moves_once(files: MappedFiles) -> None:
    (tensor,) = make_tensors(MIB)
    view = tensor.reshape([1024, 1024])
    assert tensor.data_ptr() == view.data_ptr(), "not a view: this test proves nothing"
    assert len(spans_of([tensor, view, tensor])) == 1
    assert files.move_out("actor", [tensor, view], frozen=False) <= 4 * MIB
    files.move_in("actor", [tensor, view])
    view.scale_(2.0)
    np.testing.assert_array_equal(view.numpy().reshape(-1), tensor.numpy())


def test_tensors_may_come_and_go(files: MappedFiles) -> None:
    """An optimizer's states appear with its first step; a load may give a tensor new memory."""
    tensors = make_tensors(MIB)
    files.move_out("actor_optimizer", tensors, frozen=False)
    for i in range(6):
        fresh = paddle.full([MIB], float(i))
        tensors = [*tensors[-2:], fresh]
        expected = [tensor.numpy() for tensor in tensors]
        files.move_out("actor_optimizer", tensors, frozen=False)
        zeros = [paddle.zeros([MIB]) for _ in range(3)]  # may take the memory of what was let go
        files.move_in("actor_optimizer", tensors)
        for tensor, values in zip(tensors, expected, strict=True):
            np.testing.assert_array_equal(tensor.numpy(), values)
        assert all(float(tensor.abs().sum()) == 0 for tensor in zeros)


def test_no_room_is_said_and_loses_nothing(files: MappedFiles, tmp_path: Path) -> None:
    (tensor,) = make_tensors(4 * MIB)
    values, limits = tensor.numpy(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, limits[1]))
    try:
        with pytest.raises(AlignmentError, match=r"offload_dir .*offload has no room for actor \(1[56] MiB\)"):
            files.move_out("actor", [tensor], frozen=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    np.testing.assert_array_equal(tensor.numpy(), values)
    files.move_out("actor", [tensor], frozen=False)
    assert resident_bytes([tensor]) == 0
    np.testing.assert_array_equal(tensor.numpy(), values)


def test_a_folder_that_cannot_be_one_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AlignmentError, match=r"offload_dir .*file cannot hold its first file"):
        MappedFiles(tmp_path / "file")


def test_the_folder_is_empty_while_it_is_used_and_goes_at_the_end(tmp_path: Path) -> None:
    backend, tensors = MappedFiles(tmp_path / "offload"), make_tensors(MIB)
    values = tensors[0].numpy()
    backend.move_out("actor", tensors, frozen=False)
    assert list((tmp_path / "offload").iterdir()) == [], "files have no names"
    backend.close()
    assert not (tmp_path / "offload").exists()
    np.testing.assert_array_equal(tensors[0].numpy(), values)


def test_nothing_is_left_after_sigkill(tmp_path: Path) -> None:
    tensors = make_tensors(MIB)
    child = os.fork()
    if child == 0:
        try:
            MappedFiles(tmp_path / "offload").move_out("actor", tensors, frozen=False)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list((tmp_path / "offload").iterdir()) == []


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
    """Copies at once, in ordinary memory."""

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


def test_fusing_keeps_values_shapes_and_ties() -> None:
    tensors = [*make_tensors(10, 2000, 70), paddle.arange(5)]
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
    return folder


@pytest.fixture
def run(models: Path, tmp_path: Path) -> Callable[..., Path]:
    def start(name: str, **changes: Any) -> Path:
        values = {
            "train_datasets": f"jsonl::{models / 'prompts.jsonl'}",
            "eval_datasets": f"jsonl:4/-1:{models / 'prompts.jsonl'}",
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
