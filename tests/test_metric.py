"""The confusion matrix and its scores against independent referees, and the bootstrap."""

import numpy as np
import pytest
import torch

from metrics import ConfusionMatrix, add_differences, bootstrap, interval, pick, report, scores

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
    sklearn = pytest.importorskip("sklearn.metrics")
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    pairs = [random_pair(seed) for seed in range(4)]
    confusion = counted(pairs).sum(axis=0)
    truth = torch.stack([t for _, t in pairs]).numpy().ravel()
    prediction = torch.stack([p for p, _ in pairs]).numpy().ravel()
    valid = truth != 255
    expected = sklearn.confusion_matrix(truth[valid], prediction[valid], labels=range(6))
    np.testing.assert_array_equal(confusion, expected)

    result = scores(confusion)
    assert np.isnan(result["iou"][[2, 5]]).all()
    present = [0, 1, 3, 4]
    referee = sklearn.jaccard_score(truth[valid], prediction[valid], labels=present, average=None)
    np.testing.assert_allclose(result["iou"][present], referee)
    assert result["miou"] == pytest.approx(referee.mean())
    assert result["foreground_miou"] == pytest.approx(referee[1:].mean())

    metric = torchmetrics.MulticlassJaccardIndex(6, average="none", ignore_index=255)
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
    fast = bootstrap(matrices, resamples=20)
    draws = np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=20)
    for resample, times in enumerate(draws):
        slow = scores(sum(count * matrix for count, matrix in zip(times, matrices)))
        np.testing.assert_allclose(fast["iou"][resample], slow["iou"])
        np.testing.assert_allclose(fast["miou"][resample], slow["miou"])


def test_interval():
    assert interval(np.array([np.nan, np.nan])) == [None, None]
    low, high = interval(np.append(np.arange(1001) / 1000, np.nan))
    assert (low, high) == pytest.approx((0.025, 0.975))


def p_value(one, other, resamples):
    entries = [
        report("", ["background", "person"], m, resamples=0, images="") for m in (one, other)
    ]
    add_differences(entries, [one, other], resamples)
    return entries[1]["difference"]["miou"]["p"]


def test_p_value_of_equal_and_of_different_models():
    matrices = np.random.default_rng(0).integers(1, 50, (30, 2, 2))
    assert p_value(matrices, matrices, 999) == 1
    worse = matrices + [[0, 90], [90, 0]]
    assert p_value(matrices, worse, 999) == pytest.approx(2 / 1000)


def test_pick_rows():
    matrices = np.zeros((4, 3, 3), dtype=np.int64)
    matrices[0, 1] = [0, 9, 0]  # perfect on class 1
    matrices[1, 1] = [9, 1, 0]  # bad on class 1
    matrices[2, 2] = [0, 5, 5]  # half right on class 2
    matrices[3, 0] = [9, 0, 0]  # background only: no foreground IoU
    classes = ["background", "person", "car"]
    assert pick("worst", 1, matrices, classes).tolist() == [1]
    assert pick("best", 1, matrices, classes).tolist() == [0]
    assert pick("best", 9, matrices, classes).tolist() == [0, 2, 1]
    assert pick("car", 9, matrices, classes).tolist() == [2]
    assert sorted(pick("random", 9, matrices, classes)) == [0, 1, 2]
    assert len(pick("random", 2, matrices, classes)) == 2


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of 95% intervals of samples from a known population, 92 to 98% hold its IoU."""
    rng = np.random.default_rng(0)
    population = rng.gamma(2, 50, (20_000, 2, 2)) * rng.beta(2, 2, (20_000, 1, 1))
    population[rng.random(20_000) < 0.4, 1] = 0  # images without the class
    truth = scores(population.sum(axis=0))
    held = {"iou": 0, "miou": 0, "foreground_miou": 0}
    trials = 600
    for _ in range(trials):
        sample = population[rng.integers(len(population), size=150)]
        samples = bootstrap(sample, resamples=400)
        for key in held:
            low, high = interval(samples[key][..., 1] if key == "iou" else samples[key])
            held[key] += low <= (truth[key][1] if key == "iou" else truth[key]) <= high
    for key, count in held.items():
        assert 0.92 <= count / trials <= 0.98, (key, count / trials)
