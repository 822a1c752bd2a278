"""Exercise 4: the table's types, its encoder, the sampler, the training and the scores, on small tables."""

import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import cells_tagged, execute, set_up
from hypothesis import given, settings
from hypothesis import strategies as st

DEFINITIONS = ("begin", "encoder", "model", "noise", "loss", "train", "sample")
DEFINITIONS += ("yardsticks", "similarity", "metrics")


@pytest.fixture(scope="module")
def tab(_in_the_repository, tmp_path_factory):
    """The set-up and exercise 4's definitions, executed; none of its measurements."""
    module = set_up("tabular", PROFILE="smoke", OUTPUT_DIR=str(tmp_path_factory.mktemp("run")))
    module.DEVICE = torch.device("cpu")
    for cell_id, source in cells_tagged("exercise-4"):
        if cell_id.removeprefix("e4-") in DEFINITIONS:
            execute(module, cell_id, source)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    del sys.modules["tabular"]


def small_table(rows=400, seed=0):
    """Two numbers that determine each other, a free one, and a category that follows the first."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=rows).round(2)
    frame = {"a": a, "b": (100 * a).round().astype(int) + 7, "c": rng.exponential(size=rows)}
    return pd.DataFrame(frame | {"d": pd.Categorical(np.where(a > 0, "up", "down"))})


# ---------------------------------------------------------------- encoder

CELLS = st.tuples(
    st.integers(-(2**53), 2**53),
    st.decimals(-1000, 1000, places=2).map(float),
    st.floats(-1e300, 1e300),
    st.sampled_from([0, 0, 0, 1, 99_999]),  # ties and gaps
    st.sampled_from(["red", "green", "blue", "(missing)"]),
)


@given(st.lists(CELLS, min_size=3, max_size=60), st.integers(0, 2**32 - 1))
def test_rows_survive_encoding_and_decoding(tab, cells, seed):
    """Every number of a training row exactly, though the vectors are float32."""
    frame = pd.DataFrame(cells, columns=["whole", "cents", "real", "gain", "colour"]).astype({"colour": "category"})
    encoder = tab.TableEncoder(frame)
    x = encoder.encode(frame, seed)
    assert x.shape == (len(frame), sum(encoder.sizes))
    assert torch.isfinite(x).all()
    back = encoder.decode(x)
    assert (back.dtypes == frame.dtypes).all()
    assert all((back[c].to_numpy() == frame[c].to_numpy()).all() for c in frame)


def test_fifty_thousand_rows_survive_too(tab):
    rng = np.random.default_rng(0)
    gain = np.where(rng.random(50_000) < 0.9, 0, rng.integers(0, 99_999, 50_000))
    frame = pd.DataFrame({"gain": gain, "real": rng.normal(size=50_000), "tiny": 1e-12 * rng.normal(size=50_000)})
    encoder = tab.TableEncoder(frame)
    assert encoder.decode(encoder.encode(frame, 1)).equals(frame)


def violations(synthetic, train):
    """Entries outside the training range (numbers) or levels (categories)."""
    inside = [
        v.isin(train[c]) if train[c].dtype == "category" else v.between(train[c].min(), train[c].max())
        for c, v in synthetic.items()
    ]
    return sum(int((~column).sum()) for column in inside)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1000))
def test_any_vector_decodes_to_the_training_range_levels_and_types(tab, seed, scale):
    train = small_table()
    x = scale * torch.randn(50, 5, generator=torch.Generator().manual_seed(seed))
    back = tab.TableEncoder(train).decode(x)
    assert violations(back, train) == 0
    assert list(back) == list(train)
    assert (back.dtypes == train.dtypes).all()


def test_ties_are_spread_to_a_normal_score(tab):
    train = pd.DataFrame({"v": np.repeat(np.arange(20), 500), "k": pd.Categorical(["x"] * 10_000)})
    z = tab.TableEncoder(train).encode(train, seed=3)[:, 0]
    assert tab.scipy.stats.kstest(z.numpy(), "norm").statistic < 0.02


def test_an_unseen_level_and_a_number_beyond_the_range_are_encoded(tab):
    train = small_table()
    row = pd.DataFrame({"a": [1e9], "b": [0], "c": [1.0], "d": pd.Categorical(["sideways"])})
    encoder = tab.TableEncoder(train)
    x = encoder.encode(row)
    assert (x[0, 3:] == -1).all()
    assert encoder.decode(x)["a"][0] == train["a"].max()


# ---------------------------------------------------------------- model and sampler


def test_what_the_network_adds_aside_noise_is_what_is_seen_and_levels_are_equally_likely(tab):
    network = tab.TableNet([2, 4], 16, 2)
    torch.nn.init.zeros_(network.leave.weight)
    torch.nn.init.zeros_(network.leave.bias)
    x = torch.randn(6, 6)
    for t in (0, 500, 999):
        ab = tab.TABLE_ALPHA_BAR[t].float()
        assert torch.allclose(network(x, t)[:, :2], (1 - ab).sqrt() * x[:, :2])
        expected = 2 * 0.25 - 1
        assert torch.allclose(
            tab.add_noise(torch.tensor(expected), network(x, t)[:, 2:], tab.TABLE_ALPHA_BAR, t), x[:, 2:], atol=1e-5
        )
    network = tab.TableNet([2, 4], 16, 2)
    t = torch.tensor([0, 1, 2, 500, 998, 999])
    each = torch.cat([network(x[k : k + 1], int(t[k])) for k in range(6)])
    assert torch.allclose(network(x, t), each, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("eta", "tolerance"), [(0.0, 0.02), (1.0, 0.03)])
def test_the_sampler_draws_the_gaussian_whose_best_network_is_known(tab, monkeypatch, eta, tolerance):
    """Two correlated normal scores: E[x0 | x_t] is linear, and the drawn covariance must be the data's."""
    cov = torch.tensor([[1.0, 0.8], [0.8, 1.0]])

    def best(x, t):
        ab = float(tab.TABLE_ALPHA_BAR[t])
        gain = math.sqrt(1 - ab) * torch.linalg.inv(ab * cov + (1 - ab) * torch.eye(2))
        return x @ gain

    best.sizes = [2]
    *_, last = tab.table_states(best, range(20_000), 500, eta)
    assert torch.allclose(torch.cov(last.x.T), cov, atol=tolerance + 0.02)
    assert last.x.mean(0).abs().max() < 0.03


def test_the_sampler_draws_levels_with_their_probabilities(tab):
    """A network that knows each level's share, and Bayes' rule, must give back the shares."""
    share = torch.tensor([0.6, 0.3, 0.1])

    class Best(tab.TableNet):
        def answers(self, x, t):
            ab = tab.TABLE_ALPHA_BAR[torch.as_tensor(t)].float().reshape(-1, 1)
            centre = ab.sqrt() * (2 * torch.eye(3) - 1)
            distance = (x[:, None] - centre).square().sum(-1)
            return x[:, :0], [share.log() - distance / (2 * (1 - ab))], ab

    for eta, limit in ((0.0, 0.03), (1.0, 0.03)):
        *_, last = tab.table_states(Best([0, 3], 4, 1), range(10_000), 100, eta)
        drawn = torch.bincount(last.x.argmax(1), minlength=3) / 10_000
        assert (drawn - share).abs().max() < limit
        assert ((last.x.abs() - 1).abs() < 0.05).float().mean() > 0.99, "levels end at 1 and -1"


def test_no_rows_give_an_empty_table_with_the_right_columns_and_types(tab):
    train = small_table()
    encoder = tab.TableEncoder(train)
    empty = tab.sample_table(tab.TableNet(encoder.sizes, 8, 1), encoder, range(0), 5, 0.0)
    assert len(empty) == 0
    assert list(empty) == list(train)
    assert (empty.dtypes == train.dtypes).all()


@pytest.mark.parametrize("sizes", [[2], [0, 2, 3]])
def test_tables_of_numbers_or_of_categories_alone_can_be_learned(tab, sizes):
    network, x0 = tab.TableNet(sizes, 8, 1), torch.randn(20, sum(sizes)).sign()
    loss = tab.table_loss(network, x0)
    assert torch.isfinite(loss)
    assert loss > 0
    *_, last = tab.table_states(network, range(7), 3, 1.0)
    assert last.x.shape == (7, sum(sizes))
    assert torch.isfinite(last.x).all()


def test_training_learns_the_relations_of_a_table_for_both_samplers(tab):
    train = small_table(2000)
    encoder = tab.TableEncoder(train)
    held_out = encoder.encode(small_table(500, seed=1))
    network, losses = tab.train_table(encoder.encode(train)[None], held_out, encoder.sizes, 0, 1000, width=64)
    assert losses.iloc[-1].max() < 0.85 * losses.iloc[0, 0]
    for eta in (0.0, 1.0):
        rows = tab.sample_table(network, encoder, range(1000), 50, eta)
        assert np.corrcoef(rows["a"], rows["b"])[0, 1] > 0.97
        assert ((rows["a"] > 0) == (rows["d"] == "up")).mean() > 0.93
        assert abs(rows["a"].std() / train["a"].std() - 1) < 0.15
        some = tab.sample_table(network, encoder, range(100, 200), 50, eta)
        assert (some["d"].to_numpy() == rows["d"][100:200]).mean() > 0.98, "a row belongs to its seed"
        assert np.allclose(some["a"], rows["a"][100:200], atol=0.05)


# ---------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def pair(tab):
    """A real table, and one that differs in shape and in relation."""
    other = small_table(300, seed=1)
    other["c"], other["d"] = other["c"] * 1.5, other["d"].to_numpy()[::-1]
    return small_table(), other.astype({"d": "category"})


def test_shapes_and_trends_are_those_of_sdmetrics(tab, pair):
    single = pytest.importorskip("sdmetrics.single_column")
    double = pytest.importorskip("sdmetrics.column_pairs")
    real, fake = pair
    shapes = tab.column_shapes(real, fake)
    assert set(shapes.index) == set(real)
    for c, score in shapes.items():
        theirs = single.TVComplement if real[c].dtype == "category" else single.KSComplement
        assert score == pytest.approx(theirs.compute(real[c], fake[c]), abs=1e-9)
    trends = tab.column_pair_trends(real, fake)
    assert len(trends) == 6
    for (a, b), score in trends.items():
        numbers = [c for c in (a, b) if real[c].dtype != "category"]
        real_two, fake_two = (frame[[a, b]].astype({"d": str} if "d" in (a, b) else {}) for frame in (real, fake))
        if len(numbers) == 2:
            theirs = double.CorrelationSimilarity.compute(real_two, fake_two)
        else:
            theirs = double.ContingencySimilarity.compute(real_two, fake_two, continuous_column_names=numbers or None)
        assert score == pytest.approx(theirs, abs=1e-9), (a, b)


def test_the_same_table_scores_perfectly(tab):
    real = small_table()
    assert set(tab.column_shapes(real, real)) == {1.0}
    assert np.allclose(tab.column_pair_trends(real, real), 1)


def test_a_classifier_tells_a_shifted_table_apart_but_not_fresh_rows(tab):
    real, fresh = small_table(seed=0), small_table(seed=5)
    shifted = fresh.assign(c=fresh["c"] + 3)
    assert tab.told_apart(real, shifted) > 0.95
    assert 0.4 < tab.told_apart(real, fresh) < 0.6


def test_utility_is_high_for_real_rows_and_lost_without_relations(tab):
    train, test = small_table(1000), small_table(300, seed=1)
    for target in ("b", "d"):  # a number: R2; a category: accuracy
        assert tab.utility(train, test, target) > 0.95
        assert tab.utility(tab.marginals(train, 1000, 0), test, target) < 0.7


@pytest.mark.parametrize("levels", [2, 60])
def test_utility_of_rare_and_of_many_classes_is_a_score(tab, levels):
    """One row in a class, a class that no synthetic row has, sixty classes; and a single class."""
    rng = np.random.default_rng(0)
    label = pd.Categorical(
        [f"k{k}" for k in np.minimum(rng.integers(0, levels, 300), levels - 1)], [f"k{k}" for k in range(levels + 1)]
    )
    rows = pd.DataFrame({"word": pd.Categorical(np.where(label.codes % 2, "odd", "even")), "label": label})
    rows.loc[0, "label"] = f"k{levels}"
    assert tab.utility(rows, rows, "label") > (0.98 if levels == 2 else 1 / levels)
    alone = rows.assign(label=pd.Categorical(["k1"] * 300, label.categories))
    assert tab.utility(alone, rows, "label") == pytest.approx((rows["label"] == "k1").mean())


def test_copies_are_seen_as_copies(tab):
    train, test, fresh = (small_table(seed=seed) for seed in range(3))
    encoder = tab.TableEncoder(train)
    assert tab.dcr_share(train, train, test, encoder) > 0.95
    assert tab.dcr_share(test, train, test, encoder) < 0.05
    assert 0.4 < tab.dcr_share(fresh, train, test, encoder) < 0.6


# ---------------------------------------------------------------- yardsticks


@pytest.mark.parametrize("name", ["marginals", "smote"])
def test_each_yardstick_keeps_types_ranges_and_what_it_promises(tab, name):
    train = small_table(1500)
    given = (tab.TableEncoder(train),) if name == "smote" else ()
    rows, again, other = (getattr(tab, name)(train, 1200, seed, *given) for seed in (0, 0, 1))
    assert len(rows) == 1200
    assert list(rows) == list(train)
    assert (rows.dtypes == train.dtypes).all()
    assert violations(rows, train) == 0
    assert tab.column_shapes(train, rows).min() > 0.9
    relation = rows["a"].corr(rows["b"])
    assert abs(relation) < 0.1 if name == "marginals" else relation > 0.97
    assert rows.equals(again)
    assert not rows.equals(other)
