"""Forwards of torch and JAX as their own backward, and torch modules whose parameters are an op's inputs."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from leadline.golden import UsageError, verify
from leadline.golden.autograd import takes_gradients
from leadline.ref.op import op_named


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch not installed")


def rms(torch: Any, x: Any, weight: Any, eps: float) -> Any:
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def module_of(torch: Any, forward: Any) -> Any:
    """A module with the parameter `weight`, whose size is not that of any case."""

    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

    Norm.forward = forward
    return Norm()


@pytest.mark.peers("torch")
def test_a_module_is_judged_in_both_directions_with_the_cases_weights(torch: Any) -> None:
    """Its parameter takes each case's weight, autograd makes dx and dweight; no framework need be named."""
    module = module_of(torch, lambda self, x, eps=1e-6: rms(torch, x, self.weight, eps))
    for direction in ("forward", "backward"):
        report = verify(module, op="rmsnorm", direction=direction, precision=["fp32", "bf16", "fp64"])
        assert report.count("PASS") == len(report.results) == 30, str(report)
    assert module.weight.shape == (1,)
    assert module.weight.grad is None


@pytest.mark.peers("torch")
def test_a_parameter_deep_in_a_module_is_found(torch: Any) -> None:
    """The weight of a submodule stands for the input of the submodule's name."""

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Linear(1, 1, bias=False)

        def forward(self, x: Any) -> Any:
            return self.weight(x)

    report = verify(Linear(), op="linear", direction="backward", precision="fp32")
    assert report.count("PASS") == len(report.results) > 0, str(report)


@pytest.mark.peers("torch")
def test_a_function_becomes_its_own_backward(torch: Any) -> None:
    """A forward asked for as a backward; one that takes dy is a backward by itself and is called as such."""
    report = verify(lambda x, weight, eps: rms(torch, x, weight, eps), op="rmsnorm", direction="backward", framework="torch")
    assert report.count("PASS") == len(report.results) == 20, str(report)

    def own(x: Any, weight: Any, dy: Any, eps: float) -> Any:
        return torch.zeros_like(x), torch.zeros_like(weight)

    assert takes_gradients(own, op_named("rmsnorm"))
    assert verify(own, op="rmsnorm", direction="backward", framework="torch", explained=False).verdict == "FAIL"


@pytest.mark.peers("torch")
def test_a_wrong_gradient_fails(torch: Any) -> None:
    """A norm whose statistic is detached has the right forward and the wrong backward; one that detaches all is told so."""

    def detached(x: Any, weight: Any, eps: float) -> Any:
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps).detach() * weight).to(x.dtype)

    assert verify(detached, op="rmsnorm", framework="torch", precision="fp32").verdict == "PASS"
    assert verify(detached, op="rmsnorm", framework="torch", precision="fp32", direction="backward").verdict == "FAIL"
    nothing = module_of(torch, lambda self, x, eps=1e-6: rms(torch, x, self.weight, eps).detach())
    report = verify(nothing, op="rmsnorm", direction="backward", precision="fp32", explained=False)
    assert {(r.verdict, "must not detach" in r.reason) for r in report.results} == {("FAIL", True)}


@pytest.mark.peers("torch")
def test_a_choice_is_handed_over(torch: Any) -> None:
    """A router's gradient is judged for the forward's choice, which it is handed as topk_idx."""

    def router(logits: Any, bias: Any, *, k: int, n_group: int, topk_group: int, routed_scaling_factor: float, topk_idx: Any) -> Any:
        s = torch.sigmoid(logits.double() if logits.dtype == torch.float64 else logits.float())
        chosen = s.gather(-1, topk_idx)
        return topk_idx, (chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * routed_scaling_factor).to(logits.dtype)

    report = verify(router, op="router.noaux_tc", direction="backward", framework="torch")
    assert report.count("FAIL") == report.count("ERROR") == 0, str(report)
    assert report.count("PASS") >= 20


@pytest.mark.peers("torch")
def test_modules_among_an_object_s_attributes_have_a_backward(torch: Any) -> None:
    """An object of modules is asked in both directions; its functions have the backward that they name, or none."""
    module = module_of(torch, lambda self, x, eps=1e-6: rms(torch, x, self.weight, eps))
    subject = SimpleNamespace(FRAMEWORK="torch", rmsnorm=module, linear=lambda x, weight: x @ weight.T)
    report = verify(subject, op=["rmsnorm", "linear"], precision="fp32")
    assert {(r.op, r.direction) for r in report.results if r.verdict == "PASS"} == {
        ("rmsnorm", "forward"),
        ("rmsnorm", "backward"),
        ("linear", "forward"),
    }


@pytest.mark.peers("torch")
def test_a_module_that_takes_other_names_is_told_what_is_passed(torch: Any) -> None:
    module = module_of(torch, lambda self, hidden_states: rms(torch, hidden_states, self.weight, 1e-6))
    with pytest.raises(UsageError, match=r"takes hidden_states, weight; rmsnorm forward passes by keyword x, weight"):
        verify(module, op="rmsnorm")


def test_a_jax_function_becomes_its_own_backward(tmp_path: Path) -> None:
    """By jax.vjp, in a process of its own: float64 has to be switched on before JAX's first array."""
    pytest.importorskip("jax", reason="jax not installed")
    path = tmp_path / "mine.py"
    path.write_text(
        "import jax.numpy as jnp\n"
        "def rms(x, weight, eps):\n"
        "    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))\n"
        "    return (wide / jnp.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * weight.astype(wide.dtype)).astype(x.dtype)\n"
    )
    command = [sys.executable, "-m", "leadline.golden.cli", "verify", f"{path}:rms", "--framework", "jax", "--op", "rmsnorm"]
    run = subprocess.run([*command, "--direction", "backward"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "20 passed" in run.stdout
