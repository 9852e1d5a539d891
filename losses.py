"""Losses of semantic segmentation, all of them one formula, and class weights from pixel counts.

loss = segmentation_loss(logits, masks)                          # cross entropy
loss = segmentation_loss(logits, masks, weight=weight)           # class-weighted
loss = segmentation_loss(logits, masks, gamma=2.0)               # focal
loss = segmentation_loss(logits, masks, weight=weight, gamma=2.0)
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import IGNORE_INDEX

AUXILIARY_WEIGHT = 0.5  # of the auxiliary head's loss, as torchvision trains DeepLabV3


def segmentation_loss(
    logits: Tensor,
    masks: Tensor,
    weight: Tensor | None = None,
    gamma: float = 0.0,
    normalizer: Tensor | None = None,
) -> Tensor:
    """Class-weighted focal loss: sum of w[y] (1 - p)^gamma CE over valid pixels / sum of w[y].

    p is the probability of the true class y, CE = -log p. gamma = 0 is cross entropy, equal to
    `F.cross_entropy(weight=weight)`; no weight is a weight of 1. A batch of ignored pixels only has
    loss 0 and gradient 0, where `F.cross_entropy` gives NaN. In float32 under autocast too.

    logits: (N, C, H, W) of any float dtype. masks: (N, H, W) integer, 0..C-1 or 255 (ignored).
    weight: (C,) float32 or None. gamma >= 0. normalizer: the sum of w[y] to divide by, if these
    images are a part of a larger batch. Returns a float32 scalar on the device of the logits.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equations 4 and 5. Divided by
    the weights alone, not the modulated ones, so that gamma does turn easy pixels down.
    """
    masks = masks.long()
    with torch.autocast(logits.device.type, enabled=False):
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


def total_loss(outputs: dict[str, Tensor], masks: Tensor, *options) -> Tensor:
    """`segmentation_loss` of outputs["out"], plus half that of outputs["aux"] if present."""
    loss = segmentation_loss(outputs["out"], masks, *options)
    if "aux" in outputs:
        loss = loss + AUXILIARY_WEIGHT * segmentation_loss(outputs["aux"], masks, *options)
    return loss


def class_weights(pixels: np.ndarray, power: float = 0.5, max_ratio: float = 10.0) -> Tensor:
    """(C,) float32 weights from (C,) pixel counts: (1 / share)^power, at most `max_ratio` apart.

    Full inverse frequency (power 1) gives COCO's rare classes weights of several hundred and lowers
    the IoU of every class, theirs included; so the square root, clamped. Scaled to a mean of 1 over
    the pixels, which leaves the loss and the learning rate comparable with the unweighted.
    A class without a pixel gets the largest weight; no pixel ever uses it.
    """
    pixels = np.asarray(pixels, dtype=np.float64)
    share = np.maximum(pixels, 1) / max(pixels.sum(), 1)
    weight = share**-power
    weight = np.minimum(weight, max_ratio * weight.min())
    weight = weight * pixels.sum() / max((weight * pixels).sum(), 1)
    return torch.tensor(weight, dtype=torch.float32)
