"""The generation engine: prompts (token ids) in, a :class:`~alignment.rollout.rollout.Rollout` out.

:class:`GenerationEngine` checks the prompts and chooses between two ways to the same tokens: the rollout engine
(:mod:`~alignment.rollout.continuous`) for whole and tensor-parallel models of the Llama family, and paddlenlp's own
modules (:mod:`~alignment.rollout.plain`) for everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle

from alignment.errors import ModelError
from alignment.kernels.ops import kernels
from alignment.log import get_logger
from alignment.ppo.models import keep_tokens, predicted_tokens
from alignment.ppo.models.decoder import decoder_of
from alignment.ppo.models.forward import backbone_of, longest_row
from alignment.rollout.continuous import BatchFigures, ContinuousBatch
from alignment.rollout.gpu_check import gpu_layers
from alignment.rollout.layers import CpuKernelOps, LayerOps
from alignment.rollout.masking import MaskingPolicy
from alignment.rollout.plain import PlainBatch
from alignment.rollout.plain_decoder import PlainDecoder
from alignment.rollout.rollout import Rollout
from alignment.rollout.sampler import KeptMass, SamplingSettings
from alignment.rollout.slots import GenerationPrompt, RowTable
from alignment.rollout.stopping import StopRule
from alignment.tally import Tally

__all__ = ["GenerationEngine", "GenerationPrompt"]

# The cache's size where no budget of tokens is given: on a CPU, and as a part of a GPU's memory.
_CACHE_BYTES = 1 << 30
_CACHE_SHARE = 1 / 8


class GenerationEngine:
    """Answers prompts with a causal language model.

    Args:
        model: a paddlenlp causal language model; its parameters are used as they are, nothing is copied.
        tokenizer: for decoding and for the pad id.
        eos_ids: tokens that end an answer.
        context_length: the longest row that the model can take; ``None``: as its config says.
        batch_size: answers that the plain way generates together (with ``most_rows`` so many).
        schedule: of the pipeline, where ``model`` is a stage; every process of it makes the same calls.
        fused: whether to use the rollout engine where it can be used.
        token_budget: tokens that the rollout engine's cache holds; 0 for as many as :func:`cache_bytes` hold.
        most_rows: answers that are under way at once; None for as many as there is room for.
        tokens: of the tokenizer; rows of the model beyond them are never sampled. None: all rows are tokens.
        masking: says which tokens may be sampled (NLPO); what it allowed is in the rollout. None: all may.
        progress: show how many answers have ended, by a bar (True) or by lines (False); None: show nothing.

    Raises:
        ModelError: the model has no row for a token that ends answers.

    Attributes:
        ops: the rollout engine's layers; None where the plain way is taken.
        figures: of the rollout engine's newest batch.
        kept: how much of the policy's probability the sampling has left so far.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        eos_ids: Sequence[int],
        context_length: int | None,
        batch_size: int,
        schedule: Any = None,
        *,
        fused: bool = True,
        token_budget: int = 0,
        most_rows: int | None = None,
        tokens: int | None = None,
        masking: MaskingPolicy | None = None,
        progress: bool | None = None,
    ) -> None:
        self.model, self.tokenizer, self.schedule, self.masking = model, tokenizer, schedule, masking
        masker = masking.model if masking is not None else None
        self._models = [model] if masker is None else [model, masker]
        self.eos_ids = tuple(int(i) for i in eos_ids)
        for each in self._models if tokens is not None else ():
            keep_tokens(each, tokens)
        unknown = [i for i in self.eos_ids if not 0 <= i < predicted_tokens(model)]
        if unknown:
            raise ModelError(
                f"the tokenizer ends answers with token {unknown[0]}, and the model predicts {predicted_tokens(model)} "
                "tokens: no answer could end. Does the tokenizer belong to it?"
            )
        sizes = [predicted_tokens(each) for each in self._models]
        if len(set(sizes)) > 1:
            raise ModelError(
                f"the policy predicts {sizes[0]} tokens and the masking policy {sizes[1]}: it is to be a copy of it"
            )
        self.context_length = longest_row(backbone_of(model), context_length)
        self.token_budget, self.most_rows, self.progress = token_budget, most_rows, progress
        self.batch_size = max(1, most_rows or batch_size)
        self.ops: LayerOps | None = None
        self._masking_ops: LayerOps | None = None
        self.figures: BatchFigures | None = None
        self._stop, self.kept = StopRule(self.eos_ids, (), tokenizer), KeptMass()
        if fused:
            self.ops = self._layers(model)
            if self.ops is not None and masker is not None:
                self._masking_ops = self._layers(masker)
                self.ops = self.ops if self._masking_ops is not None else None
        # Only Mistral's models have sliding windows that are in force; paddlenlp's code ignores them.
        config = model.config
        window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
        decoders = [PlainDecoder(each, schedule) for each in self._models]
        self._plain = PlainBatch(decoders[0], window, self.pad_id, self.kept, masking, *decoders[1:])

    def _layers(self, model: Any) -> LayerOps | None:
        """How the rollout engine computes a model's layers; None, said once, where it cannot."""
        decoder = "a pipeline's stages generate together" if self.schedule is not None else decoder_of(model)
        if isinstance(decoder, str):
            get_logger().info("generation goes through paddlenlp's own layers, which is slower: %s", decoder)
            return None
        if paddle.get_device().startswith("gpu"):
            return gpu_layers(model, decoder)
        found = kernels() if decoder.layers[0][0].dtype == paddle.float32 else None
        return LayerOps(model, decoder) if found is None else CpuKernelOps(model, decoder, found)

    def generate(
        self,
        prompts: Sequence[GenerationPrompt],
        settings: SamplingSettings,
        num_return_sequences: int = 1,
        batch_size: int | None = None,
    ) -> Rollout:
        """Answer each prompt ``num_return_sequences`` times.

        Args:
            prompts: at least one.
            settings: limits and sampling.
            num_return_sequences: answers per prompt, beside each other in the result.
            batch_size: answers that the plain way generates together; the engine's own if not given.

        Returns:
            ``len(prompts) * num_return_sequences`` rows in the order of the prompts.

        Raises:
            ModelError: a prompt is empty or leaves no room for an answer, or the model gave NaN.
        """
        self._check(prompts)
        stop = self.stop_rule(settings.stop)
        were_training = [each for each in self._models if each.training]
        for each in were_training:
            each.eval()
        answers, shown = len(prompts) * num_return_sequences, self.progress is not None
        context = self.context_length
        tally = Tally("generating", answers, unit="answers", bar=bool(self.progress), active=shown)
        try:
            with paddle.no_grad(), tally:
                if self.ops is not None:
                    table = RowTable.start(
                        prompts, num_return_sequences, settings, stop, self.context_length, tally.add
                    )
                    per_token = sum(ops.bytes_per_token for ops in (self.ops, self._masking_ops) if ops is not None)
                    budget = self.token_budget or cache_bytes() // per_token
                    batch = ContinuousBatch(
                        self.ops, table, settings, budget, self.most_rows, self.kept, self.masking, self._masking_ops
                    )
                    self.figures = batch.run()
                    return table.rollout(self.pad_id)
                parts = []
                per_batch = max(1, (batch_size or self.batch_size) // num_return_sequences)
                for start in range(0, len(prompts), per_batch):
                    some = prompts[start : start + per_batch]
                    table = RowTable.start(some, num_return_sequences, settings, stop, context, tally.add)
                    self._plain.run(table, settings)
                    parts.append(table.rollout(self.pad_id))
                return Rollout.join(parts)
        finally:
            for each in were_training:
                each.train()

    def stop_rule(self, strings: Sequence[str]) -> StopRule:
        """What ends an answer; kept between rollouts with what it has learnt of the tokens."""
        if (self._stop.strings, self._stop.eos_ids) != (tuple(strings), self.eos_ids):
            self._stop = StopRule(self.eos_ids, tuple(strings), self.tokenizer)
        return self._stop

    @property
    def pad_id(self) -> int:
        """What fills rows behind their end; it has no influence."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.eos_ids[0])

    def _check(self, prompts: Sequence[GenerationPrompt]) -> None:
        vocabulary = predicted_tokens(self.model)
        for prompt in prompts:
            length = len(prompt.input_ids)
            if length == 0:
                raise ModelError(f"prompt {prompt.prompt_index} has no token: {prompt.prompt[:80]!r}")
            if length >= self.context_length:
                raise ModelError(
                    f"prompt {prompt.prompt_index} has {length} tokens, and the model's context is "
                    f"{self.context_length}: no room for an answer. Shorten it (in PPO, max_src_len does): "
                    f"{prompt.prompt[:80]!r}"
                )
            largest = int(np.max(prompt.input_ids))
            if largest >= vocabulary or int(np.min(prompt.input_ids)) < 0:
                raise ModelError(
                    f"prompt {prompt.prompt_index} has the token {largest}, and the model knows {vocabulary} tokens; "
                    f"does the tokenizer belong to it? {prompt.prompt[:80]!r}"
                )
            if prompt.max_new_tokens is not None and prompt.max_new_tokens < 1:
                raise ModelError(f"prompt {prompt.prompt_index}: max_new_tokens {prompt.max_new_tokens} is below 1")


def cache_bytes() -> int:
    """How large the rollout engine's cache may be unless the user says: 1 GiB, on a GPU an eighth of its memory."""
    if not paddle.get_device().startswith("gpu"):
        return _CACHE_BYTES
    return int(paddle.device.cuda.get_device_properties().total_memory * _CACHE_SHARE)
