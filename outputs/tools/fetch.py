"""What the notebook takes from the web, fetched by a process of its own, which can be stopped where no time-out helps:
in a name lookup or on a silent connection. It gives up without an answer for 8 s, or where a download rests for 20 s.

    python outputs/tools/fetch.py REPOSITORY [model [VARIANT [GIGABYTES]]]   a pipeline's files, into the hub's own cache
    python outputs/tools/fetch.py REPOSITORY dataset ROWS TARGET             a random choice of images, TARGET-COMMIT-ROWS.parquet
    python outputs/tools/fetch.py Inception-v3                               the weights of FID's network, into torch's cache

The last line on stdout is the folder or file. Exit status 1: the cause, a sentence on stderr, lies in this repository; 2: in the
whole hub, or on the way there; what an earlier day left in the cache is then named all the same.
"""

import contextlib
import hashlib
import logging
import os
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path

os.environ |= dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY"), "1")  # plain HTTP
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants, errors

FIRST, LATER = 8.0, 20.0  # seconds without an answer, and without 100 kB more once some have come
MOST = 3e8  # bytes of a data set's split, one file at least
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # the name ends with the start of its SHA-256
RELEASE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


def store_of(repo: str, kind: str) -> Path:
    """A repository's folder in the hub's cache."""
    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{repo.replace('/', '--')}"


def give_up(cause: str, status: int) -> None:
    """Name what an earlier day left, say why there is nothing newer, and end the process whatever its other threads do."""
    what, kind, *more = [*sys.argv[1:], "model"]
    if status == 2 and kind == "dataset":
        left = [*Path(more[1]).parent.glob(f"{Path(more[1]).name}-*-{more[0]}.parquet")]
    else:
        whole = [f for f in store_of(what, kind).glob("snapshots/*") if not f.parent.with_name(f"incomplete-{f.name}").exists()]
        left = whole if status == 2 else []
    if left:
        print(max(left, key=os.path.getmtime), flush=True)
    print(cause, file=sys.stderr, flush=True)
    os._exit(status)


class Progress(logging.Handler):
    """What has happened so far: the library's last warning, and how much was hashed."""

    warning, hashed = "", 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning, such as that of a retry, instead of printing it."""
        self.warning = record.getMessage()


PROGRESS = Progress()
logging.getLogger("huggingface_hub").addHandler(PROGRESS)
logging.getLogger("huggingface_hub").propagate = False


def watch(folder: Path) -> None:
    """Give up when for a while no file in the folder grows by 100 kB, and nothing is hashed or computed."""
    before, seen, since, patience = {*folder.glob("*")}, None, time.monotonic(), FIRST
    while time.monotonic() - since < patience:
        time.sleep(0.2)
        with contextlib.suppress(OSError):  # a file that was just renamed
            sizes = {f: f.stat().st_size // 100_000 for f in folder.glob("*")}
            now = (sizes, PROGRESS.hashed, int(time.process_time()))
            seen, since = now, since if now == seen else time.monotonic()
            patience = LATER if any(size for f, size in sizes.items() if f not in before) else FIRST
    for partial in {*folder.glob("*.incomplete")} - before:  # the library begins anew each time
        partial.unlink(missing_ok=True)
    status = re.search(r"HTTP Error (\d+)", PROGRESS.warning)
    cause = f"it answers {status[1]}" if status else f"nothing came for {patience:.0f} s"
    give_up(cause, 1 if patience == LATER or sys.argv[1] == "Inception-v3" else 2)


def of_model(sizes: dict[str, int], variant: str) -> list[str]:
    """What loading a pipeline reads: texts, and beside each config.json one form of the weights.

    That is the variant if it is asked for and there, safetensors if there are any. A checker of images is left out.
    """

    def form(file: str) -> tuple[str, bool]:
        named = re.search(r"\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", os.path.basename(file))
        return named[1] if named else "", file.endswith(".bin")

    chosen = [f for f in sizes if f.endswith((".json", ".txt", ".model")) and not f.startswith("safety_checker/")]
    for folder in {os.path.dirname(f) for f in chosen if os.path.basename(f) == "config.json"}:
        weights = [f for f in sizes if os.path.dirname(f) == folder and f.endswith((".safetensors", ".bin"))]
        order = [(v, binary) for v in (variant, "") for binary in (False, True)]
        best = next((wanted for wanted in order if wanted in map(form, weights)), None)
        chosen += [f for f in weights if form(f) == best]
    return chosen


def of_dataset(sizes: dict[str, int]) -> list[str]:
    """Parquet files in an order that is random but always the same: of each split those that fit, one at least."""
    order = sorted((f for f in sizes if f.endswith(".parquet")), key=lambda f: hashlib.sha256(f.encode()).digest())
    chosen = []
    for held in (False, True):
        total = 0
        for file in (f for f in order if os.path.basename(f).startswith("test") == held):
            if total == 0 or total + sizes[file] <= MOST:
                chosen.append(file)
            total += sizes[file]
    return chosen


def repository(repo: str, kind: str, variant: str = "", most: float = np.inf) -> tuple[Path, list[str]]:
    """Download what is missing, each file checked against the hub's hash; the snapshot's folder and the files wanted in it."""
    store = store_of(repo, kind)
    threading.Thread(target=watch, args=(store / "blobs",), daemon=True).start()
    found = huggingface_hub.HfApi().repo_info(repo, repo_type=kind, files_metadata=True)
    files = {f.rfilename: f for f in found.siblings}
    sizes = {name: f.size for name, f in files.items()}
    wanted = of_dataset(sizes) if kind == "dataset" else of_model(sizes, variant)
    if not wanted:
        raise ValueError("it holds no files that could be used")
    if (size := sum(sizes[name] for name in wanted)) > most:
        raise ValueError(f"its {size / 1e9:.1f} GB are too much for a CPU")
    folder = store / "snapshots" / found.sha
    missing = [f for f in wanted if not (folder / f).is_file() or (folder / f).stat().st_size != sizes[f]]
    if missing:
        store.mkdir(parents=True, exist_ok=True)
        (store / f"incomplete-{found.sha}").touch()  # so that nobody takes the half of it for the whole
    for name in missing:
        path = Path(huggingface_hub.hf_hub_download(repo, name, repo_type=kind, revision=found.sha))
        right = files[name].lfs.sha256 if files[name].lfs else files[name].blob_id
        made = hashlib.sha256() if files[name].lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size)  # git's, of small files
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                made.update(block)
                PROGRESS.hashed += 1
        if made.hexdigest() != right:
            path.resolve().unlink()
            raise ValueError(f"{name} arrived damaged, its hash is not the one that the hub names")
    (store / f"incomplete-{found.sha}").unlink(missing_ok=True)
    return folder, wanted


def choice(folder: Path, files: list[str], rows: int, target: Path) -> None:
    """Write encoded images, at most `rows` of each split, chosen and put in order at random: files may be sorted by class."""
    tables = []
    for held in (False, True):
        paths = [folder / f for f in files if os.path.basename(f).startswith("test") == held]
        if paths:
            column = next((c for c in ("image", "img") if c in pq.read_schema(paths[0]).names), None)
            if column is None:
                raise ValueError(f"it has no column image or img, but {', '.join(pq.read_schema(paths[0]).names)}")
            images = pa.concat_tables([pq.read_table(path, columns=[column]) for path in paths]).column(0)
            chosen = images.take(np.random.default_rng(0).permutation(len(images))[:rows])
            tables.append(pa.table({"image": chosen, "split": ["test" if held else "train"] * len(chosen)}))
    target.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(tables), partial := target.with_suffix(f".{os.getpid()}.partial"))
    os.replace(partial, target)


def dataset(repo: str, rows: int, target: Path) -> Path:
    """The file of chosen images; made once for a commit."""
    folder, files = repository(repo, "dataset")
    path = target.with_name(f"{target.name}-{folder.name}-{rows}.parquet")
    if not path.is_file():
        try:
            choice(folder, files, rows, path)
        except OSError as error:
            raise ValueError(f"{path} cannot be written ({error.strerror})") from error
    return path


def inception() -> Path:
    """Inception's weights (96 MB) in torch's cache, whole or not at all."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(os.environ.get("TORCH_HOME") or f"{cache}/torch").expanduser() / "hub" / "checkpoints" / INCEPTION
    partial = path.with_suffix(f".{os.getpid()}.part")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            threading.Thread(target=watch, args=(path.parent,), daemon=True).start()
            urllib.request.urlretrieve(RELEASE, partial)
            with partial.open("rb") as file:
                if not hashlib.file_digest(file, "sha256").hexdigest().startswith("6726825d"):
                    raise ValueError("damaged on the way")
            os.replace(partial, path)
        except Exception as error:
            told = getattr(error, "reason", error)
            raise ValueError(f"its weights cannot be downloaded ({told}), so FD-EffNet takes the place of FID") from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    return path


def cause_of(error: Exception) -> tuple[str, int]:
    """(why in plain words, exit status)."""
    while "LocalEntryNotFound" in type(error).__name__ and error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split())[:200]
    if isinstance(error, errors.GatedRepoError):
        return "it is gated; accept its terms on its page, then log in with `hf auth login`", 1
    if isinstance(error, errors.RepositoryNotFoundError):
        return "it is not there, or private (404)", 1
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "a file that the hub lists is not there (404)", 1
    if isinstance(error, errors.HfHubHTTPError) and (status := getattr(error.response, "status_code", 0)):
        reason = f"it answers {status} {getattr(error.response, 'reason_phrase', '')}".strip()
        return reason, 2 if status in (401, 407, 429) or status >= 500 else 1
    if type(error).__name__ == "JSONDecodeError":
        return "it answers with a web page in the place of data, as a network does that wants a login first", 2
    if type(error).__name__ in ("UnsupportedProtocol", "InvalidURL"):
        return "HF_ENDPOINT must start with http:// or https://", 2
    if getattr(error, "filename", None) or getattr(error, "errno", 0) in (28, 30):  # of a file, or the disk is full or read-only
        return f"its cache cannot be written ({text})", 2
    way = isinstance(error, ConnectionError | ImportError) or type(error).__module__.startswith("http")  # the network, a proxy
    return text.split(" This is usually")[0] or type(error).__name__, 2 if way else 1


def main() -> None:
    """Fetch and print where it lies; on a fault say the cause and exit."""
    what, kind, *more = [*sys.argv[1:], "model"] if len(sys.argv) == 2 else sys.argv[1:]
    try:
        if what == "Inception-v3":
            print(inception())
        elif os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            raise errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        elif kind == "dataset":
            print(dataset(what, int(more[0]), Path(more[1])))
        else:
            print(repository(what, kind, *more[:1], *(1e9 * float(gigabytes) for gigabytes in more[1:]))[0])
    except Exception as error:  # whatever the network, the disk or the library raises
        give_up(*cause_of(error))


if __name__ == "__main__":
    main()
