"""``kmeans_1d`` and ``nearest`` against scikit-learn and exhaustive search."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from properties import few_examples, seeds
from reference import EXACT
from sklearn.cluster import KMeans

from pcnn_lightning.functional import kmeans_1d, nearest

# --- nearest --------------------------------------------------------------------------------------------------------


def naive_nearest(x, centers):
    """The nearest center by brute force; the higher one of a tie."""
    return [max(centers, key=lambda center: (-abs(value - center), center)) for value in x]


@few_examples
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=30),
    st.lists(st.integers(-40, 40), min_size=1, max_size=4, unique=True),
)
def test_nearest_breaks_ties_upwards(values, centers):
    x = torch.tensor(values, dtype=torch.float64) / 4  # exact, so that many lie half-way
    rising = torch.tensor(sorted(centers), dtype=torch.float64)
    assert nearest(x, rising).tolist() == naive_nearest(x.tolist(), rising.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [3, 4])
def test_nearest_is_the_least_distance_in_any_shape(dtype, count):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(4, 3, 5, 5, dtype=dtype, generator=generator)
    centers = torch.randn(count, dtype=dtype, generator=generator).sort().values
    rounded = nearest(x, centers)
    assert torch.equal(rounded, centers[(x.unsqueeze(-1) - centers).abs().argmin(-1)])
    assert rounded.dtype == dtype


def test_nearest_rounds_a_half_up():
    centers = torch.tensor([-2.0, 0.0, 1.0])
    assert nearest(torch.tensor([-1.0, 0.5, -9.0, 9.0]), centers).tolist() == [0, 1, -2, 1]


# --- k-means --------------------------------------------------------------------------------------------------------


def gaussian(count, dtype=torch.float64, seed=0):
    return torch.randn(count, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def two_lobes(count):
    return torch.cat([gaussian(count // 3) / 4 - 1, gaussian(count - count // 3, seed=1) / 8 + 2])


def inertia(x, centers):
    return (x.unsqueeze(-1) - centers).square().min(-1).values.sum().item()


def least_inertia(x, count):
    """The least sum of squared distances of any way to cut the sorted numbers into ``count`` runs."""
    ordered, total = x.sort().values, len(x)
    cost = torch.full((total + 1, total + 1), math.inf, dtype=torch.float64)  # of the run from start to before end
    for start in range(total):
        sizes_of_runs, run = torch.arange(1, total - start + 1), ordered[start:]
        cost[start, start + 1 :] = run.square().cumsum(0) - run.cumsum(0).square() / sizes_of_runs
    best = cost[0]
    for _ in range(count - 1):
        best = (best.unsqueeze(-1) + cost).min(0).values
    return best[total].item()


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("draw", [gaussian, two_lobes])
def test_centers_match_scikit_learn_from_the_same_quantiles(count, draw):
    x = draw(3000)
    start = x.sort().values[[3000 * (2 * place + 1) // (2 * count) for place in range(count)]]
    peer = KMeans(count, init=start.reshape(-1, 1).numpy(), n_init=1, tol=0, max_iter=100, algorithm="lloyd")
    expected = np.sort(peer.fit(x.reshape(-1, 1).numpy()).cluster_centers_.flatten())
    torch.testing.assert_close(kmeans_1d(x, count), torch.from_numpy(expected), **EXACT)


@pytest.mark.parametrize("count", [3, 4])
def test_centres_of_a_gaussian_are_as_good_as_those_of_many_restarts(count):
    x = gaussian(20_000)
    peer = KMeans(count, n_init=10, random_state=0, tol=0).fit(x.reshape(-1, 1).numpy())
    assert inertia(x, kmeans_1d(x, count)) <= 1.001 * peer.inertia_


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_centres_of_a_gaussian_are_near_the_best_of_all(count, seed):
    x = gaussian(300, seed=seed)
    best = least_inertia(x, count)
    assert best * (1 - 1e-9) <= inertia(x, kmeans_1d(x, count)) <= 1.02 * best


@few_examples
@given(seeds, st.integers(1, 200), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_each_centre_is_the_mean_of_the_numbers_nearest_to_it(seed, total, count, dtype):
    x = gaussian(total, dtype, seed)
    centers = kmeans_1d(x, count)
    assert centers.shape == (count,)
    assert centers.dtype == dtype
    assert (centers.diff() >= 0).all()
    assert x.min() <= centers.min()
    assert centers.max() <= x.max()
    rounded = nearest(x, centers)
    for center in rounded.unique():
        mean = x[rounded == center].double().mean().to(dtype)
        torch.testing.assert_close(center, mean, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [3, 4])
def test_centres_do_not_depend_on_order_or_shape(dtype, count):
    x = gaussian(5000, dtype)
    shuffled = x[torch.randperm(5000, generator=torch.Generator().manual_seed(1))].reshape(50, 4, 5, 5)
    state = torch.get_rng_state()
    expected = kmeans_1d(x, count)
    assert torch.equal(kmeans_1d(shuffled, count), expected)
    assert torch.equal(kmeans_1d(x.flip(0), count), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [3, 4])
def test_centres_are_found_in_double_precision_and_rounded_once(dtype, count):
    x = gaussian(50_000, torch.float32).to(dtype)
    assert torch.equal(kmeans_1d(x, count), kmeans_1d(x.double(), count).to(dtype))


def test_kmeans_is_detached_and_does_not_modify_its_input():
    x = gaussian(50).requires_grad_()
    before = x.detach().clone()
    assert not kmeans_1d(x, 3).requires_grad
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("value", [0.1, -0.3, 0.0])
@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_centres_of_equal_numbers_are_that_number(value, total):
    x = torch.full((total,), value)
    assert torch.equal(kmeans_1d(x, 4), x[:1].expand(4))
    assert torch.equal(nearest(x, kmeans_1d(x, 4)), x)


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("values", [[1.0, -1.0], [0.25, 0.25, 0.25, 8.0], [-1.0, 0.0, 0.0, 0.0, 0.0, 2.0]], ids=str)
def test_fewer_distinct_values_than_centers(count, values):
    x = torch.tensor(values)
    centers = kmeans_1d(x, count)
    assert centers.isfinite().all()
    assert (centers.diff() >= 0).all()
    assert set(centers.tolist()) <= {*values, *naive_nearest(values, centers.tolist())}
    if len(set(values)) == 2:
        assert torch.equal(nearest(x, centers), x)


@pytest.mark.parametrize("values", [[math.nan] * 5, [1.0, 2.0, math.nan, 4.0, 5.0]], ids=["all", "one"])
@pytest.mark.parametrize("count", [3, 4])
def test_nan_propagates_to_the_centers(values, count):
    centers = kmeans_1d(torch.tensor(values), count)
    assert centers.shape == (count,)
    assert centers.isnan().any()
