"""Prediction: every kind of image file, evaluation's labels, what is skipped, refused and used."""

import math
import os
import re
import resource
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, command
from PIL import Image

import predict
from common import UserError, class_colors, load_manifest
from dataset import evaluation_input, evaluation_loader
from evaluate import Predictor
from images import read_image
from models import build_model, load_checkpoint, model_from_checkpoint, save_checkpoint
from report import OPACITY

CPU = torch.device("cpu")
WHITE = (255, 255, 255)


def random_checkpoint(path, checkpoint, classes, size):
    """A checkpoint whose labels change from place to place, which two epochs do not give."""
    state = load_checkpoint(checkpoint)
    del state["optimizer"]  # of other classes
    torch.manual_seed(1)
    model = build_model("unet", classes, 4)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            torch.nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    state.update(model=model.state_dict(), classes=classes, colors=class_colors(len(classes)))
    state["args"]["size"] = size
    save_checkpoint(path, state)
    return path


@pytest.fixture(scope="module")
def lively(checkpoint, tmp_path_factory):
    """At size 40 the images of `coco`, 48x64, 64x48 and 40x40, have one padded shape."""
    classes = load_checkpoint(checkpoint)["classes"]
    path = tmp_path_factory.mktemp("lively") / "random.pt"
    return random_checkpoint(path, checkpoint, classes, 40)


def run(checkpoint, out, *images, batch_size=4, flags=()):
    """Run predict's main in this process; the masks by stem, and the exit code."""
    arguments = ["--ckpt", checkpoint, "--out", out, "--batch-size", batch_size, "--device", "cpu"]
    code = predict.main([str(a) for a in [*arguments, *flags, "--images", *images]])
    masks = {}
    for path in sorted((out / "masks_raw").iterdir()):
        with Image.open(path) as mask:
            assert mask.mode == "L"
            masks[path.stem] = np.array(mask)
        with Image.open(out / "masks_colored" / path.name) as colored:
            assert (colored.mode, colored.size) == ("RGB", mask.size)
        with Image.open(out / "overlays" / f"{path.stem}.jpg") as overlay:
            assert (overlay.mode, overlay.size) == ("RGB", mask.size)
    assert not list(out.rglob("*.tmp"))
    return masks, code


# --- the same labels as evaluation ---------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equals_evaluation(data, coco, lively, tmp_path, batch_size):
    masks, code = run(lively, tmp_path, coco / "val2017", batch_size=batch_size)
    assert code == 0
    manifest = load_manifest(data)
    state = load_checkpoint(lively)
    indices = np.flatnonzero(manifest.splits == "val2017")
    loader = evaluation_loader(manifest, indices, state["args"]["size"], batch_size, workers=0)
    seen = set()
    with torch.inference_mode():
        predictor = Predictor(model_from_checkpoint(state, CPU), state["args"]["size"], CPU)
        for row, labels, _, _ in predictor.predict(loader):
            stem = os.path.splitext(os.path.basename(manifest.files[row]))[0]
            np.testing.assert_array_equal(masks[stem], labels.numpy())
            seen.add(stem)
    assert seen == set(masks)
    assert len(seen) == 9
    assert len(np.unique(np.concatenate([mask.ravel() for mask in masks.values()]))) >= 3


class Colors(torch.nn.Module):
    """Its logits are the colours that the pictures have, which tells where each pixel went."""

    def forward(self, images):
        return {"out": images}


def test_flips_keep_the_order_of_the_pixels():
    """Of two pictures of one padded shape and different widths; the padding is not mirrored in."""
    images = torch.randint(0, 256, (2, 3, 32, 64), dtype=torch.uint8)
    run = (Predictor(Colors(), 30, CPU, flip=flip).logits for flip in (0, 1))
    plain, both = (logits(images, [55, 60]) for logits in run)
    torch.testing.assert_close(both, plain.log_softmax(dim=1))


def test_flips_average_probabilities():
    """A network that finds label 1 in the left column only: with its mirror image in both."""

    class Left(torch.nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 2, *images.shape[2:])
            logits[:, 1, :, 0] = math.log(9)  # probabilities 0.1 and 0.9; elsewhere one half each
            return {"out": logits}

    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    found = Predictor(Left(), 20, CPU, flip=True).logits(images, [30])[0].exp()
    expected = torch.full((32, 32), 0.5)
    expected[:, 0] = expected[:, 29] = 0.7
    torch.testing.assert_close(found[1], expected)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(32, 32))


def test_a_symmetric_picture_gives_a_symmetric_mask(lively, tmp_path):
    half = np.random.default_rng(0).integers(0, 256, (48, 32, 3), dtype=np.uint8)
    picture = tmp_path / "picture.png"
    Image.fromarray(np.concatenate([half, half[:, ::-1]], axis=1)).save(picture)
    (plain,), (both,) = (
        run(lively, tmp_path / name, picture, flags=flags)[0].values()
        for name, flags in {"plain": [], "flip": ["--flip"]}.items()
    )
    assert (plain != plain[:, ::-1]).mean() > 0.05
    assert (both != both[:, ::-1]).mean() < 0.001


def test_probabilities_of_classes_that_are_not_written_are_0(lively, coco, tmp_path):
    picture = coco / "val2017" / "v000.jpg"
    masks, _ = run(lively, tmp_path / "all", picture, flags=["--probabilities"])
    shown = "car" if masks["v000"].max() == 1 else "person"
    flags = ["--probabilities", "--classes", shown]
    some, _ = run(lively, tmp_path / "some", picture, flags=flags)
    before, after = (
        np.array(Image.open(tmp_path / name / "probabilities" / "v000.png"))
        for name in ("all", "some")
    )
    hidden = masks["v000"] != some["v000"]
    assert hidden.any()
    assert not after[hidden].any()
    np.testing.assert_array_equal(after[~hidden], before[~hidden])


def test_prepared_masks_are_not_overwritten(data, coco, checkpoint, refused):
    sentence = refused("predict", "--ckpt", checkpoint, "--images", coco / "val2017", "--out", data)
    assert f"{data} holds what prepare_masks.py wrote" in sentence


@pytest.mark.parametrize("text", [b"6", b"x"])
def test_an_orientation_that_is_text_stops_nothing(tmp_path, text):
    exif = b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 1, 0x0112, 2, 2)  # one entry, ASCII
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg", exif=exif + text.ljust(4, b"\0") + bytes(4))
    assert Image.open(tmp_path / "a.jpg").getexif()[0x0112] == text.decode()
    assert read_image(tmp_path / "a.jpg").size == (4, 3)


def test_probabilities_are_those_of_the_labels(lively, coco, tmp_path):
    masks, code = run(lively, tmp_path, coco / "val2017" / "v000.jpg", flags=["--probabilities"])
    found = Image.open(tmp_path / "probabilities" / "v000.png")
    assert (code, found.mode, found.size) == (0, "L", masks["v000"].shape[::-1])
    state = load_checkpoint(lively)
    predictor = Predictor(model_from_checkpoint(state, CPU), 40, CPU)
    image = torch.from_numpy(np.array(Image.open(coco / "val2017" / "v000.jpg"))).permute(2, 0, 1)
    with torch.inference_mode():
        logits = predictor.run(evaluation_input(image, 40)[None])[:, :, :40, :53]  # 48 x 64 at 40
        logits = torch.nn.functional.interpolate(logits, (48, 64), mode="bilinear")[0]
    expected, labels = logits.softmax(dim=0).max(dim=0)
    np.testing.assert_array_equal(masks["v000"], labels.numpy())
    np.testing.assert_allclose(np.array(found), 255 * expected.numpy(), atol=0.51)


def test_chosen_classes_only(lively, coco, tmp_path, refused):
    images = coco / "val2017"
    everything, _ = run(lively, tmp_path / "all", images)
    chosen, _ = run(lively, tmp_path / "some", images, flags=["--classes", "car", "dog"])
    for stem, mask in everything.items():
        expected = np.where((mask == 2) | (mask == 4), mask, 0)
        np.testing.assert_array_equal(chosen[stem], expected)
    assert any(mask.any() for mask in chosen.values())
    line = ["--ckpt", lively, "--images", images, "--out", tmp_path / "none"]
    assert "--classes cra: choose from person, car" in refused("predict", *line, "--classes", "cra")
    assert not (tmp_path / "none").exists()


def test_any_batch_size_gives_the_same_masks(coco, lively, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    sizes = [(48, 64), (64, 48), (40, 40), (480, 640), (300, 300), (1, 1), (7, 900), (481, 639)]
    for number, (height, width) in enumerate(sizes):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height)).save(images / f"{number}.png")
    one, _ = run(lively, tmp_path / "one", images, batch_size=1)
    many, _ = run(lively, tmp_path / "many", images, batch_size=5)
    assert [mask.shape for mask in one.values()] == sizes
    for stem, mask in one.items():
        np.testing.assert_array_equal(mask, many[stem])


# --- image files ---------------------------------------------------------------------------------


def upright():
    """(24, 40, 3): no two corners alike, and none of its turns or mirror images like another."""
    pixels = np.full((24, 40, 3), 90, dtype=np.uint8)
    pixels[:12, :20] = 250, 20, 20
    pixels[12:, :20] = 20, 250, 20
    pixels[:12, 20:] = 20, 20, 250
    return pixels


STORED = {
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p),  # to be shown turned clockwise, so stored turned counterclockwise
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p, -1),
}


def save_turned(path, orientation, **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright()))
    Image.fromarray(stored).save(path, exif=exif, **options)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    path = tmp_path / f"image.{suffix}"
    options = {"quality": 95, "subsampling": 0} if suffix == "jpg" else {}
    save_turned(path, orientation, **options)
    image = read_image(path)
    assert image.size == (40, 24)
    expected = upright().astype(int)
    for y in (6, 18):
        for x in (10, 30):
            assert abs(np.array(image)[y, x] - expected[y, x]).max() <= 6, (y, x)


def sixteen_bits(dtype):
    values = np.full((24, 40), 0x8040, dtype=dtype)
    values[0, :3] = 0, 0x00FF, 0xFFFF
    return Image.fromarray(values)


def palette(**options):
    """Colour 0 to the left, colour 1 to the right."""
    image = Image.new("P", (40, 24))
    image.putpalette([200, 10, 20, 30, 40, 250])
    image.paste(1, (20, 0, 40, 24))
    image.info.update(options)
    return image


def halves(mode, left, right):
    image = Image.new(mode, (40, 24), left)
    image.paste(right, (20, 0, 40, 24))
    return image


RED, BLUE = (200, 10, 20), (30, 40, 250)
OVER_WHITE = (227, 132, 137)  # 128/255 of RED and 127/255 of white
# file, image, its pixel to the left, its pixel to the right
FILES = {
    "rgb.png": (halves("RGB", RED, BLUE), RED, BLUE),
    "rgb.bmp": (halves("RGB", RED, BLUE), RED, BLUE),
    "rgb.webp": (halves("RGB", RED, BLUE), RED, BLUE),
    "rgb.tif": (halves("RGB", RED, BLUE), RED, BLUE),
    "grey.jpg": (halves("L", 60, 180), (60,) * 3, (180,) * 3),
    "grey.png": (halves("L", 60, 180), (60,) * 3, (180,) * 3),
    "bits.png": (halves("1", 0, 1), (0, 0, 0), WHITE),
    "cmyk.jpg": (halves("CMYK", (0, 0, 0, 0), (0, 0, 0, 255)), WHITE, (0, 0, 0)),
    "cmyk.tif": (halves("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), WHITE, (255, 0, 0)),
    "palette.png": (palette(), RED, BLUE),
    "palette.gif": (palette(), RED, BLUE),
    "palette index.png": (palette(transparency=1), RED, WHITE),
    "palette index.gif": (palette(transparency=1), RED, WHITE),
    "palette alpha.png": (palette(transparency=b"\x80\xff"), OVER_WHITE, BLUE),
    "rgba.png": (halves("RGBA", (*RED, 128), (*BLUE, 0)), OVER_WHITE, WHITE),
    "rgba.webp": (halves("RGBA", (*RED, 128), (*BLUE, 0)), OVER_WHITE, WHITE),
    "rgba.tif": (halves("RGBA", (*RED, 255), (*BLUE, 0)), RED, WHITE),
    "la.png": (halves("LA", (100, 64), (100, 255)), (216,) * 3, (100,) * 3),
    "16 bits.png": (sixteen_bits(np.uint16), (128,) * 3, (128,) * 3),
    "16 bits.tif": (sixteen_bits(np.uint16), (128,) * 3, (128,) * 3),
    "16 bits big-endian.tif": (sixteen_bits(">u2"), (128,) * 3, (128,) * 3),
    "16 bits.pgm": (sixteen_bits(np.uint16), (128,) * 3, (128,) * 3),
    "32 bits.tif": (sixteen_bits(np.int32), (128,) * 3, (128,) * 3),
}


def save_file(folder, name):
    path = folder / name
    FILES[name][0].save(path, **({"lossless": True} if name.endswith("webp") else {}))
    return path


@pytest.mark.parametrize("name", FILES)
def test_pixels_of_every_kind_of_file(tmp_path, name):
    path = save_file(tmp_path, name)
    image = read_image(path)
    assert (image.mode, image.size) == ("RGB", (40, 24))
    _, left, right = FILES[name]
    pixels = np.array(image).astype(int)
    tolerance = 2 if name.endswith("jpg") else 1
    assert abs(pixels[12, 10] - left).max() <= tolerance
    assert abs(pixels[12, 30] - right).max() <= tolerance
    if name.startswith(("16", "32")):
        assert pixels[0, :3, 0].tolist() == [0, 0, 255]
    np.testing.assert_array_equal(np.array(read_image(path, (24, 40))), pixels)


def test_a_mask_for_every_kind_of_file(lively, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for number, name in enumerate(FILES):
        path = save_file(images, name)
        path.rename(images / f"{number}{path.suffix}")
    for orientation in STORED:
        save_turned(images / f"turned{orientation}.jpg", orientation, quality=98, subsampling=0)
    masks, code = run(lively, tmp_path / "out", images, flags=["--exif", "upright"])
    assert code == 0
    assert len(masks) == len(FILES) + len(STORED)
    assert {mask.shape for mask in masks.values()} == {(24, 40)}
    first = masks["turned1"]
    assert len(np.unique(first)) > 1
    for orientation in STORED:  # but for what JPEG makes of the turned blocks
        assert (masks[f"turned{orientation}"] == first).mean() > 0.95
    assert f"images: {len(masks)}, skipped files: 0" in capsys.readouterr().out
    assert "note:" not in capsys.readouterr().err
    # COCO annotates pixels as stored, and so the network was trained.
    masks, _ = run(lively, tmp_path / "stored", images / "turned6.jpg")
    assert "turned6.jpg, but it is used as stored" in capsys.readouterr().err
    assert masks["turned6"].shape == (40, 24)


def test_what_has_no_scale_is_refused(tmp_path):
    for value in (2**16, -1):
        Image.fromarray(np.full((24, 40), value, dtype=np.int32)).save(tmp_path / "deep.tif")
        with pytest.raises(UserError, match=r"deep.tif \(pixels of more than 16 bits\)"):
            read_image(tmp_path / "deep.tif")
    Image.fromarray(np.full((24, 40), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="float.tif .*floating-point"):
        read_image(tmp_path / "float.tif")


# --- what is skipped -----------------------------------------------------------------------------


def noise(path, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_what_is_no_image_is_named_and_skipped(lively, tmp_path):
    images = tmp_path / "images"
    (images / "subfolder").mkdir(parents=True)
    noise(images / "good.jpg")
    noise(images / "subfolder" / "unseen.png")
    noise(images / ".hidden.png")
    (images / "notes.txt").write_text("not an image")
    (images / "goOd.csv").write_text("sorts before goOd.webp, and must not take its name")
    (images / "empty.png").touch()
    (images / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(images / "pipe.jpg")
    for name in ("cut.jpg", "cut2.png"):
        content = noise(images / name).read_bytes()
        (images / name).write_bytes(content[: len(content) // 2])
    noise(images / "good.png")
    noise(images / "goOd.webp")
    Image.new("L", (70_000, 1)).save(images / "long.png")
    out = tmp_path / "out"
    result = command(
        "predict.py", "--ckpt", lively, "--images", images, "--out", out, "--device", "cpu",
        timeout=100,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("skipped: ")]
    for name, reason in {
        "notes.txt": "not an image",
        "goOd.csv": "not an image",
        "empty.png": "not an image",
        "broken.png": "not a file",
        "pipe.jpg": "not a file",
        "cut.jpg": "truncated",
        "cut2.png": "truncated",
        "good.jpg": "same outputs as .*goOd.webp",
        "good.png": "same outputs as .*goOd.webp",
        "long.png": "70000 pixels",
    }.items():
        (line,) = [line for line in lines if f"{images / name} " in line]
        assert re.search(reason, line), line
    assert len(lines) == 10
    assert result.stdout.splitlines()[-1].startswith("images: 1, skipped files: 10; ")
    assert str(out) in result.stdout.splitlines()[-1]
    for folder, suffix in predict.OUTPUTS.items():
        assert [path.name for path in (out / folder).iterdir()] == [f"goOd{suffix}"]
    with Image.open(out / "masks_raw" / "goOd.png") as mask:
        assert mask.size == (90, 90)


def test_names_stand_for_files(tmp_path):
    for name in ("b.jpg", "a.jpg", "a[1].jpg", ".hidden", "sub/c.jpg", "sub/deep/d.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def found(*names):
        files = predict.find_files([str(tmp_path / name) for name in names])
        return [str(path.relative_to(tmp_path)) for path in files]

    assert found(".") == ["a.jpg", "a[1].jpg", "b.jpg"]
    assert found("sub") == ["sub/c.jpg"]
    assert found("b.jpg", ".", "sub/../b.jpg") == ["b.jpg", "a.jpg", "a[1].jpg"]
    assert found("[ab].jpg") == ["a.jpg", "b.jpg"]
    assert found("a[1].jpg") == ["a[1].jpg"]
    assert found("**/*.jpg") == ["a.jpg", "a[1].jpg", "b.jpg", "sub/c.jpg", "sub/deep/d.jpg"]
    assert found("s*") == ["sub/c.jpg"]
    assert found(".hidden") == [".hidden"]


# --- what is refused -----------------------------------------------------------------------------


def test_refusals(lively, coco, tmp_path, refused):
    images, out = tmp_path / "images", tmp_path / "out"
    (images / "empty").mkdir(parents=True)
    noise(images / "a.jpg")

    def sentence(ckpt=lively, name=images, out=out):
        return refused("predict", "--ckpt", ckpt, "--images", images, name, "--out", out)

    for name in ("gone.jpg", "empty", "*.png"):
        assert f"no files at {images / name}: " in sentence(name=images / name)
    arguments = ["--ckpt", lively, "--images", images, "--out", out, "--batch-size", "0"]
    assert "--batch-size 0: give 1 or more" in refused("predict", *arguments)
    assert "no checkpoint at /nowhere.pt" in sentence(ckpt="/nowhere.pt")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(lively.read_bytes()[:1000])
    assert f"cannot read the checkpoint {damaged}" in sentence(ckpt=damaged)
    assert not out.exists()
    assert f"cannot use {images / 'a.jpg'}" in sentence(out=images / "a.jpg")
    out.mkdir()
    (out / "overlays").touch()
    assert f"cannot use {out / 'overlays'} (File exists)" in sentence()


def test_inputs_are_never_overwritten(lively, tmp_path, refused):
    """Refused where it would happen; a folder that is --out itself as well is no such case."""
    noise(tmp_path / "a.jpg")
    for _ in range(2):
        _, code = run(lively, tmp_path, tmp_path)
        assert code == 0
    before = (tmp_path / "overlays" / "a.jpg").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("overlays", "overlays/a.jpg", "link/overlays", "**/a.*"):
        for out in (tmp_path, tmp_path / "link"):
            arguments = ["--ckpt", lively, "--device", "cpu", "--out", out, "--images"]
            sentence = refused("predict", *arguments, tmp_path / name)
            assert "would overwrite an input" in sentence, (name, out)
    assert (tmp_path / "overlays" / "a.jpg").read_bytes() == before


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(lively, tmp_path):
    noise(tmp_path / "a.jpg")
    result = command(
        "predict.py", "--ckpt", lively, "--images", tmp_path, "--out", tmp_path / "out",
        "--device", "cpu",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
    )  # fmt: skip
    assert result.returncode == 2
    overlay = tmp_path / "out" / "overlays" / "a.jpg"
    assert result.stderr.splitlines()[-1].startswith(f"predict.py: error: cannot write {overlay} (")
    assert "Traceback" not in result.stderr
    written = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert [path.parent.name for path in written] == ["masks_raw"]
    for path in written:
        Image.open(path).load()


# --- pictures and memory -------------------------------------------------------------------------


def test_colors_and_overlay(tmp_path):
    """A block of label 2 on a plain image: its colour laid over it, and nothing around it."""
    for folder in predict.OUTPUTS:
        (tmp_path / folder).mkdir()
    colors, plain = class_colors(3), np.array((120, 140, 160))
    labels = np.zeros((96, 112), dtype=np.uint8)
    labels[16:80, 16:96] = 2
    image = Image.new("RGB", (112, 96), tuple(plain.tolist()))
    everything = [True] * 3
    predict.write_outputs(tmp_path, colors, everything, (Path("x.png"), image), [labels])
    assert (np.array(Image.open(tmp_path / "masks_raw" / "x.png")) == labels).all()
    colored = np.array(Image.open(tmp_path / "masks_colored" / "x.png"))
    assert (colored[labels == 2] == colors[2]).all()
    assert (colored[labels == 0] == (0, 0, 0)).all()
    overlay = np.array(Image.open(tmp_path / "overlays" / "x.jpg")).astype(int)
    opacity = OPACITY / 255
    inside = opacity * np.array(colors[2]) + (1 - opacity) * plain
    assert abs(overlay[32:64, 32:80] - inside).max() < 4
    assert abs(overlay[labels == 0] - plain).max() < 4


@pytest.mark.parametrize("rows", [1, 3, 99])
def test_strips_of_an_overlay_are_the_overlay(monkeypatch, rows):
    """Outlines between two strips included."""
    monkeypatch.setattr(predict, "STRIP", 40 * rows)
    labels = np.random.default_rng(0).integers(0, 3, (24, 40), dtype=np.uint8)
    image, colors = Image.fromarray(upright()), class_colors(3)
    whole = predict.overlay(image.copy(), labels, colors)
    predict.draw_over(image, labels, lambda *strip: predict.overlay(*strip, colors))
    np.testing.assert_array_equal(np.array(image), np.array(whole))


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_48_megapixels_and_21_classes_in_4_gb(checkpoint, tmp_path):
    """Its logits at native size, 4 GB of them, are never held all at once."""
    classes = ["background", *(f"class {number}" for number in range(20))]
    random = random_checkpoint(tmp_path / "random.pt", checkpoint, classes, 64)
    gradients = [Image.linear_gradient("L"), Image.radial_gradient("L")]
    gradients.append(gradients[0].transpose(Image.Transpose.ROTATE_90))
    picture = Image.merge("RGB", gradients).resize((8000, 6000), Image.Resampling.BILINEAR)
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "a.jpg", quality=80)
    arguments = ["--ckpt", random, "--images", tmp_path / "images", "--out", tmp_path / "out"]
    line = [sys.executable, SCRIPTS / "predict.py", *arguments, "--device", "cpu"]
    process = subprocess.Popen([str(word) for word in line])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss < 4 * 2**20  # KiB
    with Image.open(tmp_path / "out" / "masks_raw" / "a.png") as mask:
        assert mask.size == (8000, 6000)
        assert len(mask.reduce(16).getcolors()) > 1
