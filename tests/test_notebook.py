"""The notebook as a user meets it: its structure, the committed outputs, a smoke run, each section alone, a killed run."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbconvert import HTMLExporter
from nbconvert.preprocessors import TagRemovePreprocessor

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "hw.diffusion.ipynb"
SECTIONS = ["foundations", *(f"exercise-{i}" for i in range(1, 6)), "stability", "speed"]
ORDER = ["parameters", "setup", "foundations", *(f"exercise-{i}" for i in range(1, 6)), "stability", "speed", "summary"]
COLUMNS = ["run", "metric", "value", "low", "high", "N", "n_real", "dataset", "method", "eta", "variance", "spacing"]
COLUMNS += ["steps", "seed", "detail"]
ENVIRONMENT = os.environ | {  # every way out is closed: a proxy where nothing listens
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
    "no_proxy": "127.0.0.1,localhost",
    "NO_PROXY": "127.0.0.1,localhost",
    "MPLBACKEND": "agg",
}
# two processes; without --multi_gpu accelerate starts a single one on CPUs, silently
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def section_tag(cell):
    (tag,) = set(cell.metadata.get("tags", [])) & set(ORDER)
    return tag


def papermill(source, target, output_dir, **parameters):
    """The command line that a user types, started from the repository root."""
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(ROOT), str(source), str(target)]
    for name, value in {"PROFILE": "smoke", "OUTPUT_DIR": str(output_dir), **parameters}.items():
        command += ["-p", name, value]
    return command


def run(command):
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="session")
def committed():
    return nbformat.read(NOTEBOOK, 4)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """(executed notebook, its OUTPUT_DIR) of a whole smoke run without a network."""
    folder = tmp_path_factory.mktemp("smoke")
    run(papermill(NOTEBOOK, folder / "notebook.ipynb", folder))
    return nbformat.read(folder / "notebook.ipynb", 4), folder


def section_alone(section, folder):
    """A copy of the notebook with parameters, set-up and one section."""
    remover = TagRemovePreprocessor(enabled=True, remove_cell_tags=[t for t in ORDER[2:] if t != section])
    notebook, _ = remover.preprocess(nbformat.read(NOTEBOOK, 4), {})
    path = folder / f"{section}.ipynb"
    nbformat.write(notebook, path)
    return path


# ---------------------------------------------------------------- structure


def test_every_code_cell_has_one_section_tag_and_sections_come_in_order(committed):
    tags = [section_tag(c) for c in code_cells(committed)]
    assert tags[:3] == ["summary"] * 3, "the glance opens the notebook"
    body = [t for t in tags[3:] if t != "parameters"]  # parameters stand before set-up
    assert [ORDER.index(t) for t in body] == sorted(ORDER.index(t) for t in body)
    assert tags.count("parameters") == 1


def test_cell_ids_are_names_and_unique(committed):
    ids = [c.id for c in committed.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]+", i) for i in ids)


def test_cells_are_small(committed):
    lines = sorted(sum(bool(line.strip()) for line in c.source.splitlines()) for c in code_cells(committed))
    assert len(lines) <= 165
    assert lines[len(lines) // 2] <= 20
    assert lines[-1] <= 60
    assert not any(re.match(r"\s*[%!]", line) for c in code_cells(committed) for line in c.source.splitlines())


def test_code_is_formatted_and_lint_free():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_parameters_are_plain_literals_one_a_line(committed):
    (cell,) = [c for c in code_cells(committed) if section_tag(c) == "parameters"]
    assert all(re.fullmatch(r"[A-Z_]+ = [^=]+", line) for line in cell.source.splitlines())


def test_internal_links_lead_to_headings(committed):
    text = "\n".join(c.source for c in committed.cells if c.cell_type == "markdown")
    headings = {h.strip().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}
    links = set(re.findall(r"\]\(#([^)]+)\)", text))
    assert links
    assert links <= headings


def test_tracked_files_are_small_and_hold_no_images_of_data():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.exists()) < 70 * 2**20
    assert not [f for f in files if f.suffix in {".parquet", ".jpg", ".jpeg", ".pkl", ".pt", ".bin"}]


# ------------------------------------------------------- the committed outputs


def test_committed_notebook_is_one_clean_run(committed):
    cells = [c for c in code_cells(committed) if c.source.strip()]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    bad = [c.id for c in cells for o in c.outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not bad
    assert "widgets" not in committed.metadata


def test_committed_outputs_belong_to_the_committed_code(committed):
    """runs.csv holds, for each section, the hash of set-up plus that section as it stood when it was executed."""
    runs = pd.read_csv(ROOT / "outputs/results/runs.csv", keep_default_na=False)
    for section in SECTIONS:
        wanted = {"setup", section}
        code = ["".join(c.source) for c in committed.cells if wanted & set(c.metadata.get("tags", []))]
        expected = hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]
        stored = runs[runs["run"].str.startswith(f"{section}/")]["code_hash"]
        assert len(stored), f"the record has no run of {section}"
        assert expected in set(stored), f"{section} was changed after it was executed"


def shown_by(notebook):
    """The outputs that show something (text of a process aside)."""
    return [o for c in code_cells(notebook) for o in c.outputs if "data" in o]


def figures_of(notebook):
    """The notebook's figures."""
    return [o for o in shown_by(notebook) if "image/png" in o.data]


def test_committed_figures_have_alternative_text_and_files(committed):
    shown = figures_of(committed)
    assert len(shown) >= 30
    assert len(list((ROOT / "outputs/figures").glob("*.png"))) >= 30


@pytest.mark.parametrize("which", ["committed", "smoke"])
def test_outputs_are_such_that_every_viewer_shows_them(which, request):
    """Figures are PNG with alternative text and a caption, tables Markdown: LaTeX, PDF and graders' tools drop HTML."""
    notebook = request.getfixturevalue(which)
    notebook = notebook[0] if which == "smoke" else notebook
    outputs = shown_by(notebook)
    assert not [o.data for o in outputs if not {"image/png", "text/markdown"} & set(o.data) and o.data.get("text/plain")]
    assert not [o.data["text/plain"] for o in outputs if "text/html" in o.data]
    for figure in figures_of(notebook):
        alt = figure.data["text/plain"]
        assert len(alt) >= 20
        assert figure.metadata["image/png"]["alt"] == alt
        assert any(o.data.get("text/markdown") == f"*{alt}.*" for o in outputs), "the caption"


def rows_of(folder):
    frames = [pd.read_csv(f, dtype=str, keep_default_na=False) for f in sorted(folder.glob("*.csv")) if f.stem != "runs"]
    return pd.concat(frames)


def check_results(folder):
    rows, runs = rows_of(folder), pd.read_csv(folder / "runs.csv", dtype=str, keep_default_na=False)
    assert list(rows.columns) == COLUMNS
    assert set(rows["run"]) <= set(runs["run"])
    assert runs["code_hash"].str.fullmatch(r"[0-9a-f]{16}").all()
    bounded = rows[rows["low"] != ""]
    value, low, high = (bounded[c].astype(float) for c in ("value", "low", "high"))
    assert (low <= value + 1e-12).all()
    assert (value <= high + 1e-12).all()
    distances = rows[rows["metric"].isin(["FID", "FD-EffNet"])]
    assert len(distances)
    assert (distances[["low", "high", "N", "n_real"]] != "").all().all(), "a distance stands with interval and counts"
    models = runs[runs["run"].isin(distances["run"]) & ~runs["run"].str.startswith("training")]["models"]
    assert models.str.contains(r"\w+=[0-9a-f]{16}").all()


def test_the_record_follows_the_schema():
    check_results(ROOT / "outputs/results")


def test_the_record_bears_its_claims_out():
    claims = rows_of(ROOT / "outputs/results").query("metric == 'claim'")
    verdict = dict(zip(claims["detail"], claims["value"].astype(float), strict=True))
    controls = {k: v for k, v in verdict.items() if "control scores worse" in k}
    assert len(controls) == 3
    assert set(controls.values()) == {1.0}
    for text in (
        "inversion error falls with the steps",
        "DDIM images depend less on the step count than DDPM's",
        "DDPM and DDIM cost the same per step to within 10 %",
        "multinomial DDPM: column_shapes is at least 0.95",
        "multinomial DDPM: column_pair_trends is at least 0.93",
        "multinomial DDPM: tstr_r2 is within 0.02 of as many real rows",
        "multinomial DDPM: c2st_auc is at most 0.65",
        "multinomial DDPM: dcr_share is between 0.45 and 0.55",
        "multinomial DDPM: no entry leaves the training range or levels",
        "multinomial categories are better than one-hot ones (tstr_r2)",
        "per-image noise costs less than 5 % of a step at batch 64",
    ):
        assert verdict[text] == 1.0, text
    # intervals of neighbouring step counts may overlap at the quick profile's N, but the order may not turn round
    assert verdict["DDIM's paired error falls with every increase of the steps"] >= 0.5


def test_the_record_lies_above_its_floor_and_below_its_controls():
    rows = rows_of(ROOT / "outputs/results")
    rows = rows[rows["metric"].isin(["FID", "FD-EffNet"]) & rows["dataset"].isin(["mnist"])]
    for (_, N), group in rows.groupby(["metric", "N"]):
        real = group[group["method"] == "real"]["value"].astype(float)
        made = group[group["method"].isin(["DDPM", "DDIM"])]["value"].astype(float)
        if len(real) and len(made):
            assert real.max() < made.min(), f"images of N = {N} beat real ones"


def test_numbers_of_the_readme_stand_in_the_record():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"<!-- record -->\n(.*?)<!-- /record -->", text, re.S)
    values = rows_of(ROOT / "outputs/results")[["value", "low", "high"]].replace("", "nan").astype(float).to_numpy().ravel()
    values = [*values, *pd.read_csv(ROOT / "outputs/results/runs.csv")["minutes"]]
    numbers = re.findall(r"(?<![\w.-])\d+\.\d+", table)
    assert numbers
    for number in numbers:
        digits = len(number.split(".")[1])
        assert any(f"{v:.{digits}f}" == number for v in values), f"{number} is in no row of outputs/results"


# ------------------------------------------------------------------ smoke runs


def test_smoke_run_is_clean(smoke):
    notebook, folder = smoke
    bad = [(c.id, o.get("text", "")) for c in code_cells(notebook) for o in c.outputs if o.get("name") == "stderr"]
    assert not bad
    assert "widgets" not in notebook.metadata
    check_results(folder / "results")
    assert set(pd.read_csv(folder / "results/runs.csv")["run"].str.split("/").str[0]) == set(SECTIONS)
    assert (folder / "figures/exercise-2-denoising.gif").stat().st_size > 1000


def test_html_export_embeds_every_figure(smoke):
    notebook, folder = smoke
    html, _ = HTMLExporter().from_notebook_node(notebook)
    sources = re.findall(r'<img[^>]+src="([^"]{0,40})', html)
    assert len(sources) == len(figures_of(notebook)) >= len(list((folder / "figures").glob("*.png")))
    assert all(s.startswith("data:image/") for s in sources)
    assert all(f"<em>{figure.data['text/plain']}.</em>" in html for figure in figures_of(notebook)), "captions"


@pytest.mark.parametrize("section", [*SECTIONS, "summary"])
def test_each_section_runs_alone_after_setup(section, smoke, tmp_path):
    source = section_alone(section, tmp_path)
    run(papermill(source, tmp_path / "done.ipynb", tmp_path / "out"))
    if section == "summary":
        return
    columns = [c for c in COLUMNS if c not in ("run", "value", "low", "high")]
    alone = pd.read_csv(tmp_path / f"out/results/{section}.csv", dtype=str, keep_default_na=False)
    whole = pd.read_csv(smoke[1] / f"results/{section}.csv", dtype=str, keep_default_na=False)
    assert alone[columns].sort_values(columns).values.tolist() == whole[columns].sort_values(columns).values.tolist()


def test_killed_run_resumes_with_the_same_numbers(smoke, tmp_path):
    """Exercise 3 is killed once some chunks are finished; run again, it gives what the uninterrupted run gave."""
    command = papermill(section_alone("exercise-3", tmp_path), tmp_path / "done.ipynb", tmp_path / "out")
    first = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stderr=subprocess.DEVNULL)
    cache, deadline = tmp_path / "out/cache", time.monotonic() + 300
    while len(list(cache.glob("*.safetensors"))) < 5 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert first.poll() is None, "the run ended before it could be killed"
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    kept = {f: f.stat().st_mtime_ns for f in cache.glob("*.safetensors")}
    assert len(kept) >= 5
    run(command)
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in kept.items()), "finished chunks were computed again"
    same = ["metric", "dataset", "method", "eta", "variance", "steps", "N"]
    tables = [pd.read_csv(f / "results/exercise-3.csv", keep_default_na=False) for f in (tmp_path / "out", smoke[1])]
    resumed, whole = (t[t["metric"].isin(["FD-EffNet", "paired_rms"])].set_index(same)["value"] for t in tables)
    pd.testing.assert_series_equal(resumed.sort_index(), whole.sort_index(), rtol=1e-4)


def test_a_wrong_parameter_stops_the_run_with_a_sentence(tmp_path):
    source = section_alone("exercise-1", tmp_path)
    command = papermill(source, tmp_path / "done.ipynb", tmp_path / "out", PROFILE="enormous")
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ValueError: PROFILE = 'enormous' cannot be used; allowed:" in done.stderr


def test_bundled_checkpoint_loads_in_a_fresh_process():
    code = (
        "import sys, torch; from diffusers import DDPMPipeline\n"
        "pipe = DDPMPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "pipe.set_progress_bar_config(disable=True)\n"
        "print(pipe(num_inference_steps=2, output_type='np').images.shape, pipe.unet.dtype)"
    )
    folders = [f for f in sorted((ROOT / "outputs/checkpoints").iterdir()) if (f / "model_index.json").exists()]
    folders = [f for f in folders if "DDPMPipeline" in (f / "model_index.json").read_text()]
    assert all(sum(f.stat().st_size for f in folder.rglob("*")) < 14 * 10**6 for folder in folders)
    for folder in folders:
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, env=ENVIRONMENT)
        config = json.loads((folder / "unet/config.json").read_text())
        size, channels = config["sample_size"], config["out_channels"]
        assert done.stdout.strip() == f"(1, {size}, {size}, {channels}) torch.float32", done.stderr
        digest = hashlib.sha256((folder / "unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
        assert digest in (folder / "README.md").read_text(encoding="utf-8")
        assert (folder / "reference.safetensors").stat().st_size < 2**20


def test_two_processes_give_the_statistics_of_one(smoke, tmp_path):
    """The notebook as a script under `accelerate launch`: images are shared out, features gathered, one process writes."""
    source = section_alone("exercise-1", tmp_path)
    prepared, out = tmp_path / "study.ipynb", tmp_path / "out"
    run([*papermill(source, prepared, out), "--prepare-only"])
    run([sys.executable, "-m", "nbconvert", "--to", "script", str(prepared)])
    run([*LAUNCH, str(tmp_path / "study.py")])
    key = ["metric", "dataset", "method", "eta", "steps", "N", "detail"]
    tables = [pd.read_csv(f / "results/exercise-1.csv", keep_default_na=False) for f in (out, smoke[1])]
    two, one = (t[t["metric"].isin(["FD-EffNet", "KD-EffNet", "paired_rms"])].set_index(key)["value"] for t in tables)
    assert len(two) == len(one) > 3
    pd.testing.assert_series_equal(two.sort_index(), one.sort_index(), rtol=1e-3)


def test_a_failing_process_stops_the_launch_with_its_reason(tmp_path):
    script = tmp_path / "study.py"
    source = "\n".join(c.source for c in code_cells(nbformat.read(NOTEBOOK, 4)) if section_tag(c) in ("parameters", "setup"))
    script.write_text(source + "\nif PROCESS.process_index == 1:\n    raise OSError('disk full on the second')\n")
    done = subprocess.run([*LAUNCH, str(script)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "disk full on the second" in done.stderr
