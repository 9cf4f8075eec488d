"""Tokenizer files that ``transformers`` opens, from those that paddlenlp writes."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import ModelError
from alignment.log import get_logger

from .folders import read_json
from .tokenizers import TOKENIZER_CONFIG_FILE, load_tokenizer

#: paddlenlp's class -> transformers'.
_CLASSES = {
    "Qwen2Tokenizer": "Qwen2Tokenizer",
    "Qwen2TokenizerFast": "Qwen2TokenizerFast",
    "LlamaTokenizer": "LlamaTokenizer",
    "LlamaTokenizerFast": "LlamaTokenizerFast",
    "GemmaTokenizer": "GemmaTokenizer",
    "GemmaTokenizerFast": "GemmaTokenizerFast",
    "PretrainedTokenizerFast": "PreTrainedTokenizerFast",
}
#: paddlenlp's file -> transformers'.
_FILES = {
    "vocab.json": "vocab.json",
    "merges.txt": "merges.txt",
    "tokenizer.json": "tokenizer.json",
    "tokenizer.model": "tokenizer.model",
    "sentencepiece.bpe.model": "tokenizer.model",
}
#: Settings that both libraries know and mean alike.
_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "clean_up_tokenization_spaces",
    "errors",
    "model_max_length",
    "spaces_between_special_tokens",
    "split_special_tokens",
)
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_TEMPLATE_FILE = "prompt_template.json"
#: How Qwen2's tokenizers cut text before byte pairs are merged.
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: What a rebuilt tokenizer must encode as the original does.
_PROBES = (
    "Hello, world! 3.14159 and 2,000",
    " leading space\n\nnew lines\tand  tabs \r\n",
    "\u00e9\u00e0\u00fc e\u0301 \u6f22\u5b57 \U0001f642 \u00a0",
    "don't I'LL CamelCase snake_case f(x) = {1: 'a'}",
)


def open_source_tokenizer(folder: Path) -> Any | None:
    """Return a model folder's tokenizer, or None where it has none.

    Raises:
        ModelError: it has one that cannot be opened.
    """
    return load_tokenizer(folder, role="export") if (folder / TOKENIZER_CONFIG_FILE).is_file() else None


def write_hf_tokenizer(source: Path, target: Path, tokenizer: Any) -> None:
    """Write a tokenizer and its chat template into ``target``, and copy ``prompt_template.json``.

    Args:
        source: the model folder that the tokenizer was loaded from.
        target: exists.
        tokenizer: of :func:`open_source_tokenizer`.

    Raises:
        ModelError: ``transformers`` has no tokenizer of this kind.
        OSError: the disk refuses.
    """
    kind = type(tokenizer).__name__
    copied = {new for old, new in _FILES.items() if (source / old).is_file()}
    if kind not in _CLASSES and "tokenizer.json" not in copied:
        raise ModelError(
            f"{source}: transformers has no tokenizer for paddlenlp's {kind}; put the original model's tokenizer.json "
            f"into the folder, or export it with --format paddle"
        )
    for old, new in _FILES.items():
        if (source / old).is_file():
            shutil.copyfile(source / old, target / new)
    if kind == "Qwen2Tokenizer" and "tokenizer.json" not in copied:
        built = qwen2_tokenizer_json(source, tokenizer)
        if built is not None:
            (target / "tokenizer.json").write_text(built, encoding="utf-8")
    saved = read_json(source / TOKENIZER_CONFIG_FILE)
    config: dict[str, Any] = {"tokenizer_class": _CLASSES.get(kind, "PreTrainedTokenizerFast")}
    config |= {name: saved[name] for name in _SETTINGS if saved.get(name) is not None}
    config["model_max_length"] = int(min(tokenizer.model_max_length, 10**30))
    if kind in ("LlamaTokenizer", "GemmaTokenizer"):
        config["legacy"] = True  # paddlenlp gives SentencePiece whole pieces of text, as transformers' legacy way does
    known = tokenizer.special_tokens_map
    special: dict[str, Any] = {name: str(known[name]) for name in _SPECIAL if known.get(name) is not None}
    if known.get("additional_special_tokens"):
        special["additional_special_tokens"] = [str(token) for token in known["additional_special_tokens"]]
    config |= special
    atoms = {atom.content: atom for atom in _atoms(tokenizer)}
    config["added_tokens_decoder"] = {str(atom.index): atom.to_dict() for atom in atoms.values()}
    template = _chat_template(source, saved)
    if template:
        config["chat_template"] = template
    _write(target / TOKENIZER_CONFIG_FILE, config)
    # paddlenlp lets tokens that stand here as plain text swallow white space, and no others.
    described = {
        name: token
        if isinstance(token, list) or token not in atoms or atoms[token].rstrip
        else {key: value for key, value in atoms[token].to_dict().items() if key != "special"}
        for name, token in special.items()
    }
    _write(target / "special_tokens_map.json", described)
    if (source / _TEMPLATE_FILE).is_file():
        shutil.copyfile(source / _TEMPLATE_FILE, target / _TEMPLATE_FILE)


def qwen2_tokenizer_json(source: Path, tokenizer: Any) -> str | None:
    """Build ``tokenizer.json`` from ``vocab.json`` and ``merges.txt``; None (said in the log) if it would differ."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    try:
        fast = Tokenizer(models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt")))
    except Exception as error:  # the library's Rust code raises plain Exception
        raise ModelError(f"{source}: vocab.json and merges.txt cannot be used: {error}") from error
    fast.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(_QWEN2_PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    atoms = _atoms(tokenizer)
    fast.add_tokens([AddedToken(**atom.to_dict()) for atom in atoms])
    probes = [*_PROBES, *(f"one{atom.content}two {atom.content}\nthree" for atom in atoms)]
    wrong = [atom.content for atom in atoms if fast.token_to_id(atom.content) != atom.index]
    wrong += [text for text in probes if fast.encode(text).ids != tokenizer(text)["input_ids"]]
    if wrong:
        get_logger().warning(
            "%s: no tokenizer.json is written, since it would encode %r otherwise than the model's own tokenizer; "
            "transformers then reads vocab.json and merges.txt",
            source,
            wrong[0],
        )
        return None
    return fast.to_str(pretty=True)


@dataclass(frozen=True)
class _Atom:
    """A special or added token, which text is never split inside.

    Attributes:
        index: its id.
        content: its text.
        special: whether decoding may leave it out.
        lstrip, rstrip: whether it swallows the white space before and after it.
    """

    index: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool

    def to_dict(self) -> dict[str, Any]:
        """As ``tokenizer_config.json`` and the ``tokenizers`` library describe it."""
        flags = {"lstrip": self.lstrip, "normalized": False, "rstrip": self.rstrip}
        return {"content": self.content, **flags, "single_word": False, "special": self.special}


def _atoms(tokenizer: Any) -> list[_Atom]:
    """A tokenizer's special and added tokens, by id.

    Whether they swallow white space is measured: it depends on how paddlenlp came to know them, not on what their
    flags say.
    """
    special = {str(token) for token in tokenizer.all_special_tokens}
    found = {str(token) for token in getattr(tokenizer, "added_tokens_encoder", None) or {}} | special
    vocabulary = tokenizer.get_vocab()

    def same(a: str, b: str) -> bool:
        return tokenizer(a)["input_ids"] == tokenizer(b)["input_ids"]

    return sorted(
        (
            _Atom(
                vocabulary[text],
                text,
                text in special,
                lstrip=same(f"a {text}", f"a{text}"),
                rstrip=same(f"{text} a", f"{text}a"),
            )
            for text in found
            if text in vocabulary
        ),
        key=lambda atom: atom.index,
    )


def _chat_template(source: Path, saved: dict[str, Any]) -> str | None:
    """Return the template that the model was trained with, as the Jinja text of transformers' chat templates."""
    from alignment.ppo.data.template import PROMPT_ASSISTANT, PROMPT_BEGIN, PROMPT_USER, PromptTemplate

    template = PromptTemplate.load(source)
    if template is None:
        declared = saved.get("chat_template")
        file = source / "chat_template.jinja"
        return file.read_text(encoding="utf-8") if file.is_file() else declared if isinstance(declared, str) else None
    if template.kind != "beaver":
        return template.source
    before, after = PROMPT_USER.split("{input}")
    after += PROMPT_ASSISTANT
    return (
        f"{{{{ {PROMPT_BEGIN!r} }}}}{{% for message in messages %}}"
        "{% if message['role'] == 'system' %}{{ message['content'].strip() + ' ' }}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {before!r} + message['content'] + {after!r} }}}}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    )


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
