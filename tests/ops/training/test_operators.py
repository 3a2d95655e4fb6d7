"""What PyTorch's own tools see of the operations: FakeTensors, DTensors, torch.compile, export, torch.func, devices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from moestro import ops
from moestro.model.layers import MLP
from moestro.ops import library
from moestro.ops.training import devices, forms, operators, reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def expert_inputs() -> tuple[Tensor, ...]:
    """x, gate_up, down, ids (two of them not carried out) and weights."""
    ids = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(i))[:2] for i in range(40)])
    ids[3, 1] = ids[7, 0] = 4
    return random(40, 16), random(4, 16, 16, seed=1), random(4, 16, 8, seed=2), ids, random(40, 2, seed=3).sigmoid()


def run_all(make: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Results and gradients of every operation, on inputs that `make` changes."""

    def leaf(*shape: int, seed: int = 0) -> Tensor:
        return make(random(*shape, seed=seed)).requires_grad_()

    x, gate_up, down, ids, weights = (make(t) for t in expert_inputs())
    leaves = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    found = [ops.grouped_experts(leaves[0], leaves[1], leaves[2], ids, leaves[3])]
    leaves += [leaf(40, 4, 6), leaf(40, 2, 6, seed=5), leaf(40, 2, 3, seed=6)]
    found.append(ops.packed_attention(*leaves[4:7], make(torch.tensor([0, 7, 7, 40])), 0.4))
    leaves += [leaf(40, 6, seed=7), leaf(9, 6, seed=8), leaf(6, seed=9)]
    targets = make((torch.arange(40) % 9).where(torch.arange(40) % 5 > 0, -100))
    total, nll, _ = ops.linear_cross_entropy(leaves[7], leaves[8], targets)
    found += [total[None], ops.linear(leaves[7], leaves[8]), ops.rms_norm(leaves[7], leaves[9], 1e-6)]
    found.append(ops.swiglu(leaves[7]))
    angles = make(random(40, 3, seed=10))
    found.append(ops.join_heads(leaves[5], leaves[7], (angles.cos(), angles.sin())))
    sum(t.square().sum() for t in found).backward()  # type: ignore[union-attr]
    return [*(t.detach() for t in [*found, nll]), *(t.grad for t in leaves if t.grad is not None)]


def test_fake_tensors_get_the_shapes_that_real_ones_have() -> None:
    real = run_all(lambda t: t.clone())
    with FakeTensorMode() as mode:
        fake = run_all(mode.from_tensor)
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [(t.shape, t.dtype, t.stride()) for t in real]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_devices_compute_the_same(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The form for GPUs, carried out on the CPU."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    close = 1e-5 if precision == "fp32" else 4 * 2**-8  # of the norm; bf16 rounds in another order
    x, gate_up, down, ids, weights = expert_inputs()
    heads, starts = [random(40, 4, 8), random(40, 2, 8, seed=5), random(40, 2, 8, seed=6)], torch.tensor([0, 7, 7, 40])
    results = []
    for by in (reference, devices):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, gate_up, down)]
        factors = weights.clone().requires_grad_()
        inputs = [t.to(dtype).requires_grad_() for t in heads]
        out = by.grouped_experts(*leaves, ids, factors)
        mixed = by.packed_attention(*inputs, starts, 0.4)
        (out.float().square().sum() + mixed.float().square().sum()).backward()
        results.append([out, mixed, *(t.grad for t in (*leaves, factors, *inputs))])
    for exact, found in zip(*results, strict=True):
        assert exact is not None and found is not None
        assert float((found.float() - exact.float()).norm()) <= close * float(exact.float().norm())


def test_the_meta_device_tells_shapes() -> None:
    real, meta = run_all(lambda t: t.clone()), run_all(lambda t: t.to("meta"))
    assert [(t.shape, t.dtype) for t in meta] == [(t.shape, t.dtype) for t in real]


@pytest.fixture
def mesh(tmp_path: object) -> Iterator[object]:
    """A gloo world of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_distributed_tensors_are_computed_or_refused_never_read_as_memory(mesh: object) -> None:
    x, weight = random(8, 6), random(5, 6, seed=1)
    shard, whole = distribute_tensor(x, mesh, [Shard(0)]), distribute_tensor(weight, mesh)  # type: ignore[arg-type]
    pairs = [
        (ops.linear(shard, whole), ops.linear(x, weight)),
        (ops.rms_norm(shard, distribute_tensor(weight[0], mesh), 1e-6), ops.rms_norm(x, weight[0], 1e-6)),  # type: ignore[arg-type]
        (ops.swiglu(shard), ops.swiglu(x)),
    ]
    for found, expected in pairs:
        assert isinstance(found, DTensor)
        torch.testing.assert_close(found.full_tensor(), expected)
    if library.load_library() is not None:
        with pytest.raises(TypeError, match="kernels take plain tensors in CPU memory, not a DTensor"):
            library.call("moestro_swiglu", shard, shard, 8, 3, 0, 1)
    with pytest.raises(NotImplementedError, match=r"moestro\.swiglu"):
        torch.ops.moestro.swiglu(shard)


class Parts(nn.Module):
    """A layer with a product, an activation and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP(6, 8, "fp32")
        self.scale = nn.Parameter(torch.ones(6))
        for seed, parameter in enumerate(self.mlp.parameters()):
            parameter.data = random(*parameter.shape, seed=seed)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(ops.rms_norm(x, self.scale, 1e-6))
        return out


def test_export_keeps_the_operators() -> None:
    module, x = Parts(), random(5, 6, seed=7)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x))
    assert any("moestro.linear" in str(node.target) for node in exported.graph.nodes)


def test_gradients_of_functions_are_those_of_backward() -> None:
    module, x = Parts(), random(5, 6, seed=7)
    parameters = dict(module.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, values, (x,)).square().sum()

    found = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    module(x).square().sum().backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-5, atol=1e-5 * float(parameter.grad.abs().max())
        )


def test_mapping_over_an_operation_is_refused_by_name() -> None:
    weight = random(5, 6)
    with pytest.raises(RuntimeError, match="vmap over LinearFunction"):
        torch.vmap(lambda x: ops.linear(x, weight))(random(3, 4, 6))


def test_a_parameter_is_cast_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = nn.Parameter(random(5, 6)), random(40, 6, seed=1).bfloat16()
    first = forms.cast(weight, torch.bfloat16)
    for _ in range(2):  # two micro-batches, forward and backward
        out = ops.linear(x, weight, "bf16")
        out.sum().backward()
        assert out.dtype == torch.bfloat16 and forms.cast(weight, torch.bfloat16) is first
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    with torch.no_grad():
        weight.add_(1)
    second = forms.cast(weight, torch.bfloat16)
    assert second is not first and torch.equal(second, weight.detach().bfloat16())
    torch.testing.assert_close(ops.linear(x, weight), x @ second.T)
    forms.forget()
    assert forms.cast(weight, torch.bfloat16) is not second
    assert forms.cast(weight, torch.float32) is weight


@pytest.mark.parametrize(
    "form",
    [
        "torch",
        pytest.param(
            "native",
            marks=pytest.mark.skipif(library.load_library() is None, reason="the native kernels are not built"),
        ),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_rows_multiply_losses_and_gradients(form: str, dtype: torch.dtype) -> None:
    """Against log-softmax in fp64; some weights are 0, some negative, some rows have no target."""
    hidden, weight = random(70, 12).to(dtype), random(33, 12, seed=1).to(dtype)
    targets = (torch.arange(70) % 33).where(torch.arange(70) % 7 > 0, -100)
    factors = random(70, seed=2).where(torch.arange(70) % 4 > 0, 0)
    leaves = [t.clone().requires_grad_() for t in (hidden, weight, factors)]
    total, nll, _ = operators.CrossEntropyFunction.apply(leaves[0], leaves[1], targets, leaves[2], True, form)[:3]
    found = torch.autograd.grad(2 * total, leaves)
    exact_leaves = [t.double().requires_grad_() for t in (hidden, weight, factors)]
    logprobs = (exact_leaves[0] @ exact_leaves[1].T).log_softmax(-1)
    exact_nll = -logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0] * (targets >= 0)
    exact = torch.autograd.grad(2 * (exact_nll * exact_leaves[2]).sum(), exact_leaves)
    close = 0.05 if (form, dtype) == ("torch", torch.bfloat16) else 2e-5  # whose logits are rounded to bf16
    torch.testing.assert_close(nll.double(), exact_nll.detach(), rtol=close, atol=close)
    torch.testing.assert_close(total, (nll * factors).sum())
    for mine, theirs in zip(found, exact, strict=True):
        error = float((mine.double() - theirs).norm() / theirs.norm())
        assert error < (2e-5 if dtype == torch.float32 else 3 * 2.0**-8)
