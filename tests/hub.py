"""A stand-in for the Hugging Face hub on this machine: folders served by the hub's protocol, with faults on demand.

Small files are sent by the hub itself, large or binary ones (LFS) by another host to which it redirects, as the real one does.
"""

import functools
import hashlib
import json
import mmap
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, LDMTextToImagePipeline, UNet2DModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_text2image import stable_diffusion, tiny_unet, tiny_vae
from transformers import BertTokenizer

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/(?:resolve|lfs)/([^/]+)/(.+)")
LARGE = 10_000  # bytes from which a text is an LFS file, too
FAULTS = {  # of the whole hub or of one repository
    "404": "no such repository, or a private one and somebody who may see it not",
    "anonymous": "the same as the hub says it to those without a token: 401",
    "gated": "the listing is for everyone, the files are not: 401",
    "429": "too many requests, come back in an hour",
    "500": "the hub is broken",
    "portal": "the log-in page of a hotel at every address",
    "silent": "accepts connections and says nothing",
    "hangs": "lists the files and never sends one",
    "stalls": "sends half of every file, then nothing",
    "trickle": "sends files, 200 bytes a second",
    "reset": "closes the connection in the middle of each large file, and at its resumption there",
    "truncated": "large files end early, by their own account",
    "hash": "one byte of each large file is another",
    "text": "one byte of each small file is another",
}


@functools.lru_cache(None)
def described(path, changed, size):
    """What the hub knows of a file: size, git's hash, and for LFS files sha256 and size of the pointer that git keeps."""
    content = path.read_bytes()
    blob = lambda b: hashlib.sha1(b"blob %d\0" % len(b) + b).hexdigest()  # noqa: E731
    if size <= LARGE and b"\0" not in content:
        return {"size": size, "oid": blob(content), "lfs": None}
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return {"size": size, "oid": blob(pointer), "lfs": {"oid": sha256, "size": size, "pointerSize": len(pointer)}}


class Repository:
    """A folder as the hub sees it."""

    def __init__(self, folder):
        paths = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        self.folder = Path(folder)
        self.files = {str(p.relative_to(folder)): described(p, p.stat().st_mtime_ns, p.stat().st_size) for p in paths}
        self.commit = hashlib.sha1(json.dumps(self.files).encode()).hexdigest()


class Hub:
    """`with Hub(models={"owner/name": folder}, datasets={...}) as hub:` serves them at hub.endpoint.

    fault: one of FAULTS for the whole hub, or {repository: fault}; it may be changed at any time. asked: [(method, path)].
    """

    def __init__(self, models=None, datasets=None, fault=None):
        self.folders = {"models": models or {}, "datasets": datasets or {}}
        self.fault, self.asked, self.closed = fault, [], threading.Event()

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Answer, self))
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closed.set()  # who is kept waiting waits no longer
        self.server.shutdown()
        self.server.server_close()

    def files(self, repository):
        """The files of a repository that were asked for, headers alone or whole, in order and each once."""
        found = [FILE.fullmatch(path) for _, path in self.asked]
        return list(dict.fromkeys(f[4] for f in found if f and f[2] == repository))


class Answer(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms an answer

    def __init__(self, hub, *arguments):
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # who asked has gone
            self.close_connection = True

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query or body.decode())
        self.hub.asked.append((self.command, path))
        api, file = (pattern.fullmatch(parts.path) for pattern in (API, FILE))
        repository = api[2] if api else file[2] if file else None
        fault = self.hub.fault.get(repository) if isinstance(self.hub.fault, dict) else self.hub.fault
        if fault not in {None, *FAULTS}:
            raise KeyError(fault)
        if fault == "silent" or (fault == "hangs" and file):
            self.hub.closed.wait()
            self.close_connection = True
        elif fault == "portal":
            self.send(b"<!DOCTYPE html><html><body>Welcome to our hotel! Please log in.</body></html>", {}, kind="text/html")
        elif fault == "429":
            limits = {"RateLimit": '"api";r=0;t=3600', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
            self.refuse(429, "", "We had to rate limit your IP.", **limits, **{"Retry-After": "3600"})
        elif fault == "500":
            self.refuse(500, "", "Internal Error - We're working hard to fix this as soon as possible!")
        elif api or file:
            self.find(fault, "models" if file and not file[1] else "datasets" if file else api[1], repository, api, file, query)
        elif path == "/api/agent-harnesses":  # asked at the first request of every process without HF_HUB_DISABLE_TELEMETRY
            self.tell({"standardEnvVars": [], "harnesses": {}})
        elif path in ("/api/models", "/api/datasets"):
            self.tell([])
        elif path == "/":
            self.send(b"<!DOCTYPE html><html><body>The AI community building the future.</body></html>", {}, kind="text/html")
        else:
            self.refuse(404, "", "Sorry, we can't find the page you are looking for.")

    do_HEAD = do_POST = do_GET

    def find(self, fault, kind, repository, api, file, query):
        """Answer about one repository."""
        folder = self.hub.folders[kind].get(repository)
        if fault == "anonymous":
            return self.refuse(401, "RepoNotFound", "Invalid username or password.")
        if folder is None or fault == "404":
            return self.refuse(404, "RepoNotFound", "Repository not found")
        stored, revision = Repository(folder), unquote((api or {3: None, 4: None})[4] or "main") if api else unquote(file[3])
        if revision not in ("main", stored.commit):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if api and api[3] in (None, "revision"):
            return self.tell(listing(repository, stored, "blobs" in query, gated="manual" if fault == "gated" else False))
        if api:
            return self.entries(stored, api[3], unquote(api[5] or ""), query)
        if fault == "gated":
            said = f"Access to model {repository} is restricted. You must have access to it and be authenticated to access it."
            return self.refuse(401, "GatedRepo", said)
        if unquote(file[4]) not in stored.files:
            return self.refuse(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": stored.commit})
        return self.file(stored, unquote(file[4]), fault)

    def entries(self, stored, what, path, query):
        """Answer /tree/REVISION/PATH and /paths-info/REVISION."""
        found = {name: {"type": "file", "path": name} | about for name, about in stored.files.items()}
        for name in stored.files:
            for parent in map(str, Path(name).parents):
                found[parent] = {"type": "directory", "path": parent, "size": 0, "oid": hashlib.sha1(parent.encode()).hexdigest()}
        inside = found.pop(".") and [e for name, e in found.items() if not path or name.startswith(path + "/")]
        if what == "paths-info":
            inside = [found[name] for name in query.get("paths", []) if name in found]
        elif path and not inside:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist on 'main'")
        elif query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            inside = [e for e in inside if str(Path(e["path"]).parent) == (path or ".")]
        return self.tell([{k: v for k, v in e.items() if v is not None} for e in inside])

    def file(self, stored, name, fault):
        """Send a file, its headers, or where it lies."""
        about, lfs = stored.files[name], stored.files[name]["lfs"]
        headers = {"X-Repo-Commit": stored.commit, "ETag": f'"{about["oid"]}"', "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{lfs["oid"]}"', "X-Linked-Size": str(lfs["size"]), "ETag": f'"{lfs["oid"]}"'}
            if "/resolve/" in self.path:
                there = f"http://localhost:{self.hub.port}{self.path.replace('/resolve/', '/lfs/', 1)}"
                return self.send(b"Found. Redirecting", headers | {"Location": there}, status=302, kind="text/plain")
        with (stored.folder / name).open("rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) if about["size"] else b""
        if fault == ("hash" if lfs else "text"):  # the last digit of a text, so that JSON stays JSON
            place = [m.start() for m in re.finditer(rb"\d", content)][-1:] if not lfs else [len(content) // 2]
            for k in place:
                content[k] ^= 1
        size = len(content) // 2 if lfs and fault == "truncated" else len(content)
        first, last, status = 0, size - 1, 200
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            a, b = asked.groups()
            first, last = (int(a), min(int(b or last), last)) if a else (max(0, size - int(b)), last)
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
            if first > last:
                return self.send(b"", headers | {"Content-Range": f"bytes */{size}"}, status=416)
        middle = size // 2 if fault == "stalls" or (fault == "reset" and lfs) else size
        return self.send(memoryview(content)[first : last + 1], headers, status=status, fault=fault, until=max(0, middle - first))

    def send(self, content, headers, *, status=200, kind="application/octet-stream", fault=None, until=None):
        """Send an answer whole, slowly, or until a place of the content."""
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "trickle":
            for start in range(0, len(content), 20):
                self.wfile.write(content[start : start + 20])
                if self.hub.closed.wait(0.1):
                    break
        else:
            self.wfile.write(content[:until])
        if fault == "stalls":
            self.hub.closed.wait()
        self.close_connection = fault in ("reset", "stalls", "trickle")

    def tell(self, answer):
        self.send(json.dumps(answer).encode(), {}, kind="application/json; charset=utf-8")

    def refuse(self, status, code, message, **headers):
        headers |= {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self.send(json.dumps({"error": message}).encode(), headers, status=status, kind="application/json; charset=utf-8")


def listing(repository, stored, blobs, gated):
    """What /api/KIND/REPOSITORY tells."""
    siblings = []
    for name, about in stored.files.items():
        siblings.append({"rfilename": name})
        if blobs:
            siblings[-1] |= {"size": about["size"], "blobId": about["oid"]}
            if lfs := about["lfs"]:
                siblings[-1]["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    told = {"_id": stored.commit[:24], "id": repository, "modelId": repository, "author": repository.split("/")[0]}
    told |= {"sha": stored.commit, "private": False, "gated": gated, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
    times = dict.fromkeys(("lastModified", "createdAt"), "2024-01-01T00:00:00.000Z")
    return told | times | {"siblings": siblings, "usedStorage": sum(f["size"] for f in stored.files.values())}


# ------------------------------------------------------------------------------------------- models in the hub's layouts

NETWORKS = {  # size, channels; which files hold the weights; without sub-folders
    "1aurent/ddpm-mnist": (28, 1, {"safetensors"}, False),
    "google/ddpm-cifar10-32": (32, 3, {"safetensors", "bin"}, True),
    "mrm8488/ddpm-ema-pokemon-64": (64, 3, {"bin"}, False),
    "anton-l/ddpm-butterflies-128": (128, 3, {"shards", "bin"}, False),
    "google/ddpm-ema-church-256": (256, 3, {"bin"}, True),
}
LDM, DIFFUSION = "CompVis/ldm-text2im-large-256", "stable-diffusion-v1-5/stable-diffusion-v1-5"
CARD = "---\nlicense: mit\n---\n\nA stand-in.\n"


def bin_of(path):
    """The name of the .bin file in the place of a safetensors file."""
    name = "pytorch_" + path.name if path.name.startswith("model.") else path.name
    return path.with_name(name.replace("safetensors", "bin"))


def network(folder, size, channels, kinds, flat):
    """A repository of an unconditional network with random weights."""
    unet = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=size < 64,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder, max_shard_size="10KB" if "shards" in kinds else "5GB")
    if "bin" in kinds:
        torch.save(unet.state_dict(), folder / "unet/diffusion_pytorch_model.bin")
    if kinds == {"bin"}:
        (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    for part in ("unet", "scheduler") if flat else ():
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()
    (folder / "README.md").write_text(CARD)
    return folder


def latent(folder):
    """CompVis/ldm-text2im-large-256 in small."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *(m + chr(c) for m in ("", "##") for c in range(97, 123))]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=512)
    config = LDMBertConfig(
        vocab_size=len(words), encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, head_dim=8, d_model=16
    )
    scheduler = DDIMScheduler(clip_sample=False, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    LDMTextToImagePipeline(tiny_vae(), LDMBertModel(config), tokenizer, tiny_unet(16), scheduler).save_pretrained(folder)
    (folder / "vocab.txt").replace(folder / "tokenizer/vocab.txt")
    (folder / "tokenizer/tokenizer.json").unlink()  # of later years
    for path in folder.rglob("*.safetensors"):
        torch.save(load_file(path), bin_of(path))
        path.unlink()
    return folder


def stable(folder):
    """stable-diffusion-v1-5/stable-diffusion-v1-5 in small, with all that it holds beside what is needed."""
    folder.mkdir(parents=True)
    stable_diffusion(folder / "words").save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / "words" / name).replace(folder / "tokenizer" / name)
    (folder / "words").rmdir()
    (folder / "tokenizer/tokenizer.json").unlink()
    for path in [*folder.rglob("*.safetensors")]:
        weights = load_file(path)
        halves = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
        half = path.with_suffix(".fp16.safetensors")
        save_file(halves, half, {"format": "pt"})
        torch.save(weights, bin_of(path))
        torch.save(halves, bin_of(half))
        if path.parent.name == "unet":
            save_file(weights, path.with_suffix(".non_ema.safetensors"), {"format": "pt"})
    for part in ("safety_checker", "feature_extractor"):
        (folder / part).mkdir()
    (folder / "safety_checker/config.json").write_text('{"architectures": ["StableDiffusionSafetyChecker"]}')
    for name in ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"):
        (folder / "safety_checker" / name).write_bytes(bytes(20_000))
    eyes = {"feature_extractor_type": "CLIPFeatureExtractor", "do_resize": True, "size": 224, "crop_size": 224, "resample": 3}
    eyes |= {"image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276], "do_normalize": True}
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(eyes))
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for name in ("v1-5-pruned.ckpt", "v1-5-pruned.safetensors", "v1-5-pruned-emaonly.safetensors"):
        with (folder / name).open("wb") as file:
            file.truncate(2**25)
    (folder / "v1-inference.yaml").write_text("model:\n  base_learning_rate: 1.0e-04\n")
    (folder / "README.md").write_text(CARD)
    return folder


def model_repositories(folder):
    """{name: folder} of every model of the notebook's table and of exercise 5, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = {name: network(folder / name, *layout) for name, layout in NETWORKS.items()}
        return made | {LDM: latent(folder / LDM), DIFFUSION: stable(folder / DIFFUSION)}


# ------------------------------------------------------------------------------------------- data sets

TABLES = {  # folder of the parquet files, column, shapes of the images, mode, number of classes, shards of the training split
    "ylecun/mnist": ("mnist", "image", [(28, 28)], "L", 10, 1),
    "uoft-cs/cifar10": ("plain_text", "img", [(32, 32)], "RGB", 10, 1),
    "huggan/pokemon": ("data", "image", [(90, 90), (100, 70)], "RGBA", 0, 1),
    "huggan/smithsonian_butterflies_subset": ("data", "image", [(150, 100), (90, 180)], "RGB", 0, 1),
    "tglcourse/lsun_church_train": ("data", "image", [(256, 256)], "RGB", 0, 3),
}


def grey_of(label):
    """The mean grey level of the pictures of a class."""
    return 20 + 24 * label


def picture(number, label, shapes, mode):
    """A picture with a little texture; its mean tells its class."""
    draw = np.random.default_rng(number)
    wide, high = shapes[number % len(shapes)]
    grain = draw.integers(-8, 9, (high, wide) if mode == "L" else (high, wide, 3)) + grey_of(label)
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8)).convert(mode)


def table(path, numbers, rows, column, shapes, mode, classes):
    """A parquet file as the hub's data sets are stored, sorted by class."""
    labels = [k * (classes or 10) // rows for k in numbers]
    content = {column: [picture(k, label, shapes, mode) for k, label in zip(numbers, labels, strict=True)]}
    kinds = {column: datasets.Image()}
    if classes:
        content["label"], kinds["label"] = labels, datasets.ClassLabel(names=[str(k) for k in range(classes)])
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(content, datasets.Features(kinds)).to_parquet(path)


def stretch(path, size):
    """A parquet file made `size` bytes long by nothing between its rows and its footer, which take no room on the disk."""
    raw = path.read_bytes()
    footer = 8 + int.from_bytes(raw[-8:-4], "little")
    with path.open("wb") as file:
        file.write(raw[:-footer])
        file.seek(size - footer)
        file.write(raw[-footer:])


def data_repositories(folder, train=330, test=64):
    """{name: folder} of every data set of the notebook's table; those with classes have `train` and `test` rows, others 24."""
    for name, (place, column, shapes, mode, classes, shards) in TABLES.items():
        rows = train if classes else 24
        parts = {f"train-{k:05}-of-{shards:05}": (range(k, rows, shards), rows) for k in range(shards)}
        parts |= {"test-00000-of-00001": (range(test), test)} if classes else {}
        for part, (numbers, of) in parts.items():
            table(folder / name / place / f"{part}.parquet", numbers, of, column, shapes, mode, classes)
        splits = "".join(f"  - split: {s}\n    path: {place}/{s}-*\n" for s in ("train", "test")[: 1 + bool(classes)])
        config = f"configs:\n- config_name: {place if classes else 'default'}\n  data_files:\n{splits}"
        (folder / name / "README.md").write_text(f"---\n{config}---\n\nA stand-in.\n")
    return {name: folder / name for name in TABLES}
