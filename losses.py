"""Losses for semantic segmentation, and class weights from pixel counts.

loss = segmentation_loss(logits, masks)                          # cross entropy
loss = segmentation_loss(logits, masks, weight=weight)           # class-weighted
loss = segmentation_loss(logits, masks, gamma=2.0)               # focal
loss = segmentation_loss(logits, masks, weight=weight, gamma=2.0)
loss = dice_loss(dice_sums(logits, masks))                       # soft Dice, of the foreground
loss = total_loss(outputs, masks, ...)                           # of all heads of a network
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import IGNORE_INDEX

AUXILIARY_WEIGHT = 0.5  # of the auxiliary head's loss, as torchvision trains DeepLabV3
# Logits to upsample at once, however many classes there are: 2 MB for the cache of a CPU; a GPU
# needs enough to do per kernel.
CHUNK = {"cpu": 2**19, "cuda": 2**24}


def segmentation_loss(
    logits: Tensor,
    masks: Tensor,
    weight: Tensor | None = None,
    gamma: float = 0.0,
    normalizer: Tensor | None = None,
) -> Tensor:
    """Class-weighted focal loss: sum of w[y] (1 - p)^gamma CE over valid pixels / sum of w[y].

    p is the probability of the true class y, and CE = -log p. With gamma = 0 it is cross entropy,
    equal to `F.cross_entropy(weight=weight)`; without a weight, all weights are 1. If all pixels
    are ignored, loss and gradient are 0, where `F.cross_entropy` gives NaN. Always in float32.

    logits: (N, C, H, W) of any float dtype. masks: (N, H, W) integer, 0..C-1 or 255 (ignored).
    weight: (C,) float32 or None. gamma >= 0. normalizer: the sum of w[y] to divide by, if these
    images are part of a larger batch. Returns a float32 scalar on the device of the logits.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equations 4 and 5. The divisor
    is the sum of the weights without the focal factor; otherwise gamma would not down-weight.
    """
    masks = masks.long()
    loss = F.cross_entropy(logits.float(), masks, reduction="none", ignore_index=IGNORE_INDEX)
    if gamma:
        # 1 - p without cancellation; the clamp keeps the slope finite at p = 1 for gamma < 1.
        loss = loss * (-torch.expm1(-loss)).clamp_min(1e-6) ** gamma
    weights = pixel_weights(masks, weight)
    normalizer = weights.sum() if normalizer is None else normalizer
    return (weights * loss).sum() / normalizer.clamp_min(torch.finfo(torch.float32).tiny)


def pixel_weights(masks: Tensor, weight: Tensor | None) -> Tensor:
    """(N, H, W) float32: w[y] of each pixel, 1 without class weights, 0 where it is ignored."""
    valid = masks != IGNORE_INDEX
    if weight is None:
        return valid.float()
    return valid * weight[torch.where(valid, masks, 0).long()]  # ignored pixels look up class 0


def dice_sums(logits: Tensor, masks: Tensor) -> Tensor:
    """(3, C) float32, summed over the valid pixels: the probability of each class on its own
    pixels, its probability on all pixels, and the number of its pixels.

    logits: (N, C, H, W) of any float dtype. masks: (N, H, W) integer, 0..C-1 or 255 (ignored).
    """
    probabilities = logits.float().softmax(dim=1)
    classes = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    true, valid = (masks[:, None] == classes).float(), (masks[:, None] != IGNORE_INDEX).float()
    sums = [probabilities * true, probabilities * valid, true]
    return torch.stack([x.sum(dim=(0, 2, 3)) for x in sums])


def dice_loss(sums: Tensor, smoothing: float = 1.0) -> Tensor:
    """1 - mean of (2 I + s) / (P + T + s) over the foreground classes that occur (T > 0).

    sums: (3, C) float32, the I, P and T of `dice_sums`. The loss is 0 if there is no foreground.

    Source: Milletari et al. 2016, "V-Net", without the squares; over the batch and smoothed by one
    pixel, as in nnU-Net.
    """
    intersection, predicted, true = sums[:, 1:]
    dice = (2 * intersection + smoothing) / (predicted + true + smoothing)
    there = (true > 0).float()
    return (there * (1 - dice)).sum() / there.sum().clamp_min(1)


class Totals(NamedTuple):
    """Sums over all images of a step, which the loss of each part of them needs.

    weights: the sum of w[y]. dice: (heads, 3, C), the `dice_sums` of each head, or None for no Dice
    loss. Both are means over `ranks` processes, as the gradients are. parts: batches per step.
    """

    weights: Tensor
    dice: Tensor | None = None
    ranks: int = 1
    parts: int = 1

    def dice_slopes(self, head: int) -> tuple[Tensor, Tensor]:
        """A part's share of the Dice loss, and (3, C) the derivative of the loss by the sums."""
        sums = self.dice[head].detach().requires_grad_()
        with torch.enable_grad():
            loss = dice_loss(sums, 1 / self.ranks)  # the sums are means over the ranks, too
        return loss.detach() / self.parts, torch.autograd.grad(loss, sums)[0]


def total_loss(
    outputs: dict[str, Tensor],
    masks: Tensor,
    weight: Tensor | None = None,
    gamma: float = 0.0,
    totals: Totals | None = None,
) -> Tensor:
    """`segmentation_loss` of outputs["out"], plus `dice_loss` if the totals hold its sums; plus
    half of the same for outputs["aux"] if present.

    outputs: (N, C, H, W) logits, or smaller by the network's stride: they are upsampled here.
    masks, weight, gamma: as for `segmentation_loss`. totals: those of the step; by default, of
    these images.

    Dice is not a sum over pixels, but its gradient is: each pixel contributes its own gradient
    times slopes that depend only on the totals. So parts and ranks together give the gradient of
    one batch.
    """
    totals = totals or Totals(pixel_weights(masks, weight).sum())
    loss = torch.zeros((), device=masks.device)
    for head, (name, logits) in enumerate(outputs.items()):
        share, slopes = (0, None) if totals.dice is None else totals.dice_slopes(head)

        def part(logits: Tensor, masks: Tensor, slopes: Tensor | None = slopes) -> Tensor:
            loss = segmentation_loss(logits, masks, weight, gamma, totals.weights)
            if slopes is not None:
                sums = dice_sums(logits, masks)
                loss = loss + (slopes * (sums - sums.detach())).sum()
            return loss

        value = share + SumOverChunks.apply(logits, masks, part)
        loss = loss + (AUXILIARY_WEIGHT if name == "aux" else 1) * value
    return loss


def total_dice_sums(outputs: dict[str, Tensor], masks: Tensor) -> Tensor:
    """(heads, 3, C) float32: the `dice_sums` of each head for `Totals`, without a gradient."""
    sums = [SumOverChunks.apply(x.detach(), masks, dice_sums) for x in outputs.values()]
    return torch.stack(sums)


class SumOverChunks(torch.autograd.Function):
    """function(logits, masks), which is a sum over pixels, after the logits have been upsampled
    bilinearly to the size of the masks.

    Large logits and their gradients exist only for one chunk at a time, which stays in the cache:
    81 classes take a third of the time and a tenth of the memory. Two matrix products upsample,
    because the backward of `F.interpolate` is slow, and on a GPU it adds in a different order each
    time.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, masks: Tensor, function: Callable) -> Tensor:
        """(N, C, h, w) logits and (N, H, W) masks -> a float32 scalar; keeps the gradient."""
        (_, count, h, w), (number, height, width) = logits.shape, masks.shape
        stride = 2 ** round(math.log2(height / h))  # the last cell may be cut off
        chunk = CHUNK.get(logits.device.type, 2**24)
        images = max(1, chunk // (count * height * width))
        rows = max(stride, min(height, chunk // (count * width)) // stride * stride)
        # Matrices that upsample a column and a row as `F.interpolate` does.
        eyes = (torch.eye(n, device=logits.device)[None] for n in (h, w))
        tall, wide = (F.interpolate(x, scale_factor=stride, mode="linear")[0] for x in eyes)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits, dtype=torch.float32) if wanted else None
        total = torch.zeros((), device=masks.device)
        for image, top in itertools.product(range(0, number, images), range(0, height, rows)):
            bottom = min(top + rows, height)
            # Pixels lie between their own row of cells and the one above or below.
            first, last = top // stride - (stride > 1), -(-bottom // stride) + (stride > 1)
            cells = slice(image, image + images), slice(None), slice(max(first, 0), last)
            x = logits[cells].detach().float().contiguous().requires_grad_(wanted)
            with torch.enable_grad(), torch.autocast(logits.device.type, enabled=False):
                large = x
                if stride > 1:
                    large = tall.T[top:bottom, cells[2]] @ (x @ wide[:, :width])
                value = function(large, masks[image : image + images, top:bottom])
            total = total + value.detach()
            if wanted:
                gradient[cells] += torch.autograd.grad(value, x)[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple[Tensor, None, None]:
        return slope * ctx.saved_tensors[0], None, None


def class_weights(pixels: np.ndarray, power: float = 0.5, max_ratio: float = 10.0) -> Tensor:
    """(C,) float32 weights from (C,) pixel counts: (1 / share)^power, at most `max_ratio` apart.

    Full inverse frequency (power 1) gives COCO's rare classes weights of several hundred and lowers
    the IoU of every class, even theirs; hence the clamped square root. The mean over the pixels is
    1, so loss and learning rate stay comparable with those of an unweighted run. A class without a
    pixel gets the largest weight, which is never used.
    """
    pixels = np.asarray(pixels, dtype=np.float64)
    share = np.maximum(pixels, 1) / max(pixels.sum(), 1)
    weight = share**-power
    weight = np.minimum(weight, max_ratio * weight.min())
    weight = weight * pixels.sum() / max((weight * pixels).sum(), 1)
    return torch.tensor(weight, dtype=torch.float32)
