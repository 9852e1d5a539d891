"""COCO instance annotations -> semantic masks for chosen classes.

    python prepare_masks.py --coco-root coco --split train2017 val2017 --out data

Writes data/masks_raw (class indices, mode L), data/masks_colored (RGB, to look at) and, last of
all, data/manifest.json: its presence means that the masks are complete.

What cannot be used of an annotation file is skipped, counted by reason and listed in the manifest.
"""

import argparse
import json
import multiprocessing
import os
import signal
import struct
import sys
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

import common
from coco import Skipped, Task, Unusable, encode, index_split
from common import BACKGROUND, IGNORE_INDEX, UserError, atomic_write, color_mask

CLASSES = ["person", "car", "bus", "dog"]
PRIORITY = ["dog", "person", "car", "bus"]  # what usually stands in front first


def encode_layers(task: Task, classes: int, crowd: str) -> tuple[dict[int, list[dict]], dict]:
    """RLEs by label (ignored crowds: 255), and what the manifest's row says of the annotations."""
    instances, crowds, skipped = [0] * classes, [0] * classes, defaultdict(list)
    layers = defaultdict(list)
    for annotation_id, label, iscrowd, segmentation in task.annotations:
        try:
            encoded = encode(segmentation, task.height, task.width)
        except Unusable as reason:
            skipped[str(reason)].append(annotation_id)
            continue
        (crowds if iscrowd else instances)[label] += 1
        if not iscrowd or crowd == "class":
            layers[label].append(encoded)
        elif crowd == "ignore":
            layers[IGNORE_INDEX].append(encoded)
    return layers, {"instances": instances, "crowds": crowds, "skipped": dict(skipped)}


def paint(layers: dict[int, list[dict]], paint_order: list[int], height, width) -> np.ndarray:
    """(H, W) uint8 labels. Each class is painted once, as the union of its instances, in
    `paint_order`; ignored crowds come first, so that any instance covers them."""
    mask = np.zeros((width, height), dtype=np.uint8)  # transposed: RLE runs down columns
    for label in [IGNORE_INDEX, *paint_order]:
        if label in layers:
            mask[rle.decode(rle.merge(layers[label])).T.view(bool)] = label
    return np.ascontiguousarray(mask.T)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W) or (H, W, 3) uint8, without a filter. Pillow tries five on each row of
    what has long runs anyway, and takes twice as long."""
    height, width = pixels.shape[:2]
    rows = pixels.reshape(height, -1)
    filtered = np.zeros((height, 1 + rows.shape[1]), dtype=np.uint8)  # 0 before each: no filter
    filtered[:, 1:] = rows

    def chunk(name: bytes, data: bytes) -> bytes:
        length, checksum = len(data), zlib.crc32(name + data)
        return struct.pack(">I", length) + name + data + struct.pack(">I", checksum)

    color_type = 2 if pixels.ndim == 3 else 0
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(filtered, level=1))
    return b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b"")


def mask_files(mask: np.ndarray, colors: tuple) -> tuple[bytes, bytes, list[int]]:
    """The index PNG and the coloured PNG of a mask, and the pixel count of each of 256 labels."""
    colored = np.asarray(color_mask(mask, colors))
    return png(mask), png(colored), Image.fromarray(mask).histogram()


@lru_cache(maxsize=1024)
def blank_files(height: int, width: int, colors: tuple) -> tuple[bytes, bytes, list[int]]:
    """`mask_files` of an image that holds none of the classes: made once per size."""
    return mask_files(np.zeros((height, width), dtype=np.uint8), colors)


def check_image_file(task: Task) -> None:
    """Compare an image's header with the stated size. Raises Unusable where they differ."""
    stated = task.width, task.height
    try:
        with Image.open(task.path) as image:
            size = image.size  # EXIF is looked at only where it matters: a PNG is decoded for it
            turned = size != stated and image.getexif().get(0x0112, 1) >= 5  # sides are swapped
    except Exception:  # a damaged header can make Pillow raise anything
        raise Unusable("image file is not readable") from None
    if stated != (size[::-1] if turned else size):
        raise Unusable("image file has another size than the annotations say")


def prepare_image(task: Task, out: Path, colors: tuple, paint_order: list[int], crowd: str) -> dict:
    """Write one image's masks and return its manifest row, or {"unusable": reason}."""
    try:
        check_image_file(task)
    except Unusable as reason:
        return {"unusable": str(reason)}
    layers, annotations = encode_layers(task, len(colors), crowd)
    if layers:
        mask = paint(layers, paint_order, task.height, task.width)
        raw, colored, pixels = mask_files(mask, colors)
    else:
        raw, colored, pixels = blank_files(task.height, task.width, colors)
    for folder, content in (("masks_raw", raw), ("masks_colored", colored)):
        with atomic_write(out / folder / task.mask, sync=False) as file:
            file.write(content)
    stated = {key: getattr(task, key) for key in ("id", "split", "file", "mask", "height", "width")}
    counted = {"pixels": pixels[: len(colors)], "ignored": pixels[IGNORE_INDEX]}
    return stated | counted | annotations


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()  # no orphans after kill -9 of the parent


def start_pool(workers: int) -> ProcessPoolExecutor:
    """Worker processes. On Linux they fork, which costs neither a second import nor its memory."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pool.submit(os.getpid).result()  # starts them now, while this process is small
    return pool


def prepare_images(prepare: Callable, tasks: list[Task], pool, skipped: Skipped) -> list[dict]:
    """The manifest's rows of the usable images; what could not be used is added to `skipped`."""
    results, rows = pool.map(prepare, tasks, chunksize=16) if pool else map(prepare, tasks), []
    progress = tqdm(results, total=len(tasks), unit="image", disable=None)
    try:
        for row, task in zip(progress, tasks):
            for reason, annotation_ids in row.get("skipped", {}).items():
                for annotation_id in annotation_ids:
                    skipped.add(task.split, task.id, annotation_id, reason)
            if "unusable" in row:
                skipped.add(task.split, task.id, None, row["unusable"])
            else:
                rows.append(row)
    except BrokenProcessPool:
        remedy = "try fewer --workers; with 1, the image after the newest in masks_raw is the cause"
        raise UserError(f"a worker died, killed or out of memory: {remedy}") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return rows


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.HelpFormatter)
    crowds = ["ignore", "class", "background"]
    add = parser.add_argument
    add("--coco-root", type=Path, required=True, help="holds annotations/ and the images")
    add("--out", type=Path, default=Path("data"), help="data directory to write")
    add("--split", nargs="+", default=["val2017"], help="instances_<split>.json to read")
    add("--classes", nargs="+", default=CLASSES, help="category names; labels 1, 2, ... in order")
    add("--priority", nargs="+", default=PRIORITY, help="wins overlaps; then the other classes")
    add("--crowd", choices=crowds, default="ignore", help="crowds become 255, their class, nothing")
    add("--workers", type=int, default=common.default_workers(), help="processes")
    add("--strict", action="store_true", help="stop at the first annotation that cannot be used")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Checked arguments. `classes` gets the background first, `priority` all the other classes."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give 1 or more")
    for flag, names in (("--classes", args.classes), ("--priority", args.priority)):
        for name in names:
            if names.count(name) > 1:
                parser.error(f"{flag} names {name!r} twice: name each class once")
    if BACKGROUND in args.classes:
        parser.error(f"{BACKGROUND!r} is always label 0: leave it out of --classes")
    if len(args.classes) >= IGNORE_INDEX:
        parser.error(f"{len(args.classes)} classes: at most {IGNORE_INDEX - 1} fit 8-bit masks")
    for name in args.priority:
        if name not in args.classes and args.priority != PRIORITY:
            parser.error(f"--priority names {name!r}, which --classes does not")
    first = [name for name in args.priority if name in args.classes]
    args.priority = first + [name for name in args.classes if name not in first]
    args.classes = [BACKGROUND, *args.classes]
    return args


def print_table(rows: list[dict], classes: list[str], skipped: Skipped) -> None:
    """Images, instances, crowds, pixels and share of the labelled pixels, a line per class."""
    counted = ("pixels", "instances", "crowds", "ignored")
    pixels, instances, crowds, ignored = (np.array([row[key] for row in rows]) for key in counted)
    images = (instances + crowds > 0).sum(axis=0)
    share = pixels.sum(axis=0) / max(pixels.sum(), 1)
    line = "{:<16}{:>9}{:>11}{:>8}{:>15}{:>9}".format
    print(line("class", "images", "instances", "crowds", "pixels", "share"))
    for label, name in enumerate(classes):
        columns = (images, instances.sum(axis=0), crowds.sum(axis=0))
        counts = [column[label] for column in columns] if label else [len(rows), "", ""]
        print(line(name, *counts, pixels[:, label].sum(), f"{share[label]:.2%}"))
    print(line("(ignored)", (ignored > 0).sum(), "", "", ignored.sum(), ""))
    for reason, count in skipped.reasons.most_common():
        print(f"skipped {count}: {reason}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    """Index the annotations, paint the masks, write the manifest, print the table."""
    args = parse_args(argv)
    root, splits = args.coco_root.resolve(), list(dict.fromkeys(args.split))
    if not root.is_dir():
        raise UserError(f"no folder {args.coco_root}: give the COCO root with --coco-root")
    pool = start_pool(args.workers) if args.workers > 1 else None
    skipped, masks, tasks = Skipped(args.strict), set(), []
    for split in splits:
        tasks += index_split(root, split, args.classes, masks, skipped)

    for folder in ("masks_raw", "masks_colored"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    (args.out / "manifest.json").unlink(missing_ok=True)  # before a mask is touched
    paint_order = [args.classes.index(name) for name in reversed(args.priority)]
    colors = tuple(common.class_colors(len(args.classes)))
    shared = {"out": args.out, "colors": colors, "paint_order": paint_order, "crowd": args.crowd}
    rows = prepare_images(partial(prepare_image, **shared), tasks, pool, skipped)
    if not rows:
        raise UserError(f"no usable image in {root} for {', '.join(splits)}")
    content = {
        "version": common.MANIFEST_VERSION,
        "root": str(root),
        "splits": splits,
        "classes": args.classes,
        "colors": colors,
        "ignore_index": IGNORE_INDEX,
        "ignore_color": common.IGNORE_COLOR,
        "priority": args.priority,
        "crowd": args.crowd,
        "skipped": skipped.rows,
        "images": rows,
    }
    common.write_text(args.out / "manifest.json", json.dumps(content))
    print_table(rows, args.classes, skipped)
    print(f"{len(rows)} masks in {args.out}")


if __name__ == "__main__":
    common.run_command(main)
