"""What people look at: masks laid over images, and panels of what a model gets wrong."""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import IGNORE_COLOR, IGNORE_INDEX, color_mask

OPACITY = 110  # of 255; outlines are opaque
ERROR_COLOR = (220, 30, 30)
PANEL, GAP = 320, 4  # a panel's width and largest height, and the space around it, in pixels
TITLES = ("image", "ground truth", "prediction", "errors")
WIDTH = len(TITLES) * (PANEL + GAP)


class Example(NamedTuple):
    """An image to draw. `prediction` and `mask` are (H, W) uint8, `caption` a line of words."""

    image: Image.Image
    prediction: np.ndarray
    mask: np.ndarray
    caption: str


def outline(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels, background excepted, that touch a pixel of another label."""
    edge = np.zeros(mask.shape, dtype=bool)
    for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        differ = mask[one] != mask[other]
        edge[one] |= differ
        edge[other] |= differ
    return edge & (mask != 0)


def overlay(image: Image.Image, mask: np.ndarray, colors: list) -> Image.Image:
    """An RGB picture with the classes of its (H, W) uint8 mask laid over it, thinly outlined.

    The background stays as it is; ignored pixels are white.
    """
    opacity = (mask != 0) * np.uint8(OPACITY)
    opacity[outline(mask)] = 255
    return Image.composite(color_mask(mask, colors), image, Image.fromarray(opacity))


def errors(image: Image.Image, prediction: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The picture pale and grey, wrong pixels red, ignored ones white."""
    pale = image.convert("L").point([128 + value // 3 for value in range(256)]).convert("RGB")
    for color, where in ((ERROR_COLOR, prediction != mask), (IGNORE_COLOR, mask == IGNORE_INDEX)):
        pale.paste(color, mask=Image.fromarray(where.astype(np.uint8) * 230))
    return pale


def draw_panels(examples: list[Example], classes: list[str], colors: list) -> Image.Image:
    """A legend, then for each example a row: image, ground truth, prediction, errors; caption."""
    strips = [_legend(classes, colors), *(_strip(example, colors) for example in examples)]
    return Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips]))


def _strip(example: Example, colors: list) -> Image.Image:
    """Drawn at the panel's size, so that an outline is as thin on a large image as on a small."""
    scale = PANEL / max(example.image.size)
    size = tuple(max(1, round(side * scale)) for side in example.image.size)
    image = example.image.resize(size)
    prediction, mask = (
        np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        for labels in (example.prediction, example.mask)
    )
    pictures = [image, overlay(image, mask, colors), overlay(image, prediction, colors)]
    pictures.append(errors(image, prediction, mask))
    lines, font = [""], ImageFont.load_default(13)
    for word in example.caption.split(" "):
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > WIDTH - 2 * GAP:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    strip = Image.new("RGB", (WIDTH, size[1] + 18 * len(lines) + 12), "white")
    for column, picture in enumerate(pictures):
        left = column * (PANEL + GAP) + GAP // 2 + (PANEL - size[0]) // 2  # portraits: centred
        strip.paste(picture, (left, 2))
    ImageDraw.Draw(strip).multiline_text((GAP, size[1] + 5), "\n".join(lines), "black", font)
    return strip


def _legend(classes: list[str], colors: list) -> Image.Image:
    font = ImageFont.load_default(15)
    entries = [*zip(classes[1:], colors[1:]), ("ignored", IGNORE_COLOR), ("wrong", ERROR_COLOR)]
    x, y, places = 6, 6, []
    for name, color in entries:
        width = 34 + round(font.getlength(name))
        if x > 6 and x + width > WIDTH:
            x, y = 6, y + 26
        places.append((x, y, name, color))
        x += width
    legend = Image.new("RGB", (WIDTH, y + 44), "white")
    draw = ImageDraw.Draw(legend)
    for x, y, name, color in places:
        draw.rectangle((x, y, x + 16, y + 16), fill=tuple(color), outline="black")
        draw.text((x + 21, y), name, "black", font)
    for column, title in enumerate(TITLES):
        x = column * (PANEL + GAP) + (PANEL - font.getlength(title)) / 2
        draw.text((x, legend.height - 20), title, "black", font)
    return legend
