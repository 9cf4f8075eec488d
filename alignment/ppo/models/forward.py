"""Forward passes over right-padded and packed rows, the same for every architecture.

Rows are right-padded and attention is causal, so a real token never sees a pad: no padding mask is built, the pads'
own outputs are meaningless and nobody reads them. That is exact whatever the pad id is (it may be eos), and the
fastest path on every device: with flash attention it is the plain causal kernel.

Two cases need a mask, a boolean one of shape ``[batch, 1, seq, seq]``: packed rows, whose attention stays inside a
segment, and Mistral's sliding window, which paddlenlp's modeling code ignores. With FlashAttention, Llama and Qwen2
take neither a mask nor paddlenlp's own causal one (which it would build, compare and throw away): one number per token
says where the rows end that see it (FlashMask: Wang et al. 2024, arXiv:2410.01359).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import nn
from paddle.nn import functional as F

from alignment.errors import ModelError
from alignment.parallel.tensor_ranks import divided_product, gather_sequence
from alignment.ppo.models.config_keys import attention_window

Lengths = paddle.Tensor | np.ndarray | list[int]


def unwrap(model: nn.Layer) -> nn.Layer:
    """Return the model inside LoRA's wrapper, or the model itself."""
    # Whoever made a wrapper has imported its module; the import takes seconds and most runs have no LoRA.
    peft = sys.modules.get("paddlenlp.peft")
    return model.model if peft is not None and isinstance(model, peft.LoRAModel) else model


def backbone_of(model: nn.Layer) -> nn.Layer:
    """Return the decoder of a causal or score model, wrapped by LoRA or not."""
    inner = unwrap(model)
    return getattr(inner, inner.base_model_prefix)


def final_hidden_states(
    model: nn.Layer,
    input_ids: paddle.Tensor,
    *,
    position_ids: paddle.Tensor | None = None,
    segment_ids: paddle.Tensor | None = None,
    mask: paddle.Tensor | None = None,
    received: paddle.Tensor | None = None,
) -> paddle.Tensor:
    """Return the hidden states after the final norm; of a pipeline stage those that it hands on.

    Args:
        model: a causal or score model, or a pipeline stage of one.
        input_ids: ``[batch, seq]`` int64.
        position_ids: ``[batch, seq]`` int64; 0, 1, 2, ... if not given.
        segment_ids: ``[batch, seq]`` int of packed rows, see :func:`packed_causal_logits`.
        mask: ``[batch, 1, seq, seq]`` bool, True where attention is allowed, already causal, in place of the one that
            follows from ``segment_ids``.
        received: ``[batch, seq, hidden]``, the stage before's hidden states; None on the first stage.

    Returns:
        ``[batch, seq, hidden]`` in the model's dtype.

    Raises:
        ModelError: the rows are longer than the model's positions reach.
    """
    backbone = backbone_of(model)
    batch, seq = input_ids.shape
    check_context(backbone, seq)
    by_ends = mask is None and _takes_ends(backbone)
    if mask is None and not by_ends:
        mask = _mask_of(backbone, segment_ids, input_ids.shape)
    split = backbone.config.tensor_parallel_degree if getattr(backbone.config, "sequence_parallel", False) else 1
    more = -seq % max(1, split)
    if more:
        # The tensor ranks get equal shares of the sequence; nobody sees what is put behind the end.
        input_ids = F.pad(input_ids, [0, 0, 0, more])
        position_ids = None if position_ids is None else F.pad(position_ids, [0, 0, 0, more])
        segment_ids = None if segment_ids is None else F.pad(segment_ids, [0, 0, 0, more], value=-1)
        mask = None if mask is None else F.pad(mask.astype("int32"), [0, 0, 0, 0, 0, more, 0, more]).astype("bool")
        received = None if received is None else F.pad(received, [0, 0, 0, more, 0, 0])
    if split > 1:
        set_sequence_length(model, seq + more)
    seen = {"attention_mask": None if mask is None else _mask_as_expected(backbone, mask)}
    if by_ends:
        seen = {"attn_mask_startend_row_indices": _segment_ends(segment_ids, batch, seq + more)}
    outputs = backbone(
        position_ids=position_ids,
        use_cache=False,
        return_dict=False,
        **seen,
        **({"input_ids": input_ids} if received is None else {"inputs_embeds": received}),
    )
    hidden = outputs[0] if isinstance(outputs, tuple | list) else outputs
    if split > 1:
        hidden = gather_sequence(hidden, batch, seq + more)
    return hidden[:, :seq] if more else hidden


def cached_hidden_states(
    model: nn.Layer,
    tokens: paddle.Tensor,
    mask: paddle.Tensor,
    positions: paddle.Tensor,
    caches: Any,
    received: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, Any]:
    """Return final hidden states of tokens behind a key-value cache, and the cache that has grown by them.

    Args:
        model: a causal model, or a pipeline stage of one.
        tokens: ``[batch, new]`` int64.
        mask: ``[batch, cached + new]`` int64, 1 where a slot is real.
        positions: ``[batch, new]`` int64.
        caches: what the call before returned; None at first.
        received: ``[batch, new, hidden]`` from the stage before; None on the first.

    Returns:
        ``([batch, new, hidden], caches)``.
    """
    output = backbone_of(model)(
        attention_mask=mask,
        position_ids=positions,
        past_key_values=caches,
        use_cache=True,
        return_dict=True,
        **({"input_ids": tokens} if received is None else {"inputs_embeds": received}),
    )
    return output.last_hidden_state, output.past_key_values


def set_sequence_length(model: nn.Layer, length: int) -> None:
    """Tell sequence-parallel attention how long the rows of the next forward are, which its flat input does not say."""
    for layer in backbone_of(model).layers:
        layer.self_attn.seq_length = length


def keep_tokens(model: nn.Layer, tokens: int) -> None:
    """Let a causal model predict its first ``tokens`` tokens only, wherever its head is applied here: models are padded
    to round numbers of rows, and a row that is no token of the tokenizer must neither be sampled nor count in a
    distribution. The weights, and what is saved of them, stay whole.
    """
    inner = unwrap(model)
    inner.kept_tokens = tokens if tokens < int(inner.config.vocab_size) else None


def kept_tokens(model: nn.Layer) -> int | None:
    """What :func:`keep_tokens` was told, where that is fewer than the model has rows; else None."""
    return getattr(unwrap(model), "kept_tokens", None)


def predicted_tokens(model: nn.Layer) -> int:
    """How many tokens a causal model predicts: those that are kept, else all of its rows."""
    return kept_tokens(model) or int(unwrap(model).config.vocab_size)


def lm_logits(model: nn.Layer, hidden_states: paddle.Tensor, *, own_columns: bool = False) -> paddle.Tensor:
    """Apply the LM head in float32: ``[..., hidden]`` of any dtype -> ``[..., vocab]`` float32, or the columns of
    :func:`keep_tokens`.

    Half-precision products would be rounded to eighths at the size of logits (16 to 32). The head's weight is widened
    for the call, so callers bound the number of rows, not the memory of the weight.

    Args:
        model: a causal model, or its last pipeline stage.
        hidden_states: after the final norm.
        own_columns: with tensor parallelism return this rank's columns only, see :func:`divides_vocabulary`; of those
            that are not kept, logits of -1e30.
    """
    kept, logits = kept_tokens(model), _head_logits(model, hidden_states, own_columns)
    if kept is None:
        return logits
    if not own_columns:
        return logits[..., :kept]
    size, rank = int(logits.shape[-1]), int(unwrap(model).config.tensor_parallel_rank)
    column = paddle.arange(size * rank, size * (rank + 1))
    return paddle.where(column < kept, logits, paddle.full([], -1e30, dtype=logits.dtype))


def _head_logits(model: nn.Layer, hidden_states: paddle.Tensor, own_columns: bool) -> paddle.Tensor:
    head = unwrap(model).lm_head
    if head.weight.dtype == paddle.float32:
        return head(hidden_states, tensor_parallel_output=True) if own_columns else head(hidden_states)
    hidden, weight, tied = hidden_states.astype("float32"), head.weight.astype("float32"), head_is_tied(head)
    if not divides_vocabulary(model):
        return paddle.matmul(hidden, weight, transpose_y=tied)
    return divided_product(hidden, weight, tied=tied, whole=not own_columns)


def head_is_tied(head: nn.Layer) -> bool:
    """Whether an LM head's weight is ``[vocab, hidden]``, as the embedding's, rather than ``[hidden, vocab]``."""
    if hasattr(head, "transpose_y"):
        return bool(head.transpose_y)
    return head.config.model_type == "gemma" and bool(head.config.tie_word_embeddings)


def divides_vocabulary(model: nn.Layer) -> bool:
    """Whether the tensor ranks have different columns of the LM head (they do where their number divides the
    vocabulary).
    """
    return bool(getattr(unwrap(model).lm_head.weight, "is_distributed", False))


def causal_logits(model: nn.Layer, input_ids: paddle.Tensor, lengths: Lengths | None = None) -> paddle.Tensor:
    """Return next-token logits of right-padded rows.

    A row's logits depend on its own real tokens only. To save memory where only some positions are needed, use
    :func:`final_hidden_states`, gather, then :func:`lm_logits`.

    Args:
        model: a causal model.
        input_ids: ``[batch, seq]`` int64, right-padded with any id below the vocabulary size.
        lengths: ``[batch]``, the number of real tokens; only checked, since right pads cannot be seen (see above).

    Returns:
        ``[batch, seq, vocab]`` float32. Rows of pads have meaningless values.

    Raises:
        ModelError: a length is below 1 or beyond the rows' width.
    """
    if lengths is not None:
        checked_lengths(lengths, input_ids.shape)
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
        ``[batch, seq, vocab]`` float32.

    Raises:
        ModelError: the three shapes differ.
    """
    if not list(input_ids.shape) == list(segment_ids.shape) == list(position_ids.shape):
        raise ModelError(
            f"packed rows need input_ids, segment_ids and position_ids of one shape, got {list(input_ids.shape)}, "
            f"{list(segment_ids.shape)} and {list(position_ids.shape)}"
        )
    return lm_logits(model, _packed_hidden_states(model, input_ids, segment_ids, position_ids))


def _packed_hidden_states(
    model: nn.Layer,
    input_ids: paddle.Tensor,
    segment_ids: paddle.Tensor,
    position_ids: paddle.Tensor,
    received: paddle.Tensor | None = None,
) -> paddle.Tensor:
    return final_hidden_states(
        model, input_ids, position_ids=position_ids.astype("int64"), segment_ids=segment_ids, received=received
    )


@dataclass(frozen=True)
class Rows:
    """A micro batch as a model reads it.

    Attributes:
        input_ids: ``[batch, seq]`` int64, right-padded.
        segment_ids: ``[batch, seq]`` int of packed rows, see :func:`packed_causal_logits`; None for one sample a row.
        position_ids: ``[batch, seq]`` int64 of packed rows.
        lengths: ``[batch]`` int, real tokens of each row, at least 1; what lies behind need not be computed and may
            have any hidden states. None: nothing is known.
    """

    input_ids: np.ndarray
    segment_ids: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    lengths: np.ndarray | None = None


def hidden_states(model: nn.Layer, rows: Rows, received: paddle.Tensor | None = None) -> paddle.Tensor:
    """Return the final hidden states ``[batch, seq, hidden]`` of a micro batch, packed or not.

    Args:
        model: a causal or score model, or a pipeline stage of one.
        rows: the micro batch.
        received: ``[batch, seq, hidden]`` from the stage before; None on the first.
    """
    input_ids = paddle.to_tensor(np.ascontiguousarray(rows.input_ids))
    if rows.segment_ids is None or rows.position_ids is None:
        return final_hidden_states(model, input_ids, received=received)
    segment_ids, position_ids = paddle.to_tensor(rows.segment_ids), paddle.to_tensor(rows.position_ids)
    return _packed_hidden_states(model, input_ids, segment_ids, position_ids, received)


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
    if lengths is not None:
        checked_lengths(lengths, input_ids.shape)
    return scores_of(model, final_hidden_states(model, input_ids), raw=raw)


def scores_of(model: nn.Layer, hidden: paddle.Tensor, *, raw: bool = False) -> paddle.Tensor:
    """Apply a score model's head: ``[batch, seq, hidden]`` -> ``[batch, seq]`` float32; see :func:`score_tokens`.

    Raises:
        ModelError: the model gives more than one score per token.
    """
    inner = unwrap(model)
    if inner.config.score_dim != 1:
        raise ModelError(
            f"this score model gives {inner.config.score_dim} scores per token; training and rewards need one "
            f"(score_dim 1)"
        )
    scores = inner.raw_scores(hidden)
    return (scores if raw else inner.normalize(scores)).squeeze(-1)


def take_end(scores: paddle.Tensor, lengths: Lengths) -> paddle.Tensor:
    """Return each row's value at its last real token.

    Args:
        scores: ``[batch, seq]`` or ``[batch, seq, score_dim]``.
        lengths: ``[batch]``, each from 1 to ``seq``.

    Returns:
        ``[batch]`` or ``[batch, score_dim]``.
    """
    last = checked_lengths(lengths, scores.shape) - 1
    rows = np.arange(len(last), dtype=np.int64)
    return paddle.gather_nd(scores, paddle.to_tensor(np.stack([rows, last], axis=1)))


def end_scores(model: nn.Layer, input_ids: paddle.Tensor, lengths: Lengths, *, raw: bool = False) -> paddle.Tensor:
    """Return the score of each row, ``[batch]`` float32: :func:`score_tokens` at ``lengths - 1``."""
    return take_end(score_tokens(model, input_ids, lengths, raw=raw), lengths)


def checked_lengths(lengths: Lengths, shape: list[int]) -> np.ndarray:
    """``[batch]`` int64 lengths of rows of ``shape`` (batch, seq, ...).

    Raises:
        ModelError: their number is not the batch's, or one is below 1 or beyond the rows' width.
    """
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


def check_context(backbone: nn.Layer, seq: int) -> None:
    """Check that rows of ``seq`` tokens can be computed rightly.

    Raises:
        ModelError: they are beyond the model's positions, or beyond a window that is not computed.
    """
    window, table = _reaches(backbone)
    if window is not None and seq > window:
        raise ModelError(
            f"rows of {seq} tokens, but this model attends within a window of {window} (use_sliding_window), which is "
            "computed for rows up to that length only"
        )
    if table is not None and seq > table:
        raise ModelError(f"rows of {seq} tokens, but the model's positions reach {table} (max_position_embeddings)")


def longest_row(backbone: nn.Layer, context_length: int | None) -> int:
    """The longest row that may be generated: ``context_length``, the config's if that is None, or less where
    :func:`check_context` would refuse it.
    """
    own = int(backbone.config.max_position_embeddings) if context_length is None else context_length
    return min([own, *(reach for reach in _reaches(backbone) if reach is not None)])


def _reaches(backbone: nn.Layer) -> tuple[int | None, int | None]:
    """Rows' length up to which a window is not felt that is not computed, and up to which the table of positions goes;
    None where there is no such limit.
    """
    config = backbone.config
    window = attention_window(vars(config), config.model_type)
    # paddlenlp's Llama keeps a table of rotary positions and reads beyond its end without complaint; the others
    # compute what they need.
    if config.model_type != "llama" or config.rope_scaling_type == "dynamic_ntk":
        return window, None
    return window, int(backbone.layers[0].self_attn.rotary_emb.max_seq_len_cached)


def _window_of(backbone: nn.Layer) -> int | None:
    """Return the number of tokens that one token attends to, itself included, or None for all."""
    return getattr(backbone.config, "sliding_window", None) if backbone.config.model_type == "mistral" else None


def _causal(seq: int, window: int | None) -> paddle.Tensor:
    """Return ``[seq, seq]`` bool: key ``k`` is seen by query ``q`` if ``0 <= q - k`` and, with a window, ``q - k <
    window``.
    """
    mask = paddle.tril(paddle.ones([seq, seq], dtype="bool"))
    return mask if window is None or seq <= window else paddle.triu(mask, diagonal=1 - window)


def _takes_ends(backbone: nn.Layer) -> bool:
    """Whether attention is FlashAttention that takes the ends of segments in place of a mask."""
    config = backbone.config
    return (
        bool(getattr(config, "use_flash_attention", False))
        and config.model_type in ("llama", "qwen2")
        and not getattr(config, "alibi", False)
    )


def _segment_ends(segment_ids: paddle.Tensor | None, batch: int, seq: int) -> paddle.Tensor:
    """``[batch, seq]`` int32: behind which place a token is not seen any more, which is its segment's end."""
    if segment_ids is None:
        return paddle.full([batch, seq], seq, dtype="int32")
    last = paddle.concat([segment_ids[:, 1:] != segment_ids[:, :-1], paddle.ones([batch, 1], dtype="bool")], axis=1)
    ends = paddle.where(last, paddle.arange(1, seq + 1, dtype="int32"), paddle.full([], seq, dtype="int32"))
    return paddle.cummin(ends.flip(1), axis=1)[0].flip(1)


def _mask_of(backbone: nn.Layer, segment_ids: paddle.Tensor | None, shape: list[int]) -> paddle.Tensor | None:
    if segment_ids is None:
        return _window_mask(backbone, shape)
    same_segment = segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
    return paddle.logical_and(same_segment, _causal(shape[1], _window_of(backbone))).unsqueeze(1)


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
