"""Least squares from moments against least squares on the data."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.numerics.least_squares import Sample, fit, residual, shifted_residual, solve


def sample(x, y):
    mx, my = x.mean(0), y.mean(0)
    return Sample(
        len(x), mx, my, np.cov(x.T, bias=True).reshape(x.shape[1], -1), (y - my).T @ (x - mx) / len(x), y.var(0)
    )


def data(seed, n=200, d=6, e=3, noise=0.1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    weight, bias = rng.normal(size=(e, d)), rng.normal(size=e)
    return x, x @ weight.T + bias + noise * rng.normal(size=(n, e)), weight, bias


@settings(deadline=None)
@given(st.integers(0, 1000))
def test_equals_lstsq_on_the_data(seed):
    x, y, *_ = data(seed)
    moments = sample(x, y)
    found = fit(moments, np.zeros((3, 6)), ridges=(1e-12,), halves=(moments, moments))
    wanted, *_ = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)
    predicted = x @ found.weight.T + found.bias
    np.testing.assert_allclose(predicted, np.c_[x, np.ones(len(x))] @ wanted, atol=1e-5 * np.abs(y).max())
    np.testing.assert_allclose(found.error, ((predicted - y) ** 2).mean(0), rtol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 10))
def test_minimises_the_regularised_objective(seed, ridge):
    x, y, *_ = data(seed)
    moments = sample(x, y)
    rng = np.random.default_rng(seed)
    prior = rng.normal(size=(3, 6))
    lam = ridge * np.trace(moments.covariance) / 6

    def objective(weight):
        return residual(moments, weight).sum() + lam * ((weight - prior) ** 2).sum()

    best = solve(moments.covariance, moments.cross, prior, ridge)
    for _ in range(5):
        assert objective(best) <= objective(best + 1e-3 * rng.normal(size=best.shape))
    assert objective(best) <= objective(prior)


def test_large_ridge_is_the_prior_and_infinite_ridge_corrects_the_mean_only():
    x, y, *_ = data(3)
    moments = sample(x, y)
    prior = np.random.default_rng(0).normal(size=(3, 6))
    np.testing.assert_allclose(solve(moments.covariance, moments.cross, prior, 1e9), prior, atol=1e-6)
    kept = fit(moments, prior, halves=(moments, moments), ridges=())
    assert kept.ridge == np.inf
    np.testing.assert_array_equal(kept.weight, prior)
    np.testing.assert_allclose(kept.bias, (y - x @ prior.T).mean(0))


def test_few_samples_keep_good_weights_and_many_samples_leave_bad_ones():
    x, y, weight, _ = data(5, n=2000, noise=2.0)
    few = fit(sample(x[:8], y[:8]), weight, (sample(x[:4], y[:4]), sample(x[4:8], y[4:8])))
    plain = solve(sample(x[:8], y[:8]).covariance, sample(x[:8], y[:8]).cross, weight, 1e-6)
    test = sample(x[1000:], y[1000:])
    assert shifted_residual(test, few.weight, few.bias).sum() < 0.5 * residual(test, plain).sum()
    many = fit(sample(x, y), np.zeros_like(weight), (sample(x[::2], y[::2]), sample(x[1::2], y[1::2])))
    assert many.ridge < 0.1
    assert residual(test, many.weight).sum() < 1.05 * residual(test, weight).sum()


def test_keep_is_the_moments_of_fewer_columns():
    x, y, *_ = data(7)
    columns = np.array([4, 1])
    some, all_of_them = sample(x[:, columns], y), sample(x, y).keep(columns)
    np.testing.assert_allclose(some.covariance, all_of_them.covariance)
    np.testing.assert_allclose(some.cross, all_of_them.cross)


def test_shift_of_the_inputs_moves_only_the_bias():
    x, y, *_ = data(9)
    one = fit(sample(x, y), np.zeros((3, 6)))
    other = fit(sample(x + 100.0, y), np.zeros((3, 6)))
    np.testing.assert_allclose(one.weight, other.weight, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(one.bias, other.bias + 100.0 * other.weight.sum(1), rtol=1e-6, atol=1e-6)


def test_constant_inputs_do_not_break_it():
    x, y, *_ = data(11)
    x[:, 2] = 3.0
    found = fit(sample(x, y), np.zeros((3, 6)))
    assert np.isfinite(found.weight).all()
    assert found.error.sum() < y.var(0).sum()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_residual_is_the_mean_squared_error(dtype):
    x, y, weight, bias = data(13)
    weight, bias = weight.astype(dtype), bias.astype(dtype)
    wanted = ((x @ weight.T + bias - y) ** 2).mean(0)
    np.testing.assert_allclose(shifted_residual(sample(x, y), weight, bias), wanted, rtol=1e-4)
