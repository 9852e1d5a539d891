"""Image and mask files of any kind, read and checked; errors name the file. Needs no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common import IGNORE_INDEX, UserError


@contextmanager
def _open(path: Path, kind: str, missing: str, damaged: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no {kind} at {path}: {missing}") from None
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no image, or of a format that Pillow does not know"
        raise UserError(f"cannot read the {kind} {path} ({reason}): {damaged}") from None


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode any image file to 8-bit RGB: 16 bits scaled down, transparency over white.

    COCO annotates the pixels as stored, so EXIF rotation is applied only where the turned image,
    and not the stored one, has the annotated `size` (height, width). Without `size` it always is.
    Raises UserError if the file is missing, not an image, or of neither size.
    """
    moved = "the images moved? run prepare_masks.py again with --coco-root"
    with _open(path, "image", moved, "replace or remove it") as image:
        stored = image.height, image.width
        turned = image if stored == size else ImageOps.exif_transpose(image)
        if size not in (None, (turned.height, turned.width)):
            found, stated = (f"{height}x{width}" for height, width in (stored, size))
            remedy = "replace the image or run prepare_masks.py again"
            raise UserError(f"{path} is {found}, the annotations say {stated}: {remedy}")
        return _rgb(turned)


def _rgb(image: Image.Image) -> Image.Image:
    image.load()  # some formats tell their mode only then
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white could be any number")
    if image.mode.startswith("I"):  # 16 bits: convert() would clip them at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() >= 2**16:
            raise ValueError("pixels of more than 16 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))  # as Pillow reads 16-bit colours
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def read_mask(path: Path, classes: int) -> np.ndarray:
    """(H, W) uint8 labels. Raises UserError for a label that is neither a class nor 255."""
    again = "run prepare_masks.py again"
    with _open(path, "mask", again, again) as image:
        if image.mode != "L":
            raise UserError(f"{path} has mode {image.mode}, not L: {again}")
        mask = np.array(image)
    wrong = mask[(mask >= classes) & (mask != IGNORE_INDEX)]
    if wrong.size:
        known = f"neither a class (0 to {classes - 1}) nor {IGNORE_INDEX}"
        raise UserError(f"{path} holds the label {wrong[0]}, which is {known}: {again}")
    return mask
