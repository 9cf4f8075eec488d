"""Forward passes over right-padded and packed rows, the same for every architecture.

Rows are right-padded and attention is causal, so a real token never sees a pad: no padding mask is built, the pads'
own outputs are meaningless and nobody reads them. That is exact whatever the pad id is (it may be eos), and the
fastest path on every device: with flash attention it is the plain causal kernel.

Two cases need a mask, a boolean one of shape ``[batch, 1, seq, seq]``: packed rows, whose attention stays inside a
segment, and Mistral's sliding window, which paddlenlp's modeling code ignores.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import nn

from alignment.errors import ModelError

Lengths = paddle.Tensor | np.ndarray | list[int]


def unwrap(model: nn.Layer) -> nn.Layer:
    """Return the model inside LoRA's wrapper, or the model itself."""
    from paddlenlp.peft import LoRAModel

    return model.model if isinstance(model, LoRAModel) else model


def backbone_of(model: nn.Layer) -> nn.Layer:
    """Return the decoder of a causal or score model, wrapped by LoRA or not."""
    inner = unwrap(model)
    return getattr(inner, inner.base_model_prefix)


def final_hidden_states(
    model: nn.Layer,
    input_ids: paddle.Tensor,
    *,
    position_ids: paddle.Tensor | None = None,
    mask: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return the hidden states after the final norm.

    Args:
        model: a causal or score model.
        input_ids: ``[batch, seq]`` int64.
        position_ids: ``[batch, seq]`` int64; 0, 1, 2, ... if not given.
        mask: ``[batch, 1, seq, seq]`` bool, True where attention is allowed, already causal; a plain causal mask if
            not given.

    Returns:
        ``[batch, seq, hidden]`` in the model's dtype.

    Raises:
        ModelError: the rows are longer than the model's positions reach.
    """
    backbone = backbone_of(model)
    _check_context(backbone, input_ids.shape[1])
    if mask is None:
        mask = _window_mask(backbone, input_ids.shape)
    attention_mask = None if mask is None else _mask_as_expected(backbone, mask)
    outputs = backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        return_dict=False,
    )
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def lm_logits(model: nn.Layer, hidden_states: paddle.Tensor) -> paddle.Tensor:
    """Apply the LM head: ``[..., hidden]`` -> ``[..., vocab]`` in the model's dtype."""
    return unwrap(model).lm_head(hidden_states)


def causal_logits(model: nn.Layer, input_ids: paddle.Tensor, lengths: Lengths | None = None) -> paddle.Tensor:
    """Return next-token logits of right-padded rows.

    A row's logits depend on its own real tokens only. To save memory where only some positions are needed, use
    :func:`final_hidden_states`, gather, then :func:`lm_logits`.

    Args:
        model: a causal model.
        input_ids: ``[batch, seq]`` int64, right-padded with any id below the vocabulary size.
        lengths: ``[batch]``, the number of real tokens; only checked, since right pads cannot be seen (see above).

    Returns:
        ``[batch, seq, vocab]`` in the model's dtype. Rows of pads have meaningless values.

    Raises:
        ModelError: a length is below 1 or beyond the rows' width.
    """
    if lengths is not None:
        _checked_lengths(lengths, input_ids.shape)
    return lm_logits(model, final_hidden_states(model, input_ids))


def packed_causal_logits(
    model: nn.Layer, input_ids: paddle.Tensor, segment_ids: paddle.Tensor, position_ids: paddle.Tensor
) -> paddle.Tensor:
    """Return next-token logits of rows that hold several samples one after the other.

    Attention is causal and stays inside a segment; positions restart with each segment, so that a sample's logits are
    those of the sample alone.

    Args:
        model: a causal model.
        input_ids: ``[batch, seq]`` int64.
        segment_ids: ``[batch, seq]`` int, the same number for all tokens of one sample; pads have a number of their
            own (0 or -1, say).
        position_ids: ``[batch, seq]`` int64, each token's place in its own sample.

    Returns:
        ``[batch, seq, vocab]`` in the model's dtype.

    Raises:
        ModelError: the three shapes differ.
    """
    if not list(input_ids.shape) == list(segment_ids.shape) == list(position_ids.shape):
        raise ModelError(
            f"packed rows need input_ids, segment_ids and position_ids of one shape, got {list(input_ids.shape)}, "
            f"{list(segment_ids.shape)} and {list(position_ids.shape)}"
        )
    same_segment = segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
    mask = paddle.logical_and(same_segment, _causal(input_ids.shape[1], _window_of(backbone_of(model)))).unsqueeze(1)
    return lm_logits(model, final_hidden_states(model, input_ids, position_ids=position_ids.astype("int64"), mask=mask))


def score_tokens(
    model: nn.Layer, input_ids: paddle.Tensor, lengths: Lengths | None = None, *, raw: bool = False
) -> paddle.Tensor:
    """Return the score at every token of right-padded rows.

    Args:
        model: a score model with ``score_dim`` 1.
        input_ids: ``[batch, seq]`` int64.
        lengths: ``[batch]``, the number of real tokens; only checked.
        raw: leave the model's normaliser out, as its own update needs it.

    Returns:
        ``[batch, seq]`` float32. Scores of pads are meaningless.

    Raises:
        ModelError: the model gives more than one score per token, or a length is out of range.
    """
    inner = unwrap(model)
    if lengths is not None:
        _checked_lengths(lengths, input_ids.shape)
    if inner.config.score_dim != 1:
        raise ModelError(
            f"this score model gives {inner.config.score_dim} scores per token; training and rewards need one "
            f"(score_dim 1)"
        )
    scores = inner.raw_scores(final_hidden_states(model, input_ids))
    return (scores if raw else inner.normalize(scores)).squeeze(-1)


def take_end(scores: paddle.Tensor, lengths: Lengths) -> paddle.Tensor:
    """Return each row's value at its last real token.

    Args:
        scores: ``[batch, seq]`` or ``[batch, seq, score_dim]``.
        lengths: ``[batch]``, each from 1 to ``seq``.

    Returns:
        ``[batch]`` or ``[batch, score_dim]``.
    """
    last = _checked_lengths(lengths, scores.shape) - 1
    rows = np.arange(len(last), dtype=np.int64)
    return paddle.gather_nd(scores, paddle.to_tensor(np.stack([rows, last], axis=1)))


def end_scores(model: nn.Layer, input_ids: paddle.Tensor, lengths: Lengths, *, raw: bool = False) -> paddle.Tensor:
    """Return the score of each row, ``[batch]`` float32: :func:`score_tokens` at ``lengths - 1``."""
    return take_end(score_tokens(model, input_ids, lengths, raw=raw), lengths)


def _checked_lengths(lengths: Lengths, shape: list[int]) -> np.ndarray:
    values = (
        np.asarray(lengths.numpy() if isinstance(lengths, paddle.Tensor) else lengths).astype(np.int64).reshape([-1])
    )
    if len(values) != shape[0]:
        raise ModelError(f"{shape[0]} rows but {len(values)} lengths")
    wrong = np.flatnonzero((values < 1) | (values > shape[1]))
    if len(wrong):
        raise ModelError(
            f"row {wrong[0]} has length {values[wrong[0]]}; it must be from 1 to the rows' width {shape[1]}"
        )
    return values


def _check_context(backbone: nn.Layer, seq: int) -> None:
    # paddlenlp's Llama keeps a table of rotary positions and reads beyond its end without complaint; the others
    # compute what they need.
    if backbone.config.model_type != "llama" or backbone.config.rope_scaling_type == "dynamic_ntk":
        return
    reach = int(backbone.layers[0].self_attn.rotary_emb.max_seq_len_cached)
    if seq > reach:
        raise ModelError(f"rows of {seq} tokens, but the model's positions reach {reach} (max_position_embeddings)")


def _window_of(backbone: nn.Layer) -> int | None:
    """Return the number of tokens that one token attends to, itself included, or None for all."""
    return getattr(backbone.config, "sliding_window", None) if backbone.config.model_type == "mistral" else None


def _causal(seq: int, window: int | None) -> paddle.Tensor:
    """Return ``[seq, seq]`` bool: key ``k`` is seen by query ``q`` if ``0 <= q - k`` and, with a window, ``q - k <
    window``.
    """
    mask = paddle.tril(paddle.ones([seq, seq], dtype="bool"))
    return mask if window is None or seq <= window else paddle.triu(mask, diagonal=1 - window)


def _window_mask(backbone: nn.Layer, shape: list[int]) -> paddle.Tensor | None:
    window = _window_of(backbone)
    if window is None or shape[1] <= window:
        return None
    return _causal(shape[1], window).unsqueeze([0, 1]).expand([shape[0], 1, shape[1], shape[1]])


def _mask_as_expected(backbone: nn.Layer, mask: paddle.Tensor) -> paddle.Tensor:
    # Mistral computes 1 - mask in the hidden states' dtype; the other three take a boolean 4-D mask as it is.
    if backbone.config.model_type == "mistral":
        return mask.astype(backbone.embed_tokens.weight.dtype)
    return mask
