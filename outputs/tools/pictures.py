"""Pictures of any kind as arrays of one shape, read by a process of its own, since the libraries behind it warn where they like.

    python outputs/tools/pictures.py PLACE CHANNELS SIZE

PLACE is a folder, in which every picture counts however deep it lies (what is hidden does not), or a parquet file. On stdout: an
npz file with `train` and `test`, uint8 [N, CHANNELS, SIZE, SIZE]. The last line on stderr says what was read and left out, or,
with exit status 1, why nothing can be used.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

LEAST = 8  # pictures: a distance needs a few on either side
HELD_OUT = 512  # pictures at most, where no test split is given
TRAIN, TEST, MORE = {"train", "training"}, {"test", "testing"}, {"val", "valid", "validation", "dev"}
SCALES = ((0, 1), (-1, 1), (0, 255))  # black and white, where a format does not say
GREY = np.array([[0.299], [0.587], [0.114]])
PICTURES = (
    r"struct<(.*, )?(bytes|path): .*|(large_)?binary|((large_|fixed_size_)?list<\w+: ){2,3}(u?int|float|double|half|bool).*"
)
TEXT = r"(large_)?string|dictionary<values=(large_)?string.*"  # paths, which Arrow types PICTURES are not


def in_bytes(image: Image.Image, channels: int, size: int) -> np.ndarray:
    """A picture of 8 bits a channel: on white, the middle square, resized (Lanczos)."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB") if channels == 3 or image.mode == "LAB" else image.convert("L")
    image = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def in_floats(values: np.ndarray, channels: int, size: int) -> np.ndarray:
    """The same of numbers [H, W] or [H, W, C] on any scale, as float32."""
    values = np.atleast_3d(values).astype(np.float32)
    known = np.abs(values) < 1e30  # elsewhere there are no data
    values = np.where(known, values, values[known].min())
    fitted = [ImageOps.fit(Image.fromarray(v.copy()), (size, size), Image.Resampling.LANCZOS) for v in values.transpose(2, 0, 1)]
    made = np.stack(fitted, axis=-1).clip(values.min(), values.max())  # it overshoots
    if made.shape[2] != channels:
        made = made @ GREY if channels == 1 else made.repeat(3, axis=2)
    return made.astype(np.float32).transpose(2, 0, 1)


def prepare(source: Any, channels: int, size: int) -> np.ndarray:
    """A picture (path, file, pixels) as [channels, size, size], upright; uint8, or float32 where its scale is unknown."""
    if isinstance(source, np.ndarray):
        same = source.dtype == np.uint8
        return in_bytes(Image.fromarray(source), channels, size) if same else in_floats(source, channels, size)
    image = Image.open(source)
    tags, clear = getattr(image, "tag_v2", {}), image.info.get("transparency")  # of a TIFF; of a PNG, in units of its own
    raw = image.tile[0].args if image.format == "PNG" and image.tile else ""
    if (image.mode == "YCbCr" and tags.get(530, (2, 2)) != (1, 1)) or (image.mode == "L" and tags.get(339) == (2,)):
        raise ValueError("Pillow takes subsampled colours, or signed bytes, for others")
    image.draft(None, (4 * size, 4 * size))  # a JPEG is decoded no larger than it must
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] not in "IF":
        if clear is not None and raw in ("L;2", "L;4", "RGB;16B"):
            image.info["transparency"] = tuple(c >> 8 for c in clear) if raw[0] == "R" else clear * (85 if raw == "L;2" else 17)
        return in_bytes(image, channels, size)
    white = 2 ** tags.get(258, (16,))[0] - 1 if (image.format, image.mode) == ("PPM", "I") or image.mode[:2] == "I;" else 0
    values = np.asarray(image).view(np.uint32) if image.mode == "I" and tags.get(339) == (1,) else np.asarray(image)
    values = np.where(values == clear, white, values) if clear is not None else values
    values = in_floats(white - values.astype(float) if tags.get(262) == 0 else values, channels, size)
    return (values * (255 / white)).round().astype(np.uint8) if white else values


def pixels(lists: Any) -> np.ndarray | str:
    """An Arrow array of nested lists of numbers as [H, W] or [H, W, C], or in words what is the matter."""
    shape = [len(lists)]
    while lists.type.num_fields:
        lengths = lists.value_lengths().unique().to_pylist()
        if len(lengths) != 1 or lists.null_count:
            return "rows of several lengths"
        shape, lists = shape + lengths, lists.flatten()
    if lists.null_count or (shape[2:] and not {shape[0], shape[2]} & {1, 3}):
        return "pixels are missing, or channels other than 1 or 3"
    values = lists.to_numpy(zero_copy_only=False).reshape(shape)
    values = values if values.ndim == 2 or values.shape[2] in (1, 3) else values.transpose(1, 2, 0)  # channels came first
    return values[..., 0] if values.shape[2:] == (1,) else values


def rows_of(path: Path, name: Path) -> Iterator[tuple[str, Any, Path]]:
    """What `found_in` yields, of each row of a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    words = [w for w in re.split(r"[\W_]+", path.stem.lower()) if w in TRAIN | TEST | MORE]  # as in train-00000-of-00001.parquet
    try:
        file = pq.ParquetFile(path)
        kinds = {c: str(kind) for c, kind in zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)}
        named = [c for c in kinds if c.lower() in ("image", "img")][:1]
        likely = named or [c for c, kind in kinds.items() if re.fullmatch(PICTURES, kind)]
        if len(likely) != 1:
            yield str(name), f"no column image or img, but {', '.join([*kinds][:5])}{' ...' * (len(kinds) > 5)}", Path()
        elif not re.fullmatch(f"{PICTURES}|{TEXT}", kinds[likely[0]]):
            yield str(name), f"the column {likely[0]} holds {kinds[likely[0]][:80]}, which is no picture", Path()
        else:
            for batch in file.iter_batches(256, columns=[likely[0], *{"split"} & {*kinds}]):
                splits = batch.column("split").to_pylist() if "split" in kinds else [*words, path.name][:1] * len(batch)
                for row, split in zip(batch.column(likely[0]), splits, strict=True):
                    if isinstance(row, pa.ListScalar):
                        value = pixels(row.values) if row.is_valid else "empty"
                    else:
                        value = row.as_py()
                        if isinstance(value, dict):
                            value = value.get("path") if value.get("bytes") is None else value["bytes"]
                        value = "empty" if not value else path.parent / value if isinstance(value, str) else io.BytesIO(value)
                    number += 1
                    yield f"row {number} of {name}", value, name.parent / str(split).replace("/", " ")
    except (pa.ArrowException, OSError, ValueError, KeyError):
        yield str(name), f"damaged after row {number}" if number else "no readable parquet file", Path()


def found_in(place: Path) -> Iterator[tuple[str, Any, Path]]:
    """(name, what `prepare` takes or why there is nothing, its folder) of everything that might be a picture, in order."""
    if not place.is_dir():
        yield from rows_of(place, Path(place.name))
        return
    seen, unread = set(), []
    for root, folders, files in os.walk(place, followlinks=True, onerror=unread.append):
        new = os.path.realpath(root) not in seen  # links may lead in circles
        seen.add(os.path.realpath(root))
        folders[:] = sorted(f for f in folders if new and f[0] != ".")
        for path in (Path(root, f) for f in sorted(files) if new and f[0] != "."):
            name = path.relative_to(place)
            if path.suffix.lower() == ".parquet":
                yield from rows_of(path, name)
            else:
                yield str(name), "no file" if path.exists() and not path.is_file() else path, name.parent
    yield from ((os.path.relpath(error.filename, place), error.strerror, Path()) for error in unread)


def read(place: Path, channels: int, size: int) -> tuple[dict[str, np.ndarray], str]:
    """The pictures of both splits, and what was read in words; ValueError where they are too few."""
    if not place.exists():
        raise ValueError(f"there is no {place}")
    arrays, folders, bad = [], [], []
    for name, source, folder in found_in(place):
        try:
            if isinstance(source, str):
                raise ValueError(source)
            arrays.append(prepare(source, channels, size))
            folders.append(folder)
        except Exception as error:  # whatever a damaged file raises
            why = source if isinstance(source, str) else getattr(error, "strerror", None) or "damaged"
            why = "no format that Pillow reads" if isinstance(error, Image.UnidentifiedImageError) else why
            bad.append(f"{name} ({'too large' if isinstance(error, Image.DecompressionBombError) else why})")
    left_out = f" left out: {', '.join(bad[:3])}{f' and {len(bad) - 3:,} more' if bad[3:] else ''}" if bad else ""
    if len(arrays) < LEAST:
        raise ValueError(f"{place} holds {len(arrays)} readable pictures, and {LEAST} are needed{';' * bool(bad)}{left_out}")
    if own := [k for k, a in enumerate(arrays) if a.dtype != np.uint8]:  # one scale for all of them
        low, high = min(float(arrays[k].min()) for k in own), max(float(arrays[k].max()) for k in own)
        fitting = [s for s in SCALES if s[0] - np.ptp(s) / 20 <= low and high <= s[1] + np.ptp(s) / 20]
        black, white = fitting[0] if fitting else (low, high)  # what else there is, such as heights, is stretched
        for k in own:
            arrays[k] = (255 * ((arrays[k] - black) / (white - black or 1)).clip(0, 1)).round().astype(np.uint8)
    depth = len(Path(os.path.commonpath({*folders})).parts)  # splits are where the folders part, and nothing else is there
    words = [[*folder.parts[depth:], ""][0].lower() for folder in folders]
    test = np.array([word in TEST for word in words])
    if not (TRAIN & {*words} and {*words} <= TRAIN | TEST | MORE) or min(test.sum(), (~test).sum()) < 2:
        test[:] = False
        test[np.random.default_rng(0).permutation(len(test))[: min(HELD_OUT, max(2, len(test) // 5))]] = True
    made = {part: np.stack([a for a, t in zip(arrays, test, strict=True) if t == (part == "test")]) for part in ("train", "test")}
    said = f", {len(bad):,}{left_out};" if bad else ","
    return made, f"{len(test):,} pictures read{said} {test.sum():,} held out"


def main() -> None:
    """Read, write and say."""
    parser = argparse.ArgumentParser(description="Pictures of any kind as an npz file on stdout.")
    parser.add_argument("place", type=Path)
    parser.add_argument("channels", type=int, choices=(1, 3))
    parser.add_argument("size", type=int)
    given, arrays = parser.parse_args(), {}
    try:
        arrays, said = read(given.place, given.channels, given.size)
        np.savez(sys.stdout.buffer, **arrays)
    except (ValueError, OSError) as error:
        said = str(error)
    except MemoryError:
        said = f"the pictures of {given.place} do not fit into memory"
    sys.stderr.write("".join(c if c.isprintable() else "?" for c in said) + "\n")
    sys.exit(not arrays)


if __name__ == "__main__":
    main()
