"""One formula for four losses: hand-computed values, equality with torch, ignored pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from losses import class_weights, segmentation_loss, total_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, 6, generator=generator)
    masks = torch.randint(0, 5, (3, 7, 6), generator=generator)
    masks[torch.rand(masks.shape, generator=generator) < 0.3] = 255
    return logits, masks, torch.tensor([0.5, 1.0, 4.0, 2.0, 7.0])


def test_gamma_zero_is_torchs_cross_entropy(batch):
    logits, masks, weight = batch
    for w in (None, weight):
        expected = F.cross_entropy(logits, masks, weight=w, ignore_index=255)
        torch.testing.assert_close(segmentation_loss(logits, masks, w), expected)
        assert not torch.isclose(segmentation_loss(logits, masks, w, gamma=2.0), expected)


def test_focal_by_hand():
    # Two classes with equal logits but for 2 log 3: p = 3/4 (true), and p = 1/4 (false).
    logits = torch.tensor([[[[math.log(3.0), math.log(3.0)]], [[0.0, 0.0]]]])
    masks = torch.tensor([[[0, 1]]])
    easy, hard = -math.log(0.75) * 0.25**2, -math.log(0.25) * 0.75**2
    value = segmentation_loss(logits, masks, gamma=2.0).item()
    assert value == pytest.approx((easy + hard) / 2)
    # The modulation uses the unweighted probability; the divisor is the weights alone.
    weight = torch.tensor([1.0, 3.0])
    value = segmentation_loss(logits, masks, weight, gamma=2.0).item()
    assert value == pytest.approx((easy + 3 * hard) / 4)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_ignored_pixels_change_nothing(batch, gamma):
    logits, masks, weight = batch
    logits.requires_grad_()
    loss = segmentation_loss(logits, masks, weight, gamma)
    (gradient,) = torch.autograd.grad(loss, logits)
    ignored = (masks == 255)[:, None].expand_as(logits)
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any()
    other = torch.where(ignored, 50 * torch.ones_like(logits), logits)
    assert segmentation_loss(other, masks, weight, gamma).item() == loss.item()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_nothing_but_ignored_pixels_is_zero_not_nan(gamma):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    masks = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    loss = segmentation_loss(logits, masks, torch.ones(3), gamma)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_gradient_is_finite_where_the_prediction_is_perfect(gamma):
    logits = torch.tensor([200.0, 0.0]).reshape(1, 2, 1, 1).requires_grad_()
    segmentation_loss(logits, torch.zeros(1, 1, 1, dtype=torch.long), gamma=gamma).backward()
    assert logits.grad.isfinite().all()


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.randn(1, 3, 400, 400, dtype=torch.float16)
    masks = torch.randint(0, 3, (1, 400, 400))
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = segmentation_loss(logits, masks, gamma=2.0)
        assert loss.dtype == torch.float32
        assert loss.item() == segmentation_loss(logits.float(), masks, gamma=2.0).item()


def test_auxiliary_head_counts_half(batch):
    logits, masks, _ = batch
    alone = total_loss({"out": logits}, masks)
    both = total_loss({"out": logits, "aux": -logits}, masks)
    expected = alone + 0.5 * F.cross_entropy(-logits, masks, ignore_index=255)
    torch.testing.assert_close(both, expected)


def test_class_weights_by_hand():
    # Shares 0.9, 0.09, 0.01: inverse roots 1.054, 3.333, 10; over the weighted mean 1.349.
    roots = np.array([0.9, 0.09, 0.01]) ** -0.5
    expected = roots / (roots * [0.9, 0.09, 0.01]).sum()
    weight = class_weights(np.array([9000, 900, 100]))
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-6)
    assert weight.dtype == torch.float32


def test_class_weights_are_damped_clamped_and_average_to_one():
    pixels = np.array([10_000_000, 50_000, 10, 0])
    weight = class_weights(pixels).numpy().astype(float)
    assert weight.max() / weight.min() == pytest.approx(10)
    assert (weight * pixels).sum() / pixels.sum() == pytest.approx(1)
    assert np.isfinite(weight).all()
    assert weight[3] == weight.max()
