"""Tiny models and tokenizers, and writers of folders as torch and Hugging Face leave them (without torch)."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

MODEL_TYPES = ("llama", "qwen2", "mistral", "gemma")
VOCAB = 120


class ModelKit:
    """Makes tiny models, and folders that hold them in any layout."""

    vocab = VOCAB

    def config(self, model_type: str, **overrides: Any) -> Any:
        from alignment.ppo.models.loading import CONFIGS

        settings: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
        }
        if model_type == "gemma":
            settings["head_dim"] = 16  # Gemma's heads need not make up the hidden size
        return CONFIGS[model_type](**{**settings, **overrides})

    def causal(self, model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
        """A causal model whose weights are large enough for errors to show: every tensor is drawn, biases and norms
        too.
        """
        from alignment.ppo.models.loading import CAUSAL_MODELS

        model = CAUSAL_MODELS[model_type](self.config(model_type, **overrides))
        self.randomise(model, seed)
        return model

    def score(self, model_type: str, *, seed: int = 0, **overrides: Any) -> Any:
        from alignment.ppo.models import AutoModelForScore

        model = AutoModelForScore.from_config(self.config(model_type, **overrides))
        self.randomise(model, seed)
        return model

    def randomise(self, model: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for name, parameter in model.named_parameters():
            draw = rng.standard_normal(parameter.shape) * 0.2 + (1.0 if "norm" in name else 0.0)
            parameter.set_value(draw.astype(np.float32))

    def ids(self, rows: int, width: int, seed: int = 0) -> Any:
        import paddle

        return paddle.to_tensor(np.random.default_rng(seed).integers(0, VOCAB, [rows, width]).astype(np.int64))

    def hf_tensors(self, model: Any) -> dict[str, np.ndarray]:
        """A model's tensors under Hugging Face's names and in torch's orientation."""
        prefix = model.base_model_prefix
        tensors: dict[str, np.ndarray] = {}
        for name, value in model.state_dict().items():
            array = value.numpy()
            if array.ndim == 2 and "embed_tokens" not in name:
                array = array.T
            target = "model" + name[len(prefix) :] if name.startswith(f"{prefix}.") else name
            tensors[target] = np.ascontiguousarray(array)
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        return tensors

    def write_hf(
        self,
        folder: Path,
        model: Any,
        *,
        kind: str = "safetensors",
        shards: int = 1,
        tensors: dict[str, np.ndarray] | None = None,
        **config: Any,
    ) -> Path:
        """Write a folder as transformers does: ``kind`` is "safetensors" or "bin"."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.hf_tensors(model) if tensors is None else tensors
        content = {k: v for k, v in model.config.to_dict().items() if isinstance(v, int | float | str | bool | list)}
        content.pop("paddlenlp_version", None)
        content.pop("dtype", None)
        architecture = f"{type(model).__name__}"
        content |= {
            "model_type": model.config.model_type,
            "architectures": [architecture],
            "torch_dtype": "float32",
        } | config
        (folder / "config.json").write_text(json.dumps(content))
        stem, suffix = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
        names = list(tensors)
        weight_map: dict[str, str] = {}
        for shard in range(shards):
            part = names[shard::shards]
            file = f"{stem}.{suffix}" if shards == 1 else f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
            chosen = {name: tensors[name] for name in part}
            if kind == "safetensors":
                save_file(chosen, folder / file, metadata={"format": "pt"})
            else:
                write_torch_file(folder / file, chosen)
            weight_map |= dict.fromkeys(part, file)
        if shards > 1:
            (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    def tokenizer_folder(
        self, folder: Path, *, extra: tuple[str, ...] = (), text: str = "", fast: bool = False, **config: Any
    ) -> Path:
        """Train a byte-level BPE tokenizer and write it as Qwen2's; ``config`` changes tokenizer_config.json (None
        removes a key).
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|endoftext|>", "<|pad|>", *extra],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator([text or "the cat sat on the mat and the dog ran to the man"] * 3, trainer)
        tokenizer.model.save(str(folder))
        if fast:
            tokenizer.save(str(folder / "tokenizer.json"))
        content = {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
            "model_max_length": 512,
        } | config
        (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return folder


def write_torch_file(path: Path, tensors: dict[str, np.ndarray], *, evil: bool = False, bfloat16: bool = False) -> None:
    """Write tensors as ``torch.save`` (1.6 and later) writes a state dict, opcode by opcode: the tests need no torch.

    A column-major array keeps its strides, as a transposed tensor does in torch. ``evil`` adds a call that a weight
    file must not make.
    """

    def text(value: str) -> bytes:
        raw = value.encode()
        return b"X" + struct.pack("<I", len(raw)) + raw

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    storages = {"float32": "FloatStorage", "float16": "HalfStorage", "int64": "LongStorage", "float64": "DoubleStorage"}
    blocks: list[bytes] = []
    code = b"\x80\x02}("
    for key, (name, array) in enumerate(tensors.items()):
        flat = array.T if array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous else array
        strides = tuple(stride // array.itemsize for stride in array.strides)
        storage = "BFloat16Storage" if bfloat16 else storages[str(array.dtype)]
        block = np.ascontiguousarray(flat)
        if bfloat16:
            block = (block.view(np.uint32) >> 16).astype(np.uint16)
        blocks.append(block.tobytes())
        code += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        code += b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(str(key)) + text("cpu")
        code += b"J" + struct.pack("<i", array.size) + b"tQ"
        code += b"J" + struct.pack("<i", 0) + integers(array.shape) + integers(strides)
        code += b"\x89" + b"ccollections\nOrderedDict\n)R" + b"tR"
    if evil:
        code += text("x") + b"cos\nsystem\n(" + text("true") + b"tR"
    code += b"u."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", code)
        for key, block in enumerate(blocks):
            archive.writestr(f"archive/data/{key}", block)
        archive.writestr("archive/version", "3\n")


@pytest.fixture(scope="session")
def kit() -> ModelKit:
    return ModelKit()


@pytest.fixture(scope="session")
def torch_writer() -> Callable[..., None]:
    return write_torch_file


@pytest.fixture(scope="session", params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def causal_folder(kit: ModelKit, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny causal model of that type, saved once."""
    from alignment.ppo.models import save_model

    root = tmp_path_factory.mktemp("causal")

    def folder(model_type: str) -> Path:
        target = root / model_type
        if not target.exists():
            save_model(kit.causal(model_type), target)
        return target

    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Return all that the package's logger said during the test, once-only lines included."""
    import alignment.log

    logger = alignment.log.get_logger()
    monkeypatch.setattr(alignment.log, "_SAID", set())
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger="alignment")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)
