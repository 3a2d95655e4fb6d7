"""Worlds: one process is the identity, and two train what one trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import steps
import torch
import torch.distributed as dist
from processes import run_processes
from steps import take_steps
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moestro.checkpoints.files import model_tensors, write_tensors
from moestro.config import build_config, load_file
from moestro.errors import ConfigError
from moestro.model.transformer import Transformer
from moestro.parallel.world import ONE, World, join
from moestro.training.loop import train

HERE = Path(__file__).parent


def test_a_world_of_one_is_the_identity() -> None:
    tensor = torch.arange(3)
    assert ONE.sum(tensor) is tensor and ONE.sum_numbers([2, 5]) == (2, 5) and ONE.agree(7) == 7
    assert ONE.is_main and list(range(5))[ONE.share] == [0, 1, 2, 3, 4]
    ONE.wait()
    ONE.sum_gradients(torch.nn.Linear(2, 2))
    with join() as world:
        assert world == ONE
    assert list(range(5))[World(1, 2).share] == [1, 3]


@pytest.mark.slow
def test_two_processes_train_what_one_does() -> None:
    """The same global batch: losses and norms within rounding, loads and biases exactly; every rank knows all."""
    alone = take_steps(ONE, 5)
    first, second = (json.loads(out) for out in run_processes(2, [str(HERE / "steps.py"), "5"]))
    assert first == second
    for name in ("loads", "biases", "text_bytes"):
        assert first[name] == alone[name], name
    torch.testing.assert_close(torch.tensor(first["steps"]), torch.tensor(alone["steps"]), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_run_over_two_processes_is_written_once_and_resumes_on_one(tiny_run: Path, tmp_path: Path) -> None:
    settings = str(tiny_run / "settings.json")
    train = ["-m", "moestro", "train", "--config", settings, "--out"]
    steps = ["train.steps=6", "train.checkpoint_every=3", "train.batch_size=4", "--quiet", "--json"]
    printed = run_processes(2, [*train, str(tmp_path / "two"), *steps])
    assert json.loads(printed[0])["finished"] and not printed[1]
    run_processes(1, [*train, str(tmp_path / "one"), *steps])
    losses = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    }
    assert [line["step"] for line in losses["two"]] == [1, 2, 3, 4, 5, 6]
    for one, two in zip(losses["one"], losses["two"], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and two["tokens"] == one["tokens"]
    resumed = run_processes(1, [*train, str(tmp_path / "two"), *steps, "train.steps=8", "--resume"])
    assert json.loads(resumed[0])["step"] == 8


def test_a_batch_that_cannot_be_dealt_out_is_refused(tiny_run: Path, tmp_path: Path) -> None:

    config = build_config(load_file(tiny_run / "settings.json"), ["train.batch_size=3"])
    with pytest.raises(ConfigError, match=r"train\.batch_size=3 cannot be dealt out to 2 processes"):
        train(config, tmp_path / "run", quiet=True, world=World(0, 2))


def test_sharded_parameters_train_and_are_saved_whole(tmp_path: Path) -> None:
    """FSDP2 in a world of one: blocks, MTP modules and the root wrapped; one step, then a checkpoint of all of it."""

    plain = steps.take_steps(ONE, 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh, made = init_device_mesh("cpu", (1,)), []

        def shard(model: Transformer, seed: int) -> None:
            init(model, seed)
            for module in (*model.layers, *model.mtp, model):
                fully_shard(module, mesh=mesh)
            made.append(model)

        init, steps.init_weights = steps.init_weights, shard  # type: ignore[assignment]
        try:
            sharded = steps.take_steps(ONE, 2)
        finally:
            steps.init_weights = init
        assert any(isinstance(parameter, DTensor) for parameter in made[0].parameters())
        assert sharded["loads"] == plain["loads"] and sharded["biases"] == plain["biases"]
        torch.testing.assert_close(torch.tensor(sharded["steps"]), torch.tensor(plain["steps"]), rtol=1e-5, atol=1e-6)
        write_tensors(tmp_path, model_tensors(made[0]))
    finally:
        dist.destroy_process_group()
    assert (tmp_path / "model.safetensors").stat().st_size > 0
