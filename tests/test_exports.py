"""Datasets as their tools export them, masks instead of annotations, and what is lost of neither.

The layouts are written by hand from each format's documentation, which is named with it.
"""

import io
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    SCRIPTS,
    TINY,
    annotation,
    command,
    given,
    polygon,
    settings,
    st,
    write_coco,
)
from PIL import Image

import coco
import prepare_masks
import train
from coco import JsonText, Source, Unusable, encode, mask_names, read_index, walk
from common import UserError, load_manifest
from images import _scaled, read_image, read_labels

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}]
SQUARE = polygon(2, 2, 4, 4)  # 16 pixels


def write_image(path, size=(12, 10), seed=0, **options):
    """A picture of width and height; another seed is another picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)


def image_row(id_, name, **fields):
    return {"id": id_, "file_name": name, "height": 10, "width": 12, **fields}


def person(image_id, segmentation=SQUARE, **fields):
    return {"image_id": image_id, "category_id": 1, "segmentation": segmentation, **fields}


def write_json(path, images, annotations, categories=CATEGORIES, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories, **more}
    path.write_text(json.dumps(content))
    return path


def prepare(tmp_path, *flags):
    """Prepare masks in this process. Returns the manifest, and its rows by mask name."""
    out = tmp_path / "data"
    common_flags = ["--out", out, "--workers", 1]
    if "--classes" not in flags:
        common_flags += ["--classes", "person"]
    prepare_masks.main([str(flag) for flag in [*flags, *common_flags]])
    manifest = json.loads((out / "manifest.json").read_text())
    return manifest, {row["mask"]: row for row in manifest["images"]}


def one_file(tmp_path, images, annotations, *flags, **more):
    """Prepare masks of one annotation file, with pictures in a folder `images`."""
    path = write_json(tmp_path / "a.json", images, annotations, **more)
    for number, row in enumerate(images):
        if not (tmp_path / "images" / str(row["file_name"])).exists():
            write_image(tmp_path / "images" / row["file_name"], seed=number)
    return prepare(tmp_path, "--annotations", path, "--images-dir", tmp_path / "images", *flags)


def mask_of(tmp_path, name):
    return np.array(Image.open(tmp_path / "data" / "masks_raw" / name))


def reasons(manifest, kind):
    return {reason: entry["count"] for reason, entry in manifest["skipped"][kind].items()}


@pytest.fixture
def refuse(tmp_path, refused):
    """Prepare masks, which must be refused with a sentence."""

    def run(*flags):
        flags = flags if "--classes" in flags else (*flags, "--classes", "person")
        return refused("prepare_masks", *flags, "--out", tmp_path / "data", "--workers", 1)

    return run


# --- a fixture per tool --------------------------------------------------------------------------


def test_cvat(tmp_path):
    """docs.cvat.ai, "COCO": images/<subset or video>/..., annotations/instances_<subset>.json;
    masks come as uncompressed RLE with iscrowd 1."""
    rle = {"size": [10, 12], "counts": [20, 10, 90]}
    for split, seed in (("Train", 0), ("Validation", 9)):
        rows = [image_row(1, "cam0/000001.jpg"), image_row(2, "cam1/000001.jpg")]
        anns = [person(1, attributes={"occluded": False}), person(2, rle, iscrowd=1)]
        write_json(tmp_path / "annotations" / f"instances_{split}.json", rows, anns)
        for number, row in enumerate(rows):
            write_image(tmp_path / "images" / split / row["file_name"], seed=seed + number)
    manifest, rows = prepare(tmp_path, "--coco-root", tmp_path, "--crowd", "class")
    assert manifest["splits"] == ["Train", "Validation"]
    assert sorted(rows) == [
        f"{split}/cam{n}/000001.png" for split in ("Train", "Validation") for n in (0, 1)
    ]
    assert [row["pixels"]["1"] for row in manifest["images"]] == [16, 10, 16, 10]
    assert rows["Train/cam0/000001.png"]["file"] == "images/Train/cam0/000001.jpg"
    assert manifest["skipped"] == {"images": {}, "annotations": {}}


def test_roboflow(tmp_path):
    """rfdetr.roboflow.com, "Dataset Formats": train, valid, test, each with its images and
    _annotations.coco.json; category 0 is the dataset's own name; ids start anew in each."""
    categories = [{"id": 0, "name": "things", "supercategory": "none"}, *CATEGORIES]
    for number, split in enumerate(("train", "valid", "test")):
        rows = [image_row(0, "a_jpg.rf.0f3e.jpg"), image_row(1, f"b{number}_jpg.rf.77aa.jpg")]
        path = tmp_path / split / "_annotations.coco.json"
        write_json(path, rows, [person(0, id=0), person(1, id=1)], categories)
        for row in rows:
            write_image(path.with_name(row["file_name"]), seed=10 * number + row["id"])
    _, rows = prepare(tmp_path, "--coco-root", tmp_path)
    assert len(rows) == 6
    assert "valid/a_jpg.rf.0f3e.png" in rows
    assert rows["test/b2_jpg.rf.77aa.png"]["file"] == "test/b2_jpg.rf.77aa.jpg"
    _, rows = prepare(tmp_path, "--coco-root", tmp_path, "--split", "valid")
    assert sorted(rows) == ["a_jpg.rf.0f3e.png", "b1_jpg.rf.77aa.png"]
    assert not (tmp_path / "data" / "masks_raw" / "train").exists()  # of the run before


@pytest.mark.parametrize("name", ["images/a.jpg", "images\\a.jpg"])
def test_label_studio(tmp_path, name):
    """github.com/HumanSignal/label-studio-converter: result.json and images/, which the names
    already hold, on Windows with backslashes; sizes may be missing; category ids start at 0."""
    row = {"id": 0, "file_name": name, "width": None, "height": None}
    ann = {"id": 0, "image_id": 0, "category_id": 0, "segmentation": SQUARE, "bbox": [2, 2, 4, 4]}
    write_json(tmp_path / "result.json", [row], [ann], [{"id": 0, "name": "person"}])
    write_image(tmp_path / "images" / "a.jpg")
    _, rows = prepare(tmp_path, "--coco-root", tmp_path)
    assert rows["a.png"]["file"] == "images/a.jpg"
    assert (rows["a.png"]["height"], rows["a.png"]["width"]) == (10, 12)
    assert rows["a.png"]["pixels"] == {"0": 104, "1": 16}


def test_via(tmp_path):
    """gitlab.com/vgg/via, export to COCO: heights and widths of -1, one flat list as segmentation,
    ids as strings, categories with names that are numbers."""
    rows = [image_row(str(n), f"{n}.jpg", height=-1, width=-1) for n in range(2)]
    anns = [
        {"id": str(n), "image_id": str(n), "category_id": "7", "segmentation": SQUARE[0]}
        for n in range(2)
    ]
    flags = ("--classes", "2024")
    manifest, by_name = one_file(tmp_path, rows, anns, *flags, categories=[{"id": 7, "name": 2024}])
    assert [row["pixels"]["1"] for row in by_name.values()] == [16, 16]
    assert [row["id"] for row in manifest["images"]] == [0, 1]


def test_lvis(tmp_path):
    """lvisdataset.org: no file_name, but a coco_url of which the last two parts are the file."""
    url = "http://images.cocodataset.org/val2017/000000000139.jpg"
    row = {"id": 139, "coco_url": url, "height": 10, "width": 12}
    path = write_json(tmp_path / "lvis.json", [row], [person(139)])
    write_image(tmp_path / "coco" / "val2017" / "000000000139.jpg")
    flags = ("--annotations", path, "--images-dir")
    assert list(prepare(tmp_path, *flags, tmp_path / "coco")[1]) == ["val2017/000000000139.png"]
    folder = tmp_path / "coco" / "val2017"
    assert list(prepare(tmp_path, *flags, folder)[1]) == ["000000000139.png"]


def test_dvc_and_git_annex(tmp_path):
    """dvc.org, "Large Dataset Optimization": images are links into a cache; a link may lead nowhere
    where the content was not fetched."""
    (tmp_path / "images").mkdir()
    for number in range(4):
        cached = tmp_path / "cache" / f"{number}.jpg"
        write_image(cached, seed=number)
        (tmp_path / "images" / f"{number}.jpg").symlink_to(cached)
    cached.unlink()
    flags = ("--annotations", tmp_path / "a.json", "--images-dir", tmp_path / "images")
    rows = [image_row(n, f"{n}.jpg") for n in range(4)]
    write_json(tmp_path / "a.json", rows, [person(n) for n in range(4)])
    manifest, rows = prepare(tmp_path, *flags)
    assert len(rows) == 3
    assert reasons(manifest, "images") == {"image file is missing": 1}
    for number in range(2):
        (tmp_path / "cache" / f"{number}.jpg").unlink()
    with pytest.raises(UserError, match="3 of the 4 images of a are missing"):
        prepare(tmp_path, *flags)


def test_cocos_own_names_stay(tmp_path):
    images = [("000000000139.jpg", 10, 12, [annotation("person", SQUARE)])]
    write_coco(tmp_path, images)
    assert list(prepare(tmp_path, "--coco-root", tmp_path)[1]) == ["000000000139.png"]


# --- names and ids -------------------------------------------------------------------------------


def test_no_image_is_lost_for_its_name(tmp_path):
    names = ["a.jpg", "a.png", "a.png.jpg", "A.jpg", "b/a.jpg", f"{'x' * 250}.jpg"]
    _, rows = one_file(
        tmp_path,
        [image_row(n, name) for n, name in enumerate(names)],
        [person(n) for n in range(len(names))],
    )
    assert {row["file"] for row in rows.values()} == set(names)
    masks = {row["file"]: mask for mask, row in rows.items()}
    assert masks["a.jpg"] == "a.png"
    assert masks["a.png"] == "a.png.png"
    assert masks["b/a.jpg"] == "b/a.png"
    for mask in rows:
        assert mask_of(tmp_path, mask).sum() == 16


components = st.text("aAé\u0301. ", min_size=1, max_size=3).filter(lambda part: part.strip(". "))
components |= st.just("a.png")  # a folder may be called so
paths = st.lists(components, min_size=1, max_size=3).map("/".join)


@given(st.lists(st.tuples(paths, st.sampled_from([".jpg", ".png", ".JPG", ""])), max_size=12))
def test_mask_names_collide_on_no_file_system(items):
    files = list(dict.fromkeys(path + suffix for path, suffix in items))
    names = [coco.fold(name) for name in mask_names(files)]
    assert len(set(names)) == len(files)
    folders = {
        coco.fold(str(parent)) for name in mask_names(files) for parent in Path(name).parents
    }
    assert not folders & set(names)  # a file cannot be a folder too


def test_a_folder_that_is_called_like_a_mask():
    names = ["a.jpg", "a.png/b.jpg", "a.jpg.png/c.jpg"]
    assert mask_names(names[:2]) == ["a.jpg.png", "a.png/b.png"]
    assert [len(name) for name in mask_names(names)] == [36, 11, 15]  # a hash, where all is taken


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_every_image_row_is_in_the_manifest_or_in_the_skip_counts_once(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("rows")
    total = 0
    names = st.sampled_from(["a.jpg", "b.jpg", "sub/a.jpg", "A.JPG", "c.png", "../a.jpg", "", None])
    for split in ("one", "two"):
        rows, owners = [], {}
        for name in data.draw(st.lists(names, min_size=1, max_size=8)):
            id_ = data.draw(st.sampled_from([1, "1", 2.0, "x", None, 7]))
            key = coco.identifier(id_)
            if owners.setdefault(key, name) == name or key is None:
                rows.append({"id": id_, "file_name": name, "height": 10, "width": "12"})
        good = [row for row in rows if row["file_name"] and ".." not in row["file_name"]]
        for number, row in enumerate(good):
            if data.draw(st.integers(0, 3)) or number * 2 < len(good):
                write_image(root / split / row["file_name"], seed=data.draw(st.integers(0, 1)))
        rows.append(image_row(99, "anchor.jpg"))
        write_image(root / split / "anchor.jpg", seed=hash(split) % 1000)
        write_json(root / "annotations" / f"instances_{split}.json", rows, [person(99)])
        total += len(rows)
    error = ""
    try:
        manifest, by_mask = prepare(root, "--coco-root", root)
    except UserError as refusal:
        error = str(refusal)
    if error:
        assert "are missing" in error or "share the id" in error
        return
    assert len(manifest["images"]) + sum(reasons(manifest, "images").values()) == total
    assert len(by_mask) == len(manifest["images"])
    assert len(list((root / "data" / "masks_raw").rglob("*.png"))) == len(by_mask)


@pytest.mark.parametrize("numbers", ["inodes", "none"])
def test_the_same_image_in_two_splits_is_named_and_kept_once(tmp_path, monkeypatch, numbers):
    for split in ("train", "val"):
        rows = [image_row(1, "a.jpg"), image_row(2, "b.bmp"), image_row(3, f"{split}.jpg")]
        anns = [person(n) for n in (1, 2, 3)]
        write_json(tmp_path / "annotations" / f"instances_{split}.json", rows, anns)
        write_image(tmp_path / split / "a.jpg", seed=1)  # the same in both
        write_image(
            tmp_path / split / "b.bmp", seed=2 + (split == "val")
        )  # the same but for pixels
        write_image(tmp_path / split / f"{split}.jpg", seed=4)
    (tmp_path / "val" / "val.jpg").unlink()
    (tmp_path / "val" / "val.jpg").symlink_to(tmp_path / "train" / "train.jpg")
    if numbers == "none":  # as of some network drives

        def stat(path, **options):
            found = os.stat(path, **options)
            return os.stat_result((found.st_mode, 0, *found[2:]))

        monkeypatch.setattr(Path, "stat", stat)
    manifest, rows = prepare(tmp_path, "--coco-root", tmp_path)
    linked = ["val/val.png"] * (numbers == "none")  # nothing else shows that it is train.jpg
    assert sorted(rows) == ["train/a.png", "train/b.png", "train/train.png", "val/b.png", *linked]
    assert (tmp_path / "val" / "b.bmp").stat().st_size == 414
    assert reasons(manifest, "images") == {"image is in train too, and kept there": 2 - len(linked)}


def test_files_that_are_no_images_and_other_separators_between_mask_files(tmp_path, monkeypatch):
    names = [r"cam0\a.png", r"cam0\a.pdf", r"cam1\a.TIF", "notes.txt"]  # as Windows lists them
    monkeypatch.setattr(prepare_masks.glob, "glob", lambda *_, **__: names)
    monkeypatch.setattr(prepare_masks.os, "sep", "\\")
    found = prepare_masks.files_by_stem(tmp_path, "", set())
    assert found == {"cam0/a": "cam0/a.png", "cam1/a": "cam1/a.TIF"}


def test_rows_of_one_file_are_merged(tmp_path):
    rows = [image_row(1, "a.jpg"), image_row(2, "a.jpg"), image_row(1, "./a.jpg")]
    anns = [person(1), person(2, polygon(7, 2, 3, 4))]
    manifest, by_name = one_file(tmp_path, rows, anns)
    assert by_name["a.png"]["pixels"]["1"] == 28
    assert reasons(manifest, "images") == {"another row holds the image: merged": 2}


def test_an_id_of_two_files_is_refused(tmp_path, refuse):
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / "images" / name)
    path = write_json(tmp_path / "a.json", [image_row(5, "a.jpg"), image_row("5", "b.jpg")], [])
    flags = ("--annotations", path, "--images-dir", tmp_path / "images")
    assert "a.jpg and b.jpg share the id 5" in refuse(*flags)
    two = [{"id": 1, "name": "cat"}, {"id": "1", "name": "person"}]
    write_json(path, [image_row(5, "a.jpg")], [], two)
    assert "category 1 is both 'cat' and 'person'" in refuse(*flags)
    write_json(path, [image_row(5, "a.jpg")], [], [])
    assert "it knows none at all" in refuse(*flags)


def test_names_are_found_whatever_their_case_and_unicode_form(tmp_path):
    for name in ("Gru\u0308n.JPG", "b.jpg", "B.jpg"):
        write_image(tmp_path / "images" / name)
    rows = [image_row(1, "gr\u00fcn.jpg"), image_row(2, "b.JPG"), image_row(3, "b.jpg")]
    path = write_json(tmp_path / "a.json", rows, [person(1)])
    flags = ("--annotations", path, "--images-dir", tmp_path / "images")
    manifest, by_name = prepare(tmp_path, *flags)
    assert {row["file"] for row in by_name.values()} == {"Gru\u0308n.JPG", "b.jpg"}
    assert reasons(manifest, "images") == {"image file is missing": 1}  # b.JPG could be either


def test_missing_images(tmp_path, refuse):
    rows = [image_row(n, f"{n}.jpg") for n in range(5)] + [image_row(5, f"{'y' * 300}/5.jpg")]
    path = write_json(tmp_path / "a.json", rows, [person(n) for n in range(6)])
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.jpg", seed=number)
    flags = ("--annotations", path, "--images-dir", tmp_path / "images")
    manifest, by_name = prepare(tmp_path, *flags)
    assert len(by_name) == 3
    assert reasons(manifest, "images") == {"image file is missing": 3}
    (tmp_path / "images" / "0.jpg").unlink()
    assert "4 of the 6 images of a are missing" in refuse(*flags)
    assert "6 of the 6 images" in refuse(*flags[:3], tmp_path / "nowhere")
    assert len(json.loads((tmp_path / "data" / "manifest.json").read_text())["images"]) == 3


def test_annotations_of_an_image_without_a_name_are_left_out_with_it(tmp_path):
    rows = [image_row(1, "a.jpg"), image_row(2, "")]
    path = write_json(tmp_path / "a.json", rows, [person(1), person(2), person(3)])
    write_image(tmp_path / "images" / "a.jpg")
    manifest, _ = prepare(tmp_path, "--annotations", path, "--images-dir", tmp_path / "images")
    assert reasons(manifest, "images") == {"image without a file name": 1}
    assert reasons(manifest, "annotations") == {"annotation of an unknown image": 1}


FOREIGN = [
    "../{}",
    "c\\..\\..\\{}",
    "/x/{}",
    "C:\\x\\{}",
    "C:{}",
    "s3://x/{}",
    "https://x.org/y/{}?z=1",
]


def test_names_of_other_machines_are_found_by_their_end_and_never_outside(tmp_path, refuse):
    """labelme2coco: "../images/a.jpg"; Label Studio 1.16: "..\\..\\upload\\4\\a.png"; Labelbox and
    Darwin: addresses."""
    names = [name.format(f"{n}.jpg") for n, name in enumerate(FOREIGN)]
    rows = [image_row(n, name) for n, name in enumerate([*names, "", "..", 7])]
    for number in range(len(names)):
        write_image(tmp_path / "images" / f"{number}.jpg", seed=number)
    write_image(tmp_path / "outside.jpg")
    path = write_json(tmp_path / "a.json", rows, [person(n) for n in range(len(names))])
    flags = ("--annotations", path, "--images-dir", tmp_path / "images")
    manifest, by_name = prepare(tmp_path, *flags)
    assert list(by_name) == [f"{n}.png" for n in range(len(names))]
    assert all(row["pixels"]["1"] == 16 for row in by_name.values())
    assert reasons(manifest, "images") == {"image without a file name": 3}
    rows = [image_row(n, name.format("outside.jpg")) for n, name in enumerate(FOREIGN)]
    write_json(path, [image_row(9, "0.jpg"), *rows], [person(9)])
    assert f"{len(FOREIGN)} of the {len(FOREIGN) + 1} images of a are missing" in refuse(*flags)


def test_the_longest_end_of_a_name_is_taken(tmp_path):
    for number, folder in enumerate(("cam0", "cam1")):
        write_image(tmp_path / "images" / folder / "a.jpg", seed=number)
    rows = [image_row(n, f"/home/me/cam{n}/a.jpg") for n in range(2)]
    path = write_json(tmp_path / "a.json", rows, [person(1)])
    flags = ("--annotations", path, "--images-dir", tmp_path / "images")
    _, by_name = prepare(tmp_path, *flags)
    assert {name: "1" in row["pixels"] for name, row in by_name.items()} == {
        "cam0/a.png": False,
        "cam1/a.png": True,
    }


def test_two_images_of_one_name_are_not_merged(tmp_path):
    """COCO Annotator writes the same "file_name" for both, and a "path"; Darwin states other sizes.
    Where it is not sure whose annotations they are, the image is left out."""
    for number, folder in enumerate(("cam0", "cam1")):
        write_image(tmp_path / folder / "a.jpg", seed=number)
    rows = [{**image_row(n, "a.jpg"), "path": f"/datasets/x/cam{n}/a.jpg"} for n in range(2)]
    anns = [person(0), person(1, polygon(7, 2, 3, 4))]
    path = write_json(tmp_path / "a.json", rows, anns)
    _, by_name = prepare(tmp_path, "--annotations", path, "--images-dir", tmp_path)
    assert [by_name[f"cam{n}/a.png"]["pixels"]["1"] for n in range(2)] == [16, 12]
    flags = ("--annotations", path, "--images-dir", tmp_path / "cam0")
    write_image(tmp_path / "cam0" / "b.jpg", seed=2)
    two = {"two rows lead to the same file, by different paths or sizes": 2}
    for other in (rows[1], image_row(1, "a.jpg", height=99)):
        own = [rows[0] if "path" in other else image_row(0, "a.jpg"), other]
        write_json(path, [*own, image_row(2, "b.jpg")], [*anns, person(2)])
        manifest, by_name = prepare(tmp_path, *flags)
        assert list(by_name) == ["b.png"]
        assert reasons(manifest, "images") == two


def test_sizes_and_ids_however_they_are_written(tmp_path):
    rows = [
        image_row("0", "a.jpg", height=10.0, width="12"),
        image_row(1.0, "b.jpg", height="10.0"),
    ]
    rows.append(image_row("frame-7", "c.jpg", height=0, width=None))
    anns = [person(0, iscrowd=None), person("1", iscrowd="0"), person("frame-7", iscrowd=False)]
    anns += [person(0, polygon(7, 2, 2, 2), iscrowd=value, id="x") for value in ("1", True, 1.0)]
    manifest, by_name = one_file(tmp_path, rows, anns)
    assert [row["id"] for row in manifest["images"]] == [0, 1, "frame-7"]
    assert [row["pixels"]["1"] for row in manifest["images"]] == [16, 16, 16]
    assert by_name["a.png"]["ignored"] == 4  # three crowds of the same pixels
    assert manifest["skipped"] == {"images": {}, "annotations": {}}


def test_classes_all_and_what_a_split_lacks(tmp_path, capsys, refuse):
    cat = [{"id": 4, "name": "cat"}, {"id": 5, "name": "background"}]
    for split, categories in (("train", CATEGORIES), ("val", CATEGORIES[:1] + cat)):
        write_image(tmp_path / split / f"{split}.jpg", seed=len(categories))
        path = tmp_path / "annotations" / f"instances_{split}.json"
        write_json(path, [image_row(1, f"{split}.jpg")], [person(1)], categories)
    manifest, _ = prepare(tmp_path, "--coco-root", tmp_path, "--classes", "all")
    assert manifest["classes"] == ["background", "person", "car", "cat"]
    prepare(tmp_path, "--coco-root", tmp_path, "--classes", "person", "cat")
    assert "note: train has no category 'cat'" in capsys.readouterr().err
    assert "did you mean 'person'?" in refuse("--coco-root", tmp_path, "--classes", "preson")
    many = [{"id": n, "name": f"c{n}"} for n in range(300)]
    write_json(path, [image_row(1, "val.jpg")], [], many)
    sentence = refuse("--coco-root", tmp_path, "--split", "val", "--classes", "all")
    assert "300 classes: at most 254" in sentence


# --- what cannot be used -------------------------------------------------------------------------

RLE = {"size": [10, 12], "counts": [20, 10, 90]}


@pytest.mark.parametrize(
    ("segmentation", "area"),
    [
        (SQUARE[0], 16),
        ([[2, 2], [6, 2], [6, 6], [2, 6]], 16),
        ([[[2, 2], [6, 2], [6, 6], [2, 6]]], 16),
        ([[2, 2], [8, 2], [8, 8]], 15),  # a triangle
        ([["2", "2", "6", "2", "6.0", "6", "2", "6"]], 16),
        ([RLE, {"size": ["10", 12.0], "counts": ["40", 5, 75]}], 15),
        ([*SQUARE, RLE], 16 + 10 - 4),
        ([*SQUARE, [1, 1, 2, 2]], 16),
    ],
)
def test_segmentations_as_tools_write_them(segmentation, area):
    encoded, lost, _ = encode(segmentation, 10, 12)
    assert coco.rle.area(encoded) == area
    assert len(lost) == (segmentation[-1] == [1, 1, 2, 2])


def test_what_cannot_be_used_never_becomes_background(tmp_path, capsys):
    bad = [1, 1, float("nan"), 2, 3, 3]
    rows = [image_row(n, f"{n}.jpg") for n in range(6)]
    anns = [
        person(0, [bad], bbox=[6, 1, 3, 4]),
        person(0, polygon(7, 1, 1, 4)),  # covers a column of that bbox
        person(1),
        person(1, None),  # nothing says where it is
        person(2, [*SQUARE, bad], bbox=["2", "2", "9", "4"]),
        person(3, [*SQUARE, [1, 1, 9, 9]], bbox=[0, 0, 12, 10]),  # two points enclose nothing
        person(4, iscrowd="no", bbox=[0, 0, 2, 2]),
        person(4, iscrowd=2, bbox=[0, 0, 2, 2]),
        person(5, [[3.1, 3.1, 3.2, 3.1, 3.2, 3.2]]),  # between the centres of pixels
    ]
    manifest, by_name = one_file(tmp_path, rows, anns)
    assert "\nperson                  4          4       0 " in capsys.readouterr().out
    assert "1.png" not in by_name
    assert (mask_of(tmp_path, "0.png")[1:5, 6:9] == [255, 1, 255]).all()
    assert by_name["0.png"]["ignored"] == 8
    assert by_name["2.png"]["pixels"]["1"] == 16
    assert by_name["2.png"]["ignored"] == 20
    assert by_name["3.png"]["ignored"] == 0
    assert by_name["4.png"]["ignored"] == 4
    assert by_name["5.png"]["pixels"] == {"0": 120}
    reason = "an annotation cannot be used, and has no bbox to ignore"
    assert reasons(manifest, "images") == {reason: 1}
    assert reasons(manifest, "annotations") == {
        "polygon coordinate is not finite or out of bounds": 2,
        "annotation has no segmentation": 1,
        coco.TOO_SHORT: 1,
        "iscrowd is neither 0 nor 1": 2,
        "segmentation covers no pixel": 1,
    }


def test_a_file_of_which_nothing_can_be_used_is_refused(tmp_path, refuse):
    write_image(tmp_path / "images" / "a.jpg")
    path = tmp_path / "a.json"
    flags = ("--annotations", path, "--images-dir", tmp_path / "images")

    def sentence(*annotations, more=()):
        write_json(path, [image_row(1, "a.jpg")], list(annotations))
        return refuse(*flags, *more)

    boxes = sentence(person(1, [], bbox=[1, 1, 5, 5]), person(1, [], bbox=[6, 1, 2, 2]))
    assert "2 x annotation has no segmentation" in boxes
    assert "Masks need polygons or RLE" in boxes
    assert "no usable image" in sentence(person(1, [], bbox=None))
    panoptic = {"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 1}]}
    assert "1 x category is not in categories" in sentence(panoptic)
    assert "--crowd class" in sentence(person(1, RLE, iscrowd=1))
    assert "--crowd class" in sentence(person(1, RLE, iscrowd=1), more=("--crowd", "background"))
    assert "try other --classes" in sentence()
    shares = [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9, 0.1, 0.9]]
    assert "normalised coordinates?" in sentence(person(1, shares))
    for x, y in ((50, 50), (70, 2), (-20, 2), (2, -20), (2, 40)):
        outside = sentence(person(1, polygon(x, y, 9, 9)))
        assert "1 x polygon outside the image: annotated on a picture of another size?" in outside
    assert not (tmp_path / "data").exists()


def test_training_and_evaluation_on_nothing_say_so(data, checkpoint, tmp_path, refused, capsys):
    content = json.loads((data / "manifest.json").read_text())
    for row in content["images"]:
        if row["split"] == "val2017":
            row["pixels"] = {"0": row["height"] * row["width"]}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    for folder in ("masks_raw", "masks_colored"):
        (tmp_path / folder).symlink_to(data / folder)
    flags = ["--data", tmp_path, *TINY, "--model", "unet", "--epochs", 1, "--out", tmp_path / "run"]
    train.main([str(flag) for flag in flags])
    assert "no validation image holds a pixel of any class" in capsys.readouterr().out
    sentence = refused("train", *flags, "--val-split", "train2017", "--out", tmp_path / "other")
    assert "no training image" in sentence
    result = command("evaluate.py", "--ckpt", checkpoint, "--data", tmp_path, "--workers", 0)
    assert result.returncode == 0, result.stderr
    assert "hold no pixel of any class" in result.stderr


def test_the_list_of_what_was_skipped_stays_short(tmp_path, capsys):
    leftovers = [person(n, id=n) for n in range(1000, 1500)]
    manifest, _ = one_file(tmp_path, [image_row(1, "a.jpg")], [person(1), *leftovers])
    entry = manifest["skipped"]["annotations"]["annotation of an unknown image"]
    assert entry["count"] == 500
    assert len(entry["examples"]) == 10
    assert entry["examples"][0] == {"split": "a", "image": 1000, "annotation": "#1"}
    assert "skipped 500 x annotation of an unknown image" in capsys.readouterr().err


# --- the pixels that are annotated ---------------------------------------------------------------


def exif(orientation):
    content = Image.Exif()
    content[0x0112] = orientation
    return content


@pytest.mark.parametrize("upright", [False, True])
def test_exif_goes_as_the_sizes_of_the_file_say(tmp_path, upright):
    """One picture whose sides swap decides for the square one and the one that is upside down."""
    folder = tmp_path / "images"
    write_image(folder / "a.jpg", (12, 10), exif=exif(6))
    write_image(folder / "square.png", (12, 12), exif=exif(6))
    write_image(folder / "down.jpg", (12, 10), exif=exif(3))
    swapped = {"height": 12, "width": 10} if upright else {}
    rows = [image_row(1, "a.jpg", **swapped), image_row(2, "square.png", height=12)]
    rows.append(image_row(3, "down.jpg"))
    path = write_json(tmp_path / "a.json", rows, [person(1)])
    flags = ("--annotations", path, "--images-dir", folder)
    manifest, _ = prepare(tmp_path, *flags)
    assert manifest["exif"] == {"a": "upright" if upright else "stored"}
    loaded = load_manifest(tmp_path / "data")
    assert loaded.upright.tolist() == [upright] * 3
    for name in ("square.png", "down.jpg"):
        image = Image.open(folder / name)
        turned = image.transpose(Image.Transpose.ROTATE_180 if name[0] == "d" else 4)
        size = (image.height, image.width)
        read = read_image(folder / name, size, upright)
        np.testing.assert_array_equal(np.array(read), np.array(turned if upright else image))
    other = "stored" if upright else "upright"
    assert prepare(tmp_path, *flags, "--exif", other)[0]["exif"] == {"a": other}
    assert read_image(folder / "a.jpg", (10, 12), upright=True).size == (12, 10)  # as annotated
    write_json(path, [image_row(1, "a.jpg", height=0)], [person(1)])  # no size says which
    for way, size in (("upright", (12, 10)), ("stored", (10, 12))):
        row = prepare(tmp_path, *flags, "--exif", way)[1]["a.png"]
        assert (row["height"], row["width"]) == size


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_every_orientation_that_swaps_the_sides(tmp_path, orientation):
    path = tmp_path / "images" / "a.jpg"
    write_image(path, (12, 10), exif=exif(orientation))
    manifest, by_name = one_file(
        tmp_path, [image_row(1, "a.jpg", height=12, width=10)], [person(1)]
    )
    assert (len(by_name), manifest["exif"]) == (1, {"a": "upright"})
    assert read_image(path, (12, 10), upright=False).size == (10, 12)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg"])
def test_damaged_exif_loses_no_image(tmp_path, name):
    path = tmp_path / "images" / name
    write_image(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    for stated in ({}, {"height": 0}):
        _, by_name = one_file(tmp_path, [image_row(1, name, **stated)], [person(1)])
        assert len(by_name) == 1
    assert read_image(path, (10, 12), upright=True).size == (12, 10)
    assert read_image(path).size == (12, 10)


@pytest.mark.parametrize(("bits", "suffix"), [(8, "png"), (10, "png"), (12, "tif"), (16, "png")])
def test_deep_images_keep_their_brightness(tmp_path, bits, suffix):
    values = np.linspace(0, 2**bits - 1, 120).astype(np.uint16).reshape(10, 12)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    read = np.array(read_image(tmp_path / f"deep.{suffix}", (10, 12), upright=False))
    np.testing.assert_array_equal(read[..., 0], values >> (bits - 8))
    np.testing.assert_array_equal(read, np.array(read_image(tmp_path / f"deep.{suffix}")))


def test_a_tiff_that_states_fewer_bits_is_scaled_by_them():
    image = Image.fromarray(np.full((4, 4), 1024, dtype=np.uint16))
    assert np.array(_scaled(image)).max() == 1024 >> 3  # the smallest depth that holds it
    image.tag_v2 = {258: (12,)}
    assert np.array(_scaled(image)).max() == 1024 >> 4
    dark = Image.fromarray(np.full((4, 4), 100, dtype=np.uint16))
    assert np.array(_scaled(dark)).max() == 100  # never less than 8 bits


def test_check_finds_an_image_that_is_cut_off(tmp_path):
    for number in range(3):
        write_image(tmp_path / "images" / f"{number}.jpg", (64, 64), seed=number)
    cut = tmp_path / "images" / "1.jpg"
    cut.write_bytes(cut.read_bytes()[:-900])
    rows = [image_row(n, f"{n}.jpg", height=64, width=64) for n in range(3)]
    anns = [person(n) for n in range(3)]
    assert len(one_file(tmp_path, rows, anns)[1]) == 3
    manifest, by_name = one_file(tmp_path, rows, anns, "--check")
    assert sorted(by_name) == ["0.png", "2.png"]
    assert reasons(manifest, "images") == {"image file is not readable": 1}


# --- the data directory --------------------------------------------------------------------------


def test_masks_moved_by_pixels_are_other_masks(tmp_path):
    fingerprints = []
    for x in (2, 4, 2):
        one_file(tmp_path, [image_row(1, "a.jpg")], [person(1, polygon(x, 2, 4, 4))])
        fingerprints.append(load_manifest(tmp_path / "data").fingerprint)
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
    row = json.loads((tmp_path / "data" / "manifest.json").read_text())["images"][0]
    assert row["checksum"] == zlib.crc32(mask_of(tmp_path, "a.png"))


def test_the_order_of_a_file_changes_nothing(tmp_path):
    rows = [image_row(n, f"{n}.jpg") for n in (10, 9, "b", "a")]
    anns = [person(9), person("b", polygon(1, 1, 2, 3))]
    one_file(tmp_path, rows, anns)
    before = (tmp_path / "data" / "manifest.json").read_bytes()
    one_file(tmp_path, rows[::-1], anns[::-1])
    assert (tmp_path / "data" / "manifest.json").read_bytes() == before
    assert load_manifest(tmp_path / "data").ids.tolist() == ["10", "9", "a", "b"]


def test_a_training_notices_that_masks_were_prepared_anew(tmp_path, refused):
    rows = [image_row(n, f"{n}.jpg") for n in range(12)]
    one_file(tmp_path, rows, [person(n) for n in range(12)])
    manifest = load_manifest(tmp_path / "data")
    one_file(tmp_path, rows, [person(n, polygon(3, 3, 4, 4)) for n in range(12)])
    from dataset import load_mask

    with pytest.raises(UserError, match=r"masks_raw/0\.png is not the mask .* start again"):
        load_mask(manifest, 0)


def test_what_is_not_ours_is_not_overwritten(tmp_path, refuse):
    write_image(tmp_path / "images" / "a.jpg")
    path = write_json(tmp_path / "a.json", [image_row(1, "a.jpg")], [person(1)])
    flags = ("--annotations", path, "--images-dir", tmp_path / "images")
    out = tmp_path / "data"
    for text in ('{"name": "an app"}', "[1]", "7", "no json"):
        write_image(out / "masks_raw" / "my.png")
        (out / "manifest.json").write_text(text)
        assert f"{out} holds a manifest.json or masks that prepare_masks.py" in refuse(*flags)
        assert (out / "manifest.json").read_text() == text
    (out / "manifest.json").unlink()
    assert f"{out} holds a manifest.json or masks that prepare_masks.py" in refuse(*flags)
    assert (out / "masks_raw" / "my.png").exists()


def test_what_fails_leaves_an_earlier_preparation_as_it_was(tmp_path, refuse):
    rows, anns = [image_row(n, f"{n}.jpg") for n in range(2)], [person(0), person(1)]
    one_file(tmp_path, rows, anns)
    before = {p: p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file()}
    flags = ("--annotations", tmp_path / "a.json", "--images-dir", tmp_path / "images")
    write_json(tmp_path / "a.json", rows, [person(0, RLE, iscrowd=1)])
    assert "--crowd class" in refuse(*flags)
    write_json(tmp_path / "a.json", [image_row(0, "0.jpg", height=99)], anns)
    assert "no usable image: 1 x image file has another size" in refuse(*flags)
    after = {p: p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file()}
    assert before == after
    one_file(tmp_path, rows[:1], anns[:1])
    assert [p.name for p in (tmp_path / "data" / "masks_raw").iterdir()] == ["0.png"]


def test_two_runs_into_one_folder(tmp_path, refuse):
    one_file(tmp_path, [image_row(1, "a.jpg")], [person(1)])
    flags = ("--annotations", tmp_path / "a.json", "--images-dir", tmp_path / "images")
    code = "import sys, time, pathlib, common\n"
    code += (
        "with common.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(99)"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "data")]
    with subprocess.Popen(line, cwd=SCRIPTS, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert "is in use by another run" in refuse(*flags)
        other.kill()
    prepare(tmp_path, *flags)  # the lock died with its process


def test_a_name_that_the_terminal_cannot_show_costs_nothing(tmp_path):
    path = write_json(
        tmp_path / "a.json", [image_row(1, "a.jpg")], [person(1)], [{"id": 1, "name": "行人"}]
    )
    write_image(tmp_path / "images" / "a.jpg")
    flags = ("--annotations", path, "--images-dir", tmp_path / "images", "--out", tmp_path / "data")
    result = command(
        "prepare_masks.py", *flags, "--classes", "all",
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert r"\u884c\u4eba" in result.stdout
    assert load_manifest(tmp_path / "data").classes == ["background", "行人"]


@pytest.mark.skipif(sys.platform == "win32", reason="no such pipes")
def test_a_closed_pipe_ends_it_quietly_with_the_masks_complete(tmp_path):
    one_file(tmp_path, [image_row(1, "a.jpg")], [person(1)])
    flags = ("--annotations", tmp_path / "a.json", "--images-dir", tmp_path / "images")
    line = [sys.executable, SCRIPTS / "prepare_masks.py", *flags, "--classes", "person"]
    out = tmp_path / "piped"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        line = [*map(str, line), "--out", str(out)]
        result = subprocess.run(line, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=100)
    assert result.returncode == 141
    assert result.stderr == ""
    assert len(load_manifest(out)) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may search every folder")
def test_a_folder_without_search_permission(tmp_path, refuse):
    write_image(tmp_path / "images" / "a.jpg")
    path = write_json(tmp_path / "a.json", [image_row(1, "a.jpg")], [person(1)])
    (tmp_path / "images").chmod(0o600)
    try:
        assert "Permission denied" in refuse("--annotations", path, "--images-dir", path.parent)
    finally:
        (tmp_path / "images").chmod(0o700)


def test_images_that_moved(data, coco, checkpoint, tmp_path, monkeypatch):
    content = json.loads((data / "manifest.json").read_text())
    copy = tmp_path / "data"
    copy.mkdir()
    (copy / "manifest.json").write_text(json.dumps({**content, "root": "/nowhere"}))
    for folder in ("masks_raw", "masks_colored"):
        (copy / folder).symlink_to(data / folder)
    flags = ["--data", copy, *TINY, "--model", "unet", "--epochs", 1, "--out", tmp_path / "run"]
    result = command("train.py", *flags)
    assert result.returncode == 2
    assert "did the images move? Give their folder with --coco-root" in result.stderr
    train.main([str(flag) for flag in [*flags, "--coco-root", coco]])
    command("evaluate.py", "--ckpt", tmp_path / "run" / "last.pt").check_returncode()
    flags = ["--ckpt", checkpoint, "--data", copy]
    assert command("evaluate.py", *flags).returncode == 2
    assert command("evaluate.py", *flags, "--coco-root", coco).returncode == 0
    monkeypatch.setenv("COCO_ROOT", str(coco))
    assert load_manifest(copy).root == coco
    assert load_manifest(data).root != "/nowhere"
    monkeypatch.setenv("COCO_ROOT", "/elsewhere")
    assert load_manifest(data).root == Path(content["root"])


# --- masks instead of annotations ----------------------------------------------------------------

LABELS = np.zeros((10, 12), dtype=np.uint8)
LABELS[2:6, 2:6], LABELS[0, :], LABELS[9, 9:] = 2, 1, 255
PALETTE = {0: (0, 0, 0), 1: (255, 0, 0), 2: (0, 0, 255), 255: (224, 224, 192)}


def write_mask(path, labels=LABELS, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    if mode == "RGB":
        image = Image.fromarray(
            np.array([PALETTE[v] for v in labels.flat], np.uint8).reshape(10, 12, 3)
        )
    image.save(path)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_masks_of_ones_own(tmp_path, mode, capsys):
    for number, name in enumerate(("a", "sub/b", "alone")):
        write_image(tmp_path / "photos" / f"{name}.jpg", seed=number)
    for name in ("a", "sub/b", "nobody"):
        write_mask(tmp_path / "labels" / f"{name}.png", mode=mode)
    flags = ["--masks", tmp_path / "labels", "--images-dir", tmp_path / "photos"]
    flags += ["--classes", "sky", "road"]
    if mode == "RGB":
        flags += ["--colors", "red", "0,0,255", "--ignore", "#e0e0c0"]
    manifest, rows = prepare(tmp_path, *flags)
    assert sorted(rows) == ["a.png", "sub/b.png"]
    assert rows["a.png"]["pixels"] == {"0": 89, "1": 12, "2": 16}
    assert rows["a.png"]["ignored"] == 3
    np.testing.assert_array_equal(mask_of(tmp_path, "sub/b.png"), LABELS)
    assert reasons(manifest, "images") == {"image without a mask": 1}
    assert reasons(manifest, "annotations") == {"mask without an image": 1}
    assert manifest["classes"] == ["background", "sky", "road"]
    assert "sky                     2" in capsys.readouterr().out
    load_manifest(tmp_path / "data")


def test_masks_as_cityscapes_names_them(tmp_path):
    """github.com/mcordts/cityscapesScripts: leftImg8bit/<split>/<city>/..., gtFine beside it with
    several files per picture; 7 is road, 8 sidewalk."""
    stem = "aachen/aachen_000000_000019"
    for split in ("train", "val"):
        write_image(tmp_path / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", seed=len(split))
        write_mask(tmp_path / "gtFine" / split / f"{stem}_gtFine_labelIds.png", LABELS % 3 + 6)
        write_mask(tmp_path / "gtFine" / split / f"{stem}_gtFine_color.png", LABELS)
    flags = ["--masks", *(tmp_path / "gtFine" / split for split in ("train", "val"))]
    flags += ["--images-dir", *(tmp_path / "leftImg8bit" / split for split in ("train", "val"))]
    flags += ["--mask-suffix", "_gtFine_labelIds", "_leftImg8bit", "--ignore", 6]
    flags += ["--classes", "road", "sidewalk", "--colors", 7, 8]
    manifest, rows = prepare(tmp_path, *flags)
    assert sorted(rows) == [f"{s}/{stem}_leftImg8bit.png" for s in ("train", "val")]
    assert {row["id"] for row in manifest["images"]} == {stem}
    assert manifest["skipped"] == {"images": {}, "annotations": {}}
    loaded = load_manifest(tmp_path / "data")
    assert loaded.pixels.tolist() == [[0, 12, 16]] * 2


def test_masks_that_cannot_be_used(tmp_path, refuse):
    write_image(tmp_path / "photos" / "a.jpg")
    mask = tmp_path / "labels" / "a.png"
    mask.parent.mkdir()
    flags = [
        "--masks",
        mask.parent,
        "--images-dir",
        tmp_path / "photos",
        "--classes",
        "sky",
        "road",
    ]
    assert f"no image files * below {mask.parent}" in refuse(*flags)
    assert "--mask-suffix: give one for the masks" in refuse(*flags, "--mask-suffix", *"abc")
    write_mask(mask, np.where(LABELS == 1, 3, LABELS))
    assert f"no image files *_x below {mask.parent}" in refuse(*flags, "--mask-suffix", "_x")
    assert f"{mask} holds 3, which is no class" in refuse(*flags)
    write_mask(mask, mode="RGB")
    assert f"{mask} is RGB: give the colour of each class with --colors" in refuse(*flags)
    sentence = refuse(*flags, "--colors", "red", "0,255,0")
    assert f"{mask} holds #e0e0c0, which is no class" in sentence or "#0000ff" in sentence
    assert "neither a value nor a colour" in refuse(*flags, "--colors", "red", "rouge")
    assert "1 for 2 classes" in refuse(*flags, "--colors", "red")
    assert "not both" in refuse(*flags, "--colors", "red", 7)
    write_mask(mask, np.where(LABELS > 0, np.uint8(255), np.uint8(0)))
    assert "for masks, --colors (such as 255)" in refuse(*flags)
    write_mask(mask, LABELS[:5])
    assert "no usable image: 1 x image file has another size" in refuse(*flags)
    Image.fromarray(LABELS).save(mask.with_suffix(".jpg"))
    assert "a.jpg and a.png have the same name" in refuse(*flags)
    mask.unlink()
    assert "is a JPEG, which blurs labels" in refuse(*flags)


def test_binary_masks_of_0_and_255(tmp_path):
    write_image(tmp_path / "photos" / "a.jpg")
    write_mask(tmp_path / "photos" / "a_mask.png", np.where(LABELS > 0, np.uint8(255), np.uint8(0)))
    flags = ["--masks", tmp_path / "photos", "--images-dir", tmp_path / "photos"]
    flags += ["--mask-suffix", "_mask", "--classes", "thing", "--colors", 255]
    manifest, rows = prepare(tmp_path, *flags)
    assert rows["a.png"]["pixels"] == {"0": 89, "1": 31}
    assert manifest["skipped"] == {"images": {}, "annotations": {}}


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=30, deadline=None)
def test_labels_equal_a_lookup_pixel_by_pixel(seed, rgb):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 255], (7, 9))
    values = np.array([[PALETTE[v] for v in row] for row in labels], dtype=np.uint8)
    codes = (
        {color: label for label, color in PALETTE.items()} if rgb else {0: 0, 9: 1, 4: 2, 7: 255}
    )
    back = {label: code for code, label in codes.items()}
    if not rgb:
        values = np.vectorize(back.get)(labels).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    np.testing.assert_array_equal(read_labels(file, codes), labels)


def test_flags_that_do_not_belong_together(tmp_path, refuse):
    one = ("--annotations", "a.json", "--images-dir", "i")
    assert "not allowed with argument" in refuse(*one, "--coco-root", "c")
    assert "--images-dir belongs to" in refuse("--coco-root", "c", "--images-dir", "i")
    assert "--images-dir belongs to" in refuse("--annotations", "a.json")
    assert "belong to --masks" in refuse(*one, "--mask-suffix", "_x")
    masks = ("--masks", "m", "--images-dir", "i", "--classes", "a", "b")
    assert "belong to annotations" in refuse(*masks, "--crowd", "class")
    assert "belong to annotations" in refuse(*masks, "--priority", "b")
    assert "name 1 twice" in refuse(*masks, "--colors", 1, 1)
    assert "twice" in refuse(*masks, "--colors", "red", "blue", "--ignore", "#ff0000")
    two = ("--annotations", "x/a.json", "y/a.json", "--images-dir", "i", "j")
    assert "different --split" in refuse(*two)
    assert "different --split" in refuse(*two, "--split", "b")
    assert "names without slashes" in refuse(*two, "--split", "b", "../c")
    assert "a.json" in refuse(*one)


# --- pictures that belong together ---------------------------------------------------------------


def test_augmentations_of_one_picture_stay_on_one_side(tmp_path, capsys):
    from dataset import image_groups, split_indices

    rows, anns = [], []
    for source in range(20):
        for copy in range(3):
            rows.append(image_row(len(rows), f"{source}_jpg.rf.{copy}{source}.jpg"))
            anns.append(person(len(anns)))
    one_file(tmp_path, rows, anns)
    manifest = load_manifest(tmp_path / "data")
    sides = split_indices(manifest, 0, None)
    sources = [{file.split("_")[0] for file in manifest.files[side]} for side in sides]
    assert not sources[0] & sources[1]
    assert [len(source) for source in sources] == [16, 4]
    assert "60 images in 20 groups" in capsys.readouterr().out
    sides = split_indices(manifest, 0, None, group=r"^\d")  # a video of this name, say
    first = [{file[0] for file in manifest.files[side]} for side in sides]
    assert not first[0] & first[1]
    # The rarest class of a group decides, whichever of its images holds it.
    manifest.pixels[:, 1] = 0
    manifest.pixels[[0, 3, 6, 9, 12], 1] = 9
    groups = image_groups(manifest, None)
    holding = {group for group, row in zip(groups, manifest.pixels) if row[1]}
    for seed in range(9):
        _, val = split_indices(manifest, seed, None)
        assert len(holding & {groups[index] for index in val}) == 1
    manifest.splits[:30] = "b"
    manifest.splits[manifest.files == manifest.files[59]] = "b"
    split_indices(manifest, 0, "b")
    assert "groups of images are on both sides of --val-split" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--group \(: "):
        split_indices(manifest, 0, None, group="(")


def test_the_checkpoint_stores_the_groups(data, tmp_path, refused):
    flags = ["--data", data, *TINY, "--model", "unet", "--epochs", 1, "--out", tmp_path / "run"]
    train.main([str(flag) for flag in [*flags, "--group", "[tv]0[0-9]"]])
    sentence = refused("train", "--resume", tmp_path / "run" / "last.pt", "--group", "x")
    assert "--group: the run in" in sentence


# --- walking the text ----------------------------------------------------------------------------

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    plain, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(), v, max_size=4)
)


@given(
    st.dictionaries(st.text(), values, max_size=6),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.integers(1, 40),
)
@settings(max_examples=200, deadline=None)
def test_walking_finds_what_json_finds(content, ascii_only, indent, window):
    raw = json.dumps(content, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "replace")
    content = json.loads(raw)
    found = {}
    original, coco.WINDOW = coco.WINDOW, window
    try:
        for key, _, start, end in walk(io.BytesIO(raw)):
            found.setdefault(key, [])
            if end:
                found[key].append(json.loads(raw[start:end]))
    finally:
        coco.WINDOW = original
    assert found == {key: value for key, value in content.items() if isinstance(value, list)}


@pytest.mark.parametrize(
    "text",
    ["", " ", "[]", "7", "{", '{"images"', '{"images" 5}', '{"images": [1 2]}', '{"images": [1',
     '{"images": [1}', '{"images": [' + "[" * 100_000, '{"a": ' + '{"b":' * 100_000,
     '{"images": [\xff', '{"images": ["\xff"]}'],
)  # fmt: skip
def test_damaged_text_is_one_sentence(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"cannot read {path}"):
        read_index(Source("a", path, []))


def test_other_encodings_of_the_text(tmp_path):
    path = tmp_path / "a.json"
    content = {"categories": [{"id": 1, "name": "Fußgänger"}], "images": [], "annotations": []}
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(content, ensure_ascii=False).encode())
    assert read_index(Source("a", path, [])).names == {1: "Fußgänger"}


def test_a_value_is_taken_in_pieces_of_the_file():
    text = JsonText(io.BytesIO(b" 123456 "))
    assert text.value() == (123456, 1, 7)
    with pytest.raises(Unusable):
        encode("no", 4, 4)


def test_masks_beside_their_images_and_a_path_that_is_not_absolute(tmp_path, monkeypatch):
    for name in "ab":
        write_image(tmp_path / "rf" / f"{name}.jpg", seed=ord(name))
        write_mask(tmp_path / "rf" / f"{name}_mask.png", LABELS % 2)
    monkeypatch.chdir(tmp_path)
    flags = ["--masks", "rf", "--images-dir", "rf", "--mask-suffix", "_mask", "--classes", "thing"]
    manifest, rows = prepare(tmp_path, *flags)
    assert sorted(rows) == ["a.png", "b.png"]
    assert manifest["skipped"] == {"images": {}, "annotations": {}}


def test_an_image_with_a_mask_in_two_splits_stays_in_the_first(tmp_path):
    for name in "ab":
        write_image(tmp_path / "photos" / f"{name}.jpg", seed=ord(name))
        write_mask(tmp_path / "m1" / f"{name}.png", LABELS % 2)
    write_mask(tmp_path / "m2" / "a.png", LABELS % 2)
    write_image(tmp_path / "photos" / "c.jpg")
    write_mask(tmp_path / "m2" / "c.png", LABELS % 2)
    flags = ["--masks", tmp_path / "m1", tmp_path / "m2", "--images-dir", tmp_path / "photos"]
    flags += ["--split", "train", "val", "--classes", "thing"]
    manifest, rows = prepare(tmp_path, *flags)
    assert sorted(rows) == ["train/a.png", "train/b.png", "val/c.png"]
    reasons = manifest["skipped"]["images"]
    assert reasons["image is in train too, and kept there"]["count"] == 1


# --- what a second file, class or tool makes of the same pixels ----------------------------------

TWO = [{"id": 1, "name": "person"}, {"id": 2, "name": "sky"}]


def two_files(tmp_path, first, second, categories=TWO):
    """Flags for two annotation files of the same picture."""
    write_image(tmp_path / "images" / "a.jpg")
    paths = [
        write_json(tmp_path / f"{name}.json", [image_row(1, "a.jpg")], annotations, categories)
        for name, annotations in (("things", first), ("stuff", second))
    ]
    return ("--annotations", *paths, "--images-dir", tmp_path / "images")


def test_two_files_that_label_the_same_images_are_refused_if_a_class_would_be_lost(
    tmp_path, refuse
):
    """COCO's instances and stuff; Kili's file per job; a file per class."""
    sky = {**person(1, polygon(7, 2, 3, 4)), "category_id": 2}
    flags = two_files(tmp_path, [person(1)], [sky])
    error = refuse(*flags, "--classes", "person", "sky")
    assert "label the same images, and only the second has sky: merge the files" in error
    prepare(tmp_path, *flags, "--classes", "person")  # nothing of it is asked for
    flags = two_files(tmp_path, [person(1), sky], [sky, person(1)])
    manifest, _ = prepare(tmp_path, *flags, "--classes", "person", "sky")
    assert reasons(manifest, "images") == {"image is in things too, and kept there": 1}


def test_different_masks_of_the_same_image_are_refused(tmp_path, refuse):
    write_image(tmp_path / "images" / "a.jpg")
    for name, value in (("cat", 1), ("dog", 2)):
        (tmp_path / name).mkdir()
        Image.new("L", (12, 10), value).save(tmp_path / name / "a.png")
    flags = ("--images-dir", tmp_path / "images", "--classes", "cat", "dog")
    error = refuse("--masks", tmp_path / "cat", tmp_path / "dog", *flags)
    assert "are different masks of the same image: merge them" in error
    Image.new("L", (12, 10), 1).save(tmp_path / "dog" / "a.png")
    manifest, _ = prepare(tmp_path, "--masks", tmp_path / "cat", tmp_path / "dog", *flags)
    assert reasons(manifest, "images") == {"image is in cat too, and kept there": 1}


def test_classes_that_others_cover_are_noted(tmp_path, capsys):
    """CVAT, ISAT and LabelMe have the part drawn over the whole; COCO has no order."""
    spot = {**person(1, polygon(3, 3, 2, 2)), "category_id": 2}
    own = [{"id": 1, "name": "leaf"}, {"id": 2, "name": "spot"}]
    flags = ("--classes", "all")
    one_file(tmp_path, [image_row(1, "a.jpg")], [person(1), spot], *flags, categories=own)
    note = "note: other classes cover spot (100%): name those in front in --priority"
    assert note in capsys.readouterr().out
    one_file(tmp_path, [image_row(1, "a.jpg")], [person(1), spot], *flags, "--priority", "spot",
             categories=own)  # fmt: skip
    assert mask_of(tmp_path, "a.png")[3, 3] == 2
    assert "note:" not in capsys.readouterr().out


def test_names_that_differ_in_case_or_spaces_are_one_class(tmp_path, capsys):
    """labelme2coco makes a category of each string that somebody typed."""
    own = [{"id": n, "name": name} for n, name in enumerate(("car", "Car", " car "), start=1)]
    anns = [{**person(1, polygon(4 * n, 0, 2, 2)), "category_id": n + 1} for n in range(3)]
    rows = [image_row(1, "a.jpg")]
    _, by_name = one_file(tmp_path, rows, anns, "--classes", "car", categories=own)
    assert by_name["a.png"]["pixels"]["1"] == 12
    assert "note: category 'Car' counts as 'car'" in capsys.readouterr().err
    flags = ("--classes", "Car", "car")  # which are two, if both are asked for
    _, by_name = one_file(tmp_path, rows, anns, *flags, categories=own)
    assert by_name["a.png"]["pixels"] == {"0": 108, "1": 4, "2": 8}


def test_categories_without_a_name_stay_apart(tmp_path):
    """VIA writes an option's description, which starts empty."""
    own = [{"id": 1, "name": ""}, {"id": 2, "name": " "}]
    anns = [person(1), {**person(1, polygon(7, 2, 3, 4)), "category_id": 2}]
    manifest, by_name = one_file(
        tmp_path, [image_row(1, "a.jpg")], anns, "--classes", "all", categories=own
    )
    assert manifest["classes"] == ["background", "category 1", "category 2"]
    assert by_name["a.png"]["pixels"] == {"0": 92, "1": 16, "2": 12}


@pytest.mark.parametrize(
    "empty",
    [
        {"segmentation": [], "bbox": [0, 0, 0, 0], "area": 0},  # coco-annotator, issue 109
        {"segmentation": [[]], "bbox": []},  # VIA's points
        {"segmentation": None, "area": 0.0, "keypoints": [3, 3, 2]},
    ],
)
def test_an_annotation_of_nothing_costs_no_image(tmp_path, empty):
    _, by_name = one_file(tmp_path, [image_row(1, "a.jpg")], [person(1), person(1, **empty)])
    assert by_name["a.png"]["pixels"] == {"0": 104, "1": 16}
    rows = [image_row(1, "a.jpg"), image_row(2, "b.jpg")]
    lost = person(1, **{**empty, "segmentation": [[5, 5, 8, 5]]})
    assert list(one_file(tmp_path, rows, [lost, person(2)])[1]) == ["b.png"]  # it had a place
    for box in ({}, {"bbox": []}, {"bbox": [5, 5, 3, 0]}):  # somewhere is something
        _, by_name = one_file(
            tmp_path,
            [image_row(1, "a.jpg"), image_row(2, "b.jpg")],
            [person(1), person(1, segmentation=[], area=4, **box), person(2)],
        )
        assert list(by_name) == ["b.png"]


def test_a_damaged_ring_never_becomes_background(tmp_path):
    rings = [*SQUARE, [7, 2, 9, 2, 9, 6, 7]]
    rows, others = [image_row(1, "a.jpg"), image_row(2, "b.jpg")], [person(2)]
    _, by_name = one_file(tmp_path, rows, [person(1, rings), *others])
    assert list(by_name) == ["b.png"]
    _, by_name = one_file(tmp_path, rows, [person(1, rings, bbox=[2, 2, 7, 4]), *others])
    assert (by_name["a.png"]["pixels"]["1"], by_name["a.png"]["ignored"]) == (16, 12)


def test_a_ring_in_a_ring_is_filled_and_noted(tmp_path, capsys):
    """FiftyOne, SAHI and COCO Annotator write a hole as a ring."""
    ring = polygon(1, 1, 8, 8) + polygon(3, 3, 4, 4)
    _, by_name = one_file(tmp_path, [image_row(1, "a.jpg")], [person(1, ring)])
    assert by_name["a.png"]["pixels"]["1"] == 64
    assert "note: 1 annotations have a ring in a ring, which is filled" in capsys.readouterr().out


def turned(path, orientation, seed=0):
    exif = Image.Exif()
    exif[0x0112] = orientation
    write_image(path, seed=seed, exif=exif)


def test_exif_of_a_split_that_shows_nothing_is_that_of_the_others(tmp_path, capsys):
    """CVAT, issue 3120: an image that is upside down has the same sizes either way."""
    turned(tmp_path / "train" / "a.jpg", 6)
    turned(tmp_path / "val" / "b.jpg", 3, seed=1)
    upright = image_row(1, "a.jpg", height=12, width=10)
    paths = [
        write_json(tmp_path / "train.json", [upright], [person(1)]),
        write_json(tmp_path / "val.json", [image_row(1, "b.jpg")], [person(1)]),
    ]
    flags = ("--annotations", *paths, "--images-dir", tmp_path / "train", tmp_path / "val")
    assert prepare(tmp_path, *flags)[0]["exif"] == {"train": "upright", "val": "upright"}
    assert "note:" not in capsys.readouterr().out
    turned(tmp_path / "val" / "c.jpg", 6, seed=2)  # whose sizes show that it was not turned
    write_json(tmp_path / "val.json", [image_row(1, "c.jpg")], [person(1)])
    assert prepare(tmp_path, *flags)[0]["exif"] == {"train": "upright", "val": "stored"}
    write_json(tmp_path / "val.json", [image_row(1, "b.jpg")], [person(1)])
    flags = ("--annotations", paths[1], "--images-dir", tmp_path / "val")
    assert prepare(tmp_path, *flags)[0]["exif"] == {"val": "stored"}
    assert "note: EXIF rotates 1 images" in capsys.readouterr().out
    prepare(tmp_path, *flags, "--exif", "stored")
    assert "note:" not in capsys.readouterr().out
    turned(tmp_path / "images" / "c.tif", 3)  # in a tag of its own
    one_file(tmp_path, [image_row(1, "c.tif")], [person(1)])
    assert "note: EXIF rotates 1 images" in capsys.readouterr().out


def test_exif_where_no_size_is_stated_is_noted(tmp_path, capsys):
    turned(tmp_path / "images" / "a.jpg", 6)
    path = write_json(tmp_path / "a.json", [{"id": 1, "file_name": "a.jpg"}], [person(1)])
    flags = ("--annotations", path, "--images-dir", tmp_path / "images")
    manifest, by_name = prepare(tmp_path, *flags)
    assert (by_name["a.png"]["height"], manifest["exif"]) == (10, {"a": "stored"})
    assert "note: EXIF rotates 1 images" in capsys.readouterr().out
    assert prepare(tmp_path, *flags, "--exif", "upright")[1]["a.png"]["height"] == 12


def test_the_background_of_masks_may_have_any_value(tmp_path, refuse):
    """Oxford-IIIT Pet: 1 pet, 2 background, 3 unclear. CVAT's labelmap: background:0,128,0."""
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    trimap = np.full((10, 12), 2, dtype=np.uint8)
    trimap[2:6, 2:6], trimap[0] = 1, 3
    Image.fromarray(trimap).save(tmp_path / "masks" / "a.png")
    flags = ("--masks", tmp_path / "masks", "--images-dir", tmp_path / "images", "--classes", "pet")
    assert "name its class, or background, in --classes" in refuse(*flags, "--ignore", "3")
    values = ("background", "--colors", "1", "2", "--ignore", "3")
    manifest, by_name = prepare(tmp_path, *flags, *values)
    assert manifest["classes"] == ["background", "pet"]
    assert by_name["a.png"]["pixels"] == {"0": 92, "1": 16}
    assert by_name["a.png"]["ignored"] == 12
    trimap[9, 9] = 0  # is not background any more, where another value is
    Image.fromarray(trimap).save(tmp_path / "masks" / "a.png")
    assert "a.png holds 0, which is no class" in refuse(*flags, *values)
    colors = np.array([(0, 0, 0), (255, 0, 0), (0, 128, 0)], dtype=np.uint8)
    Image.fromarray(colors[np.minimum(trimap, 2)]).save(tmp_path / "masks" / "a.png")
    values = ("background", "--colors", "red", "0,128,0", "--ignore", "black")
    assert prepare(tmp_path, *flags, *values)[1]["a.png"]["ignored"] == 1


def test_erased_pixels_of_masks_are_background_and_smooth_edges_refused(tmp_path, refuse):
    """GIMP and Photoshop keep the colour of what is erased."""
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    layer = np.full((10, 12, 4), (255, 0, 0, 0), dtype=np.uint8)
    layer[2:6, 2:6, 3] = 255
    Image.fromarray(layer).save(tmp_path / "masks" / "a.png")
    flags = ("--masks", tmp_path / "masks", "--images-dir", tmp_path / "images")
    flags = (*flags, "--classes", "cat", "--colors", "red")
    assert prepare(tmp_path, *flags)[1]["a.png"]["pixels"] == {"0": 104, "1": 16}
    layer[2, 2, 3] = 128
    Image.fromarray(layer).save(tmp_path / "masks" / "a.png")
    assert "a.png has half-transparent pixels" in refuse(*flags)


def test_masks_that_are_named_otherwise_are_told_of_the_flag(tmp_path, refuse):
    write_image(tmp_path / "images" / "img_0.jpg")
    (tmp_path / "masks").mkdir()
    Image.new("L", (12, 10), 1).save(tmp_path / "masks" / "mask_0.png")
    flags = ("--masks", tmp_path / "masks", "--images-dir", tmp_path / "images")
    assert "--mask-suffix says what its name has besides" in refuse(*flags, "--classes", "cat")


@pytest.mark.parametrize("flag", ["--classes", "--annotations", "--images-dir", "--split"])
def test_a_list_that_is_given_twice_is_refused(tmp_path, refuse, flag):
    """argparse would forget the first one."""
    path = write_json(tmp_path / "a.json", [image_row(1, "a.jpg")], [person(1)])
    flags = ("--annotations", path, "--images-dir", tmp_path, "--split", "x", "--classes", "person")
    assert f"{flag} is given twice: name all after one" in refuse(*flags, flag, "person")


def test_a_flag_is_written_whole(tmp_path, refuse):
    """Shortened, it would be neither literal, so that c* may become files, nor seen to be twice."""
    path = write_json(tmp_path / "a.json", [image_row(1, "a.jpg")], [person(1)])
    flags = ("--annotations", path, "--images-dir", tmp_path)
    assert "unrecognized arguments: --class" in refuse(*flags, "--class", "c*")


def test_rings_that_only_overlap_are_not_in_one_another():
    """As parts of an object that a tool writes: 8 pixels in common, the smallest ring has 4."""
    parts = [*polygon(0, 0, 6, 4), *polygon(4, 0, 6, 4), *polygon(0, 6, 2, 2)]
    assert encode(parts, 10, 12)[2] is False
    assert encode([*parts, *polygon(1, 1, 2, 2)], 10, 12)[2] is True
