"""COCO instance annotations -> semantic masks for chosen classes.

    python prepare_masks.py --coco-root coco --split train2017 val2017 --out data

Writes data/masks_raw (class indices, mode L), data/masks_colored (RGB, to look at) and, last of
all, data/manifest.json: its presence means that the masks are complete.

What cannot be used of an annotation file is skipped, counted by reason and listed in the manifest.
"""

import argparse
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
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from coco import Skipped, Task, Unusable, encode, index_split
from common import (
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

CHUNK = 16


class Settings(NamedTuple):
    """What holds for all images. `paint_order`: labels from the back to the front."""

    out: Path
    colors: tuple[tuple[int, int, int], ...]
    paint_order: list[int]
    crowd: str


# --- one image -----------------------------------------------------------------------------------


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


# --- workers -------------------------------------------------------------------------------------


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


# --- command line --------------------------------------------------------------------------------


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
