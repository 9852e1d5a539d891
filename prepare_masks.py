"""COCO annotations from any tool, or your own masks -> semantic masks for the classes you choose.

    python prepare_masks.py --coco-root coco --split train2017 val2017 --out data
    python prepare_masks.py --annotations a.json --images-dir photos --classes all --out data
    python prepare_masks.py --masks labels --images-dir photos --classes sky road car --out data

Writes data/masks_raw (class indices, mode L), data/masks_colored (RGB, to look at) and finally
data/manifest.json, whose presence means that the masks are complete.

What cannot be used is skipped and counted by reason in the manifest. It never becomes background:
the box of such an annotation is 255, "ignore", or its image is left out.
"""

import argparse
import filecmp
import glob
import json
import multiprocessing
import os
import shutil
import signal
import struct
import sys
import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor
from pycocotools import mask as rle
from tqdm import tqdm

import coco
import common
from coco import Empty, Skipped, Source, Task, Unusable, encode, mask_names, whole
from common import BACKGROUND, IGNORE_INDEX, UserError, atomic_write, color_mask
from images import FORMATS, orientation, read_labels, rgb

CLASSES = ["person", "car", "bus", "dog"]
PRIORITY = ["dog", "person", "car", "bus"]  # what usually stands in front first
FOLDERS = ("masks_raw", "masks_colored")
COLUMNS = ("images", "instances", "crowds", "pixels")  # of the table
# "crowded": pixels of crowds; "drawn": pixels before other classes cover them; "filled":
# annotations with a ring in a ring.
COUNTS = ("instances", "crowds", "crowded", "drawn", "filled")


class Work(NamedTuple):
    """What is the same for all images: where they are, where masks go, how they are made."""

    root: Path
    folder: Path
    colors: tuple
    paint_order: list[int]
    crowd: str
    exif: str | None
    check: bool
    codes: dict | None


def encode_layers(
    annotations: Iterable[tuple[int, dict]], height: int, width: int, crowd: str, skipped: list
) -> tuple[dict[int, dict], dict]:
    """One RLE per label (255: ignored), and the `COUNTS` per label.

    What cannot be used is added to `skipped`, and its bbox is ignored. If it has none, this raises
    Unusable for the whole image.
    """
    layers, counts = defaultdict(list), {kind: Counter() for kind in COUNTS}
    for label, annotation in annotations:
        encoded, covers_nothing, iscrowd = None, False, whole(annotation.get("iscrowd") or 0)
        key = str(label)
        try:
            if iscrowd not in (0, 1):
                raise Unusable("iscrowd is neither 0 nor 1")
            encoded, lost, nested = encode(annotation.get("segmentation"), height, width)
            counts["filled"][key] += nested
            counts["crowded"][key] += int(rle.area(encoded)) * iscrowd
        except Unusable as reason:
            lost, covers_nothing = [str(reason)], isinstance(reason, Empty)
        skipped += [(annotation.get("id"), reason) for reason in lost]
        if encoded or covers_nothing:
            counts["crowds" if iscrowd else "instances"][key] += 1
        if encoded and not (iscrowd and crowd == "background"):
            layers[IGNORE_INDEX if iscrowd and crowd == "ignore" else label].append(encoded)
        # A ring of two points encloses nothing, so nothing is lost.
        if lost and not (encoded and set(lost) == {coco.TOO_SHORT}):
            if box := coco.encode_bbox(annotation.get("bbox"), height, width):
                layers[IGNORE_INDEX].append(box)
            elif not covers_nothing and not coco.states_nothing(annotation):
                raise Unusable("an annotation cannot be used, and has no bbox to ignore")
    merged = {label: rle.merge(layer) for label, layer in layers.items()}
    counts["drawn"].update({str(c): int(rle.area(layer)) for c, layer in merged.items()})
    return merged, counts


def paint(layers: dict[int, dict], paint_order: list[int], height, width) -> np.ndarray:
    """(H, W) uint8 labels. Each class is painted once, as the union of its instances, in
    `paint_order`. Ignored crowds come first, so that any instance covers them."""
    mask = np.zeros((width, height), dtype=np.uint8)  # transposed: RLE runs down columns
    for label in [IGNORE_INDEX, *paint_order]:
        if label in layers:
            mask[rle.decode(layers[label]).T.view(bool)] = label
    return np.ascontiguousarray(mask.T)


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W) or (H, W, 3) uint8, without filters. Pillow tries five filters per row,
    which takes twice as long and gains nothing on long runs."""
    height, width = pixels.shape[:2]
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0)))  # 0 before each: no filter

    def chunk(name: bytes, data: bytes) -> bytes:
        length, checksum = len(data), zlib.crc32(name + data)
        return struct.pack(">I", length) + name + data + struct.pack(">I", checksum)

    color_type = 2 if pixels.ndim == 3 else 0
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0))
    content = chunk(b"IDAT", zlib.compress(rows, level=1))
    return b"\x89PNG\r\n\x1a\n" + header + content + chunk(b"IEND", b"")


def mask_files(mask: np.ndarray, colors: tuple) -> tuple[bytes, bytes, dict]:
    """The index PNG and the coloured PNG of a mask, and its entries for the manifest."""
    counts = Image.fromarray(mask).histogram()
    pixels = {str(label): count for label, count in enumerate(counts[: len(colors)]) if count}
    counted = {"checksum": zlib.crc32(mask), "pixels": pixels, "ignored": counts[IGNORE_INDEX]}
    return png(mask), png(np.asarray(color_mask(mask, colors))), counted


@lru_cache(maxsize=1024)
def blank_files(height: int, width: int, colors: tuple) -> tuple[bytes, bytes, dict]:
    """`mask_files` of an image without any of the classes, made once per size."""
    return mask_files(np.zeros((height, width), dtype=np.uint8), colors)


def check_image(path: Path, height: int, width: int, work: Work) -> tuple[int, int, str | None]:
    """Height and width of an image as annotated, and what they say about EXIF: "upright" if its
    rotation was applied, "stored" if not, "unclear" if that cannot be told, None if there is none.

    Without a stated size, that of the file is taken. Raises Unusable if the sizes differ, or if the
    file is damaged: in its header, or with --check anywhere.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            size, stated = (image.height, image.width), (height, width)
            # EXIF may follow the pixels of a PNG, which Pillow would decode: only if sizes differ.
            looked = size != stated or "exif" in image.info or image.format == "TIFF"
            turns = orientation(image) if looked else 1
            if image.mode == "F":
                raise ValueError("floating-point pixels")
            if work.check:
                rgb(image)
    except Exception:  # a damaged file can make Pillow raise anything
        raise Unusable("image file is not readable") from None
    turned = size[::-1] if turns >= 5 else size
    upright = stated == turned if all(stated) else work.exif == "upright"
    clear = all(stated) and turned != size
    size, exif = (turned, "upright") if upright else (size, "stored")
    if all(stated) and size != stated:
        raise Unusable("image file has another size than its annotations or its mask")
    if size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise Unusable(f"image has more than {Image.MAX_IMAGE_PIXELS} pixels")
    return *size, (exif if clear else "unclear") if turns != 1 else None


def read_places(path: Path, places: list[tuple]) -> Iterator[tuple[int, dict]]:
    """(label, annotation) for each (label, start, end) in an annotation file."""
    with open(path, "rb") as file:
        for label, start, end in places:
            file.seek(start)
            yield label, json.loads(file.read(end - start))


def prepare_image(task: Task, work: Work) -> dict:
    """Write the masks of one image. Returns its row of the manifest, and in the same dict "counts"
    (the `COUNTS`), "exif" (of `check_image`) and "skipped" (pairs of annotation id and reason). If
    the image cannot be used, returns only "unusable", the reason, and "skipped"."""
    skipped, counts = [], {}
    size, mask = (task.height, task.width), None
    try:
        if task.annotations is None:
            mask = read_labels(task.source, work.codes)
            size = mask.shape
        height, width, exif = check_image(work.root / task.file, *size, work)
        if task.annotations:
            annotations = read_places(task.source, task.annotations)
            layers, counts = encode_layers(annotations, height, width, work.crowd, skipped)
            mask = paint(layers, work.paint_order, height, width) if layers else None
    except Unusable as reason:
        return {"unusable": str(reason), "skipped": skipped}
    blank = mask is None
    files = blank_files(height, width, work.colors) if blank else mask_files(mask, work.colors)
    for folder, content in zip(FOLDERS, files):
        path = work.folder / folder / task.mask
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, sync=False) as file:
            file.write(content)
    row = {"id": task.id, "split": task.split, "file": task.file, "mask": task.mask}
    row |= {"height": height, "width": width, **files[2]}
    return row | {"counts": counts, "exif": exif, "skipped": skipped}


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()  # no orphans after kill -9 of the parent


def start_pool(workers: int) -> ProcessPoolExecutor:
    """Worker processes. On Linux they fork, which saves a second import and its memory."""
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    workers = min(workers, 61)  # Windows cannot wait for more
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    pool.submit(os.getpid).result()  # starts them now, while this process is still small
    return pool


def prepare_images(tasks: list[Task], work: Work, pool, skipped: Skipped) -> tuple:
    """The manifest rows of the usable images; the `COLUMNS` and `COUNTS` by label; and how often
    each "exif" occurs in each split. What could not be used is added to `skipped`."""
    prepare, rows, exif = partial(prepare_image, work=work), [], defaultdict(Counter)
    totals = {name: Counter() for name in (*COLUMNS, *COUNTS)}
    results = pool.map(prepare, tasks, chunksize=16) if pool else map(prepare, tasks)
    progress = tqdm(results, total=len(tasks), unit="image", disable=None)
    try:
        for row, task in zip(progress, tasks):
            for annotation_id, reason in row.pop("skipped"):
                skipped.add("annotations", reason, task.split, task.file, annotation_id)
            if "unusable" in row:
                skipped.add("images", row["unusable"], task.split, task.file)
                continue
            counts = row.pop("counts") | {"pixels": row["pixels"]}
            for name, count in counts.items():
                totals[name].update(count)
            totals["images"].update({label for name in COLUMNS for label in counts.get(name, ())})
            exif[task.split][row.pop("exif")] += 1
            rows.append(row)
    except BrokenProcessPool:
        remedy = f"try fewer --workers; with 1, the image after the newest in {work.folder} did it"
        raise UserError(f"a worker died, killed or out of memory: {remedy}") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return rows, totals, exif


def refuse_empty(
    totals: dict, classes: list[str], args: argparse.Namespace, skipped: Skipped
) -> None:
    """Raise UserError, with the likely reason, if no mask holds a pixel of any class."""
    if totals["pixels"].keys() - {"0"}:
        return
    remedy = "; ".join(skipped.lines())
    if args.masks and remedy:
        remedy += ". A mask is named like its image; --mask-suffix says what its name has besides"
    elif skipped.annotations:
        remedy += ". Masks need polygons or RLE, as in COCO's instances files"
    if totals["crowds"] and not totals["instances"] and args.crowd != "class":
        remedy = "all annotations are crowds (iscrowd 1): use --crowd class if they are instances"
    found = "no mask holds a pixel of " + ", ".join(classes[1:9])
    found = found if totals["pixels"] else "no usable image"
    other = "nothing has these labels: try other --classes or, for masks, --colors (such as 255)"
    raise UserError(f"{found}: {remedy or other}")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder for masks and manifest. They replace those in `out` if all goes well; until then,
    and if it does not, those of an earlier run stay as they are.

    Raises UserError if `out` is in use, or holds what this script did not write.
    """
    manifest, work, new = out / "manifest.json", out / ".preparing", not out.exists()
    names = (manifest.name, *FOLDERS)
    try:
        ours = b'"ignore_index"' in manifest.read_bytes()
    except FileNotFoundError:
        ours = (out / ".lock").exists() or not any((out / folder).exists() for folder in FOLDERS)
    if not ours:
        what = f"{out} holds a manifest.json or masks that prepare_masks.py did not write"
        raise UserError(f"{what}: choose another --out")
    with common.locked(out):
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        work.mkdir()
        try:
            yield work
            # The old manifest goes first and the new one comes last: it means complete masks.
            moves = [(out / name, work / f"{name}.old") for name in names if (out / name).exists()]
            moves += [(work / name, out / name) for name in reversed(names)]
            try:
                for source, target in moves:
                    common.rename(source, target)
            except BaseException:  # on Windows, if a file in the folder is open
                for source, target in reversed(moves):
                    if not source.exists():
                        common.rename(target, source)
                raise
        finally:
            shutil.rmtree(out if new and not manifest.exists() else work, ignore_errors=True)


def files_by_stem(folder: Path, suffix: str, without: set) -> dict[str, str]:
    """The image files below a folder whose stems end with `suffix`, by the part before it."""
    kinds = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    found, names = {}, glob.glob("**", root_dir=folder, recursive=True)
    for name in sorted(name.replace(os.sep, "/") for name in names):
        stem, end = os.path.splitext(name)
        if end.lower() in kinds and stem.endswith(suffix) and folder / name not in without:
            other = found.setdefault(stem.removesuffix(suffix), name)
            if other != name:
                raise UserError(f"{folder}: {other} and {name} have the same name: move one away")
    if not found:
        raise UserError(f"no image files *{suffix} below {folder}: give another folder")
    return found


def mask_tasks(source: Source, root: Path, suffixes: list[str], skipped: Skipped) -> list[Task]:
    """A task for each image that has a mask with the same path below its folder, apart from the
    `suffixes` of the stems, those of masks and of images."""
    split, folder, tasks = source.split, source.folders[0], []
    mask_suffix, image_suffix = [*suffixes, ""][:2]
    masks = files_by_stem(source.path, mask_suffix, set())
    taken = {source.path / name for name in masks.values()} if any(suffixes) else set()
    images = files_by_stem(folder, image_suffix, taken)
    for stem in sorted(masks.keys() - images.keys()):
        skipped.add("annotations", "mask without an image", split, masks[stem])
    for stem, image in sorted(images.items()):
        try:
            if stem not in masks:
                raise Unusable("image without a mask")
            path, mask = folder / image, source.path / masks[stem]
            file = Path(os.path.relpath(path, root)).as_posix()
            task = Task(stem, split, file, image, 0, 0, mask, None)
            if earlier := skipped.earlier(path, task):
                if not filecmp.cmp(mask, earlier.source, shallow=False):
                    both = f"{earlier.source} and {mask} are different masks of the same image"
                    raise UserError(f"{both}: merge them, or prepare them separately")
                raise Unusable(f"image is in {earlier.split} too, and kept there")
            tasks.append(task)
        except Unusable as reason:
            skipped.add("images", str(reason), split, image)
    return tasks


def find_tasks(args: argparse.Namespace, skipped: Skipped) -> tuple[Path, list[str], list[Task]]:
    """The folder that holds all images, the classes by label, and a task for each image."""
    if args.coco_root:
        root = Path(os.path.abspath(args.coco_root))
        sources = coco.find_sources(root, args.split)
    else:
        folders = [Path(os.path.abspath(folder)) for folder in args.images_dir]
        try:
            root = Path(os.path.commonpath(folders))
        except ValueError:
            raise UserError("--images-dir: give folders on one drive") from None
        paths = [Path(os.path.abspath(path)) for path in args.annotations or args.masks]
        sources = list(map(Source, args.split, paths, [[folder] for folder in folders]))
    if args.masks:
        classes = [BACKGROUND, *args.classes]
        found = (mask_tasks(source, root, args.mask_suffix, skipped) for source in sources)
    else:
        indexes = [coco.read_index(source) for source in sources]
        classes = coco.choose_classes(args.classes, indexes)
        found = (coco.split_tasks(index, root, classes, skipped) for index in indexes)
    tasks = [task for part in found for task in part]
    paths = [f"{task.split}/{task.mask}" if len(sources) > 1 else task.mask for task in tasks]
    names = mask_names(paths)
    return root, classes, [task._replace(mask=name) for task, name in zip(tasks, names)]


def paint_order(priority: list[str], classes: list[str]) -> list[int]:
    """Labels in the order of painting; the last one wins. Raises UserError for an unknown name."""
    if len(classes) > IGNORE_INDEX:
        raise UserError(f"{len(classes) - 1} classes: at most {IGNORE_INDEX - 1} fit 8-bit masks")
    for name in priority:
        if name not in classes[1:] and priority != PRIORITY:
            raise UserError(f"--priority names {name!r}, which --classes does not")
    order = dict.fromkeys([name for name in priority if name in classes] + classes[1:])
    return [classes.index(name) for name in reversed(order)]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    crowds = ["ignore", "class", "background"]
    group = parser.add_argument_group("input: one of the first three")
    add = group.add_mutually_exclusive_group(required=True).add_argument
    add("--coco-root", type=Path, help="annotation files and images as the tool exported them")
    add("--annotations", type=Path, nargs="+", metavar="FILE", help="COCO files, any layout")
    add("--masks", type=Path, nargs="+", metavar="DIR", help="index or RGB masks, one per image")
    add = group.add_argument
    add("--images-dir", type=Path, nargs="+", metavar="DIR", help="their images: one each, or one")
    add("--split", nargs="+", help="names of splits (default: val2017, or else all)")
    add = parser.add_argument_group("masks").add_argument
    add("--out", type=Path, default=Path("data"), help="data directory to write")
    classes = f"labels 1, 2, ... in order; all: every category (default: {' '.join(CLASSES)})"
    add("--classes", nargs="+", help=classes)
    add("--priority", nargs="+", default=PRIORITY, help="classes in front, the first wins")
    add("--crowd", choices=crowds, default="ignore", help="what crowds become: 255, class, 0")
    exif = "which picture was annotated (default: as the stated sizes show)"
    add("--exif", choices=["stored", "upright"], help=exif)
    add("--colors", nargs="+", help="for --masks: value of each class, or colour: R,G,B or #RRGGBB")
    add("--ignore", nargs="+", default=[], help="for --masks: values or colours that become 255")
    suffixes = "for --masks: what their stems end with, and what those of the images end with"
    add("--mask-suffix", nargs="+", default=[""], help=suffixes)
    add = parser.add_argument_group("run").add_argument
    add("--check", action="store_true", help="decode every image, to find truncated ones")
    add("--strict", action="store_true", help="stop at the first thing that cannot be used")
    add("--workers", type=int, default=common.default_workers(), help="processes")
    return parser


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Checked arguments, with a `split` and an `images_dir` per file, and the `codes` of masks."""
    parser = build_parser()
    args = parser.parse_args(argv)
    paths = args.annotations or args.masks or []
    if bool(paths) != bool(args.images_dir):
        parser.error("--images-dir belongs to --annotations and to --masks: give both")
    if paths:
        if len(args.images_dir) == 1:
            args.images_dir *= len(paths)
        args.split = args.split or [coco.split_name(path) for path in paths]
        if not len(paths) == len(args.images_dir) == len(set(args.split)) == len(args.split):
            files = "--annotations or --masks"
            parser.error(f"give as many --images-dir (or one) and different --split as {files}")
        if any(Path(split).name != split for split in args.split):
            parser.error(f"--split {' '.join(args.split)}: give names without slashes")
    if args.masks and not args.classes:
        parser.error("--masks: give --classes, the names of the values 1, 2, ...")
    if args.masks and (args.crowd != "ignore" or args.priority != PRIORITY):
        parser.error("--crowd and --priority belong to annotations, not to --masks")
    if not args.masks and (args.colors or args.ignore or any(args.mask_suffix)):
        parser.error("--colors, --ignore and --mask-suffix belong to --masks")
    if len(args.mask_suffix) > 2:
        parser.error("--mask-suffix: give one for the masks, and perhaps one for the images")
    args.classes = args.classes or CLASSES
    for flag, names in (("--classes", args.classes), ("--priority", args.priority)):
        for name in names:
            if names.count(name) > 1:
                parser.error(f"{flag} names {name!r} twice: name each class once")
    if BACKGROUND in args.classes and not args.colors:
        parser.error(f"{BACKGROUND!r} is always label 0: leave it out of --classes")
    args.codes = mask_codes(parser, args) if args.masks else None
    args.classes = [name for name in args.classes if name != BACKGROUND]
    return args


def mask_codes(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """The label of each value, or (red, green, blue), that masks may hold. The background is 0 or
    black, unless it is named among the classes."""

    def parsed(text: str) -> int | tuple:
        try:
            color = f"rgb({text})" if "," in text else text
            return int(text) if text.isdecimal() else ImageColor.getrgb(color)[:3]
        except ValueError:
            parser.error(f"{text!r} is neither a value nor a colour: give 7, 255,0,0 or #ff0000")

    values = [parsed(text) for text in args.colors or map(str, range(1, len(args.classes) + 1))]
    ignored = [parsed(text) for text in args.ignore]
    if len(values) != len(args.classes):
        parser.error(f"--colors: {len(values)} for {len(args.classes)} classes: give one for each")
    if len({type(value) for value in values + ignored}) > 1:
        parser.error("--colors and --ignore: give values or colours, not both")
    for value in values + ignored:
        if (values + ignored).count(value) > 1:
            parser.error(f"--colors and --ignore name {value} twice: give each class its own")
    plain, labels = isinstance(values[0], int), dict(zip(args.classes, values))
    background = labels.pop(BACKGROUND, 0 if plain else (0, 0, 0))
    codes = {background: 0} | ({IGNORE_INDEX: IGNORE_INDEX} if plain else {})
    codes |= dict.fromkeys(ignored, IGNORE_INDEX)
    return codes | {value: label for label, value in enumerate(labels.values(), start=1)}


def exif_of(splits: list[str], found: dict[str, Counter]) -> dict[str, str]:
    """Whether each split was annotated on "stored" or "upright" pictures: as its sizes show, or
    else those of the other splits, which the same tool wrote; by default as in COCO, "stored"."""
    total = sum(found.values(), Counter())
    if total["unclear"] and not total["upright"] + total["stored"]:
        seen = f"note: EXIF rotates {total['unclear']} images, and no size shows if it was applied"
        print(f"{seen} before annotation: if the masks look wrong, use --exif upright")
    shown = {s: found[s] if found[s]["upright"] + found[s]["stored"] else total for s in splits}
    return {split: "upright" if shown[split]["upright"] else "stored" for split in splits}


def print_notes(totals: dict[str, Counter], classes: list[str], crowd: str) -> None:
    """Point out what may not be intended: many crowds, covered classes, rings in rings."""
    hidden = []
    for label, name in enumerate(classes):
        kinds = ("crowds", "instances", "crowded", "drawn", "pixels")
        crowds, instances, crowded, drawn, pixels = (totals[kind][str(label)] for kind in kinds)
        if crowd == "ignore" and (10 * crowds > instances or crowded > drawn):
            found = f"note: {crowds} of {crowds + instances} {name} are crowds (iscrowd 1), ignored"
            print(f"{found}: --crowd class if they are objects, as brushes and Roboflow write them")
        if label and 2 * pixels < drawn:
            hidden.append(f"{name} ({1 - pixels / drawn:.0%})")
    if hidden:
        print(f"note: other classes cover {', '.join(hidden)}: name those in front in --priority")
    if nested := totals["filled"].total():
        print(f"note: {nested} annotations have a ring in a ring, which is filled: holes need RLE")


def print_table(rows: list[dict], totals: dict[str, Counter], classes: list[str]) -> None:
    """Images, instances, crowds, pixels and share of the labelled pixels, a line per class."""
    line = "{:<16}{:>9}{:>11}{:>8}{:>15}{:>9}".format
    print(line("class", *COLUMNS, "share"))
    for label, name in enumerate(classes):
        counts = [totals[column][str(label)] for column in COLUMNS]
        counts = counts if label else [len(rows), "", "", counts[-1]]
        print(line(name, *counts, f"{counts[-1] / totals['pixels'].total():.2%}"))
    ignored = [row["ignored"] for row in rows if row["ignored"]]
    print(line("(ignored)", len(ignored), "", "", sum(ignored), ""))


def main(argv: list[str] | None = None) -> None:
    """Index the annotations, paint the masks, write the manifest, print the table."""
    args = parse_args(argv)
    with start_pool(args.workers) if args.workers > 1 else nullcontext() as pool:
        prepare(args, pool)


def prepare(args: argparse.Namespace, pool: ProcessPoolExecutor | None) -> None:
    """`main` with its arguments and the workers."""
    skipped = Skipped(args.strict)
    root, classes, tasks = find_tasks(args, skipped)
    order, colors = paint_order(args.priority, classes), tuple(common.class_colors(len(classes)))
    with replacing(args.out) as folder:
        work = Work(root, folder, colors, order, args.crowd, args.exif, args.check, args.codes)
        rows, totals, exif = prepare_images(tasks, work, pool, skipped)
        refuse_empty(totals, classes, args, skipped)
        splits = list(dict.fromkeys(task.split for task in tasks))
        content = {
            "version": common.MANIFEST_VERSION,
            "root": str(root),
            "splits": splits,
            "classes": classes,
            "colors": colors,
            "ignore_index": IGNORE_INDEX,
            "ignore_color": common.IGNORE_COLOR,
            "priority": [classes[label] for label in reversed(order)],
            "crowd": args.crowd,
            "exif": dict.fromkeys(splits, args.exif) if args.exif else exif_of(splits, exif),
            "skipped": {"images": skipped.images, "annotations": skipped.annotations},
            "images": sorted(rows, key=lambda row: (row["split"], str(row["id"]))),
        }
        common.write_text(folder / "manifest.json", json.dumps(content))
    print_table(rows, totals, classes)
    print_notes(totals, classes, args.crowd)
    for line in skipped.lines():
        print(f"skipped {line}", file=sys.stderr)
    print(f"{len(rows)} masks in {args.out}")


if __name__ == "__main__":
    common.run_command(main)
