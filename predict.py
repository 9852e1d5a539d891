"""Masks and overlays of any images, from a checkpoint.

    python predict.py --ckpt runs/deeplab/best.pt --images photos "more/**/*.jpg" --out predictions

Each image gives predictions/masks_raw/<stem>.png (labels), masks_colored/<stem>.png and
overlays/<stem>.jpg, in the size of the picture as a viewer shows it: EXIF rotation is applied. A
file that is not an image, or whose stem another image has taken, is named and skipped; the exit
code is then 1.
"""

import argparse
import glob
import io
import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import (
    DataError,
    color_mask,
    command_parser,
    default_workers,
    run_command,
    write_whole,
)
from dataset import evaluation_input, like_batches, padded_size, to_tensor
from evaluate import batch_logits, native_prediction
from images import read_image, upright_size
from models import ModelError, amp_dtype, load_checkpoint, model_from_checkpoint, pick_device
from report import overlay

OUTPUTS = {"masks_raw": ".png", "masks_colored": ".png", "overlays": ".jpg"}
LONGEST_JPEG = 65_500  # pixels a side


# --- files ---------------------------------------------------------------------------------------


def find_files(names: list[str]) -> list[Path]:
    """The files that `names` (of files or folders, or globs) stand for, in order, each once.

    A folder stands for its own files but the hidden ones, not for those of its subfolders. Raises
    DataError for a name that stands for none.
    """
    files = {}
    for name in names:
        # A file may be called "a[1].jpg": a name is a pattern only where nothing has it.
        matches = [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True))
        try:
            found = [path for match in matches for path in _own_files(Path(match))]
        except OSError as error:
            raise DataError(f"cannot list {name}: {error.strerror}") from None
        if not found:
            raise DataError(f"no files at {name}: name files, folders, or a glob in quotes")
        for path in found:
            files.setdefault(os.path.abspath(path), path)
    return list(files.values())


def _own_files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.iterdir()) if file.name[0] != "." and not file.is_dir()]


def find_images(files: list[Path]) -> tuple[list[Path], list[tuple[int, int]]]:
    """The images among `files` and their upright sizes, by their headers; names what it skips."""
    images, sizes = {}, []
    for path in tqdm(files, desc="headers", unit="file", leave=False, disable=None):
        try:
            if not path.is_file():  # a pipe would be waited for
                raise DataError(f"{path} is not a file")
            size = upright_size(path)
            if max(size) > LONGEST_JPEG:
                raise DataError(
                    f"{path} has {max(size)} pixels a side, a JPEG {LONGEST_JPEG} at most"
                )
            stem = path.stem.casefold()  # some file systems know no case
            if stem in images:
                raise DataError(f"{path} would have the same outputs as {images[stem]}")
        except DataError as error:
            skip(error)
        else:
            images[stem] = path
            sizes.append(size)
    return list(images.values()), sizes


def skip(reason: DataError) -> None:
    """Name a file that is left out, without disturbing the progress bar."""
    tqdm.write(f"skipped: {reason}", file=sys.stderr)


def check_overwriting(out: Path, images: list[Path], files: list[Path]) -> None:
    """Raises DataError if an output of `images` would take the place of one of `files`."""
    inputs = {os.path.realpath(path) for path in files}
    for folder, suffix in OUTPUTS.items():
        place = os.path.realpath(out / folder)
        for path in images:
            if os.path.join(place, path.stem + suffix) in inputs:
                raise DataError(
                    f"the output for {path} would overwrite an input, {path.stem}{suffix} in "
                    f"{out / folder}: choose another --out"
                )


def make_folders(out: Path) -> None:
    """Make the output folders. Raises DataError."""
    try:
        for folder in OUTPUTS:
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror}): choose another --out") from None


def write_outputs(
    out: Path, stem: str, image: Image.Image, labels: np.ndarray, colors: list[tuple[int, int, int]]
) -> None:
    """Write mask, coloured mask and overlay, from (H, W) uint8 labels. Raises DataError."""
    raw, colored, laid_over = (out / folder / (stem + end) for folder, end in OUTPUTS.items())
    write_image(raw, Image.fromarray(labels))
    write_image(colored, color_mask(labels, colors))
    write_image(laid_over, overlay(image, labels, colors))


def write_image(path: Path, image: Image.Image) -> None:
    """Write a PNG or JPEG whole or not at all. Raises DataError."""
    encoded = io.BytesIO()
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    # Each takes what is its own; subsampled colours would blur the outlines.
    image.save(encoded, kind, compress_level=1, quality=90, subsampling=0)
    write_whole(path, encoded.getbuffer(), sync=False)


# --- prediction ----------------------------------------------------------------------------------


@torch.inference_mode()
def predict_images(
    model: torch.nn.Module,
    images: list[Image.Image],
    size: int,
    device: torch.device,
    dtype: torch.dtype | None,
) -> Iterator[np.ndarray]:
    """(H, W) uint8 labels of each of `images`, RGB of one padded size, as `evaluate.py` has them.

    One at a time, so that the logits of native size of only one image exist.
    """
    inputs = torch.stack([evaluation_input(to_tensor(image), size) for image in images])
    for image, logits in zip(images, batch_logits(model, inputs, device, dtype)):
        yield native_prediction(logits, image.height, image.width, size).cpu().numpy()


def read_batch(
    paths: list[Path], size: int, pool: ThreadPoolExecutor
) -> list[list[tuple[Path, Image.Image]]]:
    """The images at `paths`, grouped by their padded size; names those that are damaged.

    There is one group, unless a header has told another size than the decoded image has.
    """
    groups = {}
    for path, image in zip(paths, pool.map(_read, paths)):
        if isinstance(image, DataError):
            skip(image)
        else:
            shape = padded_size(image.height, image.width, size)
            groups.setdefault(shape, []).append((path, image))
    return list(groups.values())


def _read(path: Path) -> Image.Image | DataError:
    try:
        return read_image(path)
    except DataError as error:
        return error


# --- command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser(
        "Write the mask, the coloured mask and an overlay of any images.",
        'python predict.py --ckpt runs/deeplab/best.pt --images photos "more/**/*.jpg"',
    )
    add = parser.add_argument
    images = "files, folders (without their subfolders), globs in quotes (** takes in subfolders)"
    add("--ckpt", required=True, metavar="PATH", help="checkpoint")
    add("--images", required=True, nargs="+", metavar="FILE_OR_FOLDER", help=images)
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder to write to")
    add("--batch-size", type=int, help="images at once (default: 8 on a GPU; 2 on a CPU, for 4 GB)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast")
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
    dtype = amp_dtype(args.amp, device)
    files = find_files(args.images)
    state = load_checkpoint(args.ckpt)
    model = model_from_checkpoint(state, device)
    size, colors = state["args"]["size"], state["colors"]
    del state  # the optimizer's part is twice as large as the model

    warnings.filterwarnings("ignore", module="PIL")  # on metadata, without the file's name
    paths, sizes = find_images(files)
    check_overwriting(args.out, paths, files)
    make_folders(args.out)
    done = 0
    with (
        ThreadPoolExecutor(default_workers()) as pool,
        tqdm(total=len(paths), unit="image", disable=None) as bar,
    ):
        for batch in like_batches(sizes, size, batch_size):
            for group in read_batch([paths[index] for index in batch], size, pool):
                labels = predict_images(model, [image for _, image in group], size, device, dtype)
                writing = [
                    pool.submit(write_outputs, args.out, path.stem, image, mask, colors)
                    for (path, image), mask in zip(group, labels)
                ]
                for future in writing:
                    future.result()
                done += len(group)
            bar.update(len(batch))
    skipped = len(files) - done
    print(f"images: {done}, skipped files: {skipped}; {', '.join(OUTPUTS)} are in {args.out}")
    return 1 if skipped else 0


if __name__ == "__main__":
    run_command(main, DataError, ModelError)
