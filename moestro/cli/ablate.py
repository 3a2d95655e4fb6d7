"""`moestro ablate`: how many bits per byte a model loses when experts are removed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from moestro.cli.output import print_json, print_note
from moestro.cli.process import Threads, use_threads
from moestro.errors import ConfigError

if TYPE_CHECKING:
    from moestro.engine.language_model import LanguageModel

SEQ_LEN = 512  # context length, as in `moestro eval`

MEANING = (
    "Differences in bits per byte from the intact model; + is worse. Nothing was retrained: this shows which experts\n"
    "the model relies on, not where its knowledge lies. The others never learnt to stand in."
)


def ablate(
    model: Path,
    *,
    what: str | None = None,
    data: str | None = None,
    max_tokens: int = 4096,
    seed: int = 0,
    seeds: int = 3,
    experts_per_layer: int | None = None,
    dtype: str = "auto",
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Measure what a model loses, in bits per byte, when experts are masked.

    Nothing is retrained; every domain is compared with the intact model.

    Parameters
    ----------
    model
        A run, a checkpoint or a Hugging Face deepseek_v3 or deepseek_v2 directory.
    what
        Ablations, separated by commas: top1 or top:M (the first choices of every token), fraction:F (a random share
        of each layer's experts), shared (the shared experts), shared+1 (and one more routed expert used),
        domain:NAME or domains (the experts that a domain prefers most). By default all that the model allows.
    data
        What to evaluate on: like train --data. Without it, the documents that the run held out.
    max_tokens
        Most tokens to evaluate per domain.
    seed
        Seed of the first random draw of experts.
    seeds
        How many random draws to average over.
    experts_per_layer
        How many experts to mask for a domain; by default as many as a token uses.
    dtype
        auto (as stored), fp32 or bf16.
    json_output
        Print {"intact", "ablations": [{"name", "masked", "bits_per_byte", "difference", "domains": {…}}], "tokens"}
        on one line.
    """
    from moestro.engine.language_model import load

    if max_tokens < 1:
        raise ConfigError(f"--max-tokens must be at least 1, not {max_tokens}")
    use_threads(threads)
    names = None if what is None else [name.strip() for name in what.split(",") if name.strip()]
    result = run_ablations(
        load(model, dtype),
        names,
        text=(data, model),
        max_tokens=max_tokens,
        seed=seed,
        draws=seeds,
        experts_per_layer=experts_per_layer,
    )
    if json_output:
        print_json(result)
    else:
        print_result(result)


def run_ablations(
    language_model: LanguageModel,
    names: list[str] | None,
    *,
    text: tuple[str | None, Path],
    max_tokens: int,
    **settings: Any,
) -> dict[str, Any]:
    """Evaluate on `text`, which is a source or what a run held out; the terminal shows progress."""
    from rich.console import Console

    from moestro.training.ablate import ablate as evaluate_ablations
    from moestro.training.evaluate import open_domains, pad_token_bytes

    (source, run), model = text, language_model.model
    token_bytes = pad_token_bytes(language_model.tokenizer.token_bytes, model.config.vocab_size)
    with tempfile.TemporaryDirectory(prefix="moestro-") as scratch, Console(stderr=True).status("reading") as status:
        domains = open_domains(
            language_model,
            source,
            run=run,
            split="auto",
            seq_len=min(SEQ_LEN, model.config.max_seq_len),
            max_tokens=max_tokens,
            scratch=Path(scratch),
        )
        return evaluate_ablations(model, domains, token_bytes, names, announce=status.update, **settings)


def print_result(result: Mapping[str, Any]) -> None:
    """Print the table, what its rows mean, and what it does and does not show; on standard error what was left out."""
    print_table(result)
    for row in result["ablations"]:
        print(f"{row['name']}: without {row['masked']}" + (f", {row['draws']} draws" if row["draws"] > 1 else ""))
    print(f"\n{MEANING}")
    for name, why in result["left_out"].items():
        print_note(f"left out: {name}: {why.removeprefix(name + ': ')}")
    if result["hash_layers"]:
        print_note(f"left alone, as they route by a hash of the token: layers {', '.join(result['hash_layers'])}")


def print_table(result: Mapping[str, Any]) -> None:
    """Print a row for the intact model and each ablation, and a column for all text and each domain."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    intact, domains = result["intact"], list(result["intact"]["domains"])
    table = Table(box=box.SIMPLE_HEAD, title=f"bits per byte, {result['tokens']:,} tokens", title_justify="left")
    table.add_column("ablation", no_wrap=True)
    for name in ("all", *domains):
        table.add_column(Text(name), justify="right", overflow="fold")
    whole = (intact, *(intact["domains"][name] for name in domains))
    table.add_row("intact", *(f"{score['bits_per_byte']:.4f}" for score in whole), end_section=True)
    for row in result["ablations"]:
        spread = "" if row["spread"] is None else f" ±{row['spread']:.3f}"
        own = row["name"].removeprefix("domain:")
        cells = [Text(f"{row['domains'][name]['difference']:+z.3f}", "bold" if name == own else "") for name in domains]
        table.add_row(Text(row["name"]), f"{row['difference']:+z.3f}{spread}", *cells)
    console = Console()
    if not console.is_terminal:
        console.width = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.print(table)
