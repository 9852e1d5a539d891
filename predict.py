"""Masks and overlays of any images, from a checkpoint.

    python predict.py --ckpt runs/deeplab/best.pt --images photos "more/**/*.jpg" --out predictions

Each image gives predictions/masks_raw/<stem>.png (labels), masks_colored/<stem>.png,
overlays/<stem>.jpg, and on request probabilities/<stem>.png, all at the size of the picture. EXIF
rotation is applied if it was in training. A file that is not an image, or has the same stem as
another image, is reported and skipped; the exit code is then 1.
"""

import argparse
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

import common
from common import UserError
from dataset import evaluation_input, padded_size, resized_size
from evaluate import Predictor, add_running, check_running, load_predictor
from images import orientation, read_image
from models import load_checkpoint, pick_device
from report import overlay
from tiles import best_labels

OUTPUTS = {"masks_raw": ".png", "masks_colored": ".png", "overlays": ".jpg"}
PROBABILITIES = {"probabilities": ".png"}  # of the labels: 1 to 255 for 1/255 to 1
LONGEST_JPEG = 65_500  # pixels per side
STRIP = 2**20  # pixels that are drawn at once
LARGEST = 2**29  # pixels of a picture for --tile: 2 GB; else Pillow's own limit, 2**27.4


def find_files(names: list[str]) -> list[Path]:
    """The files that `names` (files, folders or globs) stand for, in order, each once.

    A folder stands for the files in it, without hidden ones and without its subfolders.
    """
    files = {}
    for name in names:
        found = []
        for match in map(Path, filter(os.path.lexists, common.ArgumentParser.expanded(name))):
            own = sorted(match.iterdir()) if match.is_dir() else [match]
            found += [p for p in own if not p.is_dir() and (p is match or p.name[0] != ".")]
        if not found:
            raise UserError(f"no files at {name}: name files, folders, or a glob in quotes")
        for path in found:
            files.setdefault(os.path.abspath(path), path)
    return list(files.values())


def read(path: Path, upright: bool) -> Image.Image:
    """The image, rotated by EXIF if `upright`. Raises UserError if it cannot be used."""
    if not path.is_file():  # opening a pipe would wait forever
        raise UserError(f"{path} is not a file")
    image = read_image(path, upright=upright)
    if (longest := max(image.size)) > LONGEST_JPEG:
        raise UserError(f"{path} has {longest} pixels per side, a JPEG at most {LONGEST_JPEG}")
    return image


def batches(
    files: list[Path], size: int, upright: bool, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[Path, Image.Image]]]:
    """The images among `files` in batches of the same padded size; names those that it skips. Keeps
    no reference to a batch that it has yielded, since one picture may take gigabytes."""
    stems, told = {}, upright  # upright pictures need no note
    for first in tqdm(range(0, len(files), batch_size), unit="batch", disable=None):
        chunk, groups = files[first : first + batch_size], defaultdict(list)
        futures = [pool.submit(read, path, upright) for path in chunk]
        for path, future in zip(chunk, futures):
            try:
                image = future.result()
                stem = path.stem.casefold()  # some file systems know no case
                if (taken := stems.setdefault(stem, path)) != path:
                    raise UserError(f"{path} would have the same outputs as {taken}")
            except UserError as error:
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            if not told and orientation(image) != 1:
                note = f"note: EXIF rotates {path}, but it is used as stored, as in training"
                tqdm.write(f"{note}: use --exif upright for what a viewer shows", file=sys.stderr)
                told = True
            groups[padded_size(image.height, image.width, size)].append((path, image))
        image = future = futures = None  # `groups` alone may refer to the images
        while groups:
            yield groups.popitem()[1]


@torch.inference_mode()
def predict_labels(
    predictor: Predictor, images: list[Image.Image], probabilities: bool
) -> Iterator[list[np.ndarray]]:
    """(H, W) uint8 labels of each of several RGB images of the same padded size, as evaluate.py
    gives them, and if wanted their `probabilities`, (H, W) uint8 in 255ths."""
    if predictor.tiling:
        found = (predictor.tiled(image, probabilities) for image in images)
    else:
        inputs = [evaluation_input(pil_to_tensor(image), predictor.size) for image in images]
        sizes = [(image.height, image.width) for image in images]
        widths = [resized_size(*size, predictor.size)[1] for size in sizes]
        logits = predictor.logits(torch.stack(inputs), widths)
        planes = (predictor.planes(each, *size) for each, size in zip(logits, sizes))
        found = (best_labels(each, probabilities) for each in planes)
    for tensors in found:
        yield [tensor.cpu().numpy() for tensor in tensors if tensor is not None]


def write_outputs(
    out: Path, colors: list, shown: list[bool], item: tuple[Path, Image.Image], found: list
) -> None:
    """Write mask, coloured mask and overlay of an image, from what was `found`: (H, W) uint8
    labels, and perhaps probabilities. Labels not `shown` become background. Changes the image."""
    (path, image), (labels, *probability) = item, found
    probability = [part * np.array([True, *shown[1:]])[labels] for part in probability]
    labels = labels if all(shown) else (np.arange(len(shown)) * shown).astype(np.uint8)[labels]

    def write(folder: str, picture: Image.Image) -> None:
        name = path.stem + (OUTPUTS | PROBABILITIES)[folder]
        common.write_image(out / folder / name, picture)

    write("masks_raw", Image.fromarray(labels))
    draw_over(image, labels, partial(overlay, colors=colors))
    write("overlays", image)
    draw_over(image, labels, lambda _, part: common.color_mask(part, colors))
    write("masks_colored", image)
    for picture in probability:
        write("probabilities", Image.fromarray(picture))


def draw_over(image: Image.Image, labels: np.ndarray, draw: Callable) -> None:
    """Replace an image by what `draw` makes of it and its labels, strip by strip, so that a large
    picture does not exist twice."""
    height = max(1, STRIP // image.width)
    for top in range(0, image.height, height):
        # With the rows beside them, on which outlines depend.
        first, last = max(0, top - 1), min(image.height, top + height + 1)
        strip = draw(image.crop((0, first, image.width, last)), labels[first:last])
        image.paste(strip.crop((0, top - first, image.width, top - first + height)), (0, top))


def check_outputs(out: Path, folders: dict[str, str], files: list[Path]) -> None:
    """Raise UserError if an output would take the place of an input, or of prepared masks."""
    if (out / "manifest.json").exists():
        raise UserError(f"{out} holds what prepare_masks.py wrote: choose another --out")
    inputs = {os.path.realpath(path) for path in files}
    for output in (out / k / (path.stem + end) for path in files for k, end in folders.items()):
        if os.path.realpath(output) in inputs:
            raise UserError(f"{output} would overwrite an input: choose another --out")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    add = parser.add_argument
    images = "files, folders (without their subfolders), globs in quotes (** takes in subfolders)"
    add("--ckpt", required=True, metavar="PATH", help="checkpoint")
    add("--images", required=True, nargs="+", metavar="FILE_OR_FOLDER", help=images)
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder to write to")
    probability = "also write probabilities/<stem>.png: of the written labels, in 255ths"
    add("--probabilities", action="store_true", help=probability)
    add("--classes", nargs="+", metavar="CLASS", help="write only these; others become background")
    exif = "which picture to segment (default: as in training)"
    add("--exif", choices=["stored", "upright"], help=exif)
    batch = "images, or windows, at once (default: 8 on a GPU; on a CPU 2 images, or 1 window)"
    add("--batch-size", type=int, help=batch)
    add_running(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Predict batch by batch; returns the exit code: 1 if a file was skipped, else 0."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_running(parser, args)
    device = pick_device(args.device)
    default = (1 if args.tile else 2) if device.type == "cpu" else 8
    args.batch_size = args.batch_size or default
    if args.tile:
        Image.MAX_IMAGE_PIXELS = LARGEST // 2  # Pillow refuses what has twice as many
    files = find_files(args.images)
    folders = OUTPUTS | (PROBABILITIES if args.probabilities else {})
    check_outputs(args.out, folders, files)
    state = load_checkpoint(args.ckpt, mmap=True)
    classes, colors = state["classes"], state["colors"]
    for name in args.classes or []:
        if name not in classes[1:]:
            raise UserError(f"--classes {name}: choose from {', '.join(classes[1:])}")
    shown = [args.classes is None or name in args.classes for name in classes]
    predictor = load_predictor(state, device, args)
    upright = state.get("upright", True) if args.exif is None else args.exif == "upright"
    del state  # the optimizer's part is twice as large as the model
    for folder in folders:
        (args.out / folder).mkdir(parents=True, exist_ok=True)

    warnings.filterwarnings("ignore", module="PIL")  # on metadata, without the file's name
    done = 0
    with ThreadPoolExecutor(common.default_workers()) as pool:
        count = 1 if args.tile else args.batch_size
        for batch in batches(files, predictor.size, upright, count, pool):
            found = predict_labels(predictor, [image for _, image in batch], args.probabilities)
            write = partial(write_outputs, args.out, colors, shown)
            done += len(list(pool.map(write, batch, found)))
            del batch, found  # before the next is read
    skipped = len(files) - done
    print(f"images: {done}, skipped files: {skipped}; {', '.join(folders)} are in {args.out}")
    return 1 if skipped else 0


if __name__ == "__main__":
    common.run_command(main)
