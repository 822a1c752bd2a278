"""Records, caches, checkpoints, real images and parameters: what must hold when something goes wrong as well."""

import hashlib
import io
import itertools
import logging
import os
import re
import shutil
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import cells_tagged, set_up
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image
from shared import Card

COLUMNS = [
    *("run", "metric", "value", "low", "high", "N", "n_real", "dataset"),
    *("method", "eta", "variance", "spacing", "steps", "seed", "detail"),
]
RUN_COLUMNS = ["run", "device", "dtype", "profile", "source", "versions", "commit", "models", "date", "minutes"]


def one_sentence(error):
    """The message of an error: one line, ended like a sentence."""
    message = str(error.value.args[0])
    assert "\n" not in message
    assert message.endswith((".", ")")), message
    return message


# ----------------------------------------------------------------------------------------------- names, tables


def test_the_homeworks_data_sets(nb):
    sizes = {"mnist": (28, 1), "cifar10": (32, 3), "pokemon": (64, 3), "emoji": (64, 3)}
    sizes |= {"butterflies": (128, 3), "church": (256, 3), "landscapes": (256, 3)}
    assert {name: (spec.size, spec.channels) for name, spec in nb.DATA.items()} == sizes


def test_profiles_are_one_table_of_fixed_numbers(nb):
    assert set(nb.PROFILES) == {"smoke", "quick", "full"}
    for by_source in nb.PROFILES.values():
        assert set(by_source) == {"bundled", "hub"}
        for plans in by_source.values():
            assert set(plans) <= set(nb.DATA)
            for plan in plans.values():
                assert plan.N in nb.LADDER, "else no floor is known at this N"
                assert all(1 <= S <= 1000 for S in plan.ddpm + plan.ddim)
                assert plan.ddim[-1] in plan.ddpm, "both samplers with the same number of steps"
                assert max(plan.ddpm) > plan.ddim[-1]
    assert set(nb.PROFILES["quick"]["bundled"]) == set(nb.PROFILES["full"]["bundled"]) == set(nb.DATA)
    assert 1000 in nb.PROFILES["quick"]["bundled"]["mnist"].ddpm


# -------------------------------------------------------------------------------------------------- parameters


WRONG = {  # parameter -> (what the sentence names, wrong values)
    "PROFILE": ("smoke", "fast", None, 3),
    "SOURCE": ("bundled", "web", ""),
    "DATA_DIR": ("folder", "/no/such/folder", __file__, None, 5),
    "OUTPUT_DIR": ("folder", "", None, __file__),
    "SEED": ("whole number", -1, 2**31, 1.0, "0", True),
    "DATASETS": ("mnist", (), ("imagenet",), ("mnist", "MNIST"), "mnist", None, 3, [["mnist"]]),
    "CAPTURE_EVERY": ("1 to 1000", 0, 1001, 1.5),
    "TABLE": ("CSV", "/no/such/table.csv", "tests", 5),
    "TARGET": ("column", 5, None),
    "PROMPTS": ("list of texts", "red apple", [1]),
}


@pytest.mark.parametrize(("parameter", "value"), [(name, value) for name, (_, *values) in WRONG.items() for value in values])
def test_a_wrong_parameter_stops_set_up(setup_with, parameter, value):
    with pytest.raises(ValueError, match=parameter) as error:
        setup_with(**{parameter: value})
    message = one_sentence(error)
    assert repr(value) in message
    assert WRONG[parameter][0] in message


EDGES = {"PROFILE": "smoke", "SOURCE": "hub", "SEED": 2**31 - 1, "CAPTURE_EVERY": 1}
LISTS = {"DATASETS": ["mnist"], "DATA_DIR": os.path.dirname(__file__), "PROMPTS": []}
DEFAULTS = {"PROFILE": "auto", "SOURCE": "auto", "DATA_DIR": "", "OUTPUT_DIR": "outputs/run", "SEED": 0}


@pytest.mark.parametrize(("given", "expected"), [({}, DEFAULTS), (EDGES, EDGES), (LISTS, LISTS)], ids=["none", "edges", "lists"])
def test_right_parameters_pass(setup_with, given, expected):
    module = setup_with(**given)
    assert {name: getattr(module, name) for name in expected} == expected


def test_a_tilde_is_the_home_folder(setup_with, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n" + "1.5,x\n2.5,y\n" * 100)
    module = setup_with(OUTPUT_DIR="~/run", DATA_DIR="~/pictures", TABLE="~/table.csv")
    assert (module.OUTPUT_DIR, module.DATA_DIR) == (str(tmp_path / "run"), str(tmp_path / "pictures"))
    assert module.TABLE == str(tmp_path / "table.csv")


# --------------------------------------------------------------------------------------------- what is in force


@pytest.fixture(autouse=True)
def _no_faults_yet(nb):
    nb.FAULTS.clear()
    nb.NOTICES.clear()
    yield
    nb.FAULTS.clear()
    nb.NOTICES.clear()


@pytest.fixture
def in_force(nb, monkeypatch, capsys):
    """A function: (profile, source, what is printed) that set-up chooses on a GPU of so many gigabytes (0: a CPU)."""

    def choose(gigabytes, PROFILE="auto", SOURCE="auto", hub=True, **changes):
        def fetched(what, *more):
            if not hub:
                nb.refuse("", "nothing came for 8 s")
                raise OSError("nothing came for 8 s")
            return nb.Path(what)

        cuda = {"DEVICE": torch.device("cuda")} if gigabytes else {}
        card = type("Card", (), {"total_memory": gigabytes * 1e9})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        (source,) = (source for cell, source in cells_tagged("setup") if cell == "in-force")
        scope = nb.__dict__ | {"PROFILE": PROFILE, "SOURCE": SOURCE, "fetched": fetched} | cuda | changes
        exec(source, scope)
        return scope["PROFILE"], scope["SOURCE_IN_FORCE"], capsys.readouterr().out.splitlines()

    return choose


@pytest.mark.parametrize(
    ("gigabytes", "hub", "expected"),
    [
        (0, True, ("quick", "bundled")),
        (80, True, ("full", "hub")),
        (80, False, ("full", "bundled")),
        (16, True, ("quick", "hub")),
        (16, False, ("full", "bundled")),
        (8, True, ("quick", "hub")),
        (8, False, ("full", "bundled")),
    ],
)
def test_auto_follows_the_card_and_the_hub(in_force, gigabytes, hub, expected):
    *found, said = in_force(gigabytes, hub=hub)
    assert tuple(found) == expected
    assert said[-1] == "Profile {}, {} networks.".format(*expected)
    assert [line for line in said[:-1] if "hub" in line.lower()] == said[:-1], "one sentence, where the hub was asked in vain"
    assert len(said) == 1 + (gigabytes > 0 and not hub)


@pytest.mark.parametrize("profile", ["smoke", "quick", "full"])
@pytest.mark.parametrize("source", ["hub", "bundled"])
def test_what_is_asked_for_on_a_gpu_is_done(in_force, profile, source):
    assert in_force(8, profile, source, hub=False)[:2] == (profile, source)


def test_on_a_cpu_the_hub_costs_one_sentence_with_its_hours(nb, in_force):
    assert in_force(0, "smoke", "hub")[:2] == ("smoke", "hub")
    for profile, names in itertools.product(("quick", "full"), (("mnist",), tuple(nb.DATA))):
        found, source, said = in_force(0, profile, "hub", DATASETS=names)
        assert (found, source, len(said)) == (profile, "bundled", 2)
        (hours,) = re.findall(r"about ([\d,]+) hours", said[0])
        plans = {name: plan for name, plan in nb.PROFILES[profile]["hub"].items() if name in names}
        work = sum(plan.N * (sum(plan.ddim) + sum(plan.ddpm)) * nb.DATA[name].gflop for name, plan in plans.items())
        assert float(hours.replace(",", "")) == pytest.approx(work / 50 / os.cpu_count() / 3600, abs=1)


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


# ----------------------------------------------------------------------------------------------------- records


@pytest.fixture
def section(nb, run):
    """A section that measures nothing by itself."""
    return nb.Section("exercise-1")


def test_a_row_has_the_designs_columns(nb, run, section):
    row = section.add("FD-EffNet", 12.5, low=11, high=14, N=16, dataset="mnist", method="DDIM", eta=0)
    stored = pd.read_csv(run / "results" / "exercise-1.csv", dtype=str, keep_default_na=False)
    assert list(stored.columns) == COLUMNS
    stored = stored.iloc[0]
    assert (stored["value"], stored["N"], stored["low"], stored["eta"]) == ("12.5", "16", "11", "0.0")
    assert stored["spacing"] == stored["detail"] == "", "what does not apply is empty"
    assert (row.value, row.N, row.method) == (12.5, 16, "DDIM")
    (read,) = nb.results("exercise-1")
    assert (read.value, read.low, read.high, read.N, read.steps) == (12.5, 11.0, 14.0, 16, "")


def test_a_repeat_replaces_its_row_whenever_it_is_made(nb, run):
    same = {"N": 16, "dataset": "mnist", "method": "DDIM", "steps": 5, "seed": 0}
    for value, eta in ((1.0, 0), (2.0, 0.0)):
        nb.Section("exercise-1").add("KID", value, low=value - 1, high=value + 1, eta=eta, **same)
    assert [row.value for row in nb.results("exercise-1")] == [2.0]


def test_another_setting_is_another_row(nb, section):
    section.add("FID", 0.0)
    section.add("KID", 1.0)
    for value, column in enumerate(("N", "n_real", "dataset", "method", "eta", "variance", "spacing", "steps", "seed"), 2):
        section.add("KID", value, **{column: 7})
    assert [row.value for row in nb.results("exercise-1")] == [float(k) for k in range(11)]


def test_another_profile_or_device_is_another_row(nb, run, monkeypatch):
    nb.Section("exercise-1").add("KID", 1.0)
    for value, (name, changed) in enumerate({"PROFILE": "quick", "DEVICE_NAME": "another device"}.items(), 2):
        monkeypatch.setattr(nb, name, changed)
        nb.Section("exercise-1").add("KID", value)
    assert [row.value for row in nb.results("exercise-1")] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("number", [np.int64(5), np.float32(0.5), torch.tensor(5), torch.tensor(0.5)], ids=repr)
def test_foreign_numbers_are_stored_as_numbers(run, section, number):
    """Reference.n_real is a tensor: its text form is no number."""
    section.add("m", number, n_real=number)
    stored = pd.read_csv(run / "results" / "exercise-1.csv", dtype=str).iloc[0]
    assert float(stored["value"]) == float(stored["n_real"]) == float(number)


def test_an_unknown_column_is_refused_before_anything_is_written(nb, section):
    with pytest.raises(KeyError, match=r"stepz.*allowed.*steps"):
        section.add("KID", 1.0, stepz=5)
    assert nb.results("exercise-1") == []


def test_results_are_chosen_by_columns(nb, section):
    for steps in (5, 10, 50):
        section.add("KID", steps / 10, steps=steps, eta=0.0, method="DDIM")
    assert [row.value for row in nb.results("exercise-1", steps=10)] == [1.0]
    assert [row.value for row in nb.results("exercise-1", steps=(5, 50), method="DDIM", eta=0.0)] == [0.5, 5.0]
    assert nb.results("exercise-1", method="DDPM") == nb.results("none") == []


@pytest.mark.parametrize("breaks", ["replace", "to_csv"])
def test_a_failed_write_loses_nothing(nb, run, section, monkeypatch, breaks):
    section.add("KID", 1.0)
    before = (run / "results" / "exercise-1.csv").read_bytes()
    target = {"replace": (nb.os, "replace"), "to_csv": (pd.DataFrame, "to_csv")}[breaks]
    with monkeypatch.context() as patch:
        patch.setattr(*target, raising(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            section.add("KID", 2.0, steps=5)
    assert (run / "results" / "exercise-1.csv").read_bytes() == before
    section.add("KID", 3.0, steps=5)
    assert [row.value for row in nb.results("exercise-1")] == [1.0, 3.0]


def test_only_the_main_process_writes(nb, section, monkeypatch):
    monkeypatch.setattr(nb, "PROCESS", type("Second", (), {"is_main_process": False, "wait_for_everyone": lambda: None}))
    assert section.add("KID", 1.0).value == 1.0
    assert nb.results("exercise-1") == []


def test_a_run_is_described_beside_its_first_row(nb, run, tiny, capsys, monkeypatch):
    monkeypatch.setattr(nb, "seconds_per_evaluation", lambda checkpoint: 0.6)
    section = nb.Section("s", [(tiny(), 20, 50), (tiny(), 10, 1000)])
    said = capsys.readouterr().out
    assert all(words in said for words in ("30 images", "11,000 network evaluations", "110.0 min")), said
    section.started -= 120
    section.add("m", 1.0)
    runs = pd.read_csv(run / "results" / "runs.csv", dtype=str, keep_default_na=False)
    assert list(runs.columns) == RUN_COLUMNS
    row = runs.iloc[0]
    assert (row["profile"], row["source"], row["models"]) == ("smoke", nb.SOURCE_IN_FORCE, "tiny=" + "0" * 16)
    assert f"torch={torch.__version__.split('+')[0]}" in row["versions"]
    assert float(row["minutes"]) == pytest.approx(2, abs=0.1)
    assert {r.run for r in nb.results("s")} == {row["run"]}


def test_a_machine_without_git_is_served(nb, run, monkeypatch):
    monkeypatch.setattr(nb.subprocess, "run", raising(FileNotFoundError("git")))
    assert nb.Section("s").made["commit"] == ""


def test_rows_are_tables_and_say_what_they_lack(nb, section):
    rows = [section.add("KID", 1.0, steps=S) for S in (5, 10)]
    assert pd.DataFrame(rows)["steps"].tolist() == [5, 10]
    assert not hasattr(rows[0], "stepz")


@pytest.mark.parametrize(
    ("columns", "plain", "fixed"),
    [
        ({}, "3.14", "3.1"),
        ({"low": 3.0, "high": 3.25}, "3.14 [3, 3.25]", "3.1 [3.0, 3.2]"),
        ({"value": 1234.5, "low": 987.6, "high": 12345.0}, "1,230 [988, 12,300]", "1234.5 [987.6, 12345.0]"),
        ({"value": 0.000123456}, "0.000123", "0.0"),
    ],
    ids=str,
)
def test_a_rows_format(nb, columns, plain, fixed):
    row = nb.Row(dict.fromkeys(COLUMNS, "") | {"value": 3.14159} | columns)
    assert (f"{row}", f"{row:.1f}") == (plain, fixed)


# ----------------------------------------------------------------------------------------------------- measure


def few_features(images, metric="FD-EffNet"):
    """Stands for the feature network: cheap, and different for every image."""
    return images.float().flatten(1)[:, :6]


@pytest.fixture
def counting(nb, run, monkeypatch):
    """Cheap features, and the seeds of every call of sample_images; `kill_at` interrupts the call of that number."""
    calls, real = [], nb.sample_images

    @nb.functools.wraps(real)
    def counted(checkpoint, seeds, *args, **kwargs):
        if len(calls) == counted.kill_at:
            counted.kill_at = None
            raise KeyboardInterrupt
        calls.append(list(seeds))
        return real(checkpoint, seeds, *args, **kwargs)

    counted.kill_at = None
    counted.calls = calls
    monkeypatch.setattr(nb, "sample_images", counted)
    monkeypatch.setattr(nb, "image_features", few_features)
    return counted


def test_measure_is_the_features_of_the_images(nb, tiny, counting, monkeypatch):
    monkeypatch.setattr(nb, "SEED", 30)
    measured = nb.measure(tiny(), 10, 3, 1.0, size=4)
    expected = few_features(counting.__wrapped__(tiny(), range(30, 40), 3, 1.0))
    assert counting.calls == [[30, 31, 32, 33], [34, 35, 36, 37], [38, 39]]
    assert (measured.features - expected).abs().max() <= 1, "in seed order; one level for another batch"
    assert measured.seconds > 0


@pytest.mark.parametrize("kill_at", [0, 1, 2])
def test_an_interrupted_measurement_resumes_to_the_same_numbers(nb, tiny, counting, monkeypatch, tmp_path, kill_at):
    checkpoint = tiny()
    unbroken = nb.measure(checkpoint, 10, 3, 1.0, size=4)
    monkeypatch.setattr(nb, "OUTPUT", tmp_path / "second")
    counting.calls.clear()
    counting.kill_at = kill_at
    with pytest.raises(KeyboardInterrupt):
        nb.measure(checkpoint, 10, 3, 1.0, size=4)
    resumed = nb.measure(checkpoint, 10, 3, 1.0, size=4)
    assert torch.equal(resumed.features, unbroken.features)
    assert counting.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], "no finished chunk twice"
    again = nb.measure(checkpoint, 10, 3, 1.0, size=4)
    assert len(counting.calls) == 3
    assert torch.equal(again.features, unbroken.features)
    assert again.seconds == resumed.seconds


@pytest.mark.parametrize("change", [{"control": "untrained"}, {"sha256": "1" * 64}, {"dtype": torch.bfloat16}], ids=str)
def test_another_network_is_measured_anew(nb, tiny, counting, change):
    nb.measure(tiny(), 2, 2)
    nb.measure(tiny(**change), 2, 2)
    assert len(counting.calls) == 2


@pytest.mark.parametrize("N", [2, 3, 9])
def test_another_number_of_images_is_not_the_cached_chunk(nb, tiny, counting, N):
    nb.measure(tiny(), 6, 2, size=4)
    assert len(nb.measure(tiny(), N, 2, size=4).features) == N


def test_measure_passes_its_settings_on(nb, tiny, counting):
    checkpoint = tiny()
    free, spaced = nb.measure(checkpoint, 2, 3, clip=None), nb.measure(checkpoint, 2, 3, spacing="trailing")
    default = nb.measure(checkpoint, 2, 3)
    assert len(counting.calls) == 3
    assert not torch.equal(spaced.features, default.features)
    assert not torch.equal(free.features, default.features)


def test_measured_keeps_the_first_twelve_images(nb, tiny, counting, monkeypatch):
    monkeypatch.setattr(nb, "SEED", 7)
    measured = nb.measure(tiny(), 40, 2, size=8)
    expected = counting.__wrapped__(tiny(), range(7, 19), 2)
    assert (measured.first.int() - expected.int()).abs().max() <= 1, "the images of the first twelve seeds"
    stored = sum(f.stat().st_size for f in (nb.OUTPUT / "cache").rglob("*.npz"))
    assert stored < 40 * 6 * 4 + 12 * 64 + 5 * 3000, "features and a few images, not all of them"


def test_a_failed_computation_leaves_nothing(nb, tiny, counting, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(nb, "image_features", raising(RuntimeError("full")))
        with pytest.raises(RuntimeError, match="full"):
            nb.measure(tiny(), 4, 2)
    assert len(nb.measure(tiny(), 4, 2).features) == 4


def test_a_bar_leaves_every_item_and_nothing_else(nb, capsys):
    assert list(nb.progress((k for k in "abc"), "letters")) == list("abc")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "0/3 letters" in lines[0]
    assert "2/3 letters" in lines[2]
    assert list(nb.progress([], "nothing")) == []


@pytest.fixture
def reference(nb, monkeypatch):
    """A Reference of random features, as load_file gives it, in force for every checkpoint."""
    draw = torch.Generator().manual_seed(0)
    made = nb.make_reference(torch.randn(200, 6, generator=draw), torch.randn(40, 6, generator=draw))
    monkeypatch.setattr(nb, "load_reference", lambda name, source: made)
    return made


def test_score_records_distance_kid_and_floor(nb, section, tiny, reference):
    features = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    row = nb.score(section, tiny(), features, method="DDIM", eta=0.0, steps=5)
    rows = nb.results("exercise-1")
    assert [(r.metric, r.method) for r in rows] == [("FD-EffNet", "DDIM"), ("KD-EffNet", "DDIM"), ("FD-EffNet", "real")]
    assert {r.N for r in rows} == {32}
    assert [r.n_real for r in rows] == ["200", "40", "200"]
    assert row.value == rows[0].value == pytest.approx(reference.distance(features))
    assert rows[1].value == pytest.approx(nb.kernel_distance(features, reference.heldout))
    assert rows[2].value == pytest.approx(float(reference.floors[1, 1]))
    assert all(r.low <= r.value <= r.high for r in rows)


def test_a_difference_is_that_of_the_distances_and_decides_where_its_interval_leaves_out_zero(nb, section, tiny, reference):
    draw = torch.Generator().manual_seed(2)
    near, far = torch.randn(64, 6, generator=draw), 1 + torch.randn(64, 6, generator=draw)
    less = nb.difference(section, tiny(), near, far, "near minus far")
    assert less.value == pytest.approx(reference.distance(near) - reference.distance(far))
    assert less.low < less.value < less.high < 0
    assert nb.decided(less, "closer", "further") == "closer"
    assert nb.decided(nb.difference(section, tiny(), far, near, "far minus near"), "closer", "further") == "further"
    same = nb.difference(section, tiny(), near, near.flip(0), "the same images in another order")
    assert nb.decided(same, "closer", "further") == nb.decided(None, "closer", "further") == "undecided"
    (stored,) = nb.results("exercise-1", detail="near minus far")
    assert (stored.metric, stored.N, stored.value) == ("FD-EffNet difference", 64, less.value)


def test_the_difference_leaves_out_the_same_seeds_on_both_sides(nb, section, tiny, reference):
    """Where both sides share what makes them scatter, the difference is known better than either distance."""
    shared = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
    less = nb.difference(section, tiny(), shared, shared + 0.02, "shifted")
    alone = nb.jackknife(reference.distances(shared))
    assert less.high - less.low < 0.2 * (alone["high"] - alone["low"])


def test_without_a_reference_no_distance_is_given(nb, section, tiny, monkeypatch):
    monkeypatch.setattr(nb, "load_reference", lambda name, source: None)
    assert nb.score(section, tiny(), torch.zeros(4, 6)) is None
    assert nb.difference(section, tiny(), torch.zeros(4, 6), torch.zeros(4, 6), "none") is None
    assert nb.results("exercise-1") == []


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def fresh(nb):
    """load_checkpoint without what other tests have loaded."""
    nb.load_checkpoint.cache_clear()
    yield nb.load_checkpoint
    nb.load_checkpoint.cache_clear()


@pytest.fixture
def copied(nb, fresh, monkeypatch, tmp_path):
    """The folder of a copy of the bundled mnist network, in force as the bundled one."""
    shutil.copytree("outputs/checkpoints/mnist", tmp_path / "checkpoints" / "mnist")
    monkeypatch.setattr(nb, "BUNDLED", tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "mnist"


def card(folder):
    """A card with the right hash of the folder's weights."""
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (folder / "README.md").write_text(f"sha256: `{hashlib.sha256(weights).hexdigest()}`\n", encoding="utf-8")


def test_the_bundled_network_loads(nb, fresh):
    checkpoint = fresh("mnist")
    assert fresh("mnist") is checkpoint, "once"
    assert (checkpoint.name, checkpoint.source, checkpoint.shape) == ("mnist", "bundled", (1, 28, 28))
    assert not checkpoint.unet.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in checkpoint.unet.parameters())
    assert torch.equal(checkpoint.alpha_bar, nb.make_alpha_bar(nb.CONFIG))
    with torch.inference_mode():
        assert checkpoint(nb.image_noise([0], (1, 28, 28)), 999).shape == (1, 1, 28, 28)


def test_an_unknown_name(fresh):
    with pytest.raises(KeyError, match=r"'imagenet' .*allowed: mnist, cifar10") as error:
        fresh("imagenet")
    one_sentence(error)


@pytest.mark.parametrize("harmed", ["README.md", "unet/diffusion_pytorch_model.safetensors"])
def test_weights_that_are_not_the_cards_are_refused(copied, fresh, harmed):
    data = bytearray((copied / harmed).read_bytes())
    if harmed == "README.md":
        digest = hashlib.sha256((copied / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest().encode()
        assert digest in data
        data = data.replace(digest, digest[::-1])
    else:
        data[-1] ^= 1  # one bit
    (copied / harmed).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"README.md.*SHA-256.*restore") as error:
        fresh("mnist")
    assert str(copied) in one_sentence(error)
    (copied / harmed).unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        fresh("mnist")


def unconditional(**changes):
    """A small network of mnist's shape with another config than the notebook can serve."""
    settings = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    settings |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    return UNet2DModel(**settings | changes)


@pytest.mark.parametrize(("patch", "size"), [(1, 28), (1, (28, 28)), (2, 14)])
def test_a_network_on_unshuffled_pixels_is_recognised(nb, copied, fresh, patch, size):
    unet = unconditional(sample_size=size, in_channels=patch**2, out_channels=patch**2).half()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(copied)
    card(copied)
    checkpoint = fresh("mnist")
    assert (checkpoint.patch, checkpoint.shape) == (patch, (1, 28, 28))
    assert checkpoint.unet.dtype == torch.float32, "float16 on disk, float32 in use"
    assert nb.sample_images(checkpoint, [0], 1).shape == (1, 1, 28, 28)


def test_a_network_keeps_its_own_schedule(nb, copied, fresh, tiny):
    """A checkpoint trained on other noise levels is told its own, not the homework's."""
    scheduler = DDPMScheduler(1000, beta_end=0.03)
    DDPMPipeline(tiny(1, 28).unet, scheduler).save_pretrained(copied)
    card(copied)
    torch.testing.assert_close(fresh("mnist").alpha_bar, scheduler.alphas_cumprod.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("network", "schedule", "reason"),
    [
        ({"num_class_embeds": 10}, {}, "told a class"),
        ({"class_embed_type": "timestep"}, {}, "told a class"),
        ({"out_channels": 2}, {}, "variance"),
        ({}, {"variance_type": "learned_range"}, "variance"),
        ({"sample_size": (28, 24)}, {}, r"size .*28, 24.* do not fit"),
        ({"sample_size": None}, {}, "size None do not fit"),
        ({}, {"num_train_timesteps": 4000}, "T = 4000, not 1000"),
        ({}, {"rescale_betas_zero_snr": True}, "ends without any signal"),
        ({}, {"prediction_type": "flow"}, "it predicts 'flow'"),
        ({"in_channels": 3, "out_channels": 3}, {}, "3 channels .* 1 x 28"),
        ({"in_channels": 48, "out_channels": 48, "sample_size": 7}, {}, "48 channels .* 1 x 28"),
        ({"sample_size": 10}, {}, "do not fit"),
    ],
)
def test_a_network_that_cannot_be_served_is_refused(copied, fresh, network, schedule, reason):
    DDPMPipeline(unconditional(**network), DDPMScheduler(**schedule)).save_pretrained(copied)
    card(copied)
    with pytest.raises(ValueError, match=f"mnist: the bundled network cannot be used here, because .*{reason}") as error:
        fresh("mnist")
    one_sentence(error)


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_every_objective_samples_as_in_diffusers(nb, copied, fresh, tiny, predicts, patch):
    """A folder's own pipeline and schedulers beside `denoise`: DDIM, DDPM, the same noise, the same pictures."""
    settings = {"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True, "prediction_type": predicts}
    unet = tiny(1, 28, patch).unet
    DDPMPipeline(unet, DDPMScheduler(**settings)).save_pretrained(copied)
    card(copied)
    checkpoint, steps = fresh("mnist"), 10
    assert checkpoint.predicts == predicts
    unshuffle = torch.nn.functional.pixel_unshuffle
    x_T = unshuffle(nb.image_noise(range(3), (1, 28, 28)), patch)
    for eta, kind in ((0.0, DDIMScheduler), (1.0, DDPMScheduler)):
        scheduler, x = kind(**settings), x_T
        scheduler.set_timesteps(steps)
        draws = [torch.randn(x.shape, generator=torch.Generator().manual_seed(step)) for step in range(steps)]
        with torch.inference_mode():
            for step, t in enumerate(scheduler.timesteps.tolist()):
                given = {"use_clipped_model_output": True} if eta == 0 else {"generator": torch.Generator().manual_seed(step)}
                x = scheduler.step(unet(x, t).sample, t, x, **given).prev_sample
            noise = lambda step, draws=draws: torch.nn.functional.pixel_shuffle(draws[step], patch)  # noqa: E731
            shuffled, alpha_bar = torch.nn.functional.pixel_shuffle(x_T, patch), checkpoint.alpha_bar
            states = nb.denoise(checkpoint, shuffled, alpha_bar, nb.step_list(steps), eta=eta, noise=noise)
            torch.testing.assert_close(unshuffle(nb.last_state(states).x, patch), x, rtol=0, atol=2e-4)


def test_no_network_at_hand_names_the_hubs(nb, fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(nb, "BUNDLED", tmp_path)
    with pytest.raises(FileNotFoundError, match=nb.DATA["church"].model) as error:
        fresh("church")
    one_sentence(error)
    monkeypatch.setattr(nb, "DATASETS", ("church",))
    with pytest.raises(FileNotFoundError, match="none of church") as error:
        nb.at_hand()
    one_sentence(error)


def test_what_is_missing_or_outside_the_profile_is_named(nb, copied, fresh, monkeypatch, capsys):
    """Else DATASETS = ("landscapes",) in smoke gives sections without a network, and no reason."""
    monkeypatch.setattr(nb, "DATASETS", ("mnist", "cifar10", "landscapes"))
    shutil.copytree("outputs/checkpoints/landscapes", copied.parent / "landscapes")
    assert [checkpoint.name for checkpoint in nb.at_hand()] == ["mnist"]
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2
    assert nb.DATA["cifar10"].model in lines[0]
    assert lines[1].endswith("smoke: landscapes.")


# ------------------------------------------------------------------------------------ checkpoints from the hub

COMMIT = "0123456789" * 4


@pytest.fixture
def from_hub(nb, fresh, monkeypatch):
    """A function: the hub is in force (though it cannot be asked, the tests are offline), and mnist's model is the given id."""

    def point(model):
        monkeypatch.setattr(nb, "SOURCE_IN_FORCE", "hub")
        monkeypatch.setitem(nb.DATA, "mnist", nb.replace(nb.DATA["mnist"], model=str(model)))

    return point


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "folders"])
def test_a_cached_hub_network_loads(nb, fresh, tiny, from_hub, flat, safe, capfd, caplog):
    """A snapshot in the hub's own cache, without the hub: what a reader has who once ran it online.

    google/ddpm-cifar10-32 has no sub-folders; pokemon and church have .bin weights only, which diffusers logs as an error.
    """
    model = f"someone/{flat}-{safe}"
    cache = nb.Path(nb.huggingface_hub.constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    unet, folder = tiny(1, 32).unet, cache / "snapshots" / COMMIT
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder, safe_serialization=safe)
    for part in ("unet", "scheduler") if flat else ():
        for file in (folder / part).iterdir():
            shutil.move(file, folder / file.name)
        (folder / part).rmdir()
    from_hub(model)
    logging.getLogger("diffusers").addHandler(caplog.handler)
    capfd.readouterr()
    try:
        checkpoint = fresh("mnist")
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert (caplog.messages, capfd.readouterr().err) == ([], ""), "it would stand in the saved notebook"
    assert (checkpoint.source, checkpoint.sha256) == ("hub", COMMIT), "the snapshot's commit stands for the weights"
    assert checkpoint.shape == (1, 32, 32), "the size is the network's own"
    ours, theirs = checkpoint.unet.state_dict(), unet.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_local_folder_in_place_of_the_hubs_id_loads(nb, fresh, tiny, from_hub, tmp_path):
    DDPMPipeline(tiny(1, 32).unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    from_hub(tmp_path / "model")
    assert (fresh("mnist").source, fresh("mnist").sha256) == ("hub", nb.weights_sha256(tmp_path / "model"))


def test_a_hub_that_cannot_be_asked_falls_back_to_the_bundled(nb, fresh, from_hub):
    from_hub("someone/missing")
    assert fresh("mnist").source == fresh("cifar10").source == "bundled"
    assert nb.NOTICES == [f"The hub ({nb.huggingface_hub.constants.ENDPOINT}) cannot be used: HF_HUB_OFFLINE is set."], "once"


# ------------------------------------------------------------------------------------------------- real images


def picture(k):
    return Image.fromarray(np.random.default_rng(k).integers(0, 256, (28, 28), dtype=np.uint8))


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data_dir(nb, monkeypatch, tmp_path):
    """An empty DATA_DIR in force; the FID network is not to be downloaded."""
    folder = tmp_path / "images"
    folder.mkdir()
    monkeypatch.setattr(nb, "DATA_DIR", str(folder))
    real = nb.feature_network

    def without_inception(metric):
        if metric == "FID":
            raise OSError("no weights here")
        return real(metric)

    monkeypatch.setattr(nb, "feature_network", without_inception)
    nb.load_reference.cache_clear()
    yield folder
    nb.load_reference.cache_clear()


def fill(folder, layout, pictures):
    """Pictures under DATA_DIR as an image folder or as a parquet file in the hub's form."""
    if layout == "folder":
        (folder / "mnist").mkdir()
        for k, image in enumerate(pictures):
            image.save(folder / "mnist" / f"{k:03}.png")
    else:
        rows = [{"image": {"bytes": png(image), "path": None}} for image in pictures]
        pd.DataFrame(rows).to_parquet(folder / "mnist.parquet")


@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_own_images_are_read_and_split_and_become_the_reference(nb, data_dir, layout):
    pictures = [picture(k) for k in range(20)]
    fill(data_dir, layout, pictures)
    place = nb.real_place("mnist")
    assert place == data_dir / ("mnist" if layout == "folder" else "mnist.parquet")
    found = nb.real_images(place, "mnist")
    training, heldout = found["train"], found["test"]
    assert nb.NOTICES[-1] == "mnist: 20 pictures read, 4 held out as the reference."
    assert (training.shape, heldout.shape) == ((16, 1, 28, 28), (4, 1, 28, 28)), "a fifth is held out"
    assert training.dtype == heldout.dtype == torch.uint8
    got = sorted(image.numpy().tobytes() for image in torch.cat([training, heldout]))
    assert got == sorted(np.asarray(image).tobytes() for image in pictures), "all, and none in both parts"
    reference = nb.load_reference("mnist", "bundled")
    assert (int(reference.n_real), len(reference.heldout), reference.metric) == (16, 4, "FD-EffNet")


def test_own_statistics_are_computed_once(nb, run, data_dir, monkeypatch):
    """As in another sitting, and in another kernel: the features of real images lie in the cache."""
    fill(data_dir, "folder", [picture(k) for k in range(20)])
    calls, real = [], nb.image_features
    monkeypatch.setattr(nb, "image_features", lambda images, metric: calls.append(len(images)) or real(images, metric))
    first = nb.load_reference("mnist", "bundled")
    nb.load_reference.cache_clear()
    again = nb.load_reference("mnist", "bundled")
    assert calls == [16, 4]
    assert torch.equal(again.floors, first.floors)
    assert (again.metric, int(again.n_real)) == ("FD-EffNet", 16)


def test_a_hub_data_set_that_is_gone_costs_the_distance_not_the_run(nb, monkeypatch):
    nb.load_reference.cache_clear()
    monkeypatch.setattr(nb, "SOURCE_IN_FORCE", "hub")
    monkeypatch.setattr(nb, "fetched", raising(OSError("it is not there")))
    assert nb.load_reference("mnist", "hub") is None
    assert nb.load_reference("mnist", "bundled") is not None
    nb.load_reference.cache_clear()


def test_without_own_images_a_bundled_network_keeps_its_own_reference(nb, monkeypatch):
    nb.load_reference.cache_clear()
    reference = nb.load_reference("mnist", "bundled")
    stored = nb.load_file(nb.BUNDLED / "mnist" / "reference.safetensors")
    assert torch.equal(reference.mean, stored["mean"])
    assert nb.load_reference("nothing", "bundled") is None
    assert nb.load_reference("mnist", "hub") is None, "the reference follows the model: no distance rather than a wrong one"


NO_IMAGES = {
    "nothing": lambda folder: None,
    "another data set": lambda folder: (folder / "cats").mkdir(),
    "empty folder": lambda folder: (folder / "mnist").mkdir(),
    "few": lambda folder: fill(folder, "folder", [picture(k) for k in range(5)]),
    "numbers": lambda folder: pd.DataFrame({"number": [1, 2, 3]}).to_parquet(folder / "mnist.parquet"),
    "no parquet": lambda folder: (folder / "mnist.parquet").write_text("no parquet"),
}


@pytest.mark.parametrize("make", NO_IMAGES.values(), ids=NO_IMAGES)
def test_a_data_dir_without_images_stops(nb, data_dir, make):
    """Not the bundled statistics in silence: the user named a folder to be scored against."""
    make(data_dir)
    with pytest.raises((FileNotFoundError, ValueError), match=re.escape(str(data_dir))) as error:
        nb.load_reference("mnist", "bundled")
    assert "mnist" in one_sentence(error)


def test_pictures_of_another_data_set_leave_the_bundled_reference(nb, data_dir):
    (data_dir / "cifar10").mkdir()
    assert nb.real_place("mnist") is None
    assert nb.load_reference("mnist", "bundled").n_real > 1000


def test_what_was_left_out_is_said(nb, data_dir):
    fill(data_dir, "folder", [picture(k) for k in range(10)])
    (data_dir / "mnist/004.png").write_text("no picture")
    assert len(nb.real_images(nb.real_place("mnist"), "mnist")["train"]) == 7
    said = "mnist: 9 pictures read, 1 left out: 004.png (no format that Pillow reads); 2 held out as the reference."
    assert nb.NOTICES[-1] == said


# ------------------------------------------------------------------------------------------- memory, precision


@pytest.fixture(autouse=True)
def _all_memory(nb):
    nb.FITS.clear()
    yield
    nb.FITS.clear()


def test_out_of_memory_in_sampling_halves_the_batch_for_good_and_gives_the_same_images(nb, tiny, monkeypatch):
    checkpoint = tiny()
    expected = nb.sample_images(checkpoint, range(10), 3)
    monkeypatch.setattr(nb, "batch_of", lambda checkpoint: 8)
    card = Card(monkeypatch, checkpoint.unet, "forward", fits=3)
    images = nb.sample_images(checkpoint, range(10), 3)
    assert (images.int() - expected.int()).abs().max() <= 1
    assert card.sizes[:4] == [8, 4, 2, 2], "halved until it fits"
    assert max(card.sizes[2:]) == 2, "and remembered"
    card.sizes.clear()
    nb.sample_images(checkpoint, range(4), 1)
    assert card.sizes == [2, 2]
    card.fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        nb.sample_images(checkpoint, range(3), 2)


def test_out_of_memory_in_inversion_and_timing_is_survived(nb, tiny, monkeypatch):
    checkpoint = tiny()
    x = nb.image_noise(range(5), checkpoint.shape)
    with torch.inference_mode():
        expected = nb.last_state(nb.invert(checkpoint, x, checkpoint.alpha_bar, [500, 0])).x
        card = Card(monkeypatch, checkpoint.unet, "forward", fits=1)
        found = nb.last_state(nb.invert(checkpoint, x, checkpoint.alpha_bar, [500, 0])).x
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    nb.FITS.clear()
    assert nb.seconds_per_evaluation.__wrapped__(checkpoint) > 0
    assert card.sizes[-4:] == [1] * 4


def test_out_of_memory_in_features_gives_the_same_features(nb, monkeypatch):
    images = torch.stack([torch.from_numpy(np.array(picture(k)))[None] for k in range(6)])
    expected = nb.image_features(images)
    card = Card(monkeypatch, nb.feature_network("FD-EffNet").conv_stem, "forward", fits=2)
    torch.testing.assert_close(nb.image_features(images), expected, rtol=1e-3, atol=1e-4)
    assert nb.FITS["FD-EffNet"] in (1, 2)
    assert max(card.sizes[2:]) <= 2


def test_sampling_holds_one_state_at_a_time(nb, tiny, monkeypatch):
    """At 1000 steps and 256 px the states of one batch would fill tens of gigabytes."""
    whole, alive, most = nb.trajectory, weakref.WeakSet(), []

    def watched(*arguments, **settings):
        for state in whole(*arguments, **settings):
            alive.add(state.x)
            most.append(len(alive))
            yield state

    monkeypatch.setattr(nb, "trajectory", watched)
    nb.sample_images(tiny(), range(2), 20)
    assert len(most) == 20
    assert max(most) <= 3


@pytest.mark.parametrize(
    ("half", "width", "patch", "expected"),
    [("bfloat16", 32, 1, "bfloat16"), ("float16", 32, 4, "float16"), ("bfloat16", 16, 1, "float32"), (None, 32, 1, "float32")],
)
def test_precision_follows_device_and_width(nb, copied, fresh, monkeypatch, half, width, patch, expected):
    monkeypatch.setattr(nb, "HALF", half and getattr(torch, half))
    shape = {"sample_size": 28 // patch, "in_channels": patch**2, "out_channels": patch**2}
    unet = unconditional(block_out_channels=(width, width), **shape)
    DDPMPipeline(unet, DDPMScheduler(prediction_type="sample")).save_pretrained(copied)
    card(copied)
    assert str(fresh("mnist").dtype) == f"torch.{expected}"


@pytest.mark.parametrize(
    ("bf16", "capability", "expected"), [(True, (9, 0), "bfloat16"), (False, (7, 5), "float16"), (False, (6, 1), None)], ids=str
)
def test_the_half_precision_of_a_card_is_what_it_multiplies_fast(monkeypatch, bf16, capability, expected):
    """H100, T4 (which has no bfloat16 and must not fall to float32), and a card before Volta."""
    module = set_up("checked", last="checks")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    process = type("One", (), {"is_main_process": True, "device": torch.device("cuda")})
    module.PartialState = lambda cpu: process
    (source,) = (source for cell, source in cells_tagged("setup") if cell == "environment")
    exec(source, module.__dict__)
    assert module.HALF == (expected and getattr(torch, expected))
    assert torch.backends.cudnn.allow_tf32 is False, "what is called float32 is float32"


def test_float16_that_overflows_is_computed_again_in_float32(nb, tiny):
    half, whole = tiny(dtype=torch.float16), tiny()
    x = nb.image_noise(range(2), half.shape)
    with torch.inference_mode():
        torch.testing.assert_close(half(x, 500), whole(x, 500), rtol=0.1, atol=0.05)
        assert not torch.equal(half(x, 500), whole(x, 500)), "it is another precision"
        for parameter in (*half.unet.conv_in.parameters(), *whole.unet.conv_in.parameters()):
            parameter.mul_(1e6)  # beyond float16's 65,504
        torch.testing.assert_close(half(x, 500), whole(x, 500))
        assert half(x, 500).isfinite().all()
