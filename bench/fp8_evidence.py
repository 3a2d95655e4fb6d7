"""FP8 training against bf16 on real text: all arms from the same seeds on the same batches, differences in pairs.

    python bench/fp8_evidence.py run  [--out runs/fp8] [--seeds 3] [--tokens 3e6] [--jobs 2] [--arms bf16 fp8 …]
    python bench/fp8_evidence.py show [--out runs/fp8]

`run` goes on where it was stopped; a job has one thread. The built-in corpus, a tokenizer of 1024, a model of 256 × 2
layers with 8 experts of 128 and a shared one, so that every product but that of the experts' outputs has two blocks of
128. `show` prints, for each arm, the loss on held-out text in nats per token, and how much it is above that of bf16
with the same seed, relative to it, with a 95% interval over the seeds (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

from moestro.compare.worker import main as train_one
from moestro.config import build_config
from moestro.training.prepare import open_data

ARMS: dict[str, dict[str, str]] = {
    "bf16": {},
    "fp8": {},
    "both": {"transpose": "both"},
    "ue8m0": {"scale": "ue8m0"},
    "tensor": {"tile": "tensor"},
    "square": {"dgrad_tile": "square"},
}
MEANING = {
    "bf16": "bf16 products, fp32 moments",
    "fp8": "the report's recipe: scales of blocks in fp32, requantised for the gradient of weights, bf16 moments",
    "both": "inputs quantised in both directions from the unrounded tensor",
    "ue8m0": "scales that are powers of two",
    "tensor": "one scale for a whole tensor",
    "square": "gradients of activations in blocks of 128 x 128",
}
MODEL = {
    "vocab_size": 1024, "hidden_dim": 256, "num_layers": 2, "num_dense_layers": 0, "dense_dim": 512, "num_heads": 4,
    "kv_lora_rank": 128, "nope_dim": 32, "rope_dim": 16, "v_dim": 64, "num_experts": 8, "num_shared_experts": 1,
    "top_k": 2, "expert_dim": 128, "max_seq_len": 128, "mtp_depth": 0,
}  # fmt: skip
BATCH, LENGTH = 32, 128
T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}  # Student's t, 97.5%, by degrees of freedom


def configuration(arm: str, seed: int, tokens: float) -> dict[str, object]:
    """The settings of a run."""
    steps = math.ceil(tokens / (BATCH * LENGTH))
    train = {
        "precision": "bf16" if arm == "bf16" else "fp8", "seed": seed, "steps": steps, "seq_len": LENGTH,
        "batch_size": BATCH, "lr": 4e-3, "eval_every": steps, "checkpoint_every": steps, "eval_tokens": 65536,
        "threads": 1,
    }  # fmt: skip
    return {"model": MODEL, "train": train, "fp8": ARMS[arm], "data": {"tokenizer": "train", "valid_fraction": 0.05}}


def run(out: Path, arms: list[str], seeds: int, tokens: float, jobs: int) -> None:
    """Train what is missing, `jobs` at a time, the first arms first."""
    out.mkdir(parents=True, exist_ok=True)
    open_data(build_config(configuration("bf16", 0, tokens)), out, print, fresh=not (out / "data").exists())
    queue = [(arm, seed) for arm in arms for seed in range(seeds) if loss_of(out, arm, seed) is None]
    running: list[subprocess.Popen[bytes]] = []
    for arm, seed in queue:
        while len(running) >= jobs:
            time.sleep(1)
            running = [process for process in running if process.poll() is None]
        directory = out / f"{arm}-{seed}"
        directory.mkdir(exist_ok=True)
        if not (directory / "data").is_symlink():
            (directory / "data").symlink_to(Path("..", "data"), target_is_directory=True)
        config = out / f"{arm}-{seed}.json"
        config.write_text(json.dumps(configuration(arm, seed, tokens)), "utf-8")
        print(time.strftime("%H:%M:%S"), arm, seed, flush=True)
        command = [sys.executable, __file__, "one", str(config), str(directory)]
        running.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    for process in running:
        process.wait()


def loss_of(out: Path, arm: str, seed: int) -> float | None:
    """The loss on held-out text at the end of a run, None if it has not ended."""
    log, config = out / f"{arm}-{seed}" / "evals.jsonl", out / f"{arm}-{seed}.json"
    if not log.exists() or not log.read_text("utf-8").strip():
        return None
    last = json.loads(log.read_text("utf-8").splitlines()[-1])
    steps = json.loads(config.read_text("utf-8"))["train"]["steps"]
    return float(last["loss"]) if last["step"] >= steps else None


def show(out: Path) -> None:
    """A Markdown table of all arms."""
    print("| arm | what it is | seeds | loss | above bf16 (95%) | tokens/s, one thread |\n|---|---|---|---|---|---|")
    for arm in ARMS:
        losses = {seed: loss for seed in range(10) if (loss := loss_of(out, arm, seed)) is not None}
        if not losses:
            continue
        base = {seed: loss for seed in losses if (loss := loss_of(out, "bf16", seed)) is not None}
        gaps = [100 * (losses[seed] / base[seed] - 1) for seed in base]
        gap = f"{fmean(gaps):+.3f}%" if gaps and arm != "bf16" else ""
        if len(gaps) > 1 and arm != "bf16":
            gap += f" ± {T95[len(gaps) - 1] * stdev(gaps) / math.sqrt(len(gaps)):.3f}%"
        speed = fmean(speed_of(out / f"{arm}-{seed}") for seed in losses)
        print(f"| {arm} | {MEANING[arm]} | {len(losses)} | {fmean(losses.values()):.4f} | {gap} | {speed:,.0f} |")


def speed_of(directory: Path) -> float:
    """Tokens a second over a run's middle half, whatever else the machine did."""
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    speeds = sorted(json.loads(line)["tokens_per_second"] for line in lines)
    return fmean(speeds[len(speeds) // 4 : 3 * len(speeds) // 4 + 1])


def main() -> int:
    """Train, or print what has been trained."""
    if sys.argv[1:2] == ["one"]:
        return train_one(Path(sys.argv[2]), Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--out", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=float, default=3e6)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    if args.what == "run":
        run(args.out, args.arms, args.seeds, args.tokens, args.jobs)
    show(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
