"""What happens to a run from outside: kills, a second run, full disks, strange folders, damaged files, and what it may touch."""

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from kill_study import compare, survive
from shared import ENVIRONMENT, NOTEBOOK, ROOT, attempt, code_cells, papermill, some_sections

SENTENCE = r"[A-Z]\w+Error: (.+)"


def last_sentence(done):
    """The error that a failed papermill shows: its last line, which must be one sentence."""
    assert done.returncode != 0
    (*_, said) = re.findall(SENTENCE, done.stderr)
    assert said.endswith((".", ")")), said
    return said


# ------------------------------------------------------------------------------------------------ kills, a second run


ONE = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}  # two runs with a thread for every core would wait for each other


def small(source, folder, out):
    """The command of a small run: of mnist alone."""
    return [*papermill(source, folder / "done.ipynb", out), "-y", "DATASETS: [mnist]"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(notebook of exercise 1 and the summary, OUTPUT_DIR of its run, seconds)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source, started = some_sections(folder, "exercise-1", "summary"), time.perf_counter()
    done = attempt(small(source, folder, folder / "out"), environment=ONE)
    assert done.returncode == 0, done.stderr[-3000:]
    return source, folder / "out", time.perf_counter() - started


def test_a_run_killed_again_and_again_gives_the_results_of_an_undisturbed_one(undisturbed, tmp_path):
    """Six of the kills here; `python tests/kill_study.py` does twenty, to the whole notebook."""
    source, whole, seconds = undisturbed
    moments, _ = survive(lambda out: small(source, out, out), whole, 6, seconds, tmp_path, ONE)
    assert len(moments) == 6
    assert any(rows and chunks for _, rows, chunks in moments), f"no kill came once something was written: {moments}"


def test_two_runs_may_share_a_folder(undisturbed, tmp_path):
    source, whole, _ = undisturbed
    commands = [small(source, tmp_path / name, tmp_path / "out") for name in ("a", "b")]
    for name in "ab":
        (tmp_path / name).mkdir()
    both = [subprocess.Popen(c, cwd=ROOT, env=ONE, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in both:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-2000:]
    compare(tmp_path / "out", whole)


WRITER = """
import sys
sys.path.insert(0, "tests")
import conftest
from pathlib import Path
nb = conftest.set_up("writer", PROFILE="smoke", OUTPUT_DIR=sys.argv[1])
section = nb.Section("exercise-1")
for k in range(40):
    section.add("m", k, seed=k, detail=sys.argv[2])
"""


def test_two_writers_lose_no_row(tmp_path):
    commands = [[sys.executable, "-c", WRITER, str(tmp_path), name] for name in ("a", "b")]
    both = [subprocess.Popen(c, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL) for c in commands]
    assert [process.wait(300) for process in both] == [0, 0]
    rows = pd.read_csv(tmp_path / "results/exercise-1.csv")
    assert sorted(zip(rows["detail"], rows["seed"], strict=True)) == [(name, k) for name in "ab" for k in range(40)]


# ------------------------------------------------------------------------------------------------ disks and folders


@pytest.fixture
def disk(tmp_path):
    """A function: a small disk of its own with these mount options (this needs root)."""
    mounted = []

    def mount(options):
        (folder := tmp_path / "disk").mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]).returncode:
            pytest.skip("not even root may mount a disk here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


only_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a disk")


@only_root
def test_a_read_only_folder_is_refused_at_once(disk, tmp_path):
    folder = disk("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    started = time.perf_counter()
    done = attempt(papermill(some_sections(tmp_path, "exercise-1"), tmp_path / "done.ipynb", folder))
    assert time.perf_counter() - started < 60
    said = last_sentence(done)
    assert "OUTPUT_DIR" in said
    assert "can be written" in said


@only_root
def test_a_full_disk_ends_the_run_in_a_sentence_and_loses_nothing(disk, undisturbed, tmp_path):
    """Room for a part of the run alone; with more room the same folder gives the results of an undisturbed run."""
    source, whole, _ = undisturbed
    folder = disk("size=120k")
    said = last_sentence(attempt(small(source, tmp_path, folder / "out"), environment=ONE))
    assert "No space left on device" in said
    assert "OUTPUT_DIR" in said
    written = {f: f.read_bytes() for f in (folder / "out/results").glob("*.csv")}
    assert written, "the disk was full before the first row"
    for path in written:
        assert len(pd.read_csv(path)), path
    subprocess.run(["mount", "-o", "remount,size=50m", folder], check=True)
    assert attempt(small(source, tmp_path, folder / "out"), environment=ONE).returncode == 0
    compare(folder / "out", whole)


def test_any_folder_name_will_do(undisturbed, tmp_path):
    source, whole, _ = undisturbed
    folder = tmp_path / "Übung [1] – 'neu' $x_t$"
    assert attempt(small(source, tmp_path, folder), environment=ONE).returncode == 0
    compare(folder, whole)


def test_started_in_another_folder(tmp_path):
    """papermill leaves the kernel where the user stands; there is no bundled network there, and the run says so at once."""
    source = some_sections(tmp_path, "exercise-1")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(source), "done.ipynb", "-p", "PROFILE", "smoke"]
    said = last_sentence(attempt(command, cwd=tmp_path))
    assert str(tmp_path) in said
    assert "--cwd" in said


# ------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture
def rows(nb, run, monkeypatch):
    """Three rows of a section and the path of their file."""
    monkeypatch.setattr(nb, "PROFILE", "smoke")
    section = nb.Section("exercise-1")
    for steps in (5, 10, 50):
        section.add("KID", steps / 10, low=steps / 20, high=1.5 * steps, N=16, steps=steps, detail='with, comma and "quotes"')
    return nb.OUTPUT / "results/exercise-1.csv"


CUTS = {  # what is done to a file of a header and three rows -> how many rows can be used after it
    "cut in its last line": (lambda text: text[:-20], 2),
    "cut in its second line": (lambda text: re.sub(r"(?m)^(.*\n.*\n.{30}).*$", r"\1", text, count=1), 2),
    "without its last line break": (lambda text: text[:-1], 2),
    "with another header": (lambda text: text.replace("metric", "measure", 1), 0),
    "without a header": (lambda text: text.split("\n", 1)[1], 0),
    "empty": (lambda text: "", 0),
    "with a word for a number": (lambda text: text.replace("KID,5.0", "KID,five"), 2),
    "no text": (lambda text: "\0\xff\xfe\n" * 3, 0),
    "with an unclosed quote": (lambda text: text.replace("KID,1.0", 'KID,"1.0'), 2),
}


@pytest.mark.parametrize(("harm", "usable"), CUTS.values(), ids=CUTS)
def test_damaged_results_are_named_and_what_is_whole_is_used(nb, rows, capsys, harm, usable):
    was = rows.read_text(encoding="utf-8")
    harmed = harm(was).encode("latin-1")
    rows.write_bytes(harmed)
    capsys.readouterr()
    assert len(nb.results("exercise-1")) == usable
    said = capsys.readouterr().out
    assert str(rows) in said
    assert said.count("\n") == 1
    (kept,) = rows.parent.glob("exercise-1.csv.*.damaged")
    assert kept.name in said
    assert kept.read_bytes() == harmed, "nothing is thrown away"
    nb.Section("exercise-1").add("KID", 9.0, steps=99)
    assert len(nb.results("exercise-1")) == usable + 1
    assert capsys.readouterr().out == "", "it is said once"


@pytest.mark.parametrize("harm", ["gone", "without its run", "empty", "cut"])
def test_a_damaged_list_of_runs_stops_nothing(nb, rows, capsys, harm):
    runs = rows.parent / "runs.csv"
    text = runs.read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2
    if harm == "gone":
        runs.unlink()
    else:
        runs.write_text({"without its run": text.splitlines()[0] + "\n", "empty": "", "cut": text[:-8]}[harm], encoding="utf-8")
    (summary,) = [c.source for c in code_cells(nbformat.read(NOTEBOOK, 4)) if c.id == "sum-answers"]
    exec(compile(summary, "<summary>", "exec"), dict(nb.__dict__))
    assert (nb.OUTPUT / "results/answers.md").exists()
    nb.Section("exercise-1").add("KID", 1.0, steps=1)
    assert list(pd.read_csv(runs)["run"]) == [nb.results("exercise-1")[0].run]


def flip(data):
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


HARMS = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "flipped": flip,
    "other": lambda data: b"no zip",
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_damaged_cache_file_is_named_and_made_anew(nb, run, tiny, capsys, harm):
    whole = nb.measure(tiny(), 6, 2, size=6)
    (path,) = (nb.OUTPUT / "cache").glob("*.npz")
    good = path.read_bytes()
    path.write_bytes(harm(good))
    capsys.readouterr()
    again = nb.measure(tiny(), 6, 2, size=6)
    assert torch.equal(again.features, whole.features)
    assert f"{path} was damaged" in capsys.readouterr().out
    with np.load(path, allow_pickle=False) as stored:
        assert torch.equal(torch.from_numpy(stored["features"]), whole.features), "mended"


def test_a_pickle_in_the_place_of_a_cache_file_is_not_run(nb, run, tiny, tmp_path):
    import pickle

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run-by-pickle",)

    nb.measure(tiny(), 4, 2, size=4)
    (path,) = (nb.OUTPUT / "cache").glob("*.npz")
    path.write_bytes(pickle.dumps(Trap()))
    nb.measure(tiny(), 4, 2, size=4)
    assert not (tmp_path / "run-by-pickle").exists()


def test_reference_statistics_are_the_cards(nb, monkeypatch, tmp_path):
    """A flipped byte in the real images' statistics would change every distance."""
    shutil.copytree(nb.BUNDLED / "mnist", tmp_path / "mnist")
    monkeypatch.setattr(nb, "BUNDLED", tmp_path)
    nb.load_reference.cache_clear()
    assert nb.load_reference("mnist", "bundled") is not None
    path = tmp_path / "mnist/reference.safetensors"
    path.write_bytes(flip(path.read_bytes()))
    nb.load_reference.cache_clear()
    with pytest.raises(ValueError, match=r"mnist: .*card README.md.*statistics; restore \(git checkout"):
        nb.load_reference("mnist", "bundled")
    nb.load_reference.cache_clear()


@pytest.mark.parametrize("name", ["mnist", "text2image"])
def test_every_bundled_file_is_in_its_card(nb, name):
    assert len(nb.attested(nb.BUNDLED / name)) == len(nb.attested(nb.BUNDLED / name, reference=True)) == 64


def test_a_card_that_is_gone_is_named(nb, monkeypatch, tmp_path):
    shutil.copytree(nb.BUNDLED / "mnist", tmp_path / "mnist")
    (tmp_path / "mnist/README.md").unlink()
    monkeypatch.setattr(nb, "BUNDLED", tmp_path)
    nb.load_checkpoint.cache_clear()
    with pytest.raises(ValueError, match=r"mnist: its card README.md .*restore \(git checkout -- "):
        nb.load_checkpoint("mnist")
    nb.load_checkpoint.cache_clear()


# ------------------------------------------------------------------------------------------------ what a run may touch


def test_bundled_mode_calls_nobody_and_reads_no_token(watched):
    _, _, did = watched
    assert [line for line in did if line.startswith("write")], "the watch itself works"
    assert not [line for line in did if line.startswith(("network", "token"))]


def test_no_token_is_printed_or_stored(watched):
    notebook, folder, _ = watched
    assert "secretsecret" not in nbformat.writes(notebook)
    assert not [f for f in (folder / "out").rglob("*") if f.is_file() and b"secretsecret" in f.read_bytes()]


def test_nothing_is_written_outside_output_dir(watched):
    """But for the notebook itself and the caches of Python, matplotlib, Jupyter and the like, which have their places."""
    _, folder, did = watched
    written = {line[6:] for line in did if line.startswith("write")}
    own = (str(folder / "out"), str(folder / "home"), str(folder / "done.ipynb"), "/dev/", "/proc/")
    elsewhere = {p for p in written if not p.startswith(own) and "__pycache__" not in p}
    temporary = {p for p in elsewhere if p.startswith(("/tmp/", "/var/tmp/", "/dev/shm/")) and str(folder.parent) not in p}
    assert not elsewhere - temporary
    assert any(p.startswith(str(folder / "out/figures")) for p in written)
    assert not list(folder.rglob("*evil*")), "no file is named by a prompt or a column"


def test_the_code_takes_nothing_on_trust():
    """No pickle, no code from elsewhere, no shell; torch.load takes weights only."""
    sources = [c.source for c in code_cells(nbformat.read(NOTEBOOK, 4))]
    sources += [f.read_text(encoding="utf-8") for f in (ROOT / "outputs").rglob("*.py") if "run" not in f.parts]
    calls = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    assert len(calls) > 1000
    for call in calls:
        name, settings = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        assert "pickle" not in name
        assert not re.fullmatch(r"(torch\.load|.*\.torch\.load)", name) or settings.get("weights_only") == "True", name
        assert not name.endswith("np.load") or settings.get("allow_pickle") == "False"
        assert settings.get("trust_remote_code", "False") == "False"
        assert settings.get("shell", "False") == "False"
        assert name not in ("eval", "os.system", "joblib.load", "pd.read_pickle")
    imported = {
        a.name for s in sources for n in ast.walk(ast.parse(s)) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
    }
    assert not imported & {"pickle", "joblib", "dill", "cloudpickle", "marshal", "shelve"}
