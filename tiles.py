"""Labels of a picture from windows of the size at which a network was trained.

    labels, _ = tiled_labels(predictor.run, Tiling(1.0, 512, len(classes), device), picture)

The scale is fixed, whatever the size of the picture. Windows overlap by half. Their logits are
added with weights that fall towards the edges, and complete rows are turned into labels from top to
bottom. So memory grows with a row of windows, not with the picture times the classes.
(nnU-Net, Isensee et al. 2021, uses the same overlap, with Gaussian weights.)
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from dataset import FILL

SUMS = 2**24  # logits that are held at once, as float32: 64 MB
PIXELS = 2**20  # of the picture, that become labels at once


class Tiling(NamedTuple):
    """How a picture is cut, and for what network."""

    scale: float  # pixels of a window per pixel of the picture
    side: int  # of a window
    classes: int
    device: torch.device
    batch_size: int = 1  # windows at once


def best_labels(planes: Iterable[Tensor], probs: bool = False) -> tuple[Tensor, Tensor | None]:
    """(H, W) uint8 labels from the (H, W) float32 logits of one class after the other, so that the
    logits of all classes never exist at once; of equal logits the lowest label wins. With `probs`,
    also (H, W) uint8, the probabilities of these labels in 255ths."""
    planes = iter(planes)
    best = next(planes).clone()
    labels = torch.zeros_like(best, dtype=torch.uint8)
    total = best.clone() if probs else None  # log of the sum of exp(logits)
    for label, values in enumerate(planes, start=1):
        labels.masked_fill_(values > best, label)
        torch.maximum(best, values, out=best)
        if probs:
            torch.logaddexp(total, values, out=total)
    return labels, ((255 * (best - total).exp()).round().byte() if probs else None)


def windows(length: int, side: int) -> list[tuple[int, Tensor]]:
    """Where windows of that side begin along an axis, half a side apart, the last one at the end;
    and the (side,) float32 weights of each, which add up to 1 everywhere."""
    starts = [*range(0, length - side, side // 2), length - side]
    distance = torch.arange(side) + 0.5
    ramp, total = torch.minimum(distance, side - distance), torch.zeros(length)
    for start in starts:
        total[start : start + side] += ramp
    return [(start, ramp / total[start : start + side]) for start in starts]


def neighbours(length: int, scaled: int) -> Tensor:
    """(3, length) float64: for each of `length` pixels, the two of `scaled` pixels between which
    its centre lies, and the share of the second, as in the bilinear
    `torch.nn.functional.interpolate`."""
    places = (torch.arange(length, dtype=torch.float64) + 0.5) * (scaled / length) - 0.5
    places = places.clamp(min=0)
    lower = places.floor()
    return torch.stack([lower, (lower + 1).clamp(max=scaled - 1), places - lower])


def interpolated(plane: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """(H, W) values at the `neighbours`, as float32, in an (h, w) plane."""
    above, below, share = rows[0].long(), rows[1].long(), rows[2][:, None]
    plane = torch.lerp(plane[above], plane[below], share)
    left, right, share = columns[0].long(), columns[1].long(), columns[2]
    return torch.lerp(plane[:, left], plane[:, right], share)


def scaled_rows(picture: Image.Image, size: tuple[int, int], top: int, side: int) -> Tensor:
    """(3, side, W) uint8: `side` rows from `top` on of an RGB picture that is resized to `size`
    (H, W), padded with the mean colour to at least `side` rows and columns."""
    height, width = min(side, size[0] - top), size[1]
    step = picture.height / size[0]
    box = (0, top * step, picture.width, min((top + height) * step, picture.height))
    rows = F.pil_to_tensor(picture.resize((width, height), Image.Resampling.BILINEAR, box=box))
    return F.pad(rows, [0, 0, max(0, side - width), side - height], fill=FILL)


def complete_rows(
    run: Callable, tiling: Tiling, picture: Image.Image, size: tuple, left: int, right: int
) -> Iterator[tuple[int, Tensor, int]]:
    """Logits of the columns from `left` to `right` of a picture resized to `size` (H, W), as
    weighted sums over the windows. Yields after each row of windows: the number of the first row,
    the sums (C, h, right - left) float32 from it on, and the row at which the complete ones end."""
    _, side, classes, device, batch_size = tiling
    across = windows(max(size[1], side), side)
    across = [(x, w.to(device)) for x, w in across if x < right and x + side > left]
    down = windows(max(size[0], side), side)
    ends = [top for top, _ in down[1:]] + [size[0]]
    # One row more, the last of the windows above: pixels of the picture lie between two rows.
    sums = torch.zeros(classes, 1 + side, right - left, device=device)
    bar = tqdm(zip(down, ends), "tiles", len(down), leave=False, disable=None, unit="row", delay=2)
    for (top, row_weights), end in bar:
        rows, row_weights = scaled_rows(picture, size, top, side), row_weights[:, None].to(device)
        for first in range(0, len(across), batch_size):
            batch = across[first : first + batch_size]
            images = torch.stack([rows[:, :, x : x + side] for x, _ in batch])
            for (x, weights), logits in zip(batch, run(images.to(device))):
                inside = slice(max(left, x) - x, min(right, x + side) - x)
                target = sums[:, 1:, x + inside.start - left : x + inside.stop - left]
                target += row_weights * weights[inside] * logits[:, :, inside]
        yield top - 1, sums, end
        kept = 1 + side - (end - top)
        sums[:, :kept] = sums[:, end - top :].clone()
        sums[:, kept:] = 0


@torch.inference_mode()
def tiled_labels(
    run: Callable, tiling: Tiling, picture: Image.Image, probs: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(H, W) uint8 labels of an RGB picture, and with `probs` their probabilities in 255ths.

    `run` maps (N, 3, side, side) uint8 windows to (N, C, side, side) logits, both on the device. If
    a row of windows has too many logits, the picture is processed in blocks of columns; windows
    that two blocks share then run twice.
    """
    native, device = (picture.height, picture.width), tiling.device
    size = tuple(max(1, round(tiling.scale * length)) for length in native)
    rows, columns = (neighbours(*lengths) for lengths in zip(native, size))
    found = torch.zeros(2 if probs else 1, *native, dtype=torch.uint8, device=device)
    block = max(tiling.side, SUMS // (tiling.classes * tiling.side))
    chunk = max(1, PIXELS // native[1])
    for left in range(0, size[1], block):
        first, last = torch.searchsorted(columns[0], torch.tensor([left, left + block])).tolist()
        across = (columns[:, first:last] - torch.tensor([[left], [left], [0]])).float().to(device)
        right, done = min(left + block + 1, size[1]), 0  # pixels lie between two columns
        for start, sums, end in complete_rows(run, tiling, picture, size, left, right):
            stop = int(torch.searchsorted(rows[1], end))
            for top in range(done, stop, chunk):
                bottom = min(top + chunk, stop)
                down = rows[:, top:bottom] - torch.tensor([[start], [start], [0]])
                down = down.float().to(device)
                parts = best_labels((interpolated(x, down, across) for x in sums), probs)
                for target, part in zip(found, parts):
                    target[top:bottom, first:last] = part
            done = stop
    return found[0], (found[1] if probs else None)
