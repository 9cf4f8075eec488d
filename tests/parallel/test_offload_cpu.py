"""Offloading on a CPU: the same objects, the same bits, less memory."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from alignment.errors import AlignmentError
from alignment.parallel.offload_cpu import PAGE, MappedFiles, changed_parts, resident_bytes, spans_of

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
