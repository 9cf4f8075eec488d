"""Loading tokenizers, and bringing texts from one tokenizer to another."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from paddlenlp.transformers import AutoTokenizer, LlamaTokenizer

from alignment.errors import ModelError
from alignment.log import say_once

from .folders import CONFIG_FILE, looks_like_hub_name, read_json, write_json_file
from .gguf import gguf_file, ordinary_folder
from .json_tokenizer import (
    CHAT_TEMPLATE_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_JSON,
    chat_template_of,
    open_json_tokenizer,
)
from .upstream import fetch_tokenizer_from_hub, quiet_paddlenlp

#: Files that make up a tokenizer, and the prompt template that belongs to it.
TOKENIZER_FILES = (
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    TOKENIZER_JSON,
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "chat_template.json",
    CHAT_TEMPLATE_FILE,
    "prompt_template.json",
)
#: Tokens that model makers reserve and no text contains, best first.
RESERVED_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<PAD>",
    "<|padding|>",
    "<|reserved_special_token_0|>",
    "<reserved_0>",
    "<unused0>",
)


def load_tokenizer(path: str | os.PathLike, *, model_max_length: int | None = None, role: str = "model") -> Any:
    """Load a tokenizer that has an eos and a pad token.

    A missing pad token is chosen among the tokens that the vocabulary has already, so that the embedding keeps its
    size: a reserved one, else eos. Eos is safe as a pad, because no mask is made from token ids: rows carry their
    lengths.

    Args:
        path: a folder, a GGUF file, or the name of a model on a hub.
        model_max_length: longest sequence, if not the tokenizer's own.
        role: what the tokenizer is for, for messages.

    Returns:
        A paddlenlp tokenizer that pads on the right.

    Raises:
        ModelError: no such folder, no tokenizer in it, files that cannot be read, or no eos token.
    """
    quiet_paddlenlp()
    if gguf_file(path) is not None:
        path = ordinary_folder(path, role=role)
    folder = Path(path).expanduser()
    if looks_like_hub_name(path):
        folder = fetch_tokenizer_from_hub(str(path), TOKENIZER_FILES, role=role)
    _check_tokenizer_folder(path, folder, role=role)
    tokenizer = _open_tokenizer(folder, role=role)
    if model_max_length is not None:
        tokenizer.model_max_length = model_max_length
    tokenizer.verbose = False  # or asking paddlenlp's whether a special token is set logs an error where it is not
    rows = _embedding_rows(folder)
    eos = tokenizer.eos_token_id if tokenizer.eos_token is not None else None
    if eos is None:
        named = getattr(tokenizer, "missing", {}).get("eos_token")
        lack = "no end-of-sequence token" if named is None else f"no token {named!r}, which is to end sequences"
        raise ModelError(
            f'{role}: the tokenizer in {path} has {lack}; set "eos_token" in '
            f"{folder / TOKENIZER_CONFIG_FILE} to the token "
            "that ends an answer"
        )
    if rows is not None and eos >= rows:
        raise ModelError(
            f"{role}: the end-of-sequence token {tokenizer.eos_token!r} of the tokenizer in {path} has id {eos}, "
            f"but the model's embedding has only "
            f'{rows} rows; set "eos_token" in {folder / TOKENIZER_CONFIG_FILE} to a token that the model knows'
        )
    tokenizer.padding_side = "right"
    _ensure_pad(tokenizer, rows, where=f"{role}: {path}")
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: str | os.PathLike, template: Any = None) -> None:
    """Save a tokenizer's files into a folder, beside a model's: the ``tokenizer.json`` that was used, as it was.

    Args:
        tokenizer: of :func:`load_tokenizer`.
        folder: made if absent.
        template: the PromptTemplate that the model was trained with: written as ``prompt_template.json``, and as the
            tokenizer's chat template, which other programs read.

    Raises:
        ModelError: the folder cannot be written.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(folder))
        if template is not None:
            template.save(folder)
            write_chat_template(Path(folder), template.as_jinja())
    except OSError as error:
        raise ModelError(f"cannot save the tokenizer in {folder}: {error}") from error


def write_chat_template(folder: Path, source: str) -> None:
    """Give the tokenizer in ``folder`` a chat template, in both places where programs look for one."""
    (folder / CHAT_TEMPLATE_FILE).write_text(source, encoding="utf-8")
    config = read_json(folder / TOKENIZER_CONFIG_FILE)
    if chat_template_of(config) != source:  # several named ones stay, if this is the default among them
        write_json_file(folder / TOKENIZER_CONFIG_FILE, {**config, "chat_template": source})


def copy_tokenizer_files(source: str | os.PathLike, target: str | os.PathLike) -> list[str]:
    """Copy the tokenizer and prompt-template files of one folder into another; returns their names."""
    copied = [name for name in TOKENIZER_FILES if (Path(source) / name).is_file()]
    for name in copied:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return copied


def vocabulary_size(tokenizer: Any) -> int:
    """Rows of a model that a tokenizer has tokens for: one more than its largest id."""
    unused = getattr(tokenizer, "unused_pad_id", None)
    return max((index for index in tokenizer.get_vocab().values() if index != unused), default=-1) + 1


def check_tokenizer_fits(tokenizer: Any, model: str | os.PathLike, *, role: str) -> None:
    """Check that every id the tokenizer can give has a row in the model's embedding; that the model has more rows is
    normal, and said once.

    Args:
        tokenizer: of :func:`load_tokenizer`.
        model: the folder of a model that reads its ids, or a name on a hub.
        role: what the model is for, for messages.

    Raises:
        ModelError: the vocabulary is larger than the embedding.
    """
    from .loading import open_folder

    rows = open_folder(model, role=role).config.get("vocab_size")
    if not isinstance(rows, int):
        return
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    largest = vocabulary_size(tokenizer) - 1
    for what, index in (("largest id", largest), ("end-of-sequence id", eos), ("padding id", pad)):
        if index >= rows:
            raise ModelError(
                f"{role}: the tokenizer's {what} is {index}, but the embedding of {model} has only {rows} rows "
                "(vocab_size); the tokenizer belongs to another model"
            )
    if 0 <= largest + 1 < rows:
        others = "are never sampled" if role == "actor" else "stay unused"
        say_once(f"{role}: {model} has {rows} rows, its tokenizer {largest + 1} tokens; the other rows {others}")


def tokenizer_differs(a: Any, b: Any) -> bool:
    """Return whether two tokenizers may give different ids for the same text.

    They are compared by vocabulary (added tokens included), special ids and, since one vocabulary can be split in
    different ways, by the ids of a few lines of text.
    """
    if a is b:
        return False
    for name in ("bos_token_id", "eos_token_id", "unk_token_id"):
        if getattr(a, name, None) != getattr(b, name, None):
            return True
    if a.get_vocab() != b.get_vocab():
        return True
    return any(a(text)["input_ids"] != b(text)["input_ids"] for text in PROBES)


#: Texts that two tokenizers of one vocabulary would cut in different ways.
PROBES = (
    "Hello, world! 3.14",
    " leading space\n\nnew lines\tand tabs",
    "éàü 漢字 🙂",
    "don't CamelCase snake_case 12345",
    "I'LL write f(x) = {1: 'a'} \r\n  e\u0301 \u00a0",
)


class SlowTokenizer:
    """One of paddlenlp's Python tokenizers, which decodes ids that it does not have to nothing.

    Args:
        inner: the tokenizer; whatever is not defined here is its.
    """

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"] = inner
        self.__dict__["_known"] = frozenset(inner.get_vocab().values())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    def __len__(self) -> int:
        return len(self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the inner tokenizer's."""
        return self.inner(*args, **kwargs)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Return the text of ids; ids that the vocabulary does not have are nothing."""
        known = [int(index) for index in ids if int(index) in self._known]
        return self.inner.decode(known, skip_special_tokens=skip_special_tokens, **kwargs)


def _open_tokenizer(folder: Path, *, role: str) -> Any:
    """Return the tokenizer of a folder: its ``tokenizer.json`` is the truth, paddlenlp's classes are for folders
    without one (a SentencePiece ``tokenizer.model``, which paddlenlp's Llama class looks for under another name).
    """
    found = open_json_tokenizer(folder, TOKENIZER_FILES, where=f"{role}: {folder}")
    if found is not None:
        return found
    # paddlenlp would compile the chat template, and refuses several and newer tags; the prompt template reads the file.
    ways = [lambda: AutoTokenizer.from_pretrained(str(folder), chat_template=None)]
    if (folder / "tokenizer.model").is_file():
        model = str(folder / "tokenizer.model")
        ways.append(lambda: LlamaTokenizer.from_pretrained(str(folder), vocab_file=model, chat_template=None))
    failures: list[Exception] = []
    for way in ways:
        try:
            tokenizer = way()
            if tokenizer is None:
                raise ValueError("paddlenlp knows no tokenizer for it")
            return SlowTokenizer(tokenizer)
        except Exception as error:  # whatever paddlenlp's many classes meet; to the user every cause is a file at fault
            failures.append(error)
    causes = "; ".join(f"{type(error).__name__}: {error}" for error in failures)
    raise ModelError(f"{role}: the tokenizer in {folder} cannot be loaded ({causes})") from failures[0]


def _check_tokenizer_folder(path: str | os.PathLike, folder: Path, *, role: str) -> None:
    if not folder.exists():
        raise ModelError(f"{role}: no such folder: {path}")
    if not folder.is_dir():
        raise ModelError(f"{role}: {path} is a file; give the folder that holds the tokenizer")
    file = folder / TOKENIZER_CONFIG_FILE
    if not file.is_file():
        raise ModelError(
            f"{role}: {folder} has no {TOKENIZER_CONFIG_FILE}, so it holds no tokenizer; name its folder with "
            f"tokenizer_name_or_path"
        )
    if not isinstance(read_json(file, role=role), dict):
        raise ModelError(f"{role}: {file} must be a JSON object")


def _embedding_rows(folder: Path) -> int | None:
    """Return ``vocab_size`` of the model beside the tokenizer, if there is one."""
    file = folder / CONFIG_FILE
    config = read_json(file) if file.is_file() else {}
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) else None


def _ensure_pad(tokenizer: Any, rows: int | None, *, where: str) -> None:
    pad = tokenizer.pad_token_id if tokenizer.pad_token is not None else None
    if pad is not None and (rows is None or pad < rows):
        return
    vocabulary = tokenizer.get_vocab()
    for token in RESERVED_TOKENS:
        index = vocabulary.get(token)
        if index is not None and (rows is None or index < rows) and index != tokenizer.eos_token_id:
            break
    else:
        token = tokenizer.eos_token
    lack = (
        "has no pad token"
        if pad is None
        else f"pads with id {pad}, which has no row in the model's embedding ({rows} rows)"
    )
    kind = "eos" if token == tokenizer.eos_token else "a reserved token"
    say_once(
        f"{where}: the tokenizer {lack}; padding uses {kind}, {token!r} (masks are made from lengths, so nothing "
        f"else changes)"
    )
    tokenizer.pad_token = token
    if pad is not None:
        tokenizer.unused_pad_id = pad  # no text has it
