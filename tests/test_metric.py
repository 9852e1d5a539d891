"""The confusion matrix and its scores against independent referees, and the bootstrap."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from evaluate import ConfusionMatrix, bootstrap, interval, p_value, pick_rows, scores

CPU = torch.device("cpu")


def random_pair(seed, classes=6, absent=(2, 5)):
    rng = np.random.default_rng(seed)
    present = np.setdiff1d(np.arange(classes), absent)
    truth = rng.choice(present, (40, 30)).astype(np.uint8)
    prediction = np.where(rng.random((40, 30)) < 0.6, truth, rng.choice(present, (40, 30)))
    truth[rng.random((40, 30)) < 0.2] = 255
    return torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth)


def counted(pairs, classes=6):
    confusion = ConfusionMatrix(len(pairs), classes, CPU)
    for index, (prediction, truth) in enumerate(pairs):
        confusion.update(index, prediction, truth)
    return confusion.matrices()


def test_equals_scikit_learn_and_torchmetrics():
    pairs = [random_pair(seed) for seed in range(4)]
    confusion = counted(pairs).sum(axis=0)
    truth = torch.stack([t for _, t in pairs]).numpy().ravel()
    prediction = torch.stack([p for p, _ in pairs]).numpy().ravel()
    valid = truth != 255
    expected = sklearn_confusion(truth[valid], prediction[valid], labels=range(6))
    np.testing.assert_array_equal(confusion, expected)

    result = scores(confusion)
    assert np.isnan(result["iou"][[2, 5]]).all()
    present = [0, 1, 3, 4]
    referee = jaccard_score(truth[valid], prediction[valid], labels=present, average=None)
    np.testing.assert_allclose(result["iou"][present], referee)
    assert result["miou"] == pytest.approx(referee.mean())
    assert result["foreground_miou"] == pytest.approx(referee[1:].mean())

    metric = MulticlassJaccardIndex(6, average="none", ignore_index=255)
    for p, t in pairs:
        metric.update(p[None], t[None].long())
    np.testing.assert_allclose(result["iou"][present], metric.compute().numpy()[present], rtol=1e-6)


def test_scores_by_hand():
    confusion = np.array([[50, 10, 0, 0], [5, 20, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]])
    result = scores(confusion)
    np.testing.assert_allclose(result["iou"], [50 / 65, 20 / 38, 0, np.nan])
    np.testing.assert_allclose(result["precision"], [50 / 55, 20 / 33, np.nan, np.nan])
    np.testing.assert_allclose(result["recall"], [50 / 60, 20 / 25, 0, np.nan])
    assert result["miou"] == pytest.approx((50 / 65 + 20 / 38 + 0) / 3)
    assert result["foreground_miou"] == pytest.approx((20 / 38) / 2)
    assert result["pixel_accuracy"] == pytest.approx(70 / 88)


def test_ignored_pixels_count_nowhere():
    prediction, truth = random_pair(0)
    everything = counted([(prediction, truth)])
    changed = torch.where(truth == 255, 1, prediction)
    np.testing.assert_array_equal(counted([(changed, truth)]), everything)
    assert everything.sum() == (truth != 255).sum()
    nothing = counted([(prediction, torch.full_like(truth, 255))])
    assert nothing.sum() == 0
    assert np.isnan(scores(nothing[0])["miou"])


def test_bootstrap_equals_a_plain_loop():
    rng = np.random.default_rng(1)
    matrices = rng.integers(0, 50, (7, 3, 3))
    fast = bootstrap(matrices, resamples=20, seed=5)
    draws = np.random.default_rng(5).integers(7, size=(20, 7))
    for resample, images in enumerate(draws):
        slow = scores(sum(matrices[image] for image in images))
        np.testing.assert_allclose(fast["iou"][resample], slow["iou"])
        np.testing.assert_allclose(fast["miou"][resample], slow["miou"])


def test_interval_and_p_value():
    assert interval(np.array([np.nan, np.nan])) == [None, None]
    low, high = interval(np.append(np.arange(1001) / 1000, np.nan))
    assert (low, high) == pytest.approx((0.025, 0.975))
    assert p_value(np.full(999, 0.1)) == pytest.approx(2 / 1000)
    assert p_value(np.zeros(999)) == 1
    assert p_value(np.linspace(-1, 1, 999)) == pytest.approx(1, abs=0.01)


def test_pick_rows():
    matrices = np.zeros((4, 3, 3), dtype=np.int64)
    matrices[0, 1] = [0, 9, 0]  # perfect on class 1
    matrices[1, 1] = [9, 1, 0]  # bad on class 1
    matrices[2, 2] = [0, 5, 5]  # half right on class 2
    matrices[3, 0] = [9, 0, 0]  # background only: no foreground IoU
    rows, classes = np.array([10, 20, 30, 40]), ["background", "person", "car"]
    assert pick_rows("worst", 1, rows, matrices, classes) == [20]
    assert pick_rows("best", 1, rows, matrices, classes) == [10]
    assert pick_rows("best", 9, rows, matrices, classes) == [10, 30, 20]
    assert pick_rows("car", 9, rows, matrices, classes) == [30]
    assert sorted(pick_rows("random", 9, rows, matrices, classes)) == [10, 20, 30]
    assert len(pick_rows("random", 2, rows, matrices, classes)) == 2
