"""COCO instance annotations -> semantic masks for chosen classes.

    python prepare_masks.py --coco-root coco --split train2017 val2017 --out data

Writes data/masks_raw (class indices, mode L), data/masks_colored (RGB, to look at) and, last of
all, data/manifest.json: its presence means that the masks are complete.

An annotation file is never trusted: whatever it states is checked before pycocotools, which is C,
gets to see it. What cannot be used is skipped, counted by reason and listed in the manifest.
"""

import argparse
import difflib
import json
import multiprocessing
import os
import signal
import struct
import sys
import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from manifest import (
    BACKGROUND,
    IGNORE_COLOR,
    IGNORE_INDEX,
    MANIFEST_VERSION,
    DataError,
    class_colors,
    color_mask,
    command_parser,
    default_workers,
    run_command,
    write_json,
)

CLASSES = ["person", "car", "bus", "dog"]
PRIORITY = ["dog", "person", "car", "bus"]  # what usually stands in front first

# pycocotools walks a polygon's outline at five points a pixel, in 32-bit integers: 1e8 crashes it.
MAX_COORDINATE = 1e6
MAX_OUTLINE = 2e6
MAX_PIXELS = Image.MAX_IMAGE_PIXELS
CHUNK = 16


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


class Settings(NamedTuple):
    """What holds for all images. `paint_order`: labels from the back to the front."""

    out: Path
    colors: tuple[tuple[int, int, int], ...]
    paint_order: list[int]
    crowd: str


class Unusable(ValueError):
    """An annotation or an image that cannot be used; the text is the reason."""


# --- segmentations -----------------------------------------------------------------------------


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


# --- one image ---------------------------------------------------------------------------------


def encode_layers(task: Task, settings: Settings) -> tuple[dict[int, list[dict]], dict]:
    """RLEs by label (ignored crowds: 255), and what the manifest's row says of the annotations."""
    count = len(settings.colors)
    instances, crowds, skipped = [0] * count, [0] * count, defaultdict(list)
    layers = defaultdict(list)
    for annotation_id, label, iscrowd, segmentation in task.annotations:
        try:
            encoded = encode(segmentation, task.height, task.width)
        except Unusable as reason:
            skipped[str(reason)].append(annotation_id)
            continue
        (crowds if iscrowd else instances)[label] += 1
        if not iscrowd or settings.crowd == "class":
            layers[label].append(encoded)
        elif settings.crowd == "ignore":
            layers[IGNORE_INDEX].append(encoded)
    return layers, {"instances": instances, "crowds": crowds, "skipped": dict(skipped)}


def paint(
    layers: dict[int, list[dict]], paint_order: list[int], height: int, width: int
) -> np.ndarray:
    """(H, W) uint8 labels. Each class is painted once, as the union of its instances, in
    `paint_order`; ignored crowds come first, so that any instance covers them."""
    mask = np.zeros((width, height), dtype=np.uint8)  # transposed: RLE runs down columns
    for label in [IGNORE_INDEX, *paint_order]:
        if label in layers:
            mask[rle.decode(rle.merge(layers[label])).T.view(bool)] = label
    return np.ascontiguousarray(mask.T)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W) or (H, W, 3) uint8.

    Pillow tries five filters on each row of what has long runs anyway, and takes twice as long.
    """
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    filtered = np.zeros((height, 1 + rows.shape[1]), dtype=np.uint8)  # 0 before each: no filter
    filtered[:, 1:] = rows
    color_type = 2 if pixels.ndim == 3 else 0
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0),
        b"IDAT": zlib.compress(filtered, level=1),
        b"IEND": b"",
    }
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, data in chunks.items():
        checksum = zlib.crc32(data, zlib.crc32(name))
        parts += [struct.pack(">I", len(data)), name, data, struct.pack(">I", checksum)]
    return b"".join(parts)


def mask_files(mask: np.ndarray, colors: tuple) -> tuple[bytes, bytes, list[int]]:
    """The index PNG and the coloured PNG of a mask, and the pixel count of each of 256 labels."""
    colored = np.asarray(color_mask(mask, colors))
    return png(mask), png(colored), Image.fromarray(mask).histogram()


@lru_cache(maxsize=1024)
def blank_files(height: int, width: int, colors: tuple) -> tuple[bytes, bytes, list[int]]:
    """`mask_files` of an image that holds none of the classes: made once a size."""
    return mask_files(np.zeros((height, width), dtype=np.uint8), colors)


def check_image_file(task: Task) -> None:
    """Compare an image's header with the stated size. Raises Unusable where they differ."""
    try:
        with Image.open(task.path) as image:
            sizes = [(image.height, image.width)]
            if image.getexif().get(0x0112, 1) >= 5:  # EXIF orientations that swap the sides
                sizes.append((image.width, image.height))
    except Exception:  # a damaged header can make Pillow raise anything
        raise Unusable("image file is not readable") from None
    if (task.height, task.width) not in sizes:
        raise Unusable("image file has another size than the annotations say")


def prepare_image(task: Task, settings: Settings) -> dict:
    """Write one image's masks and return its manifest row, or {"unusable": reason}."""
    try:
        check_image_file(task)
    except Unusable as reason:
        return {"unusable": str(reason)}
    layers, annotations = encode_layers(task, settings)
    size = task.height, task.width
    if layers:
        files = mask_files(paint(layers, settings.paint_order, *size), settings.colors)
    else:
        files = blank_files(*size, settings.colors)
    raw, colored, counts = files
    write_file(settings.out / "masks_raw" / task.mask, raw)
    write_file(settings.out / "masks_colored" / task.mask, colored)
    return {
        "id": task.image_id,
        "split": task.split,
        "file": task.file,
        "mask": task.mask,
        "height": task.height,
        "width": task.width,
        "pixels": counts[: len(settings.colors)],
        "ignored": counts[IGNORE_INDEX],
        **annotations,
    }


def write_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. Raises DataError."""
    try:
        path.write_bytes(content)
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise DataError(f"cannot write {path}: {error.strerror}") from None


# --- annotation files --------------------------------------------------------------------------


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


# --- workers -----------------------------------------------------------------------------------


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()  # no orphans after kill -9 of the parent


def _prepare_chunk(chunk: list[Task], settings: Settings) -> list[tuple[int, dict]]:
    return [(task.index, prepare_image(task, settings)) for task in chunk]


def start_pool(workers: int) -> ProcessPoolExecutor:
    """Worker processes. On Linux they fork, which costs neither a second import nor its memory."""
    method = "fork" if sys.platform == "linux" else None
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pool.submit(os.getpid).result()  # starts them now, while this process is small
    return pool


def prepare_images(
    tasks: list[Task], settings: Settings, workers: int, pool: ProcessPoolExecutor | None
) -> Iterator[tuple[int, dict]]:
    """(task index, row) of every task, in the order in which they are done.

    If a worker dies, the images that were under way are done again, one by one, each in a process
    of its own; the row of the one that kills that too is {"unusable": reason}.
    """
    if pool is None:
        for task in tasks:
            yield task.index, prepare_image(task, settings)
        return
    chunks = (tasks[first : first + CHUNK] for first in range(0, len(tasks), CHUNK))
    under_way: dict[Future, list[Task]] = {}
    broken: list[Task] = []

    def submit(chunks: Iterable[list[Task]]) -> None:
        for chunk in chunks:
            try:
                under_way[pool.submit(_prepare_chunk, chunk, settings)] = chunk
            except BrokenProcessPool:
                broken.extend(chunk)

    try:
        submit(islice(chunks, 3 * workers))
        while under_way or broken:
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                chunk = under_way.pop(future)
                try:
                    yield from future.result()
                except BrokenProcessPool:
                    broken.extend(chunk)
            if broken and not under_way:
                yield from _one_by_one(broken, settings)
                broken.clear()
                pool = start_pool(workers)
                submit(islice(chunks, 3 * workers))
            elif not broken:
                submit(islice(chunks, len(done)))
    finally:
        pool.shutdown(cancel_futures=True)


def _one_by_one(tasks: list[Task], settings: Settings) -> Iterator[tuple[int, dict]]:
    tqdm.write(f"a worker died; the {len(tasks)} images under way are done again, one by one")
    for task in tasks:
        with start_pool(1) as pool:
            try:
                yield from pool.submit(_prepare_chunk, [task], settings).result()
            except BrokenProcessPool:
                yield task.index, {"unusable": "a worker process died on it"}


# --- command line ------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser(
        "Turn COCO instance annotations into semantic masks for chosen classes.",
        "python prepare_masks.py --coco-root coco --split val2017 --out data",
    )
    crowds = ["ignore", "class", "background"]
    add = parser.add_argument
    add("--coco-root", type=Path, required=True, help="holds annotations/ and the images")
    add("--out", type=Path, default=Path("data"), help="data directory to write")
    add("--split", nargs="+", default=["val2017"], help="instances_<split>.json to read")
    add("--classes", nargs="+", default=CLASSES, help="category names; labels 1, 2, ... in order")
    add("--priority", nargs="+", default=PRIORITY, help="wins overlaps; then the other classes")
    add("--crowd", choices=crowds, default="ignore", help="crowds become 255, their class, nothing")
    add("--workers", type=int, default=default_workers(), help="processes")
    add("--strict", action="store_true", help="stop at the first annotation that cannot be used")
    return parser


def checked_classes(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Class names with the background first, and all of them in order of priority.

    Raises DataError for a class named twice, the background, or too many classes.
    """
    for flag, names in (("--classes", args.classes), ("--priority", args.priority)):
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise DataError(f"{flag} names {twice[0]!r} twice: name each class once")
    if BACKGROUND in args.classes:
        raise DataError(f"{BACKGROUND!r} is always label 0: leave it out of --classes")
    if len(args.classes) >= IGNORE_INDEX:
        raise DataError(f"{len(args.classes)} classes: at most {IGNORE_INDEX - 1} fit 8-bit masks")
    unknown = [name for name in args.priority if name not in args.classes]
    if unknown and args.priority != PRIORITY:
        raise DataError(f"--priority names {unknown[0]!r}, which --classes does not")
    first = [name for name in args.priority if name in args.classes]
    return [BACKGROUND, *args.classes], first + [n for n in args.classes if n not in first]


def print_table(rows: list[dict], classes: list[str]) -> None:
    """Images, instances, crowds, pixels and share of the labelled pixels, a line a class."""
    pixels, instances, crowds = (
        np.array([row[key] for row in rows]) for key in ("pixels", "instances", "crowds")
    )
    images = (instances + crowds > 0).sum(axis=0)
    share = pixels.sum(axis=0) / max(pixels.sum(), 1)
    ignored = np.array([row["ignored"] for row in rows])
    line = "{:<16}{:>9}{:>11}{:>8}{:>15}{:>9}".format
    print(line("class", "images", "instances", "crowds", "pixels", "share"))
    for label, name in enumerate(classes):
        columns = (images, instances.sum(axis=0), crowds.sum(axis=0))
        counts = [column[label] for column in columns] if label else [len(rows), "", ""]
        print(line(name, *counts, pixels[:, label].sum(), f"{share[label]:.2%}"))
    print(line("(ignored)", (ignored > 0).sum(), "", "", ignored.sum(), ""))


def make_folders(out: Path) -> None:
    """Make the output folders, and take away an earlier manifest before a mask is touched."""
    try:
        for folder in ("masks_raw", "masks_colored"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror}): choose another --out") from None


def collect(results: Iterator, tasks: list[Task], skipped: Skipped) -> list[dict]:
    """Rows of the usable images, in the order of the tasks; what was skipped goes on its list."""

    def note(task: Task, row: dict) -> None:
        for reason, annotation_ids in row.get("skipped", {}).items():
            for annotation_id in annotation_ids:
                skipped.add(task.split, task.image_id, annotation_id, reason)
        if "unusable" in row:
            skipped.add(task.split, task.image_id, None, row["unusable"])

    rows: list[dict | None] = [None] * len(tasks)
    for index, row in tqdm(results, total=len(tasks), unit="image", disable=None):
        rows[index] = row
        if skipped.strict:
            note(tasks[index], row)  # stops here; the list below is in order instead
    for task, row in zip(tasks, rows):
        note(task, row)
    return [row for row in rows if "unusable" not in row]


def main(argv: list[str] | None = None) -> None:
    """Index the annotations, paint the masks, print the table, write the manifest."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give 1 or more")
    classes, priority = checked_classes(args)
    root, splits = args.coco_root.resolve(), list(dict.fromkeys(args.split))
    if not root.is_dir():
        raise DataError(f"no folder {args.coco_root}: give the COCO root with --coco-root")
    pool = start_pool(args.workers) if args.workers > 1 else None
    skipped, masks, tasks = Skipped(args.strict), set(), []
    for split in splits:
        tasks += index_split(root, split, classes, masks, skipped, len(tasks))

    make_folders(args.out)
    paint_order = [classes.index(name) for name in reversed(priority)]
    settings = Settings(args.out, tuple(class_colors(len(classes))), paint_order, args.crowd)
    rows = collect(prepare_images(tasks, settings, args.workers, pool), tasks, skipped)
    if not rows:
        raise DataError(f"no usable image in {root} for {', '.join(splits)}")
    print_table(rows, classes)
    for reason, count in skipped.reasons.most_common():
        print(f"skipped {count}: {reason}", file=sys.stderr)
    content = {
        "version": MANIFEST_VERSION,
        "root": str(root),
        "splits": splits,
        "classes": classes,
        "colors": settings.colors,
        "ignore_index": IGNORE_INDEX,
        "ignore_color": IGNORE_COLOR,
        "priority": priority,
        "crowd": args.crowd,
        "skipped": skipped.rows,
        "images": rows,
    }
    write_json(args.out / "manifest.json", content, indent=None)
    print(f"{len(rows)} masks in {args.out}")


if __name__ == "__main__":
    run_command(main, DataError)
