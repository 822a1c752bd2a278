"""The schedule, the step lists, `denoise` and `invert`, held against diffusers and against closed forms."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

T = 1000
BETAS = {"num_train_timesteps": T, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SPACINGS = ("leading", "trailing", "linspace", "quad")
LIBRARY_SPACINGS = SPACINGS[:3]
# name -> (settings of denoise, diffusers' scheduler)
KINDS = {
    "DDIM eta=0": ({"eta": 0.0}, DDIMScheduler, {}),
    "DDIM eta=0.5": ({"eta": 0.5}, DDIMScheduler, {}),
    "DDIM eta=1": ({"eta": 1.0}, DDIMScheduler, {}),
    "fixed_small": ({"eta": 1.0}, DDPMScheduler, {"variance_type": "fixed_small"}),
    "fixed_large": ({"eta": 1.0, "variance": "large"}, DDPMScheduler, {"variance_type": "fixed_large"}),
}


def seeded(shape, seed, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def smooth(x, t):
    """A smooth dummy network that tells every t, sign and position apart."""
    return 0.8 * torch.sin(x * (1 + t / T)) + 0.2 * torch.cos(x.roll(1, -1) + t / 300)


def last_of(states):
    *_, last = states
    return last


@pytest.fixture(scope="module")
def alpha_bar(nb):
    return nb.make_alpha_bar(nb.CONFIG)


# ------------------------------------------------------------------------------------------------- schedule


def test_config_holds_the_sheets_scalars(nb):
    """A tuple here would be the sheet's trailing comma."""
    expected = BETAS | {"clip_sample_range": 1.0, "sample_max_value": 1.0}
    got = dataclasses.asdict(nb.CONFIG)
    assert got == expected
    assert {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in expected.items()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        nb.CONFIG.beta_end = 0.03


def test_alpha_bar_is_the_product_of_signal_powers(alpha_bar):
    beta = [1e-4 + (0.02 - 1e-4) * s / (T - 1) for s in range(T)]
    expected = list(itertools.accumulate((1 - b for b in beta), lambda a, b: a * b))
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar.shape == (T,)
    # 1000 products in float64, each rounded by at most 1.1e-16
    np.testing.assert_allclose(alpha_bar.numpy(), expected, rtol=1e-12)
    assert alpha_bar[0] == 1 - 1e-4
    assert 4.0e-5 < alpha_bar[-1] < 4.1e-5  # DDPM, section 4: KL to N(0, I) of about 1e-5 bits per dimension


def test_alpha_bar_is_diffusers(alpha_bar):
    # diffusers multiplies 1000 float32 numbers: an error of up to 1000 * 6e-8
    np.testing.assert_allclose(alpha_bar.numpy(), DDPMScheduler(**BETAS).alphas_cumprod.numpy(), rtol=6e-5)


def test_alpha_bar_follows_its_config(nb):
    short = nb.make_alpha_bar(nb.Config(num_train_timesteps=3, beta_start=0.1, beta_end=0.3))
    np.testing.assert_allclose(short.numpy(), [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "Linear", ""])
def test_another_schedule_is_refused(nb, schedule):
    with pytest.raises(ValueError, match=r"allowed.*linear"):
        nb.make_alpha_bar(nb.Config(beta_schedule=schedule))


@pytest.mark.parametrize("t", [0, 500, 999, [3, 0, 999, 421]])
def test_forward_process_is_diffusers(nb, alpha_bar, t):
    x0, eps = seeded((4, 1, 3, 3), 0), seeded((4, 1, 3, 3), 1)
    library = DDPMScheduler(**BETAS)
    library.alphas_cumprod = alpha_bar  # in float64, so that the rounding of the library's own does not hide errors
    expected = library.add_noise(x0, eps, torch.tensor(t).expand(4))
    got = nb.add_noise(x0, eps, alpha_bar, torch.tensor(t) if isinstance(t, list) else t)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- step lists


@pytest.mark.parametrize("spacing", LIBRARY_SPACINGS)
def test_step_list_is_diffusers_for_every_number_of_steps(nb, spacing):
    library = DDPMScheduler(**BETAS, timestep_spacing=spacing)
    for S in range(1, T + 1):
        library.set_timesteps(S)
        # np.arange(T, 0, -T / S) in diffusers may yield S + 1 entries, the last one -1: no time at all
        theirs = [t for t in library.timesteps.tolist() if t >= 0]
        assert nb.step_list(S, spacing) == theirs, f"S = {S}"


@pytest.mark.parametrize("S", [2, 10, 20, 50, 100, 999, 1000])
def test_quad_is_the_ddim_papers_formula(nb, S):
    # ermongroup/ddim, runners/diffusion.py: seq = linspace(0, sqrt(T * 0.8), S) ** 2, int(s) for each
    seq = [int(s) for s in list(np.linspace(0, np.sqrt(T * 0.8), S) ** 2)]
    assert nb.step_list(S, "quad") == sorted(set(seq), reverse=True)


@given(data=st.data(), other_T=st.sampled_from([1, 7, 300, T]), spacing=st.sampled_from(SPACINGS))
def test_step_list_properties(nb, data, other_T, spacing):
    S = data.draw(st.integers(1, other_T))
    steps = nb.step_list(S, spacing, other_T)
    assert all(type(t) is int for t in steps)
    assert all(a > b for a, b in itertools.pairwise(steps))
    assert 0 <= steps[-1] <= steps[0] < other_T
    assert len(steps) <= S if spacing == "quad" else len(steps) == S
    assert steps[-1] == 0 or spacing == "trailing"
    assert steps[0] == other_T - 1 or spacing in ("leading", "quad") or (spacing == "linspace" and S == 1)


def test_leading_is_the_default_and_starts_below_the_top(nb):
    assert nb.step_list(10) == list(range(900, -1, -100))


@pytest.mark.parametrize(
    ("S", "spacing", "allowed"),
    [(S, "leading", "1 to 1000") for S in (0, -1, 1001, 2.0, "10", None, True)]
    + [(10, spacing, "leading, trailing, linspace, quad") for spacing in ("Leading", "", None)],
)
def test_step_list_refuses(nb, S, spacing, allowed):
    with pytest.raises(ValueError, match=f"allowed: .*{allowed}"):
        nb.step_list(S, spacing)


# -------------------------------------------------------------------------------- denoise against diffusers


def library_for(kind, spacing, clip, alpha_bar):
    """diffusers' scheduler for a kind, its alpha_bar replaced by the float64 ones."""
    _, family, more = KINDS[kind]
    scheduler = family(**BETAS, **more, clip_sample=clip, timestep_spacing=spacing, steps_offset=0)
    scheduler.alphas_cumprod = alpha_bar
    return scheduler


def library_step(scheduler, settings, x, t, step):
    """One step by diffusers; DDPMScheduler draws the same noise as `seeded` from the step's generator."""
    eps, eta = smooth(x, t), settings["eta"]
    if isinstance(scheduler, DDIMScheduler):
        noise = seeded(x.shape, step, x.dtype) if eta else None
        given = {"eta": eta, "use_clipped_model_output": True, "variance_noise": noise}
        return scheduler.step(eps, t, x, **given)
    return scheduler.step(eps, t, x, generator=torch.Generator().manual_seed(step))


def gaps(nb, kind, scheduler, alpha_bar, clip):
    """Largest |difference| to diffusers in a trajectory's scale: of single steps from one state, of x0, of the whole."""
    settings = KINDS[kind][0]
    x = theirs = seeded((2, 1, 3, 3), 5000)
    single, x0, scale = 0.0, 0.0, 1.0
    noise = lambda step: seeded((2, 1, 3, 3), step)  # noqa: E731
    for state in nb.denoise(smooth, x, alpha_bar, scheduler.timesteps.tolist(), **settings, clip=clip, noise=noise):
        one = library_step(scheduler, settings, x, state.t, state.step)
        single = max(single, float((one.prev_sample - state.x).abs().max()))
        x0 = max(x0, float((one.pred_original_sample - state.x0).abs().max()))
        theirs = library_step(scheduler, settings, theirs, state.t, state.step).prev_sample
        x = state.x
        scale = max(scale, float(x.abs().max()), float(state.x0.abs().max()))
    return single / scale, x0 / scale, float((theirs - x).abs().max()) / scale


def comparable(kind, spacing, S):
    """Where diffusers is right: DDIMScheduler knows one fixed stride; fixed_large adds noise to trailing's last image."""
    if KINDS[kind][1] is DDIMScheduler:
        return spacing == "leading" or (spacing == "trailing" and T % S == 0)
    return kind != "fixed_large" or spacing != "trailing" or S == T


CASES = [
    (kind, spacing, S)
    for kind in KINDS
    for spacing in LIBRARY_SPACINGS
    for S in (1, 2, 7, 50, 333)
    if comparable(kind, spacing, S)
] + [(kind, "leading", T) for kind in ("DDIM eta=0", "fixed_small")]


@pytest.mark.parametrize("clip", [True, False], ids=["clip", "free"])
@pytest.mark.parametrize(("kind", "spacing", "S"), CASES)
def test_denoise_is_diffusers(nb, alpha_bar, kind, spacing, S, clip):
    scheduler = library_for(kind, spacing, clip, alpha_bar)
    scheduler.set_timesteps(S)
    single, x0, whole = gaps(nb, kind, scheduler, alpha_bar, 1.0 if clip else None)
    # All in float64: what is left is rounding (2e-16), magnified by up to 1 / sqrt(alpha_bar) = 157 at the noisy end
    # in a step, and by the dummy network's own expansion over a trajectory. Trailing's last variance is clamped to
    # 1e-20 by diffusers, a noise of 1e-10.
    assert single < 1e-9
    assert x0 < 1e-9
    assert whole < 1e-7


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("times", [[999, 998, 500, 37, 36, 0], [730, 10, 0], [5, 4, 3, 2, 1, 0]])
def test_uneven_times_are_diffusers_custom_timesteps(nb, alpha_bar, kind, times):
    scheduler = library_for(kind, "leading", True, alpha_bar)
    scheduler.set_timesteps(timesteps=times)
    assert max(gaps(nb, kind, scheduler, alpha_bar, 1.0)) < 1e-9


# ------------------------------------------------------------------------------------- denoise by contract


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_last_step_adds_no_noise(nb, alpha_bar, spacing, variance):
    asked = []

    def noise(step):
        asked.append(step)
        return torch.full((1, 2), 100.0)

    times = nb.step_list(6, spacing)
    last = last_of(nb.denoise(smooth, torch.zeros(1, 2), alpha_bar, times, eta=1, variance=variance, noise=noise))
    assert asked == list(range(len(times) - 1)), "once a step, in order, but the last"
    torch.testing.assert_close(last.x, last.x0, rtol=0, atol=0)


@pytest.mark.parametrize("S", [1, 50])
def test_eta_0_never_asks_for_noise(nb, alpha_bar, S):
    """DDIM is a function of x_T alone."""
    never = lambda step: pytest.fail(f"noise was asked for in step {step}")  # noqa: E731
    assert last_of(nb.denoise(smooth, seeded((2, 3), 1), alpha_bar, nb.step_list(S), noise=never)).t == 0


def test_without_noise_it_is_drawn(nb, alpha_bar):
    def sample():
        return last_of(nb.denoise(smooth, torch.zeros(1, 64), alpha_bar, nb.step_list(5), eta=1.0, clip=None)).x

    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = sample(), sample()
        torch.manual_seed(3)
        again = sample()
    assert not torch.equal(first, second), "fresh for every trajectory"
    assert torch.equal(first, again), "from torch's global generator"


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_added_noise_has_the_stated_variance(nb, alpha_bar, variance):
    """A constant eps: x differs from the noiseless step by sigma * z exactly."""
    ab, ab_prev = float(alpha_bar[800]), float(alpha_bar[600])
    beta = 1 - ab / ab_prev
    expected = beta if variance == "large" else beta * (1 - ab_prev) / (1 - ab)

    def first(z):
        settings = {"eta": 1, "variance": variance, "noise": lambda step: torch.full((1, 1), z, dtype=torch.float64)}
        ones = torch.ones(1, 1, dtype=torch.float64)
        return float(next(nb.denoise(lambda x, t: torch.zeros_like(x), ones, alpha_bar, [800, 600], **settings)).x)

    assert first(3.0) - first(0.0) == pytest.approx(3 * math.sqrt(expected), rel=1e-12)


@pytest.mark.parametrize("clip", [1.0, 0.25])
def test_clip_bounds_x0_and_corrects_eps(nb, alpha_bar, clip):
    x = 3 * seeded((4, 6), 2)
    states = list(nb.denoise(smooth, x, alpha_bar, nb.step_list(8), clip=clip))
    assert any((s.x0.abs() == clip).any() for s in states), "else nothing was tested"
    for state, following in itertools.pairwise(states):
        assert state.x0.abs().max() <= clip
        ab, ab_next = float(alpha_bar[state.t]), float(alpha_bar[following.t])
        eps = (x - math.sqrt(ab) * state.x0) / math.sqrt(1 - ab)  # from the *clipped* x0
        expected = math.sqrt(ab_next) * state.x0 + math.sqrt(1 - ab_next) * eps
        torch.testing.assert_close(state.x, expected, rtol=1e-10, atol=1e-10)
        x = state.x
    assert states[-1].x.abs().max() <= clip
    free = next(nb.denoise(smooth, 3 * seeded((4, 6), 2), alpha_bar, nb.step_list(8), clip=None))
    default = next(nb.denoise(smooth, 3 * seeded((4, 6), 2), alpha_bar, nb.step_list(8)))
    assert free.x0.abs().max() > 5
    assert default.x0.abs().max() == 1, "on unless told otherwise"


def test_states_number_the_steps_and_name_the_times(nb, alpha_bar):
    """Nothing beyond the step asked for is computed: strips and animations cost what they show."""
    times, asked = [900, 500, 499, 3], []

    def network(x, t):
        asked.append(t)
        assert type(t) is int
        return smooth(x, t)

    for k, state in enumerate(nb.denoise(network, seeded((2, 1, 4, 4), 0), alpha_bar, times)):
        assert asked == times[: k + 1], "one evaluation a step"
        assert (state.step, state.t) == (k, times[k])
        assert state.x.shape == state.x0.shape == (2, 1, 4, 4)
    assert asked == times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_dtype_is_kept(nb, alpha_bar, dtype, eta):
    for state in nb.denoise(smooth, seeded((2, 3), 0, dtype), alpha_bar, nb.step_list(5), eta=eta):
        assert state.x.dtype == state.x0.dtype == dtype


@pytest.mark.parametrize("shape", [(7, 3), (5,), (2, 3, 4, 5, 6)])
def test_any_shape_goes_through(nb, alpha_bar, shape):
    """Tables [N, D] (exercise 4), latents, scalars: each element as if alone, for an element-wise network."""
    x = seeded(shape, 0)
    noise = [seeded(shape, 10 + step) for step in range(6)]
    settings = {"eta": 1.0, "noise": noise.__getitem__}
    got = last_of(nb.denoise(lambda x, t: x.sin(), x, alpha_bar, nb.step_list(6), **settings)).x
    flat = {"eta": 1.0, "noise": lambda step: noise[step].flatten()}
    alone = last_of(nb.denoise(lambda x, t: x.sin(), x.flatten(), alpha_bar, nb.step_list(6), **flat)).x
    assert got.shape == shape
    torch.testing.assert_close(got.flatten(), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [[], [1, 2], [5, 5], [9, 3, 4], [1000, 0], [5, -1], [-1], [1000]], ids=str)
@pytest.mark.parametrize("function", ["denoise", "invert"])
def test_bad_times_are_refused(nb, alpha_bar, function, times):
    with pytest.raises(ValueError, match="t_list must"):
        list(getattr(nb, function)(lambda x, t: pytest.fail("evaluated"), torch.zeros(1, 2), alpha_bar, times))


@pytest.mark.parametrize(
    ("eta", "variance"),
    [(-0.1, "small"), (1.1, "small"), (math.nan, "small"), (1.0, "fixed_large"), (0.0, "large"), (0.5, "large")],
)
def test_bad_settings_are_refused(nb, alpha_bar, eta, variance):
    with pytest.raises(ValueError, match="allowed"):
        list(nb.denoise(smooth, torch.zeros(1, 2), alpha_bar, [5, 0], eta=eta, variance=variance))


@given(times=st.sets(st.integers(0, T - 1), min_size=1, max_size=8).map(lambda s: sorted(s, reverse=True)), eta=st.floats(0, 1))
def test_any_times_and_eta_keep_the_marginal_variance(nb, alpha_bar, times, eta):
    """DDIM lemma 1: with the true eps and x0, x is distributed as q(x_t | x0) for every eta and every sub-sequence.

    x0 = 0 and eps = x / sqrt(1 - ab), so each step maps the variance 1 - ab exactly to 1 - ab of the next time:
    with a unit z orthogonal to x the squared length tells it.
    """
    x_T = torch.tensor([math.sqrt(1 - float(alpha_bar[times[0]])), 0.0], dtype=torch.float64)
    size = 1 - float(alpha_bar[times[0]])
    known = {}

    def network(x, t):
        known["x"] = x
        return x / math.sqrt(1 - float(alpha_bar[t]))

    def noise(step):  # a unit vector at right angles to x
        x = known["x"] / known["x"].norm()
        return torch.stack([-x[1], x[0]])

    states = nb.denoise(network, x_T, alpha_bar, times, eta=eta, clip=None, noise=noise)
    for state, following in zip(states, [*times[1:], None], strict=True):
        size = 0.0 if following is None else 1 - float(alpha_bar[following])
        assert float(state.x.square().sum()) == pytest.approx(size, abs=1e-9)


# --------------------------------------------------------------------------------------------- Gaussian data

MEAN, STD = 0.3, 0.5


def gaussian_eps(alpha_bar):
    """E[eps | x_t] for x_0 ~ N(MEAN, STD**2)."""

    def eps(x, t):
        ab = float(alpha_bar[t])
        return math.sqrt(1 - ab) * (x - math.sqrt(ab) * MEAN) / (ab * STD**2 + 1 - ab)

    return eps


def ddpm_moments(alpha_bar, times):
    """Mean and std after DDPM's ancestral steps, written as DDPM eq. 6 and 7 (not as DDIM eq. 12, which denoise uses)."""
    mean, var = 0.0, 1.0
    for t, following in zip(times, [*times[1:], None], strict=True):
        ab, prev = float(alpha_bar[t]), 1.0 if following is None else float(alpha_bar[following])
        alpha = ab / prev
        gain = math.sqrt(ab) * STD**2 / (ab * STD**2 + 1 - ab)  # E[x0 | x] = MEAN + gain (x - sqrt(ab) MEAN)
        c0, c1 = math.sqrt(prev) * (1 - alpha) / (1 - ab), math.sqrt(alpha) * (1 - prev) / (1 - ab)
        mean = c0 * (MEAN + gain * (mean - math.sqrt(ab) * MEAN)) + c1 * mean
        var = (c0 * gain + c1) ** 2 * var + (1 - prev) / (1 - ab) * (1 - alpha)
    return mean, math.sqrt(var)


def ddim_moments(alpha_bar, times):
    """Mean and std after DDIM's deterministic steps, as the ODE's Euler step in x / sqrt(ab) (DDIM eq. 13)."""
    scale = 1 / math.sqrt(float(alpha_bar[times[0]]))
    mean, std = 0.0, scale  # of x / sqrt(ab)
    for t, following in zip(times, [*times[1:], None], strict=True):
        ab, prev = float(alpha_bar[t]), 1.0 if following is None else float(alpha_bar[following])
        lam, lam_prev = math.sqrt((1 - ab) / ab), math.sqrt((1 - prev) / prev)
        slope = lam / (STD**2 + lam**2)  # eps = slope (x / sqrt(ab) - MEAN)
        mean += (lam_prev - lam) * slope * (mean - MEAN)
        std *= 1 + (lam_prev - lam) * slope
    return mean, std


@pytest.mark.parametrize("spacing", ["leading", "linspace", "quad"])
@pytest.mark.parametrize("S", [1, 10, 100])
def test_gaussian_ddim_is_affine_with_the_closed_form(nb, alpha_bar, S, spacing):
    times, x_T = nb.step_list(S, spacing), torch.tensor([0.0, 1.0], dtype=torch.float64)
    ends = last_of(nb.denoise(gaussian_eps(alpha_bar), x_T, alpha_bar, times, clip=None)).x
    mean, std = ddim_moments(alpha_bar, times)
    assert float(ends[0]) == pytest.approx(mean, abs=1e-9)
    assert float(ends[1] - ends[0]) == pytest.approx(std, abs=1e-9)


@pytest.mark.parametrize("S", [5, 50])
def test_gaussian_ddpm_samples_have_the_closed_forms_moments(nb, alpha_bar, S):
    N, times = 10_000, nb.step_list(S, "linspace")
    noise = lambda step: seeded((N,), 100 + step)  # noqa: E731
    x = last_of(nb.denoise(gaussian_eps(alpha_bar), seeded((N,), 0), alpha_bar, times, eta=1, clip=None, noise=noise)).x
    mean, std = ddpm_moments(alpha_bar, times)
    # 5 standard errors of a mean and of a standard deviation; the draws are fixed, so this fails always or never
    assert float(x.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(N))
    assert float(x.std()) == pytest.approx(std, abs=5 * std / math.sqrt(2 * N))


# ------------------------------------------------------------------------------------------------ inversion


def round_trip(nb, alpha_bar, x_0, S):
    eps, times = gaussian_eps(alpha_bar), nb.step_list(S, "linspace")
    x_T = last_of(nb.invert(eps, x_0, alpha_bar, times)).x
    return last_of(nb.denoise(eps, x_T, alpha_bar, times, clip=None)).x


def test_inversion_returns_and_the_more_steps_the_closer(nb, alpha_bar):
    x_0 = MEAN + STD * seeded((3, 1, 4, 4), 0)
    errors = {S: float((round_trip(nb, alpha_bar, x_0, S) - x_0).abs().max()) for S in (50, 100, 200, 400)}
    for S in (50, 100, 200):  # first order: twice the steps, about half the error
        assert errors[2 * S] < 0.7 * errors[S]
    # the error of one step is of the order of its change of eps; at S = 400 that leaves about 1 % of the data's std
    assert errors[400] < 0.1 * STD
    assert errors[50] > 1e-6, "the approximation of section 4.3 is not exact: an exact return means nothing was inverted"


def test_inversion_reaches_the_x_T_of_the_flow(nb, alpha_bar):
    """The probability flow of Gaussian data keeps the standardised value: x_T = sqrt(ab) m + std_T (x_0 - m) / s."""
    x_0 = torch.tensor([MEAN - STD, MEAN, MEAN + 2 * STD], dtype=torch.float64)
    ab = float(alpha_bar[-1])
    expected = math.sqrt(ab) * MEAN + math.sqrt(ab * STD**2 + 1 - ab) * (x_0 - MEAN) / STD
    got = last_of(nb.invert(gaussian_eps(alpha_bar), x_0, alpha_bar, nb.step_list(1000))).x
    torch.testing.assert_close(got, expected, rtol=0.03, atol=0.01)  # first order in 1/S


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inversion_by_hand(nb, alpha_bar, dtype):
    """The first step starts from alpha_bar = 1: x = sqrt(ab) x_0 + sqrt(1 - ab) eps(x_0); then up through the times."""
    x_0, ab, asked = seeded((2, 3), 0, dtype), float(alpha_bar[30]), []
    states = list(nb.invert(lambda x, t: asked.append(t) or smooth(x, t), x_0, alpha_bar, [700, 400, 30]))
    assert asked == [30, 400, 700]
    assert [(s.step, s.t) for s in states] == [(0, 30), (1, 400), (2, 700)]
    assert all(s.x.dtype == dtype for s in states)
    assert torch.equal(states[0].x0, x_0)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(states[0].x, math.sqrt(ab) * x_0 + math.sqrt(1 - ab) * smooth(x_0, 30), **tolerance)
