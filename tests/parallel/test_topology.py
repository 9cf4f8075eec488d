"""Who is who on a layout, and which layouts a model can have."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignment.errors import ArgumentsError, ModelError
from alignment.parallel import Topology, layers_of_stage
from alignment.parallel.sharding import assign_owners
from alignment.ppo.models import Piece, check_layout

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}


@pytest.mark.parametrize("degrees", list(product((1, 2), (1, 2, 3), (1, 2), (1, 3))))
def test_every_process_has_a_place_of_its_own(degrees: tuple[int, int, int, int]) -> None:
    tensor, pipeline, sharding, replicas = degrees
    size = tensor * pipeline * sharding * replicas
    all_of_them = [Topology(size, rank, tensor, pipeline, sharding, 1) for rank in range(size)]
    places = {(t.data_rank, t.stage, t.tensor_rank) for t in all_of_them}
    assert len(places) == size
    for t in all_of_them:
        assert t.process_at(t.data_rank, t.stage, t.tensor_rank) == t.process
        assert t.data_rank == t.replica * sharding + t.sharding_rank < t.data_size == sharding * replicas
        assert t.process in t.model_peers() and t.process in t.data_peers()
        assert len(t.model_peers()) == tensor * pipeline and len(t.data_peers()) == t.data_size
    first = all_of_them[0].representatives()
    assert [all_of_them[p].data_rank for p in first] == list(range(sharding * replicas))
    assert all(all_of_them[p].stage == all_of_them[p].tensor_rank == 0 for p in first)


def test_the_order_is_fleets() -> None:
    """Tensor fastest, then sharding, pipeline, data: the order ["dp", "pp", "sharding", "sep", "mp"]."""
    t = Topology(16, 7, tensor=2, pipeline=2, sharding=2, sharding_stage=1)
    assert (t.tensor_rank, t.sharding_rank, t.stage, t.replica) == (1, 1, 1, 0)
    assert t.describe() == "tensor 2 x pipeline 2 x sharding stage 1 of 2 x data 2 (16 processes)"


def test_degrees_that_do_not_fit() -> None:
    with pytest.raises(ArgumentsError, match="= 6 processes .or a multiple of it. are needed, but the run has 8"):
        Topology(8, 0, tensor=2, pipeline=3)


@given(st.integers(1, 40), st.integers(1, 8))
def test_layers_are_shared_out_evenly(layers: int, stages: int) -> None:
    stages = min(layers, stages)
    parts = [layers_of_stage(layers, stages, stage) for stage in range(stages)]
    assert [number for part in parts for number in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts[0]) <= len(parts[-1])


@given(st.dictionaries(st.text(min_size=1), st.integers(1, 1000), min_size=1), st.integers(1, 5))
def test_owners_share_the_load(sizes: dict[str, int], ranks: int) -> None:
    owners = assign_owners(sizes, ranks)
    load = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(ranks)]
    assert max(load) - min(load) <= max(sizes.values())
    assert owners == assign_owners(dict(reversed(sizes.items())), ranks)


@pytest.mark.parametrize(
    ("config", "layout", "text"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, {"tensor": 4}, "num_attention_heads is 6, which tensor"),
        ({}, {"tensor": 4}, "num_key_value_heads is 2, which tensor_parallel_degree 4 does not divide"),
        ({"intermediate_size": 63}, {"tensor": 2}, "intermediate_size is 63"),
        ({}, {"pipeline": 8}, "has 4 layers, but pipeline_parallel_degree is 8: every stage needs at least one"),
        ({"model_type": "gemma"}, {"pipeline": 2}, "is a gemma model; tensor and pipeline parallelism are there for"),
    ],
)
def test_models_that_cannot_be_divided(config: dict, layout: dict, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        check_layout({**LLAMA, **config}, Topology(8, 0, **layout), "the actor")
    check_layout({**LLAMA, **config}, Topology(8, 0, sharding=8, sharding_stage=1), "the actor")


def test_pieces_are_cut_along_their_axis() -> None:
    import numpy as np

    whole = np.arange(24).reshape(4, 6)
    last = Topology(2, 1, tensor=2)
    np.testing.assert_array_equal(Piece("w", 1).cut(whole, last), whole[:, 3:])
    np.testing.assert_array_equal(Piece("w", 0).cut(whole, last), whole[2:])
    assert Piece("w").cut(whole, last) is whole
    assert Piece("w", 1).whole_shape([4, 3], last) == [4, 6]
