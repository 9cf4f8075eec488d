"""Tokenizer files that ``transformers`` opens."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.errors import ModelError
from alignment.ppo.models.folders import read_json, write_json_file
from alignment.ppo.models.json_tokenizer import (
    CHAT_TEMPLATE_FILE,
    SPECIAL_NAMES,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_JSON,
    JsonTokenizer,
    chat_template_of,
)
from alignment.ppo.models.tokenizers import PROBES, load_tokenizer, write_chat_template

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
        ModelError: ``transformers`` has no tokenizer of this kind, or would give other ids.
        OSError: the disk refuses.
    """
    if isinstance(tokenizer, JsonTokenizer):
        tokenizer.save_pretrained(target)
        _name_class(target, tokenizer)
        _check_written(source, target, tokenizer)
    else:
        _write_sentencepiece(source, target, tokenizer)
    write_trained_template(source, target)


def write_trained_template(source: Path, target: Path) -> None:
    """Copy ``prompt_template.json``, and give the tokenizer in ``target`` the same template in the form that other
    programs read; a model without one keeps its tokenizer's.
    """
    from alignment.ppo.data.template import TEMPLATE_FILE, PromptTemplate

    template = PromptTemplate.load(source)
    if template is not None:
        shutil.copyfile(source / TEMPLATE_FILE, target / TEMPLATE_FILE)
        write_chat_template(target, template.as_jinja())


def _name_class(target: Path, tokenizer: JsonTokenizer) -> None:
    """Name the class that opens a ``tokenizer.json`` in every version of transformers."""
    config = read_json(target / TOKENIZER_CONFIG_FILE, role="export")
    if config.get("tokenizer_class") not in _CLASSES.values():
        config["tokenizer_class"] = _CLASSES.get(config.get("tokenizer_class"), "PreTrainedTokenizerFast")
        # What this class would add beyond them, models do not take.
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    config.setdefault(
        "added_tokens_decoder",
        {
            str(index): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for index, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())
        },
    )
    write_json_file(target / TOKENIZER_CONFIG_FILE, config)


def _check_written(source: Path, target: Path, tokenizer: JsonTokenizer) -> None:
    """Refuse to ship a tokenizer that encodes otherwise than the one that the model was trained with."""
    from tokenizers import Tokenizer

    shipped = Tokenizer.from_file(str(target / TOKENIZER_JSON))
    added = tokenizer.added_tokens_encoder
    probes = [*PROBES, *(f"one{token}two {token}\nthree" for token in added)]
    wrong = [token for token, index in added.items() if shipped.token_to_id(token) != index]
    wrong += [text for text in probes if shipped.encode(text).ids != tokenizer(text)["input_ids"]]
    if wrong:
        raise ModelError(
            f"{source}: the exported {TOKENIZER_JSON} would encode {wrong[0]!r} otherwise than the tokenizer that the "
            "model was trained with"
        )


def _write_sentencepiece(source: Path, target: Path, tokenizer: Any) -> None:
    """Write a tokenizer of paddlenlp's classes: a SentencePiece model under the name that transformers knows."""
    kind = type(tokenizer.inner).__name__
    if kind not in _CLASSES:
        raise ModelError(
            f"{source}: transformers has no tokenizer for paddlenlp's {kind}; put the original model's tokenizer.json "
            f"into the folder, or export it with --format paddle"
        )
    for name in ("tokenizer.model", "sentencepiece.bpe.model"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / "tokenizer.model")
            break
    saved = read_json(source / TOKENIZER_CONFIG_FILE)
    config: dict[str, Any] = {"tokenizer_class": _CLASSES[kind]}
    config |= {name: saved[name] for name in _SETTINGS if saved.get(name) is not None}
    config["model_max_length"] = int(min(tokenizer.model_max_length, 10**30))
    config["legacy"] = True  # paddlenlp gives SentencePiece whole pieces of text, as transformers' legacy way does
    known = tokenizer.special_tokens_map
    special: dict[str, Any] = {name: str(known[name]) for name in SPECIAL_NAMES if known.get(name) is not None}
    if known.get("additional_special_tokens"):
        special["additional_special_tokens"] = [str(token) for token in known["additional_special_tokens"]]
    config |= special
    atoms = {atom.content: atom for atom in _atoms(tokenizer)}
    config["added_tokens_decoder"] = {str(atom.index): atom.to_dict() for atom in atoms.values()}
    write_json_file(target / TOKENIZER_CONFIG_FILE, config)
    # paddlenlp lets tokens that stand here as plain text swallow white space, and no others.
    described = {
        name: token
        if isinstance(token, list) or token not in atoms or atoms[token].rstrip
        else {key: value for key, value in atoms[token].to_dict().items() if key != "special"}
        for name, token in special.items()
    }
    write_json_file(target / SPECIAL_TOKENS_FILE, described)
    template = source / CHAT_TEMPLATE_FILE
    found = template.read_text(encoding="utf-8") if template.is_file() else chat_template_of(saved)
    if found:
        write_chat_template(target, found)


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
