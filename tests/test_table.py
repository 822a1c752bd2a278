"""outputs/tools/table.py: tables as people have them are read rightly, or refused with the true cause in one sentence."""

import gzip
import importlib.metadata
import importlib.util
import io
import json
import random
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets
from shared import ROOT

TOOL = ROOT / "outputs" / "tools" / "table.py"
N = 300
_spec = importlib.util.spec_from_file_location("table_tool", TOOL)
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)
rng = np.random.default_rng(0)
REAL, WHOLE = rng.normal(40, 9, N).round(2).tolist(), rng.integers(1000, 99999, N).tolist()
COLOUR = rng.choice(["blue", "green", "red"], N).tolist()
PLAIN = pd.DataFrame({"x": REAL, "n": WHOLE, "colour": COLOUR})


@pytest.fixture
def read(tmp_path):
    """Writes text or bytes to a file and reads it, without a warning."""

    def reads(content, wanted=""):
        path = tmp_path / "t.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return tool.read(path, wanted)

    return reads


def csv_of(separator=",", end="\n", header=True, **columns):
    """A CSV text of columns."""
    rows = [*[columns] * header, *zip(*columns.values(), strict=True)]
    return "".join(separator.join(map(str, row)) + end for row in rows)


def cycle(*items, n=N):
    """N items, these over and over."""
    return [items[k % len(items)] for k in range(n)]


def is_plain(found):
    """Was PLAIN found, whole?"""
    frame, notes, target = found
    assert list(frame) == ["x", "n", "colour"]
    assert [frame.x.tolist(), frame.n.tolist(), frame.colour.tolist()] == [REAL, WHOLE, COLOUR]
    assert [frame.dtypes[c] for c in frame] == ["float64", "int64", "category"]
    assert {c: notes[c] for c in frame} == {"x": "number", "n": "number", "colour": "category, 3 levels"}
    assert target == "colour"
    return notes


# ---------------------------------------------------------------- the file's form

TEXT = PLAIN.to_csv(index=False)
LINES = TEXT.splitlines()
GERMAN = csv_of(";", x=[str(v).replace(".", ",") for v in REAL], n=[f"{v:,}".replace(",", ".") for v in WHOLE], colour=COLOUR)
FORMS = {
    "plain": TEXT, "semicolons": TEXT.replace(",", ";"), "tabs": TEXT.replace(",", "\t"), "pipes": TEXT.replace(",", "|"),
    "spaces": TEXT.replace(",", " "), "aligned": PLAIN.to_string(index=False), "comma and space": TEXT.replace(",", ", "),
    "German": GERMAN, "sep=": "sep=;\n" + GERMAN, "CRLF": TEXT.replace("\n", "\r\n"), "old Mac": TEXT.replace("\n", "\r"),
    "no last line end": TEXT.rstrip(), "BOM": TEXT.encode("utf-8-sig"), "UTF-16": TEXT.encode("utf-16"),
    "all quoted": PLAIN.to_csv(index=False, quoting=1), "empty lines": "\n\n" + TEXT.replace("\n", "\n\n") + "\n\n",
    "trailing comma": "\n".join([LINES[0], *(line + "," for line in LINES[1:])]),
    "trailing comma in the header, too": "\n".join(line + "," for line in LINES),
    "empty columns and rows": "\n".join(["," * 9] + [f",,{line},,,," for line in LINES] + ["," * 9] * 5),
    "empty column within": csv_of(x=REAL, **{"": cycle("")}, n=WHOLE, colour=COLOUR),
    "thousands": csv_of(x=REAL, n=[f'"{v:,}"' for v in WHOLE], colour=COLOUR),
    "thousands of Switzerland": csv_of(";", x=REAL, n=[f"CHF {v:,}".replace(",", "'") for v in WHOLE], colour=COLOUR),
    "thousands of France": csv_of("\t", x=REAL, n=[f"{v:,} €".replace(",", "\u202f") for v in WHOLE], colour=COLOUR),
    "currency, percent": csv_of(x=[f"{v}%" for v in REAL], n=[f"$ {v}" for v in WHOLE], colour=COLOUR),
    "comma in a name": GERMAN.replace("x;", '"x";'),
}  # fmt: skip


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_one_table_in_all_its_forms_is_the_same_table(read, content):
    is_plain(read(content))


INDEXED = {
    "pandas": PLAIN.to_csv(),
    "pandas, shuffled": PLAIN.set_index(np.random.default_rng(0).permutation(N) * 7).to_csv(),
    "pandas, concatenated": PLAIN.set_index(np.arange(N) % 100).to_csv(),
    "pandas, texts": PLAIN.set_index(pd.Index([f"row {k}" for k in range(N)])).to_csv(),
    "R, write.csv": PLAIN.set_index(np.arange(1, N + 1)).to_csv(quoting=2),
    "R, write.table": '"x" "n" "colour"\n'
    + PLAIN.set_index(np.arange(1, N + 1).astype(str)).to_csv(header=False, quoting=2, sep=" "),
    "R, header one shorter": "x,n,colour\n" + PLAIN.to_csv(header=False),
    "pandas, read and written twice": PLAIN.reset_index().rename(columns={"index": "Unnamed: 0"}).to_csv(index=False),
}


@pytest.mark.parametrize("content", INDEXED.values(), ids=INDEXED)
def test_an_index_without_a_name_is_left_out_and_nothing_shifts(read, content):
    notes = is_plain(read(content))
    (index,) = set(notes) - set(PLAIN)
    assert notes[index] == "left out: an identifier"


def test_row_names_are_not_mistaken_when_the_last_column_has_gaps(read):
    last = [v if k % 3 else "" for k, v in enumerate(REAL)]
    frame, notes, _ = read("x,colour,last\n" + csv_of(header=False, i=range(1, N + 1), x=REAL, colour=COLOUR, last=last))
    assert (frame.x.tolist(), notes["row name"]) == (REAL, "left out: an identifier")
    with pytest.raises(ValueError, match="line 7 has 4 fields and the header 3"):  # a comma too many, not row names
        read("\n".join([LINES[0], *(line + ("," if k != 5 else ",stray") for k, line in enumerate(LINES[1:]))]))


def test_names_that_are_numbers_are_names(read):
    for names in (["0", "1", "2"], ["1", "2", "3"], ["2019", "2020", "2021"]):
        frame, *_ = read(csv_of(**dict(zip(names, (REAL, WHOLE, REAL[::-1]), strict=True))))
        assert list(frame) == names
        assert len(frame) == N
    assert list(read(csv_of(country=COLOUR, **{"2020": WHOLE}))[0]) == ["country", "2020"]


def test_totals_and_repeated_headers_are_left_out_and_said(read):
    for total in ("Total,9999,", ",Total:,9999", "Summe"):
        assert is_plain(read(TEXT + total + "\n"))["last line"].startswith("left out: totals")
    assert is_plain(read(TEXT.replace(LINES[100], LINES[0] + "\n" + LINES[100])))["repeated header"] == "left out: 1 lines"
    frame, notes, _ = read(csv_of(kind=cycle("total", "part"), x=REAL))
    assert (len(frame), "last line" in notes) == (N, False)


# ---------------------------------------------------------------- refusals

WIDE = {f"c{k}": [k] * 5 for k in range(5)}
BAD = {
    "nothing": ("", "it is empty"),
    "line ends": ("\n\n\r\n", "it is empty"),
    "separators": (",,,\n,,,\n", "it is empty"),
    "header only": ("a,b\n", "it has 0 rows"),
    "one row": ("a,b\n1,2\n", "it has 1 rows"),
    "one column": ("a\n" + "\n".join(map(str, REAL)), "1 columns"),
    "duplicate": ("a,a\n" + "1,2\n" * N, "two columns named 'a'"),
    "too long": ("a,b\n1,2\n1,2,3,4\n", "line 3 has 4 fields and the header 2"),
    "too short": ("a,b,c\n" + "1,2,3\n" * N + "1,2\n", "line 302 has 2 fields and the header 3"),
    "decimal commas not quoted": ("a,b\n" + "1,5,2,5\n" * N, "line 2 has 4 fields and the header 2"),
    "a title": ("Sales\na,b,c\n" + "1,2,3\n" * N, "line 2 has 3 fields and the header 1 (found: a, b, c; header: Sales)"),
    "a title with separators": ("Sales,,,\na,b,c,d\n" + "1,2,3,4\n" * N, "no name in the first line (Sales"),
    "a footer": (TEXT + "Source: Eurostat\n", "line 302 has 1 fields and the header 3"),
    "numbers, no header": (csv_of(header=False, a=REAL, b=WHOLE), "its first line holds values"),
    "mixed, no header": (csv_of(header=False, a=REAL, b=COLOUR), "its first line holds values"),
    "texts, no header": (csv_of(header=False, a=COLOUR, b=COLOUR[::-1], c=COLOUR), "its first line holds values"),
    "years, no header": (csv_of(header=False, a=COLOUR, b=cycle(*range(1990, 2020))), "its first line holds values"),
    "only texts": (csv_of(a=[f"text {k}" for k in range(N)], b=[f"note {k}" for k in range(N)]), "a: left out: an identifier"),
    "many levels": (csv_of(a=[f"t{k % 150}" for k in range(N)], b=WHOLE), "a text of 150 different values, at most 100"),
    "constants": (csv_of(a=cycle(1), b=cycle("x")), "2 that are not constant are needed"),
    "too few": ("a,b\n" + "1,2\n" * 20, "it has 20 rows"),
    "binary": (random.Random(0).randbytes(5000), "it is no text"),
    "zeros": (b"a,b\n\0\0\n", "it is no text"),
    "UTF-16 without a mark": (TEXT.encode("utf-16-le"), "it is no text"),
    "UTF-32": (TEXT.encode("utf-32"), "it is no text"),
    "gzip": (gzip.compress(TEXT.encode()), "it is a gzip file"),
    "Excel": (b"PK\3\4" + bytes(99), "an Excel workbook"),
    "LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    "JSON": (json.dumps(PLAIN.to_dict("records"), indent=1), "it is JSON"),
    "JSON lines": (PLAIN.to_json(orient="records", lines=True), "it is JSON"),
    "HTML": ("\n<!DOCTYPE html>\n<html><body>404, not found</body></html>", "it is a web page"),
    "open quotation mark": ('a,b\n1,"x\n' + "1,2\n" * N, 'the quotation mark (") that opens in line 2 is never closed'),
}  # fmt: skip


@pytest.mark.parametrize(("content", "says"), BAD.values(), ids=BAD)
def test_what_cannot_be_learned_is_refused_with_the_cause(read, content, says):
    with pytest.raises(ValueError, match=r".") as error:
        read(content)
    assert says in str(error.value)


def test_names_without_values_and_values_without_names(read):
    frame, notes, _ = read(csv_of(x=REAL, **{"": WHOLE}, colour=COLOUR))
    assert frame["column 2 without a name"].tolist() == WHOLE
    frame, notes, _ = read(TEXT.replace(LINES[0], LINES[0] + ",,").replace(LINES[9], LINES[9] + ",see page 4,"))
    assert notes["column 4 without a name"] == "left out: 100% missing"
    assert list(frame) == list(PLAIN)


# ---------------------------------------------------------------- numbers


def test_every_number_is_the_one_that_was_written(read):
    values = [
        0.1 + 0.2,
        1e-12,
        5e-324,
        1.7976931348623157e308,
        -0.1,
        1 / 3,
        123456789012345.6,
        2**53 + 2.0,
        *rng.normal(size=N - 8).tolist(),
    ]
    whole = [123456789012345, -(2**52), 0, *range(N - 3)]
    huge = [2**63, 2**64, -(2**70), *range(N - 3)]
    few = cycle(0.1 + 0.2, 0.3, 1e-12, 5, 2**63)
    frame, *_ = read(csv_of(v=map(repr, values), w=whole, huge=huge, few=map(repr, few)))
    assert frame.v.tolist() == values
    assert (frame.w.dtype, frame.w.tolist()) == ("int64", whole)
    assert (frame.huge.dtype, frame.huge.tolist()) == ("float64", [float(v) for v in huge])
    assert [float(level) for level in frame.few] == few
    assert list(frame.few.cat.categories) == ["1e-12", "0.3", "0.30000000000000004", "5", "9.223372036854776e+18"]


SHOWS = [("1,234.5", 1234.5), ("-$5", -5), ("$-5", -5), ("(5)", -5), ("($1,200.50)", -1200.5), ("5 %", 5), ("−3", -3),
         ("+.5", 0.5), ("5.", 5), ("1'234", 1234), ("1 234", 1234), ("US$ 12", 12), ("12 EUR", 12), ("1e3", 1000), ("007", 7),
         ("0.998", 0.998), ("1e400", np.inf), ("-inf", np.inf)]  # fmt: skip
SHOWS_NOT = ["", "-", ".", "e5", "E10", ".e5", "1,2", "1,23", "0,998", "5'11", "12 34", "1.2.3", "5kg", "1-2", "1_000", "0x1F",
             "(5", "()", "$"]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), SHOWS + [(field, np.nan) for field in SHOWS_NOT])
def test_what_a_field_shows(field, value):
    assert tool.number_in(field, ".") == pytest.approx(value, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize(
    ("field", "value"), [("1.234,5", 1234.5), ("0,998", 0.998), ("1.234", 1234), ("1 234,5 €", 1234.5), ("1.5", np.nan)]
)
def test_what_a_field_shows_with_a_decimal_comma(field, value):
    assert tool.number_in(field, ",") == pytest.approx(value, rel=0, abs=0, nan_ok=True)


def test_the_decimal_mark_is_the_columns_or_the_files(read):
    dots = [f"{v:,}".replace(",", ".") for v in WHOLE]
    comma = [f"{v:.3f}".replace(".", ",") for v in REAL]
    frame, *_ = read(csv_of(";", dots=dots, comma=comma))
    assert (frame.dots.tolist(), frame.comma.tolist()) == (WHOLE, REAL)
    frame, *_ = read(csv_of(";", comma=[f"{v:.2f}".replace(".", ",") for v in REAL], point=[f"{v:.4f}" for v in REAL]))
    assert (frame.point.tolist(), frame.comma.tolist()) == (REAL, REAL)
    frame, *_ = read(csv_of(";", mixed=cycle("980", "1.250", *map(str, range(100, 150))), x=COLOUR))
    assert frame.mixed[1] == 1250
    frame, *_ = read(csv_of(a=[f'"{v:,}"' for v in WHOLE], b=[f"{v:.3f}" for v in REAL]))
    assert (frame.a.tolist(), frame.b.tolist()) == (WHOLE, REAL)
    frame, *_ = read(
        csv_of(
            ";",
            **{
                "Weight, kg": [f"{v:.1f}".replace(".", ",") for v in REAL],
                "Height, cm": [f"{v:.2f}".replace(".", ",") for v in REAL],
            },
        )
    )
    assert frame["Height, cm"].tolist() == REAL


def test_missing_numbers_are_filled_with_a_value_that_occurs_marked_and_said(read):
    for mark in ("", "?", "NA", "n/a", "-", "NaN", "None", "#DIV/0!"):
        holes = [mark if k % 10 == 0 else v for k, v in enumerate(WHOLE)]
        frame, notes, target = read(csv_of(x=REAL, n=holes))
        kept = [v for v in holes if v != mark]
        assert frame.n.dtype == "int64"
        assert frame.n.tolist() == [sorted(kept)[(len(kept) - 1) // 2] if v == mark else v for v in holes]
        assert frame["n missing"].tolist() == ["yes" if v == mark else "no" for v in holes]
        assert notes["n"] == "number, 10.0% missing, filled with the median and marked by a column of its own"
        assert target == "n"
    frame, notes, _ = read(csv_of(n=[*WHOLE[:-3], "inf", "1e400", "abc"], **{"n missing": COLOUR}))
    assert "1.0% missing (among them inf, 1e400, abc)" in notes["n"]
    assert frame["n missing"].tolist() == COLOUR
    assert frame["n missing?"].tolist() == ["no"] * (N - 3) + ["yes"] * 3
    frame, notes, _ = read(csv_of(few=cycle(1, 2, 10, "NA"), x=REAL, rare=["1.5"] * 100 + [""] * 200))
    assert frame.few.tolist() == cycle("1", "2", "10", "(missing)")
    assert list(frame.few.cat.categories) == ["1", "2", "10", "(missing)"]
    assert notes["rare"] == "left out: 67% missing"


# ---------------------------------------------------------------- texts, types


def test_texts_survive_as_they_are(read):
    texts = ["$", "$$", "{EUR}", "a`b", "a|b", "a,b;c\td", "\\n", "e5", "None", "Na", "#", "'", "😀 ünï", 'say "hi"',
             "two\nlines", "two\r\nlines", "x" * 999]  # fmt: skip
    names = ["cost {EUR}", "$x$", "a|b", "`c`", "😀", 'in "quotes"', "two\nlines"]
    table = pd.DataFrame({name: np.roll(np.array(cycle(*texts), object), k) for k, name in enumerate(names)})
    for separator in ",;\t|":
        frame, notes, target = read(table.to_csv(index=False, sep=separator, lineterminator="\n"))
        assert list(frame) == names
        assert (frame.astype(object) == table).all(axis=None)
        assert set(notes.values()) == {f"category, {len(texts)} levels"}
        assert target == names[-1]
    long = ["x" * 200_000, *COLOUR[1:]]  # beyond the csv module's own limit
    assert read(csv_of(x=REAL, long=long))[0].long.tolist() == long


def test_each_column_says_what_became_of_it(read):
    frame, notes, target = read(csv_of(
        a=WHOLE, few=cycle(10, 9, 2), flag=cycle("True", "False"), constant=cycle(7), zip=[f"{k % 90:05}" for k in range(N)],
        text=cycle("x", "", "none"), blob=[f"free text {k}" for k in range(N)],
        day=[f"2024-01-{k % 28 + 1:02}" for k in range(N)],
        time=[f"{k % 12 + 1}:05 pm" for k in range(N)], stamp=[f"2024-01-01T00:{k // 60:02}:{k % 60:02}Z" for k in range(N)],
        empty=cycle(""), money=cycle("$1", "€2", *(f"€{k}" for k in range(3, 140))), limit=cycle("<5", *range(1, 14)),
        codes=[f"{k % 140:05}" for k in range(N)],
    ))  # fmt: skip
    assert notes == {
        "a": "number", "few": "category, 3 levels", "flag": "category, 2 levels", "constant": "category, 1 levels",
        "zip": "category, 90 levels (codes such as 00000)", "text": "category, 3 levels, 33.3% missing",
        "blob": "left out: an identifier", "day": "left out: dates or times", "time": "left out: dates or times",
        "stamp": "left out: dates or times", "empty": "left out: 100% missing",
        "money": "left out: a text of 139 different values, at most 100 can be learned (not numbers: $, €)",
        "limit": "category, 14 levels (not numbers: <5)",
        "codes": "left out: a text of 140 different values, at most 100 can be learned (codes such as 00000)",
    }  # fmt: skip
    assert list(frame) == ["a", "few", "flag", "constant", "zip", "text", "limit"]
    assert list(frame.few.cat.categories) == ["2", "9", "10"]
    assert frame.flag.tolist() == cycle("True", "False")
    assert frame.text.tolist() == cycle("x", "(missing)", "none")
    assert frame.zip.tolist() == [f"{k % 90:05}" for k in range(N)]
    assert target == "limit"


def test_identifiers_are_left_out_and_measurements_are_not(read):
    shuffled, ordered = rng.permutation(N).tolist(), sorted(rng.choice(10**6, N, replace=False).tolist())
    different = rng.choice(10**7, N, replace=False).tolist()
    frame, notes, target = read(csv_of(
        code=ordered, PassengerId=range(1, N + 1), customer_id=[k % 50 for k in range(N)], rank=shuffled,
        name=[f"n{k}" for k in range(N)], order_no=different, continuous=[f"{k + 0.5}" for k in range(N)],
        salary=different, income=ordered, paid=WHOLE, grid=[v % 250 for v in WHOLE],
        store_id=cycle(1, 2, 3), id=[k // 2 for k in range(N)],
    ))  # fmt: skip
    assert [c for c in notes if notes[c] == "left out: an identifier"] == [
        "code", "PassengerId", "customer_id", "rank", "name", "order_no", "id"]  # fmt: skip
    assert list(frame) == ["continuous", "salary", "income", "paid", "grid", "store_id"]
    assert frame.salary.tolist() == different
    assert target == "grid"
    assert read(csv_of(price=ordered, x=REAL, colour=COLOUR))[2] == "price"


@pytest.mark.parametrize("name", ["target", "Label", "CLASS", "price", "y"])
def test_the_target_is_the_one_asked_for_or_called_so_or_the_last(read, name):
    content = csv_of(**{name: COLOUR}, x=REAL, n=[v if k % 9 else "" for k, v in enumerate(WHOLE)], one=cycle(1), id=range(N))
    assert read(content)[2] == name
    assert read(content, " x ")[2] == "x"
    assert read(content.replace(name, "z", 1))[2] == "n"
    for wanted, cause in {
        "w": "it has no column 'w'",
        "id": "'id' is left out: an identifier",
        "one": "'one' is category, 1 levels",
    }.items():
        with pytest.raises(ValueError, match=f"TARGET: {cause}; the columns that can be predicted are {name}, x, n$"):
            read(content, wanted)


@pytest.mark.parametrize(("encoding", "note"), [("cp1252", "not UTF-8, read as Windows-1252"), ("utf-8", None), ("utf-16", None)])
def test_letters_of_other_encodings(read, encoding, note):
    towns = cycle("Köln", "Málaga", "“x”")
    frame, notes, _ = read(csv_of(größe=REAL, ort=towns).encode(encoding))
    assert (list(frame), frame.ort.tolist(), notes.get("encoding")) == (["größe", "ort"], towns, note)


# ---------------------------------------------------------------- tables that everybody knows


def test_diamonds_is_what_pandas_reads(read):
    path = importlib.metadata.distribution("plotnine").locate_file("plotnine/data/diamonds.csv")
    begin = time.perf_counter()
    frame, notes, target = tool.read(path)
    assert time.perf_counter() - begin < 10  # 2 s on an idle core
    expected = pd.read_csv(path)
    levels = {"cut": 5, "color": 7, "clarity": 8}
    pd.testing.assert_frame_equal(frame, expected.astype(dict.fromkeys(levels, "category")))
    assert notes == {c: f"category, {levels[c]} levels" if c in levels else "number" for c in expected}
    assert target == "price"


# fmt: off
ADULT = csv_of(", ", age=rng.integers(17, 90, N), workclass=cycle("Private", "?", "State-gov"), fnlwgt=WHOLE,
               gain=np.where(np.arange(N) % 20, 0, WHOLE), sex=cycle("Male", "Female"), income=cycle("<=50K", "<=50K", ">50K"))
TITANIC = csv_of(
    PassengerId=range(1, N + 1), Survived=cycle(0, 1), Pclass=cycle(3, 1, 2), Name=[f'"Smith, Mr. ""Jo"" {k}"' for k in range(N)],
    Age=["" if k % 5 == 0 else k % 70 + 0.5 for k in range(N)], Ticket=[f"PC {k // 2}" for k in range(N)],
    Cabin=["" if k % 4 else f"C{k}" for k in range(N)], Embarked=cycle("S", "C", ""))
CARS = csv_of(
    mpg=rng.uniform(9, 46, N).round(1), cylinders=cycle(4, 6, 8),
    horsepower=["?" if k % 60 == 0 else 50 + k % 90 for k in range(N)],
    model_year=cycle(*range(70, 83)), origin=cycle(1, 2, 3), car_name=[f"ford {k // 2}" for k in range(N)])
WINE = csv_of(";", **{'"acidity"': REAL, '"density"': [f"{0.99 + k / 1e5:.5f}" for k in range(N)], '"quality"': cycle(5, 6, 7)})
# fmt: on
CANCER = sklearn.datasets.load_breast_cancer(as_frame=True).frame
KNOWN = {
    "adult": (ADULT, ["age", "workclass", "fnlwgt", "gain", "sex", "income"], "income",
              {"workclass": "category, 3 levels, 33.3% missing"}),
    "titanic": (TITANIC, ["Survived", "Pclass", "Age", "Age missing", "Embarked"], "Embarked",
                {"PassengerId": "left out: an identifier", "Name": "left out: an identifier", "Cabin": "left out: 75% missing"}),
    "auto-mpg": (CARS, ["mpg", "cylinders", "horsepower", "horsepower missing", "model_year", "origin"], "origin",
                 {"car_name": "left out: a text of 150 different values, at most 100 can be learned"}),
    "wine": (WINE, ["acidity", "density", "quality"], "quality", {"quality": "category, 3 levels", "density": "number"}),
    "breast cancer": (CANCER.to_csv(index=False), list(CANCER), "target", {"target": "category, 2 levels"}),
}  # fmt: skip


@pytest.mark.parametrize(("content", "columns", "wanted", "says"), KNOWN.values(), ids=KNOWN)
def test_tables_that_everybody_knows(read, content, columns, wanted, says):
    frame, notes, target = read(content)
    assert (list(frame), target) == (columns, wanted)
    assert {c: notes[c] for c in says} == says
    assert len(frame) == content.count("\n") - 1


def test_real_copies_of_breast_cancer_and_penguins(read):
    frame, *_ = read(CANCER.to_csv(index=False))
    assert all(frame[c].tolist() == CANCER[c].tolist() for c in list(CANCER)[:-1])
    path = importlib.metadata.distribution("plotnine").locate_file("plotnine/data/penguins.csv")
    frame, notes, _ = tool.read(path)
    expected = pd.read_csv(path)
    assert list(frame.species) == list(expected.species)
    assert notes["sex"] == "category, 3 levels, 3.2% missing"
    known = expected.body_mass_g.notna()
    assert frame.body_mass_g[known].tolist() == expected.body_mass_g[known].tolist()
    assert frame.body_mass_g.dtype == "int64"
    assert (frame["body_mass_g missing"] == "no").tolist() == known.tolist()


@pytest.mark.parametrize("load", [sklearn.datasets.load_iris, sklearn.datasets.load_wine])
def test_uci_files_without_a_header_are_refused(read, load):
    data = load(as_frame=True).frame
    for kinds in (data.target, "kind-" + data.target.astype(str)):
        with pytest.raises(ValueError, match="first line holds values"):
            read(data.assign(target=kinds).to_csv(index=False, header=False))
    with pytest.raises(ValueError, match="first line holds values"):
        read(ADULT.partition("\n")[2])


# ---------------------------------------------------------------- size, command line


def test_many_columns(read):
    content = pd.DataFrame(rng.integers(0, 50, (200, 1000))).add_prefix("c").to_csv(index=False)
    frame, notes, target = read(content)
    assert (frame.shape, target, set(notes.values())) == ((200, 1000), "c999", {"number"})
    with pytest.raises(ValueError, match=r"it has 1 rows under the header \(0, 1, 2 and 9997 more\)"):
        read(csv_of(**{str(k): ["x"] for k in range(10_000)}))


def run(*arguments):
    """The tool as a child process."""
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True)


def test_the_command_line_hands_over_and_refuses_in_one_line(tmp_path):
    path = tmp_path / "a b.csv"
    path.write_text(csv_of(x=REAL, holes=[v if k % 9 else "" for k, v in enumerate(WHOLE)], colour=COLOUR))
    done = run(path, "x")
    assert (done.returncode, done.stderr) == (0, b"")
    frame = pd.read_parquet(io.BytesIO(done.stdout))
    target = frame.attrs["target"]
    assert (frame.x.tolist(), target) == (REAL, "x")
    (tmp_path / "bad").write_text('"a\nb",c\n1,2,3,4\n' + "1,2\n" * N)
    calls = [(path, "w"), (tmp_path,), (tmp_path / "no",), (), (tmp_path / "bad",)]
    causes = ["no column 'w'", "Is a directory", "No such file", "no file", "line 3 has 4 fields and the header 2"]
    for arguments, says in zip(calls, causes, strict=True):
        done = run(*arguments)
        (line,) = done.stderr.decode().splitlines()
        assert (done.returncode, done.stdout) == (1, b"")
        assert line.startswith("TABLE: ")
        assert line.endswith(".")
        assert says in line
