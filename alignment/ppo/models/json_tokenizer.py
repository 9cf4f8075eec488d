"""The tokenizer that a folder's ``tokenizer.json`` describes, run by the ``tokenizers`` library as servers run it.

paddlenlp's own classes build a tokenizer anew from ``vocab.json``, ``merges.txt`` and the configuration; they strip
white space around special tokens and split added tokens that they were not told of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from alignment.errors import DataError, ModelError

from .folders import read_json, write_json_file

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
TOOL_TEMPLATE_FILE = "additional_chat_templates/tool_use.jinja"
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_UNLIMITED = 10**30  # how transformers writes "no longest sequence"
#: How Qwen2's tokenizers cut text before byte pairs are merged.
_QWEN2_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


class JsonTokenizer:
    """A ``tokenizer.json`` with the roles that the folder's configuration gives its tokens.

    Args:
        content: of ``tokenizer.json``, text or bytes.
        config: of ``tokenizer_config.json``.
        special: of ``special_tokens_map.json``; the configuration comes first.
        folder: where it was read from; None for one made in memory.
        files: the folder's further tokenizer files by name, which are saved with it as they are.
        where: for messages.

    Attributes:
        pad_token, eos_token, bos_token, unk_token: their texts, None where there is none in the vocabulary.
        pad_token_id, eos_token_id, bos_token_id, unk_token_id: their ids, or None.
        model_max_length: longest sequence, as the configuration says.
        padding_side: "right".
        name_or_path: the folder, "" without one.

    Raises:
        ModelError: the content is no tokenizer, or contradicts the configuration's added tokens.
    """

    def __init__(
        self,
        content: str | bytes,
        config: Mapping[str, Any],
        special: Mapping[str, Any] | None = None,
        *,
        folder: Path | None = None,
        files: Mapping[str, bytes] | None = None,
        where: str = "tokenizer",
    ) -> None:
        self.content = content.encode() if isinstance(content, str) else content
        try:
            self.backend = Tokenizer.from_str(self.content.decode("utf-8"))
        except Exception as error:  # the library's Rust code raises plain Exception
            raise ModelError(f"{where}: the {TOKENIZER_JSON} cannot be loaded ({error})") from error
        self.config = dict(config)
        self.files = dict(files or {})
        self.name_or_path = str(folder) if folder else ""
        self.padding_side = "right"
        self.model_max_length = int(min(config.get("model_max_length") or _UNLIMITED, _UNLIMITED))
        if self._add_declared(special or {}, where):
            self.content = self.backend.to_str(pretty=True).encode()
        self.backend.no_truncation()
        self.backend.no_padding()
        self.missing: dict[str, str] = {}  # named by the configuration, but not in the vocabulary
        self._special: dict[str, str] = {}
        for name in SPECIAL_NAMES:
            token = _text_of(self.config.get(name)) or _text_of((special or {}).get(name))
            if token is not None and self.backend.token_to_id(token) is None:
                self.missing[name] = token
            elif token is not None:
                self._special[name] = token
        self._hidden = {index for index, token in self.backend.get_added_tokens_decoder().items() if token.special}
        self._vocabulary: dict[str, int] | None = None

    def _add_declared(self, special: Mapping[str, Any], where: str) -> bool:
        """Add the tokens that the configuration declares and the file lacks, as transformers does; returns whether any
        were.
        """
        declared: dict[int, AddedToken] = {}
        for key, value in (self.config.get("added_tokens_decoder") or {}).items():
            if isinstance(value, Mapping) and isinstance(value.get("content"), str):
                flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
                declared[int(key)] = AddedToken(
                    value["content"], **{flag: value[flag] for flag in flags if flag in value}
                )
        lacking = False
        added = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        roles = [_text_of(source.get(name)) for source in (self.config, special) for name in SPECIAL_NAMES]
        for role in dict.fromkeys(filter(None, roles)):
            if role not in added and self.backend.token_to_id(role) is not None:
                self.backend.add_special_tokens([AddedToken(role, normalized=False, special=True)])
                lacking = True
        for index, token in sorted(declared.items()):
            found = self.backend.token_to_id(token.content)
            if found is None:
                (self.backend.add_special_tokens if token.special else self.backend.add_tokens)([token])
                found, lacking = self.backend.token_to_id(token.content), True
            if found != index:
                raise ModelError(
                    f"{where}: {TOKENIZER_CONFIG_FILE} gives the token {token.content!r} the id {index}, but "
                    f"{TOKENIZER_JSON} gives it {found}; the two files are not of one tokenizer"
                )
        return lacking

    # ---------------------------------------------------------------- text and ids

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        return_attention_mask: bool = False,
        verbose: bool = False,
    ) -> dict[str, Any]:
        """Return ``{"input_ids": ids}`` of a text, or a list of ids for each of several.

        Args:
            text: one or several.
            add_special_tokens: whether the tokens that the file puts around a text (a beginning, say) are added.
            return_attention_mask: give ``attention_mask`` too: all ones, since nothing is padded.
            verbose: for likeness with other tokenizers.

        Raises:
            DataError: the text is no valid Unicode.
        """
        if not isinstance(text, str):
            ids: Any = [self._encode(one, add_special_tokens) for one in text]
            mask: Any = [[1] * len(one) for one in ids]
        else:
            ids = self._encode(text, add_special_tokens)
            mask = [1] * len(ids)
        return {"input_ids": ids, "attention_mask": mask} if return_attention_mask else {"input_ids": ids}

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what the library says of half a surrogate pair
            if not isinstance(text, str):
                raise
            raise DataError(f"the text {text!r:.60} is no valid Unicode and has no tokens") from error

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of texts that follow each other, as they are in the whole text, none added.

        A piece has the ids that it has behind the one before it, so that a tokenizer that begins every text with a
        space begins the whole with one and not each piece. Where a token of the two would reach over their border, the
        piece is taken by itself: a prompt has the same ids whatever answer follows.

        Raises:
            DataError: a text is no valid Unicode.
        """
        pieces: list[list[int]] = []
        before, before_ids = "", []
        for text in texts:
            alone = ids = self._encode(text, add_special_tokens=False) if text else []
            if before and text:
                both = self._encode(before + text, add_special_tokens=False)
                if both[: len(before_ids)] == before_ids:
                    ids = both[len(before_ids) :]
            pieces.append(ids)
            if text:
                before, before_ids = text, alone
        return pieces

    def encode(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
        """The same as calling it."""
        return self(text, add_special_tokens)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **_: Any) -> str:
        """Return the text of ids; ids that the vocabulary does not have are nothing."""
        chosen = [int(index) for index in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        if skip_special_tokens:
            hidden = self._hidden | {self.eos_token_id, self.pad_token_id, self.bos_token_id}
            chosen = [index for index in chosen if index not in hidden]
        return self.backend.decode(chosen, skip_special_tokens=False)

    def get_vocab(self) -> dict[str, int]:
        """Return text -> id of every token, added ones included."""
        if self._vocabulary is None:
            self._vocabulary = self.backend.get_vocab(with_added_tokens=True)
        return dict(self._vocabulary)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Return the vocabulary's entries of ids, None for those that it does not have."""
        return [self.backend.id_to_token(int(index)) for index in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Return the id of a vocabulary's entry (None without one), or of each of several."""
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    # ---------------------------------------------------------------- special tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """``"eos_token"``, ``"pad_token"``, ... -> text, of those that there are."""
        return dict(self._special)

    @property
    def all_special_tokens(self) -> list[str]:
        """The texts of all tokens that decoding may leave out."""
        added = self.backend.get_added_tokens_decoder()
        return list(dict.fromkeys([*self._special.values(), *(added[index].content for index in sorted(self._hidden))]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of :attr:`all_special_tokens`."""
        return self.convert_tokens_to_ids(self.all_special_tokens)

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """Text -> id of the tokens that text is never split inside."""
        return {token.content: index for index, token in self.backend.get_added_tokens_decoder().items()}

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, None where there is none."""
        if CHAT_TEMPLATE_FILE in self.files:
            return self.files[CHAT_TEMPLATE_FILE].decode("utf-8")
        return chat_template_of(self.config)

    def _id(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self.backend.token_to_id(token)

    eos_token = property(lambda self: self._special.get("eos_token"))
    bos_token = property(lambda self: self._special.get("bos_token"))
    unk_token = property(lambda self: self._special.get("unk_token"))
    eos_token_id = property(lambda self: self._id("eos_token"))
    bos_token_id = property(lambda self: self._id("bos_token"))
    unk_token_id = property(lambda self: self._id("unk_token"))
    pad_token_id = property(lambda self: self._id("pad_token"))

    @property
    def pad_token(self) -> str | None:
        return self._special.get("pad_token")

    @pad_token.setter
    def pad_token(self, token: str) -> None:
        if self.backend.token_to_id(token) is None:
            raise ModelError(f"the pad token {token!r} is not in the vocabulary")
        self._special["pad_token"] = token

    # ---------------------------------------------------------------- on disk

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` as it was read, the configuration with the roles as they are now, and the folder's
        other tokenizer files.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, content in {**self.files, TOKENIZER_JSON: self.content}.items():
            (target / name).write_bytes(content)
        config = {name: value for name, value in self.config.items() if name not in SPECIAL_NAMES}
        for name in SPECIAL_NAMES:
            kept = self.config.get(name)
            config[name] = kept if _text_of(kept) == self._special.get(name) else self._special.get(name)
        write_json_file(target / TOKENIZER_CONFIG_FILE, config)
        write_json_file(target / SPECIAL_TOKENS_FILE, self.special_tokens_map)


def open_json_tokenizer(folder: Path, files: Sequence[str], *, where: str) -> JsonTokenizer | None:
    """Return the tokenizer of a folder with ``tokenizer.json``, or with Qwen2's ``vocab.json`` and ``merges.txt``; None
    for other folders.

    Args:
        folder: has ``tokenizer_config.json``.
        files: names of tokenizer files, which are kept to be saved again.
        where: for messages.

    Raises:
        ModelError: a file is damaged, or two contradict each other.
    """
    config = read_json(folder / TOKENIZER_CONFIG_FILE, role=where)
    config = config if isinstance(config, dict) else {}
    special = read_json(folder / SPECIAL_TOKENS_FILE, role=where) if (folder / SPECIAL_TOKENS_FILE).is_file() else {}
    special = special if isinstance(special, dict) else {}
    if (folder / TOKENIZER_JSON).is_file():
        content: str | bytes = (folder / TOKENIZER_JSON).read_bytes()
    elif config.get("tokenizer_class") in _QWEN2_CLASSES and (folder / "merges.txt").is_file():
        content = _qwen2_json(folder, config, special, where=where)
    else:
        return None
    own = (TOKENIZER_JSON, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE)
    kept = {name: (folder / name).read_bytes() for name in files if name not in own and (folder / name).is_file()}
    if CHAT_TEMPLATE_FILE in kept and (folder / TOOL_TEMPLATE_FILE).is_file():
        pair = kept[CHAT_TEMPLATE_FILE].decode("utf-8"), (folder / TOOL_TEMPLATE_FILE).read_text(encoding="utf-8")
        kept[CHAT_TEMPLATE_FILE] = joined_template(*pair).encode()
    return JsonTokenizer(content, config, special, folder=folder, files=kept, where=where)


def chat_template_of(config: Mapping[str, Any]) -> str | None:
    """The chat template in ``tokenizer_config.json``: text, or of several that have names those that
    :func:`joined_template` takes.
    """
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = joined_template(named.get("default"), named.get("tool_use"))
    return found if isinstance(found, str) and found.strip() else None


def joined_template(default: Any, tool_use: Any) -> Any:
    """One template of two: transformers takes the one named "tool_use" for conversations with tools."""
    if not isinstance(default, str) or not isinstance(tool_use, str):
        return default
    # The plus signs keep Jinja from trimming what stands beside them; a template's last line break is never written.
    parts = default.removesuffix("\n"), tool_use.removesuffix("\n")
    return "{{% if tools +%}}{1}{{%+ else +%}}{0}{{%+ endif %}}".format(*parts)


def _text_of(token: Any) -> str | None:
    """A special token's text: files have it as text or as an object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) and text else None


def _qwen2_json(folder: Path, config: Mapping[str, Any], special: Mapping[str, Any], *, where: str) -> str:
    """Build ``tokenizer.json`` from ``vocab.json`` and ``merges.txt``, as transformers' Qwen2Tokenizer reads them."""
    try:
        fast = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    except Exception as error:  # the library's Rust code raises plain Exception
        raise ModelError(f"{where}: the vocab.json and merges.txt cannot be loaded ({error})") from error
    fast.normalizer = normalizers.NFC()
    pieces = pre_tokenizers.Split(Regex(_QWEN2_PIECES), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([pieces, to_bytes])
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    roles = [_text_of(source.get(name)) for source in (config, special) for name in SPECIAL_NAMES]
    more = special.get("additional_special_tokens") or config.get("additional_special_tokens") or []
    named = dict.fromkeys(text for text in [*roles, *map(_text_of, more)] if text)
    file = folder / "added_tokens.json"
    added = read_json(file, role=where) if file.is_file() else {}
    for text, index in sorted((added if isinstance(added, dict) else {}).items(), key=lambda item: item[1]):
        if str(index) not in (config.get("added_tokens_decoder") or {}):
            fast.add_tokens([AddedToken(text, normalized=False, special=text in named)])
            if fast.token_to_id(text) != index:
                raise ModelError(
                    f"{where}: {file} gives the token {text!r} the id {index}, but after vocab.json it is "
                    f"{fast.token_to_id(text)}"
                )
    fast.add_special_tokens(
        [AddedToken(text, normalized=False, special=True) for text in named if fast.token_to_id(text) is not None]
    )
    return fast.to_str(pretty=True)
