"""Exported files give predict.py's labels, on pictures of other sizes than they were made with."""

import ast
import builtins
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY
from PIL import Image

import export
import predict
import train
from dataset import padded_size, resized_size
from models import load_checkpoint

# Portrait, more than twice as wide as high, half pixels to round (97 of 64), no padding at 32.
SIZES = [(150, 201), (201, 97), (60, 170), (97, 64), (64, 64)]


@pytest.fixture(scope="module", params=["unet", "deeplab"])
def trained(request, data, tmp_path_factory):
    """A network that finds several labels, and predict.py's masks of random pictures."""
    folder = tmp_path_factory.mktemp(request.param)
    flags = [*TINY[:2], *TINY[4:], "--batch-size", "12"] if request.param == "deeplab" else TINY
    flags = [*flags, "--model", request.param, "--weights", "none", "--lr", "1e-2", "--epochs", "1"]
    train.main(["--data", str(data), *flags, "--out", str(folder / "run")])
    state = load_checkpoint(folder / "run" / "best.pt")
    torch.manual_seed(1)
    for value in state["model"].values():  # so that labels change from place to place
        if value.dim() == 4:
            torch.nn.init.normal_(value, std=2 / value[0].numel() ** 0.5)
    state["model"]["classifier.bias" if request.param == "unet" else "classifier.4.bias"].zero_()
    path = folder / "mixed.pt"
    torch.save(state, path)
    pictures, rng = folder / "pictures", np.random.default_rng(0)
    pictures.mkdir()
    for number, (height, width) in enumerate(SIZES):
        small = rng.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3), dtype=np.uint8)
        Image.fromarray(small).resize((width, height)).save(pictures / f"{number}.png")
    out = folder / "out"
    line = ["--ckpt", path, "--images", pictures, "--out", out, "--device", "cpu"]
    predict.main([*map(str, line)])
    images, masks = [], []
    for number in range(len(SIZES)):
        images.append(np.array(Image.open(pictures / f"{number}.png")).transpose(2, 0, 1)[None])
        masks.append(np.array(Image.open(out / "masks_raw" / f"{number}.png")))
    assert len(np.unique(np.concatenate([mask.ravel() for mask in masks]))) >= 2
    return path, images, masks


def found_labels(picture, colors):
    """The labels whose colours a picture has."""
    return [colors.index(color.tolist()) for color in np.unique(picture.reshape(-1, 3), axis=0)]


def assert_alike(run, images, masks):
    for image, mask in zip(images, masks):
        labels = np.asarray(run(image))
        assert (labels.dtype, labels.shape) == (np.uint8, (1, *mask.shape))
        assert (labels[0] == mask).mean() >= 0.999
    batch = np.concatenate([images[0], images[0][..., ::-1], images[0]])
    labels = np.asarray(run(batch))
    assert (labels[0] == labels[2]).all()
    assert (labels[0] == masks[0]).mean() >= 0.999


def test_torch_program(trained, tmp_path):
    path, images, masks = trained
    export.main(["--ckpt", str(path), "--out", str(tmp_path / "model.pt2")])
    extra = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    assert_alike(lambda image: program(torch.from_numpy(image.copy())), images, masks)
    metadata = json.loads(extra["metadata.json"])
    assert metadata["classes"] == ["background", "person", "car", "bus", "dog"]
    assert len(metadata["colors"]) == 5


def test_onnx(trained, tmp_path):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path, images, masks = trained
    export.main(["--ckpt", str(path), "--out", str(tmp_path / "model.onnx")])
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert_alike(lambda image: session.run(None, {"images": image})[0], images, masks)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["metadata.json"])
    assert metadata["classes"][4] == "dog"


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_documented_examples(trained, tmp_path, suffix):
    """The lines of docs/export.md, on a picture whose labels predict.py has given."""
    if suffix == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path, images, masks = trained
    export.main(["--ckpt", str(path), "--out", str(tmp_path / f"model.{suffix}")])
    code = re.findall(r"```python\n(.*?)```", (SCRIPTS / "docs" / "export.md").read_text(), re.S)
    (code,) = [block for block in code if f"model.{suffix}" in block]
    Image.fromarray(images[0][0].transpose(1, 2, 0)).save(tmp_path / "photo.png")
    line = [sys.executable, "-c", code, "photo.png"]
    result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    known = load_checkpoint(path)
    found = np.array(Image.open(tmp_path / "labels.png"))
    expected = np.array(known["colors"])[masks[0]]
    assert (found == expected).all(axis=2).mean() >= 0.999
    assert {known["classes"][label] for label in np.unique(masks[0])} <= set(
        ast.literal_eval(result.stdout)
    )


def test_sizes_are_rounded_in_integers():
    """As by fractions, whose halves are rounded up."""
    from fractions import Fraction

    rng = np.random.default_rng(0)
    for height, width, size in rng.integers(1, 700, (2000, 3)).tolist():
        scale = min(Fraction(size, min(height, width)), Fraction(2 * size, max(height, width)))
        expected = [max(1, int(side * scale + Fraction(1, 2))) for side in (height, width)]
        assert list(resized_size(height, width, size)) == expected
        assert all(side % 32 == 0 for side in padded_size(height, width, size))


def test_refusals(checkpoint, tmp_path, refused, monkeypatch):
    line = ["--ckpt", checkpoint, "--out"]
    for out in ("model.pth", "none/model.pt2"):
        sentence = refused("export", *line, tmp_path / out)
        assert "give a *.pt2 or *.onnx, in a folder that is there" in sentence
    assert "no checkpoint at" in refused("export", "--ckpt", tmp_path / "none.pt")
    real = builtins.__import__

    def without(name, *rest, **named):
        if name.split(".")[0] in ("onnxscript", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *rest, **named)

    for name in [name for name in sys.modules if name.split(".")[0] in ("onnxscript", "onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install onnx onnxscript" in refused("export", *line, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
