"""Pictures of masks: overlays with outlines, and panels of what a model gets wrong.

overlay(image, mask, colors).save("overlay.png")
draw_panels(manifest, examples).save("panels.png")
"""

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common import IGNORE_COLOR, IGNORE_INDEX, Manifest, color_mask
from images import read_image

OPACITY = 110  # of 255; outlines are opaque
ERROR_COLOR = (220, 30, 30)
PANEL, GAP = 320, 4  # a panel's width and largest height, and the space around it, in pixels
TITLES = ("image", "ground truth", "prediction", "errors")


class Example(NamedTuple):
    """An image to draw. `prediction` and `mask` are (H, W) uint8, `caption` a line of words."""

    row: int
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


def draw_panels(manifest: Manifest, examples: list[Example]) -> Image.Image:
    """A legend, then for each example a row: image, ground truth, prediction, errors; caption."""
    strips = [_legend(manifest), *(_strip(manifest, example) for example in examples)]
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet


def _strip(manifest: Manifest, example: Example) -> Image.Image:
    """Drawn at the panel's size, so that an outline is as thin on a large image as on a small."""
    height, width = (int(n) for n in manifest.sizes[example.row])
    scale = PANEL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = read_image(manifest.root / manifest.files[example.row], (height, width)).resize(size)
    prediction, mask = (
        np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        for labels in (example.prediction, example.mask)
    )
    pictures = [
        image,
        overlay(image, mask, manifest.colors),
        overlay(image, prediction, manifest.colors),
        errors(image, prediction, mask),
    ]
    font = ImageFont.load_default(13)
    total = len(TITLES) * (PANEL + GAP)
    lines = _wrapped(example.caption.split(" "), total - 2 * GAP, font)
    strip = Image.new("RGB", (total, size[1] + 18 * len(lines) + 12), "white")
    for column, picture in enumerate(pictures):
        left = column * (PANEL + GAP) + GAP // 2 + (PANEL - size[0]) // 2  # portraits: centred
        strip.paste(picture, (left, 2))
    for number, line in enumerate(lines):
        ImageDraw.Draw(strip).text((GAP, size[1] + 5 + 18 * number), line, "black", font)
    return strip


def _wrapped(words: list[str], width: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Lines of words, each no wider than `width` unless a single word is."""
    lines = [words[0]]
    for word in words[1:]:
        longer = f"{lines[-1]} {word}"
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _legend(manifest: Manifest) -> Image.Image:
    font = ImageFont.load_default(15)
    entries = [*zip(manifest.classes[1:], manifest.colors[1:])]
    entries += [("ignored", IGNORE_COLOR), ("wrong", ERROR_COLOR)]
    total, x, y, places = len(TITLES) * (PANEL + GAP), 6, 6, []
    for name, color in entries:
        width = 34 + round(font.getlength(name))
        if x > 6 and x + width > total:
            x, y = 6, y + 26
        places.append((x, y, name, color))
        x += width
    legend = Image.new("RGB", (total, y + 44), "white")
    draw = ImageDraw.Draw(legend)
    for x, y, name, color in places:
        draw.rectangle((x, y, x + 16, y + 16), fill=tuple(color), outline="black")
        draw.text((x + 21, y), name, "black", font)
    for column, title in enumerate(TITLES):
        x = column * (PANEL + GAP) + (PANEL - font.getlength(title)) / 2
        draw.text((x, legend.height - 20), title, "black", font)
    return legend
