"""Training speed: Moestro beside transformers' DeepseekV3, same model, same batch, in turn.

    python bench/train.py                        # every mode, 5 rounds
    python bench/train.py --rows 1               # fewer tokens a step, for machines where torch's bf16 takes minutes
    python bench/train.py --sweep                # how our tokens/s falls with experts, top-k, sequence length

Each mode is a process of its own that waits while the others run; a round gives every mode its steps in turn. Printed:
median tokens/s, spread, the ratio to the best transformers mode, the share of the machine's product peak, measured in
registers, that 6·N_active·tokens/s makes, and for ours the bytes per token that a forward pass keeps. `dense` modes are
our own dense model of equal active size. `kept` modes tell malloc to keep freed memory, as `moestro train` always does.
A mode holds 2 to 4 GiB; the seven fit into 24. transformers' third implementation, `batched_mm`, copies an expert per
token and does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from workers import Worker, answer

MODEL = {
    "vocab_size": 4096, "hidden_dim": 256, "num_layers": 6, "num_dense_layers": 1, "dense_dim": 640, "num_heads": 4,
    "kv_lora_rank": 64, "nope_dim": 32, "rope_dim": 32, "v_dim": 64, "num_experts": 32, "num_shared_experts": 1,
    "top_k": 4, "expert_dim": 128, "max_seq_len": 2048, "router": {"scale": 2.0, "balance": []},
}  # fmt: skip
DENSE = {"num_experts": 0, "num_shared_experts": 0, "top_k": 1}  # dense_dim is what a token uses of the experts
KEEP = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
MODES: dict[str, tuple[str, dict[str, str]]] = {
    "moestro fp32": ("ours:fp32", KEEP),
    "moestro bf16": ("ours:bf16", KEEP),
    "moestro fp8": ("ours:fp8", KEEP),
    "dense fp32": ("dense:fp32", KEEP),
    "dense bf16": ("dense:bf16", KEEP),
    "transformers bf16 eager": ("hf:bf16:eager", {}),
    "transformers bf16 grouped_mm": ("hf:bf16:grouped_mm", {}),
    "transformers bf16 eager, kept": ("hf:bf16:eager", KEEP),
    "transformers bf16 grouped_mm, kept": ("hf:bf16:grouped_mm", KEEP),
    "transformers fp32 grouped_mm, kept": ("hf:fp32:grouped_mm", KEEP),
}


def our_step(dtype: str, model_tree: dict[str, Any], rows: int, length: int) -> tuple[Callable[[], None], int]:
    """A function that trains one step of ours on random tokens, and the bytes per token kept for the backward pass."""
    import torch

    from moestro.config import build_config
    from moestro.data.batches import Batch
    from moestro.model.attention import AttentionBatch
    from moestro.model.transformer import Targets
    from moestro.training.prepare import build_model
    from moestro.training.step import train_step

    config = build_config({"model": model_tree, "train": {"precision": dtype, "seq_len": length, "batch_size": rows}})
    model, optimizers = build_model(config)
    tokens = torch.randint(0, model_tree["vocab_size"], (rows, length + 1))
    batch = Batch(tokens, torch.zeros_like(tokens))
    token_bytes = torch.ones(model_tree["vocab_size"], dtype=torch.int64)

    def step() -> None:
        train_step(
            model,
            optimizers,
            [batch],
            config.train,
            token_bytes=token_bytes,
            lr=1e-4,
            mtp_weight=0.0,
            bias_speed=1e-3,
        )

    def forward() -> None:
        model(tokens[:, :-1].flatten(), AttentionBatch.causal(rows, length), targets=[Targets(tokens[:, 1:].flatten())])

    return step, count_kept(forward, {p.untyped_storage().data_ptr() for p in model.parameters()}) // (rows * length)


def count_kept(forward: Callable[[], None], parameters: set[int]) -> int:
    """Bytes of the memory that autograd keeps after a forward pass, each counted once, without parameters."""
    import torch

    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def hf_step(dtype: str, experts: str, rows: int, length: int) -> Callable[[], None]:
    """A function that trains one step of transformers' model on random tokens."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from moestro.checkpoints.hf import config_to_hf
    from moestro.config import build_config

    tree = config_to_hf(build_config({"model": MODEL}).model, bos_id=0, eos_id=1, dtype="float32")
    hf_config = DeepseekV3Config(**tree, attn_implementation="sdpa", experts_implementation=experts)
    model = DeepseekV3ForCausalLM(hf_config).to(torch.bfloat16 if dtype == "bf16" else torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, MODEL["vocab_size"], (rows, length))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def work(mode: str, model_tree: dict[str, Any], rows: int, length: int) -> None:
    """The worker: one warm-up step, then one timed step for every line on standard input."""
    kind, dtype, *rest = mode.split(":")
    kept = 0
    if kind == "hf":
        step = hf_step(dtype, rest[0], rows, length)
    else:
        step, kept = our_step(dtype, model_tree | (DENSE if kind == "dense" else {}), rows, length)
    step()
    answer(kept)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        answer(time.perf_counter() - start)


def start_worker(mode: str, environment: dict[str, str], tree: dict[str, Any], rows: int, length: int) -> Worker:
    """A mode's process, warmed up (alone, as the next starts after it); every question lets it take one step."""
    return Worker(__file__, mode, json.dumps(tree), str(rows), str(length), environment=environment)


def compare(rounds: int, steps: int, names: list[str], rows: int) -> None:
    """Time the modes in turn and print the table."""
    from limits import measure_limits

    from moestro.config import build_config
    from moestro.machine import describe_machine
    from moestro.model.size import measure_size

    machine, limits = describe_machine(), measure_limits()
    size = measure_size(build_config({"model": MODEL}).model)
    peak = max(limits.fp32, limits.bf16)
    print(f"{machine.cpu}, {machine.threads} threads, torch {machine.torch}")
    print(f"{limits}; N_active {size.active_without_embedding / 1e6:.1f}M")
    length = 512
    workers = {name: start_worker(*MODES[name], MODEL, rows, length) for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, worker in workers.items():
            speeds[name] += [rows * length / worker.ask() for _ in range(steps)]
    for worker in workers.values():
        worker.close()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    peers = [name for name in names if name.startswith("transformers")]
    best_bf16 = max((medians[n] for n in peers if "bf16" in n), default=float("nan"))
    best = max((medians[n] for n in peers), default=float("nan"))
    print()
    print(
        f"{'mode':<36} {'tok/s':>7} {'min':>7} {'max':>7} {'/ best bf16':>11} {'/ best':>7} {'of peak':>8} {'kept':>5}"
    )
    for name, values in speeds.items():
        share = 6 * size.active_without_embedding * medians[name] / peak / 1e9
        print(f"{name:<36} {medians[name]:>7.0f} {min(values):>7.0f} {max(values):>7.0f} "
              f"{medians[name] / best_bf16:>11.2f} {medians[name] / best:>7.2f} {share:>8.1%} "
              f"{workers[name].greeting or '':>5}")  # fmt: skip


def sweep(rounds: int) -> None:
    """Our tokens/s as experts, top-k and sequence length grow, 8192 tokens a step."""
    variants: dict[str, tuple[dict[str, Any], int]] = {f"experts {e}": ({"num_experts": e}, 512) for e in (8, 32, 128)}
    variants |= {f"top-k {k}": ({"top_k": k}, 512) for k in (1, 2, 4, 8)}
    variants |= {f"length {t}": ({}, t) for t in (128, 512, 2048)}
    from moestro.config import build_config
    from moestro.machine import describe_machine
    from moestro.training.precision import resolve_precision

    dtype = resolve_precision(build_config({"model": MODEL}))
    print(f"{describe_machine().cpu}, {dtype}")
    workers = {
        name: start_worker(f"ours:{dtype}", KEEP, MODEL | changes, 8192 // length, length)
        for name, (changes, length) in variants.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(rounds):
        for name, worker in workers.items():
            speeds[name].append(8192 / worker.ask())
    for name, values in speeds.items():
        workers[name].close()
        print(f"{name:<12} {statistics.median(values):>7.0f} tok/s  ({min(values):.0f}–{max(values):.0f})")


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--worker"]:
        _, _, mode, tree, rows, length = sys.argv
        work(mode, json.loads(tree), int(rows), int(length))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps a mode takes in one round")
    parser.add_argument("--rows", type=int, default=16, help="sequences of 512 tokens in a step")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", help="beginnings of mode names, parted by semicolons")
    options = parser.parse_args()
    if options.sweep:
        sweep(options.rounds)
        return
    wanted = tuple(options.only.split(";")) if options.only else ("",)
    compare(options.rounds, options.steps, [name for name in MODES if name.startswith(wanted)], options.rows)


if __name__ == "__main__":
    main()
