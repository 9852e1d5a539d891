"""Windows over large pictures: equal to the whole picture, without seams, in little memory."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, given, settings, st
from PIL import Image
from test_predict import random_checkpoint, run

import evaluate
import tiles
from evaluate import Predictor
from models import load_checkpoint, model_from_checkpoint, save_checkpoint
from tiles import Tiling, scaled_rows, tiled_labels, windows

CPU = torch.device("cpu")


def blobs(height, width, seed=0):
    """A picture whose colours change from place to place."""
    coarse = (max(1, height // 8), max(1, width // 8), 3)
    coarse = np.random.default_rng(seed).integers(0, 256, coarse, dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def lively(checkpoint, tmp_path_factory):
    """A network with labels that change from place to place, at size 64."""
    path = tmp_path_factory.mktemp("lively") / "random.pt"
    return random_checkpoint(path, checkpoint, load_checkpoint(checkpoint)["classes"], 64)


# --- windows -------------------------------------------------------------------------------------


@given(length=st.integers(32, 400), side=st.integers(32, 130))
@settings(max_examples=60, deadline=None)
def test_windows_cover_every_pixel_and_their_weights_add_up_to_one(length, side):
    total, length = torch.zeros(max(length, side)), max(length, side)
    found = windows(length, side)
    for start, weights in found:
        assert 0 <= start <= length - side
        assert (weights > 0).all()
        total[start : start + side] += weights
    torch.testing.assert_close(total, torch.ones(length))
    starts = [start for start, _ in found]
    assert max(np.diff(starts), default=0) <= side // 2
    assert len(set(starts)) == len(starts) <= -(-(length - side) // (side // 2)) + 1


def test_weights_by_hand():
    """Sides of 4: ramps of 0.5, 1.5, 1.5, 0.5, which overlap by 2."""
    (first, one), (second, two) = windows(6, 4)
    assert (first, second) == (0, 2)
    assert one.tolist() == [1, 1, 0.75, 0.25]
    assert two.tolist() == [0.25, 0.75, 1, 1]


# --- the same as the whole picture ---------------------------------------------------------------


class Pixelwise(torch.nn.Module):
    """A 1x1 convolution, which no window's edge changes; it counts its windows."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.windows = torch.randn(classes, 3, 1, 1), 0

    def forward(self, images):
        self.windows += len(images)
        return torch.nn.functional.conv2d(images.float() / 255, self.weight)


@pytest.mark.parametrize(
    ("height", "width", "scale", "side", "batch_size", "sums"),
    [
        (97, 133, 1.0, 32, 3, None),
        (97, 133, 1.0, 32, 1, 5 * 32 * 40),  # four blocks of columns
        (98, 134, 0.5, 32, 3, None),
        (96, 130, 2.0, 33, 4, 5 * 33 * 50),  # five
        (20, 30, 1.0, 32, 2, None),  # smaller than a window
        (16, 700, 1.0, 32, 5, 5 * 32 * 333),
        (64, 64, 1.0, 64, 1, None),  # one window
        (1, 1, 1.0, 32, 1, None),
    ],
)
def test_tiles_equal_the_whole_picture(monkeypatch, height, width, scale, side, batch_size, sums):
    """To the pixel; but enlarged, where Pillow rounds a strip otherwise than the whole, by a level
    of 255, to 99.9% of them."""
    monkeypatch.setattr(tiles, "SUMS", sums or 2**24)
    monkeypatch.setattr(tiles, "PIXELS", 7 * width)
    picture, network = blobs(height, width), Pixelwise()
    tiling = Tiling(scale, side, 5, CPU, batch_size)
    labels, probability = tiled_labels(network, tiling, picture, True)
    size = round(scale * height), round(scale * width)
    whole = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    logits = network(torch.from_numpy(np.array(whole)).permute(2, 0, 1)[None])
    logits = torch.nn.functional.interpolate(logits, (height, width), mode="bilinear")[0]
    expected, best = logits.softmax(dim=0).max(dim=0)
    larger = scale > 1
    assert (labels != best).float().mean() <= 0.001 * larger
    np.testing.assert_allclose(probability, 255 * expected, atol=1.5 if larger else 0.51)
    assert height < 32 or len(labels.unique()) >= 3


@pytest.mark.parametrize("width", [40, 64, 160])
def test_a_symmetric_picture_has_symmetric_labels_with_flip(lively, width):
    """Narrower than a window too, whose padding is not mirrored in."""
    half = np.array(blobs(50, width // 2))
    picture = Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1))
    model, tiling = model_from_checkpoint(load_checkpoint(lively), CPU), Tiling(1.0, 64, 5, CPU)
    with torch.inference_mode():
        labels, _ = Predictor(model, 64, CPU, flip=True, tiling=tiling).tiled(picture)
    assert len(labels.unique()) >= 2
    assert (labels == labels.flip(-1)).float().mean().item() >= 0.99


@pytest.mark.parametrize(("height", "scale"), [(200, 0.77), (123, 1.9)])
def test_strips_of_a_resized_picture_are_the_pictures(height, scale):
    """To one level: their edges lie between its pixels, and Pillow takes places as float32."""
    picture = blobs(height, 90)
    size = round(scale * height), round(scale * 90)
    whole = np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    for top in range(0, size[0], 37):
        rows = scaled_rows(picture, size, top, 40).permute(1, 2, 0).numpy().astype(int)
        inside = whole[top : top + 40]
        assert abs(rows[: len(inside), : size[1]] - inside).max() <= 1
        assert rows.shape[0] == 40
        assert (rows[len(inside) :] == tiles.FILL).all()


def test_a_block_runs_no_more_windows_than_it_needs(monkeypatch):
    """Of 5 rows of 9 windows each, in two blocks: where these meet, two are run twice."""
    monkeypatch.setattr(tiles, "SUMS", 2 * 32 * 80)
    network = Pixelwise(classes=2)
    tiled_labels(network, Tiling(1.0, 32, 2, CPU), blobs(96, 160))
    assert network.windows == 5 * (6 + 5)


def test_no_seams():
    """A network that takes the edge of any window for label 1, twice as sure as of the rest:
    in a picture of one colour only the picture's own edge is left of that."""

    def network(images):
        logits = torch.zeros(len(images), 2, 32, 32)
        logits[:, 0, 2:-2, 2:-2] = 1
        logits[:, 1] = 2 - 2 * logits[:, 0]
        return logits

    picture = Image.new("RGB", (200, 150), (90, 120, 40))
    labels = tiled_labels(network, Tiling(1.0, 32, 2, CPU, 4), picture)[0].numpy()
    assert (labels[2:-2, 2:-2] == 0).all()
    assert (labels[:2] == 1).all()


def test_a_window_of_the_whole_picture_gives_its_labels(lively, tmp_path):
    picture = tmp_path / "picture.png"
    blobs(64, 64).save(picture)
    whole, _ = run(lively, tmp_path / "whole", picture)
    tiled, _ = run(lively, tmp_path / "tiled", picture, flags=["--tile", "--scale", "1"])
    np.testing.assert_array_equal(whole["picture"], tiled["picture"])
    assert len(np.unique(whole["picture"])) >= 3


# --- by command ----------------------------------------------------------------------------------


def report(ckpt, file, *flags):
    """The JSON of an evaluation."""
    line = ["--ckpt", ckpt, "--json", file, "--workers", 0, "--device", "cpu", *flags]
    evaluate.main([str(word) for word in line])
    return json.loads(file.read_text())[0]


def test_the_same_matrix_whatever_the_batch_of_windows(lively, tmp_path, capsys):
    found = [
        report(lively, tmp_path / "report.json", "--tile", "--scale", 2.5, "--batch-size", count)
        for count in (1, 3, 8)
    ]
    assert found[0]["confusion"] == found[1]["confusion"] == found[2]["confusion"]
    assert found[0]["tile"] is True
    assert "validation images, in tiles" in capsys.readouterr().out
    whole = report(lively, tmp_path / "report.json")
    assert whole["confusion"] != found[0]["confusion"]
    assert np.sum(whole["confusion"]) == np.sum(found[0]["confusion"])


def test_prediction_equals_evaluation(lively, data, coco, tmp_path):
    """The scale is the checkpoint's, and pages and panels are drawn in tiles too."""
    state = load_checkpoint(lively)
    state["scale"] = 2.2
    save_checkpoint(tmp_path / "run.pt", state)
    flags = ["--panels", 2, "--html", tmp_path / "page.html", "--tile", "--flip"]
    confusion = np.array(report(tmp_path / "run.pt", tmp_path / "report.json", *flags)["confusion"])
    assert (tmp_path / "run_panels.png").exists()
    masks, _ = run(
        tmp_path / "run.pt", tmp_path / "out", coco / "val2017", flags=["--tile", "--flip"]
    )
    expected = np.zeros_like(confusion)
    for stem, labels in masks.items():
        (path,) = (data / "masks_raw").rglob(f"{stem}.png")
        truth = np.array(Image.open(path))
        np.add.at(expected, (truth[truth < 255], labels[truth < 255]), 1)
    np.testing.assert_array_equal(confusion, expected)
    scaled, _ = run(
        tmp_path / "run.pt", tmp_path / "other", coco / "val2017",
        flags=["--tile", "--flip", "--scale", "1.1"],
    )  # fmt: skip
    assert any((scaled[stem] != masks[stem]).any() for stem in masks)


def test_a_checkpoint_holds_the_scale_of_its_training(checkpoint):
    """Short sides of 48, 48 and 40 pixels, as many of each, at size 32."""
    assert load_checkpoint(checkpoint)["scale"] == 32 / 48


def test_refusals(lively, coco, tmp_path, refused):
    state = load_checkpoint(lively)
    del state["scale"]
    save_checkpoint(tmp_path / "old.pt", state)
    predicted = ["predict", "--images", coco / "val2017", "--out", tmp_path / "out", "--ckpt"]
    for line in (predicted, ["evaluate", "--ckpt"]):
        assert "--scale 2 needs --tile: give both" in refused(*line, lively, "--scale", 2)
        for scale in (0, -1, 17, "nan"):
            sentence = refused(*line, lively, "--tile", "--scale", scale)
            assert "give 0.001 to 16.0" in sentence
        assert "does not say at which scale" in refused(*line, tmp_path / "old.pt", "--tile")
    assert not (tmp_path / "out").exists()


def test_pictures_that_pillow_takes_for_bombs(lively, coco, tmp_path, monkeypatch, capsys):
    """Only where --tile says that they are large."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 64 // 2 - 1)
    image = coco / "val2017" / "v000.jpg"
    masks, code = run(lively, tmp_path / "whole", image)
    assert (masks, code) == ({}, 1)
    error = capsys.readouterr().err
    assert "v000.jpg (more pixels than Pillow accepts): use predict.py --tile" in error
    masks, code = run(lively, tmp_path / "tiled", image, flags=["--tile"])
    assert (masks["v000"].shape, code) == ((48, 64), 0)


PEAKS = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import predict
def peak():  # in MB; ru_maxrss would begin with the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
before = peak()
code = predict.main(sys.argv[2:])
print(before, peak())
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc elsewhere")
def test_large_pictures_take_little_memory(lively, tmp_path):
    """Two of 40 megapixels: 160 MB once decoded, 40 MB of labels, and what works on strips of them.
    The second is read when the first is gone."""
    (tmp_path / "images").mkdir()
    picture = blobs(1000, 400).resize((4000, 10_000), Image.Resampling.BILINEAR)
    for name in "ab":
        picture.save(tmp_path / "images" / f"{name}.jpg", quality=80)
    line = ["--ckpt", lively, "--device", "cpu", "--images", tmp_path / "images"]
    line += ["--out", tmp_path / "out", "--tile", "--scale", 0.05]
    process = [sys.executable, "-c", PEAKS, SCRIPTS, *line]
    result = subprocess.run([str(word) for word in process], stdout=subprocess.PIPE, text=True)
    assert result.returncode == 0
    before, after = map(int, result.stdout.split()[-2:])
    assert after - before < 350
    for name in "ab":
        with Image.open(tmp_path / "out" / "masks_raw" / f"{name}.png") as mask:
            assert mask.size == (4000, 10_000)
