"""One prompt template for all stages: how turns become text, and which pieces of that text the model is to learn.

A template gives :class:`Segment` s. Prompt and answer are separate segments and are tokenised separately
(:mod:`alignment.ppo.data.encode`), so that labels are masked by construction and the prompt of a generation has exactly
the token ids that it had in training.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.errors import DataError
from alignment.ppo.data.chat import chat_source, find_chat_source, read_text, special_token, tokenizer_folder
from alignment.ppo.data.messages import from_turns
from alignment.ppo.data.rendering import ChatRenderer, Message, Segment, is_trained, split_reasoning

PROMPT_BEGIN = "BEGINNING OF CONVERSATION: "
PROMPT_USER = "USER: {input} "
PROMPT_ASSISTANT = "ASSISTANT:"  # without a space: the answer follows directly
PROMPT_INPUT = PROMPT_BEGIN + PROMPT_USER + PROMPT_ASSISTANT

TEMPLATE_FILE = "prompt_template.json"
_FORMAT = 1


@dataclass(frozen=True)
class PromptTemplate:
    """How a conversation is written down.

    ``kind`` is ``"beaver"`` (PKU's template: the constants of this module), ``"chat"`` (``source`` is the tokenizer's
    own Jinja chat template) or ``"jinja"`` (``source`` is the user's). Jinja sources are rendered in a sandbox with
    ``messages``, ``tools``, ``add_generation_prompt``, ``enable_thinking``, ``strftime_now``, ``eos_token`` and
    ``bos_token``. ``date`` (``YYYY-MM-DD``) is set where the source asks for the day: it is fixed when a run starts and
    saved, so that a later run of the same model reads the same text.

    The Beaver template has no place for a system prompt: one is written between its beginning and the first user turn.
    """

    kind: str = "beaver"
    source: str = ""
    eos_token: str = ""
    bos_token: str = ""
    date: str = ""
    enable_thinking: bool | None = None

    @classmethod
    def resolve(cls, spec: str | PromptTemplate | None, tokenizer: Any) -> PromptTemplate:
        """Return the template that ``spec`` means for ``tokenizer``.

        Args:
            spec: ``"beaver"``; ``"chat"``; a Jinja string; the name of a ``.jinja`` file; ``"auto"`` or None for what
                :meth:`choose` finds beside the tokenizer; or a template, of which the special tokens are filled in.
            tokenizer: its ``eos_token``, ``bos_token``, ``chat_template`` and folder (``name_or_path``) are read.

        Raises:
            DataError: the spec means nothing, the tokenizer has no chat template, or the Jinja source cannot be used
                (syntax, an unknown name, no header under ``add_generation_prompt``).
        """
        if isinstance(spec, PromptTemplate):
            template = spec
        elif spec is None or spec == "auto":
            template, _ = PromptTemplate.choose(tokenizer, tokenizer_folder(tokenizer))
        elif not isinstance(spec, str) or not spec.strip():
            raise DataError(f'a prompt template is "beaver", "chat" or a Jinja string, not {spec!r}')
        elif spec == "beaver":
            template = PromptTemplate()
        elif spec == "chat":
            template = _saved_chat(tokenizer) or _of_tokenizer(chat_source(tokenizer))
        elif "{{" in spec or "{%" in spec:
            template = PromptTemplate("jinja", spec)
        elif spec.endswith((".jinja", ".j2")):
            template = PromptTemplate("jinja", read_text(Path(spec).expanduser()))
        else:
            raise DataError(
                f'{spec!r} is no prompt template: use "auto", "beaver", "chat" (the tokenizer\'s own), a Jinja string '
                "(with {{ }} or {% %} in it) or the name of a .jinja file"
            )
        template = replace(
            template,
            eos_token=special_token(tokenizer, "eos"),
            bos_token=special_token(tokenizer, "bos"),
        )
        if "strftime_now" in template.source and not template.date:
            template = replace(template, date=datetime.date.today().isoformat())
        if template.kind != "beaver":
            template.renderer.check()
        return template

    @classmethod
    def choose(cls, tokenizer: Any, folder: str | Path | None) -> tuple[PromptTemplate, str]:
        """Return the template of a model for which none was given, and why it is that one.

        Args:
            tokenizer: the model's.
            folder: the model's, or None.

        Raises:
            DataError: the template saved there is damaged.
        """
        saved = cls.load(folder) if folder else None
        if saved is not None:
            return saved, f"saved with the model ({TEMPLATE_FILE})"
        found = find_chat_source(tokenizer)
        if found:
            return _of_tokenizer(found), f"the model has no {TEMPLATE_FILE}, its tokenizer has a chat template"
        return cls(), f"the model has no {TEMPLATE_FILE} and its tokenizer no chat template in Jinja"

    @classmethod
    def for_model(
        cls,
        given: str | PromptTemplate | None,
        tokenizer: Any,
        model: str | Path,
        enable_thinking: bool | None = None,
    ) -> tuple[PromptTemplate, PromptTemplate | None, str]:
        """Settle the template for a model.

        Args:
            given: as :meth:`resolve` takes it.
            tokenizer: the model's.
            model: its folder, or a name, for which the tokenizer's folder stands.
            enable_thinking: None: as saved with the model.

        Returns:
            The template, with the day and ``enable_thinking`` that were saved with the model if it is the same; the one
            saved with the model, or None; why it is this template.

        Raises:
            DataError: see :meth:`resolve`.
        """
        folder = Path(model) if Path(model).is_dir() else tokenizer_folder(tokenizer)
        saved = cls.load(folder) if folder else None
        if given is None or given == "auto":
            template, why = cls.choose(tokenizer, folder)
        else:
            template, why = cls.resolve(given, tokenizer), "as given"
        template = template.with_choices_of(saved)
        if enable_thinking is not None and template.kind != "beaver":
            template = replace(template, enable_thinking=enable_thinking)
        return cls.resolve(template, tokenizer), saved, why

    def with_choices_of(self, earlier: PromptTemplate | None) -> PromptTemplate:
        """Return the template with the day and ``enable_thinking`` of an earlier run, if that had the same template."""
        if earlier is None or not earlier.same_text(self):
            return self
        thinking = self.enable_thinking if self.enable_thinking is not None else earlier.enable_thinking
        return replace(self, date=earlier.date or self.date, enable_thinking=thinking)

    def same_text(self, other: PromptTemplate) -> bool:
        """Whether both write the same; a chat template is the same whether the tokenizer or the user gave it."""
        return (self.source, self.kind == "beaver") == (other.source, other.kind == "beaver")

    # ---------------------------------------------------------------- conversations to text

    def format_messages(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, thinking: bool | None = None
    ) -> list[Segment]:
        """Write a conversation as segments: what is learnt apart from what is read.

        Args:
            messages: in OpenAI's form, see :data:`Message`; consecutive messages of one role are joined already. They
                end with the assistant (then the last segment is its answer) or with user or tool: a prompt, closed by
                the assistant's header.
            tools: descriptions of functions, as JSON values, for templates that have a place for them.
            thinking: what templates are told as ``enable_thinking``; None: true where an answer to be learnt has
                reasoning, else the template's own ``enable_thinking``.

        Returns:
            Segments that together are the text. Answers of weight 0 are there, but not learnt.

        Raises:
            DataError: there is no message, the template has no place for something in them, or the Jinja source fails
                on this conversation or rewrites an answer that is to be learnt.
        """
        if not messages:
            raise DataError("a conversation without turns")
        if self.kind == "beaver":
            return _beaver_segments(messages, tools)
        return self.renderer.segments(messages, tools, thinking)

    def format_turns(self, turns: Sequence[str], system: str | None = None) -> list[Segment]:
        """Write user and assistant by turns (an odd number is a prompt) as :meth:`format_messages` does.

        Raises:
            DataError: see there.
        """
        return self.format_messages(from_turns(turns, system))

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

    @property
    def renderer(self) -> ChatRenderer:
        """What renders a Jinja source."""
        return ChatRenderer(
            self.source, self.eos_token, self.bos_token, self.date, bool(self.enable_thinking), self.describe()
        )

    # ---------------------------------------------------------------- on disk, compared

    def as_jinja(self) -> str:
        """Return the template as the Jinja source of a tokenizer's chat template, which other programs read."""
        if self.kind != "beaver":
            return self.source + "\n" * self.source.endswith("\n")  # they leave out the last line break
        before, after = PROMPT_USER.split("{input}")
        after += PROMPT_ASSISTANT
        return (
            f"{{{{ {PROMPT_BEGIN!r} }}}}{{% for message in messages %}}"
            "{% if message['role'] == 'system' %}{{ message['content'].strip() + ' ' }}"
            f"{{% elif message['role'] == 'user' %}}{{{{ {before!r} + message['content'] + {after!r} }}}}"
            "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
        )

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
        found: dict[str, Any] = {"format": _FORMAT, "kind": self.kind, "template": self.source}
        if self.date:
            found["date"] = self.date
        if self.enable_thinking is not None:
            found["enable_thinking"] = self.enable_thinking
        return found

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
                template = cls(
                    saved["kind"],
                    saved["template"],
                    date=saved.get("date", ""),
                    enable_thinking=saved.get("enable_thinking"),
                )
        if template is None or template.to_dict() != saved:
            raise DataError(f"{path} holds no prompt template that this version knows: {saved!r:.200}")
        return template


_PROBE_USER = "What is this?"


def _beaver_segments(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Segment]:
    if tools:
        raise DataError("the Beaver template has no place for tools; use prompt_template=chat with a model that has it")
    segments: list[Segment] = []
    begin = PROMPT_BEGIN
    for number, message in enumerate(messages, 1):
        role, content = message["role"], message.get("content") or ""
        if role in ("system", "developer") and number == 1:
            begin += f"{content.strip()} " if content.strip() else ""
        elif role == "user":
            segments.append(Segment(begin + PROMPT_USER.replace("{input}", content) + PROMPT_ASSISTANT))
            begin = ""
        elif role == "assistant" and not message.get("tool_calls"):
            if begin:
                raise DataError(f"message {number}: in the Beaver template a conversation begins with the user")
            reasoning, rest = split_reasoning(message)
            segments.append(Segment(reasoning + rest, is_answer=is_trained(message), add_eos=True))
        else:
            what = "tool calls" if role == "assistant" else f"the role {role!r} here"
            raise DataError(
                f"message {number}: the Beaver template has no place for {what}; use prompt_template=chat with a model "
                "whose template has it"
            )
    if not segments:
        raise DataError("there is no turn beside the system prompt")
    return segments


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
    if first.same_text(second):
        return
    message = (
        f"the prompt templates differ: {where_first} has {first.describe()}, {where_second} has {second.describe()}. A "
        "model that meets another template than it was trained on answers and scores badly"
    )
    if not allow:
        raise DataError(
            f"{message}. Give the same `prompt_template` to both stages, or set allow_template_mismatch=true if it "
            "is meant"
        )
    from alignment.log import get_logger

    get_logger().warning("%s; allow_template_mismatch is set, so going on", message)


def _of_tokenizer(source: str) -> PromptTemplate:
    """A tokenizer's chat template; the Beaver template, which saved folders have as Jinja too, is what it was."""
    beaver = PromptTemplate()
    return beaver if source == beaver.as_jinja() else PromptTemplate("chat", source)


def _saved_chat(tokenizer: Any) -> PromptTemplate | None:
    """The chat template saved beside the tokenizer: paddlenlp's tokenizers lose theirs when they are saved."""
    folder = tokenizer_folder(tokenizer)
    saved = PromptTemplate.load(folder) if folder else None
    return saved if saved is not None and saved.kind == "chat" else None
