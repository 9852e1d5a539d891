"""Masks and overlays of any images, from a checkpoint.

    python predict.py --ckpt runs/deeplab/best.pt --images photos "more/**/*.jpg" --out predictions

Each image gives predictions/masks_raw/<stem>.png (labels), masks_colored/<stem>.png and
overlays/<stem>.jpg, and probabilities/<stem>.png if asked for, in the size of the picture: as a
viewer shows it, turned by EXIF, where those of the training were, else as stored. A file that is
not an image, or whose stem another image has taken, is named and skipped; the exit code is then 1.
"""

import argparse
import glob
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import common
from common import UserError
from dataset import evaluation_input, padded_size, to_tensor
from evaluate import Predictor, load_predictor
from images import read_image
from models import load_checkpoint, pick_device
from report import overlay

OUTPUTS = {"masks_raw": ".png", "masks_colored": ".png", "overlays": ".jpg"}
PROBABILITIES = {"probabilities": ".png"}  # of the labels: 1 to 255 for 1/255 to 1
LONGEST_JPEG = 65_500  # pixels per side


def find_files(names: list[str]) -> list[Path]:
    """The files that `names` (of files or folders, or globs) stand for, in order, each once.

    A folder stands for its own files, not for hidden ones or those of its subfolders.
    """
    files = {}
    for name in names:
        # A file may be called "a[1].jpg": a name is a pattern only where nothing has it.
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        found = []
        for match in map(Path, matches):
            own = sorted(match.iterdir()) if match.is_dir() else [match]
            found += [p for p in own if not p.is_dir() and (p is match or p.name[0] != ".")]
        if not found:
            raise UserError(f"no files at {name}: name files, folders, or a glob in quotes")
        for path in found:
            files.setdefault(os.path.abspath(path), path)
    return list(files.values())


def read(path: Path, upright: bool) -> Image.Image | UserError:
    """The image, turned by EXIF if `upright`, or why it cannot be used."""
    if not path.is_file():  # a pipe would be waited for
        return UserError(f"{path} is not a file")
    try:
        image = read_image(path, upright=upright)
    except UserError as error:
        return error
    longest = f"{path} has {max(image.size)} pixels per side, a JPEG at most {LONGEST_JPEG}"
    return UserError(longest) if max(image.size) > LONGEST_JPEG else image


def batches(
    files: list[Path], size: int, upright: bool, batch_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[Path, Image.Image]]]:
    """The images among `files` in batches of one padded size; names those that it skips."""
    stems = {}
    for first in tqdm(range(0, len(files), batch_size), unit="batch", disable=None):
        chunk, groups = files[first : first + batch_size], defaultdict(list)
        for path, image in zip(chunk, pool.map(partial(read, upright=upright), chunk)):
            taken = stems.get(path.stem.casefold())  # some file systems know no case
            if not isinstance(image, UserError) and taken:
                image = UserError(f"{path} would have the same outputs as {taken}")
            if isinstance(image, UserError):
                tqdm.write(f"skipped: {image}", file=sys.stderr)
                continue
            stems[path.stem.casefold()] = path
            groups[padded_size(image.height, image.width, size)].append((path, image))
        yield from groups.values()


@torch.inference_mode()
def predict_labels(
    predictor: Predictor, images: list[Image.Image], probabilities: bool
) -> Iterator[list[np.ndarray]]:
    """(H, W) uint8 labels of each image, RGB of one padded size: those that evaluate.py gives; and
    their `probabilities`, if wanted, (H, W) uint8 in 255ths."""
    inputs = [evaluation_input(to_tensor(image), predictor.size) for image in images]
    sizes = [(image.height, image.width) for image in images]
    for logits, size in zip(predictor.logits(torch.stack(inputs), sizes), sizes):
        labels, probability = predictor.labels_and_probability(logits, *size, probabilities)
        found = [labels]
        if probabilities:
            found.append((255 * probability).round().clamp(1, 255).byte())
        yield [tensor.cpu().numpy() for tensor in found]


def write_outputs(
    out: Path, colors: list, shown: list[bool], item: tuple[Path, Image.Image], found: list
) -> None:
    """Write mask, coloured mask and overlay of an image, and what else was `found`, from (H, W)
    uint8 labels. Those that are not `shown` become background."""
    (path, image), (labels, *probability) = item, found
    labels = labels if all(shown) else labels * np.array(shown)[labels]
    pictures = [Image.fromarray(labels), common.color_mask(labels, colors)]
    pictures += [overlay(image, labels, colors), *map(Image.fromarray, probability)]
    for (folder, suffix), picture in zip((OUTPUTS | PROBABILITIES).items(), pictures):
        common.write_image(out / folder / (path.stem + suffix), picture)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    add = parser.add_argument
    images = "files, folders (without their subfolders), globs in quotes (** takes in subfolders)"
    add("--ckpt", required=True, metavar="PATH", help="checkpoint")
    add("--images", required=True, nargs="+", metavar="FILE_OR_FOLDER", help=images)
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder to write to")
    probability = "write probabilities/<stem>.png too: of the label, in 255ths"
    add("--probabilities", action="store_true", help=probability)
    add("--classes", nargs="+", metavar="CLASS", help="write these only, others as background")
    add("--flip", action="store_true", help="average with what the mirror image gives")
    exif = "picture that is segmented (default: as in the training)"
    add("--exif", choices=["stored", "upright"], help=exif)
    add("--batch-size", type=int, help="images at once (default: 8 on a GPU; 2 on a CPU, for 4 GB)")
    amp = "autocast (default: as in training)"
    add("--amp", choices=["auto", "off", "bf16", "fp16"], help=amp)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Predict batch by batch; returns the exit code: 1 if a file was skipped, else 0."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch-size {args.batch_size}: give 1 or more")
    device = pick_device(args.device)
    batch_size = args.batch_size or (2 if device.type == "cpu" else 8)
    files = find_files(args.images)
    inputs = {os.path.realpath(path) for path in files}
    folders = OUTPUTS | (PROBABILITIES if args.probabilities else {})
    outputs = [args.out / k / (path.stem + end) for path in files for k, end in folders.items()]
    for output in outputs:
        if os.path.realpath(output) in inputs:
            raise UserError(f"{output} would overwrite an input: choose another --out")
    state = load_checkpoint(args.ckpt, mmap=True)
    classes, colors = state["classes"], state["colors"]
    for name in args.classes or []:
        if name not in classes[1:]:
            raise UserError(f"--classes {name}: choose from {', '.join(classes[1:])}")
    shown = [args.classes is None or name in args.classes for name in classes]
    predictor = load_predictor(args.ckpt, device, args.amp, flip=args.flip)
    upright = state.get("upright", True) if args.exif is None else args.exif == "upright"
    del state  # the optimizer's part is twice as large as the model
    for folder in folders:
        (args.out / folder).mkdir(parents=True, exist_ok=True)

    warnings.filterwarnings("ignore", module="PIL")  # on metadata, without the file's name
    done = 0
    with ThreadPoolExecutor(common.default_workers()) as pool:
        for batch in batches(files, predictor.size, upright, batch_size, pool):
            images = [image for _, image in batch]
            found = predict_labels(predictor, images, args.probabilities)
            write = partial(write_outputs, args.out, colors, shown)
            done += sum(1 for _ in pool.map(write, batch, found))
    skipped = len(files) - done
    print(f"images: {done}, skipped files: {skipped}; {', '.join(folders)} are in {args.out}")
    return 1 if skipped else 0


if __name__ == "__main__":
    common.run_command(main)
