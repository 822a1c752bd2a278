"""The notebook with the hub's networks and data sets: a stand-in serves random ones by the hub's protocol, or fails to."""

import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import threading

import nbformat
import pandas as pd
import pytest
import torch
from conftest import cells_tagged
from diffusers import DDPMPipeline, DDPMScheduler, UNet1DModel
from hub import DIFFUSION, FAULTS, LDM, NETWORKS, TABLES, Hub, Repository, data_repositories, grey_of, model_repositories, stretch
from safetensors.torch import load_file
from shared import ENVIRONMENT, ROOT, attempt, code_cells, papermill, some_sections
from test_notebook import LAUNCH

NAMES = dict(zip(("mnist", "cifar10", "pokemon", "butterflies", "church"), NETWORKS, strict=True))
IMAGES = dict(zip(NAMES, TABLES, strict=True))
PROXIES = [
    v + end for end in ("_proxy", "_PROXY") for v in (("http", "https", "all") if end.islower() else ("HTTP", "HTTPS", "ALL"))
]
SECONDS = 15  # of falling back: 8 without progress, the rest for processes on a busy machine


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return model_repositories(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return data_repositories(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory):
    return data_repositories(tmp_path_factory.mktemp("few"), train=12, test=4)


def online(hub, home, **changes):
    """The environment of a machine whose only way out leads to the stand-in, and whose caches are new."""
    own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "TORCH_HOME": str(home / "torch"), "OMP_NUM_THREADS": "1"}
    return {k: v for k, v in ENVIRONMENT.items() if k != "HF_HUB_OFFLINE"} | own | changes


# ------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def study(models, pictures, tmp_path_factory):
    """(executed notebook, its OUTPUT_DIR, HF_HOME, the hub, no longer there) of a smoke run with the hub's networks."""
    folder = tmp_path_factory.mktemp("study")
    sections = ("foundations", "exercise-1", "exercise-2", "exercise-3", "exercise-5", "summary")
    source = some_sections(folder, *sections)
    with Hub(models, pictures) as hub:
        command = papermill(source, folder / "done.ipynb", folder / "out", SOURCE="hub")
        done = attempt(command, environment=online(hub, folder / "home"))
        assert done.returncode == 0, done.stderr[-4000:]
    return nbformat.read(folder / "done.ipynb", 4), folder / "out", folder / "home", hub


def printed(notebook):
    return [line for c in code_cells(notebook) for o in c.outputs for line in o.get("text", "").splitlines()]


def on_stderr(notebook):
    return [(c.id, o.text) for c in code_cells(notebook) for o in c.outputs if o.get("name") == "stderr"]


def distances(folder):
    """The distances of exercise 1, by what they are of."""
    rows = pd.read_csv(folder / "results/exercise-1.csv", keep_default_na=False)
    rows = rows[rows["metric"].isin(["FD-EffNet", "KD-EffNet", "paired_rms"])]
    return rows.set_index(["metric", "dataset", "method", "eta", "steps", "N", "detail"]).sort_index()


def test_a_run_with_the_hub_is_clean_and_scored_against_its_images(study, models):
    notebook, out, *_ = study
    assert on_stderr(notebook) == []
    scored = distances(out).xs("FD-EffNet").reset_index()
    for name in ("mnist", "cifar10"):
        (n_real,) = {int(n) for n in scored[scored["dataset"] == name]["n_real"]}
        assert 100 < n_real <= 330, "not the bundled reference's"
        (said,) = {line for line in printed(notebook) if line.startswith(f"{name}: ") and "pictures read" in line}
        read, held_out = map(int, re.findall(r"\d+", said.removeprefix(name)))
        assert read - held_out == n_real, "how many were read"
    runs = pd.read_csv(out / "results/runs.csv", keep_default_na=False)
    assert set(runs["source"]) == {"hub"}
    (made,) = runs[runs["run"].str.startswith("exercise-1/")]["models"]
    for name in ("mnist", "cifar10"):
        assert f"{name}={Repository(models[NAMES[name]]).commit[:16]}" in made.split()


def test_both_text_models_of_the_hub_draw(study):
    drawn = [path.name for path in (study[1] / "images").glob("*.png")]
    for model in (DIFFUSION, LDM):
        assert [name for name in drawn if name.startswith(model.split("/")[1])], model


WEIGHTS = {
    NAMES["mnist"]: {"unet/diffusion_pytorch_model.safetensors"},
    NAMES["cifar10"]: {"diffusion_pytorch_model.safetensors"},
    NAMES["pokemon"]: {"unet/diffusion_pytorch_model.bin"},
    NAMES["butterflies"]: {f"unet/diffusion_pytorch_model-{k:05}-of-00008.safetensors" for k in range(1, 9)},
    NAMES["church"]: {"diffusion_pytorch_model.bin"},
    LDM: {"bert/pytorch_model.bin", *(f"{part}/diffusion_pytorch_model.bin" for part in ("unet", "vqvae"))},
    DIFFUSION: {
        "text_encoder/model.fp16.safetensors",
        *(f"{part}/diffusion_pytorch_model.fp16.safetensors" for part in ("unet", "vae")),
    },
}


def weights_asked(hub, repository):
    """Not .json, .txt and .md files, which are small."""
    return {name for name in hub.files(repository) if name.endswith((".bin", ".safetensors", ".ckpt", ".parquet"))}


@pytest.mark.parametrize("repository", [NAMES["mnist"], NAMES["cifar10"], LDM, DIFFUSION])
def test_of_a_repository_only_the_weights_that_are_needed_are_asked_for(study, repository):
    hub = study[3]
    assert weights_asked(hub, repository) == WEIGHTS[repository]
    assert not [name for name in hub.files(repository) if name.startswith("safety_checker")]


def test_what_a_run_needs_not_is_not_asked_for(study):
    hub = study[3]
    for name in ("pokemon", "butterflies", "church"):  # not part of profile smoke, and half a gigabyte each
        assert not weights_asked(hub, IMAGES[name])
        assert not weights_asked(hub, NAMES[name])
    fetched = [path for method, path in hub.asked if method == "GET" and "/lfs/" in path]
    assert len(fetched) == len(set(fetched)), "nothing twice"


def test_a_later_run_needs_the_hub_no_more(study, tmp_path):
    _, out, home, hub = study
    before = distances(out)
    command = papermill(some_sections(tmp_path, "exercise-1"), tmp_path / "done.ipynb", out, SOURCE="hub")
    done = attempt(command, environment=online(hub, home))
    assert done.returncode == 0, done.stderr[-4000:]
    assert on_stderr(nbformat.read(tmp_path / "done.ipynb", 4)) == []
    pd.testing.assert_frame_equal(distances(out), before)
    assert set(pd.read_csv(out / "results/runs.csv")["source"]) == {"hub"}


def test_two_processes_give_the_rows_of_one(study, models, pictures, tmp_path):
    """By the README's lines, each process on its own way to the hub; one data set is enough."""
    source, prepared, out = some_sections(tmp_path, "exercise-1"), tmp_path / "study.ipynb", tmp_path / "out"
    with Hub(models, pictures) as hub:
        environment = online(hub, tmp_path / "home")
        for command in (
            [*papermill(source, prepared, out, SOURCE="hub"), "--prepare-only", "-y", "DATASETS: [mnist]"],
            [sys.executable, "-m", "nbconvert", "--to", "script", str(prepared)],
            [*LAUNCH, str(tmp_path / "study.py")],
        ):
            done = attempt(command, environment=environment)
            assert done.returncode == 0, done.stderr[-4000:]
    two, one = (distances(folder).query("dataset == 'mnist'")[["value", "n_real"]] for folder in (out, study[1]))
    assert len(one) > 3
    pd.testing.assert_frame_equal(two, one, rtol=1e-3, check_dtype=False)


# ------------------------------------------------------------------------------------------- set-up alone

SITTING = """
import importlib, json, os, sys, time, traceback

path, everything = sys.argv[1], dict(os.environ)
set_up = compile(open(path, encoding="utf-8").read(), path, "exec")
for line in sys.stdin:
    asked = json.loads(line)
    os.environ.clear()
    os.environ.update({k: v for k, v in (everything | asked["environment"]).items() if v is not None})
    if "huggingface_hub" in sys.modules:  # which reads the environment when it is imported
        importlib.reload(sys.modules["huggingface_hub"].constants)
    names, started = {"__name__": "__main__", "GIVEN": asked["parameters"]}, None
    try:
        exec(set_up, names)
        print("BEGIN")
        started = time.perf_counter()
        exec(asked["code"], names)
    except BaseException:
        traceback.print_exc()
    print(f"END {time.perf_counter() - (started or 0)}", flush=True)
"""


class Sitting:
    """A process that executes parameters and set-up anew, and then some lines, as often as it is asked to.

    Each time under another environment: the libraries alone stay imported, which takes longer than all the rest.
    """

    def __init__(self, folder):
        self.folder, self.process, self.number = folder, None, 0
        (folder / "sitting.py").write_text(SITTING)
        (parameters,), setup = cells_tagged("parameters"), cells_tagged("setup")
        sources = [parameters[1], "globals().update(GIVEN)", *(source for _, source in setup)]
        (folder / "setup.py").write_text("\n".join(sources), encoding="utf-8")

    def __call__(self, code, hub, home, **changes):
        """(lines printed by the code, seconds it took, what stood on stderr); its OUTPUT_DIR is new. A change may be None."""
        if self.process is None or self.process.poll() is not None:
            self.errors = (self.folder / "stderr").open("w+")
            self.process = subprocess.Popen(
                [sys.executable, str(self.folder / "sitting.py"), str(self.folder / "setup.py")],
                **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors, "text": True, "cwd": ROOT},
                env=online(hub, home),
            )
        self.number += 1
        own = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "TORCH_HOME": str(home / "torch")} | changes
        parameters = {"PROFILE": "smoke", "SOURCE": "hub", "OUTPUT_DIR": str(self.folder / f"out-{self.number}")}
        watch, before = threading.Timer(180, self.process.kill), self.errors.seek(0, 2)
        watch.start()
        print(json.dumps({"code": code, "environment": own, "parameters": parameters}), file=self.process.stdin, flush=True)
        lines = []
        while not (lines and lines[-1].startswith("END")):
            line = self.process.stdout.readline()
            assert line, "the process has ended"
            lines.append(line.strip())
        watch.cancel()
        self.errors.seek(before)
        said = self.errors.read()
        assert "BEGIN" in lines, said
        return [line for line in lines[lines.index("BEGIN") + 1 : -1] if line], float(lines[-1].split()[1]), said


@pytest.fixture(scope="module")
def sitting(tmp_path_factory):
    made = Sitting(tmp_path_factory.mktemp("sitting"))
    yield made
    if made.process:
        made.process.kill()


def digest(weights):
    """A hash of tensors by name."""
    parts = (name.encode() + weights[name].contiguous().numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_the_networks_of_every_layout_are_the_very_ones(sitting, models, pictures, tmp_path):
    code = inspect.getsource(digest)
    code += "for name in ('mnist', 'cifar10', 'pokemon', 'butterflies', 'church'):\n"
    code += "    c = load_checkpoint(name)\n    print(name, c.source, *c.shape, c.sha256, digest(c.unet.state_dict()))"
    with Hub(models, pictures) as hub:
        lines, _, errors = sitting(code, hub, tmp_path)
    assert errors == ""
    for line, (name, repository) in zip(lines, NAMES.items(), strict=True):
        size, channels, *_ = NETWORKS[repository]
        paths = [models[repository] / path for path in WEIGHTS[repository]]
        loads = (load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True) for path in paths)
        weights = {key: value for load in loads for key, value in load.items()}
        commit = Repository(models[repository]).commit
        assert line.split() == [name, "hub", str(channels), str(size), str(size), commit, digest(weights)]
        assert weights_asked(hub, repository) == WEIGHTS[repository]


def test_a_choice_of_images_is_one_of_all_classes(sitting, models, pictures, tmp_path):
    """The first hundred rows of a data set that is sorted by class would be of three."""
    code = "MOST['smoke'] = 100\nfor name in ('mnist', 'cifar10', 'mnist'):\n"
    code += "    training, heldout = real_images(real_place(name), name).values()\n"
    code += "    print(json.dumps([name, training.shape, heldout.shape, training.float().mean((1, 2, 3)).tolist()]))"
    with Hub(models, pictures) as hub:
        lines, _, errors = sitting("import json\n" + code, hub, tmp_path)
    assert errors == ""
    found = [json.loads(line) for line in lines if line.startswith("[")]
    assert [name for name, *_ in found] == ["mnist", "cifar10", "mnist"]
    for _, shape, heldout, means in found:
        assert shape[0] == 100
        assert 16 <= heldout[0] <= 64, "the test split is held out"
        classes = {round((mean - grey_of(0)) / (grey_of(1) - grey_of(0))) for mean in means}
        assert classes == set(range(10))
    assert found[0] == found[2], "the same every time"


def test_images_of_any_shape_come_at_the_networks_size(sitting, models, pictures, tmp_path):
    code = "for name in ('pokemon', 'butterflies'):\n    found = real_images(real_place(name), name)\n"
    code += "    print('GOT', *(tuple(x.shape) for x in found.values()))\nannounce()"
    with Hub(models, pictures) as hub:
        lines, _, errors = sitting(code, hub, tmp_path)
    assert errors == ""
    got = [line for line in lines if line.startswith("GOT")]
    assert got == ["GOT (20, 3, 64, 64) (4, 3, 64, 64)", "GOT (20, 3, 128, 128) (4, 3, 128, 128)"], "a fifth is held out"
    assert "pokemon: 24 pictures read, 4 held out as the reference." in lines


def test_of_a_large_data_set_some_files_are_enough(sitting, models, pictures, tmp_path):
    """Three files of 120 MB, of which 300 MB are the limit."""
    name = IMAGES["church"]
    shutil.copytree(pictures[name], tmp_path / "church")
    for path in (tmp_path / "church").rglob("*.parquet"):
        stretch(path, 120_000_000)
    with Hub(models, {name: tmp_path / "church"}) as hub:
        lines, _, errors = sitting(
            "print('GOT', len(real_images(real_place('church'), 'church')['train']))", hub, tmp_path / "home"
        )
    shutil.rmtree(tmp_path)
    assert errors == ""
    files = [file for file in hub.files(name) if file.endswith(".parquet")]
    assert 1 <= len(files) <= 2
    assert lines[-1] == f"GOT {8 * len(files) - 8 * len(files) // 5}"


# ------------------------------------------------------------------------------------------- faults

LOADS = """
for name in ("mnist", "cifar10", "mnist", "cifar10"):  # as two sections do
    checkpoint = load_checkpoint(name)
    reference = load_reference(name, checkpoint.source)
    print("GOT", name, checkpoint.source, int(reference.n_real) if reference else 0)
    announce()
"""


def loaded(lines):
    """{data set: (source of the network, number of real images behind its reference)}, and what else was said of the hub."""
    got = [line.split()[1:] for line in lines if line.startswith("GOT")]
    assert got[:2] == got[2:]
    said = [line for line in lines if not line.startswith(("GOT", "Inception-v3")) and "as the reference." not in line]
    return {name: (source, int(n)) for name, source, n in got}, said


def heals(sitting, hub, home):
    """Nothing that a fault left behind stands in the way afterwards: the network and the images that it met can be had."""
    hub.fault = None
    code = "print('GOT', load_checkpoint('mnist').source, int(load_reference('cifar10', 'hub').n_real))\nannounce()"
    lines, _, errors = sitting(code, hub, home)
    assert errors == ""
    assert lines[0] == "GOT hub 12"


SILENCED = dict.fromkeys(PROXIES)
WHOLE = {  # a fault or changes of the environment, and what the one sentence must name
    "429": ("429", "429"),
    "500": ("500", "500"),
    "portal": ("portal", "web page"),
    "silent": ("silent", "answer|nothing came"),
    "refused": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "answer|refused|reached"),
    "no scheme": ({"HF_ENDPOINT": "hub.invalid"}, "HF_ENDPOINT"),
    "no such name": ({"HF_ENDPOINT": "http://hub.invalid", **SILENCED}, "[Nn]ame|resolve"),
    "socks": (SILENCED | {"ALL_PROXY": "socks5://127.0.0.1:9", "all_proxy": "socks5://127.0.0.1:9"}, "socksio"),
    "a file for a cache": ({"HF_HOME": str(ROOT / "README.md")}, "cache"),
    "no place for a cache": ({"HF_HOME": "/proc/nowhere"}, "cache"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE|offline"),
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_fault_of_the_whole_hub_is_said_once(sitting, models, few_pictures, tmp_path, case):
    fault, words = WHOLE[case]
    with Hub(models, few_pictures, fault if isinstance(fault, str) else None) as hub:
        lines, seconds, errors = sitting(LOADS, hub, tmp_path, **(fault if isinstance(fault, dict) else {}))
        got, said = loaded(lines)
        assert errors == ""
        assert {source for source, _ in got.values()} == {"bundled"}
        assert all(n for _, n in got.values()), "the bundled statistics"
        assert len(said) == 1, said
        assert re.search(words, said[0]), said
        assert seconds < SECONDS
        if isinstance(fault, str):
            heals(sitting, hub, tmp_path)


SINGLE = {"404": "404|private", "anonymous": "404|private", "gated": "gated", "truncated": "hash|size|short", "hash": "hash"}


@pytest.mark.parametrize("fault", SINGLE)
def test_a_fault_of_a_repository_names_it_once(sitting, models, few_pictures, tmp_path, fault):
    faulty = (NAMES["mnist"], IMAGES["cifar10"])
    with Hub(models, few_pictures, dict.fromkeys(faulty, fault)) as hub:
        lines, seconds, errors = sitting(LOADS, hub, tmp_path)
        got, said = loaded(lines)
        assert errors == ""
        assert got["mnist"][0] == "bundled"
        assert got["cifar10"] == ("hub", 0), "no distance rather than a wrong one"
        assert len(said) == 2, said
        for line, repository in zip(said, faulty, strict=True):
            assert repository in line
            assert re.search(SINGLE[fault], line), said
        assert seconds < 2 * SECONDS
        heals(sitting, hub, tmp_path)


@pytest.mark.parametrize("fault", ["text", "another pipeline", "another network"])
def test_a_wrong_configuration_is_not_used(sitting, models, few_pictures, tmp_path, fault):
    name = NAMES["mnist"]
    shutil.copytree(models[LDM if fault == "another pipeline" else name], tmp_path / "model")
    if fault == "another network":
        network = UNet1DModel(sample_size=28, block_out_channels=(8, 8, 16))
        DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "model")
    with Hub(models | {name: tmp_path / "model"}, few_pictures, {name: "text"} if fault == "text" else None) as hub:
        lines, seconds, errors = sitting(LOADS, hub, tmp_path / "home")
        got, said = loaded(lines)
        assert errors == ""
        assert got["mnist"][0] == "bundled"
        assert got["cifar10"] == ("hub", 12)
        (line,) = [line for line in said if name in line]
        assert re.search("hash" if fault == "text" else "class|Pipeline|UNet1D|Condition", line)
        assert seconds < SECONDS
        hub.folders["models"][name] = models[name]
        heals(sitting, hub, tmp_path / "home")


NEVER = [("model", fault) for fault in ("hangs", "stalls", "trickle", "reset")] + [("data", "stalls"), ("data", "reset")]


@pytest.mark.parametrize(("kind", "fault"), NEVER)
def test_a_file_that_never_comes_is_given_up(sitting, models, few_pictures, tmp_path, fault, kind):
    faulty = NAMES["mnist"] if kind == "model" else IMAGES["cifar10"]
    with Hub(models, few_pictures, {faulty: fault}) as hub:
        lines, seconds, errors = sitting(LOADS, hub, tmp_path)
        got, said = loaded(lines)
        assert errors == ""
        assert got["mnist"][0] == ("bundled" if kind == "model" else "hub")
        assert kind == "model" or got["cifar10"] == ("hub", 0)
        assert len([line for line in said if faulty in line or "hub" in line]) == 1, said
        assert seconds < SECONDS
        heals(sitting, hub, tmp_path)


def test_every_fault_of_the_stand_in_is_tried():
    tried = {*SINGLE, "text", "hangs", "stalls", "trickle", "reset", *(f for f, _ in WHOLE.values() if isinstance(f, str))}
    assert tried == set(FAULTS)
