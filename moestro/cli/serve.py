"""`moestro serve`: a model for clients of the OpenAI API, and a chat page."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from moestro import machine
from moestro.cli.models import Download, Model, choose_model
from moestro.cli.output import print_rows
from moestro.cli.process import AS_STORED, Loading, Threads, use_threads
from moestro.errors import ConfigError
from moestro.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from moestro.engine.language_model import LanguageModel
    from moestro.server.service import Service

LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    Parameter(help="What goes to stderr; from info on a line for every request, but never what it says."),
]


def serve(
    model: Model = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    served_name: str | None = None,
    memory: str | None = None,
    max_running: int = 64,
    max_waiting: int = 1024,
    draft_tokens: int | None = None,
    drain_seconds: float = 30.0,
    log_level: LogLevel = "warning",
    download: Download = False,
    loading: Loading = AS_STORED,
    threads: Threads = 0,
) -> int:
    """Serve the OpenAI API under /v1 and a chat page at /.

    Parameters
    ----------
    host
        The address to listen on; an address that others can reach needs a key.
    port
        The port; 0 takes a free one.
    api_key_file
        A file with the key that clients must send.
    served_name
        The model's name for clients; by default the directory's name.
    memory
        Memory for the cache, such as 4GiB or 512MB; by default half of the free memory.
    max_running
        How many continuations are computed at once.
    max_waiting
        How many more may wait; others are told to come back.
    draft_tokens
        Tokens that the model's MTP modules draft a step; 0 for none, by default one if the model has such modules.
    drain_seconds
        How long running requests may take to finish after SIGTERM.
    """
    num_bytes = None if memory is None else parse_bytes(memory)
    require_extra()
    start_log(log_level)
    from moestro.server.run import bind, run_service

    directory, key = choose_model(model, download, "serve"), check_access(host, api_key_file)
    check_drain(drain_seconds)
    limits = {"max_running": max_running, "max_waiting": max_waiting, "draft_tokens": draft_tokens}
    limits["max_context"] = loading.max_context
    use_threads(threads)
    with bind(host, port) as listener:
        language_model = loading.load(directory)
        service = make_service(language_model, directory, served_name, memory_bytes=num_bytes, **limits)
        print_rows(describe_service(service), sys.stderr)  # the address alone is on standard output
        return run_service(service, listener, key, drain_seconds)


def require_extra() -> None:
    """Raise ConfigError, saying what to install, if a package needed for serving is missing."""
    try:
        import_module("llguidance")  # for requests with a grammar
        import_module("moestro.server.run")
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}: {machine.how_to_install('server')}") from error


def start_log(level: str) -> None:
    """Write the server's log to stderr."""
    from moestro.server.log import configure_logging

    configure_logging(level)


def check_drain(seconds: float) -> None:
    """Raise ConfigError for a time that is none."""
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"drain-seconds must be 0 or more, not {seconds}")


def check_access(host: str, api_key_file: Path | None) -> str | None:
    """The key that clients must send. ConfigError if it is bad, or missing while others can reach the server."""
    from moestro.server.run import check_host, read_key

    key = read_key(api_key_file)
    check_host(host, key is not None)
    return key


def make_service(language_model: LanguageModel, path: Path, served_name: str | None, **limits: int | None) -> Service:
    """The model with its engine, under the name that clients use; `limits` are the engine's."""
    from moestro.engine.engine import Engine
    from moestro.engine.language_model import find_model_directory
    from moestro.server.service import Service

    def make_engine() -> Engine:
        m = language_model
        return Engine(m.runtime, m.tokenizer, m.stop_ids, **limits)  # type: ignore[arg-type]

    tokenizer_path = find_model_directory(path) / "tokenizer.json"
    name = served_name or path.resolve().name
    return Service(make_engine, tokenizer_path, name, defaults=language_model.defaults)


def describe_service(service: Service) -> list[tuple[str, str]]:
    """What is served, and how, in names and values."""
    import torch

    from moestro.checkpoints.packed import dtype_name
    from moestro.engine.pages import PAGE_SIZE
    from moestro.ops.library import current_isa

    engine = service.worker.engine
    runtime, room, sizes = engine.runtime, engine.room, service.config
    longest = "" if room.context == sizes.max_seq_len else f" of the model's {sizes.max_seq_len:,}"
    cached = sum(tensor.nbytes for layer in engine.cache.layers for tensor in layer.values())
    drafts = f"{engine.draft_tokens} a step" if engine.draft_tokens else "none"
    isa = current_isa()
    return [
        ("model", service.name),
        ("weights", f"{runtime.format}, {format_bytes(runtime.nbytes)}; activations {dtype_name(runtime.dtype)}"),
        ("context", f"{room.context:,} tokens{longest}"),
        ("cache", f"{room.num_pages * PAGE_SIZE:,} tokens of all requests, {format_bytes(cached)}"),
        ("drafts", drafts),
        ("threads", f"{torch.get_num_threads()}, kernels {isa or 'none: plain torch'}"),
    ]
