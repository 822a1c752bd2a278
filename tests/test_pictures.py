"""outputs/tools/pictures.py: whatever people call a picture is read with the right pixels, or named."""

import importlib.util
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

TOOL = Path(__file__).parent.parent / "outputs/tools/pictures.py"
SPEC = importlib.util.spec_from_file_location("pictures", TOOL)
pictures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(pictures)


def grey(k, size=8):
    """A random grey picture [size, size], another for every k."""
    return np.random.default_rng(k).integers(0, 256, (size, size), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder, *names):
    """Grey pictures under these names, the k-th of grey(k)."""
    for k, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(grey(k)))
    return folder


def same(found, *ks):
    """Whether an array holds just the pictures grey(k)."""
    return sorted(image.tobytes() for image in found) == sorted(grey(k).tobytes() for k in ks)


def run(*arguments):
    """(arrays, last line on stderr, exit status) of the command line."""
    done = subprocess.run([sys.executable, "-X", "utf8", TOOL, *map(str, arguments)], capture_output=True)
    said = done.stderr.decode()
    assert "Traceback" not in said
    return dict(np.load(io.BytesIO(done.stdout))) if done.stdout else {}, said.splitlines()[-1], done.returncode


# ------------------------------------------------------------------------------------------- the pixels of one picture


def raw_png(depth, kind, row, *clear):
    """A square PNG of equal rows, and its transparent colour, in bit depths that Pillow does not write."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    width = len(row) * 8 // (depth * {0: 1, 2: 3}[kind])
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, width, depth, kind, 0, 0, 0)),
        (b"tRNS", struct.pack(f">{len(clear)}H", *clear)),
    ]
    parts += [(b"IDAT", zlib.compress((b"\0" + row) * width)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts if part[1] or part[0] == b"IEND")


def raw_tiff(values, bits, white=1, width=0, **more):
    """A square TIFF of equal rows, with tags (_339=2) that Pillow does not write."""
    width = width or len(values)
    data = values.tobytes() * width
    tags = {256: width, 257: width, 258: bits, 259: 1, 262: white, 277: 1, 278: width, 279: len(data)} | {
        int(k[1:]): v for k, v in more.items()
    }
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def mode(name, colour, kind="PNG", **options):
    """A picture of one colour."""
    return encoded(Image.new(name, (4, 4), colour), kind, **options)


def palette(**options):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 100, 0])
    return encoded(image, "PNG", **options)


def animated(kind, **options):
    first, *more = (Image.new("RGB", (4, 4), colour) for colour in ("red", "lime", "blue"))
    return encoded(first, kind, save_all=True, append_images=more, **options)


RED, WHITE, ORANGE = (255, 0, 0), (255, 255, 255), (255, 100, 0)
COLOURS = {  # the file, and what colour it has
    "rgb": (mode("RGB", ORANGE), ORANGE),
    "palette": (palette(), ORANGE),
    "palette, clear": (palette(transparency=1), WHITE),
    "palette, half clear": (palette(transparency=bytes([255, 128])), (255, 177, 127)),
    "rgba": (mode("RGBA", (255, 0, 0, 0)), WHITE),
    "rgba, half clear": (mode("RGBA", (255, 0, 0, 128)), (255, 127, 127)),
    "webp with alpha": (mode("RGBA", (0, 0, 0, 0), "WEBP", lossless=True), WHITE),
    "la": (mode("LA", (0, 51)), (204, 204, 204)),
    "grey of 1 bit": (mode("1", 1), WHITE),
    "cmyk": (mode("CMYK", (0, 255, 255, 0), "TIFF"), RED),
    "cmyk jpeg": (mode("CMYK", (0, 255, 255, 0), "JPEG", quality=100), RED),
    "ycbcr": (encoded(Image.new("RGB", (4, 4), RED).convert("YCbCr"), "TIFF"), RED),
    "lab": (mode("LAB", (138, 128 + 81, 128 + 70), "TIFF"), RED),  # 54.3, 80.8, 69.9 in the light D50
    "gif": (animated("GIF"), RED),
    "webp": (animated("WEBP", lossless=True), RED),
    "tiff of three pages": (animated("TIFF"), RED),
    "bmp": (mode("RGB", ORANGE, "BMP"), ORANGE),
    "clear colour": (raw_png(8, 2, bytes([9, 9, 9]), 9, 9, 9), WHITE),
    "clear colour of 16 bits": (raw_png(16, 2, struct.pack(">3H", *[30000] * 3), *[30000] * 3), WHITE),
    "another clear colour": (raw_png(16, 2, struct.pack(">3H", *[257 * 9] * 3), 9, 9, 9), (9, 9, 9)),
}


@pytest.mark.parametrize("case", COLOURS)
def test_colours_are_right(case):
    content, colour = COLOURS[case]
    made = pictures.prepare(io.BytesIO(content), 3, 1 if "clear colour" in case else 4)
    assert made.dtype == np.uint8
    assert np.abs(made.astype(int) - np.array(colour)[:, None, None]).max() <= (12 if case == "lab" else 2)
    luminance = np.dot(colour, (0.299, 0.587, 0.114))
    assert np.abs(pictures.prepare(io.BytesIO(content), 1, 4) - luminance).max() <= (8 if case == "lab" else 3)


DEEP = np.array([0, 257, 25700, 65535])
TONES = {  # a file of equal rows, and their tones
    "16 bits": (encoded(np.tile(DEEP.astype(np.uint16), (4, 1))), [0, 1, 100, 255]),
    "16 bits, tiff": (encoded(np.tile(DEEP.astype(np.uint16), (4, 1)), "TIFF"), [0, 1, 100, 255]),
    "16 bits, zero is white": (raw_tiff(DEEP.astype(np.uint16), 16, white=0), [255, 254, 155, 0]),
    "8 bits, zero is white": (raw_tiff(np.uint8([0, 100, 255]), 8, white=0), [255, 155, 0]),
    "12 bits": (raw_tiff(np.uint8([0xFF, 0xF0, 0x00]), 12, width=2), [255, 0]),
    "16 bits, zero is clear": (raw_png(16, 0, DEEP.astype(">u2").tobytes(), 0), [255, 1, 100, 255]),
    "4 bits, 5 is clear": (raw_png(4, 0, b"\x05\x6f", 5), [0, 255, 102, 255]),
    "2 bits, 1 is clear": (raw_png(2, 0, bytes([0b00011011]), 1), [0, 255, 170, 255]),
    "1 bit, 0 is clear": (raw_png(1, 0, b"\x0f", 0), [255] * 8),
    "dark pgm of 16 bits": (b"P5 2 2 65535\n" + struct.pack(">4H", 0, 257, 0, 257), [0, 1]),
    "8 bits, 5 is clear": (raw_png(8, 0, bytes([5, 6]), 5), [255, 6]),
    "pgm of 12 bits": (b"P5 2 2 4095\n" + struct.pack(">4H", 0, 4095, 0, 4095), [0, 255]),
}


@pytest.mark.parametrize("case", TONES)
def test_tones_are_kept(case):
    content, tones = TONES[case]
    made = pictures.prepare(io.BytesIO(content), 1, len(tones))
    assert made.dtype == np.uint8
    assert made[0, 0].tolist() == tones


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright(kind, orientation):
    """Cameras store what they saw and a note which way is up (EXIF orientation)."""
    upright = np.zeros((16, 16), np.uint8)
    upright[:8], upright[:8, :8] = 120, 240
    turn = [lambda x: x, np.fliplr, lambda x: np.rot90(x, 2), np.flipud, np.transpose]
    turn += [np.rot90, lambda x: np.rot90(x.T, 2), lambda x: np.rot90(x, -1)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(np.ascontiguousarray(turn[orientation - 1](upright)), kind, exif=exif)
    made = pictures.prepare(io.BytesIO(stored), 1, 16)[0]
    assert np.abs(made.astype(int) - upright).mean() < 4, "it is the upright one"


def test_the_middle_is_cut_out():
    wide = np.zeros((28, 84, 3), np.uint8)
    wide[:, 28:56] = ORANGE
    made = pictures.prepare(io.BytesIO(encoded(wide)), 3, 28)
    assert [np.unique(channel).tolist() for channel in made] == [[255], [100], [0]]


def test_a_large_photograph_is_as_good_as_decoded_whole():
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((1800, 1200))
    made, whole = (pictures.prepare(io.BytesIO(encoded(smooth, kind)), 3, 32).astype(int) for kind in ("JPEG", "PNG"))
    assert np.abs(made - whole).mean() < 1.5


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (0, 255), (0, 65535), (-0.02, 1.03), (-310.5, 4807)])
@pytest.mark.parametrize("channels", [1, 3])
def test_floating_point_pictures_have_one_scale(tmp_path, low, high, channels):
    """A dark one stays dark, and holes and infinities do not take the light of the others."""
    ramps = [np.tile(np.linspace(low, high / (k + 1), 8, dtype=np.float32), (8, 1)) for k in range(10)]
    ramps[9][0, 0], ramps[9][1, 0], ramps[9][2, 0] = np.nan, np.inf, -3.4e38
    for k, ramp in enumerate(ramps):
        Image.fromarray(ramp).save(tmp_path / f"{k}.tif")
    black, white = (low, high) if low < -1 else (round(low), round(high))
    expected = [(255 * ((np.tile(ramp[3:4], (8, 1)) - black) / (white - black)).clip(0, 1)).round() for ramp in ramps]
    made, _ = pictures.read(tmp_path, channels, 8)
    found = sorted(np.concatenate([*made.values()]), key=lambda image: image.sum(), reverse=True)
    assert np.abs(np.array(found) - np.array(expected)[:, None]).max() <= 1


NEVER = {
    "signed bytes": raw_tiff(np.int8([-5, 5]), 8, _339=2),
    "subsampled": encoded(Image.new("YCbCr", (4, 4)), "TIFF", tiffinfo={530: (2, 2)}),
    "no data": encoded(np.full((4, 4), np.nan, np.float32), "TIFF"),
    "half floats": raw_tiff(np.float16([0, 1]), 16, _339=3),
}


@pytest.mark.parametrize("content", NEVER.values(), ids=NEVER)
def test_what_pillow_would_read_wrongly_is_no_picture(content):
    with pytest.raises((ValueError, OSError)):
        pictures.prepare(io.BytesIO(content), 1, 4)


# ------------------------------------------------------------------------------------------- folders

BOTH = {  # names of pictures; the third part of them lies in a split of its own, where both splits are meant
    "train and test": ("train/{}.png", "test/{}.png"),
    "capitals": ("Train/{}.png", "TEST/{}.png"),
    "training and testing": ("training/7/{}.png", "testing/7/{}.png"),
    "deeper": ("archive/cifar/train/cat/{}.png", "archive/cifar/test/cat/{}.png"),
    "below val": ("val/train/{}.png", "val/test/{}.png"),
}
ONE = {
    "a class called train": ("bus/{}.png", "train/{}.png"),
    "classes called train and test": ("train/{}.png", "test/{}.png", "bus/0.png"),
    "names": ("train_at_station_{}.png", "test tubes {}.png"),
    "train alone": ("train/a/{}.png", "train/b/{}.png"),
    "test alone": ("test/a/{}.png", "test/b/{}.png"),
    "words": ("trains/{}.png", "tests/{}.png"),
    "one test picture": (*(f"train/{k}.png" for k in range(9)), "test/0.png"),
    "no suffix": ("{}", "b/{}.JPG"),
}
PLACES = ["photos [2024]", "a?b*", "ü 写真", "train", "test", ".hidden/mnist", "x\ny"]


@pytest.mark.parametrize("names", BOTH.values(), ids=BOTH)
def test_splits_are_taken_where_both_are_meant(tmp_path, names):
    more = ["val/9.png"] * (names[0][0] == "t" and "7" not in names[0])
    fill(tmp_path, *(names[k % 3 == 0].format(k) for k in range(9)), *more)
    made, said = pictures.read(tmp_path, 1, 8)
    assert same(made["test"], 0, 3, 6)
    assert same(made["train"], 1, 2, 4, 5, 7, 8, *([9] * len(more)))
    assert said == f"{9 + len(more)} pictures read, 3 held out"


@pytest.mark.parametrize("names", ONE.values(), ids=ONE)
def test_elsewhere_all_pictures_are_used_and_a_fifth_is_held_out(tmp_path, names):
    names = sorted({name.format(k) for k in range(10) for name in names})
    fill(tmp_path, *names)
    made, said = pictures.read(tmp_path, 1, 8)
    assert same(np.concatenate([*made.values()]), *range(len(names))), "all, and none in both parts"
    assert said == f"{len(names)} pictures read, {len(names) // 5} held out"
    assert all(np.array_equal(made[part], again) for part, again in pictures.read(tmp_path, 1, 8)[0].items())


@pytest.mark.parametrize("place", PLACES)
def test_a_place_may_have_any_name(tmp_path, place):
    made, said = pictures.read(fill(tmp_path / place, *(f"{k} [{k}].png" for k in range(8))), 1, 8)
    assert same(np.concatenate([*made.values()]), *range(8))
    assert said == "8 pictures read, 2 held out"


def test_nothing_is_lost_in_silence(tmp_path):
    fill(tmp_path / "x", *(f"{k}.png" for k in range(8)))
    fill(tmp_path / "elsewhere", *(f"{k}.png" for k in range(9)))
    for link, target in {"linked": tmp_path / "elsewhere", "circle": tmp_path / "x", "0.jpg": tmp_path / "gone"}.items():
        (tmp_path / "x" / link).symlink_to(target)
    fill(tmp_path / "x", ".DS_Store", ".ipynb_checkpoints/0.png")
    (tmp_path / "x" / "metadata.csv").write_text("file_name\n0.png\n")
    (tmp_path / "x" / "line\nbreak.heic").write_bytes(b"\0\0\0\x18ftypheic")
    os.mkfifo(tmp_path / "x" / "pipe.png")
    made, said, status = run(tmp_path / "x", 1, 8)
    assert same(np.concatenate([*made.values()]), *range(8), *range(9))
    left = "0.jpg (No such file or directory), line?break.heic (no format that Pillow reads), "
    left += "metadata.csv (no format that Pillow reads) and 1 more"
    assert (said, status) == (f"17 pictures read, 4 left out: {left}; 3 held out", 0)


HARMS = {  # what was done to a picture of 32 pixels, and what is said of it
    "garbage": (lambda: b"not an image", "no format that Pillow reads"),
    "nothing": (lambda: b"", "no format that Pillow reads"),
    "cut off": (lambda: encoded(grey(0, 32))[:500], "damaged"),
    "cut off jpeg": (lambda: encoded(grey(0, 32), "JPEG")[:-200], "damaged"),
    "cut off tiff": (lambda: encoded(grey(0, 32), "TIFF", compression="tiff_lzw")[:-200], "no format that Pillow reads"),
    "changed": (lambda: bytes(b ^ 0x55 * (60 <= k < 120) for k, b in enumerate(encoded(grey(0, 32)))), "damaged"),
    "enormous": (lambda: b"P4 30000 30000\n", "too large"),
}


@pytest.mark.parametrize("case", HARMS)
@pytest.mark.parametrize("layout", ["folder", "parquet"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_an_unreadable_picture_is_named(tmp_path, layout, case):
    harmed, why = HARMS[case][0](), HARMS[case][1]
    contents = [*(encoded(grey(k)) for k in range(8)), harmed]
    if layout == "folder":
        for k, content in enumerate(contents):
            (tmp_path / f"{k}.png").write_bytes(content)
        name = "8.png"
    else:
        table({"image": [{"bytes": content, "path": "x.png"} for content in contents]}, tmp_path / "m.parquet")
        name, why = "row 9 of m.parquet", why if harmed else "empty"
    made, said = pictures.read(tmp_path, 1, 8)
    assert same(np.concatenate([*made.values()]), *range(8))
    assert said == f"8 pictures read, 1 left out: {name} ({why}); 2 held out"


# ------------------------------------------------------------------------------------------- parquet files


def table(columns, path, **kinds):
    """A parquet file, its columns of the Arrow types given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k: pa.array(v, kinds.get(k)) for k, v in columns.items()}), path, row_group_size=3)
    return path


TEN = [grey(k) for k in range(10)]
LISTS = [image.tolist() for image in TEN]
FORMS = {  # of a column: its values, its type
    "structs": ([{"bytes": encoded(image), "path": None} for image in TEN], None),
    "structs of bytes": ([{"bytes": encoded(image)} for image in TEN], None),
    "structs of paths": ([{"bytes": None, "path": f"{k}.png"} for k in range(10)], None),
    "bytes": ([encoded(image) for image in TEN], pa.binary()),
    "large bytes": ([encoded(image) for image in TEN], pa.large_binary()),
    "paths": ([f"{k}.png" for k in range(10)], pa.string()),
    "paths by number": (pa.array([f"{k}.png" for k in range(10)]).dictionary_encode(), None),
    "bytes of pixels": (LISTS, pa.list_(pa.list_(pa.uint8()))),
    "integers": (LISTS, pa.list_(pa.list_(pa.int64()))),
    "large lists": (LISTS, pa.large_list(pa.large_list(pa.int32()))),
    "lists of a size": (LISTS, pa.list_(pa.list_(pa.int64(), 8), 8)),
    "floats": ((np.array(LISTS) / 255).tolist(), pa.list_(pa.list_(pa.float32()))),
    "doubles": ((np.array(LISTS) / 1.0).tolist(), pa.list_(pa.list_(pa.float64()))),
    "from -1 to 1": ((np.array(LISTS) / 127.5 - 1).tolist(), pa.list_(pa.list_(pa.float64()))),
    "one channel": (np.array(LISTS)[..., None].tolist(), pa.list_(pa.list_(pa.list_(pa.uint8())))),
    "one channel first": (np.array(LISTS)[:, None].tolist(), pa.list_(pa.list_(pa.list_(pa.int64())))),
}


@pytest.mark.parametrize(("case", "name"), [*((case, "image") for case in FORMS), ("bytes", "IMG"), ("integers", "picture")])
def test_a_column_of_pictures_is_read(tmp_path, case, name):
    values, kind = FORMS[case]
    fill(tmp_path, *(f"{k}.png" for k in range(10)))
    path = table({"label": range(10), name: values}, tmp_path / "mnist.parquet", **{name: kind})
    made, said = pictures.read(path, 1, 8)
    assert same(np.concatenate([*made.values()]), *range(10))
    assert said == "10 pictures read, 2 held out"


@pytest.mark.parametrize("kind", [pa.uint8(), pa.int64(), pa.float32()], ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["channels last", "channels first"])
def test_lists_in_colour_are_read(tmp_path, kind, first):
    colours = np.zeros((10, 6, 6, 3), int) + ORANGE
    colours[0, :, 3:] = 0
    nested = colours.transpose(0, 3, 1, 2) if first else colours
    path = table({"image": nested.tolist()}, tmp_path / "x.parquet", image=pa.list_(pa.list_(pa.list_(kind))))
    found = np.concatenate([*pictures.read(path, 3, 6)[0].values()])
    assert sorted(image.tobytes() for image in found) == sorted(
        image.transpose(2, 0, 1).astype(np.uint8).tobytes() for image in colours
    )
    assert {*np.concatenate([*pictures.read(path, 1, 6)[0].values()]).flat} <= {0, 134, 135}


def test_rows_without_a_picture_are_named(tmp_path):
    path = table({"image": [*LISTS[:8], None, [[1, 2], [3]]]}, tmp_path / "x.parquet")
    assert pictures.read(path, 1, 8)[1].startswith(
        "8 pictures read, 2 left out: row 9 of x.parquet (empty), row 10 of x.parquet (rows of"
    )
    path = table({"image": [*LISTS[:8], [[1, None], [2, 3]]]}, path)
    assert "1 left out: row 9 of x.parquet (pixels are missing" in pictures.read(path, 1, 8)[1]
    rows = [
        {"bytes": encoded(TEN[k]), "path": None} if k < 8 else [None, {"bytes": None, "path": None}][k - 8] for k in range(10)
    ]
    assert "row 9 of x.parquet (empty), row 10 of x.parquet (empty);" in pictures.read(table({"image": rows}, path), 1, 8)[1]


SECRET = "a text of somebody's"
REFUSED = {  # columns, and what is said of them
    "numbers": ({"image": range(20)}, "the column image holds int64, which is no picture"),
    "one dimension": ({"image": [[1.5] * 64] * 20}, "the column image holds list<element: double>, which is no picture"),
    "texts in lists": ({"image": [[[SECRET]]] * 20}, "the column image holds list<element: list<element: string>>, which is no"),
    "another struct": (
        {"image": [{"caption": SECRET}] * 20},
        "the column image holds struct<caption: string>, which is no picture",
    ),
    "texts": ({"image": [SECRET] * 20}, "row 1 of x.parquet (No such file or directory)"),
    "no name": ({"caption": [SECRET] * 20, "n": range(20)}, "no column image or img, but caption, n"),
    "many columns": ({f"pixel{k}": range(20) for k in range(784)}, "but pixel0, pixel1, pixel2, pixel3, pixel4 ..."),
    "two": ({"left": [b"1"] * 20, "right": [b"2"] * 20}, "no column image or img, but left, right"),
    "four channels": (
        {"image": [[[[1, 2, 3, 4]] * 8] * 8] * 8},
        "row 1 of x.parquet (pixels are missing, or channels other than 1 or 3)",
    ),
    "no rows": ({"image": []}, "holds 0 readable pictures, and 8 are needed"),
    "few": ({"image": [encoded(TEN[0])] * 7}, "holds 7 readable pictures, and 8 are needed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_columns_are_refused_by_their_type(tmp_path, case):
    columns, words = REFUSED[case]
    path = table(columns, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="readable pictures") as error:
        pictures.read(path, 1, 8)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert SECRET not in str(error.value)
    assert len(str(error.value)) < 600


SHARDS = {
    "a file": {"mnist.parquet": "TtttTttttt"},
    "the hub's": {
        "data/train-00000-of-00002.parquet": 4,
        "data/train-00001-of-00002.parquet": 4,
        "data/test-00000-of-00001.parquet": 2,
    },
    "the hub's conversion": {"mnist/train/0000.parquet": 8, "mnist/test/0000.parquet": 2},
    "names": {"mnist_train.parquet": 8, "mnist_test.parquet": 2},
}


@pytest.mark.parametrize("files", SHARDS.values(), ids=SHARDS)
def test_splits_of_parquet_files_are_taken(tmp_path, files):
    """By a column, by the files' names, by their folders."""
    images, held = iter(range(10)), []
    for name, rows in files.items():
        splits = ["test" if r == "T" else "train" for r in rows] if isinstance(rows, str) else None
        ks = [next(images) for _ in range(len(splits or range(rows)))]
        columns = {"image": [encoded(TEN[k]) for k in ks]} | ({"split": splits} if splits else {})
        table(columns, tmp_path / "x" / name)
        held += [k for k, s in zip(ks, splits or ["test" if "test" in name else "train"] * len(ks), strict=True) if s == "test"]
    made, said = pictures.read(tmp_path / "x" / (name if len(files) == 1 else ""), 1, 8)
    assert same(made["test"], *held)
    assert same(made["train"], *({*range(10)} - {*held}))
    assert said == "10 pictures read, 2 held out"


def test_a_useless_parquet_file_beside_pictures_is_named(tmp_path):
    fill(tmp_path, *(f"{k}.png" for k in range(8)))
    table({"label": range(8)}, tmp_path / "labels.parquet")
    (tmp_path / "none.parquet").write_text("no parquet")
    left = "labels.parquet (no column image or img, but label), none.parquet (no readable parquet file)"
    assert pictures.read(tmp_path, 1, 8)[1] == f"8 pictures read, 2 left out: {left}; 2 held out"


# ------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda place: None, "there is no {}"),
        (lambda place: place.mkdir(), "{} holds 0 readable pictures, and 8 are needed"),
        (lambda place: fill(place, "a.png"), "{} holds 1 readable pictures, and 8 are needed"),
        (
            lambda place: place.write_text("x"),
            "{0} holds 0 readable pictures, and 8 are needed; left out: x (no readable parquet file)",
        ),
    ],
    ids=["nowhere", "empty", "few", "a text"],
)
def test_what_cannot_be_used_is_one_sentence(tmp_path, make, said):
    make(tmp_path / "x")
    assert run(tmp_path / "x", 1, 8) == ({}, said.format(tmp_path / "x"), 1)


def test_what_libtiff_prints_comes_before_the_sentence(tmp_path):
    fill(tmp_path, *(f"{k}.png" for k in range(8)))
    whole = bytearray(encoded(grey(0, 64), "TIFF", compression="tiff_lzw"))
    whole[8:3000] = bytes(2992)
    (tmp_path / "x.tif").write_bytes(whole)
    (tmp_path / "y.png").write_bytes(encoded(Image.new("1", (10000, 10000))))  # Pillow warns of it
    made, said, status = run(tmp_path, 1, 8)
    assert made["train"].shape == (7, 1, 8, 8)
    assert (said, status) == ("9 pictures read, 1 left out: x.tif (damaged); 2 held out", 0)


@pytest.mark.parametrize("arguments", [[], ["x"], ["x", 2, 8], ["x", 1, "large"]])
def test_wrong_arguments_are_a_sentence(arguments):
    assert "error: " in run(*arguments)[1]
