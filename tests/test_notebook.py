"""The notebook as a user meets it: its structure, the committed outputs, a smoke run, each section alone, a killed run."""

import ast
import copy
import hashlib
import json
import re
import subprocess
import symtable
import sys
from itertools import chain

import cost_study
import nbformat
import pandas as pd
import pytest
from shared import (
    ENVIRONMENT,
    NOTEBOOK,
    ORDER,
    ROOT,
    SECTIONS,
    code_cells,
    figures_of,
    papermill,
    run,
    section_tag,
    shown_by,
    some_sections,
)

COLUMNS = ["run", "metric", "value", "low", "high", "N", "n_real", "dataset", "method", "eta", "variance", "spacing"]
COLUMNS += ["steps", "seed", "detail"]
BUDGET = {"parameters": 10, "setup": 849, "foundations": 150, "exercise-1": 100, "exercise-2": 110, "exercise-3": 150}
BUDGET |= {"exercise-4": 250, "exercise-5": 150, "stability": 90, "speed": 90, "summary": 60}  # lines of code at most
# two processes; without --multi_gpu accelerate starts a single one on CPUs, silently
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """(executed notebook, its OUTPUT_DIR) of a whole smoke run without a network."""
    folder = tmp_path_factory.mktemp("smoke")
    run(papermill(NOTEBOOK, folder / "notebook.ipynb", folder))
    return nbformat.read(folder / "notebook.ipynb", 4), folder


# ---------------------------------------------------------------- structure


def test_every_code_cell_has_one_section_tag_and_sections_come_in_order(committed):
    tags = [section_tag(c) for c in code_cells(committed)]
    assert tags[0] == "summary", "the answers open the notebook"
    assert tags.count("parameters") == 1
    setup = max(k for k, tag in enumerate(tags) if tag == "setup")
    assert set(tags[1:setup]) == {"parameters", "setup", "foundations"}, "a first picture may stand among the definitions"
    body = tags[setup + 1 :]
    assert [ORDER.index(t) for t in body] == sorted(ORDER.index(t) for t in body)


def test_a_reader_meets_a_denoised_picture_before_plumbing(committed):
    cells = code_cells(committed)
    plumbing = [k for k, c in enumerate(cells) if "plumbing" in c.metadata.tags and section_tag(c) == "setup"]
    (first,) = [k for k, c in enumerate(cells) if c.id == "first"]
    assert first < min(plumbing)
    assert all(cells[k].metadata.jupyter.source_hidden for k in plumbing), "folded in Jupyter"
    assert all(section_tag(c) != "setup" for c in cells[max(plumbing) + 1 :]), "plumbing ends the set-up"


def test_cell_ids_are_names_and_unique(committed):
    ids = [c.id for c in committed.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[a-z][a-z0-9-]+", i) for i in ids)


def lines_of(cell):
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def test_the_notebook_keeps_its_budget(committed):
    cells = code_cells(committed)
    parts = {}
    for cell in cells:
        parts[section_tag(cell)] = parts.get(section_tag(cell), 0) + lines_of(cell)
    over = {part: n for part, n in parts.items() if n > BUDGET[part]}
    assert not over, f"more lines than {BUDGET}: {over}"
    assert sum(parts.values()) <= 1754
    assert len(cells) <= 120
    assert not {c.id: lines_of(c) for c in cells if lines_of(c) > 40}
    assert sorted(map(lines_of, cells))[len(cells) // 2] <= 17
    assert NOTEBOOK.stat().st_size <= 6 * 2**20  # figures in true colours
    assert not any(re.match(r"\s*[%!]", line) for c in cells for line in c.source.splitlines())
    words = sum(len(c.source.split()) for c in committed.cells if c.cell_type == "markdown")
    assert words <= 6 * sum(parts.values())


def names_in(cell, stored):
    """Names that a cell's own level assigns (stored), or that the cell reads anywhere."""
    found = set()
    for node in ast.parse(cell.source).body if stored else [ast.parse(cell.source)]:
        if stored and isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store if stored else ast.Load):
                found.add(part.id)
    return found


def test_a_name_means_one_thing(committed):
    """A name assigned in two sections is either a scratch of its cell, or the sections disturb each other when rerun."""
    where = {}
    for cell in code_cells(committed):
        for name in names_in(cell, stored=True):
            where.setdefault(name, set()).add(section_tag(cell))
    shared = {name for name, sections in where.items() if len(sections - {"parameters"}) > 1}
    leaks = {(c.id, n) for c in code_cells(committed) for n in shared & names_in(c, False) - names_in(c, True)}
    assert not {(i, n) for i, n in leaks if not inside_functions_only(committed, i, n)}


def inside_functions_only(notebook, cell_id, name):
    """Is the name read in functions and comprehensions alone that have it as a variable of their own?"""
    (cell,) = [c for c in notebook.cells if c.id == cell_id]
    table = symtable.symtable(cell.source, cell_id, "exec")

    def reads_global(block):
        own = {s.get_name(): s for s in block.get_symbols()}
        here = name in own and own[name].is_referenced() and (block is table or own[name].is_global())
        return here or any(reads_global(child) for child in block.get_children())

    return not reads_global(table)


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


def test_committed_figures_have_alternative_text_and_files(committed):
    shown = figures_of(committed)
    assert len(shown) >= 24
    assert len(list((ROOT / "outputs/figures").glob("*.png"))) >= len(shown) - 1


@pytest.mark.parametrize("which", ["committed", "smoke"])
def test_outputs_are_such_that_every_viewer_shows_them(which, request):
    """Figures are PNG with alternative text and a caption, tables Markdown: LaTeX, PDF and graders' tools drop HTML."""
    notebook = request.getfixturevalue(which)
    notebook = notebook[0] if which == "smoke" else notebook
    outputs = shown_by(notebook)
    assert not [o.data for o in outputs if not {"image/png", "text/markdown"} & set(o.data)], "nothing else stays"
    assert not [o.data["text/plain"] for o in outputs if "text/html" in o.data]
    for figure in figures_of(notebook):
        alt = figure.metadata["image/png"]["alt"]
        assert len(alt) >= 20
        assert any(o.data.get("text/markdown", "").startswith(f"*{alt}") for o in outputs), "the caption"


def rows_of(folder):
    frames = [pd.read_csv(f, dtype=str, keep_default_na=False) for f in sorted(folder.glob("*.csv")) if f.stem != "runs"]
    return pd.concat(frames)


def check_results(folder):
    rows, runs = rows_of(folder), pd.read_csv(folder / "runs.csv", dtype=str, keep_default_na=False)
    assert list(rows.columns) == COLUMNS
    assert set(rows["run"]) <= set(runs["run"])
    assert (runs[["device", "versions", "profile", "date"]] != "").all().all()
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


@pytest.fixture(scope="module")
def record():
    """The record's rows with numbers as numbers."""
    rows = rows_of(ROOT / "outputs/results")
    for column in ("value", "low", "high"):
        rows[column] = pd.to_numeric(rows[column])
    return rows


def test_the_distance_punishes_what_is_broken(record):
    controls = record[record["method"].isin(["untrained", "shuffled", "wrong-schedule"]) & (record["metric"] == "FD-EffNet")]
    controls = controls[controls["run"].str.startswith("foundations/")]
    assert set(controls["method"]) == {"untrained", "shuffled", "wrong-schedule"}
    (N,) = set(controls["N"])
    trained = record[record["run"].str.startswith("foundations/") & (record["method"] == "DDIM") & (record["N"] == N)]
    trained = trained[(trained["metric"] == "FD-EffNet") & ~trained["detail"].str.contains("blocks")]
    assert (controls["low"] > trained["high"].max()).all()


def test_the_record_bears_its_statements_out(record):
    def of(metric, **where):
        rows = record[record["metric"] == metric]
        for column, wanted in where.items():
            rows = rows[rows[column] == wanted]
        return rows.iloc[-1]

    inversion = record[record["metric"] == "inversion_mse"].assign(steps=lambda r: r["steps"].astype(int)).sort_values("steps")
    assert inversion["high"].iloc[-1] < inversion["low"].iloc[0], "inversion error falls with the steps"
    assert of("std_given_x_T", method="DDIM")["value"] < 1e-6 < of("std_given_x_T", method="DDPM")["value"]
    assert abs(of("ddpm_extra_cost")["value"]) < 0.1
    assert 15 < of("speedup_50_to_1000")["value"] < 21, "time is proportional to the steps"
    assert of("max_gap_to_DDIMPipeline")["value"] < 1 / 127.5, "the same 8-bit images"
    assert record[record["metric"] == "gaussian_error_slope"]["value"].between(0.8, 1.1).all()
    assert of("column_shapes", method="DDPM")["value"] > 0.95
    assert of("column_pair_trends", method="DDPM")["value"] > 0.93
    assert of("tstr_r2", method="DDPM")["value"] > of("tstr_r2", method="real")["value"] - 0.02
    assert 0.45 < of("dcr_share", method="DDPM")["value"] < 0.55
    paired = record[record["run"].str.startswith("exercise-3/") & (record["metric"] == "paired_rms") & (record["eta"] == "0.0")]
    paired = paired.assign(steps=paired["steps"].astype(int)).sort_values("steps")["value"]
    assert paired.is_monotonic_decreasing, "DDIM's images approach their limit"
    assert of("steps_enough", eta="0.0")["value"] == 10, "no gain of DDIM can be shown after the first"
    for eta, variance in (("0.5", "small"), ("1.0", "small"), ("1.0", "large")):
        assert of("steps_enough", eta=eta, variance=variance)["value"] > 10, "more steps help every sampler with fresh noise"
    alone, guided = (of("caption_retrieval_top1", method="DDIM", detail=f"seen captions, w = {w}") for w in (1, 4))
    assert alone["high"] < guided["low"], "guidance raises the share that is recognised"


def test_the_prose_of_exercise_1_and_of_stability_follows_the_record(record):
    e1 = record[record["run"].str.fullmatch(r"exercise-1/[^/]+/[^/]+")]  # older runs carry their time
    at_50 = e1[(e1["steps"] == "50") & e1["method"].isin(["DDIM", "DDPM"]) & e1["metric"].isin(["FD-EffNet", "KD-EffNet"])]
    values = at_50.pivot(index="dataset", columns=["metric", "method"], values="value")
    first = values["FD-EffNet"]["DDPM"] < values["FD-EffNet"]["DDIM"]
    assert first.equals(values["KD-EffNet"]["DDPM"] < values["KD-EffNet"]["DDIM"]), "both distances give one order"
    gap = e1[e1["metric"] == "FD-EffNet difference"].set_index("dataset")
    sampler, steps = (gap[gap["detail"].str.contains(end)] for end in ("minus DDIM", "minus DDPM"))
    closer = sampler["high"] < 0
    assert set(closer[closer].index) == {"mnist", "emoji", "landscapes"}, "there DDPM is closer"
    assert (sampler["low"] < 0).all(), "and on the other two it is undecided"
    assert (steps["high"] > 0).all(), "many more steps bring it no closer that could be shown"
    assert steps["low"]["mnist"] > 0, "and on MNIST further away"
    copies = e1[(e1["metric"] == "closer_than_real") & (e1["method"] != "real")]
    assert len(copies)
    assert (copies["value"] == 0).all(), "no generated image lies close to a training image"
    errors = e1[e1["metric"] == "paired_rms"].pivot(index="steps", columns="dataset", values="value")
    assert ((errors.loc["5"] / errors.loc["50"]).between(5, 20)).all(), "the error falls about as 1/S"
    assert (errors.loc["20"] / errors.loc["50"] > 2.5 * 1.2).all(), "and faster at the end"
    at_5 = e1[(e1["metric"] == "paired_rms") & (e1["steps"] == "5")].set_index("dataset")
    small = at_5.index.isin(["mnist", "cifar10"])
    assert at_5["high"][small].max() < at_5["low"][~small].min(), "28 and 32 px lie below the other three"
    seconds = e1[(e1["metric"] == "seconds_per_image") & (e1["steps"] == "50")].pivot(
        index="dataset", columns="method", values="value"
    )
    dearer = seconds["DDPM"] / seconds["DDIM"]
    assert (dearer[["mnist", "cifar10", "emoji"]] < 1.1).all(), "the fresh noise is hardly noticed up to 64 px"
    assert 1.3 < dearer["landscapes"] < 1.6, "almost half as long again at 256 px"
    ends = record[(record["metric"] == "FD-pixels") & record["detail"].str.contains("training step 600; ")]
    ends = ends.assign(weights=ends["detail"].str.split().str[0]).pivot(index="method", columns="weights", values="value")
    early = record[(record["metric"] == "FD-pixels") & (record["detail"] == "EMA weights, training step 60; 3 seeds")]
    early = early.set_index("method")
    assert early["low"]["DDIM"] > early["high"]["DDPM"], "a tenth of the way DDIM is further from the real digits"
    gain = ends["EMA"] / ends["raw"]
    assert (gain < 0.7).all()
    assert abs(gain["DDIM"] - gain["DDPM"]) < 0.1, "averaging helps both samplers about alike"


def test_the_prose_of_exercise_4_follows_the_record(record):
    e4 = record[record["run"].str.startswith("exercise-4/")].pivot(index="metric", columns="method")
    low, high, value = (e4[column].astype(float) for column in ("low", "high", "value"))
    assert (value["DDPM"] - value["DDIM"]).abs().max() < 0.01, "no score tells DDPM from DDIM"
    assert ((low["DDPM"] < high["DDIM"]) & (low["DDIM"] < high["DDPM"])).all()
    told = "c2st_auc_boosted"
    assert value["real"][told] < 0.53 < low["DDPM"][told], "boosting tells drawn rows, and fresh real ones not"
    assert high["SMOTE"][told] < low["DDPM"][told]
    assert low["SMOTE"]["tstr_r2"] > high["DDPM"]["tstr_r2"]
    assert low["SMOTE"]["dcr_share"] > 0.55 > high["DDPM"]["dcr_share"]
    assert value["marginals"]["column_shapes"] > 0.98
    assert low["marginals"]["tstr_r2"] < 0 < high["marginals"]["tstr_r2"]


def test_the_record_lies_above_its_floor_and_below_its_controls():
    rows = rows_of(ROOT / "outputs/results")
    rows = rows[rows["metric"].isin(["FID", "FD-EffNet"]) & rows["dataset"].isin(["mnist"])]
    for (_, N), group in rows.groupby(["metric", "N"]):
        real = group[group["method"] == "real"]["value"].astype(float)
        made = group[group["method"].isin(["DDPM", "DDIM"])]["value"].astype(float)
        if len(real) and len(made):
            assert real.max() < made.min(), f"images of N = {N} beat real ones"


def test_the_minutes_on_graphics_cards_are_those_of_the_cost_model_and_within_the_plan():
    """Computed anew from the plans; the goals are the design's."""
    table = cost_study.table()
    assert f"<!-- minutes -->\n{table}\n<!-- /minutes -->" in (ROOT / "README.md").read_text(encoding="utf-8")
    header, *_, last = (line.strip("|").split("|") for line in table.splitlines())
    minutes = {head.strip().replace("`", ""): float(total) for head, total in zip(header[1:], last[1:], strict=True)}
    goals = {
        "H100, 80 GB: full, bundled networks": 12,
        "H100, 80 GB: full, hub networks": 30,
        "T4, 16 GB: full, bundled networks": 30,
    }
    assert {name: minutes[name] for name, goal in goals.items() if minutes[name] > goal} == {}
    assert len(minutes) == 6


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
    assert len((folder / "results/answers.md").read_text(encoding="utf-8").splitlines()) >= 8


@pytest.mark.parametrize("section", [*SECTIONS, "summary"])
def test_each_section_runs_alone_after_setup(section, smoke, tmp_path):
    """By README's line."""
    assert f"`python outputs/tools/alone.py {section}`" in (ROOT / "README.md").read_text(encoding="utf-8")
    options = ["-p", "PROFILE", "smoke", "-p", "OUTPUT_DIR", str(tmp_path / "out"), "--no-progress-bar"]
    run([sys.executable, str(ROOT / "outputs/tools/alone.py"), section, *options])
    done = nbformat.read(tmp_path / f"out/{section}.ipynb", 4)
    assert {section_tag(c) for c in code_cells(done) if "injected-parameters" not in c.metadata.tags} <= {
        *("parameters", "setup"), section,
    }  # fmt: skip
    chapters = [c.source.splitlines()[0] for c in done.cells if c.cell_type == "markdown" and c.source.startswith("# ")]
    assert len(chapters) == (4 if section == "summary" else 3), "a title, set-up and its own chapter"
    if section != "summary":
        assert keys_of(tmp_path / "out", section) == keys_of(smoke[1], section)


def keys_of(folder, section):
    """What a section's rows are about, in order: all columns but the measured numbers."""
    rows = pd.read_csv(folder / f"results/{section}.csv", dtype=str, keep_default_na=False)
    return sorted(map(tuple, rows[[c for c in COLUMNS if c not in ("value", "low", "high")]].to_numpy()))


def test_sections_may_be_rerun_in_any_order(smoke, tmp_path):
    """Sections in reverse order, then each once more, in one kernel: the rows are those of Run All."""
    notebook = nbformat.read(NOTEBOOK, 4)
    cells = code_cells(notebook)
    first = [c for c in cells if section_tag(c) in ("parameters", "setup")]
    by_section = [[c for c in cells if section_tag(c) == section] for section in SECTIONS]
    notebook.cells = [*first, *chain(*reversed(by_section)), *copy.deepcopy([*chain(*by_section)])]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    nbformat.write(notebook, tmp_path / "again.ipynb")
    run(papermill(tmp_path / "again.ipynb", tmp_path / "done.ipynb", tmp_path / "out"))
    for section in SECTIONS:
        assert keys_of(tmp_path / "out", section) == keys_of(smoke[1], section), section
    tables = [
        pd.concat(pd.read_csv(f / f"results/{s}.csv", keep_default_na=False) for s in SECTIONS)
        for f in (tmp_path / "out", smoke[1])
    ]
    again, whole = (t[t["metric"].isin(["FD-EffNet", "paired_rms", "inversion_mse", "column_shapes"])] for t in tables)
    key = ["run", "metric", "dataset", "method", "eta", "variance", "steps", "N", "detail"]
    again, whole = (t.set_index(key)["value"].astype(float).sort_index() for t in (again, whole))
    pd.testing.assert_series_equal(again, whole, rtol=1e-3)


def test_a_wrong_parameter_stops_the_run_with_a_sentence(tmp_path):
    source = some_sections(tmp_path, "exercise-1")
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
        assert (folder / "reference.safetensors").stat().st_size < 1.5 * 2**20, "with the features of every training image"


def test_two_processes_give_the_statistics_of_one(smoke, tmp_path):
    """The notebook as a script under `accelerate launch`: images are shared out, features gathered, one process writes."""
    source = some_sections(tmp_path, "exercise-1")
    prepared, out = tmp_path / "study.ipynb", tmp_path / "out"
    run([*papermill(source, prepared, out), "--prepare-only"])
    run([sys.executable, "-m", "nbconvert", "--to", "script", str(prepared)])
    run([*LAUNCH, str(tmp_path / "study.py")])
    key = ["metric", "dataset", "method", "eta", "steps", "N", "detail"]
    tables = [pd.read_csv(f / "results/exercise-1.csv", keep_default_na=False) for f in (out, smoke[1])]
    two, one = (t[t["metric"].isin(["FD-EffNet", "KD-EffNet", "paired_rms"])].set_index(key)["value"] for t in tables)
    assert len(two) == len(one) > 3
    pd.testing.assert_series_equal(two.sort_index(), one.sort_index(), rtol=1e-3)
    measured = (pd.read_csv(out / "results/exercise-1.csv")["metric"] == "seconds_per_image").sum()
    assert len(list((out / "cache").glob("*.npz"))) == 2 * measured, "each process keeps its chunks"


def test_a_failing_process_stops_the_launch_with_its_reason(tmp_path):
    script = tmp_path / "study.py"
    source = "\n".join(c.source for c in code_cells(nbformat.read(NOTEBOOK, 4)) if section_tag(c) in ("parameters", "setup"))
    script.write_text(source + "\nif PROCESS.process_index == 1:\n    raise OSError('disk full on the second')\n")
    done = subprocess.run([*LAUNCH, str(script)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "disk full on the second" in done.stderr
