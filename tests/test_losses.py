"""One formula for four losses: hand-computed values, equality with torch, ignored pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (
    Totals,
    class_weights,
    dice_loss,
    dice_sums,
    pixel_weights,
    segmentation_loss,
    total_dice_sums,
    total_loss,
)


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


def test_a_sum_of_weights_below_one_divides_too():
    """One pixel of weight 1/4, as where a class that is everywhere fills the valid pixels."""
    logits, masks = torch.zeros(1, 2, 3, 3), torch.full((1, 3, 3), 255)
    masks[0, 1, 1] = 1
    loss = segmentation_loss(logits, masks, torch.tensor([1.0, 0.25]))
    assert loss.item() == pytest.approx(math.log(2))


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


# --- Dice, parts of a step, chunks ---------------------------------------------------------------


def test_dice_by_hand():
    # Two pixels of class 1 with p = 3/4 and 1/4, one of class 0 with p(1) = 1/2; class 2 nowhere.
    p = torch.tensor([[0.25, 0.75, 0.0], [0.75, 0.25, 0.0], [0.5, 0.5, 0.0]])
    logits = p.clamp_min(1e-30).log().T.reshape(1, 3, 1, 3)
    sums = dice_sums(logits, torch.tensor([[[1, 1, 0]]]))
    torch.testing.assert_close(sums, torch.tensor([[0.5, 1, 0], [1.5, 1.5, 0], [1, 2, 0]]))
    assert dice_loss(sums).item() == pytest.approx(1 - (2 * 1 + 1) / (1.5 + 2 + 1))
    # A class of a single pixel counts: that of class 0 becomes one of class 2, with p = 0.
    sums = dice_sums(logits, torch.tensor([[[1, 1, 2]]]))
    both = (1 - (2 * 1 + 1) / (1.5 + 2 + 1)) + (1 - 1 / (0 + 1 + 1))
    assert dice_loss(sums).item() == pytest.approx(both / 2)


def plain_dice(logits, masks):
    """Another way: pixels in a list, classes in a loop."""
    valid = masks != 255
    probabilities, labels = logits.softmax(1).movedim(1, -1)[valid], masks[valid]
    terms = []
    for label in labels.unique().tolist():
        if label > 0:
            p, y = probabilities[:, label], (labels == label).float()
            terms.append(1 - (2 * (p @ y) + 1) / (p.sum() + y.sum() + 1))
    return sum(terms) / max(len(terms), 1)


def with_dice(outputs, masks, weight=None, gamma=0.0):
    totals = Totals(pixel_weights(masks, weight).sum(), total_dice_sums(outputs, masks))
    return total_loss(outputs, masks, weight, gamma, totals)


@pytest.mark.parametrize("chunk", [1, 2**19])
@pytest.mark.parametrize("missing", [[], [0], [2, 3], [1, 2, 3, 4]])
def test_dice_is_that_of_another_implementation(batch, missing, chunk, monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", chunk)
    logits, masks, weight = batch
    for label in missing:
        masks[masks == label] = 255 if label == 0 else 0
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    mine = with_dice({"out": x}, masks, weight, 2.0)
    theirs = segmentation_loss(y, masks, weight, 2.0) + plain_dice(y, masks)
    torch.testing.assert_close(mine, theirs)
    found, expected = (torch.autograd.grad(loss, z)[0] for loss, z in ((mine, x), (theirs, y)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert (found[(masks == 255)[:, None].expand_as(found)] == 0).all()


def test_dice_of_nothing_but_ignored_pixels_is_zero():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = with_dice({"out": logits}, torch.full((2, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_parts_and_ranks_have_the_gradient_of_the_whole(batch):
    """Two ranks with two parts each: a rank's gradient counts half, as DDP averages."""
    logits, masks, weight = batch
    logits, masks = torch.cat([logits, logits[:1] + 1]), torch.cat([masks, masks[:1]])
    whole = logits.clone().requires_grad_()
    expected = with_dice({"out": whole, "aux": -whole}, masks, weight, 2.0)
    expected.backward()
    ranks = 2
    weights = pixel_weights(masks, weight).sum() / ranks
    dice = total_dice_sums({"out": logits, "aux": -logits}, masks) / ranks
    x, loss = logits.clone().requires_grad_(), 0
    for image in range(4):
        part = {"out": x[[image]], "aux": -x[[image]]}
        totals = Totals(weights, dice, ranks=ranks, parts=2)
        loss = loss + total_loss(part, masks[[image]], weight, 2.0, totals) / ranks
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad, whole.grad, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("chunk", [1, 700, 4000, 2**19])
@pytest.mark.parametrize(("height", "width", "stride"), [(64, 48, 8), (33, 57, 8), (41, 32, 1)])
def test_chunks_are_the_whole_upsampled(chunk, height, width, stride, monkeypatch):
    monkeypatch.setitem(losses.CHUNK, "cpu", chunk)
    torch.manual_seed(0)
    small = torch.randn(3, 5, -(-height // stride), -(-width // stride), dtype=torch.float64)
    masks = torch.randint(0, 5, (3, height, width)).byte()
    masks[0, 3:9] = 255
    x, y = (small.float().requires_grad_(), small.requires_grad_())
    large = F.interpolate(y, scale_factor=stride, mode="bilinear")[..., :height, :width]
    expected = F.cross_entropy(large, masks.long(), ignore_index=255)
    found = total_loss({"out": x}, masks)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(3 * found, x)
    torch.testing.assert_close(
        gradient.double(), 3 * torch.autograd.grad(expected, y)[0], rtol=1e-4, atol=1e-8
    )


def test_the_gradient_of_half_precision_logits_is_theirs():
    x = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    total_loss({"out": x}, torch.zeros(1, 64, 64, dtype=torch.uint8)).backward()
    assert x.grad.dtype == torch.bfloat16


def test_logits_are_upsampled_in_float32_within_autocast():
    logits, masks = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 64, 64))
    expected = with_dice({"out": logits}, masks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(with_dice({"out": logits}, masks), expected)
