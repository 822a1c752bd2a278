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


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 4, 5), (7,), (2, 1)])
@pytest.mark.parametrize("N", [0, 1, 5])
def test_shape_dtype_device(nb, shape, N):
    x = nb.image_noise(range(N), shape)
    assert x.shape == (N, *shape)
    assert x.dtype == torch.float32
    assert x.device.type == "cpu"


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def test_device_is_where_asked_and_the_bits_are_the_same(nb, device):
    x = nb.image_noise([3, 9], (1, 28, 28), step=4, device=device)
    assert x.device.type == device
    assert torch.equal(x.cpu(), nb.image_noise([3, 9], (1, 28, 28), step=4))


@given(seeds=st.lists(SEEDS, min_size=1, max_size=12), cut=st.integers(0, 12), step=st.integers(0, 1000))
def test_image_k_is_bit_equal_in_any_batch(nb, seeds, cut, step):
    whole = nb.image_noise(seeds, (2, 3, 3), step)
    split = torch.cat([nb.image_noise(part, (2, 3, 3), step) for part in (seeds[:cut], seeds[cut:])])
    alone = torch.cat([nb.image_noise([seed], (2, 3, 3), step) for seed in seeds])
    assert torch.equal(whole, split)
    assert torch.equal(whole, alone)


@given(seeds=st.lists(SEEDS, min_size=2, max_size=8, unique=True), order=st.randoms(use_true_random=False))
def test_permuted_seeds_permute_the_images(nb, seeds, order):
    places = list(range(len(seeds)))
    order.shuffle(places)
    shuffled = nb.image_noise([seeds[p] for p in places], (9,))
    assert torch.equal(shuffled, nb.image_noise(seeds, (9,))[places])


@given(a=SEEDS, b=SEEDS, i=st.integers(0, 1000), j=st.integers(0, 1000))
def test_another_seed_or_step_is_other_noise(nb, a, b, i, j):
    same = torch.equal(nb.image_noise([a], (16,), i), nb.image_noise([b], (16,), j))
    assert same == ((a, i) == (b, j))


def test_step_0_is_the_default_and_differs_from_step_1(nb):
    x = nb.image_noise([0, 1], (50,))
    assert torch.equal(x, nb.image_noise([0, 1], (50,), 0))
    # two independent normals differ by more than 0.1 in 94 % of the places
    assert ((x - nb.image_noise([0, 1], (50,), 1)).abs() > 0.1).float().mean() > 0.8


def test_nothing_global_is_read_or_moved(nb):
    before = torch.random.get_rng_state()
    first = nb.image_noise([5], (8,))
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        assert torch.equal(first, nb.image_noise([5], (8,)))


def test_position_not_shape_decides(nb):
    """A flat [12] and a [3, 2, 2] image of one seed hold the same numbers in the same order; a longer one continues."""
    assert torch.equal(nb.image_noise([4], (3, 2, 2)).flatten(), nb.image_noise([4], (12,)).flatten())
    assert torch.equal(nb.image_noise([4], (20,))[0, :12], nb.image_noise([4], (12,))[0])


def splitmix(z):
    """SplitMix64's output function in Python's own integers (Steele et al. 2014)."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@given(z=st.integers(0, MASK))
def test_the_mix_is_splitmix64(nb, z):
    signed = z - 2**64 if z >= 2**63 else z
    assert int(nb.mix64(torch.tensor([signed]))) & MASK == splitmix(z)


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


def test_moments(sample):
    n = sample.numel()
    assert abs(float(sample.mean())) < 5 / math.sqrt(n)
    assert abs(float(sample.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((sample**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((sample**4).mean()) - 3) < 5 * math.sqrt(96 / n)


@pytest.mark.parametrize("seeds", [range(64), range(10**6, 10**6 + 64), [2**31 - 1 - k for k in range(64)]], ids=str)
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_kolmogorov_smirnov(nb, seeds, step):
    x = nb.image_noise(list(seeds), (1024,), step).flatten().double().numpy()
    assert scipy.stats.kstest(x, "norm").pvalue > 1e-3


@pytest.mark.parametrize("bound", [1.0, 2.0, 3.0, 4.0])
def test_tails(sample, bound):
    p, n = 2 * scipy.stats.norm.sf(bound), sample.numel()
    share = float((sample.abs() > bound).double().mean())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / n)
    assert 4.2 < sample.abs().max() < 6.5  # the largest of a million normals is 4.9 +- 0.2


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
        (1.7, 255),
        (-3.0, 0),
        (math.inf, 255),
        (-math.inf, 0),
        (1 / 127.5, 128),  # 128.5
        (-1 / 127.5, 126),  # 126.5
        (0.999, 255),  # 254.87: a bare cast would give 254
        (0.99, 254),  # 253.73
        (-0.999, 0),
        (-0.99, 1),  # 1.275
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8(nb, x, level, dtype):
    got = nb.to_uint8(torch.tensor([[x]], dtype=dtype))
    assert got.dtype == torch.uint8
    assert got.tolist() == [[level]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_uint8_leaves_its_input_and_shape(nb, dtype):
    x = torch.linspace(-2, 2, 24, dtype=dtype).reshape(2, 3, 2, 2)
    before = x.clone()
    assert nb.to_uint8(x).shape == x.shape
    assert torch.equal(x, before)


def test_every_level_survives_the_round_trip(nb):
    levels = torch.arange(256)
    assert torch.equal(nb.to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))


@given(x=st.floats(-4, 4, width=32))
def test_to_uint8_is_the_nearest_level(nb, x):
    exact = (min(max(x, -1.0), 1.0) + 1) * 127.5
    # float32 carries 24 bits: a value within 1e-4 of a half may go either way
    assert abs(int(nb.to_uint8(torch.tensor(x))) - exact) <= 0.5 + 1e-4


# -------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("S", [5, 50])
def test_image_k_does_not_depend_on_the_batch(nb, tiny, monkeypatch, S, eta):
    checkpoint, seeds, images = tiny(), range(40, 44), {}
    for batch in (1, 3, 100):
        monkeypatch.setattr(nb, "batch_of", lambda checkpoint, batch=batch: batch)
        images[batch] = nb.sample_images(checkpoint, seeds, S, eta).int()
    assert images[1].unique().numel() > 20, "a constant picture would prove nothing"
    for batch in (3, 100):
        # other batch sizes take other convolution kernels: float32 rounding, at most one level up to 50 steps
        assert (images[batch] - images[1]).abs().max() <= 1


def test_image_k_depends_on_its_seed_alone(nb, tiny):
    checkpoint = tiny()
    a, b = nb.sample_images(checkpoint, [5, 8, 2], 5, 1.0).int(), nb.sample_images(checkpoint, [2, 5], 5, 1.0).int()
    assert (a[2] - b[0]).abs().max() <= 1
    assert (a[0] - b[1]).abs().max() <= 1
    assert (a[0] - a[1]).abs().max() > 10


@pytest.mark.parametrize(("channels", "size", "patch"), [(1, 8, 1), (3, 8, 1), (1, 16, 2), (3, 16, 4)])
def test_images_are_uint8_on_the_cpu(nb, tiny, channels, size, patch):
    images = nb.sample_images(tiny(channels, size, patch), range(3), 2)
    assert images.shape == (3, channels, size, size)
    assert images.dtype == torch.uint8
    assert images.device.type == "cpu"


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_sampling_is_denoise_with_the_images_own_noise(nb, tiny, eta):
    """step 0 is x_T, step k + 1 the fresh noise of sampling step k."""
    checkpoint, seeds = tiny(), [11, 7]
    with torch.inference_mode():
        *_, last = nb.denoise(
            checkpoint,
            nb.image_noise(seeds, (1, 8, 8), 0),
            checkpoint.alpha_bar,
            nb.step_list(4, "trailing"),
            eta=eta,
            noise=lambda step: nb.image_noise(seeds, (1, 8, 8), step + 1),
        )
    images = nb.sample_images(checkpoint, seeds, 4, eta, spacing="trailing")
    assert (images.int() - nb.to_uint8(last.x).int()).abs().max() <= 1


def test_x_T_is_shared_by_samplers_and_step_counts(nb, tiny):
    checkpoint, starts = tiny(), []
    for S, eta in ((3, 0.0), (7, 1.0), (50, 0.5)):
        state = next(nb.trajectory(checkpoint, [3, 4], nb.step_list(S, "trailing"), eta=eta, clip=None))
        ab = float(checkpoint.alpha_bar[state.t])
        with torch.inference_mode():
            x_T = nb.image_noise([3, 4], (1, 8, 8))
            eps = checkpoint(x_T, state.t)
        starts.append((x_T - math.sqrt(1 - ab) * eps) / math.sqrt(ab) - state.x0)
    # x0 at t = 999 is x_T * 157: float32 leaves 157 * 1e-6
    assert all(gap.abs().max() < 1e-3 for gap in starts)


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


@pytest.mark.parametrize(("channels", "patch"), [(1, 2), (3, 2), (3, 4)])
def test_patched_network_is_the_shuffle_by_hand(nb, tiny, channels, patch):
    checkpoint = tiny(channels, 16, patch)
    assert checkpoint.patch == patch
    x = nb.image_noise(range(2), (channels, 16, 16))
    with torch.inference_mode():
        expected = checkpoint.unet(unshuffle(x, patch), 300).sample
        torch.testing.assert_close(unshuffle(checkpoint(x, 300), patch), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.01


def test_unpatched_network_is_called_as_it_is(nb, tiny):
    checkpoint, x = tiny(), nb.image_noise(range(2), (1, 8, 8))
    with torch.inference_mode():
        torch.testing.assert_close(checkpoint(x, 7), checkpoint.unet(x, 7).sample, rtol=0, atol=0)


def test_time_reaches_the_network_or_its_map(nb, tiny):
    plain, told = tiny(), tiny(t_map=tuple(reversed(range(1000))), control="shuffled")
    x = nb.image_noise([0], (1, 8, 8))
    with torch.inference_mode():
        assert torch.equal(told(x, 10), plain(x, 989))
        assert not torch.equal(plain(x, 10), plain(x, 989))


class Identity(torch.nn.Module):
    """A network that returns what it is given."""

    def __init__(self, size):
        super().__init__()
        self.config = type("Config", (), {"sample_size": size, "block_out_channels": (8,)})

    def forward(self, x, t):
        return type("Output", (), {"sample": x})


@given(patch=st.sampled_from([1, 2, 4]), channels=st.sampled_from([1, 3]), seed=SEEDS)
def test_the_wrapper_only_moves_pixels(nb, patch, channels, seed):
    """Round trip to the bit; so white noise stays white noise inside, and denoise may work on whole images."""
    x = nb.image_noise([seed], (channels, 8, 8))
    checkpoint = nb.Checkpoint("id", "bundled", Identity(8 // patch), (channels, 8, 8), nb.make_alpha_bar(nb.CONFIG), "")
    assert torch.equal(checkpoint(x, 5), x)
    inside = unshuffle(x, patch)
    assert torch.equal(inside.flatten().sort().values, x.flatten().sort().values)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_patched_is_sampling_small_and_shuffling(nb, tiny, eta):
    """The design's promise: pixel_shuffle of the small network's own sample is the image."""
    checkpoint, times = tiny(1, 16, 2), nb.step_list(6)
    noise = [nb.image_noise([3], (1, 16, 16), step) for step in range(8)]
    with torch.inference_mode():
        *_, small = nb.denoise(
            lambda x, t: checkpoint.unet(x, t).sample,
            unshuffle(noise[0], 2),
            checkpoint.alpha_bar,
            times,
            eta=eta,
            noise=lambda step: unshuffle(noise[step + 1], 2),
        )
    image = nb.sample_images(checkpoint, [3], 6, eta)
    assert (nb.to_uint8(F.pixel_shuffle(small.x, 2)).int() - image.int()).abs().max() <= 1
