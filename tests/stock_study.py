"""Exercise 1's mnist and cifar10 rows twice: as one would write them with stock parts, and as the notebook does.

Not a test: `python tests/stock_study.py` (some minutes on two CPU cores) prints both times of every
row and records them, and their ratio, as outputs/run/results/stock-study.csv. Stock parts: diffusers' pipelines as
documented (float32, contiguous), timm's network at one batch size, SciPy's matrix square root.
"""

import copy
import os
import time

import numpy as np
import scipy.linalg
import torch
from conftest import ROOT, set_up
from diffusers import DDIMPipeline, DDPMPipeline
from safetensors.torch import load_file

CHECKPOINTS = ROOT / "outputs/checkpoints"


@torch.no_grad()
def features(network, images):
    parts = []
    for part in images.split(64):
        x = torch.nn.functional.interpolate(part.expand(-1, 3, -1, -1) * 2 - 1, size=(224, 224), mode="bilinear", antialias=True)
        parts.append(network.blocks(network.bn1(network.conv_stem(x))).mean((2, 3)))
    return torch.cat(parts).double().numpy()


def stock(network, name, patch, method, steps, count):
    """The distance of `count` images by diffusers' pipeline, sampled 16 at once; patch: the pixel-unshuffle factor."""
    reference = load_file(CHECKPOINTS / name / "reference.safetensors")
    mean, cov = reference["mean"].double().numpy(), reference["cov"].double().numpy()
    kind = {"DDPM": DDPMPipeline, "DDIM": DDIMPipeline}[method]
    pipeline = kind.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    batches = [min(16, count - start) for start in range(0, count, 16)]
    images = torch.cat([pipeline(batch_size=b, num_inference_steps=steps, output_type="pt").images for b in batches])
    found = features(network, torch.nn.functional.pixel_shuffle(images, patch))
    root = scipy.linalg.sqrtm(np.cov(found.T) @ cov).real
    return np.square(found.mean(0) - mean).sum() + np.trace(np.cov(found.T) + cov - 2 * root)


def main():
    os.chdir(ROOT)
    nb = set_up("study", SOURCE="bundled")
    nb.kept = lambda facts, make: make()  # no chunk may come from an earlier run's cache
    section = nb.Section("stock-study")
    network = copy.deepcopy(nb.feature_network("FD-EffNet")).to(memory_format=torch.contiguous_format)
    total = {"stock parts": 0.0, "this notebook": 0.0}
    for name in ("mnist", "cifar10"):
        plan, checkpoint = nb.PROFILES[nb.PROFILE]["bundled"][name], nb.load_checkpoint(name)
        rows = [("DDPM", 1.0, S, plan.N) for S in plan.ddpm] + [("DDIM", 0.0, S, plan.N) for S in plan.ddim]
        for method, eta, steps, count in rows:
            ways = {
                "stock parts": lambda: stock(network, name, checkpoint.patch, method, steps, count),  # noqa: B023 -- called at once
                "this notebook": lambda: nb.load_reference(name, "bundled").distance(  # noqa: B023
                    nb.measure(checkpoint, count, steps, eta).features  # noqa: B023
                ),
            }
            for way, compute in ways.items():
                began = time.perf_counter()
                distance = compute()
                seconds = time.perf_counter() - began
                total[way] += seconds
                about = {"dataset": name, "method": method, "eta": eta, "steps": steps, "N": count, "detail": way}
                section.add("study_seconds", seconds, **about)
                print(f"{name} {method} {steps} steps N={count}, {way}: {distance:.1f}, {seconds:.0f} s", flush=True)
    for way, seconds in total.items():
        section.add("study_seconds", seconds, detail=f"all rows, {way}")
    ratio = section.add("study_seconds_ratio", total["stock parts"] / total["this notebook"])
    print(f"stock parts take {ratio.value:.2f} times as long; rows in {nb.OUTPUT}/results")


if __name__ == "__main__":
    main()
