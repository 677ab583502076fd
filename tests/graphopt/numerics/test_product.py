"""The truncation of a product of factors, against the singular value decomposition of the whole product."""

import numpy as np
import pytest

from graphopt.numerics.product import product_basis

D = 6


def factors(seed, n=40, m=30, rank=D):
    random = np.random.default_rng(seed)
    mix = random.normal(size=(rank, D))
    return random.normal(size=(n, rank)) @ mix, random.normal(size=(m, D)) * np.logspace(0, -2, D)


def gram(x):
    return x.T @ x / len(x)


@pytest.mark.parametrize("seed", range(5))
def test_truncation_reaches_the_svd_optimum(seed):
    left, right = factors(seed)
    basis = product_basis(gram(left), gram(right), ridge=0.0)
    whole = left @ right.T
    exact = np.linalg.svd(whole, compute_uv=False)
    for k in range(1, D):
        kept = (left @ basis.left)[:, :k] @ (right @ basis.right)[:, :k].T
        assert np.linalg.norm(whole - kept) == pytest.approx(np.linalg.norm(exact[k:]), rel=1e-6)
        lost = np.sqrt((basis.strength[k:] ** 2).sum() * len(left) * len(right))
        assert lost == pytest.approx(np.linalg.norm(exact[k:]), rel=1e-6)


@pytest.mark.parametrize("rank", [D, 3])
def test_the_whole_product_stays(rank):
    left, right = factors(1, rank=rank)
    basis = product_basis(gram(left), gram(right))
    np.testing.assert_allclose(basis.left @ basis.right.T, np.eye(D), atol=1e-6)
    np.testing.assert_allclose((left @ basis.left) @ (right @ basis.right).T, left @ right.T, atol=1e-6)


def test_both_factors_carry_the_same():
    left, right = factors(2)
    basis = product_basis(gram(left), gram(right), ridge=0.0)
    np.testing.assert_allclose(gram(left @ basis.left), np.diag(basis.strength), atol=1e-9)
    np.testing.assert_allclose(gram(right @ basis.right), np.diag(basis.strength), atol=1e-9)
    assert (np.diff(basis.strength) <= 0).all()


def test_it_runs_on_torch_tensors():
    torch = pytest.importorskip("torch")
    left, right = (gram(x) for x in factors(3))
    ours = product_basis(left, right)
    theirs = product_basis(torch.tensor(left), torch.tensor(right))
    np.testing.assert_allclose(np.asarray(theirs.strength), ours.strength, rtol=1e-9)
    np.testing.assert_allclose(np.asarray(theirs.left @ theirs.right.T), np.eye(D), atol=1e-6)
