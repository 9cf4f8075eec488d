"""One prompt template for all stages: how turns become text, and which pieces of that text the model is to learn.

A template gives :class:`Segment` s. Prompt and answer are separate segments and are tokenised separately
(:mod:`alignment.ppo.data.encode`), so that labels are masked by construction and the prompt of a generation has exactly
the token ids that it had in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.errors import DataError
from alignment.ppo.data.chat import chat_source, compile_template, read_text, special_token, tokenizer_folder

PROMPT_BEGIN = "BEGINNING OF CONVERSATION: "
PROMPT_USER = "USER: {input} "
PROMPT_ASSISTANT = "ASSISTANT:"  # without a space: the answer follows directly
PROMPT_INPUT = PROMPT_BEGIN + PROMPT_USER + PROMPT_ASSISTANT

TEMPLATE_FILE = "prompt_template.json"
_FORMAT = 1


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text that is tokenised by itself."""

    text: str
    is_answer: bool = False
    """Whether the assistant says it (and training learns it)."""
    add_eos: bool = False
    """Whether the end-of-sequence token follows, unless the text already ends with it."""


@dataclass(frozen=True)
class PromptTemplate:
    """How a conversation is written down.

    ``kind`` is ``"beaver"`` (PKU's template: the constants of this module), ``"chat"`` (``source`` is the tokenizer's
    own Jinja chat template) or ``"jinja"`` (``source`` is the user's). Jinja sources are rendered in a sandbox with
    ``messages`` (dicts with ``role`` and ``content``), ``add_generation_prompt``, ``eos_token`` and ``bos_token``.

    The Beaver template has no place for a system prompt: one is written between its beginning and the first user turn.
    """

    kind: str = "beaver"
    source: str = ""
    eos_token: str = ""
    bos_token: str = ""

    @classmethod
    def resolve(cls, spec: str | PromptTemplate | None, tokenizer: Any) -> PromptTemplate:
        """Return the template that ``spec`` means for ``tokenizer``.

        Args:
            spec: ``"beaver"``; ``"chat"``; a Jinja string; the name of a ``.jinja`` file; None for the template saved
                beside the tokenizer (``prompt_template.json``), else Beaver; or a template, of which the special tokens
                are filled in.
            tokenizer: its ``eos_token``, ``bos_token``, ``chat_template`` and folder (``name_or_path``) are read.

        Raises:
            DataError: the spec means nothing, the tokenizer has no chat template, or the Jinja source cannot be used
                (syntax, an unknown name, no header under ``add_generation_prompt``).
        """
        if isinstance(spec, PromptTemplate):
            template = spec
        elif spec is None:
            folder = tokenizer_folder(tokenizer)
            template = (PromptTemplate.load(folder) if folder else None) or PromptTemplate()
        elif not isinstance(spec, str) or not spec.strip():
            raise DataError(f'a prompt template is "beaver", "chat" or a Jinja string, not {spec!r}')
        elif spec == "beaver":
            template = PromptTemplate()
        elif spec == "chat":
            template = _saved_chat(tokenizer) or PromptTemplate("chat", chat_source(tokenizer))
        elif "{{" in spec or "{%" in spec:
            template = PromptTemplate("jinja", spec)
        elif spec.endswith((".jinja", ".j2")):
            template = PromptTemplate("jinja", read_text(Path(spec).expanduser()))
        else:
            raise DataError(
                f'{spec!r} is no prompt template: use "beaver", "chat" (the tokenizer\'s own), a Jinja string (with '
                f"{{{{ }}}} or "
                "{% %} in it) or the name of a .jinja file"
            )
        template = replace(
            template,
            eos_token=special_token(tokenizer, "eos"),
            bos_token=special_token(tokenizer, "bos"),
        )
        if template.kind != "beaver":
            template._probe()
        return template

    # ---------------------------------------------------------------- turns to text

    def format_turns(self, turns: Sequence[str], system: str | None = None) -> list[Segment]:
        """Write a conversation as segments.

        Args:
            turns: user and assistant by turns. An odd number ends with the user: a prompt, closed by the assistant's
                header. An even number ends with an answer, which is always the last segment.
            system: a system prompt, or None.

        Raises:
            DataError: ``turns`` is empty, or the Jinja source fails on this conversation or rewrites its earlier turns.
        """
        if not turns:
            raise DataError("a conversation without turns")
        return self._beaver_segments(turns, system) if self.kind == "beaver" else self._jinja_segments(turns, system)

    def format_prompt(self, input: str | Sequence[str], eos_token: str | None = None, system: str | None = None) -> str:
        """Return the text of a prompt, up to and with the assistant's header.

        Args:
            input: the user's text, or a conversation of odd length that ends with the user's turn.
            eos_token: what ends earlier answers; None for the tokenizer's.
            system: a system prompt, or None.

        Raises:
            DataError: the conversation does not end with the user's turn.
        """
        turns = [input] if isinstance(input, str) else list(input)
        if len(turns) % 2 == 0:
            raise DataError(f"a prompt must end with the user's turn, so have an odd number of turns, not {len(turns)}")
        template = self if eos_token is None else replace(self, eos_token=eos_token)
        pieces = template.format_turns(turns, system)
        return "".join(piece.text + (template.eos_token if piece.add_eos else "") for piece in pieces)

    def assistant_header(self) -> str:
        """Return what follows the user's text in a prompt: the part that no truncation may cut."""
        return self.format_prompt(_PROBE_USER).rpartition(_PROBE_USER)[2]

    @staticmethod
    def _beaver_segments(turns: Sequence[str], system: str | None) -> list[Segment]:
        segments = []
        for index, turn in enumerate(turns):
            if index % 2:
                segments.append(Segment(turn, is_answer=True, add_eos=True))
                continue
            begin = "" if index else PROMPT_BEGIN + (f"{system.strip()} " if system and system.strip() else "")
            segments.append(Segment(begin + PROMPT_USER.replace("{input}", turn) + PROMPT_ASSISTANT))
        return segments

    def _jinja_segments(self, turns: Sequence[str], system: str | None) -> list[Segment]:
        """Render turn by turn; what a turn adds to the text is its segment."""
        messages = [{"role": "system", "content": system}] if system else []
        segments: list[Segment] = []
        written = ""
        for start in range(0, len(turns), 2):
            messages.append({"role": "user", "content": turns[start]})
            prompt = self._render(messages, add_generation_prompt=True)
            if not prompt.startswith(written):
                raise DataError(
                    "the chat template rewrites earlier turns when the conversation goes on (some drop the "
                    "reasoning of former "
                    "answers), so their tokens cannot be told apart; use rows of one turn or another template"
                )
            segments.append(Segment(prompt[len(written) :]))
            written = prompt
            if start + 1 == len(turns):
                break
            answer = turns[start + 1]
            messages.append({"role": "assistant", "content": answer})
            full = self._render(messages, add_generation_prompt=False)
            is_last = start + 2 == len(turns)
            # A generation prompt may hold more than the finished turn does (an opened reasoning block, say). The last
            # answer can follow it all the same; an earlier one cannot.
            told = full[len(prompt) :] if full.startswith(prompt) else answer
            if not full.startswith(prompt) and not is_last:
                raise DataError(
                    "the chat template's generation prompt is not the beginning of the finished turn, so "
                    "conversations of "
                    "several turns cannot be trained with it; use rows of one turn or another template"
                )
            cut = self._answer_end(told, answer)
            segments.append(Segment(told[:cut], is_answer=True, add_eos=is_last))
            written = prompt + told[:cut]
        return segments

    def _answer_end(self, told: str, answer: str) -> int:
        """Where the learned part of an assistant's turn ends: after its end-of-sequence token, else before trailing
        space.
        """
        content_end = max(told.find(answer.strip()), 0) + len(answer.strip())
        eos = told.find(self.eos_token, content_end) if self.eos_token else -1
        return eos + len(self.eos_token) if eos >= 0 else len(told.rstrip())

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return compile_template(self.source).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                eos_token=self.eos_token,
                bos_token=self.bos_token,
            )
        except jinja2.TemplateError as err:
            raise DataError(f"the prompt template ({self.describe()}) cannot be rendered: {err}") from err
        except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as err:
            raise DataError(
                f"the prompt template ({self.describe()}) cannot be rendered: {type(err).__name__}: {err}"
            ) from err

    def _probe(self) -> None:
        """Refuse a Jinja source that leaves out the user's text or has no header for the answer to follow."""
        prompt = self._render([{"role": "user", "content": _PROBE_USER}], add_generation_prompt=True)
        if _PROBE_USER not in prompt:
            raise DataError(
                f"the prompt template ({self.describe()}) leaves out the user's text; it must write "
                "message['content'] of every "
                "message in `messages`"
            )
        turn = [{"role": "user", "content": _PROBE_USER}, {"role": "assistant", "content": _PROBE_ANSWER}]
        full = self._render(turn, add_generation_prompt=False)
        if _PROBE_ANSWER not in full:
            raise DataError(f"the prompt template ({self.describe()}) leaves out the assistant's answer")
        if full.startswith(prompt) and not full[len(prompt) :].lstrip().startswith(_PROBE_ANSWER):
            raise DataError(
                f"the prompt template ({self.describe()}) writes "
                f"{full[len(prompt) :].partition(_PROBE_ANSWER)[0]!r} before an "
                "answer but not at the end of a prompt; end it with {% if add_generation_prompt %}...{% endif %} "
                "around that text"
            )

    # ---------------------------------------------------------------- on disk, compared

    def to_dict(self) -> dict[str, Any]:
        """Return what identifies the template, as JSON values (special tokens belong to the tokenizer)."""
        if self.kind == "beaver":
            return {
                "format": _FORMAT,
                "kind": "beaver",
                "begin": PROMPT_BEGIN,
                "user": PROMPT_USER,
                "assistant": PROMPT_ASSISTANT,
            }
        return {"format": _FORMAT, "kind": self.kind, "template": self.source}

    def describe(self) -> str:
        """Name the template in a few words, for messages."""
        if self.kind == "beaver":
            return f"beaver: {PROMPT_INPUT!r}"
        what = "the tokenizer's chat template" if self.kind == "chat" else "Jinja"
        text = " ".join(self.source.split())
        return f"{what}: {text if len(text) <= 160 else text[:80] + ' ... ' + text[-75:]!r}"

    def save(self, folder: str | Path) -> Path:
        """Write ``prompt_template.json`` into ``folder`` (made if absent) and return its path."""
        path = Path(folder) / TEMPLATE_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> PromptTemplate | None:
        """Return the template saved in ``folder``, or None if none was. Special tokens are filled in by
        :meth:`resolve`.

        Raises:
            DataError: the file is damaged or of a format that this version does not know.
        """
        path = Path(folder) / TEMPLATE_FILE
        if not path.is_file():
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as err:
            raise DataError(f"{path} cannot be read ({err}); delete it and give `prompt_template`") from err
        template = None
        if isinstance(saved, dict) and saved.get("format") == _FORMAT:
            if saved.get("kind") == "beaver":
                template = cls()
            elif saved.get("kind") in ("chat", "jinja") and isinstance(saved.get("template"), str):
                template = cls(saved["kind"], saved["template"])
        if template is None or template.to_dict() != saved:
            raise DataError(f"{path} holds no prompt template that this version knows: {saved!r:.200}")
        return template


_PROBE_USER = "What is this?"
_PROBE_ANSWER = "An answer."


def check_same(
    first: PromptTemplate | None,
    second: PromptTemplate | None,
    where_first: str,
    where_second: str,
    allow: bool = False,
) -> None:
    """Refuse two stages that write prompts differently.

    Args:
        first, second: the templates; None (nothing was saved there) agrees with everything.
        where_first, where_second: whose they are, for the message.
        allow: say it in a warning and go on (``allow_template_mismatch``).

    Raises:
        DataError: they differ and ``allow`` is false.
    """
    if first is None or second is None:
        return
    # A chat template is the same text whether the tokenizer or the user gave it.
    if (first.source, first.kind == "beaver") == (second.source, second.kind == "beaver"):
        return
    message = (
        f"the prompt templates differ: {where_first} has {first.describe()}, {where_second} has "
        f"{second.describe()}. A model "
        "that meets another template than it was trained on answers and scores badly"
    )
    if not allow:
        raise DataError(
            f"{message}. Give the same `prompt_template` to both stages, or set allow_template_mismatch=true if it "
            "is meant"
        )
    from alignment.log import get_logger

    get_logger().warning("%s; allow_template_mismatch is set, so going on", message)


def _saved_chat(tokenizer: Any) -> PromptTemplate | None:
    """The chat template saved beside the tokenizer: paddlenlp's tokenizers lose theirs when they are saved."""
    folder = tokenizer_folder(tokenizer)
    saved = PromptTemplate.load(folder) if folder else None
    return saved if saved is not None and saved.kind == "chat" else None
