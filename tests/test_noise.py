"""The noise that belongs to the image, 8-bit rounding, and sampling: no result depends on the batch."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**31 - 1)
MASK = 2**64 - 1


# --------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize(("N", "shape"), [(0, (1, 28, 28)), (1, (7,)), (5, (3, 4, 5))])
def test_shape_dtype_device_and_the_same_bits(nb, N, shape, device):
    x = nb.image_noise(range(N), shape, step=4, device=device)
    assert (x.shape, x.dtype, x.device.type) == ((N, *shape), torch.float32, device)
    assert torch.equal(x.cpu(), nb.image_noise(range(N), shape, step=4))


@given(seeds=st.lists(SEEDS, min_size=1, max_size=8), order=st.randoms(use_true_random=False), step=st.integers(0, 1000))
def test_image_k_is_bit_equal_in_any_batch_and_order(nb, seeds, order, step):
    places = list(range(len(seeds)))
    order.shuffle(places)
    whole = nb.image_noise([seeds[p] for p in places], (2, 3, 3), step)
    alone = torch.cat([nb.image_noise([seeds[p]], (18,), step) for p in places])
    assert torch.equal(whole.flatten(1), alone), "the position decides, not the shape"


@given(a=SEEDS, b=SEEDS, i=st.integers(0, 1000), j=st.integers(0, 1000))
def test_another_seed_or_step_is_other_noise(nb, a, b, i, j):
    same = torch.equal(nb.image_noise([a], (16,), i), nb.image_noise([b], (16,), j))
    assert same == ((a, i) == (b, j))


def splitmix(z):
    """SplitMix64's output function in Python's own integers (Steele et al. 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_mix_gives_the_published_first_numbers(nb):
    """SplitMix64 from seed 0, as in every port of it."""
    golden = 0x9E3779B97F4A7C15
    z = torch.tensor([(k * golden & MASK) - (2**64 if k * golden & MASK >= 2**63 else 0) for k in (1, 2)])
    assert [int(v) & MASK for v in nb.mix64(z)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(seed=SEEDS, step=st.integers(0, 1000), position=st.integers(0, 50))
def test_every_number_is_two_table_entries_from_disjoint_bits(nb, seed, step, position):
    """The whole generator in Python's own integers: the record's images depend on every bit of it."""
    golden = 0x9E3779B97F4A7C15
    key = splitmix((splitmix(seed * golden & MASK) + step) & MASK)
    bits = splitmix((key + golden * (position + 1)) & MASK)
    table = scipy.stats.norm.ppf((np.arange(2**16) + 0.5) / 2**16)
    table = (table / table.std() / math.sqrt(2)).astype(np.float32)
    expected = table[bits & 0xFFFF] + table[bits >> 16 & 0xFFFF]
    assert float(nb.image_noise([seed], (51,), step)[0, position]) == expected


# -------------------------------------------------------------------------------------------------- statistics
# The numbers are fixed by their seeds, so each of these tests passes always or never: bounds of 5 standard errors
# and p > 1e-3 say "looks normal", with no flaky run.


@pytest.fixture(scope="module")
def sample(nb):
    """256 images x 4,096 positions of step 0, float64."""
    return nb.image_noise(range(256), (4096,)).double()


def test_moments_and_tails(sample):
    n = sample.numel()
    assert abs(float(sample.mean())) < 5 / math.sqrt(n)
    assert abs(float(sample.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((sample**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((sample**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    for bound in (1.0, 2.0, 3.0, 4.0):
        p = 2 * scipy.stats.norm.sf(bound)
        assert abs(float((sample.abs() > bound).double().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert 4.2 < sample.abs().max() < 6.5  # the largest of a million normals is 4.9 +- 0.2


@pytest.mark.parametrize("seeds", [range(64), range(10**6, 10**6 + 64), [2**31 - 1 - k for k in range(64)]], ids=str)
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_kolmogorov_smirnov(nb, seeds, step):
    x = nb.image_noise(list(seeds), (1024,), step).flatten().double().numpy()
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3


def correlation(a, b):
    """In units of its standard error, for standard normal a and b."""
    return abs(float((a * b).mean())) * math.sqrt(a.numel())


@pytest.mark.parametrize("lag", [1, 2, 3, 28, 64, 1024])
def test_neighbouring_positions_are_uncorrelated(sample, lag):
    assert correlation(sample[:, lag:], sample[:, :-lag]) < 4
    squares = (sample**2 - 1) / math.sqrt(2)
    assert correlation(squares[:, lag:], squares[:, :-lag]) < 4


def test_seeds_are_uncorrelated(sample):
    r = sample @ sample.T / sample.shape[1]
    r.fill_diagonal_(0)
    # the largest of 32,640 |normals| is about 4.2 standard errors
    assert r.abs().max() * math.sqrt(sample.shape[1]) < 5.5
    assert correlation(sample[1:], sample[:-1]) < 4


@pytest.mark.parametrize(("seed_shift", "step"), [(0, 1), (0, 2), (1, 1), (-1, 1), (1, 1000), (0, 999)])
def test_steps_are_uncorrelated(nb, sample, seed_shift, step):
    """Also with the neighbour's: a key that adds seed and step would give image k + 1 the noise of image k."""
    other = nb.image_noise(range(1 + seed_shift, 200 + seed_shift), (4096,), step).double()
    assert correlation(sample[1:200], other) < 4


def test_positions_are_as_random_across_images_as_within(nb):
    """2,000 images, a few positions: the columns are normal too, else all images would share a pattern."""
    x = nb.image_noise(range(2000), (8,)).double()
    for column in x.T:
        assert scipy.stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    r = torch.corrcoef(x.T) - torch.eye(8, dtype=torch.float64)
    assert r.abs().max() * math.sqrt(2000) < 4.5


# ------------------------------------------------------------------------------------------------------ 8 bits


@pytest.mark.parametrize(
    ("x", "level"),
    [
        (-1.0, 0),
        (1.0, 255),
        (0.0, 128),  # 127.5: an exact half goes to the even level, as in numpy and diffusers
        (math.inf, 255),
        (-math.inf, 0),
        (1 / 127.5, 128),  # 128.5
        (-1 / 127.5, 126),  # 126.5
        (0.999, 255),  # 254.87: a bare cast would give 254
        (0.99, 254),  # 253.73
        (-0.99, 1),  # 1.275
    ],
)
def test_to_uint8(nb, x, level):
    got = nb.to_uint8(torch.tensor([[x]]))
    assert got.dtype == torch.uint8
    assert got.tolist() == [[level]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_is_the_nearest_level(nb, dtype):
    x = torch.linspace(-2, 2, 4096, dtype=dtype).reshape(2, 2, 32, 32)
    before, exact = x.clone(), (x.double().clamp(-1, 1) + 1) * 127.5
    # float32 carries 24 bits: a value within 1e-4 of a half may go either way
    assert (nb.to_uint8(x).double() - exact).abs().max() <= 0.5 + 1e-4
    assert torch.equal(x, before), "the input is left as it was"
    levels = torch.arange(256, dtype=dtype)
    assert torch.equal(nb.to_uint8(levels / 127.5 - 1), levels.to(torch.uint8)), "every level survives the round trip"


# -------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("S", [5, 50])
def test_image_k_depends_on_its_seed_alone(nb, tiny, monkeypatch, S, eta):
    checkpoint, images = tiny(), {}
    for batch in (1, 3, 100):
        monkeypatch.setattr(nb, "batch_of", lambda checkpoint, batch=batch: batch)
        images[batch] = nb.sample_images(checkpoint, range(40, 44), S, eta).int()
    some = nb.sample_images(checkpoint, [42, 40], S, eta).int()
    assert (images[1][0] - images[1][2]).abs().max() > 10, "the same picture for all would prove nothing"
    # other batch sizes take other convolution kernels: float32 rounding, at most one level up to 50 steps
    for other, one in ((images[3], images[1]), (images[100], images[1]), (some, images[1][[2, 0]])):
        assert (other - one).abs().max() <= 1


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, 8, 1), (3, 8, 1), (1, 16, 2), (3, 16, 4)])
def test_images_are_uint8_on_the_cpu(nb, tiny, channels, size, patch):
    images = nb.sample_images(tiny(channels, size, patch), range(3), 2)
    assert images.shape == (3, channels, size, size)
    assert images.dtype == torch.uint8
    assert images.device.type == "cpu"


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampling_is_denoise_with_the_images_own_noise(nb, tiny, eta):
    """step 0 is x_T, step k + 1 the fresh noise of sampling step k."""
    checkpoint, seeds, shape = tiny(), [11, 7], (1, 8, 8)
    noise = lambda step: nb.image_noise(seeds, shape, step + 1)  # noqa: E731
    times = nb.step_list(4, "trailing")
    with torch.inference_mode():
        *_, last = nb.denoise(checkpoint, nb.image_noise(seeds, shape), checkpoint.alpha_bar, times, eta=eta, noise=noise)
    images = nb.sample_images(checkpoint, seeds, 4, eta, spacing="trailing")
    assert (images.int() - nb.to_uint8(last.x).int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("S", "settings"), [(0, {}), (1001, {}), (5, {"spacing": "uniform"}), (5, {"eta": 2.0}), (5, {"variance": "large"})], ids=str
)
def test_sampling_refuses_what_its_parts_refuse(nb, tiny, S, settings):
    with pytest.raises(ValueError, match="allowed"):
        nb.sample_images(tiny(), [0], S, **settings)


# --------------------------------------------------------------------------------------------- pixel-unshuffle


def unshuffle(x, r):
    """Channel c r^2 + i r + j holds the pixels (i, j) of every r x r block: by slicing, not by torch's own."""
    return torch.stack([x[:, c, i::r, j::r] for c in range(x.shape[1]) for i in range(r) for j in range(r)], 1)


@pytest.mark.parametrize(("channels", "patch"), [(1, 1), (1, 2), (3, 4)])
def test_patched_network_is_the_shuffle_by_hand(nb, tiny, channels, patch):
    checkpoint = tiny(channels, 16, patch)
    assert checkpoint.patch == patch
    x = nb.image_noise(range(2), (channels, 16, 16))
    with torch.inference_mode():
        expected = checkpoint.unet(unshuffle(x, patch), 300).sample
        torch.testing.assert_close(unshuffle(checkpoint(x, 300), patch), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


def test_time_reaches_the_network_or_its_map(nb, tiny):
    plain, told = tiny(), tiny(t_map=tuple(reversed(range(1000))), control="shuffled")
    x = nb.image_noise([0], (1, 8, 8))
    with torch.inference_mode():
        assert torch.equal(told(x, 10), plain(x, 989))
        assert not torch.equal(plain(x, 10), plain(x, 989))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_patched_is_sampling_small_and_shuffling(nb, tiny, eta):
    """The design's promise: pixel_shuffle of the small network's own sample is the image."""
    checkpoint, x_T, alpha_bar = tiny(1, 16, 2), nb.image_noise([3], (1, 16, 16)), nb.ALPHA_BAR
    noise = lambda step: unshuffle(nb.image_noise([3], (1, 16, 16), step + 1), 2)  # noqa: E731
    with torch.inference_mode():
        network = lambda x, t: checkpoint.unet(x, t).sample  # noqa: E731
        *_, small = nb.denoise(network, unshuffle(x_T, 2), alpha_bar, nb.step_list(6), eta=eta, noise=noise)
    image = nb.sample_images(checkpoint, [3], 6, eta)
    assert (nb.to_uint8(F.pixel_shuffle(small.x, 2)).int() - image.int()).abs().max() <= 1
