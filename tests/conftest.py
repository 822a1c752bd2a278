"""The notebook's set-up as a module, for the unit tests: its cells are executed, nothing is imported from elsewhere."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Before any library is imported: no hub, no window, and no cache shared with the user's own.
SCRATCH = Path(tempfile.mkdtemp(prefix="hw-diffusion-tests-"))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(SCRATCH), "MPLBACKEND": "Agg"}

import linecache  # noqa: E402
import types  # noqa: E402

import nbformat  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from shared import ENVIRONMENT, NOTEBOOK, ROOT, attempt, papermill, some_sections  # noqa: E402

# derandomize: the same examples on every machine; no database: no folder left in the repository
settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("tests")


def cells_tagged(*tags):
    """(id, source) of the notebook's code cells that carry one of the tags, in order."""
    cells = nbformat.read(ROOT / "hw.diffusion.ipynb", 4).cells
    chosen = [c for c in cells if c.cell_type == "code" and set(tags) & set(c.metadata.get("tags", []))]
    return [(c.id, c.source) for c in chosen]


def execute(module, cell_id, source):
    """Run one cell in the module; linecache lets inspect.getsource find it (the set-up hashes its own functions)."""
    name = f"<cell {cell_id}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), module.__dict__)


def set_up(name, last=None, **parameters):
    """A module that has executed the set-up (up to the cell `last`), parameters injected as papermill does."""
    module = sys.modules[name] = types.ModuleType(name)
    for cell_id, source in cells_tagged("parameters"):
        execute(module, cell_id, source)
    module.__dict__.update(parameters)
    for cell_id, source in cells_tagged("setup"):
        execute(module, cell_id, source)
        if cell_id == last:
            break
    return module


@pytest.fixture(scope="session", autouse=True)
def _in_the_repository():
    before = Path.cwd()
    os.chdir(ROOT)
    yield
    os.chdir(before)
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(scope="session")
def committed():
    return nbformat.read(NOTEBOOK, 4)


@pytest.fixture(scope="session")
def nb(_in_the_repository, tmp_path_factory):
    """The whole set-up, executed once; monkeypatch.setattr(nb, ...) changes what its functions see."""
    module = set_up("notebook", PROFILE="smoke", OUTPUT_DIR=str(tmp_path_factory.mktemp("run")))
    module.DEVICE = torch.device("cpu")  # the unit tests are about the CPU, wherever they run
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on tensors this small a second thread costs more than it brings
    yield module
    torch.set_num_threads(threads)


@pytest.fixture
def setup_with(_in_the_repository):
    """A function: execute parameters, imports and the checking cell with some parameters replaced."""
    return lambda **parameters: set_up("checked", last="checks", **parameters)


@pytest.fixture
def run(nb, monkeypatch, tmp_path):
    """A fresh OUTPUT_DIR, with a cache of its own; returns the folder."""
    monkeypatch.setattr(nb, "OUTPUT", tmp_path / "run")
    return nb.OUTPUT


@pytest.fixture(scope="session")
def tiny(nb):
    """A function: a Checkpoint around a small random network for images of channels x size, shuffled by `patch`."""

    def make(channels=1, size=8, patch=1, name="tiny", **changes):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = nb.UNet2DModel(
                sample_size=size // patch,
                in_channels=channels * patch**2,
                out_channels=channels * patch**2,
                block_out_channels=(8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                down_block_types=("DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D"),
            )
        unet = unet.eval().requires_grad_(False)
        made = nb.Checkpoint(name, "bundled", unet, (channels, size, size), nb.make_alpha_bar(nb.CONFIG), "0" * 64)
        return nb.replace(made, **changes)

    return make


AUDIT = """
import os, sys

def watch(event, args, log=os.environ["HW_AUDIT"]):
    line = ""
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            line = f"network {address}"
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        if args[0] not in ("127.0.0.1", "::1", "localhost", "", None, b"localhost", b"127.0.0.1"):
            line = f"network {args[0]}"
    elif event == "open" and isinstance(args[0], str):
        if "token" in os.path.basename(args[0]) and "huggingface" in args[0]:
            line = f"token {args[0]}"
        elif (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            line = f"write {os.path.abspath(args[0])}"
    elif event == "os.rename":
        line = f"write {os.path.abspath(args[1])}"
    if line:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(descriptor, (line + "\\n").encode())
        os.close(descriptor)
        if line.startswith("network"):
            raise PermissionError(f"blocked: {line}")

if "HW_AUDIT" in os.environ:
    watching = False
    def guarded(event, args):
        global watching
        if not watching and event in ("open", "os.rename") or event.startswith("socket."):
            watching = True
            try:
                watch(event, args)
            finally:
                watching = False
    sys.addaudithook(guarded)
"""
EVIL = ["../../evil", "<script>document.title='evil'</script>", "<img src=x onerror=alert(1)>", "$\\undefined{", "{braces} 100%"]


@pytest.fixture(scope="session")
def watched(tmp_path_factory):
    """(executed notebook, its folder, what it did) of exercises 4 and 5 on a hostile table and hostile prompts."""
    folder = tmp_path_factory.mktemp("watched")
    home = folder / "home"
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/token").write_text("hf_secretsecretsecret")
    (folder / "audit").mkdir()
    (folder / "audit/sitecustomize.py").write_text(AUDIT)
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {"../../evil": draw.normal(size=600), "<script>document.title='evil'</script>": draw.choice(["a", "<b>x</b>"], 600)}
    )
    table["<img src=x onerror=alert(1)>"] = draw.normal(size=600)
    table.to_csv(folder / "table.csv", index=False)
    source = some_sections(folder, "exercise-1", "exercise-4", "exercise-5", "summary")
    command = [*papermill(source, folder / "done.ipynb", folder / "out", TABLE=str(folder / "table.csv"))]
    command += ["-y", json.dumps({"PROMPTS": EVIL, "DATASETS": ["mnist"]})]
    command += ["-p", "SOURCE", "bundled"]
    extra = {"HW_AUDIT": str(folder / "audit.log"), "PYTHONPATH": str(folder / "audit"), "HF_TOKEN": "hf_secretsecretsecret"}
    closed = {"HF_HUB_OFFLINE", "HF_HOME", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}  # so that a call would be seen
    environment = {k: v for k, v in ENVIRONMENT.items() if k.upper() not in closed} | extra | {"HOME": str(home)}
    done = attempt(command, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    call = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"  # the watch must see this one
    control = attempt([sys.executable, "-c", call], environment=environment | {"HW_AUDIT": str(folder / "control.log")})
    assert "blocked" in control.stderr
    assert "192.0.2.1" in (folder / "control.log").read_text()
    return nbformat.read(folder / "done.ipynb", 4), folder, (folder / "audit.log").read_text().splitlines()
