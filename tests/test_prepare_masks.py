"""Masks against an oracle that paints one instance at a time, and what bad annotations get."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    REAL,
    SCRIPTS,
    annotation,
    command,
    given,
    needs_real_images,
    polygon,
    settings,
    st,
    write_coco,
)
from PIL import Image
from pycocotools import mask as rle

import common
import prepare_masks
from coco import OUTSIDE, TOO_SHORT, Unusable, encode
from prepare_masks import encode_layers, paint, png

CLASSES = ["person", "car", "bus", "dog"]


def rows_of(out):
    return {row["mask"]: row for row in json.loads((out / "manifest.json").read_text())["images"]}


def prepare(root, out, *flags):
    prepare_masks.main(["--coco-root", str(root), "--out", str(out), "--workers", "1", *flags])
    return rows_of(out)


def mask_of(out, name):
    return np.array(Image.open(out / "masks_raw" / name))


# --- exact ---------------------------------------------------------------------------------------


def oracle(annotations, height, width, labels, priority, crowd):
    """Paint one instance after the other, lowest priority first, each decoded by itself."""
    mask = np.zeros((height, width), dtype=np.uint8)

    def decode(segmentation):
        if isinstance(segmentation, list):
            parts = [rle.decode(rle.frPyObjects([p], height, width)[0]) for p in segmentation]
            return np.any(parts, axis=0)
        if isinstance(segmentation["counts"], list):
            return rle.decode(rle.frPyObjects(segmentation, height, width)) > 0
        counts = segmentation["counts"].encode()
        return rle.decode({"size": segmentation["size"], "counts": counts}) > 0

    if crowd == "ignore":
        for _, segmentation, iscrowd in annotations:
            if iscrowd:
                mask[decode(segmentation)] = 255
    for name in reversed(priority):
        for other, segmentation, iscrowd in annotations:
            if other == name and (not iscrowd or crowd == "class"):
                mask[decode(segmentation)] = labels[name]
    return mask


def runs(mask):
    """Uncompressed RLE of a boolean (H, W) array, column by column, from a run of zeros."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
    counts = np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts[1:]] if mask.flat[0] else counts}


coordinates = st.floats(-15, 45, allow_nan=False)
polygons = st.lists(
    st.lists(coordinates, min_size=6, max_size=12).filter(lambda p: len(p) % 2 == 0),
    min_size=1,
    max_size=3,
).filter(lambda rings: min(max(ring) for ring in rings) > 1)


@st.composite
def scenes(draw):
    height, width = draw(st.integers(1, 33)), draw(st.integers(1, 33))
    annotations = []
    for _ in range(draw(st.integers(0, 7))):
        name, kind = (
            draw(st.sampled_from(CLASSES)),
            draw(st.sampled_from(["polygon", "rle", "text"])),
        )
        if kind == "polygon":
            segmentation = draw(polygons)
        else:
            seed, density = draw(st.integers(0, 999)), draw(st.sampled_from([0, 0.01, 0.5, 1]))
            pixels = np.random.default_rng(seed).random((height, width)) < density
            segmentation = runs(pixels)
            if kind == "text":
                counts = rle.encode(np.asfortranarray(pixels.astype(np.uint8)))["counts"].decode()
                segmentation = {"size": [height, width], "counts": counts}
        annotations.append((name, segmentation, draw(st.sampled_from([0, 0, 1]))))
    return height, width, annotations


@given(scenes(), st.permutations(CLASSES), st.sampled_from(["ignore", "class", "background"]))
@settings(max_examples=300, deadline=None)
def test_equals_the_oracle_on_generated_scenes(scene, priority, crowd):
    height, width, annotations = scene
    labels = {name: label for label, name in enumerate(CLASSES, start=1)}
    rows = [(labels[name], {"segmentation": s, "iscrowd": c}) for name, s, c in annotations]
    order, skipped = [labels[name] for name in reversed(priority)], []
    layers, _ = encode_layers(rows, height, width, crowd, skipped)
    mask = paint(layers, order, height, width)
    blank = {OUTSIDE, "segmentation covers no pixel"}
    assert {reason for _, reason in skipped} <= blank
    expected = oracle(annotations, height, width, labels, priority, crowd)
    np.testing.assert_array_equal(mask, expected)


@needs_real_images
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_equals_the_oracle_on_real_images(split, tmp_path):
    rows = prepare(REAL, tmp_path, "--split", split)
    content = json.loads((REAL / "annotations" / f"instances_{split}.json").read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    labels = {name: label for label, name in enumerate(CLASSES, start=1)}
    assert len(rows) == len(content["images"])
    for image in content["images"]:
        mine = [
            (names[a["category_id"]], a["segmentation"], a["iscrowd"])
            for a in content["annotations"]
            if a["image_id"] == image["id"] and names[a["category_id"]] in CLASSES
        ]
        name = image["file_name"].replace(".jpg", ".png")
        size = image["height"], image["width"]
        expected = oracle(mine, *size, labels, ["dog", "person", "car", "bus"], "ignore")
        mask = mask_of(tmp_path, name)
        np.testing.assert_array_equal(mask, expected, err_msg=name)
        counts = {str(label): (mask == label).sum() for label in range(5) if label in mask}
        assert rows[name]["pixels"] == counts
        assert rows[name]["ignored"] == (mask == 255).sum()


def test_workers_change_no_byte(coco, tmp_path):
    trees = []
    for workers in ("1", "3"):
        out = tmp_path / workers
        flags = ["--split", "train2017", "val2017", "--out", str(out), "--workers", workers]
        prepare_masks.main(["--coco-root", str(coco), *flags])
        files = sorted(path for path in out.rglob("*") if path.is_file())
        trees.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert trees[0] == trees[1]
    assert len(trees[0]) == 2 * 33 + 2  # the masks, the manifest and the lock


def test_priority_and_crowds(tmp_path, capsys):
    crowd = np.zeros((30, 40), dtype=bool)
    crowd[:, 25:] = True
    write_coco(tmp_path, [("a.jpg", 30, 40, [
        annotation("dog", polygon(0, 0, 10, 10)),
        annotation("person", runs(crowd), iscrowd=1),
        annotation("bus", polygon(0, 0, 30, 20)),
        annotation("chair", polygon(0, 0, 40, 30)),
    ])])  # fmt: skip
    out = tmp_path / "data"
    prepare(tmp_path, out)
    mask = mask_of(out, "a.png")
    assert mask[5, 5] == 4  # the dog, though the bus comes later in the file
    assert mask[15, 5] == 3
    assert mask[10, 27] == 3  # an instance covers the crowd
    assert mask[25, 27] == 255
    table = {line.split()[0]: line.split()[1:4] for line in capsys.readouterr().out.splitlines()}
    assert [table[name] for name in CLASSES] == [
        ["1", "0", "1"], ["0", "0", "0"], ["1", "1", "0"], ["1", "1", "0"]
    ]  # fmt: skip
    prepare(tmp_path, out, "--priority", "bus", "--crowd", "class")
    mask = mask_of(out, "a.png")
    assert mask[5, 5] == 3
    assert mask[25, 27] == 1
    assert mask[10, 27] == 3
    prepare(tmp_path, out, "--crowd", "background", "--classes", "chair", "person")
    np.testing.assert_array_equal(np.unique(mask_of(out, "a.png")), [1])


def test_colored_masks_show_the_manifests_colors(data):
    manifest = json.loads((data / "manifest.json").read_text())
    palette = dict(enumerate(manifest["colors"])) | {255: manifest["ignore_color"]}
    for row in manifest["images"]:
        mask = mask_of(data, row["mask"])
        image = Image.open(data / "masks_colored" / row["mask"])
        assert image.mode == "RGB"
        for label in np.unique(mask):
            assert (np.array(image)[mask == label] == palette[label]).all()


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_png_is_read_back(height, width, rgb, seed):
    shape = (height, width, 3) if rgb else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    with Image.open(io.BytesIO(png(pixels))) as image:
        assert image.mode == ("RGB" if rgb else "L")
        image.verify()
    with Image.open(io.BytesIO(png(pixels))) as image:
        np.testing.assert_array_equal(np.array(image), pixels)


def test_layout_with_an_images_folder_and_nested_file_names(tmp_path):
    images = [("a.jpg", 20, 30, [annotation("person", polygon(1, 1, 9, 9))])]
    write_coco(tmp_path, images, "val2017", folder="images/val2017")
    rows = prepare(tmp_path, tmp_path / "data")
    assert rows["a.png"]["file"] == "images/val2017/a.jpg"
    assert rows["a.png"]["pixels"]["1"] == 81


@pytest.mark.parametrize("size", [(20, 30), (30, 20), (25, 25)])
def test_exif_is_looked_at_only_where_the_size_differs(tmp_path, monkeypatch, size):
    someone = [annotation("person", polygon(1, 1, 9, 9))]
    path = write_coco(tmp_path, [("a.jpg", 30, 20, someone), ("b.jpg", *size, someone)])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "val2017" / "a.jpg", exif=exif)
    asked, getexif = [], Image.Image.getexif

    def noted(image):
        asked.append(Path(image.filename).name)
        return getexif(image)

    monkeypatch.setattr(Image.Image, "getexif", noted)
    assert sorted(prepare(tmp_path, tmp_path / "data")) == ["a.png", "b.png"]
    assert set(asked) == {"a.jpg"}
    wrong = path.read_text().replace('"height": 30, "width": 20', '"height": 30, "width": 21', 1)
    path.write_text(wrong)
    assert "a.png" not in prepare(tmp_path, tmp_path / "data2")


# --- hard to break -------------------------------------------------------------------------------

HALF = {"size": [4, 4], "counts": [8, 8]}


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([], "no segmentation"),
        ([[]], "fewer than 6"),
        ([[1, 1, 2, 2]], "fewer than 6"),
        ([[1, 1, 2, 2, 3, 3, 4]], "odd"),
        ([[1, 1, 2, 2, 3, float("nan")]], "not finite"),
        ([[1, 1, 2, 2, 3, float("inf")]], "not finite"),
        ([[1, 1, 2, 2, 3, 1e8]], "out of bounds"),
        ([[1, 1, 2, 2, 3, 10**400]], "other than numbers"),
        ([[0, 0, 1e6, 0, 0, 0, 1e6, 0]], "outline"),
        ([[1, 1, 2, 2, 3, None]], "not finite"),
        ([[0, 0, 0.5, 0, 0.5, 1, 0, 1]], "normalised"),
        ([[1, 1, 2, 2, 3, "four"]], "other than numbers"),
        ([[1, 1, 2, 2, 3, [4]]], "other than numbers"),
        (None, "no segmentation"),
        ("0101", "fewer than 6"),
        ({**HALF, "size": [4, 5]}, "size"),
        ({"counts": [8, 8]}, "size"),
        ({**HALF, "counts": [8, 7]}, "sum"),
        ({**HALF, "counts": [8, 9]}, "sum"),
        ({**HALF, "counts": []}, "sum"),
        ({**HALF, "counts": [20, -4]}, "whole numbers"),
        ({**HALF, "counts": [8.5, 7.5]}, "whole numbers"),
        ({**HALF, "counts": None}, "neither a list nor a string"),
        ({**HALF, "counts": "88é"}, "damaged"),
        ({**HALF, "counts": "8X"}, "damaged"),  # the last character says that more follow
        ({**HALF, "counts": "8"}, "sum"),
        ({**HALF, "counts": "XXXXXXXXXXXXXXX8"}, "damaged"),
        ({**HALF, "counts": ""}, "sum"),
    ],
)
def test_malformed_segmentations_are_named(segmentation, reason):
    with pytest.raises(Unusable, match=reason):
        encode(segmentation, 4, 4)


def test_legal_oddities_pass():
    zero_runs = {"size": [4, 4], "counts": [0, 3, 0, 5, 8]}
    assert rle.area(encode(zero_runs, 4, 4)[0]) == 8
    assert rle.area(encode({"size": [4, 4], "counts": "88"}, 4, 4)[0]) == 8
    assert rle.area(encode([[-100, -100, 500, -100, 500, 500, -100, 500]], 4, 4)[0]) == 16


def test_what_cannot_be_used_is_skipped_counted_and_listed(tmp_path, capsys):
    good = annotation("person", polygon(0, 0, 5, 5))
    bad = [annotation("person", [[1, 2]]), annotation("car", []), annotation("chair", None)]
    bad = [{**item, "bbox": [10, 10, 2, 2]} for item in bad]
    path = write_coco(tmp_path, [("a.jpg", 20, 30, [good, *bad]), ("b.jpg", 20, 30, [good])])
    content = json.loads(path.read_text())
    content["annotations"] += [
        {**content["annotations"][0], "id": 2000, "image_id": 77},
        {**content["annotations"][0], "id": 2001, "category_id": 99},
        "not an annotation",
    ]
    content["images"] += [
        {**content["images"][0]},
        {**content["images"][0], "id": 50},
        {**content["images"][0], "id": 51, "file_name": "../e.jpg"},
        {**content["images"][0], "id": 52, "file_name": str(tmp_path / "val2017" / "e.jpg")},
        {**content["images"][0], "id": 54, "width": 10**9, "file_name": "d.jpg"},
        {"id": 55},
        {"id": [5]},
        "not an image",
    ]
    for name in ("c.jpg", "d.jpg", "e.jpg"):
        (tmp_path / "val2017" / name).write_bytes((tmp_path / "val2017" / "a.jpg").read_bytes())
    content["images"].append({**content["images"][0], "id": 56, "file_name": "c.jpg", "width": 31})
    path.write_text(json.dumps(content))
    out = tmp_path / "data"
    rows = prepare(tmp_path, out)
    assert sorted(rows) == ["a.png", "b.png"]
    assert rows["a.png"]["pixels"] == {"0": 571, "1": 25}
    assert rows["a.png"]["ignored"] == 4
    skipped = json.loads((out / "manifest.json").read_text())["skipped"]
    counts = [{reason: entry["count"] for reason, entry in skipped[kind].items()}
              for kind in ("images", "annotations")]  # fmt: skip
    assert counts[0] == {
        "another row holds the image: merged": 2,
        "two rows lead to the same file, by different paths or sizes": 2,
        "image without a file name": 1,
        "image without an id": 2,
        "image file has another size than its annotations or its mask": 2,
    }
    assert counts[1] == {
        "annotation of an unknown image": 2,
        "category is not in categories": 1,
        TOO_SHORT: 1,
        "annotation has no segmentation": 1,
    }
    first = skipped["annotations"]["annotation of an unknown image"]["examples"][0]
    assert first == {"split": "val2017", "image": 77, "annotation": "#5"}
    err = capsys.readouterr().err
    assert "skipped 2 x two rows lead to the same file" in err
    assert not list(tmp_path.rglob("../*.png"))


def test_strict_stops_at_the_first(tmp_path, refused):
    write_coco(tmp_path, [("a.jpg", 20, 30, [annotation("car", [[1, 2]])])])
    flags = ["--coco-root", tmp_path, "--out", tmp_path / "data", "--workers", 1]
    assert "image val2017/a.jpg, annotation 1000: polygon" in refused(
        "prepare_masks", *flags, "--strict"
    )
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_refusals(coco, tmp_path, refused):
    out = tmp_path / "data"

    def sentence(root, *flags):
        return refused("prepare_masks", "--coco-root", root, "--out", out, "--workers", 1, *flags)

    assert str(tmp_path / "nowhere") in sentence(tmp_path / "nowhere")
    assert "train2017, val2017" in sentence(coco, "--split", "val2018")
    assert "did you mean 'person'?" in sentence(coco, "--classes", "preson")
    assert "names 'car' twice" in sentence(coco, "--classes", "car", "bus", "car")
    assert "always label 0" in sentence(coco, "--classes", "background")
    assert "'dogs'" in sentence(coco, "--priority", "dogs")
    assert not out.exists()

    root = tmp_path / "broken"
    path = write_coco(root, [("a.jpg", 20, 30, [])])
    whole = path.read_text()
    for text in ("", whole[: len(whole) // 2], "[]", '{"images": [], "annotations": []}', "\x00"):
        path.write_text(text)
        assert str(path) in sentence(root)
    path.write_text(whole)
    (root / "val2017" / "a.jpg").unlink()
    assert "1 of the 1 images of val2017 are missing" in sentence(root)
    assert not out.exists()


def run_mutants(root, split, work, count):
    work.mkdir()
    line = [sys.executable, str(SCRIPTS / "tests" / "mutate.py"), root, split, work, 0, count]
    result = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=280)
    ended = result.stdout.splitlines()[-1] if result.stdout else ""
    assert result.returncode == 0, f"{ended}\n{result.stderr[-2000:]}"
    prepared = sum(line.endswith("prepared") for line in result.stdout.splitlines())
    refused = sum("refused:" in line for line in result.stdout.splitlines())
    assert prepared + refused == count
    assert prepared > count / 4  # most damage costs an annotation, not the file


def test_no_mutated_annotation_file_breaks_it(tmp_path):
    crowd = runs(np.random.default_rng(0).random((30, 40)) < 0.1)
    text = rle.encode(np.ones((30, 40), dtype=np.uint8, order="F"))["counts"].decode()
    write_coco(tmp_path / "root", [(f"{i}.jpg", 30, 40, [
        annotation("person", crowd, iscrowd=1),
        annotation("dog", {"size": [30, 40], "counts": text}),
        annotation("bus", polygon(0, 0, 30, 20)),
        annotation("chair", polygon(0, 0, 40, 30)),
    ]) for i in range(4)])  # fmt: skip
    run_mutants(tmp_path / "root", "val2017", tmp_path / "work", 400)


@needs_real_images
def test_no_mutant_of_real_annotations_breaks_it(tmp_path):
    run_mutants(REAL, "val2017", tmp_path / "work", 300)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_worker_that_dies_is_one_sentence_that_says_how_to_find_the_image(
    tmp_path, monkeypatch, refused
):
    images = [(f"{i:03}.jpg", 9, 9, [annotation("person", polygon(1, 1, 4, 4))]) for i in range(99)]
    write_coco(tmp_path, images)
    original = prepare_masks.check_image

    def deadly(path, *arguments):
        if path.name == "050.jpg":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *arguments)

    monkeypatch.setattr(prepare_masks, "check_image", deadly)  # forked workers inherit it
    out = tmp_path / "data"
    sentence = refused("prepare_masks", "--coco-root", tmp_path, "--out", out, "--workers", 2)
    assert "a worker died" in sentence
    assert f"with 1, the image after the newest in {out / '.preparing'} did it" in sentence
    assert not (out / "manifest.json").exists()


def test_needs_no_torch():
    code = "import prepare_masks, images, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS).returncode == 0


# --- faults injected into real processes ---------------------------------------------------------


def many_images(root, count):
    write_coco(root, [(f"{i:04}.jpg", 12, 16, [annotation("person", polygon(1, 1, i % 9 + 1, 4))])
                      for i in range(count)])  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("limit", "file"), [(60, ".png"), (4000, "manifest.json")])
def test_a_full_disk_is_one_sentence_and_no_manifest(tmp_path, workers, limit, file):
    import resource

    many_images(tmp_path, 40)
    result = command(
        "prepare_masks.py", "--coco-root", tmp_path, "--out", tmp_path / "data",
        "--workers", workers,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("prepare_masks.py: error: cannot write")
    assert file in sentence
    assert not (tmp_path / "data").exists()


def test_an_output_that_cannot_be_a_folder(tmp_path, refused):
    many_images(tmp_path, 2)
    (tmp_path / "file").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "masks_raw").touch()
    flags = ["--coco-root", tmp_path, "--out"]
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"cannot use {tmp_path / 'file'}" in refused("prepare_masks", *flags, out)
    assert "prepare_masks.py did not write" in refused("prepare_masks", *flags, tmp_path / "data")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_manifest_and_no_process(tmp_path, number):
    many_images(tmp_path, 2000)
    line = [sys.executable, SCRIPTS / "prepare_masks.py", "--coco-root", tmp_path, "--workers", "2"]
    rng, interrupted = np.random.default_rng(number), 0
    for attempt in range(8):
        out = tmp_path / f"data{attempt}"
        process = subprocess.Popen(
            [*map(str, line), "--out", out], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            start_new_session=True, text=True,
        )  # fmt: skip
        while process.poll() is None and not out.exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.kill()
        error = process.communicate(timeout=60)[1]
        if (out / "manifest.json").exists():  # it was faster
            assert len(rows_of(out)) == len(list((out / "masks_colored").iterdir())) == 2000
            continue
        interrupted += 1
        assert process.returncode == (130 if number == signal.SIGINT else -9), error
        assert "Traceback" not in error
        deadline = time.monotonic() + 20
        while (left := session_members(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left
    assert interrupted >= 4
    assert len(prepare(tmp_path, out)) == 2000  # over what the last one left


def session_members(session):
    """Processes of a session that still run."""
    members = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state != "Z":
                members.append(path.parent.name)
    return members


def test_a_decompression_bomb_is_not_opened(tmp_path):
    someone = [annotation("person", polygon(1, 1, 9, 9))]
    path = write_coco(tmp_path, [("a.jpg", 20, 30, []), ("b.jpg", 20, 30, someone)])
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "val2017" / "a.jpg").write_bytes(png)
    assert list(prepare(tmp_path, tmp_path / "data")) == ["b.png"]
    content = json.loads(path.read_text())
    content["images"][0].update(height=60000, width=60000)
    path.write_text(json.dumps(content))
    assert list(prepare(tmp_path, tmp_path / "data")) == ["b.png"]


@pytest.mark.parametrize("category", [None, 99, "absent", "no such field"])
def test_an_object_of_no_known_category_is_no_background(tmp_path, category):
    """It could be anything: a file may count categories from 1 and annotations from 0."""
    path = write_coco(
        tmp_path, [("a.jpg", 20, 30, [annotation("person", polygon(0, 0, 5, 5))] * 2)]
    )
    content = json.loads(path.read_text())
    other = content["annotations"][1]
    other |= {"category_id": category, "segmentation": polygon(3, 0, 4, 4)}
    if category == "no such field":
        del other["category_id"]
    path.write_text(json.dumps(content))
    (row,) = prepare(tmp_path, tmp_path / "data").values()
    assert row["pixels"] == {"0": 600 - 25 - 8, "1": 25}  # the person stays where both are
    assert row["ignored"] == 8
    skipped = json.loads((tmp_path / "data" / "manifest.json").read_text())["skipped"]
    assert skipped["annotations"]["category is not in categories"]["count"] == 1


@pytest.mark.parametrize("failing", ["manifest.json", "masks_raw", "masks_colored"])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("times", [1, 5])
def test_a_rename_that_fails_leaves_the_earlier_masks(
    tmp_path, monkeypatch, coco, failing, old, times
):
    """As on Windows, where a folder that holds an open file cannot be renamed."""
    out, flags = tmp_path / "data", ["--coco-root", str(coco), "--workers", "1", "--out"]
    prepare_masks.main([*flags, str(out)])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    move, failed = os.replace, []

    def held(source, target):
        ours = Path(source).name == failing and Path(source).parent.name in ("data", ".preparing")
        if ours and (Path(source).parent == out) == old and len(failed) < times:
            failed.append(source)
            raise PermissionError(13, "held", str(source))
        move(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(common.time, "sleep", lambda _: None)
    again = [*flags, str(out), "--priority", "car"]
    if times == 1:  # as of a virus scanner
        prepare_masks.main(again)
        assert not (out / ".preparing").exists()
        assert failed
        return
    with pytest.raises(PermissionError):
        prepare_masks.main(again)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert not (out / ".preparing").exists()
    prepare_masks.main([*flags, str(out), "--priority", "car"])


def test_a_manifest_means_complete_masks_at_any_time(tmp_path, monkeypatch, coco):
    """The old one leaves before its masks, and the new one comes after its own."""
    out, moves, rename = tmp_path / "data", [], common.rename
    for _ in range(2):
        monkeypatch.setattr(common, "rename", lambda *move: moves.append(move) or rename(*move))
        prepare_masks.main(["--coco-root", str(coco), "--workers", "1", "--out", str(out)])
        monkeypatch.undo()
    assert next(old.name for old, _ in moves if old.parent == out) == "manifest.json"
    new = [new.name for _, new in moves if new.parent == out]
    assert new[2] == new[-1] == "manifest.json"
    assert len(new) == 6


def test_crowds_that_may_be_how_a_tool_writes_masks_are_noted(tmp_path, capsys):
    crowd = annotation("person", polygon(0, 10, 15, 10), iscrowd=1)
    persons = [annotation("person", polygon(0, 0, 5, 5))] * 9
    write_coco(tmp_path, [("a.jpg", 20, 30, [crowd, *persons])])
    prepare(tmp_path, tmp_path / "data")
    note = "note: 1 of 10 person are crowds (iscrowd 1), ignored: --crowd class if"
    assert note in capsys.readouterr().out
    persons += [annotation("person", polygon(15, 0, 15, 10))]
    write_coco(tmp_path, [("a.jpg", 20, 30, [crowd, *persons])])
    for flags in ([], ["--crowd", "class"]):
        prepare(tmp_path, tmp_path / "data", *flags)
        assert "note:" not in capsys.readouterr().out
    # Roboflow's supervision and Darwin write what has several parts so: few, but most of the area.
    crowd = annotation("person", polygon(0, 10, 15, 10) + polygon(15, 10, 15, 10), iscrowd=1)
    write_coco(tmp_path, [("a.jpg", 20, 30, [crowd, *persons])])
    prepare(tmp_path, tmp_path / "data")
    assert "note: 1 of 11 person are crowds" in capsys.readouterr().out


def test_an_image_that_no_training_could_read_is_left_out(tmp_path):
    write_coco(tmp_path, [(f"{name}.jpg", 20, 30, []) for name in "abc"] + [
        ("d.jpg", 20, 30, [annotation("person", polygon(0, 0, 5, 5))])
    ])  # fmt: skip
    folder = tmp_path / "val2017"
    Image.fromarray(np.ones((20, 30), dtype=np.float32)).save(folder / "a.jpg", "TIFF")
    Image.fromarray(np.full((20, 30), 2**20, dtype=np.int32)).save(folder / "b.jpg", "TIFF")
    assert sorted(prepare(tmp_path, tmp_path / "data")) == ["b.png", "c.png", "d.png"]
    assert sorted(prepare(tmp_path, tmp_path / "data", "--check")) == ["c.png", "d.png"]
