"""One row of a run as each model reads it, shown at the start, and its ids compared with the tokenizer's own file.

Most mistakes at the border between data and model (another template, reasoning that is gone, tokens that are split) can
be seen in one row, and in nothing else before the model is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from alignment.errors import DataError
from alignment.log import get_logger, say_once
from alignment.ppo.data import Encoder, PromptTemplate
from alignment.ppo.data.template import Segment

ANSWER = "(an answer)"
_SHOWN = 1200  # characters of one stretch of text


class _Recorder(Encoder):
    """An encoder that keeps the segments which it tokenised."""

    def __init__(self, tokenizer: Any, template: PromptTemplate, limits: Any) -> None:
        super().__init__(tokenizer, template, limits)
        self.conversations: list[list[Segment]] = []

    def segment_pieces(self, segments: Sequence[Segment]) -> list[tuple[list[int], list[bool]]]:
        self.conversations.append(list(segments))
        return super().segment_pieces(segments)


def show_sample(dataset: Any, role: str, *, with_ids: bool = False, what: str = "") -> None:
    """Log the data set's first row as a model reads it, and compare its ids with the tokenizer's own file.

    Args:
        dataset: a :class:`~alignment.ppo.data.TokenizedDataset`.
        role: the model, or models.
        with_ids: whether the token ids are shown, too.
        what: what follows a prompt that has no answer.

    Raises:
        DataError: the folder's ``tokenizer.json`` gives other ids.
    """
    recorder = _Recorder(dataset.tokenizer, dataset.template, dataset.limits)
    encoded = dataset.encode(recorder, dataset.example)
    if isinstance(encoded, str):  # the first row is always a kept one
        raise DataError(f"the sample of {dataset.name!r} was dropped when it was tokenised again: {encoded}")
    for conversation in list(recorder.conversations):
        check_ids(conversation, recorder, role)
    lines = []
    for number, ids in enumerate(encoded.rows):
        trained = encoded.trained or [at >= encoded.prompt_len for at in range(len(ids))]
        # A preference pair shares its prompt, which is shown once.
        start = encoded.prompt_len if number else 0
        label = ("better: ", "worse: ")[number] if len(encoded.rows) == 2 else ""
        if encoded.signs:
            label = f"{('safer', 'less safe')[number]} ({'unsafe' if encoded.signs[number] > 0 else 'safe'}): "
        lines.append(label + marked_text(recorder.tokenizer, ids[start:], trained[start:]) + what)
        if with_ids:
            lines.append(f"ids: {ids}")
    tokens = " and ".join(str(len(ids)) for ids in encoded.rows)
    text = "\n".join(lines)
    readers = f"{role} read it" if ", " in role else f"{role} reads it"
    get_logger().info("sample as the %s (%s tokens; [[T: ...]] is trained):\n%s", readers, tokens, text)


def show_scored(
    messages: Sequence[Any],
    tools: Any,
    tokenizer: Any,
    template: PromptTemplate,
    limits: Any,
    *,
    with_ids: bool = False,
    role: str = "reward model",
) -> None:
    """Log a prompt with an answer as a model reads it that scores and has a tokenizer or template of its own.

    Args:
        messages: of the prompt.
        tools: its tools, or None.
        tokenizer, template: the model's.
        limits: as for an encoder.
        with_ids: whether the token ids are shown, too.
        role: what the model is called.

    Raises:
        DataError: the folder's ``tokenizer.json`` gives other ids.
    """
    recorder = _Recorder(tokenizer, template, limits)
    prompt, answer = recorder.answered(messages, ANSWER, True, tools=tools)
    check_ids(recorder.conversations[-1], recorder, role)
    text = marked_text(tokenizer, prompt + answer, [False] * (len(prompt) + len(answer)))
    text += f"\nids: {prompt + answer}" if with_ids else ""
    get_logger().info("sample as the %s reads it (%d tokens):\n%s", role, len(prompt) + len(answer), text)


def marked_text(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> str:
    """Return ids as text, what is trained in ``[[T: ...]]``; very long stretches lose their middle."""
    text = ""
    for learnt, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        part = tokenizer.decode([index for index, _ in group])
        if len(part) > _SHOWN:
            part = f"{part[: _SHOWN // 2]} [... {len(part) - _SHOWN} characters ...] {part[-_SHOWN // 2 :]}"
        text += f"[[T: {part}]]" if learnt else part
    return text


def check_ids(segments: Sequence[Segment], encoder: Encoder, role: str) -> None:
    """Compare the ids of a row with those that the ``tokenizer.json`` in the tokenizer's folder gives.

    Each segment is compared, then the whole text. Where only the whole differs, a token would reach over the border of
    two segments (from the prompt into the answer, say); training keeps them apart, so that a prompt has the same ids
    whatever follows, and that is logged once.

    Args:
        segments: of a conversation.
        encoder: the one that tokenised it.
        role: the model, for messages.

    Raises:
        DataError: the ids of a segment differ; the first place is named.
    """
    tokenizer = encoder.tokenizer
    file = Path(getattr(tokenizer, "name_or_path", "") or "") / "tokenizer.json"
    if not file.is_file():
        return
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    for segment in segments:
        ours, theirs = encoder.text_ids(segment.text), own.encode(segment.text, add_special_tokens=False).ids
        if ours != theirs:
            at = _first_difference(ours, theirs)
            before = own.decode(theirs[:at], skip_special_tokens=False)[-60:]
            raise DataError(
                f"{role}: the tokenizer that trains and {file} give different ids, first after {before!r} (token "
                f"{at + 1} of a segment): {_named(own, ours[at : at + 4])} in training, "
                f"{_named(own, theirs[at : at + 4])} by the file. A model must be trained on the tokens that it will "
                "be served with: save the tokenizer's files again from one tokenizer, or name another in "
                "tokenizer_name_or_path"
            )
    pieces = [ids for ids, _ in encoder.segment_pieces(segments)]
    joined = [index for ids in pieces for index in ids]
    eos = str(tokenizer.eos_token)
    text = "".join(s.text + eos * (s.add_eos and not s.text.endswith(eos)) for s in segments)
    theirs = own.encode(text, add_special_tokens=False).ids
    at = _first_difference(joined, theirs)
    if joined != theirs:
        before = own.decode(theirs[:at], skip_special_tokens=False)[-30:]
        say_once(
            f"{role}: after {before!r} the text as a whole would have other tokens "
            f"({_named(own, theirs[at : at + 3])}) than its parts ({_named(own, joined[at : at + 3])}); prompt and "
            "answer are kept apart there, in training as in generation"
        )


def _first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _named(tokenizer: Any, ids: Sequence[int]) -> str:
    return ", ".join(f"{index} {tokenizer.id_to_token(index)!r}" for index in ids) or "nothing"
