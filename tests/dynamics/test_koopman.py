import math

import pytest
import torch
from torch import Tensor

from driftrl.dynamics.koopman import koopman_matrix, lyapunov_exponents

F64 = torch.float64


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (F64, 1e-9)])
def test_matrix_of_a_linear_step_is_found_whatever_units_offset_and_control(
    dtype: torch.dtype, tolerance: float
) -> None:
    matrix, gain, x, u = 0.5 * rand(3, 3), rand(3, 2, seed=1), rand(60, 3, seed=2), rand(60, 2, seed=3)
    x = 5 + x * torch.tensor([0.1, 1.0, 10.0], dtype=F64)
    after = x @ matrix.mT + u @ gain.mT - 2
    found = koopman_matrix(x.to(dtype), after.to(dtype), u.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.to(F64), matrix, rtol=tolerance, atol=tolerance)
    still = torch.cat([x, torch.ones(60, 1, dtype=F64)], 1)  # an observation that never changes
    padded = koopman_matrix(still, torch.cat([after, still[:, -1:]], 1), u)
    torch.testing.assert_close(padded[:3, :3], matrix, rtol=1e-8, atol=1e-8)


def test_units_that_differ_by_many_orders_do_not_matter() -> None:
    matrix, x, units = 0.5 * rand(3, 3), rand(60, 3, seed=2), torch.tensor([1e-9, 1.0, 1e9], dtype=F64)
    found = koopman_matrix(x * units, x @ matrix.mT * units)
    torch.testing.assert_close(found * units / units[:, None], matrix, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_constant_that_its_mean_rounds_is_no_input(dtype: torch.dtype) -> None:
    x = torch.cat([rand(2000, 2).to(dtype), torch.full((2000, 1), 0.1, dtype=dtype)], 1)
    found = koopman_matrix(x, torch.cat([0.5 * x[:, :2], x[:, 2:]], 1))
    torch.testing.assert_close(found, torch.diag(torch.tensor([0.5, 0.5, 0.0], dtype=dtype)), rtol=0, atol=1e-5)


def test_eigenvalues_of_noisy_data_are_those_of_the_system() -> None:
    """A damped oscillation driven by noise: modulus and angle per step."""
    radius, angle = 0.95, 0.3
    turn = radius * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=F64)
    states = [rand(1, 2)]
    for k in range(4000):
        states.append(states[-1] @ turn.mT + 0.1 * rand(1, 2, seed=k))
    path = torch.cat(states)
    values = torch.linalg.eigvals(koopman_matrix(path[:-1], path[1:]))
    torch.testing.assert_close(values.abs(), torch.full((2,), radius, dtype=F64), rtol=0, atol=0.01)
    torch.testing.assert_close(values.angle().abs(), torch.full((2,), angle, dtype=F64), rtol=0, atol=0.02)


def test_many_rows_of_float32_cut_no_direction() -> None:
    """Two inputs that differ by little: a tolerance that grows with the number of rows takes them for one."""
    x = rand(400_000, 2)
    x, matrix = torch.stack([x[:, 0], x[:, 0] + 0.04 * x[:, 1]], 1), torch.tensor([[0.9, 0.2], [0.0, 0.5]], dtype=F64)
    found = koopman_matrix(x.float(), (x @ matrix.mT).float())
    torch.testing.assert_close(found, matrix.float(), rtol=0, atol=1e-4)


def test_inputs_that_are_others_to_the_rounding_of_float32_get_no_large_coefficients() -> None:
    x = rand(2000, 2)
    before = torch.cat([x, x.sum(1, keepdim=True) / 3], 1).float()
    found = koopman_matrix(before, before.square() - before)
    assert found.abs().max() < 2


def test_exponents_of_the_henon_map() -> None:
    """0.4192 and log 0.3 - 0.4192 (Sprott 2003, Chaos and Time-Series Analysis, appendix A)."""
    x, y, jacobians = 0.1, 0.1, []
    for k in range(11_000):
        if k >= 1000:
            jacobians.append([[-2.8 * x, 1.0], [0.3, 0.0]])
        x, y = 1 - 1.4 * x * x + y, 0.3 * x
    found = lyapunov_exponents(torch.tensor(jacobians, dtype=F64)[:, None])[0]
    assert found[0].item() == pytest.approx(0.4192, abs=0.01)
    assert found.sum().item() == pytest.approx(math.log(0.3), abs=1e-9)  # the determinant is that at each step


def test_exponents_of_constant_matrices_are_logs_of_their_eigenvalues_row_by_row() -> None:
    scales = torch.tensor([[2.0, 0.5, 0.1], [0.9, 1.5, 0.3]], dtype=F64)
    frame, _ = torch.linalg.qr(rand(3, 3))
    symmetric = frame @ torch.diag_embed(scales) @ frame.mT
    found = lyapunov_exponents(symmetric.expand(400, -1, -1, -1))
    torch.testing.assert_close(found, scales.log().sort(descending=True).values, rtol=0, atol=0.02)  # 1 / steps
    assert lyapunov_exponents(symmetric.float().expand(3, -1, -1, -1)).dtype == torch.float32


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"with N above 5, the number of inputs, got \[5, 3\] and \[5, 3\]"):
        koopman_matrix(rand(5, 3), rand(5, 3), rand(5, 2))
    with pytest.raises(ValueError, match=r"same shape \[N, O\].*got \[9, 3\] and \[9, 2\]"):
        koopman_matrix(rand(9, 3), rand(9, 2))
    with pytest.raises(ValueError, match=r"jacobians must have shape \[T, B, O, O\], got \[4, 3, 3\]"):
        lyapunov_exponents(rand(4, 3, 3))
