"""FID is FID: the notebook's number is that of torchmetrics, torch-fidelity and pytorch-fid on the same images.

Inception's weights are 95 MB from the web, so a random network of the same layout stands in. Everything else is what a run
with the real weights does: file names, loading, gray to RGB, resizing, scaling, network, moments, distance.
"""

import contextlib
import functools

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance, get_activations
from pytorch_fid.inception import InceptionV3
from sklearn.datasets import load_digits, load_sample_image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance

TORCH_FIDELITY, PYTORCH_FID = (f"{origin}-2015-12-05-6726825d.pth" for origin in ("weights-inception", "pt_inception"))
N = {"colour": 8, "gray": 4, "299 px": 3}  # a side; few: an image costs 0.3 s, a Fréchet distance in 2048 dimensions 4 s


def images_of(kind):
    """Two sets of real uint8 images [N, C, H, W]: patches of a temple and of a flower, or zeros and ones."""
    if kind == "gray":
        digits = load_digits()
        every = torch.tensor(digits.images, dtype=torch.float32)[:, None] * 255 / 16
        every = torch.nn.functional.interpolate(every, size=(28, 28), mode="bilinear").round().to(torch.uint8)
        return [every[digits.target == digit][: N[kind]] for digit in (0, 1)]
    draw, size, sets = np.random.default_rng(0), {"colour": 32, "299 px": 299}[kind], []
    for name in ("china.jpg", "flower.jpg"):
        photograph = Image.fromarray(load_sample_image(name))  # 640 x 427
        side = 96 if kind == "colour" else 299
        corners = zip(draw.integers(0, 640 - side, N[kind]), draw.integers(0, 427 - side, N[kind]), strict=True)
        patches = [photograph.crop((x, y, x + side, y + side)).resize((size, size)) for x, y in corners]
        sets.append(torch.from_numpy(np.stack(patches)).permute(0, 3, 1, 2).contiguous())
    return sets


def stand_in():
    """Random weights of Inception's layout, of which every feature is alive and none dominates.

    He's initial weights; then each batch norm takes the statistics of what reaches it, else two images would look the same
    after fifty random layers.
    """
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), torch.inference_mode():
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(memory_format=torch.channels_last)
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.bias, 0, 0.3)
                module.momentum = 1.0
        few = [part[:2].float() for kind in ("colour", "299 px") for part in images_of(kind)]
        network.train()(torch.cat([torch.nn.functional.interpolate(image, (299, 299)).to(torch.uint8) for image in few]))
    return network.to(memory_format=torch.contiguous_format).state_dict()


@contextlib.contextmanager
def torch_home(nb, folder):
    """A TORCH_HOME into which nothing can be downloaded, found by a notebook that has loaded nothing yet."""

    def forget():
        nb.feature_network.cache_clear()
        nb.load_reference.cache_clear()
        nb.FAULTS.clear()
        nb.NOTICES.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(folder))
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")  # where nothing listens
        forget()
        yield
        forget()


@pytest.fixture(scope="module")
def inception(nb, tmp_path_factory):
    """A TORCH_HOME in force with the stand-in weights under the names that the libraries look for; returns their folder."""
    home = tmp_path_factory.mktemp("torch")
    checkpoints = home / "hub/checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(stand_in(), checkpoints / TORCH_FIDELITY)
    (checkpoints / PYTORCH_FID).symlink_to(checkpoints / TORCH_FIDELITY)
    with torch_home(nb, home):
        yield checkpoints


DAMAGED = {
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "a web page": lambda whole: b"<!DOCTYPE html>\n<html></html>\n",
}


@pytest.fixture
def weights(nb, inception, tmp_path):
    """A function: a fresh TORCH_HOME in force, with weights that are whole, missing or damaged."""
    with contextlib.ExitStack() as stack:

        def lay(state):
            path = tmp_path / "torch/hub/checkpoints" / TORCH_FIDELITY
            path.parent.mkdir(parents=True)
            if state == "whole":
                path.symlink_to(inception / TORCH_FIDELITY)
            elif state != "missing":
                path.write_bytes(DAMAGED[state]((inception / TORCH_FIDELITY).read_bytes()))
            stack.enter_context(torch_home(nb, tmp_path / "torch"))

        yield lay


@pytest.fixture(scope="module")
def measured(nb, inception):
    """A function: (images, the notebook's features, its FID, its KID) of the two sets of a kind, computed once."""

    @functools.cache
    def measure(kind):
        images = images_of(kind)
        features = [nb.image_features(part, "FID") for part in images]
        fid = distance_of(nb, *(features if kind == "colour" else within_their_span(*features)))
        return images, features, fid, nb.kernel_distance(*features)

    return measure


def distance_of(nb, a, b):
    return nb.frechet_distance(*nb.moments(a), *nb.moments(b))


def within_their_span(a, b):
    """Features [N, 2048] by 2 N coordinates, in which no distance differs; scipy's root of 2048 x 2048 numbers takes 22 s."""
    a, b = a.double(), b.double()
    axes = torch.linalg.qr((torch.cat([a, b]) - a.mean(0)).T).Q
    return (a - a.mean(0)) @ axes, (b - a.mean(0)) @ axes


def pytorch_fids_distance(nb, a, b):
    return calculate_frechet_distance(*(m.numpy() for part in within_their_span(a, b) for m in nb.moments(part)))


class Uint8(torch.utils.data.Dataset):
    """What torch-fidelity takes: RGB images, one at a time."""

    def __init__(self, images):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, k):
        return self.images[k]


# ----------------------------------------------------------------------------------------- the same number elsewhere


@pytest.mark.parametrize("kind", N)
def test_the_stand_in_network_tells_images_apart(measured, kind):
    """Else every distance would be zero, or that of the means alone, and agree with anything."""
    _, (a, b), fid, kid = measured(kind)
    assert a.shape == b.shape == (N[kind], 2048)
    assert 0.2 < a.mean() < 2
    assert (a.std(0) > 0.01).float().mean() > 0.95, "features that vary"
    means = float((a.double().mean(0) - b.double().mean(0)).square().sum())
    assert 0.1 * fid < means < 0.9 * fid, "means and covariances both count"
    assert abs(kid) > 0.01


ALL = {"kid_subsets": 1, "verbose": False}  # KID of all images


def test_fid_and_kid_are_torch_fidelitys(measured):
    (real, made), _, fid, kid = measured("colour")
    places = {"cuda": False, "save_cpu_ram": True, "cache": False}
    asked = {"fid": True, "kid": True, "kid_subset_size": N["colour"], **ALL}
    found = torch_fidelity.calculate_metrics(input1=Uint8(real), input2=Uint8(made), **asked, **places)
    assert fid == pytest.approx(found["frechet_inception_distance"], rel=1e-4)
    assert kid == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-4)


def test_fid_and_kid_of_gray_images_are_torch_fidelitys(measured):
    """By the parts that calculate_metrics is made of, so that the distance can be taken within the span of the features."""
    images, _, fid, kid = measured("gray")
    network = create_feature_extractor("inception-v3-compat", ["2048"], cuda=False, verbose=False)
    found = [get_featuresdict_from_dataset(Uint8(part), network, 64, False, True, False)["2048"] for part in images]
    statistics = [fid_features_to_statistics(part) for part in within_their_span(*found)]
    assert fid == pytest.approx(fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"], rel=1e-4)
    theirs = kid_features_to_metric(*found, kid_subset_size=N["gray"], **ALL)
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)


def test_fid_is_torchmetricss_without_antialias(measured):
    """antialias=True, its default, is another resize than the one that FID was defined with: 0.3 % apart here."""
    (real, made), _, fid, _ = measured("colour")
    metric = FrechetInceptionDistance(feature=2048, antialias=False, normalize=False)
    metric.inception.to(memory_format=torch.channels_last)  # the same, in less time
    metric.update(real, real=True)
    metric.update(made, real=False)
    assert fid == pytest.approx(float(metric.compute()), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save")
@pytest.mark.parametrize("kind", ["colour", "gray"])
def test_kid_is_torchmetricss(measured, kind):
    """Its formula on the notebook's features: its own network resizes with antialias, and cannot be told otherwise."""
    _, (real, made), _, kid = measured(kind)
    metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=1, subset_size=N[kind])
    metric.update(real, real=True)
    metric.update(made, real=False)
    assert kid == pytest.approx(float(metric.compute()[0]), rel=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Matrix is ill-conditioned")
def test_fid_is_pytorch_fids_formula_and_network(nb, measured):
    """Its network on the very numbers that Inception sees here, its distance of the same moments.

    Its own pipeline resizes otherwise, by half a pixel: 0.4 and 2 % apart on the colour and the gray images here.
    """
    images, features, fid, _ = measured("colour")
    assert pytorch_fids_distance(nb, *features) == pytest.approx(fid, rel=1e-4)
    network = InceptionV3([3], resize_input=False, normalize_input=False).eval()
    few = torch.cat([part[:2] for part in images]).float()
    seen = (interpolate_bilinear_2d_like_tensorflow1x(few, size=(299, 299), align_corners=False) - 128) / 128
    with torch.inference_mode():
        theirs = network(seen)[0].flatten(1)
    torch.testing.assert_close(torch.cat([part[:2] for part in features]), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Matrix is ill-conditioned")
def test_fid_of_299_px_files_is_that_of_pytorch_fids_whole_pipeline(nb, measured, tmp_path):
    """But for its scaling: 2 x / 255 - 1 where TensorFlow's graph has (x - 128) / 128, at most 0.008 apart.

    Fifty random layers magnify that: with these weights the FID is 3 % apart, with others it was 2 to 5 % (trained ones were
    not at hand). With the same scaling nothing is left of it: see the test above.
    """
    images, _, fid, _ = measured("299 px")
    network, found = InceptionV3([3]), []
    for side, part in enumerate(images):
        files = [tmp_path / f"{side}-{k}.png" for k in range(len(part))]
        for image, file in zip(part, files, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        found.append(torch.from_numpy(get_activations(files, network, batch_size=len(part), num_workers=0)))
    theirs = pytorch_fids_distance(nb, *found)
    assert theirs / fid == pytest.approx(1.03, abs=0.01)


# ----------------------------------------------------------------------------------------------- without the weights


@pytest.mark.parametrize("state", ["missing", *DAMAGED])
def test_weights_that_cannot_be_had_are_an_oserror(nb, weights, state):
    """Also a download that broke off: no caller expects what the unpickler makes of it. Asked again, the answer is the same."""
    weights(state)
    for _ in range(2):
        with pytest.raises(OSError, match="FD-EffNet takes the place of FID"):
            nb.feature_network("FID")


@pytest.mark.parametrize(
    ("state", "metrics"),
    [("whole", ["FID", "KID"]), ("missing", ["FD-EffNet", "KD-EffNet"]), ("truncated", ["FD-EffNet", "KD-EffNet"])],
)
def test_reference_floors_and_rows_are_of_one_network(nb, weights, run, tiny, monkeypatch, tmp_path, state, metrics):
    """Inception if its weights are at hand and whole, else EfficientNet: FID and FD-EffNet never share a table."""
    weights(state)
    for split, part in zip(("train", "test"), images_of("gray"), strict=True):
        (tmp_path / "images/mnist" / split).mkdir(parents=True)
        for k, image in enumerate(part[:4]):
            Image.fromarray(image[0].numpy()).save(tmp_path / "images/mnist" / split / f"{k}.png")
    monkeypatch.setattr(nb, "DATA_DIR", str(tmp_path / "images"))
    monkeypatch.setattr(nb, "LADDER", (4,))
    reference = nb.load_reference("mnist", "hub")
    D = {"FID": 2048, "FD-EffNet": 320}[metrics[0]]
    assert (reference.metric, reference.mean.shape, reference.heldout.shape) == (metrics[0], (D,), (4, D))
    (floor,) = reference.floors.tolist()
    expected = distance_of(nb, *within_their_span(reference.training, reference.heldout))
    assert floor == pytest.approx([4, expected, expected, expected], rel=1e-4)
    nb.score(nb.Section("table"), tiny(size=28, name="mnist", source="hub"), reference.heldout)
    rows = nb.results("table")
    assert [(row.metric, row.method) for row in rows] == [(metrics[0], ""), (metrics[1], ""), (metrics[0], "real")]
    assert rows[0].value == pytest.approx(expected, rel=1e-4)
    assert rows[2].value == pytest.approx(expected, rel=1e-4)
