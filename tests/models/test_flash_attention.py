"""FlashAttention is on where it should be, and gets no mask that is not used (faked: no CPU has its kernels)."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from alignment import runtime
from alignment.arguments import SFTArguments, device, from_dict
from alignment.flow.runner import model_flags
from alignment.ppo.models import Rows, backbone_of, hidden_states
from alignment.ppo.models.forward import _segment_ends


class Recorder(paddle.nn.Layer):
    """A decoder layer that keeps what it is given."""

    def __init__(self, real: paddle.nn.Layer, seen: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn, self.seen = real.self_attn, seen

    def forward(self, hidden: paddle.Tensor, positions: Any, mask: Any, *more: Any, **named: Any) -> paddle.Tensor:
        self.seen["mask"], self.seen["ends"] = mask, named["attn_mask_startend_row_indices"]
        return hidden


def given_to_layers(kit: Any, model_type: str, rows: Rows) -> dict[str, Any]:
    model = kit.causal(model_type)
    model.config.use_flash_attention = True
    seen: dict[str, Any] = {}
    backbone = backbone_of(model)
    backbone.layers = paddle.nn.LayerList([Recorder(backbone.layers[0], seen)])
    hidden_states(model, rows)
    return seen


PACKED = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5]])


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
@pytest.mark.parametrize("packed", [True, False])
def test_layers_get_the_ends_of_segments_in_place_of_a_mask(kit: Any, model_type: str, packed: bool) -> None:
    """A20: without a mask paddlenlp built [B, 1, S, S], compared it with its own and threw it away."""
    ids = np.ones([2, 8], dtype=np.int64)
    seen = given_to_layers(kit, model_type, Rows(ids, PACKED, ids * 0) if packed else Rows(ids))
    assert seen["mask"] is None
    assert (seen["ends"].shape, seen["ends"].dtype) == ([2, 8], paddle.int32)
    wanted = [[3, 3, 3, 5, 5, 6, 8, 8], [8] * 8] if packed else [[8] * 8] * 2
    assert seen["ends"].tolist() == wanted


def test_ends_say_what_the_dense_mask_says() -> None:
    """FlashMask: query ``q`` sees key ``k`` if ``k <= q < ends[k]``."""
    draw = np.random.default_rng(0)
    segments = np.sort(draw.integers(0, 5, (4, 33)), axis=1)
    ends = _segment_ends(paddle.to_tensor(segments), 4, 33).numpy()
    query, key = np.arange(33)[:, None], np.arange(33)
    seen = (key <= query) & (query < ends[:, None, :])
    np.testing.assert_array_equal(seen, (segments[:, :, None] == segments[:, None, :]) & (key <= query))


@pytest.mark.parametrize(
    ("values", "capability", "wanted"),
    [
        ({"bf16": True}, 8, True),
        ({"bf16": True}, 7, False),
        ({"bf16": True, "use_flash_attention": False}, 9, False),
        ({}, 9, False),
        ({"use_flash_attention": True}, 8, True),
    ],
)
def test_flash_attention_is_on_by_itself_in_bfloat16(
    values: dict[str, Any], capability: int, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B5: it was off unless asked for, so that attention kept [B, heads, S, S]."""
    monkeypatch.setattr(device, "gpu_available", lambda: True)
    monkeypatch.setattr(runtime, "is_cpu", lambda: False)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda: (capability, 0))
    args = from_dict(SFTArguments, {"output_dir": "o", "model_name_or_path": "m", "train_datasets": "a", **values})
    assert model_flags(args) == ({"use_flash_attention": True} if wanted else {})
    monkeypatch.setattr(device, "gpu_available", lambda: False)
    assert model_flags(args) == {}, "a CPU has no such kernels"
