"""Confusion matrices, their scores with bootstrap intervals, and tables of them.

    confusion = ConfusionMatrix(images=100, classes=5, device=device)
    confusion.update(0, prediction, mask)
    values = scores(confusion.matrices().sum(axis=0))

All of it from one (C, C) matrix of pixel counts per image, rows truth, columns prediction.
"""

import numpy as np
import torch
from torch import Tensor

from common import IGNORE_INDEX

MEANS = {"miou": "mean", "foreground_miou": "foreground mean"}
MATRIX_LABELS = 12  # up to so many, a confusion matrix is printed whole
LARGEST = 20  # of more labels, so many confusions

Table = tuple[str, list[list[str]]]  # a title, and rows of cells of which the first is the head


class ConfusionMatrix:
    """Pixel counts by (truth, prediction), one int64 matrix per image, kept on the device.

    `update` reads nothing back: ignored pixels go to a bin of their own instead of being selected
    away, and scatter_add_, unlike bincount, need not know the largest index.
    """

    def __init__(self, images: int, classes: int, device: torch.device):
        self.classes = classes
        self.bins = torch.zeros(images, classes * classes + 1, dtype=torch.int64, device=device)
        self.one = torch.ones(1, dtype=torch.int64, device=device)

    def update(self, image: int, prediction: Tensor, mask: Tensor) -> None:
        """Count the pixels of one image. Both are (H, W) integer; the mask may hold 255."""
        bins = mask.int() * self.classes + prediction  # int64 would take five times as long
        bins = torch.where(mask == IGNORE_INDEX, self.classes**2, bins).flatten().long()
        self.bins[image].scatter_add_(0, bins, self.one.expand(len(bins)))

    def matrices(self) -> np.ndarray:
        """(images, C, C) int64, rows truth, columns prediction. Reads the device."""
        return self.bins[:, :-1].reshape(-1, self.classes, self.classes).cpu().numpy()


def scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of (..., C, C) confusion matrices, as fractions, NaN where there is nothing to divide:
    (..., C) by class, and (...) means, which leave NaN out (foreground_miou label 0 as well)."""
    confusion = np.asarray(confusion, dtype=np.float64)
    true_positives = np.diagonal(confusion, axis1=-2, axis2=-1)
    truth, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    iou = _divide(true_positives, truth + predicted - true_positives)
    return {
        "iou": iou,
        "precision": _divide(true_positives, predicted),
        "recall": _divide(true_positives, truth),
        "miou": _mean(iou),
        "foreground_miou": _mean(iou[..., 1:]),
        "pixel_accuracy": _divide(true_positives.sum(axis=-1), truth.sum(axis=-1)),
    }


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    present = ~np.isnan(values)
    return _divide(np.where(present, values, 0).sum(axis=-1), present.sum(axis=-1))


def bootstrap(matrices: np.ndarray, resamples: int) -> dict[str, np.ndarray]:
    """`scores` of `resamples` resamples of the N images (Efron 1979), with a leading axis.

    matrices: (N, C, C). All resamples are one matrix product: of how often each draws an image, and
    the images' counts. The same N draws the same images, so results of two checkpoints are paired.
    """
    count, rng = len(matrices), np.random.default_rng(0)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    pooled = draws @ matrices.reshape(count, -1).astype(np.float64)
    return scores(pooled.reshape(resamples, *matrices.shape[1:]))


def interval(samples: np.ndarray) -> list[float | None]:
    """The central 95% of samples, [low, high], NaN left out; [None, None] if nothing is left."""
    samples = samples[~np.isnan(samples)]
    return np.percentile(samples, [2.5, 97.5]).tolist() if len(samples) else [None, None]


def report(
    ckpt: str, classes: list[str], matrices: np.ndarray, resamples: int, images: str
) -> dict:
    """The JSON entry of a checkpoint: plain types, fractions, None for what does not exist.
    matrices: (N, C, C) of its N validation, training or all `images`."""
    confusion = matrices.sum(axis=0)
    entry = {"ckpt": ckpt, "classes": classes, "confusion": confusion.tolist()}
    for key, values in scores(confusion).items():
        by_class = values.ndim > 0
        entry[key] = dict(zip(classes, map(plain, values))) if by_class else plain(values)
    holding = (matrices.sum(axis=2) > 0).sum(axis=0).tolist()
    entry |= {"images": len(matrices), "evaluated_on": images}
    entry["images_with_class"] = dict(zip(classes, holding))
    if resamples:
        samples = bootstrap(matrices, resamples)
        entry["interval"] = {
            "iou": dict(zip(classes, map(interval, samples["iou"].T))),
            **{key: interval(samples[key]) for key in MEANS},
        }
    return entry


def add_differences(entries: list[dict], all_matrices: list[np.ndarray], resamples: int) -> None:
    """Give all entries but the first their paired difference to it: value, interval, p-value."""
    first = bootstrap(all_matrices[0], resamples)
    for entry, matrices in zip(entries[1:], all_matrices[1:]):
        samples = bootstrap(matrices, resamples)
        entry["difference"] = {}
        for key in MEANS:
            if entry[key] is None or entries[0][key] is None:
                continue
            differences = samples[key] - first[key]
            tail = int(min((differences <= 0).sum(), (differences >= 0).sum()))
            entry["difference"][key] = {
                "value": entry[key] - entries[0][key],
                "interval": interval(differences),
                "p": min(1.0, 2 * (tail + 1) / (resamples + 1)),  # two-sided, never 0
            }


def plain(value: np.ndarray) -> float | None:
    """A Python float, None for NaN."""
    return None if np.isnan(value) else float(value)


def pick(how: str, count: int, matrices: np.ndarray, classes: list[str]) -> np.ndarray:
    """Numbers of up to `count` of the images of (N, C, C) matrices: the "worst" or "best" by their
    own foreground mIoU, "random" ones of those that have one, or those that hold most of a class.
    """
    if how in classes:
        area = matrices[:, classes.index(how)].sum(axis=1)
        return np.argsort(-area, kind="stable")[: min(count, np.count_nonzero(area))]
    value = scores(matrices)["foreground_miou"]  # NaN, if neither mask nor prediction has any
    order = np.argsort(-value if how == "best" else value, kind="stable")  # NaN sorts last
    order = order[: np.count_nonzero(~np.isnan(value))]
    return (np.random.default_rng(0).permutation(order) if how == "random" else order)[:count]


def tables(entries: list[dict]) -> list[Table]:
    """What the report says, for a person: of several a comparison first, then each in detail."""
    result = [comparison_table(entries)] if len(entries) > 1 else []
    if "difference" in entries[-1]:
        result.append(difference_table(entries))
    for entry in entries:
        result += [class_table(entry), confusion_table(entry)]
    return result


def comparison_table(entries: list[dict]) -> Table:
    """IoU of every class and the means, a row per checkpoint, below it the intervals."""
    first = entries[0]
    rows = [["", *first["classes"], "mean", "fg mean", "accuracy"]]
    for entry in entries:
        cells = [*entry["iou"].values(), *(entry[key] for key in (*MEANS, "pixel_accuracy"))]
        rows.append([entry["ckpt"], *map(percent, cells)])
        if "interval" in entry:
            pairs = [*entry["interval"]["iou"].values(), *(entry["interval"][k] for k in MEANS)]
            rows.append(["", *map(span, pairs), ""])
    note = "; below each its 95% bootstrap interval over images" if "interval" in first else ""
    return f"IoU in % on {first['images']} {first['evaluated_on']} images{note}", rows


def difference_table(entries: list[dict]) -> Table:
    """Paired differences of the means to the first checkpoint."""
    rows = [["", "of", "points", "95% interval", "p"]]
    for entry in entries[1:]:
        for key, found in entry["difference"].items():
            points, low, high = (f"{100 * x:+.1f}" for x in (found["value"], *found["interval"]))
            p = f"{found['p']:.3f}"
            rows.append([entry["ckpt"], MEANS[key], points, f"{low} to {high}", p])
    return f"Difference to {entries[0]['ckpt']} on the same images", rows


def class_table(entry: dict) -> Table:
    """IoU, precision, recall and images of each class of a checkpoint."""
    intervals = entry.get("interval", {"iou": {}})
    rows = [["", "IoU", "95% interval", "precision", "recall", "images with it"]]
    for name in entry["classes"]:
        cells = [percent(entry["iou"][name]), span(intervals["iou"].get(name))]
        cells += [percent(entry[key][name]) for key in ("precision", "recall")]
        rows.append([name, *cells, str(entry["images_with_class"][name])])
    for key, name in MEANS.items():
        rows.append([name, percent(entry[key]), span(intervals.get(key)), "", "", ""])
    rows.append(["pixel accuracy", percent(entry["pixel_accuracy"]), "", "", "", ""])
    return f"{entry['ckpt']} on {entry['images']} {entry['evaluated_on']} images, in %", rows


def confusion_table(entry: dict) -> Table:
    """Where the pixels of each true class went; of many classes the largest confusions only."""
    classes, confusion = entry["classes"], np.array(entry["confusion"])
    share = _divide(confusion, confusion.sum(axis=1, keepdims=True))
    title = f"{entry['ckpt']}: what the pixels of a class are taken for, in %"
    if len(classes) <= MATRIX_LABELS:
        rows = [["", *classes]]
        return title, rows + [[n, *(percent(plain(v)) for v in r)] for n, r in zip(classes, share)]
    share = np.where(np.eye(len(classes), dtype=bool), 0, np.nan_to_num(share))
    rows = [["", "taken for", "share"]]
    for place in np.argsort(-share, axis=None, kind="stable")[:LARGEST]:
        truth, label = divmod(int(place), len(classes))
        rows.append([classes[truth], classes[label], percent(share[truth, label])])
    return title, rows


def as_text(table: Table) -> str:
    """The table in columns; the first to the left, the others to the right."""
    title, rows = table
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [title]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    """The table in Markdown."""
    title, (head, *rows) = table
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(r)} |" for r in (head, rule, *rows))])


def percent(value: float | None) -> str:
    """A fraction as a percentage with one digit, "-" for none."""
    return "-" if value is None else f"{100 * value:.1f}"


def span(bounds: list[float | None] | None) -> str:
    """An interval in percent, empty without one."""
    return "" if bounds is None else " to ".join(map(percent, bounds))
