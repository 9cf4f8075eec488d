"""Bytes that a forward keeps for its backward, and bytes that are there only while something runs.

One class per kind of implementation, so that another implementation is another class and not a change everywhere:

- :class:`PlainLayer`: paddlenlp's layers, operator by operator, as they are;
- :class:`FlashLayer`: the same with an attention that stores no scores (``use_flash_attention`` on a GPU);
- :class:`WholeHead`: logits of all wanted positions at once (:mod:`alignment.losses.logprobs`);
- :class:`ChunkedHead`: the same for so many positions at a time (:mod:`alignment.engine.label_scores`);
- :class:`FusedLayer`, :class:`FusedHead`: the CPU kernels (:mod:`alignment.kernels`), which read packed rows, so that
  padding costs nothing, and never make a whole matrix of logits or scores; everything is float32. What they allocate
  by themselves ("buffers") Paddle's allocator does not see.

The counts were derived by writing down what each operator's gradient needs, the way Korthikanti et al. 2022
(arXiv:2205.05198, section 4, equations 1-4) do for Megatron's layer, and agree with what Paddle's allocator reports in
float32 for all four architectures (``tests/plan/test_activations.py``). In half precision they follow from the
same code, whose norms and softmax keep float32 copies, and have not been measured.

Notation: ``h`` hidden, ``q`` width of the query heads, ``kv`` of the key heads, ``i`` intermediate, ``a`` heads,
``d`` width of a head, ``s`` tokens of a row, ``t`` tensor ranks. Everything is per token unless it says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.plan.shapes import UNFUSED_GATE, ModelShape

#: Projections that read the same input, each of which keeps a copy under tensor parallelism: q, k, v, gate, up.
COLUMN_INPUTS = 5
FLOAT = 4
#: Tokens that go through all layers of the kernels together without gradient (``kGroup`` of ops.cc).
GROUP = 1024
#: Columns and rows of logits that exist at a time (``kVocabularyBlock`` and ``kTokenBlock`` of vocabulary.h).
VOCABULARY_BLOCK, TOKEN_BLOCK = 1024, 2048


@dataclass(frozen=True)
class PlainLayer:
    """A decoder layer of paddlenlp without fused operators.

    Attributes:
        shape: the model.
        item: bytes of an activation: 4, or 2 in half precision.
        tensor: tensor ranks.
        sequence_parallel: whether what lies between the matrices is divided along the sequence.
    """

    shape: ModelShape
    item: int = 4
    tensor: int = 1
    sequence_parallel: bool = False

    #: Whether the scores of attention, ``a s`` numbers per token, are there.
    stores_scores = True

    @property
    def outside(self) -> int:
        """By what the activations between the matrices are divided (Korthikanti et al. 2022, section 4.2.2)."""
        return self.tensor if self.sequence_parallel else 1

    def norm(self) -> float:
        """Kept by an RMS norm besides its output: its input and the normalised input. In half precision the input is
        kept as two float32 copies (of the square, and of the product with a float32 factor).
        """
        h = self.shape.hidden
        return (8 if self.item == 4 else 10) * h / self.outside + 4 / self.outside

    def kept(self, row_tokens: float) -> float:
        """Bytes that one layer keeps per token of a row of ``row_tokens``."""
        shape, item, t = self.shape, self.item, self.tensor
        h, inner = shape.hidden, shape.intermediate
        # What the norms hand to the projections: one tensor each; under tensor parallelism a copy per projection.
        inputs = 2 * h if t == 1 else COLUMN_INPUTS * h
        gate = 4 * inner if shape.model_type in UNFUSED_GATE else 3 * inner
        divided = item * (self.heads() + gate) / t + self.scores(row_tokens) / t
        return 2 * self.norm() + item * inputs + divided + item * 2 * shape.head_dim

    def heads(self) -> float:
        """Numbers kept around the heads: q and its rotated half, k and its rotated half; q divided by the root of d,
        k and v repeated to all heads; the output.
        """
        return 6 * self.shape.query + 2 * self.shape.key

    def scores(self, row_tokens: float) -> float:
        """Bytes of the softmax's output; in half precision it is float32 and a half-precision copy is kept too."""
        return (4 if self.item == 4 else 6) * self.shape.heads * row_tokens

    def input(self) -> float:
        """Bytes of a layer's input: what recomputation keeps (Chen et al. 2016, arXiv:1604.06174)."""
        return self.item * self.shape.hidden / self.outside

    def running(self, row_tokens: float) -> float:
        """Bytes that are there at most while one layer runs without gradient, its input included."""
        shape, item, t = self.shape, self.item, self.tensor
        h, q, kv, inner = shape.hidden, shape.query / t, shape.key / t, shape.intermediate / t
        copies = 4 if shape.model_type == "qwen2" else 3
        scores = (1 if item == 4 else 0.75) * copies * 4 * shape.heads / t * row_tokens if self.stores_scores else 0.0
        attention = item * (2 * h + 3 * q + kv) + scores
        return max(attention, item * (5 * h + 3 * inner)) + item * h

    def backward_working(self, row_tokens: float) -> float:
        """Bytes on top of what is kept while one layer's backward runs: two gradients of the inner width, or two of
        the scores' size where those are more than what the feed-forward has given back by then.
        """
        inner = self.shape.intermediate / self.tensor
        scores = 2 * self.scores(row_tokens) / self.tensor
        return max(self.item * 2 * inner, scores - self.item * 3 * inner)


@dataclass(frozen=True)
class FlashLayer(PlainLayer):
    """The plain layer with FlashAttention (Dao et al. 2022, arXiv:2205.14135): q, k, v as they are, the output and one
    float32 number per head and token in place of the scores. Not run on this toolkit's test machines.
    """

    stores_scores = False

    def heads(self) -> float:
        return 4 * self.shape.query + 4 * self.shape.key

    def scores(self, row_tokens: float) -> float:
        return 4 * self.shape.heads


def layer_kind(
    shape: ModelShape, item: int, tensor: int = 1, sequence_parallel: bool = False, flash: bool = False
) -> PlainLayer:
    """The implementation that a run uses."""
    return (FlashLayer if flash else PlainLayer)(shape, item, tensor, sequence_parallel)


@dataclass(frozen=True)
class WholeHead:
    """LM head and log-probabilities of all wanted positions at once. Bytes per wanted position.

    Attributes:
        shape: the model.
        item: bytes of an activation.
        tensor: tensor ranks, which share the vocabulary where their number divides it.
        temperature: of sampling; logits that are divided by one other than 1 are a copy.
    """

    shape: ModelShape
    item: int = 4
    tensor: int = 1
    temperature: float = 1.0

    @property
    def columns(self) -> int:
        """Columns of the logits on this rank."""
        vocab = self.shape.vocab
        return vocab // self.tensor if vocab % self.tensor == 0 else vocab

    def kept(self) -> float:
        """For the backward: the states that were gathered and the probabilities in float32."""
        return self.item * self.shape.hidden + 4 * self.columns

    def running(self) -> float:
        """At most: logits, their float32 or scaled copy, shifted logits, probabilities and, while these are divided by
        their sum or multiplied for the entropy, a result of the same size.
        """
        copy = 4 if self.item == 2 or self.temperature != 1.0 else 0
        return self.item * self.shape.hidden + (self.item + copy + 12) * self.columns


#: Labels whose logits exist at a time (``LABELS_AT_ONCE`` of :mod:`alignment.engine.label_scores`).
LABELS_AT_ONCE = 512


@dataclass(frozen=True)
class ChunkedHead:
    """LM head and log-probabilities in chunks that the backward makes anew. Bytes in all for a number of labels.

    Attributes:
        whole: of one chunk.
    """

    whole: WholeHead

    def kept(self, labels: float) -> float:
        """For the backward: of one chunk what it keeps; of several the states' pieces."""
        if labels <= LABELS_AT_ONCE:
            return labels * self.whole.kept()
        return labels * self.whole.item * self.whole.shape.hidden

    def running(self, labels: float) -> float:
        """While a chunk runs, or is made anew: the states, their pieces, and one chunk's logits."""
        if labels <= LABELS_AT_ONCE:
            return labels * self.whole.running()
        return 2 * self.kept(labels) + LABELS_AT_ONCE * self.whole.running()


@dataclass(frozen=True)
class FusedLayer(PlainLayer):
    """A decoder layer by the kernels, of real tokens alone."""

    stores_scores = False

    def kept(self, row_tokens: float) -> float:
        """Bytes per token between forward and backward: the output (the next layer's input), two scales of norms,
        q, k, v, a normaliser per head, the heads' output, the residual between the halves, gate and up.
        """
        shape = self.shape
        return FLOAT * (2 * shape.hidden + 2 + 2 * shape.query + 2 * shape.key + shape.heads + 2 * shape.intermediate)

    def scores(self, row_tokens: float) -> float:
        return FLOAT * self.shape.heads

    def input(self) -> float:
        return FLOAT * self.shape.hidden

    def running(self, row_tokens: float) -> float:
        """Without gradient: the stack's input and output, and then what the final norm adds to its input."""
        return FLOAT * 3 * self.shape.hidden

    def backward_working(self, row_tokens: float) -> float:
        """The gradients of a layer's output and input."""
        return FLOAT * 2 * self.shape.hidden

    def buffers(self) -> float:
        """Bytes per token that a layer's backward allocates by itself."""
        h, q, kv, inner = self.shape.hidden, self.shape.query, self.shape.key, self.shape.intermediate
        return FLOAT * (inner + max(inner, q + 2 * kv) + max(inner, q) + max(inner, h) + h)


def stack_buffers(shape: ModelShape, tokens: float, longest: float, tensor: int = 1) -> float:
    """Bytes that the layers without gradient work in: those of one group of packed tokens.

    Args:
        shape: the model.
        tokens: of the call.
        longest: tokens of the longest sequence, which is never cut.
        tensor: tensor ranks.
    """
    h, q, kv, inner = shape.hidden, shape.query / tensor, shape.key / tensor, shape.intermediate / tensor
    return FLOAT * min(tokens, max(GROUP, longest)) * max(h + 2 * q + 2 * kv, h + 2 * inner)


@dataclass(frozen=True)
class FusedHead:
    """LM head and log-probabilities by the kernels. Bytes in all for a number of labels."""

    shape: ModelShape

    def kept(self, labels: float) -> float:
        """For the backward: the states that were gathered, and a few numbers per label."""
        return labels * (FLOAT * self.shape.hidden + 6 * FLOAT)

    def running(self, labels: float) -> float:
        """While it runs forward: no more than it keeps."""
        return self.kept(labels)

    def buffers(self, labels: float) -> float:
        """Bytes of the block of logits that exists at a time."""
        return FLOAT * min(labels, TOKEN_BLOCK) * VOCABULARY_BLOCK


#: Copies of the plain path's key-value cache: a step makes it anew by concatenation, old and new are there together.
GROWING = 2.0


def cache_bytes(shape: ModelShape, layers: int, rows: float, tokens: float, item: int, tensor: int = 1) -> float:
    """Bytes of one key-value cache: keys and values of every token, layer and key head (Pope et al. 2022,
    arXiv:2211.05102, section 2.1).
    """
    return 2.0 * layers * rows * tokens * shape.key / tensor * item
