"""Image files of any kind as 8-bit RGB, and mask files, checked; errors that name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from common import IGNORE_INDEX, DataError


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(
            f"no image at {path}: the images moved? run prepare_masks.py again with --coco-root"
        ) from None
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no image, or of a format that Pillow does not know"
        raise DataError(f"cannot read the image {path} ({reason}): replace or remove it") from None


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Decode any image file to 8-bit RGB: 16 bits scaled down, transparency over white.

    COCO annotates the pixels as stored, so EXIF rotation is applied only where the turned image,
    and not the stored one, has the annotated `size` (height, width). Without `size` it always is.
    Raises DataError if the file is missing, not an image, or of neither size.
    """
    with _open_image(path) as image:
        turned = ImageOps.exif_transpose(image) if size is None or _size(image) != size else image
        if size is not None and _size(turned) != size:
            raise DataError(
                f"{path} is {image.height}x{image.width} (height x width), the annotations say "
                f"{size[0]}x{size[1]}: replace the image or run prepare_masks.py again"
            )
        return _rgb(turned)


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width that `read_image(path)` will have, from the header alone.

    Rarely the decoded image differs, as with EXIF behind the pixels of a PNG. Raises DataError if
    the file is missing or not an image.
    """
    with _open_image(path) as image:
        # A TIFF, whose EXIF is not in `info`, gives its upright size itself.
        exif = image.getexif() if "exif" in image.info else {}
        swapped = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if swapped else _size(image)


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


def _size(image: Image.Image) -> tuple[int, int]:
    return image.height, image.width


def read_mask(path: Path, classes: int) -> np.ndarray:
    """(H, W) uint8 labels. Raises DataError for a label that is neither a class nor 255."""
    try:
        with Image.open(path) as image:
            if image.mode != "L":
                raise DataError(f"{path} has mode {image.mode}, not L: run prepare_masks.py again")
            mask = np.array(image)
    except FileNotFoundError:
        raise DataError(f"no mask at {path}: run prepare_masks.py again") from None
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(
            f"cannot read the mask {path} ({error}): run prepare_masks.py again"
        ) from None
    wrong = mask[(mask >= classes) & (mask != IGNORE_INDEX)]
    if wrong.size:
        raise DataError(
            f"{path} holds the label {wrong[0]}, which is neither a class (0 to {classes - 1}) "
            f"nor {IGNORE_INDEX}: run prepare_masks.py again"
        )
    return mask
