"""Image and mask files of any kind, read and checked; errors name the file. Needs no torch."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common import UserError

# Formats of photographs and masks. Each of Pillow's forty other decoders would be a risk.
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF", "TGA"]


@contextmanager
def _open(path: Path, kind: str, missing: str, damaged: str) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"no {kind} at {path}: {missing}") from None
    except Exception as error:  # a damaged file can make Pillow's decoders raise anything
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image, or in a format that is not accepted"
        if isinstance(error, Image.DecompressionBombError):
            reason, damaged = "more pixels than Pillow accepts", "use predict.py --tile"
        raise UserError(f"cannot read the {kind} {path} ({reason}): {damaged}") from None


def orientation(image: Image.Image) -> int:
    """The EXIF orientation: 1 means that nothing is to be turned, 5 and above swap height and
    width. Damaged EXIF counts as 1."""
    value = None
    with suppress(Exception):  # whatever Pillow makes of it
        value = image.getexif().get(0x0112)
    return value if isinstance(value, int) else 1


def read_image(
    path: Path, size: tuple[int, int] | None = None, upright: bool = True, scale: int = 1
) -> Image.Image:
    """Decode any image file to 8-bit RGB. More bits are scaled down; transparency becomes white.

    EXIF rotation is applied if `upright`. But if only the stored or only the rotated image has the
    annotated `size` (height, width), that one is returned. A JPEG is shrunk by `scale` (1, 2, 4 or
    8) while it is decoded, which saves time; its sides are rounded up.
    Raises UserError if the file is missing, not an image, or of neither size.
    """
    moved = "did the images move? Give their folder with --coco-root"
    with _open(path, "image", moved, "replace or remove it") as image:
        stored = image.height, image.width
        turned = stored[::-1] if (turns := orientation(image)) >= 5 else stored
        if size not in (None, stored, turned):
            found, stated = f"{image.height}x{image.width}", f"{size[0]}x{size[1]}"
            remedy = "replace the image or run prepare_masks.py again"
            raise UserError(f"{path} is {found}, the annotations say {stated}: {remedy}")
        # As `upright` says, unless only the other of the two pictures has the size.
        turn = size in (None, turned) if upright else size not in (None, stored)
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        if turn and turns != 1:
            with suppress(Exception):  # damaged EXIF; damaged pixels will be met again
                image = ImageOps.exif_transpose(image)
        return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any picture, as `read_image` returns it. May raise any error."""
    image.load()  # some formats know their mode only then
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose white could be any number")
    if image.mode.startswith("I"):  # more than 8 bits, which convert() would clip at 255
        image = _scaled(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _scaled(image: Image.Image) -> Image.Image:
    """Reduce up to 16 bits to 8. A file with 12-bit data says 16, which would make it almost black:
    so the brightest pixel decides how many bits there are, unless a TIFF states fewer than 16."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 2**16:
        raise ValueError("pixels of more than 16 bits")
    stated = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # BitsPerSample
    bits = stated if stated < 16 else max(8, int(values.max()).bit_length())
    return Image.fromarray((values >> (bits - 8)).astype(np.uint8))


def read_mask(path: Path, checksum: int) -> np.ndarray:
    """(H, W) uint8 labels, as prepare_masks.py wrote them. Raises UserError if they do not have the
    `checksum`, so no label is out of range."""
    again = "run prepare_masks.py again"
    with _open(path, "mask", again, again) as image:
        mask = np.array(image)
    if checksum != zlib.crc32(mask):
        changed = "is not the mask that the manifest described when this run began"
        raise UserError(f"{path} {changed}: start again, or {again} if it was changed since")
    return mask


def read_labels(path: Path, codes: dict) -> np.ndarray:
    """(H, W) uint8 labels from a user's mask: an index image, or RGB if the `codes` are colours.
    `codes` maps each value that may occur to its label; any other value raises UserError."""
    colors = isinstance(next(iter(codes)), tuple)
    with _open(path, "mask", "is it a file?", "export it again") as image:
        if image.format == "JPEG":
            raise UserError(f"{path} is a JPEG, which blurs labels: export the masks as PNG")
        if not colors and image.mode not in ("L", "P", "1", "I", "I;16"):
            raise UserError(f"{path} is {image.mode}: give the colour of each class with --colors")
        values = np.array(image.convert("RGBA") if colors else image).astype(np.int32)
    if colors:
        values, alpha = values[..., :3] @ np.array((65536, 256, 1), dtype=np.int32), values[..., 3]
        if ((alpha > 0) & (alpha < 255)).any():
            raise UserError(f"{path} has half-transparent pixels: export it without smooth edges")
        codes = {red * 65536 + green * 256 + blue: v for (red, green, blue), v in codes.items()}
    labels = np.full(values.shape, -1, dtype=np.int16)
    for code, label in codes.items():
        labels[values == code] = label
    if colors:
        labels[alpha == 0] = 0  # erased
    if labels.min() < 0:
        value = values[labels < 0][0]
        value = f"#{value:06x}" if colors else value
        remedy = "name its class, or background, in --classes and --colors, or give it to --ignore"
        raise UserError(f"{path} holds {value}, which is no class: {remedy}")
    return labels.astype(np.uint8)
