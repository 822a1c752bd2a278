"""A CSV file as people have it, read for learning: separator, marks of numbers, types, what is missing, what cannot be learned.

    python outputs/tools/table.py FILE [TARGET]

On stdout: a parquet file of the frame, with notes and target in its attributes. The frame holds numbers (int64, float64) and
categories, nothing missing; notes maps each column to what became of it, in words; target is the column to be predicted. What
cannot be learned is refused in a sentence on stderr, with exit status 1.
"""

import contextlib
import csv
import io
import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

ROWS, LEVELS, FEW = 200, 100, 10  # rows at least, levels of a category at most, different values of a number more than
MISSING = {"", "?", "-", "--", "—", ".", "(missing)", "<NA>", "NaN", "NaT", "None", "Null", "Missing"}
MISSING |= {"#DIV/0!", "#VALUE!", "#REF!"}
MISSING |= {f(word) for word in ("na", "n/a", "#n/a", "#nv", "nan", "null", "none", "missing") for f in (str.lower, str.upper)}
TOTALS = {"total", "totals", "grand total", "sum", "sums", "summe", "gesamt", "insgesamt"}
DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}([T ].*)?|\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?( ?[AaPp][Mm])?")
UNIT = r"(?:US\$|[$€£¥₹%]|\b(?:USD|EUR|GBP|CHF)\b)"  # nothing that changes a number's place in the order
UNITS = re.compile(rf"^([+-]?)\s*{UNIT}\s*|\s*{UNIT}$")
SIGNS = "'’ \u00a0\u202f"  # between thousands, as well as the other decimal mark
PLAIN = rf"[+-]?(?:(?:[1-9]\d{{0,2}}([{SIGNS}%s])\d{{3}}(?:\1\d{{3}})*|\d+)(?:[%s]\d*)?|[%s]\d+)(?:[eE][+-]?\d+)?"
MARKS = {".": re.compile(PLAIN % (",", ".", ".")), ",": re.compile(PLAIN % (".", ",", ","))}
BARE = {".": str.maketrans("", "", SIGNS + ","), ",": str.maketrans(",", ".", SIGNS + ".")}
LIKELY = ("target", "label", "class", "price", "y")
BINARY = {b"\x1f\x8b": "a gzip file", b"PK\3\4": "a zip archive or an Excel workbook", b"\xd0\xcf\x11\xe0": "an Excel workbook"}
BINARY |= {b"%PDF": "a PDF", b"PAR1": "a Parquet file", b"version https://git-lfs": "a Git LFS pointer instead of the file"}
FORMATS = {r"\s*(\{\s*[\"}]|\[\s*[\[{])": "JSON", r"(?i)\s*<(!doctype|\?xml|html|head|body|table)": "a web page or XML"}


def text_of(path: Path) -> tuple[str, str]:
    """The file's text and encoding; ValueError if it is none, or that of another format."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read ({error.strerror})") from None
    kind = next((kind for magic, kind in BINARY.items() if raw.startswith(magic)), "")
    text = encoding = ""
    for encoding in ("utf-16",) if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "cp1252"):
        with contextlib.suppress(UnicodeDecodeError):
            text = raw.decode(encoding)
            break
    kind = kind or next((kind for start, kind in FORMATS.items() if re.match(start, text)), "")
    if kind or "\0" in text or (raw and not text):
        raise ValueError(f"it is {kind or 'no text'}; save the table as CSV in UTF-8")
    return text, encoding


def rows_of(text: str, separator: str, most: int | None = None) -> list[tuple[int, list[str]]]:
    """(line where it begins, fields) of each row that is not empty; ValueError for a quotation mark that is not closed."""
    csv.field_size_limit(2**31 - 1)
    lines = itertools.chain(io.StringIO(text, newline=""), ["\0"])  # an open quotation mark swallows the last line
    reader, begin, rows = csv.reader(lines, delimiter=separator, skipinitialspace=separator != " "), 1, []
    for row in itertools.islice(reader, most):
        rows.append((begin, [field.strip() for field in row if field or separator != " "]))
        begin = reader.line_num + 1
    if rows[-1][1] != ["\0"] and most is None:
        raise ValueError(f'the quotation mark (") that opens in line {rows[-1][0]} is never closed; close it or take it away')
    return [(number, row) for number, row in rows if any(row) and row != ["\0"]]


def extent(row: list[str]) -> int:
    """How many fields there are up to the last that is not empty."""
    return max((k for k, field in enumerate(row, 1) if field), default=0)


def separator_of(text: str) -> str:
    """The separator that most rows agree on; of several the last, for decimal commas can be as regular as semicolons."""
    ranks = {}
    for k, separator in enumerate(" ,|;\t"):
        widths = [len(row) for _, row in rows_of(text, separator, 1000)] or [0]
        width = max(widths, key=widths.count)
        ranks[separator] = (width > 1) + (width > 1 and separator != " "), widths.count(width) / len(widths), k
    return max(ranks, key=ranks.get)


def lines_of(text: str) -> tuple[list[str], list[list[str]], str, dict[str, str]]:
    """(header, rows, separator, notes) of a text."""
    told, notes = re.match(r"\"?sep=(.)\"?[^\S\r\n]*[\r\n]+", text, re.IGNORECASE), {}  # a first line for Excel
    text = "\n" + text[told.end() :] if told else text
    separator = told[1] if told else separator_of(text)
    if not (rows := rows_of(text, separator)) or not text.strip(" ,;|\t\r\n"):
        raise ValueError("it is empty")
    (_, header), *rows = rows
    again = sum(row == header for _, row in rows)
    if again and not any(re.search(r"\d", field) for field in header):
        notes["repeated header"] = f"left out: {again} lines"
        rows = [row for row in rows if row[1] != header]
    end = next(filter(None, rows[-1][1])) if rows else ""
    if end.lower().rstrip(":") in TOTALS and not any(end in row for _, row in rows[:-1]):
        notes["last line"] = f"left out: totals ({shown([*filter(None, rows.pop()[1])])})"
    named = extent(header)
    width = max([named, *(extent(row) for _, row in rows if len(row) <= len(header))])
    if rows and len(header) == named and all(len(row) == named + 1 for _, row in rows):  # R writes the rows' names like that
        names = {row[0] for _, row in rows if not re.fullmatch(r"[+-]?\d*[.,]\d*([eE].*)?", row[0])}
        if len(names) == len(rows) and sum(bool(row[named]) for _, row in rows) > len(rows) / 2:
            header, named, width = ["row name", *header], named + 1, width + 1
    for number, row in rows:
        if len(row) < named or any(row[width:]):
            found = f"line {number} has {len(row)} fields and the header {named} (found: {shown(row)}; header: {shown(header)})"
            raise ValueError(f"{found}; mend that line or the header, and quote what contains the separator")
    return (header + [""] * width)[:width], [(row + [""] * width)[:width] for _, row in rows], separator, notes


def number_in(field: str, mark: str) -> float:
    """The number that a field shows, with this decimal mark; NaN if it shows none."""
    if len(field) > 400 or (not MARKS[mark].fullmatch(field) and MARKS["." if mark == "," else ","].fullmatch(field)):
        return math.nan
    if not MARKS[mark].fullmatch(field):
        field = f"-{field[1:-1]}" if field[:1] + field[-1:] == "()" and len(field) > 2 else field.replace("−", "-")
        field = UNITS.sub(r"\1", UNITS.sub(r"\1", field))  # (5) is an accountant's -5
        if field.lower().lstrip("+-") in ("inf", "infinity"):
            return math.inf
        if not MARKS[mark].fullmatch(field):
            return math.nan
    return float(field.translate(BARE[mark]))


def numbers_in(raw: pd.DataFrame, separator: str) -> dict[int, pd.Series]:
    """The numbers that each column's fields show, NaN for none, with the decimal mark of the column, if unclear of the file."""
    shows = {c: {mark: {f: number_in(f, mark) for f in raw[c].unique()} for mark in ".,"} for c in raw}
    votes = {c: sum(math.isnan(show["."][f]) - math.isnan(show[","][f]) for f in show["."]) for c, show in shows.items()}
    known = {c: [f for f, v in show["."].items() if not math.isnan(v)] for c, show in shows.items()}
    file, values = sum(votes.values()) or (separator == ";" and any("," in f for c in raw for f in known[c])), {}
    for c, show in shows.items():
        thousands = separator == ";" and not all("." in f for f in known[c])  # 1.234 beside 980 is 1234
        values[c] = raw[c].map(show["," if (votes[c] or file or thousands) > 0 else "."]).astype(float)
    return values


def shown(items: list[str], most: int = 3) -> str:
    """The first few of many, each cut if long."""
    short = [item if len(item) <= 40 else f"{item[:37]}..." for item in items[:most]]
    return ", ".join(short) + (f" and {len(items) - most} more" if items[most:] else "")


def called_id(name: str) -> bool:
    """Is the column called an identifier?"""
    return bool(re.search(r"(?i)^(row name|unnamed(: 0)?)$|(^|[\W_])(id|uuid|guid)$", name) or re.search(r"[a-z](ID|Id)$", name))


def is_identifier(name: str, there: pd.Series, values: pd.Series | None, first: bool) -> bool:
    """Does it number or name the rows: called so, counting, a first column in order, or a different text in each row?"""
    whole, different = values is not None and bool((values == values.round()).all()), there.nunique()
    if first and whole and name.endswith(" without a name"):  # an index, perhaps shuffled, or one that restarts
        return True
    if different < len(there) or (values is not None and name.lower() in LIKELY):
        return called_id(name) and different > FEW
    counts = whole and bool(values.max() - values.min() < 1.5 * len(values))
    counts |= whole and bool(re.search(r"(?i)(^|[\W_])(index|row|key|no|nr)\.?$", name))
    counts |= whole and first and (values.is_monotonic_increasing or values.is_monotonic_decreasing)
    return values is None or called_id(name) or counts


def learned(name: str, column: pd.Series, values: pd.Series, first: bool, notes: dict[str, str]) -> dict[str, pd.Series]:
    """What a column of texts becomes (none, one, or a number beside its indicator), with the reason in notes."""
    gone = column.isin(MISSING)
    there, known = column[~gone], values[~gone]
    units = sorted({*re.findall(UNIT, "\n".join(there.unique()))}) if known.notna().any() else []
    codes = there[there.str.fullmatch(r"0\d+")]
    number = known.notna().any() and known.isna().sum() <= 0.05 * len(there) and not len(codes) and len(units) < 2
    odd, why = [*there[~np.isfinite(known)].unique()], ""
    if number:
        missing = gone | ~np.isfinite(values)
    else:
        missing = gone = gone & (column.str.lower() != "none")  # a level like others
        there = column[~gone]
        if known.notna().sum() > 0.5 * len(there):
            why = f" (codes such as {codes.iloc[0]})" if len(codes) else f" (not numbers: {shown(units if units[1:] else odd)})"
    share = f", {missing.mean():.1%} missing" * bool(missing.any())
    share += f" (among them {shown(odd)})" * bool(number and len(odd))
    if missing.mean() > 0.5:
        notes[name] = f"left out: {missing.mean():.0%} missing"
    elif not number and there.str.fullmatch(DATE).mean() > 0.95:
        notes[name] = "left out: dates or times"
    elif is_identifier(name, there, values[~missing] if number else None, first):
        notes[name] = f"left out: an identifier{why}"
    elif number and values[~missing].nunique() > FEW:
        numbers = values.where(~missing, values[~missing].quantile(interpolation="lower"))  # the median, as a value that occurs
        whole = bool((numbers == numbers.round()).all()) and bool(numbers.abs().max() < 2**53)
        notes[name] = f"number{share}" + ", filled with the median and marked by a column of its own" * bool(missing.any())
        flag = {f"{name} missing": missing.map({True: "yes", False: "no"}).astype("category")} if missing.any() else {}
        return {name: numbers.astype(np.int64) if whole else numbers, **flag}
    elif (levels := there.nunique()) > LEVELS:
        notes[name] = f"left out: a text of {levels} different values, at most {LEVELS} can be learned{why}"
    else:
        levels = column.where(~missing, "(missing)")
        if number:  # few different numbers: levels in their order
            levels = values.map(lambda v: repr(v + 0.0).removesuffix(".0")).where(~missing, "(missing)")
            order = [*sorted({*levels[~missing]}, key=float), *["(missing)"] * bool(missing.any())]
            levels = pd.Series(pd.Categorical(levels, order))
        notes[name] = f"category, {levels.nunique()} levels{share}{why}"
        return {name: levels.astype("category")}
    return {}


def check_header(header: list[str], raw: pd.DataFrame, values: dict[int, pd.Series]) -> None:
    """ValueError if the first line is none of names, or if the names are not enough or not different."""
    numeric = [c for c in raw if header[c] and values[c].notna().mean() > 0.5]
    heads = {c: h for c in numeric if not math.isnan(h := number_in(header[c], "."))}
    steps, years = {*np.diff([*heads.values()])}, all(1800 <= h <= 2200 and h == round(h) for h in heads.values())
    dated = all(values[c].between(1800, 2200).mean() > 0.5 for c in heads)  # the columns hold years, too
    named = (len(heads) > 2 and steps == {1}) or (years and not dated)
    texts = 0 if numeric else sum(header[c] in set(raw[c]) for c in raw)
    if (len(heads) > len(numeric) / 2 and not named) or texts > len(header) / 2:
        raise ValueError(f"its first line holds values ({shown(header)}), not the columns' names; put a line of names above")
    filled = [c for c in raw if (raw[c] != "").mean() > 0.5]
    if (nameless := sum(header[c] == "" for c in filled[1:])) > 1 and nameless >= sum(map(bool, header)):
        raise ValueError(f"{nameless} columns have no name in the first line ({shown(header)}), which must name them all")
    twice = pd.Series(header)[lambda names: names.duplicated() & (names != "")]
    if len(twice):
        raise ValueError(f"it has two columns named {twice.iloc[0]!r}; rename one")


def read(path: Path, wanted: str = "") -> tuple[pd.DataFrame, dict[str, str], str]:
    """(frame, notes, target) of a file; ValueError with the true cause."""
    text, encoding = text_of(path)
    header, rows, separator, notes = lines_of(text)
    raw = pd.DataFrame(rows, columns=range(len(header)), dtype=object)
    values = numbers_in(raw, separator)
    if len(raw):
        check_header(header, raw, values)
    if len(raw) < ROWS:
        raise ValueError(f"it has {len(raw)} rows under the header ({shown(header)}), and {ROWS} are needed")
    names = {c: header[c] or f"column {c + 1} without a name" for c in raw if header[c] or raw[c].any()}
    columns: dict[str, pd.Series] = {}
    for c, name in names.items():
        found = learned(name, raw[c], values[c], c == min(names), notes)
        columns |= {key if key == name else key + "?" * (key in names.values()): column for key, column in found.items()}
    if encoding == "cp1252":
        notes["encoding"] = "not UTF-8, read as Windows-1252"
    frame = pd.DataFrame(columns, index=raw.index)
    if frame.shape[1] < 2 or frame.nunique().max() < 2:
        found = "; ".join(f"{c}: {note}" for c, note in [*notes.items()][:20])
        raise ValueError(f"it leaves {frame.shape[1]} columns to learn ({found}), and 2 that are not constant are needed")
    return frame, notes, target_of(frame, wanted.strip(), notes)


def target_of(frame: pd.DataFrame, wanted: str, notes: dict[str, str]) -> str:
    """The column to be predicted: the one asked for, one that is called so, or the last."""
    useful = [c for c in frame if c in notes and frame[c].nunique() > 1]  # no indicators
    if wanted and (wanted not in frame or frame[wanted].nunique() < 2):
        became = f"{wanted!r} is {notes[wanted]}" if wanted in notes else f"it has no column {wanted!r}"
        raise ValueError(f"TARGET: {became}; the columns that can be predicted are {shown(useful, 20)}")
    named = {c.lower(): c for c in reversed(useful)}
    unique = [c for c in useful if called_id(c) or (frame[c].nunique() == len(frame) and frame[c].dtype == np.int64)]
    last = [c for c in useful if c not in unique] or useful
    return wanted or next((named[c] for c in LIKELY if c in named), last[-1])


def main() -> None:
    """Read and hand over."""
    if len(sys.argv) < 2:
        sys.exit("TABLE: no file is named; python outputs/tools/table.py FILE [TARGET].")
    try:
        found = read(Path(sys.argv[1]), *sys.argv[2:3])
    except (ValueError, csv.Error) as error:
        sys.exit(f"TABLE: {sys.argv[1]} cannot be used: {' '.join(str(error).split())}.")  # one line, whatever the names hold
    frame, notes, target = found
    frame.attrs = {"notes": notes, "target": target}
    sys.stdout.buffer.write(frame.to_parquet())


if __name__ == "__main__":
    main()
