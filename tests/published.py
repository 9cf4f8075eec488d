"""Tokenizer folders in the layouts in which model families are published, with vocabularies made here.

The chat templates are written anew after what the published ones do: which tokens stand around turns, what happens to
system prompts, tools, reasoning and the day.
"""
# ruff: noqa: E501  (patterns and templates are read as they stand)

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

TEXT = [
    "the quick brown fox asks how many questions the lazy dog can answer in 12 minutes",
    "You are a helpful assistant. <think> so the tool gives 3, and then? </think> It is 3.\n\n- one\n- two",
    "system user assistant tool model import Cutting Knowledge Date: December 2023 Today Date",
    '{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}',
] * 8
_LLAMA_PIECES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_PIECES = _LLAMA_PIECES.replace("{1,3}", "")


def _call(open_call: str, close_call: str) -> str:
    return (
        "{% for c in m.tool_calls %}"
        + open_call
        + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        + close_call
        + "{% endfor %}"
    )


_QWEN_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}"
    "{% endif %}# Tools\n<tools>{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>"
    "{{ '\n' }}{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
)
_QWEN_TOOL_TURN = (
    "{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}{{ '\n' }}<tool_response>"
    "{{ '\n' + m.content + '\n' }}</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>{{ '\n' }}"
    "{% endif %}{% endif %}{% endfor %}"
)
QWEN25 = (
    _QWEN_TOOLS
    + "{% else %}{{ '<|im_start|>system\nYou are Qwen. You are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) or "
    "(m.role == 'assistant' and not m.tool_calls) %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    + _call("{{ '\n' }}<tool_call>{{ '\n' }}", "{{ '\n' }}</tool_call>")
    + "<|im_end|>{{ '\n' }}"
    + _QWEN_TOOL_TURN
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    _QWEN_TOOLS + "{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% elif m.role == 'assistant' %}"
    "{% set said = m.content %}{% set why = '' %}{% if m.reasoning_content is string %}{% set why = m.reasoning_content %}"
    "{% elif '</think>' in said %}{% set why = said.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant{{ '\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or why) %}{{ '<think>\n' + why.strip('\n') + '\n</think>\n\n' }}"
    "{{ said.lstrip('\n') }}{% else %}{{ said }}{% endif %}{% if m.tool_calls %}"
    + _call("{% if m.content or not loop.first %}{{ '\n' }}{% endif %}<tool_call>{{ '\n' }}", "{{ '\n' }}</tool_call>")
    + "{% endif %}<|im_end|>{{ '\n' }}"
    + _QWEN_TOOL_TURN
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is "
    "false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if not tools is defined %}{% set tools = none %}{% endif %}{% if strftime_now is defined %}"
    "{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% endif %}<|start_header_id|>system<|end_header_id|>{{ '\n\n' }}"
    "Cutting Knowledge Date: December 2023{{ '\nToday Date: ' + day + '\n\n' + sys }}<|eot_id|>"
    "{% if tools is not none %}{% set first = messages[0].content | trim %}{% set messages = messages[1:] %}"
    "<|start_header_id|>user<|end_header_id|>{{ '\n\n' }}Functions:{{ '\n\n' }}{% for t in tools %}{{ t | tojson(indent=4) }}"
    "{{ '\n\n' }}{% endfor %}{{ first }}<|eot_id|>{% endif %}{% for m in messages %}"
    "{% if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in m %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set c = m.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}"
    '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>ipython<|end_header_id|>{{ '\n\n' }}{{ m.content | tojson }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set sys = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% set users = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% set ns = namespace(i=0) %}{% for m in rest %}{% if not (m.role == 'tool' or m.tool_calls is defined) %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools is not none and m == users[-1] %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% if loop.last and sys is defined %}{{ '[INST] ' + sys + '\n\n' + m.content + '[/INST]' }}{% else %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}{% elif m.tool_calls is defined %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{% if c.id | length != 9 %}{{ raise_exception('ids of calls have 9 characters') }}{% endif %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{% if not loop.last %}, {% else %}{{ ']' + eos_token }}"
    "{% endif %}{% endfor %}{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + m.content + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEEPSEEK = (
    "{% set ns = namespace(sys='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.sys = m.content %}"
    "{% endif %}{% endfor %}{{ bos_token }}{{ ns.sys }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}{{ '<｜Assistant｜>' + said + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How a family is published.

    Attributes:
        template: its chat template.
        kind: "byte-level", "metaspace" (a space before the text) or "spaces" (none before).
        eos, bos: its special tokens; no bos where the family has none.
        special: further special tokens.
        added: added tokens that are not special.
        pieces: the pattern that cuts text before byte pairs are merged.
        adds_bos: whether tokenizer.json puts bos before every text.
        has_tools, has_system: whether the template has a place for them.
        file_of_template: where the template is: in tokenizer_config.json, or chat_template.jinja.
        config: further keys of tokenizer_config.json.
    """

    template: str
    kind: str
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    pieces: str = _LLAMA_PIECES
    adds_bos: bool = False
    has_tools: bool = True
    has_system: bool = True
    file_of_template: str = "tokenizer_config.json"
    config: dict[str, Any] = field(default_factory=dict)


_QWEN_ADDED = ("<tool_call>", "</tool_call>", "<|fim_prefix|>")
FAMILIES = {
    "qwen2.5": Family(
        QWEN25, "byte-level", "<|im_end|>", None, ("<|endoftext|>", "<|im_start|>"), _QWEN_ADDED, _QWEN_PIECES,
        config={"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "add_bos_token": False},
    ),
    "qwen3": Family(
        QWEN3, "byte-level", "<|im_end|>", None, ("<|endoftext|>", "<|im_start|>"),
        (*_QWEN_ADDED, "<tool_response>", "</tool_response>", "<think>", "</think>"), _QWEN_PIECES,
        config={"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "add_bos_token": False},
    ),
    "llama3": Family(
        LLAMA3, "byte-level", "<|eot_id|>", "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|finetune_right_pad_id|>"), adds_bos=True,
        config={"tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "mistral": Family(
        MISTRAL, "metaspace", "</s>", "<s>",
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        adds_bos=True, config={"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "legacy": False},
    ),
    "gemma": Family(
        GEMMA, "spaces", "<eos>", "<bos>", ("<pad>", "<start_of_turn>", "<end_of_turn>"), adds_bos=True, has_tools=False,
        has_system=False, config={"tokenizer_class": "GemmaTokenizer", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "smollm2": Family(
        SMOLLM2, "byte-level", "<|im_end|>", "<|im_start|>", ("<|endoftext|>",), has_tools=False,
        config={"tokenizer_class": "GPT2Tokenizer", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"},
    ),
    "deepseek": Family(
        DEEPSEEK, "byte-level", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", (),
        ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"), _QWEN_PIECES, adds_bos=True, has_tools=False,
        file_of_template="chat_template.jinja",
        config={"tokenizer_class": "LlamaTokenizerFast", "pad_token": "<｜end▁of▁sentence｜>", "legacy": True},
    ),
}  # fmt: skip


def write_tokenizer(folder: Path, family: str) -> Path:
    """Write a family's tokenizer files into ``folder`` (made if absent) and return it."""
    kind = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    content = _tokenizer_json(family)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    added = {str(token.pop("id")): token for token in json.loads(content)["added_tokens"]}
    config = {"bos_token": kind.bos, "eos_token": kind.eos, "added_tokens_decoder": added, "model_max_length": 4096}
    if kind.file_of_template == "tokenizer_config.json":
        config["chat_template"] = kind.template
    else:
        (folder / kind.file_of_template).write_text(kind.template, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | kind.config, ensure_ascii=False), encoding="utf-8"
    )
    return folder


@lru_cache(maxsize=16)
def _tokenizer_json(family: str) -> str:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    kind = FAMILIES[family]
    is_bytes = kind.kind == "byte-level"
    trained = Tokenizer(models.BPE())
    if is_bytes:
        trained.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(kind.pieces), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_bytes else []
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    plain = [] if is_bytes else ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n"]
    names = dict.fromkeys([*plain, *model["vocab"]])
    vocabulary = {name: index for index, name in enumerate(names)}
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    options = {} if is_bytes else {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    fast = Tokenizer(models.BPE(vocabulary, merges, **options))
    if is_bytes:
        fast.pre_tokenizer, fast.decoder = trained.pre_tokenizer, decoders.ByteLevel()
        fast.normalizer = normalizers.NFC() if kind.pieces == _QWEN_PIECES else None
    elif kind.kind == "metaspace":
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        fast.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        fast.normalizer = normalizers.Replace(" ", "▁")
        fast.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [token for token in (kind.bos, kind.eos, None if is_bytes else "<unk>", *kind.special) if token]
    fast.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    fast.add_tokens([AddedToken(token, normalized=False, special=False) for token in kind.added])
    if kind.adds_bos and kind.bos:
        fast.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A",
            pair=f"{kind.bos} $A {kind.bos} $B",
            special_tokens=[(kind.bos, fast.token_to_id(kind.bos))],
        )
    return fast.to_str()


def render(family: str, messages: list[dict[str, Any]], **given: Any) -> str:
    """Render a family's chat template as transformers does, by code of our own."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    kind = FAMILIES[family]
    settings = {"tools": None, "bos_token": kind.bos or "", "eos_token": kind.eos, "add_generation_prompt": False}
    return environment.from_string(kind.template).render(messages=messages, **(settings | given))


def write_model(folder: Path, family: str, *, score: bool = False, more_rows: int = 24) -> Path:
    """Write a tiny random model with a family's tokenizer into ``folder`` and return it: a reward model with ``score``,
    with ``more_rows`` rows in its embedding than the tokenizer has tokens.
    """
    from alignment.ppo.models import load_tokenizer, save_model
    from tests.models.conftest import ModelKit

    write_tokenizer(folder, family)
    rows = max(load_tokenizer(folder).get_vocab().values()) + 1 + more_rows
    kinds = {"qwen2.5": "qwen2", "qwen3": "qwen2", "mistral": "mistral", "gemma": "gemma", "deepseek": "qwen2"}
    make = ModelKit().score if score else ModelKit().causal
    save_model(make(kinds.get(family, "llama"), vocab_size=rows, max_position_embeddings=1024), folder)
    return folder
