"""The batches of an iteration that generates: :class:`Rollout` (what was sampled) and :class:`Experience` (what is
learnt from), typed views of a :class:`~alignment.rollout.batch.Batch`.

Every row carries ``prompt_len``, ``response_len`` and ``finished``. A row is ``[prompt | response]``, padded on the
right where it is shown as an array; pad may equal eos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignment.losses.kl import response_mask
from alignment.losses.token_sets import TokenSets
from alignment.rollout.batch import Batch, Column

#: The length kinds of a rollout: tokens of a row, of its response alone, and of all sets of allowed tokens.
TOKEN, RESPONSE, ALLOWED = "token", "response", "allowed"
_PARTS = "score_parts/"


class Rollout(Batch):
    """Sampled answers, on the host.

    Args:
        tokens: ``[B, T]`` int64, ``[prompt | response | padding]``.
        prompt_len: ``[B]`` int64.
        response_len: ``[B]`` int64, the EOS included; 0 where the model answered nothing.
        finished: ``[B]`` bool, whether the answer ended by itself, with an EOS or a stop string, rather than at the
            length limit. ``missing_eos_rule`` goes by it.
        logprobs: ``[B, R]`` float32, log-probs of the response's tokens as the generation engine computed them, at the
            sampling temperature and before top-k, top-p and the repetition penalty. The column is called
            ``rollout_logprobs``, since the training network's are the ``logprobs`` of an :class:`Experience`.
        sampler_logprobs: ``[B, R]`` float32, log-probs of the same tokens in the distribution that each was drawn from:
            with the repetition penalty, no eos before the shortest length, and renormalised over what top-k and top-p
            kept. 0 for a greedy choice; bit by bit ``logprobs`` where nothing changed the distribution.
        prompt_index: ``[B]`` int64, the prompt's number in the run's endless stream of prompts.
        sample_index: ``[B]`` int64, which of the prompt's answers this is.
        prompts: ``B`` texts as the data set gave them (a dialogue is joined by its template).
        responses: ``B`` texts without special tokens.
        rows: ``B`` further columns of the data set, for Python rewards.
        action_mask: ``[B, R]`` bool, True for tokens that the policy chose, False for those that an environment or a
            tool put in; None: the policy chose every one.
        allowed: one set of tokens for each token of the responses, row by row: what it was drawn from, where a masking
            policy cut the others off (NLPO); each holds its token. None: all tokens. Kept as the columns
            ``allowed_ids`` (of the length kind ``allowed``) and ``allowed_counts``.
        pad_id: shown behind the end of shorter rows; what it is has no influence on anything.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        prompt_len: np.ndarray,
        response_len: np.ndarray,
        finished: np.ndarray,
        logprobs: np.ndarray,
        sampler_logprobs: np.ndarray,
        prompt_index: np.ndarray,
        sample_index: np.ndarray,
        prompts: list[str],
        responses: list[str],
        rows: list[dict[str, Any]],
        action_mask: np.ndarray | None = None,
        allowed: TokenSets | None = None,
        pad_id: int = 0,
    ) -> None:
        row_columns = {
            "prompt_len": prompt_len,
            "response_len": response_len,
            "finished": finished,
            "prompt_index": prompt_index,
            "sample_index": sample_index,
            "prompts": prompts,
            "responses": responses,
            "rows": rows,
        }
        super().__init__(row_columns, {TOKEN: prompt_len + response_len, RESPONSE: response_len})
        self._put(TOKEN, {"tokens": tokens}, fill=pad_id)
        if action_mask is None:
            action_mask = self.mask_of(RESPONSE)
        columns = {"rollout_logprobs": logprobs, "sampler_logprobs": sampler_logprobs, "action_mask": action_mask}
        self._put(RESPONSE, columns)
        if allowed is not None:
            row = np.repeat(np.arange(len(response_len)), response_len)
            self.sizes[ALLOWED] = np.bincount(row, allowed.counts, len(response_len)).astype(np.int64)
            self.columns["allowed_ids"] = Column(ALLOWED, allowed.ids)
            self.columns["allowed_counts"] = Column(RESPONSE, allowed.counts)

    @property
    def allowed(self) -> TokenSets | None:
        """One set for each token of the responses, row by row; None where every token was allowed."""
        if "allowed_ids" not in self:
            return None
        return TokenSets(self.flat("allowed_ids"), self.flat("allowed_counts"))

    @property
    def logprobs(self) -> np.ndarray:
        """``[B, R]`` float32, of the generation engine."""
        return self["rollout_logprobs"]

    @property
    def lengths(self) -> np.ndarray:
        """``[B]`` int64, tokens of prompt and response together."""
        return self.sizes[TOKEN]

    @property
    def width(self) -> int:
        """R, the longest response (at least 1, so that arrays have a column)."""
        return self.widest(RESPONSE)

    @property
    def mask(self) -> np.ndarray:
        """``[B, R]`` float32, 1 for each token of the response, whoever chose it."""
        return response_mask(self.response_len, self.width)

    @property
    def actions(self) -> np.ndarray:
        """``[B, R]`` float32, 1 for each token of the response that the policy chose; losses and statistics are over
        these.
        """
        return self["action_mask"].astype(np.float32)

    @property
    def chosen_len(self) -> np.ndarray:
        """``[B]`` int64, how many tokens of each response the policy chose."""
        return self["action_mask"].sum(axis=1)


class Experience(Rollout):
    """A rollout with everything that the update needs: columns of the length kind ``response``, which show as
    ``[B, R]`` arrays aligned with the response's tokens, and columns with one number per row. PPO's:

    - ``logprobs`` float32 of the actor before the update, by the training network; ``ref_logprobs`` of the reference;
    - ``values`` float32, the critic's value of the state before each token;
    - ``scores`` ``[B]`` float32, the weighted sum of the reward sources, before normalising, the missing-EOS rule and
      clipping; ``shaped_scores`` what entered the token rewards; ``score_parts`` ``[B]`` each, by the reward's name;
    - ``kl`` float32 per-token estimates; ``rewards``, ``advantages``, ``returns`` float32.

    Args:
        rollout: the rows.
        score_parts: ``[B]`` float32 each, by the reward's name.
        columns: ``[B, R]`` or ``[B]`` arrays by name.
    """

    def __init__(self, rollout: Rollout, score_parts: Mapping[str, np.ndarray] = {}, **columns: np.ndarray) -> None:
        self.columns, self.sizes, self._padded = dict(rollout.columns), dict(rollout.sizes), {}
        self._put(RESPONSE, {name: values for name, values in columns.items() if values.ndim == 2})
        self._put(None, {name: values for name, values in columns.items() if values.ndim == 1})
        self._put(None, {_PARTS + name: part for name, part in score_parts.items()})

    @property
    def rollout(self) -> Rollout:
        """The rows as they were sampled."""
        made = Rollout._of(self.columns, self.sizes)
        made._padded = self._padded
        return made

    @property
    def logprobs(self) -> np.ndarray:
        """``[B, R]`` float32 before the update, by the training network."""
        return self["logprobs"]

    @property
    def plain_logprobs(self) -> np.ndarray:
        """``[B, R]`` float32 of the whole policy before the update: ``logprobs``, unless those are over the allowed
        tokens alone. The reference and the generation engine give such, too.
        """
        return self["plain_logprobs" if "plain_logprobs" in self else "logprobs"]

    @property
    def score_parts(self) -> dict[str, np.ndarray]:
        """``[B]`` float32 each, by the reward's name."""
        return {name.removeprefix(_PARTS): self[name] for name in self.columns if name.startswith(_PARTS)}


def join_arrays(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """``[b]`` or ``[b, r]`` arrays of several batches as one, padded with zeros to the widest."""
    if arrays[0].ndim == 1:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    return np.concatenate([_pad_to(array, width) for array in arrays])


def join_micro_batches(pieces: Sequence[np.ndarray], groups: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Join the ``[b]`` or ``[b, r]`` float arrays of micro batches to ``[B]`` or ``[B, width]``, in the rows' order.

    Args:
        pieces: one array per micro batch; none gives ``[0, width]``.
        groups: the numbers of each micro batch's rows, all of ``0 ... B - 1`` once.
        width: R of the result.
    """
    if not pieces:
        return np.zeros((0, width), dtype=np.float32)
    joined = join_arrays(pieces)[np.argsort(np.concatenate(groups))]
    return _pad_to(joined, width) if joined.ndim == 2 else joined


def _pad_to(array: np.ndarray, width: int) -> np.ndarray:
    missing = width - array.shape[1]
    return array if missing <= 0 else np.pad(array, ((0, 0), (0, missing)))
