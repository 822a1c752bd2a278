"""Distances with known answers, intervals with a known coverage, features that do not depend on the batch."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st


def normal(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def mixed(n, d, seed):
    """Correlated features with unequal scales and a mean: what a covariance must be to tell errors apart."""
    mixing = normal(d, d, 1000 + seed) / math.sqrt(d) + torch.diag(torch.linspace(0.5, 2, d, dtype=torch.float64))
    return normal(n, d, seed) @ mixing + normal(1, d, 2000 + seed)


def sqrtm_form(mu1, cov1, mu2, cov2):
    """Heusel et al., eq. 6, word for word."""
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy()).real
    return float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace()) - 2 * float(np.trace(root))


# ----------------------------------------------------------------------------------------------------- Fréchet


@pytest.mark.parametrize("d", [1, 2, 16, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_frechet_is_scipys_sqrtm_form(nb, d, seed):
    a, b = nb.moments(mixed(20 * d + 50, d, seed)), nb.moments(mixed(20 * d + 50, d, seed + 50))
    assert nb.frechet_distance(*a, *b) == pytest.approx(sqrtm_form(*a, *b), rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(10, 64), (2, 32), (100, 320), (500, 20)])
def test_frechet_of_itself_is_zero(nb, n, d):
    """Also where the covariance has rank n - 1 < d, at which sqrtm of the product fails."""
    m = nb.moments(mixed(n, d, 3))
    assert abs(nb.frechet_distance(*m, *m)) <= 1e-4


@given(
    mu=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    v1=st.lists(st.floats(0, 4), min_size=3, max_size=3),
    v2=st.lists(st.floats(0, 4), min_size=3, max_size=3),
)
def test_frechet_of_diagonal_gaussians(nb, mu, v1, v2):
    """|mu|^2 + sum (s1 - s2)^2, also for variances of exactly zero."""
    v1, v2, mu = (torch.tensor(v, dtype=torch.float64) for v in (v1, v2, mu))
    expected = float(mu.square().sum() + (v1.sqrt() - v2.sqrt()).square().sum())
    got = nb.frechet_distance(torch.zeros(3), torch.diag(v1), mu, torch.diag(v2))
    # a root of an eigenvalue of 1e-16 instead of 0 is 1e-8
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n", [5, 300])
def test_frechet_is_symmetric_and_turns_with_its_axes(nb, n):
    a, b = nb.moments(mixed(n, 12, 0)), nb.moments(mixed(n, 12, 1))
    value = nb.frechet_distance(*a, *b)
    assert value == pytest.approx(nb.frechet_distance(*b, *a), rel=1e-7)
    turn = torch.linalg.qr(normal(12, 12, 7)).Q
    turned = [(mu @ turn, turn.T @ cov @ turn) for mu, cov in (a, b)]
    assert value == pytest.approx(nb.frechet_distance(*turned[0], *turned[1]), rel=1e-7)


def test_frechet_computes_in_float64_and_returns_a_float(nb):
    a, b = (tuple(m.float() for m in nb.moments(mixed(200, 16, s))) for s in (0, 1))
    got = nb.frechet_distance(*a, *b)
    assert type(got) is float
    assert got == pytest.approx(sqrtm_form(*(m.double() for m in (*a, *b))), rel=1e-6)


def test_moments_are_numpys(nb):
    x = mixed(30, 5, 0).float()
    mean, cov = nb.moments(x)
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean.numpy(), x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov.numpy(), np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_a_distance_needs_two(nb, n):
    """Without a second image there is no pair within the set: a sentence, not nan."""
    few, enough = torch.zeros(n, 4), normal(8, 4, 1)
    for compute in (lambda: nb.moments(few), lambda: nb.kernel_distance(few, enough), lambda: nb.kernel_distance(enough, few)):
        with pytest.raises(ValueError, match=rf"at least N = 2 .*{n}"):
            compute()


# ------------------------------------------------------------------------------------------------------ kernel


@pytest.mark.parametrize(("n1", "n2", "d"), [(2, 2, 1), (7, 5, 3), (12, 20, 8)])
def test_kernel_distance_is_the_double_loop(nb, n1, n2, d):
    """Binkowski et al., eq. 4, with the kernel (x.y / d + 1)^3."""
    f1, f2 = mixed(n1, d, 0).numpy(), mixed(n2, d, 1).numpy()

    def k(a, b):
        return (float(a @ b) / d + 1) ** 3

    within1 = sum(k(f1[i], f1[j]) for i in range(n1) for j in range(n1) if i != j) / (n1 * (n1 - 1))
    within2 = sum(k(f2[i], f2[j]) for i in range(n2) for j in range(n2) if i != j) / (n2 * (n2 - 1))
    across = sum(k(a, b) for a in f1 for b in f2) / (n1 * n2)
    got = nb.kernel_distance(torch.from_numpy(f1), torch.from_numpy(f2))
    assert type(got) is float
    assert got == pytest.approx(within1 + within2 - 2 * across, rel=1e-9, abs=1e-9)


def test_kernel_distance_is_unbiased(nb):
    """Equal distributions: the mean over draws is 0 within 4 standard errors, at an N where a biased one is far off."""
    x = normal(400 * 2 * 10, 6, 0).reshape(400, 2, 10, 6)
    draws = np.array([nb.kernel_distance(a, b) for a, b in x])
    assert abs(draws.mean()) < 4 * draws.std() / math.sqrt(len(draws))
    assert (draws < 0).mean() > 0.2, "an unbiased estimate of zero is negative at times"
    # the biased one, which keeps the diagonals k(x, x), is far outside the same bound
    diagonal = ((x.square().mean(-1) + 1) ** 3).mean((1, 2)).numpy()
    assert 2 * (diagonal.mean() - 1) / 10 > 12 * draws.std() / math.sqrt(len(draws))


def test_kernel_distance_computes_in_float64(nb):
    """The bundled held-out features are float16."""
    a, b = normal(200, 6, 0).half(), normal(200, 6, 1).half()
    assert nb.kernel_distance(a, b) == pytest.approx(nb.kernel_distance(a.double(), b.double()), rel=1e-12)


# --------------------------------------------------------------------------------------------------- jackknife


def mean_of(sample):
    return float(sample.mean())


@pytest.mark.parametrize("blocks", [4, 8, 32])
def test_jackknife_of_a_mean_is_the_textbook_interval(nb, blocks):
    """Leaving out blocks of a mean gives the standard error of the block means, and Student's quantile."""
    x = normal(32, 1, 0).flatten()
    means = np.array([x[b::blocks].mean() for b in range(blocks)])
    half = scipy.stats.t.ppf(0.975, blocks - 1) * means.std(ddof=1) / math.sqrt(blocks)
    value, low, high = nb.jackknife(nb.left_out(mean_of, x, blocks)).values()
    assert value == pytest.approx(float(x.mean()), rel=1e-12)
    assert value - low == pytest.approx(half, rel=1e-9)
    assert high - value == pytest.approx(half, rel=1e-9)


def test_jackknife_hands_over_whole_rows(nb):
    sizes = []
    nb.left_out(lambda s: sizes.append(tuple(s.shape)) or float(len(sizes)), normal(19, 3, 0))
    assert sizes == [(19, 3)] + [(16, 3)] * 3 + [(17, 3)] * 5


@pytest.mark.parametrize("statistic", [mean_of, lambda s: float(s.mean()) ** 2], ids=["linear", "smooth"])
def test_jackknife_covers_the_truth(nb, statistic):
    """95 % of 500 intervals, give or take 4 standard errors of a proportion (0.04)."""
    x = 2 + normal(500, 64, 5)
    truth = statistic(torch.tensor([2.0]))
    intervals = [[*nb.jackknife(nb.left_out(statistic, sample)).values()][1:] for sample in x]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.91 <= covered <= 0.99


@pytest.mark.parametrize("n", [2, 4, 7, 20])
def test_jackknife_of_no_more_samples_than_blocks_is_the_t_interval(nb, n):
    """A block that leaves out nothing would shrink the interval: one sample at a time is left out."""
    x = normal(n, 1, 3).flatten()
    value, low, high = nb.jackknife(nb.left_out(mean_of, x, blocks=20)).values()
    expected = scipy.stats.t.interval(0.95, n - 1, value, scipy.stats.sem(x.numpy()))
    assert (low, high) == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------------------------------------------- features


def pictures(n, channels, size, seed=0):
    """Structured uint8 images: white noise alone looks all the same to a network at 224 px."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (n, channels, 4, 4), generator=g).float()
    return torch.nn.functional.interpolate(coarse, size=(size, size)).to(torch.uint8)


def test_features_are_those_of_each_image(nb):
    gray, colour = pictures(11, 1, 28), pictures(2, 3, 32)
    whole = nb.image_features(gray)
    assert (whole.shape, whole.dtype, whole.device.type) == ((11, 320), torch.float32, "cpu")
    assert (whole - whole.mean(0)).norm() / whole.norm() > 0.1, "different images, different features"
    alone = torch.cat([nb.image_features(image[None].repeat(1, 3, 1, 1)) for image in gray[7:10]])
    # a batch of 1 and a batch of 8 may take other kernels: float32 rounding through 50 layers
    torch.testing.assert_close(alone, whole[7:10], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(nb.image_features(colour), nb.image_features(colour.flip(1)), atol=1e-2), "colour counts"


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 64), (3, 256)])
def test_the_network_sees_224_pixels_in_its_own_range(nb, channels, size):
    """Black is -1 and white is 1 (the weights' mean = std = 0.5), whatever the size."""
    seen = []
    stem = nb.feature_network("FD-EffNet").conv_stem
    hook = stem.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        nb.image_features(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, channels, size, size))
    finally:
        hook.remove()
    assert seen[0].shape == (2, 3, 224, 224)
    torch.testing.assert_close(seen[0][0], torch.full((3, 224, 224), -1.0))
    torch.testing.assert_close(seen[0][1], torch.full((3, 224, 224), 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_features_refuse_anything_but_uint8(nb, dtype):
    with pytest.raises(TypeError, match="uint8"):
        nb.image_features(torch.zeros(2, 1, 28, 28, dtype=dtype))


# --------------------------------------------------------------------------------------------------- reference


@pytest.mark.parametrize(("n", "rungs"), [(10, []), (16, [16]), (70, [16, 32, 64]), (600, [16, 32, 64, 128, 256, 512])])
def test_reference_holds_training_moments_held_out_features_and_floors_on_the_ladder(nb, n, rungs):
    """Floors are those of disjoint draws; the order is a fixed random one, as a source may be sorted (MNIST's test split is)."""
    train, heldout = mixed(300, 6, 0), mixed(n, 6, 1)
    reference = nb.make_reference(train, heldout, "FID")
    drawn = heldout[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(reference.heldout, drawn[:512])
    assert (int(reference.n_real), reference.metric) == (300, "FID")
    assert reference.distance(drawn[:8]) == pytest.approx(nb.frechet_distance(*nb.moments(drawn[:8]), *nb.moments(train)))
    expected = []
    for rung in rungs:
        parts = [drawn[k : k + rung] for k in range(0, n - rung + 1, rung)][:16]
        floors = [nb.frechet_distance(*nb.moments(part), *nb.moments(train)) for part in parts]
        expected.append(pytest.approx([rung, np.mean(floors), min(floors), max(floors)], rel=1e-6))
    assert reference.floors.tolist() == expected


def test_reference_floors_fall_with_n(nb):
    """The bias of a Fréchet distance is about c / N (Chong and Forsyth): twice the images, about half the floor."""
    x = normal(4000, 24, 0)
    floors = nb.make_reference(x[:2000], x[2000:]).floors[:, 1].tolist()
    assert all(0.3 * a < b < 0.75 * a for a, b in itertools.pairwise(floors[1:5]))


def test_bundled_reference_is_loaded_whole(nb):
    """The file's own fields, dimensions and the floors at the ladder's N."""
    reference = nb.Reference(**nb.load_file(nb.BUNDLED / "mnist" / "reference.safetensors"))
    assert reference.mean.shape == (320,)
    assert reference.cov.shape == (320, 320)
    assert reference.heldout.shape[1] == 320
    assert set(reference.floors[:, 0].int().tolist()) <= set(nb.LADDER)
    assert torch.linalg.eigvalsh(reference.cov.double()).min() > -1e-4, "a covariance"


def test_mean_interval_is_students(nb):
    sample = torch.tensor([1.0, 2.0, 4.0, 7.0])
    mean, half = 3.5, 3.182446305284263 * math.sqrt(7) / 2  # t of 3 degrees of freedom; standard deviation sqrt(7)
    assert nb.mean_interval(sample) == pytest.approx({"value": mean, "low": mean - half, "high": mean + half}, rel=1e-5)


def test_paired_rms_is_per_image_on_the_scale_of_the_sampler(nb):
    black, white = torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)
    mixed = torch.cat([black[:1], white[:1]])
    assert nb.paired_rms(black, mixed).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(("n", "d"), [(16, 64), (64, 64), (200, 64), (65, 64)])
def test_a_references_distance_is_the_frechet_distance(nb, n, d):
    """By the smaller of two matrices, whose nonzero eigenvalues are the same."""
    real, drawn = mixed(300, d, 0), mixed(n, d, 1)
    reference = nb.make_reference(real, mixed(20, d, 2))
    expected = nb.frechet_distance(reference.mean, reference.cov, *nb.moments(drawn))
    assert reference.distance(drawn) == pytest.approx(expected, rel=1e-6)
    found = reference.distances(drawn)
    assert found[0] == reference.distance(drawn)
    assert found[3] == pytest.approx(reference.distance(drawn[torch.arange(n) % 8 != 2]), rel=1e-12)
    assert reference.distances(drawn) is found, "differences use them again"
