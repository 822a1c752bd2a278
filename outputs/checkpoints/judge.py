"""Judge trained networks by the notebook's own metrics: python outputs/checkpoints/judge.py NAME... --data FOLDER [--out OUT].

Run from the repository's root, in the notebook's environment, after train.py with the same FOLDER and OUT. Writes
OUT/NAME/reference.safetensors (statistics of the real images, never an image) unless it is there, rows of training.csv, and
the card's sections Quality and Race. With --race WHAT the network is one of a race: it gets its errors by t in seconds, on
one scale whatever it predicts, and no card; the cards of the same NAME then show them.
"""

import argparse
import contextlib
import io
import json
import linecache
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import RECIPES, Recipe, training_images, write


def notebook_setup(results: Path) -> types.ModuleType:
    """The notebook's set-up cells, executed as a module; rows go to RESULTS/results."""
    notebook = types.ModuleType("notebook_setup")
    sys.modules[notebook.__name__] = notebook
    cells = json.loads(Path("hw.diffusion.ipynb").read_text(encoding="utf-8"))["cells"]
    for tag in ("parameters", "setup"):
        for cell in (c for c in cells if tag in c["metadata"].get("tags", [])):
            source, name = "".join(cell["source"]), f"<cell {cell['id']}>"
            linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for inspect.getsource
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(source, name, "exec"), notebook.__dict__)
        notebook.OUTPUT_DIR, notebook.SOURCE = str(results), "bundled"  # after the parameters, before the set-up
    return notebook


def reference_of(nb: Any, folder: Path, training: Tensor, heldout: Tensor) -> Any:
    """The stored reference of a folder; made from at most 10,000 images on either side where there is none."""
    path = folder / "reference.safetensors"
    if not path.exists():
        some = training[torch.randperm(len(training), generator=torch.Generator().manual_seed(0))[:10_000]]
        made = nb.make_reference(nb.image_features(some), nb.image_features(heldout[:10_000]))
        stored = {k: v for k, v in vars(made).items() if k != "metric" and v is not None} | {"cov": made.cov.float()}
        stored |= {k: stored[k].half() for k in ("heldout", "training") if k in stored}
        save_file({k: v.contiguous() for k, v in stored.items()}, path)
    return nb.Reference(**load_file(path))


def nearest_l2(images: Tensor, training: Tensor) -> float:
    """Median over images [n, C, H, W] of the L2 distance (values in [-1, 1]) to the nearest training image."""
    near = [torch.cdist(images.flatten(1).float(), part.flatten(1).float()).min(1).values for part in training.split(256)]
    return float(torch.stack(near).min(0).values.median()) / 127.5


def v_errors(nb: Any, section: Any, model: Any, heldout: Tensor, detail: str) -> None:
    """Rows of the squared error in v by t, mean over at most 64 held-out images: one scale for whatever a network predicts."""
    x0 = heldout[:64].to(nb.DEVICE).float() / 127.5 - 1
    for t in (20, 50, 100, 200, 350, 500, 700, 900):
        eps = nb.image_noise(range(len(x0)), model.shape, t, nb.DEVICE)
        parts = zip(nb.add_noise(x0, eps, model.alpha_bar, t).split(16), eps.split(16), strict=True)
        with torch.inference_mode():
            off = torch.cat([model(x_t, t) - noise for x_t, noise in parts]) / model.alpha_bar[t].sqrt()
        error = nb.mean_interval(off.square().flatten(1).mean(1).cpu())
        section.add(f"v error at t = {t}", **error, N=len(x0), dataset=model.name, detail=detail)


def distances(nb: Any, section: Any, model: Any, reference: Any, N: int) -> list[dict[str, str]]:
    """Rows and table lines of both samplers and of the untrained control."""
    fresh = nb.UNet2DModel.from_config(model.unet.config).eval().requires_grad_(False).to(nb.DEVICE)
    runs = [("DDIM", model, 50, 0.0), ("DDPM", model, 100, 1.0)]
    runs.append(("untrained", nb.replace(model, unet=fresh, control="untrained"), 50, 0.0))
    floors, lines = {int(n): floor for n, floor, *_ in reference.floors.tolist()}, []
    for method, network, steps, eta in runs:
        features = nb.image_features(nb.sample_images(network, range(N), steps, eta))
        about = {"N": N, "dataset": model.name, "method": method, "eta": eta, "steps": steps, "spacing": "leading", "seed": 0}
        rows = []
        for metric, of, n_real in (
            (reference.metric, reference.distance, int(reference.n_real)),
            ("KD-EffNet", lambda f: nb.kernel_distance(f, reference.heldout), len(reference.heldout)),
        ):
            rows.append(section.add(metric, **nb.jackknife(nb.left_out(of, features)), n_real=n_real, **about))
        floor = f"{floors[N]:.1f}" if N in floors else "too few held out"
        lines.append({"sampler": f"{method}, {steps} steps", "N": str(N), reference.metric: f"{rows[0]:.1f}", "floor": floor})
        lines[-1]["KD-EffNet"] = f"{rows[1]:.2f}"
        if reference.training is not None:
            lines[-1]["nearest training image"] = f"{reference.nearest(features).mean():.1f}"
    return lines


def markdown(lines: list[dict[str, str]]) -> str:
    """Lines as a Markdown table."""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def race_table(nb: Any, name: str) -> str:
    """The race's rows of a data set as a table, a line a network."""
    rows = pd.DataFrame([row for row in nb.results("training", dataset=name) if row.detail.startswith("race: ")])
    if not len(rows):
        return ""
    sampled = (", " + rows["method"] + "-" + rows["steps"].astype(str)).where(rows["method"] != "", "")
    rows = rows.assign(column=rows["metric"] + sampled, text=rows["value"].map(nb.short), network=rows["detail"].str[6:])
    text, order = f"\n## Race\nNetworks measured before this one, N = {rows['N'].iloc[-1]}:\n\n", [*rows["column"].unique()]
    table = rows.pivot_table(index="network", columns="column", values="text", aggfunc="last", sort=False)[order]
    return text + markdown(table.fillna("").reset_index().to_dict("records")) + "\n"


def judge_images(nb: Any, name: str, recipe: Recipe, data: Path, out: Path, race: str) -> None:
    """Rows, reference and card of one image network."""
    folder, N = out / name, {28: 256, 32: 128, 64: 64}.get(recipe.size, 32)
    training, heldout = training_images(name, data, recipe)
    nb.BUNDLED = out
    model, section = nb.load_checkpoint(name), nb.Section("training")
    log = pd.read_csv(out / f"{name}-training" / "unet.csv")
    seen, minutes = int(log["images"].iloc[-1]), log["seconds"].iloc[-1] / 60
    if race:
        v_errors(nb, section, model, heldout, f"race: {race}, {seen:,} images in {minutes:.0f} minutes")
        return
    for metric, value in (
        ("loss", log["loss"].tail(5).mean()),
        ("images_seen", seen),
        ("training_minutes", minutes),
        ("images_per_s", seen / minutes / 60),
    ):
        section.add(metric, value, dataset=name)
    reference = reference_of(nb, folder, training, heldout)
    lines = distances(nb, section, model, reference, N)
    near = {"samples by DDIM": nb.sample_images(model, range(32), 50), "held-out real images": heldout[:32]}
    near = ", ".join(f"{what} {nearest_l2(images, training):.2f}" for what, images in near.items())
    near = f"Nearest training image, L2 of pixels in [-1, 1], median of 32: {near}."
    if reference.training is not None:
        real = reference.nearest(reference.heldout).mean()
        near += f"\nBy features, as in the table (a mean): held-out real images {real:.1f}."
    card = (folder / "README.md").read_text(encoding="utf-8").split("\n## Quality")[0].rstrip()
    n_real, n_held = f"{int(reference.n_real):,}", len(reference.heldout)
    card += f"""

## Quality
{reference.metric} against {n_real} real training images, the kernel distance KD-EffNet against {n_held} held-out ones;
95 % intervals. The floor is what as many held-out real images score.

sha256 of reference.safetensors: `{nb.weights_sha256(folder, reference=True)}`

{markdown(lines)}

{near}
{race_table(nb, name)}"""
    write(folder / "README.md", card.encode())


def caption_means(features: Tensor, rows: pd.DataFrame, captions: Sequence[str]) -> Tensor:
    """Mean of features [N, D] over the drawings of each caption, [len(captions), D]."""
    return torch.stack([features[torch.tensor((rows["caption"] == c).tolist())].mean(0) for c in captions])


def real_top1(features: Tensor, rows: pd.DataFrame, captions: Sequence[str]) -> tuple[int, int]:
    """(right, all) when each real drawing's caption is guessed from the means of the other styles."""
    right = total = 0
    for word in rows["word"].unique():
        own = (rows["word"] == word) & rows["caption"].isin(captions)
        chosen = torch.tensor(own.tolist())
        means = F.normalize(caption_means(features[~chosen], rows[~own], captions), dim=-1)
        guess = (F.normalize(features[chosen], dim=-1) @ means.T).argmax(1).tolist()
        right += sum(captions[g] == caption for g, caption in zip(guess, rows["caption"][own], strict=True))
        total += len(guess)
    return right, total


def judge_text(nb: Any, data: Path, out: Path) -> None:
    """Reference and card of the text-to-image model: what exercise 5 recognises pictures by, and how often real ones are."""
    from train_text2image import TextRecipe, drawings, embeddings, text_encoder

    folder, (images, captions, words, held) = out / "text2image", drawings(TextRecipe(), data)
    rows, features = pd.DataFrame({"caption": captions, "word": words, "held": held}), nb.image_features(images)
    mean, std = features.mean(0), features.std(0)
    standard, stored, facts = (features - mean) / std, {"mean": mean, "std": std}, {"real_top1": {}, "n_real": {}}
    several = rows.groupby("caption")["word"].transform("nunique") > 1
    for label, chosen in (("seen", ~rows["held"]), ("unseen", rows["held"])):
        known = sorted(rows["caption"][several & chosen].unique())
        order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0))[:100]
        facts[label] = [known[i] for i in order]
        stored[label] = caption_means(standard, rows, facts[label]).half()
        facts["real_top1"][label], facts["n_real"][label] = real_top1(standard, rows, facts[label])
    save_file(stored, folder / "reference.safetensors", metadata={k: json.dumps(v) for k, v in facts.items()})
    vae = AutoencoderKL.from_pretrained(folder / "vqvae", dtype=torch.float32).eval().requires_grad_(False)
    out_of = torch.tensor(held)
    real, own = images[out_of], rows[rows["held"]]
    back = nb.to_uint8(torch.cat([vae(x.float() / 127.5 - 1).sample for x in real.split(64)]))
    error, psnr = (back.float() - real).abs().mean(), 10 * (255**2 / (back.float() - real).square().mean()).log10()
    section = nb.Section("training")
    for metric, value in (("reconstruction_error", error), ("reconstruction_psnr", psnr)):
        section.add(metric, value, dataset="text2image", N=len(real))
    guessed = {"the drawing": standard[out_of], "the drawing after the autoencoder": (nb.image_features(back) - mean) / std}
    known = [*dict.fromkeys(rows["caption"][~rows["held"]])]
    told, target = embeddings(*text_encoder(), [*known, *facts["unseen"]]).mean(1), caption_means(standard, rows, known)
    a, b = (part - told[: len(known)].mean(0) for part in (told[: len(known)], told[len(known) :]))
    ridge = torch.linalg.solve(a.T @ a + 0.01 * len(a) * a.var() * torch.eye(a.shape[1]), a.T @ F.normalize(target, dim=-1))
    guessed["the text alone, by linear regression"] = b @ ridge
    lines, means = [], F.normalize(stored["unseen"].float(), dim=-1)
    for what, features in guessed.items():
        wanted = facts["unseen"] if "text" in what else own["caption"].tolist()
        right = sum(facts["unseen"][k] == c for k, c in zip((features @ means.T).argmax(1).tolist(), wanted, strict=True))
        of = sum(caption in facts["unseen"] for caption in wanted)
        low, high = nb.scipy.stats.binomtest(right, of).proportion_ci(method="wilson")
        row = section.add("caption_top1", right / of, low=low, high=high, N=of, dataset="text2image", detail=what)
        lines.append({"what the caption is guessed from": what, "right": f"{row}", "N": str(of)})
    card = (folder / "README.md").read_text(encoding="utf-8").split("\n## Quality")[0].rstrip()
    found = " and ".join(f"{facts['real_top1'][k] / facts['n_real'][k]:.2f} ({k} captions)" for k in ("seen", "unseen"))
    card += f"""

## Quality
Held-out drawings come back from the autoencoder with a mean absolute error of {error:.1f} of 255 (PSNR {psnr:.1f} dB).
Exercise 5's score recognises real drawings, looked up among the other styles, in {found} of cases.

sha256 of reference.safetensors: `{nb.weights_sha256(folder, reference=True)}`

What each part of the model lets through, told by how often the right one of {len(means)} captions that were never trained on
is the nearest (here to the mean of all its drawings) [95 % interval]:

{markdown(lines)}
"""
    write(folder / "README.md", card.encode())


def main() -> None:
    """Read the command line and judge what it names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*RECIPES, "text2image"], metavar="NAME")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=Path("outputs/run/checkpoints"))
    parser.add_argument("--results", type=Path, default=Path("outputs/run"), help="training.csv goes to RESULTS/results")
    parser.add_argument("--race", default="", metavar="WHAT", help="what makes this network of a race another than the rest")
    given = parser.parse_args()
    nb = notebook_setup(given.results)
    for name in given.names:
        if name == "text2image":
            judge_text(nb, given.data, given.out)
        else:
            judge_images(nb, name, RECIPES[name], given.data, given.out, given.race)


if __name__ == "__main__":
    main()
