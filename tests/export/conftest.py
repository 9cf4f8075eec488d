"""Tiny models in folders and checkpoints as the runners leave them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.models.conftest import MODEL_TYPES, ModelKit


@pytest.fixture(scope="session")
def kit() -> ModelKit:
    return ModelKit()


@pytest.fixture(scope="session", params=MODEL_TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def make_folder(kit: ModelKit, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a model folder with tokenizer and prompt template (once per set of arguments) and return it."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def folder(model_type: str = "qwen2", kind: str = "causal", *, template: Any = "beaver", **config: Any) -> Path:
        from alignment.ppo.data import PromptTemplate
        from alignment.ppo.models import load_tokenizer, save_model, save_tokenizer

        key = f"{model_type} {kind} {template} {sorted(config.items())}"
        if key not in made:
            target = root / f"{model_type}-{len(made)}"
            # 400 rows: as many as the tokenizer may have
            model = getattr(kit, kind)(model_type, vocab_size=400, **config)
            raw = kit.tokenizer_folder(root / f"tokenizer-{len(made)}", extra=("<|im_start|>", "<|im_end|>"))
            save_model(model, target)
            tokenizer = load_tokenizer(raw)
            save_tokenizer(tokenizer, target)
            PromptTemplate.resolve(template, tokenizer).save(target)
            made[key] = target
        return made[key]

    return folder


@pytest.fixture
def make_checkpoint(make_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Write ``checkpoint-3`` of a run, as the trainers do: models and ``trainer/``, with a manifest."""
    import shutil

    from alignment.flow.checkpoint import CheckpointStore

    def checkpoint(**models: Path) -> Path:
        store = CheckpointStore(tmp_path / "run")
        with store.writing(3) as folder:
            for name, source in models.items():
                shutil.copytree(source, folder if name == "plain" else folder / name, dirs_exist_ok=True)
            (folder / "trainer").mkdir()
            (folder / "trainer" / "trainer_state.json").write_text("{}")
        return store.path(3)

    return checkpoint
