"""Where Jinja templates come from, and the sandbox that they run in."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.errors import DataError

if TYPE_CHECKING:
    import jinja2


#: What stands around the text of a ``{% generation %}`` block until the text is cut there (noncharacters: no text may
#: hold them).
MARKS = ("\ufdd2", "\ufdd3")


def tokenizer_folder(tokenizer: Any) -> Path | None:
    """Return the local folder that the tokenizer was loaded from, or None."""
    name = getattr(tokenizer, "name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None


def special_token(tokenizer: Any, name: str) -> str:
    """Return the text of a special token ("eos", "bos"), "" if the tokenizer has none.

    Reading ``tokenizer.bos_token`` where there is none makes paddlenlp log an error; its map of special tokens does
    not.
    """
    known = getattr(tokenizer, "special_tokens_map", None)
    value = known.get(f"{name}_token") if isinstance(known, dict) else getattr(tokenizer, f"{name}_token", None)
    return str(value) if value is not None else ""


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Compile in a sandbox, with the settings and helpers that chat templates are written for."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=_undefined(),
        extensions=["jinja2.ext.loopcontrols", _generation_tag()],
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = _to_json
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as err:
        raise DataError(f"the prompt template is not valid Jinja: line {err.lineno}: {err.message}") from err


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As chat templates mean it: Jinja's own filter sorts keys and escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _generation_tag() -> type[jinja2.ext.Extension]:
    """``{% generation %}...{% endgeneration %}``: what stands between is written with :data:`MARKS` around it."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

        def _marked(self, caller: Any) -> str:
            return MARKS[0] + caller() + MARKS[1]

    return Generation


def _undefined() -> type[jinja2.Undefined]:
    """Undefined names may be asked about (``is defined``, ``if tools``), as chat templates do, but not written out."""
    import jinja2

    class Undefined(jinja2.Undefined):
        def __str__(self) -> str:
            self._fail_with_undefined_error()

    return Undefined


def find_chat_source(tokenizer: Any) -> str | None:
    """Return the Jinja source of the tokenizer's chat template, None where it has none.

    paddlenlp keeps only the compiled form in memory, so the source is read from the tokenizer's folder. Its last line
    break is left out: transformers does not write it.
    """
    source = getattr(tokenizer, "chat_template", None)
    if isinstance(source, str) and ("{{" in source or "{%" in source):
        return source.removesuffix("\n")
    folder = tokenizer_folder(tokenizer)
    if folder is not None:
        if (folder / "chat_template.jinja").is_file():
            return read_text(folder / "chat_template.jinja")
        for name in ("tokenizer_config.json", "chat_template.json"):
            found = _source_in_json(folder / name)
            if found:
                return found.removesuffix("\n")
    return None


def chat_source(tokenizer: Any) -> str:
    """Return the Jinja source of the tokenizer's chat template.

    Raises:
        DataError: it has none, or one in a form that is no Jinja.
    """
    found = find_chat_source(tokenizer)
    if found:
        return found
    folder = tokenizer_folder(tokenizer)
    if folder is not None and (folder / "chat_template.json").is_file():
        raise DataError(
            f"{folder / 'chat_template.json'} is in paddlenlp's older form (system, conversation, query), which does "
            "not say where answers begin; write it as one Jinja string and give that as `prompt_template`"
        )
    raise DataError(
        "prompt_template=chat, but the tokenizer "
        f"({folder or getattr(tokenizer, 'name_or_path', None) or 'not from a folder'}) has no "
        'chat template; add "chat_template" to its tokenizer_config.json, or use "beaver" or a Jinja string'
    )


def _source_in_json(path: Path) -> str | None:
    from alignment.ppo.models.json_tokenizer import chat_template_of

    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise DataError(f"{path} cannot be read: {err}") from err
    return chat_template_of(found) if isinstance(found, dict) else None


def read_text(path: Path) -> str:
    """Return a template's file without its last line break, which editors write and transformers leaves out.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"the prompt template file {path} cannot be read: {err}") from err
