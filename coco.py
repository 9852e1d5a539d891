"""COCO annotation files, read without trusting them, and their segmentations as run lengths.

    tasks = index_split(root, "val2017", classes, set(), Skipped(strict=False), first=0)
    encoded = encode(segmentation, height, width)

Whatever a file states is checked before pycocotools, which is C, gets to see it. What cannot be
used is skipped, counted by reason and listed.
"""

import difflib
import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from common import DataError

# pycocotools walks a polygon's outline at five points a pixel, in 32-bit integers: 1e8 crashes it.
MAX_COORDINATE = 1e6
MAX_OUTLINE = 2e6
MAX_PIXELS = Image.MAX_IMAGE_PIXELS


class Task(NamedTuple):
    """What a worker needs for one image. `annotations`: (id, label, iscrowd, segmentation)."""

    index: int
    image_id: int
    split: str
    path: Path
    file: str
    mask: str
    height: int
    width: int
    annotations: list[tuple]


class Unusable(ValueError):
    """An annotation or an image that cannot be used; the text is the reason."""


# --- segmentations -------------------------------------------------------------------------------


def encode(segmentation: object, height: int, width: int) -> dict:
    """Compressed RLE, as pycocotools has it, of a COCO segmentation: polygons or any RLE.

    Raises Unusable for all that would crash pycocotools, make it guess, or make it read memory that
    is not its own (see its rleFrString and rleFrPoly).
    """
    if isinstance(segmentation, list):
        polygons = [_checked_polygon(polygon) for polygon in segmentation]
        if not polygons:
            raise Unusable("segmentation is empty")
        return rle.merge(rle.frPyObjects(polygons, height, width))
    if not isinstance(segmentation, dict):
        raise Unusable("segmentation is neither polygons nor RLE")
    if segmentation.get("size") != [height, width]:
        raise Unusable("RLE size is not the image's")
    counts = segmentation.get("counts")
    counts = _decompressed(counts) if isinstance(counts, str) else _checked_counts(counts)
    if sum(counts) != height * width:
        raise Unusable("RLE counts do not sum to the image's pixels")
    return rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _checked_polygon(polygon: object) -> np.ndarray:
    if not isinstance(polygon, list):
        raise Unusable("polygon is not a list")
    if len(polygon) < 6 or len(polygon) % 2:
        raise Unusable("polygon has fewer than 6 or an odd count of numbers")
    # A bool is an int and "1" converts to 1.0, so the types are looked at before the values.
    if not {int, float}.issuperset(map(type, polygon)):
        raise Unusable("polygon holds something other than numbers")
    try:
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    except OverflowError:  # an int with more digits than a float can have
        points = np.full((1, 2), np.inf)
    if not (np.abs(points) <= MAX_COORDINATE).all():  # nor is NaN
        raise Unusable("polygon coordinate is not finite or out of bounds")
    edges = np.abs(points - np.concatenate([points[-1:], points[:-1]]))
    if edges.max(axis=1).sum() > MAX_OUTLINE:
        raise Unusable("polygon outline is out of bounds")
    return points.ravel()


def _checked_counts(counts: object) -> list[int]:
    if not isinstance(counts, list):
        raise Unusable("RLE counts are neither a list nor a string")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise Unusable("RLE counts are not whole numbers from 0 up")
    return counts


def _decompressed(text: str) -> list[int]:
    """Run lengths of a compressed RLE string: 5 bits a character, low bits first, bit 5 for "more",
    sign in bit 4 of the last, from the fourth number on the difference to the last but one."""
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 30:
            raise Unusable("RLE string is damaged")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    if shift or any(count < 0 for count in counts):
        raise Unusable("RLE string is damaged")
    return counts


# --- annotation files ----------------------------------------------------------------------------


def read_annotations(root: Path, split: str) -> dict:
    """The parsed instances file of a split. Raises DataError if it is missing or damaged."""
    path = root / "annotations" / f"instances_{split}.json"
    try:
        with open(path, "rb") as file:
            content = json.load(file)
    except FileNotFoundError:
        known = sorted(p.stem[10:] for p in (root / "annotations").glob("instances_*.json"))
        remedy = f"splits found: {', '.join(known)}" if known else "check --coco-root"
        raise DataError(f"no annotation file {path}; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path} ({error}): download it again") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path} has no list {key!r}: it is not a COCO instances file")
    return content


def category_labels(content: dict, classes: list[str], path: Path) -> dict[int, int | None]:
    """Label of each category id, None for categories that were not chosen.

    Raises DataError for a class that the file does not know.
    """
    names = {}
    for category in content["categories"]:
        if isinstance(category, dict) and type(category.get("id")) is int:
            names[category["id"]] = category.get("name")
    known = [name for name in names.values() if isinstance(name, str)]
    for name in classes[1:]:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(known)}"
            raise DataError(f"{path} has no category {name!r}; {hint}")
    return {id_: classes.index(name) if name in classes else None for id_, name in names.items()}


def image_folder(root: Path, split: str) -> Path:
    """ROOT/<split> or ROOT/images/<split>. Raises DataError if neither exists."""
    for folder in (root / split, root / "images" / split):
        if folder.is_dir():
            return folder
    raise DataError(f"no images of {split}: neither {root / split} nor {root / 'images' / split}")


class Skipped:
    """What could not be used: counted for the report, listed for the manifest, fatal if strict."""

    def __init__(self, strict: bool):
        self.strict, self.reasons, self.rows = strict, Counter(), []

    def add(self, split: str, image_id: object, annotation_id: object, reason: str) -> None:
        """Note an annotation, or with `annotation_id` None a whole image. Raises if strict."""
        self.reasons[reason] += 1
        names = {"split": split, "image_id": image_id, "annotation_id": annotation_id}
        self.rows.append({**names, "reason": reason})
        if self.strict:
            what = f"image {image_id}"
            if annotation_id is not None:
                what = f"annotation {annotation_id} of {what}"
            raise DataError(f"{split}, {what}: {reason} (--strict)")


def index_split(
    root: Path, split: str, classes: list[str], masks: set[str], skipped: Skipped, first: int
) -> list[Task]:
    """The tasks of one split, with the annotations of the chosen classes.

    `masks` holds the mask names taken so far, `first` is the number of the first task.
    """
    content = read_annotations(root, split)
    labels = category_labels(content, classes, root / "annotations" / f"instances_{split}.json")
    folder = image_folder(root, split)
    inside = tuple(os.path.realpath(base) + os.sep for base in (root, folder))
    tasks, missing, dropped = {}, [], set()
    for image in content["images"]:
        image_id = image.get("id") if isinstance(image, dict) else None
        try:
            if type(image_id) is not int or not 0 <= image_id < 2**63:
                raise Unusable("image without an id")
            if image_id in tasks:
                raise Unusable("duplicate image id")
            task = _image_task(image, split, root, folder, inside, first + len(tasks))
            if task.mask.casefold() in masks:
                raise Unusable("another image has the same mask name")
        except Unusable as reason:
            skipped.add(split, image_id, None, str(reason))
            if type(image_id) is int:
                dropped.add(image_id)
            continue
        tasks[image_id] = task
        masks.add(task.mask.casefold())
        if not task.path.is_file():
            missing.append(task.path)
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(tasks)} images of {split} are missing (first: "
            f"{missing[0]}): download them again or take them out of the annotation file"
        )
    _add_annotations(content["annotations"], tasks, dropped, labels, split, skipped)
    return list(tasks.values())


def _image_task(
    image: dict, split: str, root: Path, folder: Path, inside: tuple[str, ...], index: int
) -> Task:
    height, width, name = image.get("height"), image.get("width"), image.get("file_name")
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        raise Unusable("image height or width is not a whole number from 1 up")
    if height * width > MAX_PIXELS:
        raise Unusable(f"image has more than {MAX_PIXELS} pixels")
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        raise Unusable("file_name is not a file name")
    relative = PurePosixPath(name)
    mask = relative.stem + ".png"
    try:
        path = folder / relative
        real = os.path.realpath(path)
        too_long = len(os.fsencode(mask)) > 255
    except (OSError, ValueError):
        raise Unusable("file_name is not a file name") from None
    if relative.is_absolute() or ".." in relative.parts or not relative.stem or too_long:
        raise Unusable("file_name is not a file name")
    if not real.startswith(inside):
        raise Unusable("file_name leads out of the root")
    file = path.relative_to(root).as_posix()
    return Task(index, image["id"], split, path, file, mask, height, width, [])


def _add_annotations(
    annotations: list,
    tasks: dict[int, Task],
    dropped: set[int],
    labels: dict,
    split: str,
    skipped: Skipped,
) -> None:
    """Give each task the annotations of the chosen classes; those of other classes are left out.

    The annotations of `dropped` images go with them, without a word each.
    """
    seen = set()
    for annotation in annotations:
        try:
            if not isinstance(annotation, dict):
                raise Unusable("annotation is not an object")
            annotation_id, image_id = annotation.get("id"), annotation.get("image_id")
            category_id, iscrowd = annotation.get("category_id"), annotation.get("iscrowd", 0)
            if type(annotation_id) is not int:
                raise Unusable("annotation without an id")
            if annotation_id in seen:
                raise Unusable("duplicate annotation id")
            seen.add(annotation_id)
            if type(image_id) is not int or image_id not in tasks:
                if type(image_id) is int and image_id in dropped:
                    continue
                raise Unusable("annotation of an unknown image")
            if type(category_id) is not int or category_id not in labels:
                raise Unusable("category is not in categories")
            if iscrowd not in (0, 1):
                raise Unusable("iscrowd is neither 0 nor 1")
        except Unusable as reason:
            ids = annotation if isinstance(annotation, dict) else {}
            skipped.add(split, ids.get("image_id"), ids.get("id", "?"), str(reason))
            continue
        label = labels[category_id]
        if label is not None:
            row = (annotation_id, label, iscrowd, annotation.get("segmentation"))
            tasks[image_id].annotations.append(row)
