"""Score models: a decoder backbone with a linear head that gives every token a score.

Reward, cost and value (critic) models are all of this kind. The head reads the last layer's hidden state after the
final norm; the score of a row is the score of its last real token, found from the row's length (Safe RLHF, Dai et al.
2023, arXiv:2310.12773, trains its reward and cost models this way).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import paddle
from paddle import nn
from paddlenlp.transformers import (
    GemmaModel,
    GemmaPretrainedModel,
    LlamaModel,
    LlamaPretrainedModel,
    MistralModel,
    MistralPreTrainedModel,
    PretrainedConfig,
    PretrainedModel,
    Qwen2Model,
    Qwen2PretrainedModel,
)

from alignment.errors import ModelError, nearest

from .forward import final_hidden_states, take_end
from .normalizers import DEFAULT_MOMENTUM, Normalizer, make_normalizer

SCORE_TYPES = ("reward", "cost", "critic")


@dataclass
class ScoreModelOutput:
    """What a score model returns.

    Attributes:
        scores: ``[batch, seq, score_dim]`` float32, the score at every token (normalised if the model normalises).
        end_scores: ``[batch, score_dim]`` float32, the score at each row's last real token.
    """

    scores: paddle.Tensor
    end_scores: paddle.Tensor


class ScoreModelMixin:
    """All that a score model adds to a backbone; combined with a paddlenlp base class below, once per architecture.

    The config's attributes: ``score_dim`` (1), ``bias`` (False), ``score_type`` (``"reward"``), ``do_normalize``
    (False), ``normalizer_type`` (None, ``"RunningMeanStd"`` or ``"ExponentialMovingAverage"``), ``momentum`` (0.9),
    ``mean``, ``var`` and ``normalizer_count`` (the statistics, written back on saving).
    """

    backbone_class: ClassVar[type[PretrainedModel]]
    base_model_prefix: str
    config: PretrainedConfig
    score_head: nn.Linear
    normalizer: Normalizer

    def _build(self, config: PretrainedConfig) -> None:
        fill_score_config(config)
        setattr(self, self.base_model_prefix, self.backbone_class(config))
        self.score_head = nn.Linear(config.hidden_size, config.score_dim, bias_attr=None if config.bias else False)
        self.normalizer = make_normalizer(
            config.normalizer_type,
            config.score_dim,
            momentum=config.momentum,
            mean=config.mean,
            var=config.var,
            count=config.normalizer_count,
        )

    @property
    def backbone(self) -> PretrainedModel:
        """The decoder without a head."""
        return getattr(self, self.base_model_prefix)

    def get_input_embeddings(self) -> nn.Layer:
        """Return the token embedding, as paddlenlp's models do."""
        return self.backbone.embed_tokens

    def reset_head(self, seed: int) -> None:
        """Draw a new head: weights from ``normal(0, 1 / sqrt(hidden_size + 1))``, bias 0.

        As in Stiennon et al. 2020, arXiv:2009.01325, appendix B.1.

        Args:
            seed: the same seed gives the same head, whatever was drawn before.
        """
        weight = self.score_head.weight
        draw = np.random.default_rng(seed).standard_normal(weight.shape) / math.sqrt(weight.shape[0] + 1)
        weight.set_value(paddle.to_tensor(draw.astype(np.float32)).astype(weight.dtype))
        if self.score_head.bias is not None:
            self.score_head.bias.set_value(paddle.zeros_like(self.score_head.bias))

    def raw_scores(self, hidden_states: paddle.Tensor) -> paddle.Tensor:
        """Apply the head in float32: ``[batch, seq, hidden]`` of any dtype -> ``[batch, seq, score_dim]`` float32."""
        scores = paddle.matmul(hidden_states.astype("float32"), self.score_head.weight.astype("float32"))
        if self.score_head.bias is not None:
            scores = scores + self.score_head.bias.astype("float32")
        return scores

    def normalize(self, scores: paddle.Tensor) -> paddle.Tensor:
        """Normalise raw scores ``[..., score_dim]`` if the config says so.

        Rewards are shifted and scaled, costs (whose sign has a meaning) only scaled, values left alone.
        """
        if not self.config.do_normalize or self.config.score_type == "critic":
            return scores
        return self.normalizer.standardise(scores, shift=self.config.score_type == "reward")

    def forward(
        self,
        input_ids: paddle.Tensor,
        lengths: paddle.Tensor | np.ndarray | None = None,
        position_ids: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
    ) -> ScoreModelOutput:
        """Score right-padded rows.

        Args:
            input_ids: ``[batch, seq]`` int64.
            lengths: ``[batch]``, the number of real tokens of each row; all are real if not given.
            position_ids: ``[batch, seq]``; 0, 1, 2, ... if not given.
            attention_mask: a boolean mask ``[batch, 1, seq, seq]`` that is causal already, or none for a plain causal
                one.
        """
        hidden = final_hidden_states(self, input_ids, position_ids=position_ids, mask=attention_mask)
        scores = self.normalize(self.raw_scores(hidden))
        if lengths is None:
            lengths = np.full([input_ids.shape[0]], input_ids.shape[1], dtype=np.int64)
        return ScoreModelOutput(scores, take_end(scores, lengths))

    def set_normalizer(
        self,
        mean: Sequence[float] | None = None,
        var: Sequence[float] | None = None,
        normalizer_count: int | None = None,
    ) -> None:
        """Set the normaliser's statistics, ``[score_dim]`` each; what is None stays."""
        if mean is not None:
            self.normalizer.mean.set_value(np.asarray(mean, dtype=np.float32))
        if var is not None:
            self.normalizer.var.set_value(np.asarray(var, dtype=np.float32))
        if normalizer_count is not None:
            self.normalizer.count.set_value(np.array(normalizer_count, dtype=np.int64))

    def write_normalizer_to_config(self) -> None:
        """Copy the normaliser's statistics into the config, so that ``config.json`` keeps them too."""
        self.config.mean = [float(x) for x in self.normalizer.mean.numpy()]
        self.config.var = [float(x) for x in self.normalizer.var.numpy()]
        self.config.normalizer_count = int(self.normalizer.count)

    def save_pretrained(self, save_dir: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as paddlenlp's models do; ``config.json`` also keeps the normaliser and the score type."""
        self.write_normalizer_to_config()
        super().save_pretrained(str(save_dir), *args, **kwargs)  # type: ignore[misc]


class LlamaModelForScore(ScoreModelMixin, LlamaPretrainedModel):
    """A score model over paddlenlp's Llama."""

    backbone_class = LlamaModel

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self._build(config)


class Qwen2ModelForScore(ScoreModelMixin, Qwen2PretrainedModel):
    """A score model over paddlenlp's Qwen2."""

    backbone_class = Qwen2Model

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self._build(config)


class MistralModelForScore(ScoreModelMixin, MistralPreTrainedModel):
    """A score model over paddlenlp's Mistral."""

    backbone_class = MistralModel

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self._build(config)


class GemmaModelForScore(ScoreModelMixin, GemmaPretrainedModel):
    """A score model over paddlenlp's Gemma."""

    backbone_class = GemmaModel

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self._build(config)


#: ``model_type`` -> score model.
SCORE_MODELS: dict[str, type[PretrainedModel]] = {
    "llama": LlamaModelForScore,
    "qwen2": Qwen2ModelForScore,
    "mistral": MistralModelForScore,
    "gemma": GemmaModelForScore,
}


class AutoModelForScore:
    """Chooses the score model that fits a config or a folder."""

    def __init__(self) -> None:
        raise TypeError("use AutoModelForScore.from_pretrained(folder) or AutoModelForScore.from_config(config)")

    @staticmethod
    def from_config(config: PretrainedConfig, *, dtype: str = "float32", seed: int = 42) -> PretrainedModel:
        """Return a score model with random weights.

        Args:
            config: a paddlenlp config of a supported architecture; missing score attributes are filled with their
                defaults.
            dtype: of the weights.
            seed: of the head.

        Raises:
            ModelError: architecture not supported, or an unknown score or normaliser type.
        """
        model_class = SCORE_MODELS.get(config.model_type)
        if model_class is None:
            raise ModelError(
                f"no score model for model_type {config.model_type!r}; supported are {', '.join(SCORE_MODELS)}"
            )
        model = model_class._from_config(config, dtype=dtype)
        model.reset_head(seed)
        return model

    @staticmethod
    def from_pretrained(path: str | os.PathLike, *, dtype: str = "float32", **settings: Any) -> PretrainedModel:
        """Return the score model of a folder: our own, a causal model's (new head) or one in Hugging Face's layout.

        Args:
            path: a folder or the name of a model on a hub.
            dtype: of the weights.
            settings: keyword arguments of :func:`alignment.ppo.models.loading.load_score_model`; what is not given
                stays as saved.

        Raises:
            ModelError: see :func:`alignment.ppo.models.loading.load_score_model`.
        """
        from .loading import load_score_model

        settings.setdefault("score_type", None)
        settings.setdefault("do_normalize", None)
        return load_score_model(path, dtype=dtype, **settings)


def fill_score_config(config: PretrainedConfig) -> None:
    """Give a config the score attributes that it lacks, and check those that it has.

    Raises:
        ModelError: ``score_type`` or ``score_dim`` has a value that does not exist.
    """
    defaults = {
        "score_dim": 1,
        "bias": False,
        "score_type": "reward",
        "do_normalize": False,
        "normalizer_type": None,
        "momentum": DEFAULT_MOMENTUM,
        "mean": None,
        "var": None,
        "normalizer_count": 0,
    }
    for name, value in defaults.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    if config.score_type not in SCORE_TYPES:
        raise ModelError(
            f"score_type {config.score_type!r} is unknown{nearest(str(config.score_type), SCORE_TYPES)}; it is one "
            f"of {', '.join(SCORE_TYPES)}"
        )
    if not isinstance(config.score_dim, int) or config.score_dim < 1:
        raise ModelError(f"score_dim must be a whole number of at least 1, got {config.score_dim!r}")


def ties_ends(model: PretrainedModel) -> bool:
    """Whether the LM head is the token embedding, so that a pipeline's first and last stage share it; a score model
    has no LM head.
    """
    return bool(getattr(model.config, "tie_word_embeddings", False)) and not isinstance(model, ScoreModelMixin)
