"""What users give the notebook (tables, pictures, prompts), as they have it: faults are told before any work is done, and their
text is shown as they wrote it. How files are read: test_table.py, test_pictures.py."""

import json
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import set_up
from PIL import Image
from shared import attempt, code_cells, figures_of, papermill, run, some_sections

NASTY = ("$", "$$", "a|b", "`x`", "<b>bold</b>", "{c}", "\N{GRINNING FACE}", "_a_ *b*", "C:\\new")
PROMPTS = [
    "a $5 apple & a $6 one", r"\frac{1}{2} {apple}", "<b>'red'</b> \"apple\"\nbelow `it`", "\N{RED APPLE} red", "תפוח אדום",
    "red apple " * 500, "(apple:1.3) --no red", "",
]  # fmt: skip


def table(rows=400, seed=0):
    """Columns whose names and levels are signs of languages, ties with gaps, gaps in a number, and one row of a class."""
    rng = np.random.default_rng(seed)
    gain = np.where(
        rng.random(rows) < 0.9,
        0,
        rng.choice([99_999, 5_178, 7_298, 15_024, 3_103, 594, 2_174, 4_386, 8_614, 27_828, 10_520], rows),
    )
    weight = pd.Series(rng.normal(40, 9, rows).round(2)).where(rng.random(rows) > 0.3)
    frame = pd.DataFrame({"cost {EUR} $": rng.normal(110, 20, rows).round(1), "gain": gain, "weight `kg`|": weight})
    return frame.assign(**{"price $ or $$": rng.choice(NASTY, rows), "rare": np.where(np.arange(rows) == 7, "once", "often")})


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Exercises 4 and 5 of such a table and such prompts: (executed notebook, OUTPUT_DIR)."""
    folder = tmp_path_factory.mktemp("a $ [b]")
    table().to_csv(folder / "my $ table.csv", index=False)
    source = some_sections(folder, "exercise-4", "exercise-5")
    command = papermill(source, folder / "done.ipynb", folder / "out", TABLE=str(folder / "my $ table.csv"), TARGET="rare")
    (folder / "prompts.yaml").write_text(json.dumps({"PROMPTS": PROMPTS}, ensure_ascii=False), encoding="utf-8")  # JSON is YAML
    run([*command, "-f", str(folder / "prompts.yaml")])
    return nbformat.read(folder / "done.ipynb", 4), folder / "out"


def text_of(notebook, cell_id):
    (cell,) = [c for c in code_cells(notebook) if c.id == cell_id]
    return "".join(o.get("text", "") for o in cell.outputs)


def test_any_signs_in_names_levels_and_prompts_run_cleanly(told):
    notebook, _ = told
    assert [(c.id, o.text) for c in code_cells(notebook) for o in c.outputs if o.get("name") == "stderr"] == []
    assert len(figures_of(notebook)) == 2 + 4
    said = text_of(notebook, "e4-data")
    assert "the column to be predicted is rare" in said
    for name in table():
        assert name in said, "as it is written"
    assert "100.00% of the training table's entries come back exactly" in text_of(notebook, "e4-encode")
    assert "are read as plain words" in text_of(notebook, "e5-gallery")


def test_a_rare_class_gets_a_score(told):
    rows = pd.read_csv(told[1] / "results/exercise-4.csv")
    scores = rows[rows["metric"] == "tstr_accuracy"]
    assert set(scores["method"]) == {"real", "DDPM", "DDIM", "marginals", "SMOTE"}
    assert set(scores["detail"]) == {"predicts rare"}
    assert scores[scores["method"] == "real"]["value"].item() >= 0.9, "nearly all rows are of one class"


def test_prompts_are_kept_word_for_word_in_their_pictures(told):
    for number, prompt in enumerate(PROMPTS, 1):
        assert Image.open(told[1] / f"images/text2image-favourites-{number}-0.png").text["prompt"] == prompt


LABELS = {
    "plain": ("plain", "plain"),
    "two\n lines": ("two lines", "two lines"),
    "$5 and $6": (r"\$5 and \$6", "$5 and $6"),
    r"\$ and $": (r"\\$ and \$", r"\$ and $"),
    "\N{RED APPLE} red": ("<red apple> red", "<red apple> red"),
    "\x07bell": ("<0x7>bell", "<0x7>bell"),
    "x" * 100: ("x" * 77 + "...", "x" * 77 + "..."),
    "": ("", ""),
}


@pytest.mark.parametrize(("text", "label", "seen"), [(k, *v) for k, v in LABELS.items()])
def test_a_label_is_drawn_as_it_is_written(nb, text, label, seen):
    """seen: what matplotlib makes of the label; it draws mathematics where that differs in kind."""
    assert nb.label_of(text) == label
    figure = nb.plt.figure()
    assert figure.text(0, 0, label)._preprocess_math(label) == (seen, False)
    nb.plt.close(figure)


BAD_TABLES = {
    "no such target": (lambda frame: frame, "height", r"no column 'height'.*cost \{EUR\} \$"),
    "a target that is left out": (lambda frame: frame.assign(key=[f"k{k}" for k in range(len(frame))]), "key", "'key'.*left out"),
    "too few rows": (lambda frame: frame[:50], "", "50 rows"),
    "one column": (lambda frame: frame[["gain"]], "", "1 column"),
}


@pytest.mark.parametrize(("change", "target", "says"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_that_cannot_be_used_stops_set_up(tmp_path, change, target, says):
    change(table()).to_csv(tmp_path / "table.csv", index=False)
    with pytest.raises(ValueError, match=rf"^TABLE: .*{says}.*\.$") as error:
        set_up("inputs", PROFILE="smoke", OUTPUT_DIR=str(tmp_path / "out"), TABLE=str(tmp_path / "table.csv"), TARGET=target)
    assert "\n" not in str(error.value)
    del sys.modules["inputs"]


def test_pictures_that_cannot_be_used_stop_a_section_before_it_samples(tmp_path):
    """cifar10's are too few; what the first network would draw is not drawn either."""
    for name, n in (("mnist", 20), ("cifar10", 5)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(n):
            pixels = np.random.default_rng(k).integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{k}.png")
    source = some_sections(tmp_path, "exercise-1")
    done = attempt(papermill(source, tmp_path / "done.ipynb", tmp_path / "out", DATA_DIR=str(tmp_path / "data")))
    assert done.returncode != 0
    cause = done.stderr.rstrip().splitlines()[-1]
    assert cause.startswith("ValueError: cifar10: ")
    assert "5 readable pictures, and 8 are needed" in cause
    assert not (tmp_path / "out/results").exists()
