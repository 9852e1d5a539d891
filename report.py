"""What people look at: a page, training curves, and panels that show what a model gets wrong.

page([Shown(...), ...], winners, command)   # one HTML file, without scripts or other files
curves(history, classes, colors)            # an SVG picture of a run's metrics.jsonl
draw_panels(examples, classes, colors)      # rows of pictures, as one
"""

import base64
import io
import math
import textwrap
from contextlib import suppress
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import metrics
from common import IGNORE_COLOR, IGNORE_INDEX, color_mask
from metrics import Table, percent, span

OPACITY = 110  # of 255; outlines are opaque
ERROR_COLOR = (220, 30, 30)
PANEL, GAP = 320, 4  # a panel's width and largest height, and the space around it, in pixels
TITLES = ("image", "ground truth", "prediction", "errors")
WIDTH, KEYS = len(TITLES) * (PANEL + GAP), 8  # of the panels; entries of their legend in a row
PICTURE = 400  # longest side of a picture of the page, in pixels
MANY = 11  # with more classes, a chart names the best and worst, and tables are set row by row
CHART, LEFT, RIGHT, TOP, BOTTOM = (440, 250), 56, 320, 34, 214  # a chart, and the edges of its plot

STYLE = Path(__file__).with_suffix(".css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


class Shown(NamedTuple):
    """What a page shows of a checkpoint: its `metrics.report`, the lines of metrics.jsonl, the
    colours of its classes, tables on how it was made, and `figures` as HTML."""

    entry: dict
    history: list[dict]
    colors: list
    facts: list[Table]
    figures: list[str]


class Example(NamedTuple):
    """An image to draw. `prediction` and `mask` are (H, W) uint8, `caption` a line of words."""

    image: Image.Image
    prediction: np.ndarray
    mask: np.ndarray
    caption: str


def page(
    shown: list[Shown], winners: list[int | None], command: str, merged: list[Table] | None = None
) -> str:
    """HTML in one file. `winners` are those of `metrics.winners`, `command` is what made the page,
    and `merged` are tables to show first."""
    entries, classes = [each.entry for each in shown], shown[0].entry["classes"]
    title, (head, *_) = metrics.comparison_table(entries)
    rows, means = [], [*metrics.MEANS, "pixel_accuracy"]
    for number, entry in enumerate(entries):
        values = [*entry["iou"].values(), *(entry[key] for key in means)]
        found = entry.get("interval", {"iou": {}})
        spans = [*map(found["iou"].get, classes), *map(found.get, means)]
        won = [winner == number for winner in winners or [None] * len(values)]
        rows.append([entry["ckpt"], *map(_bar, values, spans, [*won, False])])
    rows.append(["images with it", *map(str, entries[0]["images_with_class"].values())])
    several = len(shown) > 1
    what = f"{len(shown)} checkpoints" if several else "1 checkpoint"
    parts = [f"<h1>{what} on {entries[0]['images']} images</h1>"]
    parts += [_table(table, "wide") for table in merged or []]
    parts.append(_table((title, [head, *rows]), "wide many" if len(classes) > MANY else "wide"))
    if several and winners:
        parts.append("<p>\u2605: best, by the 95% intervals of its paired differences</p>")
        parts.append(_table(metrics.difference_table(entries), "wide"))
    parts += map(_section, shown)
    parts.append(f"<h2>This page</h2><p>{_text(command)}</p>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE.read_text('utf-8')}</style>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _section(shown: Shown) -> str:
    entry, history, colors, facts, figures = shown
    classes, parts = entry["classes"], [f"<h2>{_text(entry['ckpt'])}</h2>"]
    if history:
        view = f'viewBox="0 0 {CHART[0]} {CHART[1]}" role="img"'
        drawn = charts(history, classes, colors).items()
        drawn = (f'<svg class="chart" {view} aria-label="{k}">{v}</svg>' for k, v in drawn)
        parts.append(f'<div class="charts">{"".join(drawn)}</div>')
    parts += [_table(metrics.class_table(entry), "wide"), _heat(entry)]
    parts += [_table(table, "facts" if len(table[1][0]) == 2 else "wide") for table in facts]
    for name, color in _keys(classes, colors) if figures else []:
        key = f'<i style="background: rgb{tuple(color)}"></i> {_text(name)}'
        parts.append(f'<span class="key">{key}</span>')
    return "\n".join(parts + figures)


def _text(words: str, most: int = 10**6) -> str:
    """Any words, made safe for HTML and XML, and cut off after `most` letters."""
    words = words if len(words) <= most else words[: most - 1] + "\u2026"
    return escape("".join(c if c.isprintable() else "\ufffd" for c in words))


def _table(table: Table, kind: str) -> str:
    """A table whose cells are words or pairs of attributes and HTML."""
    title, (head, *rows) = table
    lines = ["".join(f'<th scope="col">{_text(name)}</th>' for name in head), "</thead><tbody>"]
    for name, *cells in rows:
        line = [f'<tr><th scope="row">{_text(name)}</th>']
        for column, cell in zip(head[1:], cells):
            attributes, content = cell if isinstance(cell, tuple) else ("", _text(cell))
            line.append(f'<td data-name="{_text(column)}"{attributes}>{content}</td>')
        lines.append(f"{''.join(line)}</tr>")
    lines = f"<caption>{_text(title)}</caption><thead>{''.join(lines)}</tbody>"
    return f'<div class="{kind}"><table>{lines}</table></div>'


def _bar(value: float | None, interval: list[float] | None, won: bool) -> tuple[str, str]:
    """A cell: the value, its interval, and both on a scale from 0 to 1."""
    if value is None:
        return "", "-"
    low, high = (100 * end for end in interval or (value, value))
    drawing = '<path d="M0 4.5H100M0 1V8M100 1V8"/>'
    drawing += f'<rect x="{low:.1f}" y="2" width="{high - low:.1f}" height="5" opacity=".5"/>'
    drawing += f'<rect x="{100 * value - 0.8:.1f}" width="1.6" height="9"/>'
    bar = f'<svg class="bar" viewBox="0 0 100 9" preserveAspectRatio="none">{drawing}</svg>'
    content = f"<b>{percent(value)}</b>{bar}<small>{span(interval)}</small>"
    return ' class="winner"' if won else "", content


def _heat(entry: dict) -> str:
    """The confusion matrix, darker for a larger share of the true class; if it is large, a list."""
    title, (head, *rows) = metrics.confusion_table(entry)
    classes, confusion = entry["classes"], entry["confusion"]
    if len(classes) > metrics.MATRIX_LABELS:
        for row in rows:
            count = confusion[classes.index(row[0])][classes.index(row[1])]
            row[2] = (f' title="{count:,} pixels"', row[2])
        return _table((title, [head, *rows]), "wide")
    for (truth, *cells), counts, row in zip(rows, entry["confusion"], rows):
        for column, (cell, count) in enumerate(zip(cells, counts), start=1):
            share = count / max(1, sum(counts))
            look = f'style="background: color-mix(in srgb, #0072b2 {share:.0%}, transparent)"'
            hover = _text(f"{truth} taken for {head[column]}: {count:,} pixels")
            deep = ' class="deep"' if share > 0.87 else ""
            row[column] = (f'{deep} {look} title="{hover}"', cell)
    return _table((title, [head, *rows]), "heat")


def figure(example: Example, classes: list[str], colors: list, name: str) -> str:
    """HTML of the pictures of an image: side by side, or on a narrow screen one that the reader
    picks. `name` is unique within the page."""
    labels, layers, buttons = [[], example.mask, example.prediction, []], [], []
    for title, seen, picture in zip(TITLES, labels, pictures(example, colors, PICTURE)):
        file = io.BytesIO()
        picture.save(file, "WEBP", quality=80)
        source = f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
        seen = ", ".join(classes[c] for c in np.unique(seen).tolist() if c < len(classes))
        size = f'width="{picture.width}" height="{picture.height}"'
        image = f'<img {size} alt="{_text(f"{title}: {seen}".strip(": "))}" src="{source}">'
        layers.append(f"<figure>{image}<figcaption>{title}</figcaption></figure>")
        checked = " checked" if title == "prediction" else ""
        button = f'<input type="radio" name="{name}"{checked}>'
        buttons.append(f"<label>{button} {title}</label>")
    content = "".join([*buttons, '<div class="layers">', *layers, "</div>"])
    return f"<fieldset><legend>{_text(example.caption)}</legend>{content}</fieldset>"


def curves(history: list[dict], classes: list[str], colors: list) -> str:
    """The three `charts` as one SVG picture, for a file of its own."""
    drawn = enumerate(charts(history, classes, colors).values())
    drawn = (f'<g transform="translate({i * CHART[0]})">{chart}</g>' for i, chart in drawn)
    view = f'class="chart file" viewBox="0 0 {3 * CHART[0]} {CHART[1]}"'
    style = f"<style>{STYLE.read_text('utf-8')}</style>"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view}>{style}{"".join(drawn)}</svg>\n'


def charts(history: list[dict], classes: list[str], colors: list) -> dict[str, str]:
    """SVG charts of loss, learning rate and IoU by epoch, of metrics.jsonl; the best is marked."""

    def series(name: str, key: str) -> tuple[str, list, str]:
        return name, [line.get(key) for line in history], "var(--ink)"

    paints = ["gray", *(f"rgb{tuple(color)}" for color in colors[1:])]
    iou = [(n, [line["val_iou"].get(n) for line in history], p) for n, p in zip(classes, paints)]
    epochs, mean = [line["epoch"] for line in history], series("foreground", "val_foreground_miou")
    best = epochs[int(np.argmax([-1 if value is None else value for value in mean[1]]))]
    drawn = {"loss": [series("training", "train_loss"), series("validation CE", "val_loss")]}
    drawn |= {"learning rate": [series("", "lr")], f"IoU (best: epoch {best})": [mean, *iou]}
    return {title: _chart(title, series, epochs, best) for title, series in drawn.items()}


def _chart(title: str, series: list[tuple], epochs: list[int], best: int) -> str:
    """A chart of several series: each has a name, a value or None per epoch, and a colour."""
    known = [(n, [p for p in zip(epochs, v) if p[1] is not None], c) for n, v, c in series]
    known, is_iou = [one for one in known if one[1]], title.startswith("IoU")
    last, highest = max(1, epochs[-1]), max((p[1] for _, ps, _ in known for p in ps), default=1)
    ticks = _ticks(1 if is_iou else highest or 1)

    def place(epoch: float, value: float) -> tuple[float, float]:
        y = BOTTOM + (TOP - BOTTOM) * value / ticks[-1]
        return round(LEFT + (RIGHT - LEFT) * epoch / last, 1), round(y, 1)

    def words(x: float, y: float, text: str, kind: str = "") -> str:
        return f'<text class="{kind}" x="{x}" y="{y:.1f}">{text}</text>'

    parts = [words(LEFT, 16, title, "title"), words(LEFT, BOTTOM + 33, "epoch")]
    for tick in ticks:
        y = place(0, tick)[1]
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(words(LEFT - 6, y + 4, f"{tick:g}", "end"))
    for tick in (tick for tick in _ticks(last) if tick == int(tick) <= last):
        parts.append(words(place(tick, 0)[0], BOTTOM + 17, f"{tick:g}", "middle"))
    x = place(best, 0)[0]
    parts.append(f'<line class="best" x1="{x}" x2="{x}" y1="{TOP}" y2="{BOTTOM}"/>')
    named = sorted(known[1:], key=lambda one: -one[1][-1][1])  # by the last value
    if len(named) > MANY:
        named = named[: MANY // 2] + named[MANY // 2 - MANY :]
    named = known[:1] + named
    for one in reversed(known):  # the first lies above the others
        name, points, color = one
        line = " ".join("{},{}".format(*place(*point)) for point in points)
        kind = "mean" if one is known[0] else "" if one in named else "unnamed"
        look = f'class="{kind}" stroke="{color}"'
        parts.append(f'<polyline {look} points="{line}"><title>{_text(name)}</title></polyline>')
    ends = [place(*points[-1]) for _, points, _ in named]
    for (name, points, color), (x, y), height in zip(named, ends, _spread([y for _, y in ends])):
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"/>')
        if name:
            label = _text(name, 14) + (f" {percent(points[-1][1])}" if is_iou else "")
            parts.append(f'<polyline stroke="{color}" points="{x},{y} {RIGHT + 15},{height}"/>')
            parts.append(words(RIGHT + 18, height + 4, label))
    return "".join(parts)


def _ticks(high: float) -> list[float]:
    """Ticks from 0 to `high` or a little more, in steps of 1, 2 or 5 times a power of 10."""
    power = 10 ** math.floor(math.log10(high / 4))
    step = max(power * factor for factor in (1, 2, 5) if 4 * power * factor <= high * 1.0001)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def _spread(places: list[float], gap: float = 14) -> list[float]:
    """The heights of labels, moved apart where they would collide, and kept inside the plot."""
    order, spread, low = np.argsort(places, kind="stable"), np.array(places), BOTTOM + gap
    for one, other in pairwise(order):
        spread[other] = max(spread[other], spread[one] + gap)
    for one in reversed(order):
        low = spread[one] = min(spread[one], low - gap)
    return spread.tolist()


def outline(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool: the pixels, except background, that touch a pixel of another label."""
    edge = np.zeros(mask.shape, dtype=bool)
    for one, other in ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[1:], np.s_[:-1])):
        differ = mask[one] != mask[other]
        edge[one] |= differ
        edge[other] |= differ
    return edge & (mask != 0)


def overlay(image: Image.Image, mask: np.ndarray, colors: list) -> Image.Image:
    """An RGB picture with the classes of its (H, W) uint8 mask drawn over it, thinly outlined.

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


def pictures(example: Example, colors: list, longest: int) -> list[Image.Image]:
    """The four pictures of `TITLES`. They are drawn at the final size, so that outlines are equally
    thin on large and small images."""
    scale = longest / max(example.image.size)
    size = tuple(max(1, round(side * scale)) for side in example.image.size)
    image = example.image.resize(size)
    prediction, mask = (
        np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        for labels in (example.prediction, example.mask)
    )
    laid_over = [overlay(image, labels, colors) for labels in (mask, prediction)]
    return [image, *laid_over, errors(image, prediction, mask)]


def _strip(example: Example, colors: list) -> Image.Image:
    drawn, lines = pictures(example, colors, PANEL), textwrap.wrap(example.caption, 160)
    width, height = drawn[0].size
    strip = Image.new("RGB", (WIDTH, height + 18 * len(lines) + 12), "white")
    for column, picture in enumerate(drawn):
        left = column * (PANEL + GAP) + GAP // 2 + (PANEL - width) // 2  # portraits: centred
        strip.paste(picture, (left, 2))
    font = _font(13, example.caption)
    ImageDraw.Draw(strip).multiline_text((GAP, height + 5), "\n".join(lines), "black", font)
    return strip


def _legend(classes: list[str], colors: list) -> Image.Image:
    keys, font = _keys(classes, colors), _font(15, "".join(classes))
    widest = 33 + max(font.getlength(name) for name, _ in keys)
    columns = max(1, min(KEYS, int(WIDTH / widest)))
    legend = Image.new("RGB", (WIDTH, 26 * math.ceil(len(keys) / columns) + 24), "white")
    draw = ImageDraw.Draw(legend)
    for number, (name, color) in enumerate(keys):
        x, y = number % columns * WIDTH // columns + 6, number // columns * 26 + 6
        draw.rectangle((x, y, x + 16, y + 16), fill=tuple(color), outline="black")
        draw.text((x + 21, y), name, "black", font)
    for column, title in enumerate(TITLES):
        x = column * (PANEL + GAP) + (PANEL - font.getlength(title)) / 2
        draw.text((x, legend.height - 20), title, "black", font)
    return legend


def _font(size: int, words: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has few letters; for others one of the system's, if it has one."""
    if not words.isascii():
        for name in ("DejaVuSans.ttf", "arial.ttf", "Arial Unicode.ttf"):
            with suppress(OSError):
                return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def _keys(classes: list[str], colors: list) -> list[tuple]:
    return [*zip(classes[1:], colors[1:]), ("ignored", IGNORE_COLOR), ("wrong", ERROR_COLOR)]
