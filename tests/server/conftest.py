"""A tiny random model, engines of it, and a server that most tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from live import Live, run_live

from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.language_model import LanguageModel
from moestro.engine.paged_cache import page_bytes
from moestro.model.transformer import Transformer, init_weights


@pytest.fixture(scope="session")
def language_model(make_config: Callable[..., Config], tokenizer: Tokenizer) -> LanguageModel:
    model = Transformer(make_config("model.init_std=0.2", "model.max_seq_len=1024").model)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(7)
    for _, router in model.routers():
        router.bias.copy_(torch.randn(len(router.bias), generator=generator) * 0.2 - 0.5)
    return LanguageModel(model, tokenizer, frozenset([tokenizer.eos_id]))


@pytest.fixture(scope="session")
def make_engine(language_model: LanguageModel) -> Callable[..., Engine]:
    """`make_engine(num_pages=64, max_running=16, …)`."""

    def make(num_pages: int = 96, **limits: int) -> Engine:
        memory = num_pages * page_bytes(language_model.config, language_model.model.dtype)
        return Engine(
            language_model.runtime,
            language_model.tokenizer,
            language_model.stop_ids,
            memory_bytes=memory,
            **limits,  # type: ignore[arg-type]
        )

    return make


@pytest.fixture(scope="session")
def tokenizer_path(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return folder / "tokenizer.json"


@pytest.fixture(scope="package")
def live(make_engine: Callable[..., Engine], tokenizer_path: Path) -> Iterator[Live]:
    """The server that most tests share; idle before and after each."""
    with run_live(make_engine, tokenizer_path) as running:
        yield running
