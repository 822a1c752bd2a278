"""What the tests of the whole notebook share: where it lies, how it is run, and some of its sections alone."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "hw.diffusion.ipynb"
SECTIONS = ["foundations", *(f"exercise-{i}" for i in range(1, 6)), "stability", "speed"]
ORDER = ["parameters", "setup", *SECTIONS, "summary"]
ENVIRONMENT = os.environ | {  # every way out is closed: a proxy where nothing listens
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
    "no_proxy": "127.0.0.1,localhost",
    "NO_PROXY": "127.0.0.1,localhost",
    "MPLBACKEND": "agg",
}


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def section_tag(cell):
    (tag,) = set(cell.metadata.get("tags", [])) & set(ORDER)
    return tag


def shown_by(notebook):
    """The outputs that show something (text of a process aside)."""
    return [o for c in code_cells(notebook) for o in c.outputs if "data" in o]


def figures_of(notebook):
    """The notebook's figures."""
    return [o for o in shown_by(notebook) if "image/png" in o.data]


def papermill(source, target, output_dir, **parameters):
    """The command line that a user types, started from the repository root."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(ROOT), str(source), str(target)]
    for name, value in {"PROFILE": "smoke", "OUTPUT_DIR": str(output_dir), **parameters}.items():
        command += ["-p", name, value]
    return command


def attempt(command, cwd=ROOT, environment=ENVIRONMENT):
    """The finished process of a command, with what it said."""
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)


def run(command):
    done = attempt(command)
    assert done.returncode == 0, done.stderr[-4000:]


def some_sections(folder, *sections):
    """A copy of the notebook's code with parameters, set-up and some sections."""
    notebook = nbformat.read(NOTEBOOK, 4)
    notebook.cells = [c for c in code_cells(notebook) if section_tag(c) in {"parameters", "setup", *sections}]
    path = folder / f"{'-'.join(sections)}.ipynb"
    nbformat.write(notebook, path)
    return path


class Card:
    """Stands for a GPU's memory: a module's forward raises where it is given more images than `fits`; counts its calls."""

    def __init__(self, monkeypatch, owner, name, fits):
        self.fits, self.sizes, self.whole = fits, [], getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __call__(self, x, *arguments, **settings):
        self.sizes.append(len(x))
        if len(x) > self.fits:
            raise torch.OutOfMemoryError("as a GPU would")
        return self.whole(x, *arguments, **settings)
