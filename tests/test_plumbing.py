"""Records, caches, checkpoints, real images and parameters: what must hold when something goes wrong as well."""

import hashlib
import http.client
import inspect
import io
import logging
import os
import re
import shutil
import threading
import time
import types
import typing
import urllib.error
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

DESIGN_NAMES = [
    *("make_alpha_bar", "step_list", "denoise", "invert", "image_noise", "to_uint8", "load_checkpoint"),
    *("sample_images", "image_features", "frechet_distance", "kernel_distance", "record", "say"),
]
COLUMNS = [
    *("run", "metric", "value", "low", "high", "N", "n_real", "dataset"),
    *("method", "eta", "variance", "spacing", "steps", "seed", "detail"),
]
RUN_COLUMNS = ["run", "device", "dtype", "profile", "source", "versions", "code_hash", "models", "date", "minutes"]


def one_sentence(error):
    """The message of an error: one line, ended like a sentence."""
    message = str(error.value.args[0])
    assert "\n" not in message
    assert message.endswith((".", ")")), message
    return message


# ----------------------------------------------------------------------------------------------- names, tables


@pytest.mark.parametrize("name", DESIGN_NAMES)
def test_public_names_are_documented_and_typed(nb, name):
    function = inspect.unwrap(getattr(nb, name))
    assert len(inspect.getdoc(function)) > 60
    hints = typing.get_type_hints(function)
    assert set(inspect.signature(function).parameters) | {"return"} <= set(hints)


def test_the_homeworks_data_sets(nb):
    sizes = {"mnist": (28, 1), "cifar10": (32, 3), "pokemon": (64, 3), "butterflies": (128, 3), "church": (256, 3)}
    assert {name: (spec.size, spec.channels) for name, spec in nb.DATA.items()} == sizes


def test_profiles_are_one_table_of_known_data_sets(nb):
    assert set(nb.PROFILES) == {"smoke", "quick", "full"}
    for plans in nb.PROFILES.values():
        assert set(plans) <= set(nb.DATA)
        for plan in plans.values():
            assert plan.N in nb.LADDER, "else no floor is known at this N"
            assert all(1 <= S <= 1000 for S in plan.ddpm + plan.ddim + plan.sweep)
    assert set(nb.PROFILES["quick"]) == set(nb.PROFILES["full"]) == set(nb.DATA)
    assert 1000 in nb.PROFILES["quick"]["mnist"].ddpm


# -------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("parameter", "value", "allowed"),
    [
        ("PROFILE", "fast", "smoke"),
        ("PROFILE", None, "smoke"),
        ("PROFILE", 3, "smoke"),
        ("SOURCE", "web", "bundled"),
        ("SOURCE", "", "bundled"),
        ("DATA_DIR", "/no/such/folder", "folder"),
        ("DATA_DIR", __file__, "folder"),
        ("DATA_DIR", None, "folder"),
        ("DATA_DIR", 5, "folder"),
        ("OUTPUT_DIR", "", "folder"),
        ("OUTPUT_DIR", None, "folder"),
        ("SEED", -1, "whole number"),
        ("SEED", 2**31, "whole number"),
        ("SEED", 1.0, "whole number"),
        ("SEED", "0", "whole number"),
        ("SEED", True, "whole number"),
        ("DATASETS", (), "mnist"),
        ("DATASETS", ("imagenet",), "mnist"),
        ("DATASETS", ("mnist", "MNIST"), "mnist"),
        ("DATASETS", "mnist", "mnist"),
        ("DATASETS", None, "mnist"),
        ("DATASETS", 3, "mnist"),
        ("DATASETS", [["mnist"]], "mnist"),
        ("CAPTURE_EVERY", 0, "1 to 1000"),
        ("CAPTURE_EVERY", 1001, "1 to 1000"),
        ("CAPTURE_EVERY", 1.5, "1 to 1000"),
        ("TABLE", "/no/such/table.csv", "CSV"),
        ("TABLE", "tests", "CSV"),
        ("TABLE", 5, "CSV"),
        ("PROMPTS", "red apple", "list of texts"),
        ("PROMPTS", [1], "list of texts"),
    ],
)
def test_a_wrong_parameter_stops_set_up(setup_with, parameter, value, allowed):
    with pytest.raises(ValueError, match=parameter) as error:
        setup_with(**{parameter: value})
    message = one_sentence(error)
    assert repr(value) in message
    assert allowed in message


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"PROFILE": "smoke", "SOURCE": "hub", "SEED": 2**31 - 1, "CAPTURE_EVERY": 1},
        {"DATASETS": ["mnist"], "DATA_DIR": os.path.dirname(__file__)},
    ],
    ids=["defaults", "edges", "lists"],
)
def test_right_parameters_pass(setup_with, parameters):
    module = setup_with(**parameters)
    assert all(getattr(module, name) == value for name, value in parameters.items())


def test_the_defaults_are_the_designs(setup_with):
    module = setup_with()
    assert (module.PROFILE, module.SOURCE, module.DATA_DIR, module.SEED) == ("auto", "auto", "", 0)
    assert module.OUTPUT_DIR == "outputs/run"
    assert tuple(module.DATASETS) == ("mnist", "cifar10", "pokemon", "butterflies", "church")


# -------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def asking(nb, monkeypatch):
    """A function: what hub_answers finds when urlopen does as told (the test run itself is offline)."""
    monkeypatch.setattr(nb.huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def ask(urlopen, **settings):
        monkeypatch.setattr(nb.urllib.request, "urlopen", urlopen)
        return nb.hub_answers.__wrapped__(**settings)

    return ask


ANSWER = type("Answer", (), {"status": 200})()


def raising(error):
    def urlopen(*args, **kwargs):
        raise error

    return urlopen


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no name"),
        ConnectionRefusedError(),
        TimeoutError(),
        urllib.error.HTTPError("http://hub", 503, "down", None, None),
        http.client.BadStatusLine("not HTTP"),  # a captive portal's answer; no OSError
    ],
    ids=lambda e: type(e).__name__,
)
def test_no_hub_is_no_error(asking, monkeypatch, error):
    escaped = []
    monkeypatch.setattr(threading, "excepthook", escaped.append)
    assert asking(raising(error)) is False
    assert not escaped, "a traceback of the asking thread would stand in the saved notebook's stderr"


def test_a_hub_that_hangs_is_given_up(asking):
    """A network that drops packets: the name lookup knows no time-out, so the thread is left behind."""
    release = threading.Event()
    started = time.perf_counter()
    try:
        assert asking(lambda *a, **k: release.wait(20) and ANSWER, timeout=0.2) is False
    finally:
        release.set()
    assert time.perf_counter() - started < 5


def test_the_time_out_is_below_ten_seconds(nb):
    assert 1 <= inspect.signature(nb.hub_answers).parameters["timeout"].default < 10


def test_a_hub_that_answers(asking):
    assert asking(lambda *a, **k: ANSWER) is True


def test_offline_is_not_asked(nb, monkeypatch):
    monkeypatch.setattr(nb.urllib.request, "urlopen", raising(AssertionError("asked")))
    assert nb.hub_answers.__wrapped__() is False


# ----------------------------------------------------------------------------------------------------- records


def test_a_row_has_the_designs_columns(nb, run):
    nb.begin("exercise-1")
    row = nb.record("exercise-1", "FD-EffNet", 12.5, low=11, high=14, N=16, dataset="mnist", method="DDIM", eta=0.0)
    frame = nb.results("exercise-1")
    assert list(frame.columns) == COLUMNS
    assert len(frame) == 1
    assert frame["value"][0] == 12.5
    stored = pd.read_csv(run / "results" / "exercise-1.csv", dtype=str, keep_default_na=False).iloc[0]
    assert (stored["N"], stored["low"], stored["eta"]) == ("16", "11", "0.0")
    assert stored["spacing"] == stored["detail"] == "", "what does not apply is empty"
    assert (row.value, row.N, row.method) == (12.5, 16, "DDIM")


def test_a_repeat_replaces_its_row(nb, run):
    same = {"N": 16, "dataset": "mnist", "method": "DDIM", "eta": 0.0, "steps": 5, "seed": 0}
    for value in (1.0, 2.0):
        nb.RUNS.clear()
        nb.begin("exercise-1")
        nb.RUNS["exercise-1"]["run"] = f"exercise-1/smoke/device/2026010{value:.0f}-000000"  # two days
        nb.record("exercise-1", "KID", value, low=value - 1, high=value + 1, **same)
    frame = nb.results("exercise-1")
    assert frame["value"].tolist() == [2.0]
    assert frame["run"].tolist() == ["exercise-1/smoke/device/20260102-000000"]


@pytest.mark.parametrize("column", ["N", "n_real", "dataset", "method", "eta", "variance", "spacing", "steps", "seed"])
def test_another_setting_is_another_row(nb, run, column):
    nb.begin("exercise-1")
    nb.record("exercise-1", "KID", 1.0)
    nb.record("exercise-1", "KID", 2.0, **{column: 7})
    nb.record("exercise-1", "FID", 3.0)
    assert nb.results("exercise-1")["value"].tolist() == [1.0, 2.0, 3.0]


def test_equal_numbers_are_equal_however_written(nb, run):
    nb.begin("s")
    nb.record("s", "KID", 1.0, eta=0, steps=5)
    nb.record("s", "KID", 2.0, eta=0.0, steps=np.int64(5))
    assert nb.results("s")["value"].tolist() == [2.0]
    assert len(nb.results("s", eta=0)) == len(nb.results("s", eta=0.0)) == 1


@pytest.mark.parametrize(("name", "value"), [("PROFILE", "quick"), ("DEVICE_NAME", "another device")])
def test_another_profile_or_device_is_another_row(nb, run, monkeypatch, name, value):
    nb.begin("exercise-1")
    nb.record("exercise-1", "KID", 1.0)
    monkeypatch.setattr(nb, name, value)
    nb.begin("exercise-1")
    nb.record("exercise-1", "KID", 2.0)
    assert nb.results("exercise-1")["value"].tolist() == [1.0, 2.0]


def test_numbers_come_back_as_written(nb, run):
    nb.begin("s")
    value = 0.1 + 0.2
    nb.record("s", "m", value, low=-1e-300, high=12345678.9)
    row = nb.results("s").iloc[0]
    read = (row["value"], float(row["low"]), float(row["high"]))
    assert read == pytest.approx((value, -1e-300, 12345678.9), rel=2e-16, abs=0)  # pandas 2 may lose the last bit


@pytest.mark.parametrize("number", [np.int64(5), np.float32(0.5), torch.tensor(5), torch.tensor(0.5)], ids=repr)
def test_foreign_numbers_are_stored_as_numbers(nb, run, number):
    """Reference.n_real is a tensor: its text form is no number."""
    nb.begin("s")
    nb.record("s", "m", number, n_real=number)
    stored = pd.read_csv(run / "results" / "s.csv", dtype=str).iloc[0]
    assert float(stored["value"]) == float(stored["n_real"]) == float(number)


def test_an_unknown_column_is_refused_before_anything_is_written(nb, run):
    nb.begin("exercise-1")
    with pytest.raises(KeyError, match=r"stepz.*allowed.*steps"):
        nb.record("exercise-1", "KID", 1.0, stepz=5)
    assert nb.results("exercise-1").empty


def test_a_section_not_begun_is_refused(nb, run):
    with pytest.raises(KeyError, match="exercise-9"):
        nb.record("exercise-9", "KID", 1.0)
    assert nb.results("exercise-9").empty


def test_results_are_chosen_by_columns(nb, run):
    nb.begin("s")
    for steps in (5, 10, 50):
        nb.record("s", "KID", steps / 10, steps=steps, eta=0.0, method="DDIM")
    assert nb.results("s", steps=10)["value"].tolist() == [1.0]
    assert nb.results("s", steps=(5, 50), method="DDIM")["value"].tolist() == [0.5, 5.0]
    assert nb.results("s", method="DDPM").empty
    assert nb.results("none").empty


@pytest.mark.parametrize("breaks", ["replace", "to_csv"])
def test_a_failed_write_loses_nothing(nb, run, monkeypatch, breaks):
    nb.begin("s")
    nb.record("s", "KID", 1.0)
    before = (run / "results" / "s.csv").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    target = {"replace": (nb.os, "replace"), "to_csv": (pd.DataFrame, "to_csv")}[breaks]
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        with pytest.raises(OSError, match="No space"):
            nb.record("s", "KID", 2.0, steps=5)
    assert (run / "results" / "s.csv").read_bytes() == before
    nb.record("s", "KID", 3.0, steps=5)
    assert nb.results("s")["value"].tolist() == [1.0, 3.0]


def test_only_the_main_process_writes(nb, run, monkeypatch):
    nb.begin("s")
    monkeypatch.setattr(nb, "PROCESS", type("Second", (), {"is_main_process": False, "wait_for_everyone": lambda: None}))
    assert nb.record("s", "KID", 1.0).value == 1.0
    assert nb.results("s").empty


def test_a_run_is_described(nb, run, tiny):
    nb.begin("s", [(tiny(), 2, 3)])
    nb.finish("s")
    frame = nb.runs()
    assert list(frame.columns) == RUN_COLUMNS
    row = frame.iloc[0]
    assert (row["profile"], row["source"], row["models"]) == ("smoke", nb.SOURCE_IN_FORCE, "tiny=" + "0" * 16)
    assert f"torch={torch.__version__.split('+')[0]}" in row["versions"]
    assert row["code_hash"] == nb.code_hash("s") != ""
    assert nb.RUNS["s"]["run"] == row["run"]


def test_the_plan_is_printed_before_and_the_minutes_after(nb, run, tiny, capsys, monkeypatch):
    monkeypatch.setattr(nb, "seconds_per_evaluation", lambda checkpoint: 0.6)
    nb.begin("s", [(tiny(), 20, 50), (tiny(), 10, 1000)])
    said = capsys.readouterr().out
    assert "30 images" in said
    assert "11,000 network evaluations" in said
    assert "110.0 min" in said  # 11,000 x 0.6 s
    nb.finish("s")
    assert "min" in capsys.readouterr().out


@pytest.fixture
def clock(nb, monkeypatch):
    """A clock that stands until the test moves it, in seconds."""
    now = [1000.0]
    monkeypatch.setattr(nb.time, "perf_counter", lambda: now[0])
    return now


def test_a_run_of_the_same_code_is_continued(nb, run, clock):
    for _ in range(3):
        nb.begin("s")
        clock[0] += 90
        nb.finish("s")
        clock[0] += 7200  # closed for two hours
    frame = nb.runs()
    assert len(frame) == 1
    assert float(frame["minutes"][0]) == pytest.approx(4.5, abs=0.02)  # stored with two decimals


@pytest.mark.parametrize(
    ("name", "value"), [("PROFILE", "quick"), ("DEVICE_NAME", "x"), ("SOURCE_IN_FORCE", "hub"), ("code_hash", lambda *s: "other")]
)
def test_a_run_of_other_code_profile_or_device_is_new(nb, run, monkeypatch, clock, name, value):
    for day in ("20260101-000000", "20260102-000000"):
        monkeypatch.setattr(nb.time, "strftime", lambda form, day=day: day)
        nb.begin("s")
        clock[0] += 60
        nb.finish("s")
        monkeypatch.setattr(nb, name, value)
    assert nb.runs()["minutes"].astype(float).tolist() == [1.0, 1.0]


def test_a_killed_run_is_known_and_continued(nb, run, monkeypatch, clock):
    """Its rows are written when measured, so the line that says where they come from must stand by then."""
    monkeypatch.setattr(nb.time, "strftime", lambda form: "20260101-000000")
    nb.begin("s")
    nb.record("s", "KID", 1.0)
    assert set(nb.results("s")["run"]) <= set(nb.runs()["run"])
    nb.RUNS.clear()  # killed, and started again a day later
    monkeypatch.setattr(nb.time, "strftime", lambda form: "20260102-000000")
    nb.begin("s")
    nb.record("s", "FID", 2.0)
    nb.finish("s")
    assert nb.results("s")["run"].nunique() == len(nb.runs()) == 1


def test_sections_do_not_continue_each_other(nb, run, clock):
    for section in ("exercise-1", "exercise-10"):
        nb.begin(section)
        clock[0] += 60
        nb.finish(section)
    assert nb.runs()["minutes"].astype(float).tolist() == [1.0, 1.0]


def test_code_hash_tells_sections_apart_and_changes_with_the_code(nb, monkeypatch, tmp_path):
    first = nb.code_hash("exercise-1")
    assert first != nb.code_hash("exercise-2")
    text = nb.Path("hw.diffusion.ipynb").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert nb.code_hash("exercise-1") == "", "an exported script elsewhere still runs"
    (tmp_path / "hw.diffusion.ipynb").write_text(text, encoding="utf-8")
    assert nb.code_hash("exercise-1") == first
    changed = text.replace("def make_alpha_bar(", "def  make_alpha_bar(")
    (tmp_path / "hw.diffusion.ipynb").write_text(changed, encoding="utf-8")
    assert nb.code_hash("exercise-1") != first


# ----------------------------------------------------------------------------------------------- say and claim


def test_say_takes_its_numbers_from_rows(nb, run, capsys):
    nb.begin("s")
    a = nb.record("s", "FD", 12.3456, low=10.5, high=14.25, N=16)
    b = nb.record("s", "seconds", 0.25, steps=5)
    nb.say("DDIM scored {a}; {a.value:.1f}, {a:.1f}; {b} s at {b.steps} steps.", {"a": a, "b": b})
    said = capsys.readouterr().out.strip()
    assert said == "DDIM scored 12.3 [10.5, 14.2] (N=16); 12.3, 12.3 [10.5, 14.2] (N=16); 0.25 s at 5 steps."


def test_say_without_its_row_fails(nb):
    with pytest.raises(KeyError, match="missing"):
        nb.say("{missing}", {})


@pytest.mark.parametrize(
    ("holds", "verdict", "value"),
    [(True, "holds", 1.0), (False, "contradicted", 0.0), (None, "undecided", 0.5), (np.True_, "holds", 1.0)],
)
def test_claims_are_said_and_recorded(nb, run, capsys, holds, verdict, value):
    nb.begin("s")
    row = nb.record("s", "gap", 3.0)
    nb.claim("s", "the gap is wide", holds, row, dataset="mnist")
    said = capsys.readouterr().out
    assert verdict in said
    assert "the gap is wide: 3" in said
    stored = nb.results("s", metric="claim").iloc[0]
    assert (stored["value"], stored["detail"], stored["dataset"]) == (value, "the gap is wide", "mnist")


def test_a_claim_with_braces_does_not_stop_the_run(nb, run, capsys):
    nb.begin("s")
    nb.claim("s", r"$\bar\alpha_{t}$ falls", True)
    assert "_{t}" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- cache


def test_memo_computes_once(nb, run):
    calls = []

    def compute():
        calls.append(1)
        return {"a": torch.arange(6).reshape(2, 3).T, "b": torch.tensor([0.5])}

    first, second = (nb.memo("label", {"steps": 5}, compute) for _ in range(2))
    assert len(calls) == 1
    for got in (first, second):
        assert torch.equal(got["a"], torch.arange(6).reshape(2, 3).T)
        assert torch.equal(got["b"], torch.tensor([0.5]))
    assert len(list((run / "cache").iterdir())) == 1, "no partial file stays"


BASE = {"model": "m", "seeds": [0, 16], "steps": 5, "eta": 0.0}


@pytest.mark.parametrize(
    "change", [{"steps": 6}, {"eta": 1.0}, {"seeds": [0, 17]}, {"model": "n"}, {"variance": "large"}], ids=str
)
def test_memos_key_changes_with_the_settings(nb, run, change):
    nb.memo("label", BASE, lambda: {"a": torch.zeros(1)})
    assert float(nb.memo("label", BASE | change, lambda: {"a": torch.ones(1)})["a"]) == 1
    assert float(nb.memo("label", dict(reversed(BASE.items())), lambda: {"a": torch.ones(1)})["a"]) == 0


def other_denoise(*args, **kwargs):
    """Stands for the sampler after an edit."""


@pytest.mark.parametrize(
    "name",
    [
        *("denoise", "step_pairs", "step_list", "image_noise", "mix64", "half_normal_table", "to_uint8"),
        *("trajectory", "sample_images", "image_features", "feature_network"),
    ],
)
def test_memos_key_changes_with_the_sampling_code(nb, run, monkeypatch, name):
    """A cache that survives an edit of what made it would give yesterday's numbers."""
    nb.memo("label", BASE, lambda: {"a": torch.zeros(1)})
    monkeypatch.setattr(nb, name, other_denoise)
    assert float(nb.memo("label", BASE, lambda: {"a": torch.ones(1)})["a"]) == 1


@pytest.mark.parametrize("name", ["DEVICE_NAME", "VERSIONS"])
def test_memos_key_changes_with_the_machine(nb, run, monkeypatch, name):
    nb.memo("label", BASE, lambda: {"a": torch.zeros(1)})
    monkeypatch.setattr(nb, name, {"torch": "0"} if name == "VERSIONS" else "other")
    assert float(nb.memo("label", BASE, lambda: {"a": torch.ones(1)})["a"]) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_memo_keeps_nothing_of_a_failed_computation(nb, run, error):
    def fails():
        raise error

    with pytest.raises(error):
        nb.memo("label", BASE, fails)
    assert float(nb.memo("label", BASE, lambda: {"a": torch.ones(1)})["a"]) == 1


def test_memo_keeps_nothing_of_a_write_that_died(nb, run, monkeypatch):
    """Killed between writing and renaming: what lies there under another name is not taken for the result."""
    with monkeypatch.context() as patch:
        patch.setattr(nb.os, "replace", raising(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            nb.memo("label", BASE, lambda: {"a": torch.zeros(1)})
    assert float(nb.memo("label", BASE, lambda: {"a": torch.ones(1)})["a"]) == 1


# ----------------------------------------------------------------------------------------------------- measure


def few_features(images, metric="FD-EffNet"):
    """Stands for the feature network: cheap, and different for every image."""
    return images.float().flatten(1)[:, :6]


@pytest.fixture
def counting(nb, run, monkeypatch):
    """Cheap features, and the seeds of every call of sample_images; `kill_at` interrupts the call of that number."""
    calls, real = [], nb.sample_images

    # functools.wraps keeps the source that memo hashes: the cache must not see that calls are counted
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


def test_measure_is_the_features_of_the_images(nb, tiny, counting):
    checkpoint = tiny()
    measured = nb.measure(checkpoint, 10, 3, 1.0, chunk=4)
    expected = few_features(counting.__wrapped__(checkpoint, range(10), 3, 1.0))
    assert counting.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert (measured.features - expected).abs().max() <= 1, "in seed order; one level for another batch"
    assert measured.seconds > 0


@pytest.mark.parametrize("kill_at", [0, 1, 2])
def test_an_interrupted_measurement_resumes_to_the_same_numbers(nb, tiny, counting, monkeypatch, tmp_path, kill_at):
    checkpoint, unbroken = tiny(), {}
    unbroken = nb.measure(checkpoint, 10, 3, 1.0, chunk=4)
    monkeypatch.setattr(nb, "OUTPUT", tmp_path / "second")
    counting.calls.clear()
    counting.kill_at = kill_at
    with pytest.raises(KeyboardInterrupt):
        nb.measure(checkpoint, 10, 3, 1.0, chunk=4)
    resumed = nb.measure(checkpoint, 10, 3, 1.0, chunk=4)
    assert torch.equal(resumed.features, unbroken.features)
    assert counting.calls == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]], "no finished chunk twice"
    again = nb.measure(checkpoint, 10, 3, 1.0, chunk=4)
    assert len(counting.calls) == 3
    assert torch.equal(again.features, unbroken.features)
    assert again.seconds == resumed.seconds


def test_measure_starts_at_the_seed(nb, tiny, counting, monkeypatch):
    monkeypatch.setattr(nb, "SEED", 30)
    nb.measure(tiny(), 5, 2, chunk=3)
    assert counting.calls == [[30, 31, 32], [33, 34]]


@pytest.mark.parametrize(
    "change",
    [{"control": "untrained"}, {"sha256": "1" * 64}, {"control": "shuffled", "t_map": tuple(range(1000))}],
    ids=["control", "weights", "shuffled"],
)
def test_another_network_is_measured_anew(nb, tiny, counting, change):
    nb.measure(tiny(), 2, 2)
    nb.measure(tiny(**change), 2, 2)
    assert len(counting.calls) == 2


@pytest.mark.parametrize("N", [2, 3, 9])
def test_another_number_of_images_is_not_the_cached_chunk(nb, tiny, counting, N):
    nb.measure(tiny(), 6, 2, chunk=4)
    assert len(nb.measure(tiny(), N, 2, chunk=4).features) == N


def test_measure_passes_its_settings_on(nb, tiny, counting):
    checkpoint = tiny()
    free, spaced = nb.measure(checkpoint, 2, 3, clip=None), nb.measure(checkpoint, 2, 3, spacing="trailing")
    default = nb.measure(checkpoint, 2, 3)
    assert len(counting.calls) == 3
    assert not torch.equal(spaced.features, default.features)
    assert not torch.equal(free.features, default.features)


def test_measured_chunks_hold_features_and_the_first_images_alone(nb, tiny, counting, monkeypatch):
    monkeypatch.setattr(nb, "SEED", 7)
    checkpoint = tiny()
    measured = nb.measure(checkpoint, 40, 2, chunk=8)
    stored = [nb.load_file(f) for f in (nb.OUTPUT / "cache").glob("*.safetensors")]
    assert {tuple(v["features"].shape) for v in stored} == {(8, 6)}
    assert sorted(len(v["first"]) for v in stored) == [0, 0, 0, 4, 8]
    expected = counting.__wrapped__(checkpoint, range(7, 19), 2)
    assert (measured.first.int() - expected.int()).abs().max() <= 1, "the images of the first twelve seeds"


@pytest.fixture
def reference(nb, monkeypatch):
    """A Reference of random features, as load_file gives it, in force for every checkpoint."""
    draw = torch.Generator().manual_seed(0)
    made = nb.make_reference(torch.randn(200, 6, generator=draw), torch.randn(40, 6, generator=draw))
    monkeypatch.setattr(nb, "load_reference", lambda checkpoint: made)
    return made


def test_score_records_distance_kid_and_floor(nb, run, tiny, reference):
    nb.begin("s")
    features = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
    row = nb.score("s", tiny(), features, method="DDIM", eta=0.0, steps=5)
    frame = nb.results("s")
    assert list(zip(frame["metric"], frame["method"], strict=True)) == [
        ("FD-EffNet", "DDIM"),
        ("KD-EffNet", "DDIM"),
        ("FD-EffNet", "real"),
    ]
    assert set(frame["N"].astype(int)) == {32}
    assert frame["n_real"].astype(int).tolist() == [200, 40, 200]
    assert row.value == frame["value"][0] == pytest.approx(reference.distance(features))
    assert frame["value"][1] == pytest.approx(nb.kernel_distance(features, reference.heldout))
    assert frame["value"][2] == pytest.approx(float(reference.floors[1, 1]))
    assert (frame["low"].astype(float) <= frame["value"]).all()
    assert (frame["value"] <= frame["high"].astype(float)).all()


def test_a_difference_is_that_of_the_distances_and_decides_where_its_interval_leaves_out_zero(nb, run, tiny, reference):
    nb.begin("s")
    draw = torch.Generator().manual_seed(2)
    near, far = torch.randn(64, 6, generator=draw), 1 + torch.randn(64, 6, generator=draw)
    gap = nb.difference("s", tiny(), near, far, "near minus far")
    assert gap.value == pytest.approx(reference.distance(near) - reference.distance(far))
    assert gap.low < gap.value < gap.high < 0
    assert nb.smaller(gap) is True
    assert nb.smaller(nb.difference("s", tiny(), far, near, "far minus near")) is False
    assert nb.smaller(nb.difference("s", tiny(), near, near.flip(0), "the same images in another order")) is None
    stored = nb.results("s", detail="near minus far").iloc[0]
    assert (stored["metric"], stored["N"], stored["value"]) == ("FD-EffNet difference", "64", gap.value)


def test_the_difference_leaves_out_the_same_seeds_on_both_sides(nb, run, tiny, reference):
    """Where both sides share what makes them scatter, the difference is known better than either distance."""
    nb.begin("s")
    shared = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
    gap = nb.difference("s", tiny(), shared, shared + 0.02, "shifted")
    alone = nb.jackknife(reference.distance, shared)
    assert gap.high - gap.low < 0.2 * (alone[2] - alone[1])


def test_without_a_reference_no_distance_is_given(nb, run, tiny, monkeypatch):
    monkeypatch.setattr(nb, "load_reference", lambda checkpoint: None)
    nb.begin("s")
    assert nb.score("s", tiny(), torch.zeros(4, 6)) is None
    assert nb.results("s").empty


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


def test_an_intact_copy_loads(copied, fresh):
    assert fresh("mnist").source == "bundled"


@pytest.mark.parametrize("name", ["imagenet", "MNIST", ""])
def test_an_unknown_name(fresh, name):
    with pytest.raises(KeyError, match="allowed: mnist, cifar10") as error:
        fresh(name)
    assert repr(name) in one_sentence(error)


def test_a_card_with_another_hash(copied, fresh):
    text = (copied / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((copied / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert digest in text
    (copied / "README.md").write_text(text.replace(digest, digest[::-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="SHA-256") as error:
        fresh("mnist")
    assert str(copied) in one_sentence(error)
    assert "restore" in str(error.value)


def test_weights_with_one_bit_changed(copied, fresh):
    path = copied / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="SHA-256"):
        fresh("mnist")


@pytest.mark.parametrize("missing", ["README.md", "unet/diffusion_pytorch_model.safetensors"])
def test_an_incomplete_folder_is_not_loaded(copied, fresh, missing):
    (copied / missing).unlink()
    with pytest.raises((ValueError, FileNotFoundError)):
        fresh("mnist")


@pytest.mark.parametrize(("channels", "patch"), [(3, 1), (2, 1), (3, 4)])
def test_a_network_of_the_wrong_channels(nb, copied, fresh, tiny, channels, patch):
    DDPMPipeline(tiny(channels, 28, patch).unet, DDPMScheduler()).save_pretrained(copied)
    card(copied)
    with pytest.raises(ValueError, match=rf"mnist: .*{channels * patch**2} channels .* 1 x 28") as error:
        fresh("mnist")
    one_sentence(error)


def test_a_network_of_a_size_that_does_not_divide(copied, fresh, tiny):
    DDPMPipeline(tiny(1, 10).unet, DDPMScheduler()).save_pretrained(copied)
    card(copied)
    with pytest.raises(ValueError, match="does not fit"):
        fresh("mnist")


@pytest.mark.parametrize("patch", [1, 2])
def test_a_network_on_unshuffled_pixels_is_recognised(nb, copied, fresh, tiny, patch):
    DDPMPipeline(tiny(1, 28, patch).unet.half(), DDPMScheduler()).save_pretrained(copied)
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


def unconditional(**changes):
    """A small network of mnist's shape with another config than the notebook can serve."""
    settings = {"sample_size": 28, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4}
    settings |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    return UNet2DModel(**settings | changes)


@pytest.mark.parametrize(
    ("network", "schedule", "reason"),
    [
        ({"num_class_embeds": 10}, {}, "told a class"),
        ({"class_embed_type": "timestep"}, {}, "told a class"),
        ({"out_channels": 2}, {}, "variance"),
        ({}, {"variance_type": "learned_range"}, "variance"),
        ({"sample_size": (28, 24)}, {}, r"size .*28, 24.* is not one number"),
        ({"sample_size": None}, {}, "size None is not one number"),
        ({}, {"num_train_timesteps": 4000}, "T = 4000, not 1000"),
        ({}, {"rescale_betas_zero_snr": True}, "ends in pure noise"),
    ],
)
def test_a_network_that_cannot_be_served_is_refused(copied, fresh, network, schedule, reason):
    DDPMPipeline(unconditional(**network), DDPMScheduler(**schedule)).save_pretrained(copied)
    card(copied)
    with pytest.raises(ValueError, match=f"mnist: the bundled network cannot be used here, because .*{reason}") as error:
        fresh("mnist")
    one_sentence(error)


def test_an_unknown_objective_is_refused(copied, fresh, tiny):
    DDPMPipeline(tiny(1, 28).unet, DDPMScheduler()).save_pretrained(copied)
    config = copied / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"flow"'))
    card(copied)
    with pytest.raises(ValueError, match="it predicts 'flow'"):
        fresh("mnist")


def test_a_size_written_as_a_list_is_served(nb, copied, fresh):
    DDPMPipeline(unconditional(sample_size=(28, 28)), DDPMScheduler()).save_pretrained(copied)
    card(copied)
    assert fresh("mnist").patch == 1
    assert nb.sample_images(fresh("mnist"), [0], 1).shape == (1, 1, 28, 28)


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
    pipeline = DDIMPipeline.from_pretrained(copied)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        2, generator=torch.Generator().manual_seed(0), num_inference_steps=5, use_clipped_model_output=True, output_type="pt"
    )
    x_T = torch.randn(2, patch**2, 28 // patch, 28 // patch, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        shuffled = torch.nn.functional.pixel_shuffle(x_T, patch)
        ours = nb.last_state(nb.denoise(checkpoint, shuffled, checkpoint.alpha_bar, nb.step_list(5))).x
    theirs = torch.nn.functional.pixel_shuffle(theirs.images, patch)
    assert (nb.to_uint8(ours).int() - (theirs * 255).round().int()).abs().max() <= 1, "the same pictures"


@pytest.mark.parametrize("name", ["mnist", "cifar10", "church"])
def test_no_network_at_hand_names_the_hubs(nb, fresh, monkeypatch, tmp_path, name):
    monkeypatch.setattr(nb, "BUNDLED", tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        fresh(name)
    assert nb.DATA[name].model in one_sentence(error)


def test_what_is_missing_is_one_line_each(nb, copied, fresh, monkeypatch, capsys):
    monkeypatch.setattr(nb, "DATASETS", ("mnist", "cifar10"))
    assert [checkpoint.name for checkpoint in nb.at_hand()] == ["mnist"]
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    assert nb.DATA["cifar10"].model in lines[0]


def test_a_data_set_outside_the_profile_is_named_too(nb, copied, fresh, monkeypatch, capsys):
    """Else DATASETS = ("church",) in smoke gives sections without a network, and no reason."""
    monkeypatch.setattr(nb, "DATASETS", ("mnist", "church"))
    assert [checkpoint.name for checkpoint in nb.at_hand()] == ["mnist"]
    assert "church" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ checkpoints from the hub

COMMIT = "0123456789" * 4


def save_flat(pipe, folder, safe):
    """google/ddpm-cifar10-32's layout: model_index.json, config.json, scheduler_config.json, weights, no sub-folders."""
    pipe.save_pretrained(folder, safe_serialization=safe)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            shutil.move(file, folder / file.name)
        (folder / part).rmdir()


def save_folders(pipe, folder, safe):
    pipe.save_pretrained(folder, safe_serialization=safe)


LAYOUTS = {
    "folders, safetensors": (save_folders, True),
    "folders, bin": (save_folders, False),
    "flat, safetensors": (save_flat, True),
    "flat, bin": (save_flat, False),
}


@pytest.fixture
def from_hub(nb, fresh, monkeypatch):
    """A function: the hub is in force (answering or not), and mnist's model is the given id."""

    def point(model, answers):
        monkeypatch.setattr(nb, "SOURCE_IN_FORCE", "hub")
        monkeypatch.setattr(nb, "hub_answers", lambda: answers)
        monkeypatch.setitem(nb.DATA, "mnist", nb.replace(nb.DATA["mnist"], model=str(model)))

    return point


def same_weights(checkpoint, unet):
    ours, theirs = checkpoint.unet.state_dict(), unet.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cached_hub_network_loads(nb, fresh, tiny, from_hub, layout, request):
    """A snapshot in the hub's own cache, without the hub: what a reader has who once ran it online."""
    model = f"someone/{request.node.callspec.indices['layout']}"
    cache = nb.Path(nb.huggingface_hub.constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    save, safe = LAYOUTS[layout]
    unet = tiny(1, 32).unet
    save(DDPMPipeline(unet, DDPMScheduler()), cache / "snapshots" / COMMIT, safe)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    from_hub(model, answers=False)
    checkpoint = fresh("mnist")
    assert (checkpoint.source, checkpoint.sha256) == ("hub", COMMIT), "the snapshot's commit stands for the weights"
    assert checkpoint.shape == (1, 32, 32), "the size is the network's own"
    assert same_weights(checkpoint, unet)


@pytest.mark.parametrize("answers", [True, False])
def test_a_local_folder_in_place_of_the_hubs_id_loads(fresh, tiny, from_hub, tmp_path, answers):
    unet = tiny(1, 32).unet
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    from_hub(tmp_path / "model", answers)
    checkpoint = fresh("mnist")
    assert checkpoint.source == "hub"
    assert checkpoint.sha256 != ""
    assert same_weights(checkpoint, unet)


class Listening(logging.Handler):
    """Keeps what a library logs at the level its own handler would print to stderr."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def test_loading_bin_weights_leaves_no_stderr(fresh, tiny, from_hub, nb, capfd):
    """pokemon and church have .bin weights only; diffusers logs that as an error, which would stay in the notebook."""
    cache = nb.Path(nb.huggingface_hub.constants.HF_HUB_CACHE) / "models--someone--quiet"
    pipe = DDPMPipeline(tiny(1, 32).unet, DDPMScheduler())
    pipe.save_pretrained(cache / "snapshots" / COMMIT, safe_serialization=False)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    from_hub("someone/quiet", answers=False)
    library, listening = logging.getLogger("diffusers"), Listening()
    library.addHandler(listening)
    capfd.readouterr()
    try:
        assert fresh("mnist").source == "hub"
    finally:
        library.removeHandler(listening)
    assert listening.lines == []
    assert capfd.readouterr().err == ""


def test_a_hub_without_the_network_falls_back_to_the_bundled(nb, fresh, from_hub, capsys):
    from_hub("someone/missing", answers=False)
    assert fresh("mnist").source == "bundled"
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1
    assert "someone/missing" in lines[0]


def test_a_hub_network_of_the_wrong_channels(nb, fresh, tiny, from_hub):
    cache = nb.Path(nb.huggingface_hub.constants.HF_HUB_CACHE) / "models--someone--colour"
    DDPMPipeline(tiny(3, 32).unet, DDPMScheduler()).save_pretrained(cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)
    from_hub("someone/colour", answers=False)
    with pytest.raises(ValueError, match="3 channels does not fit"):
        fresh("mnist")


# ------------------------------------------------------------------------------------------------- real images


def picture(k, size=(28, 28), mode="L"):
    draw = np.random.default_rng(k)
    return Image.fromarray(draw.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


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
    nb.reference_of.cache_clear()
    yield folder
    nb.reference_of.cache_clear()


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
def test_own_images_are_read_and_split(nb, data_dir, layout):
    pictures = [picture(k) for k in range(20)]
    fill(data_dir, layout, pictures)
    training, heldout = nb.real_images("mnist")
    assert (training.shape, heldout.shape) == ((16, 1, 28, 28), (4, 1, 28, 28)), "a fifth is held out"
    assert training.dtype == heldout.dtype == torch.uint8
    wanted = {np.asarray(image).tobytes() for image in pictures}
    got = [image.numpy().tobytes() for image in torch.cat([training, heldout])]
    assert set(got) == wanted
    assert len(got) == len(set(got)), "none in both parts"
    again = nb.real_images("mnist")
    assert torch.equal(again[0], training)
    assert torch.equal(again[1], heldout)


def test_a_parquet_files_own_test_split_is_held_out(nb, data_dir):
    rows = [{"image": {"bytes": png(picture(k)), "path": None}, "split": "test" if k % 3 == 0 else "train"} for k in range(9)]
    pd.DataFrame(rows).to_parquet(data_dir / "mnist.parquet")
    training, heldout = nb.real_images("mnist")
    assert (len(training), len(heldout)) == (6, 3)
    assert heldout[1].numpy().tobytes() == np.asarray(picture(3)).tobytes()


@pytest.mark.parametrize(("size", "mode"), [((56, 28), "L"), ((30, 90), "RGB"), ((100, 100), "RGBA"), ((7, 7), "1")])
def test_images_of_any_shape_and_mode_are_prepared(nb, size, mode):
    prepared = nb.prepare({"bytes": png(picture(0, size, mode)), "path": None}, nb.DATA["mnist"])
    assert (prepared.shape, prepared.dtype) == ((1, 28, 28), torch.uint8)
    colour = nb.prepare({"bytes": png(picture(0, size, mode)), "path": None}, nb.DATA["cifar10"])
    assert colour.shape == (3, 32, 32)


def test_images_are_cropped_at_the_centre(nb):
    """Black, white, black thirds: what is left of the middle square is white; channels come first."""
    wide = np.zeros((28, 84, 3), np.uint8)
    wide[:, 28:56] = (255, 100, 0)
    got = nb.prepare({"bytes": png(Image.fromarray(wide)), "path": None}, nb.replace(nb.DATA["cifar10"], size=28))
    assert [got[c].unique().tolist() for c in range(3)] == [[255], [100], [0]]


def test_own_images_become_the_reference(nb, tiny, data_dir):
    fill(data_dir, "folder", [picture(k) for k in range(20)])
    reference = nb.load_reference(tiny(1, 28, name="mnist"))
    assert (int(reference.n_real), len(reference.heldout), reference.metric) == (16, 4, "FD-EffNet")
    bundled = nb.Reference(**nb.load_file(nb.BUNDLED / "mnist" / "reference.safetensors"))
    assert int(bundled.n_real) != 16


def test_own_statistics_are_computed_once_for_a_network_and_its_controls(nb, run, tiny, data_dir, monkeypatch):
    fill(data_dir, "folder", [picture(k) for k in range(20)])
    calls, real = [], nb.image_features
    counted = nb.functools.wraps(real)(lambda *args: calls.append(len(args[0])) or real(*args))
    monkeypatch.setattr(nb, "image_features", counted)
    first = nb.load_reference(tiny(1, 28, name="mnist"))
    assert nb.load_reference(tiny(1, 28, name="mnist", control="untrained")) is first
    nb.reference_of.cache_clear()  # as in another sitting
    again = nb.load_reference(tiny(1, 28, name="mnist"))
    assert calls == [16, 4]
    assert torch.equal(again.floors, first.floors)
    assert (again.metric, int(again.n_real)) == ("FD-EffNet", 16)


def test_a_hub_data_set_that_is_gone_costs_the_distance_not_the_run(nb, tiny, monkeypatch, capsys):
    nb.reference_of.cache_clear()
    monkeypatch.setattr(nb, "real_source", lambda name: {"path": "no/such", "streaming": True})

    def gone(name, most):
        raise FileNotFoundError(f"{name}: no images could be read from no/such.")

    monkeypatch.setattr(nb, "real_images", gone)
    assert nb.load_reference(tiny(1, 28, name="mnist", source="hub")) is None
    assert capsys.readouterr().out.count("\n") == 1
    nb.reference_of.cache_clear()


def test_without_own_images_a_bundled_network_keeps_its_own_reference(nb, tiny, monkeypatch):
    nb.reference_of.cache_clear()
    reference = nb.load_reference(tiny(1, 28, name="mnist"))
    stored = nb.load_file(nb.BUNDLED / "mnist" / "reference.safetensors")
    assert torch.equal(reference.mean, stored["mean"])
    assert nb.load_reference(tiny(name="nothing")) is None
    hub = tiny(1, 28, name="mnist", source="hub")
    assert nb.load_reference(hub) is None, "the reference follows the model: no distance rather than a wrong one"


def test_a_data_dir_without_images_stops(nb, tiny, data_dir):
    """Not the bundled statistics in silence: the user named a folder to be scored against."""
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        nb.load_reference(tiny(1, 28, name="mnist"))
    assert "mnist" in one_sentence(error)


def empty_folder(folder):
    (folder / "mnist").mkdir()


def folder_of_text(folder):
    (folder / "mnist").mkdir()
    (folder / "mnist" / "notes.txt").write_text("no image")


def empty_parquet(folder):
    pd.DataFrame({"image": []}).to_parquet(folder / "mnist.parquet")


def parquet_without_images(folder):
    pd.DataFrame({"number": [1, 2, 3]}).to_parquet(folder / "mnist.parquet")


def not_a_parquet(folder):
    (folder / "mnist.parquet").write_text("no parquet")


@pytest.mark.parametrize(
    "make", [lambda folder: None, empty_folder, folder_of_text, empty_parquet, parquet_without_images, not_a_parquet]
)
def test_real_images_without_images(nb, data_dir, make):
    make(data_dir)
    with pytest.raises((FileNotFoundError, ValueError)) as error:
        nb.real_images("mnist")
    assert "mnist" in one_sentence(error)


def garbage(data):
    return b"not an image"


def truncated(data):
    return data[: len(data) // 2]


def empty(data):
    return b""


def corrupted(data):
    return data[:60] + bytes(b ^ 0x55 for b in data[60:120]) + data[120:]


@pytest.mark.parametrize("harm", [garbage, truncated, empty, corrupted])
@pytest.mark.parametrize("layout", ["folder", "parquet"])
def test_an_unreadable_image_is_named(nb, data_dir, layout, harm):
    """By its file; or, within a parquet file, by the file and something that finds the row."""
    pictures = [picture(k) for k in range(6)]
    broken = harm(png(pictures[4]))
    if layout == "folder":
        fill(data_dir, "folder", pictures)
        (data_dir / "mnist" / "004.png").write_bytes(broken)
    else:
        rows = [{"image": {"bytes": broken if k == 4 else png(p), "path": None}} for k, p in enumerate(pictures)]
        pd.DataFrame(rows).to_parquet(data_dir / "mnist.parquet")
    with pytest.raises(ValueError, match="not a readable image") as error:
        nb.real_images("mnist")
    message = one_sentence(error).replace(str(data_dir), "")
    if layout == "folder":
        assert "004.png" in message
    else:
        assert "mnist.parquet" in message
        assert re.search(r"\b[45]\b", message), "the row, counted from 0 or 1"


# ------------------------------------------------------------------------------------- what was left out above


def test_an_interval_not_given_reads_back_as_nan(nb, run):
    nb.begin("s")
    nb.record("s", "m", 1.0, low=0.5, high=2)
    nb.record("s", "n", 1.0)
    frame = nb.results("s")
    assert frame[["value", "low", "high"]].dtypes.unique().tolist() == [np.dtype(float)]
    assert frame["low"].isna().tolist() == frame["high"].isna().tolist() == [False, True]
    assert frame[["low", "high"]].iloc[0].tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("columns", "plain", "fixed"),
    [
        ({}, "3.14", "3.1"),
        ({"N": 16}, "3.14 (N=16)", "3.1 (N=16)"),
        ({"low": 3.0, "high": 3.25}, "3.14 [3, 3.25]", "3.1 [3.0, 3.2]"),
        ({"low": float("nan"), "high": float("nan")}, "3.14", "3.1"),
        ({"low": None, "high": None}, "3.14", "3.1"),
        ({"value": 1234.5, "low": 987.6, "high": 12345.0}, "1,230 [988, 12,300]", "1234.5 [987.6, 12345.0]"),
        ({"value": 0.000123456}, "0.000123", "0.0"),
    ],
    ids=str,
)
def test_a_rows_format(nb, columns, plain, fixed):
    row = nb.Row(dict.fromkeys(COLUMNS, "") | {"value": 3.14159} | columns)
    assert (f"{row}", f"{row:.1f}") == (plain, fixed)


# ------------------------------------------------------- plans of hub networks, memory, precision, compiler


@pytest.fixture
def hub_plan(nb, run, tiny, monkeypatch):
    """A function: the plan of a hub network whose evaluation takes so many seconds."""
    monkeypatch.setattr(nb, "PROFILE", "quick")

    def plan(seconds, name="mnist"):
        monkeypatch.setattr(nb, "seconds_per_evaluation", lambda checkpoint: seconds)
        return nb.plan_of(tiny(name=name, source="hub"))

    return plan


def test_a_bundled_networks_plan_is_the_profiles(nb, run, tiny, monkeypatch):
    monkeypatch.setattr(nb, "PROFILE", "quick")
    monkeypatch.setattr(nb, "seconds_per_evaluation", lambda checkpoint: pytest.fail("a fixed plan times nothing"))
    assert nb.plan_of(tiny(name="mnist")) == nb.PROFILES["quick"]["mnist"]


def test_a_fast_hub_network_keeps_the_profiles_plan(nb, hub_plan):
    assert hub_plan(1e-6) == nb.PROFILES["quick"]["mnist"]


def test_a_slower_hub_network_gets_fewer_images(nb, hub_plan, capsys):
    whole = nb.PROFILES["quick"]["mnist"]
    plan = hub_plan(0.002)
    assert 16 <= plan.N < whole.N
    assert (plan.ddpm, plan.ddim) == (whole.ddpm, whole.ddim)
    assert f"N = {plan.N}" in capsys.readouterr().out
    assert plan.N_long <= plan.N


def test_a_slow_hub_network_drops_the_longest_chain(nb, hub_plan):
    plan = hub_plan(0.0075)
    assert plan.N == 16
    assert max(plan.ddpm) < 1000


def test_a_hopeless_hub_network_is_left_out(nb, hub_plan, tiny, monkeypatch, capsys):
    assert hub_plan(100.0).N == 0
    monkeypatch.setattr(nb, "load_checkpoint", lambda name: tiny(name=name, source="hub"))
    monkeypatch.setattr(nb, "DATASETS", ("mnist",))
    with pytest.raises(FileNotFoundError, match="none of mnist can be run") as error:
        nb.at_hand()
    one_sentence(error)
    assert "mnist: left out" in capsys.readouterr().out


def test_a_plan_once_made_is_kept(hub_plan):
    first = hub_plan(0.002)
    assert hub_plan(1e-6) == first, "a resumed run keeps its N"


def test_out_of_memory_halves_the_batch_and_gives_the_same_images(nb, tiny, monkeypatch, capsys):
    checkpoint, whole = tiny(), nb.trajectory
    expected = nb.sample_images(checkpoint, range(10), 3)

    def short_of_memory(checkpoint, seeds, *arguments, **settings):
        if len(seeds) > 3:
            raise torch.OutOfMemoryError("as a GPU would")
        return whole(checkpoint, seeds, *arguments, **settings)

    monkeypatch.setattr(nb, "batch_of", lambda checkpoint: 8)
    monkeypatch.setattr(nb, "trajectory", short_of_memory)
    images = nb.sample_images(checkpoint, range(10), 3)
    assert (images.int() - expected.int()).abs().max() <= 1
    assert capsys.readouterr().out.count("out of memory") == 2


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


def test_timing_halves_its_batch_when_memory_runs_out(nb, tiny, monkeypatch):
    checkpoint, sizes = tiny(), []

    def small_card(self, x, t):
        sizes.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("full")
        return x

    monkeypatch.setattr(nb.Checkpoint, "__call__", small_card)
    monkeypatch.setattr(nb, "batch_of", lambda checkpoint: 16)
    assert nb.seconds_per_evaluation.__wrapped__(checkpoint) > 0
    assert sizes == [16, 8, 4, 4, 4, 4]


def test_out_of_memory_with_one_image_is_an_error(nb, tiny, monkeypatch):
    def never(*arguments, **settings):
        raise torch.OutOfMemoryError("as a GPU would")

    monkeypatch.setattr(nb, "trajectory", never)
    with pytest.raises(torch.OutOfMemoryError):
        nb.sample_images(tiny(), range(3), 2)


def test_a_failing_compiler_falls_back_with_one_line(nb, monkeypatch, capsys):
    network = torch.nn.Linear(2, 2)

    def broken(module):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(nb.torch, "compile", broken)
    assert nb.compiled(network, (torch.zeros(1, 2),)) is network
    assert capsys.readouterr().out.count("\n") == 1


def test_a_compiler_that_fails_at_the_first_call_falls_back_too(nb, monkeypatch, capsys):
    network = torch.nn.Linear(2, 2)

    def later(module):
        def call(*arguments):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(nb.torch, "compile", later)
    assert nb.compiled(network, (torch.zeros(1, 2),)) is network


@pytest.mark.parametrize(
    ("has", "width", "predicts", "patch", "expected"),
    [
        (True, 64, "epsilon", 1, "bfloat16"),
        (True, 64, "epsilon", 2, "bfloat16"),
        (True, 64, "epsilon", 4, "float32"),
        (True, 64, "sample", 4, "bfloat16"),
        (True, 16, "epsilon", 1, "float32"),
        (False, 64, "sample", 1, "float32"),
    ],
)
def test_precision_follows_device_width_and_what_is_predicted(nb, monkeypatch, has, width, predicts, patch, expected):
    monkeypatch.setattr(nb, "HAS_BF16", has)
    unet = types.SimpleNamespace(config=types.SimpleNamespace(block_out_channels=(width, 64)))
    assert str(nb.network_dtype(unet, predicts, patch)) == f"torch.{expected}"


def test_minutes_grow_with_every_result(nb, run, clock):
    nb.begin("s")
    clock[0] += 120
    nb.record("s", "KID", 1.0)
    assert float(nb.runs()["minutes"].iloc[0]) == pytest.approx(2.0)
