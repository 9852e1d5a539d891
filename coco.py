"""COCO annotation files, read without trusting them, and their segmentations as run lengths.

    tasks = index_split(root, "val2017", classes, set(), Skipped(strict=False))
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

from common import UserError

# pycocotools walks an outline at five points per pixel, in 32-bit integers: 1e8 crashes it.
MAX_COORDINATE = 1e6
MAX_OUTLINE = 2e6
MAX_PIXELS = Image.MAX_IMAGE_PIXELS


class Task(NamedTuple):
    """What a worker needs for one image. `annotations`: (id, label, iscrowd, segmentation)."""

    id: int
    split: str
    path: Path
    file: str
    mask: str
    height: int
    width: int
    annotations: list[tuple]


class Unusable(ValueError):
    """An annotation or an image that cannot be used; the text is the reason."""


def encode(segmentation: object, height: int, width: int) -> dict:
    """Compressed RLE, as pycocotools has it, of a COCO segmentation: polygons or any RLE. Raises
    Unusable for all that would crash pycocotools, make it guess, or read memory not its own."""
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
    """Run lengths of a compressed RLE string: 5 bits per character, low bits first; bit 5 says that
    more follow, bit 4 of the last is the sign; from the fourth number on, differences to the last
    but one."""
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
            what = "" if annotation_id is None else f"annotation {annotation_id} of "
            raise UserError(f"{split}, {what}image {image_id}: {reason} (--strict)")


def read_annotations(path: Path) -> dict:
    """A parsed instances file. Raises UserError if it is missing or damaged."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        known = sorted(p.stem[10:] for p in path.parent.glob("instances_*.json"))
        remedy = f"splits found: {', '.join(known)}" if known else "check --coco-root"
        raise UserError(f"no annotation file {path}; {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({error}): download it again") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} has no list {key!r}: it is not a COCO instances file")
    return content


def category_labels(categories: list, classes: list[str], path: Path) -> dict[int, int | None]:
    """Label of each category id, None if not chosen. Raises UserError for an unknown class."""
    names = {}
    for category in categories:
        if isinstance(category, dict) and type(category.get("id")) is int:
            names[category["id"]] = category.get("name")
    known = [name for name in names.values() if isinstance(name, str)]
    for name in classes[1:]:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it knows {', '.join(known)}"
            raise UserError(f"{path} has no category {name!r}; {hint}")
    return {id_: classes.index(name) if name in classes else None for id_, name in names.items()}


def image_folder(root: Path, split: str) -> Path:
    """ROOT/<split> or ROOT/images/<split>. Raises UserError if neither exists."""
    for folder in (root / split, root / "images" / split):
        if folder.is_dir():
            return folder
    raise UserError(f"no images of {split}: neither {root / split} nor {root / 'images' / split}")


def index_split(
    root: Path, split: str, classes: list[str], masks: set[str], skipped: Skipped
) -> list[Task]:
    """The tasks of one split, with their annotations; `masks` holds the mask names taken so far."""
    path = root / "annotations" / f"instances_{split}.json"
    content = read_annotations(path)
    labels = category_labels(content["categories"], classes, path)
    folder = image_folder(root, split)
    inside = tuple(os.path.realpath(base) + os.sep for base in (root, folder))
    tasks, dropped = {}, set()
    for image in content["images"]:
        image_id = image.get("id") if isinstance(image, dict) else None
        try:
            if type(image_id) is not int or not 0 <= image_id < 2**63:
                raise Unusable("image without an id")
            if image_id in tasks:
                raise Unusable("duplicate image id")
            task = _image_task(image, split, root, folder, inside)
            if task.mask.casefold() in masks:
                raise Unusable("another image has the same mask name")
        except Unusable as reason:
            skipped.add(split, image_id, None, str(reason))
            if type(image_id) is int:
                dropped.add(image_id)
        else:
            tasks[image_id] = task
            masks.add(task.mask.casefold())
    missing = [task.path for task in tasks.values() if not task.path.is_file()]
    if missing:
        count = f"{len(missing)} of the {len(tasks)} images of {split}"
        raise UserError(f"{count} are missing (first: {missing[0]}): download them again")
    for annotation in content["annotations"]:
        _add_annotation(annotation, tasks, dropped, labels, split, skipped)
    return list(tasks.values())


def _image_task(image: dict, split: str, root: Path, folder: Path, inside: tuple[str, ...]) -> Task:
    height, width, name = image.get("height"), image.get("width"), image.get("file_name")
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        raise Unusable("image height or width is not a whole number from 1 up")
    if height * width > MAX_PIXELS:
        raise Unusable(f"image has more than {MAX_PIXELS} pixels")
    try:
        relative = PurePosixPath(name)
        path, mask = folder / relative, relative.stem + ".png"
        real, too_long = os.path.realpath(path), len(os.fsencode(mask)) > 255
    except (OSError, TypeError, ValueError):
        raise Unusable("file_name is not a file name") from None
    leads_away = relative.is_absolute() or ".." in relative.parts or "\\" in name
    if leads_away or not relative.stem or too_long:
        raise Unusable("file_name is not a file name")
    if not real.startswith(inside):
        raise Unusable("file_name leads out of the root")
    file = path.relative_to(root).as_posix()
    return Task(image["id"], split, path, file, mask, height, width, [])


def _add_annotation(annotation, tasks, dropped, labels, split, skipped) -> None:
    """Give its task an annotation of a chosen class; those of `dropped` images go with them."""
    fields = annotation if isinstance(annotation, dict) else {}
    image_id, category_id = fields.get("image_id"), fields.get("category_id")
    iscrowd, reason = fields.get("iscrowd", 0), None
    if type(image_id) is not int or image_id not in tasks:
        if type(image_id) is int and image_id in dropped:
            return
        reason = "annotation of an unknown image"
    elif type(category_id) is not int or category_id not in labels:
        reason = "category is not in categories"
    elif iscrowd not in (0, 1):
        reason = "iscrowd is neither 0 nor 1"
    if reason:
        skipped.add(split, image_id, fields.get("id", "?"), reason)
    elif labels[category_id] is not None:
        row = (fields.get("id", "?"), labels[category_id], iscrowd, fields.get("segmentation"))
        tasks[image_id].annotations.append(row)
