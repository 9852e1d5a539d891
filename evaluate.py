"""Class-wise IoU of checkpoints on their validation images, and pictures of what they get wrong.

    python evaluate.py --ckpt runs/unet/best.pt runs/deeplab/best.pt --json report.json --panels 6

One confusion matrix over the whole split, at the native size of the masks; ignored pixels count
nowhere; a class that neither truth nor prediction holds has no IoU and enters no mean.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from torchvision.utils import draw_segmentation_masks
from tqdm import tqdm

from dataset import (
    evaluation_loader,
    normalize,
    read_pair,
    resized_size,
)
from manifest import (
    IGNORE_COLOR,
    IGNORE_INDEX,
    DataError,
    Manifest,
    command_parser,
    default_workers,
    load_manifest,
    run_command,
    write_json,
)
from models import ModelError, amp_dtype, load_checkpoint, model_from_checkpoint, pick_device

MEANS = ("miou", "foreground_miou")
ERROR_COLOR = (220, 30, 30)
PANEL_WIDTH = 320


# --- the metric --------------------------------------------------------------------------------


class ConfusionMatrix:
    """Pixel counts by (truth, prediction), one int64 matrix an image, kept on the device.

    `update` reads nothing back: ignored pixels go to a bin of their own, which is dropped, instead
    of being selected away, and scatter_add_ needs no look at the largest index as bincount does.
    """

    def __init__(self, images: int, classes: int, device: torch.device):
        self.classes = classes
        self.bins = torch.zeros(images, classes * classes + 1, dtype=torch.int64, device=device)
        self.one = torch.ones(1, dtype=torch.int64, device=device)

    def update(self, image: int, prediction: torch.Tensor, mask: torch.Tensor) -> None:
        """Count the pixels of one image. Both are (H, W) integer; the mask may hold 255."""
        bins = mask.long() * self.classes + prediction
        bins = torch.where(mask == IGNORE_INDEX, self.classes**2, bins).flatten()
        self.bins[image].scatter_add_(0, bins, self.one.expand(len(bins)))

    def matrices(self) -> np.ndarray:
        """(images, classes, classes) int64, rows truth, columns prediction. Reads the device."""
        return self.bins[:, :-1].reshape(-1, self.classes, self.classes).cpu().numpy()


def scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of (..., C, C) confusion matrices, as fractions, NaN where there is nothing to divide.

    iou, precision and recall are (..., C); miou, foreground_miou (without label 0) and
    pixel_accuracy are (...). Means leave NaN out.
    """
    confusion = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    truth, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    iou = _divide(hits, truth + predicted - hits)
    return {
        "iou": iou,
        "precision": _divide(hits, predicted),
        "recall": _divide(hits, truth),
        "miou": _mean(iou),
        "foreground_miou": _mean(iou[..., 1:]),
        "pixel_accuracy": _divide(hits.sum(axis=-1), truth.sum(axis=-1)),
    }


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    present = ~np.isnan(values)
    return _divide(np.where(present, values, 0).sum(axis=-1), present.sum(axis=-1))


def bootstrap(matrices: np.ndarray, resamples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """`scores` of `resamples` resamples of the images (Efron 1979): arrays with a leading axis.

    matrices: (N, C, C). A resample is a count an image, so all of them are one matrix product. The
    same seed and N draw the same images, so the results of two checkpoints are paired.
    """
    count = len(matrices)
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))
    draws += count * np.arange(resamples)[:, None]
    times = np.bincount(draws.ravel(), minlength=resamples * count).reshape(resamples, count)
    pooled = times.astype(np.float64) @ matrices.reshape(count, -1).astype(np.float64)
    return scores(pooled.reshape(resamples, *matrices.shape[1:]))


def interval(samples: np.ndarray) -> list[float | None]:
    """The central 95% of samples, [low, high], NaN left out; [None, None] if nothing is left."""
    samples = samples[~np.isnan(samples)]
    return np.percentile(samples, [2.5, 97.5]).tolist() if len(samples) else [None, None]


def p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of resampled differences against 0, never exactly 0."""
    below, above = (differences <= 0).sum(), (differences >= 0).sum()
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))


# --- running a model ---------------------------------------------------------------------------


def predict_batches(
    model: torch.nn.Module, loader: DataLoader, device: torch.device, dtype: torch.dtype | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Row, prediction (H, W) int64 and mask (H, W) uint8 of every image, native, on the device."""
    dataset = loader.dataset
    for images, masks, rows in loader:
        images = normalize(images.to(device, non_blocking=True))
        masks = masks.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = model(images)["out"]
        for row, image_logits, mask in zip(rows, logits, masks):
            height, width = dataset.manifest.sizes[row].tolist()
            prediction = native_prediction(image_logits, height, width, dataset.size)
            yield row, prediction, mask[:height, :width]


def native_prediction(logits: torch.Tensor, height: int, width: int, size: int) -> torch.Tensor:
    """(H, W) int64 labels from (C, h, w) logits of an image evaluated at `size`.

    The padding is cut off, and the logits, not the labels, are brought to the native size.
    """
    h, w = resized_size(height, width, size)
    logits = logits[None, :, :h, :w].float()
    logits = F.interpolate(logits, size=(height, width), mode="bilinear", align_corners=False)
    return logits[0].max(dim=0).indices  # on a CPU ten times as fast as argmax


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype | None = None,
    description: str = "evaluate",
) -> np.ndarray:
    """Confusion matrices (N, C, C) int64 of the loader's N images, in ascending order of rows.

    The model is put into evaluation mode and left there.
    """
    model.eval()
    rows = sorted(row for batch in loader.batch_sampler for row in batch)
    position = {row: index for index, row in enumerate(rows)}
    confusion = ConfusionMatrix(len(rows), len(loader.dataset.manifest.classes), device)
    seen = 0
    with tqdm(total=len(rows), desc=description, unit="image", leave=False, disable=None) as bar:
        for row, prediction, mask in predict_batches(model, loader, device, dtype):
            confusion.update(position[row], prediction, mask)
            seen += 1
            bar.update()
    assert seen == len(rows), f"{seen} images evaluated, {len(rows)} expected"
    return confusion.matrices()


# --- the report --------------------------------------------------------------------------------


def report(name: str, classes: list[str], matrices: np.ndarray, resamples: int) -> dict:
    """The JSON entry of a checkpoint: plain types, fractions, None for what does not exist."""
    confusion = matrices.sum(axis=0)
    values = scores(confusion)
    entry = {
        "ckpt": name,
        "classes": classes,
        "confusion": confusion.tolist(),
        **{key: by_class(classes, values[key]) for key in ("iou", "precision", "recall")},
        **{key: plain(values[key]) for key in (*MEANS, "pixel_accuracy")},
        "images": len(matrices),
        "images_with_class": dict(zip(classes, (matrices.sum(axis=2) > 0).sum(axis=0).tolist())),
    }
    if resamples:
        samples = bootstrap(matrices, resamples)
        entry["interval"] = {
            "iou": {name: interval(s) for name, s in zip(classes, samples["iou"].T)},
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
            entry["difference"][key] = {
                "value": entry[key] - entries[0][key],
                "interval": interval(differences),
                "p": p_value(differences),
            }


def plain(value: np.ndarray) -> float | None:
    """A Python float, None for NaN."""
    return None if np.isnan(value) else float(value)


def by_class(classes: list[str], values: np.ndarray) -> dict[str, float | None]:
    """{class name: value or None}."""
    return {name: plain(value) for name, value in zip(classes, values)}


def print_table(entries: list[dict]) -> None:
    """A row a checkpoint in percent, its intervals below; then the differences to the first."""
    classes = entries[0]["classes"]
    width = max(13, *(len(name) + 2 for name in classes))
    names = max(len(entry["ckpt"]) for entry in entries)
    heads = [*classes, "mIoU", "fg mIoU", "accuracy"]
    print(f"{'IoU, %':<{names}}" + "".join(f"{head:>{width}}" for head in heads))
    for entry in entries:
        cells = [*entry["iou"].values(), *(entry[key] for key in (*MEANS, "pixel_accuracy"))]
        print(f"{entry['ckpt']:<{names}}" + "".join(f"{percent(c):>{width}}" for c in cells))
        if "interval" in entry:
            pairs = [*entry["interval"]["iou"].values(), *(entry["interval"][k] for k in MEANS)]
            cells = [f"{percent(low)}-{percent(high)}" for low, high in pairs]
            print(" " * names + "".join(f"{cell:>{width}}" for cell in cells))
    note = "; below each IoU its 95% bootstrap interval over images"
    print(f"{entries[0]['images']} images{note if 'interval' in entries[0] else ''}")
    for entry in entries[1:]:
        for key, d in entry.get("difference", {}).items():
            low, high = d["interval"]
            print(
                f"{entry['ckpt']} against {entries[0]['ckpt']}, {key}: {100 * d['value']:+.1f} "
                f"points [{100 * low:+.1f}, {100 * high:+.1f}], p = {d['p']:.3f}"
            )


def percent(value: float | None) -> str:
    """A fraction as a percentage with one digit, "-" for none."""
    return "-" if value is None else f"{100 * value:.1f}"


# --- pictures ----------------------------------------------------------------------------------


def pick_rows(
    pick: str, count: int, rows: np.ndarray, matrices: np.ndarray, classes: list[str]
) -> list[int]:
    """`count` rows to draw: "worst" or "best" by an image's own foreground mIoU, "random" ones of
    those that have one (neither mask nor prediction is all background), or those that hold most of
    a class."""
    if pick in classes:
        area = matrices[:, classes.index(pick)].sum(axis=1)
        order = np.argsort(-area, kind="stable")[: np.count_nonzero(area)]
        return rows[order[:count]].tolist()
    value = scores(matrices)["foreground_miou"]
    order = np.argsort(-value if pick == "best" else value, kind="stable")  # NaN sorts last
    order = order[: np.count_nonzero(~np.isnan(value))]
    if pick == "random":
        order = np.random.default_rng(0).permutation(order)
    return rows[order[:count]].tolist()


def overlay(image: torch.Tensor, mask: torch.Tensor, manifest: Manifest) -> torch.Tensor:
    """(3, H, W) uint8 picture with the classes of an (H, W) mask laid over it; background stays."""
    labels = [*range(1, len(manifest.classes)), IGNORE_INDEX]
    colors = [*manifest.colors[1:], IGNORE_COLOR]
    layers = torch.stack([mask == label for label in labels])
    return draw_segmentation_masks(image, layers, alpha=0.65, colors=colors)


def error_picture(
    image: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """(3, H, W) uint8: the picture pale and grey, wrong pixels red, ignored ones white."""
    pale = (128 + image.float().mean(dim=0, keepdim=True) / 3).to(torch.uint8).expand(3, -1, -1)
    ignored = mask == IGNORE_INDEX
    layers = torch.stack([(prediction != mask) & ~ignored, ignored])
    return draw_segmentation_masks(pale, layers, alpha=0.9, colors=[ERROR_COLOR, IGNORE_COLOR])


@torch.inference_mode()
def draw_panels(
    path: Path,
    model: torch.nn.Module,
    manifest: Manifest,
    rows: list[int],
    size: int,
    device: torch.device,
) -> None:
    """Write a picture: a legend, then a row an image: image, ground truth, prediction, errors."""
    loader = evaluation_loader(manifest, np.array(rows), size, batch_size=1, workers=0)
    strips = {}
    for row, prediction, mask in predict_batches(model.eval(), loader, device, None):
        prediction, mask = prediction.cpu(), mask.cpu()
        image, _ = read_pair(manifest, row)
        confusion = ConfusionMatrix(1, len(manifest.classes), torch.device("cpu"))
        confusion.update(0, prediction, mask)
        iou = scores(confusion.matrices()[0])["iou"]
        caption = [f"{name} {percent(plain(v))}" for name, v in zip(manifest.classes, iou)]
        caption = f"{manifest.files[row]}   IoU %: " + ", ".join(c for c in caption if c[-1] != "-")
        pictures = [
            image,
            overlay(image, mask, manifest),
            overlay(image, prediction, manifest),
            error_picture(image, prediction, mask),
        ]
        strips[row] = _strip(pictures, caption)
    strips = [_legend(manifest), *(strips[row] for row in rows)]
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    try:
        sheet.save(path)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error})") from None


def _strip(pictures: list[torch.Tensor], caption: str) -> Image.Image:
    height, width = pictures[0].shape[-2:]
    panel = (PANEL_WIDTH, max(1, round(PANEL_WIDTH * height / width)))
    if panel[1] > PANEL_WIDTH:  # portrait: no taller than wide, centred
        panel = (max(1, round(PANEL_WIDTH * width / height)), PANEL_WIDTH)
    strip = Image.new("RGB", (len(pictures) * (PANEL_WIDTH + 4), panel[1] + 26), "white")
    for column, picture in enumerate(pictures):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(panel)
        strip.paste(image, (column * (PANEL_WIDTH + 4) + 2 + (PANEL_WIDTH - panel[0]) // 2, 2))
    ImageDraw.Draw(strip).text((4, panel[1] + 5), caption, "black", ImageFont.load_default(13))
    return strip


def _legend(manifest: Manifest) -> Image.Image:
    font = ImageFont.load_default(15)
    entries = [*zip(manifest.classes[1:], manifest.colors[1:])]
    entries += [("ignored", IGNORE_COLOR), ("wrong", ERROR_COLOR)]
    total, lines, x = 4 * (PANEL_WIDTH + 4), [[]], 6
    for name, color in entries:
        width = 34 + round(font.getlength(name))
        if x + width > total:
            lines.append([])
            x = 6
        lines[-1].append((x, name, color))
        x += width
    legend = Image.new("RGB", (total, 26 * len(lines) + 24), "white")
    draw = ImageDraw.Draw(legend)
    for number, line in enumerate(lines):
        y = 26 * number + 6
        for x, name, color in line:
            draw.rectangle((x, y, x + 16, y + 16), fill=color, outline="black")
            draw.text((x + 21, y), name, "black", font)
    for column, title in enumerate(("image", "ground truth", "prediction", "errors")):
        x = column * (PANEL_WIDTH + 4) + (PANEL_WIDTH - font.getlength(title)) / 2
        draw.text((x, legend.height - 22), title, "black", font)
    return legend


# --- command line ------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser(
        "Class-wise IoU of checkpoints on the images that they were validated on.",
        "python evaluate.py --ckpt runs/deeplab/best.pt --panels 6 --pick worst",
    )
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="PATH", help="checkpoints; one table for all")
    add("--data", help="data directory, if not the one that the checkpoint was trained on")
    add("--json", type=Path, metavar="FILE", help="write the report here too")
    add("--panels", type=int, default=0, metavar="N", help="draw N images to CKPT_panels.png")
    add("--pick", default="worst", help="which: worst, best, random, or a class name")
    add("--bootstrap", type=int, default=2000, metavar="N", help="resamples; 0 for no intervals")
    add("--batch-size", type=int, default=8, help="images at once")
    add("--workers", type=int, default=default_workers(), help="loader processes")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def checked_rows(path: str, state: dict, manifest: Manifest) -> np.ndarray:
    """Validation rows of a checkpoint. Raises DataError if its classes are not the manifest's."""
    if state["classes"] != manifest.classes:
        raise DataError(
            f"{path} was trained on {', '.join(state['classes'])}, but {manifest.data} holds "
            f"{', '.join(manifest.classes)}: give its own data directory with --data"
        )
    return manifest.rows(state["val_ids"])


def main(argv: list[str] | None = None) -> None:
    """Evaluate each checkpoint, print the table, write the report and the pictures."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.panels, args.bootstrap, args.workers) < 0 or args.batch_size < 1:
        parser.error("--panels, --bootstrap and --workers start at 0, --batch-size at 1")
    device = pick_device(args.device)
    states = [load_checkpoint(path) for path in args.ckpt]
    manifests = [load_manifest(args.data or state["args"]["data"]) for state in states]
    all_rows = [checked_rows(*item) for item in zip(args.ckpt, states, manifests)]
    classes = states[0]["classes"]
    for path, state in zip(args.ckpt, states):
        if state["val_ids"] != states[0]["val_ids"] or state["classes"] != classes:
            raise DataError(
                f"{path} was validated on other images or classes than {args.ckpt[0]}: "
                "they cannot stand in one table"
            )
    if args.pick not in ("worst", "best", "random", *classes[1:]):
        raise DataError(
            f"--pick {args.pick}: choose worst, best, random or {', '.join(classes[1:])}"
        )

    entries, all_matrices = [], []
    for path, state, manifest, rows in zip(args.ckpt, states, manifests, all_rows):
        model = model_from_checkpoint(state, device)
        size = state["args"]["size"]
        loader = evaluation_loader(manifest, rows, size, args.batch_size, args.workers)
        matrices = evaluate(model, loader, device, amp_dtype(args.amp, device), path)
        entries.append(report(path, classes, matrices, args.bootstrap))
        all_matrices.append(matrices)
        if args.panels:
            picture = Path(path).with_name(Path(path).stem + "_panels.png")
            chosen = pick_rows(args.pick, args.panels, np.sort(rows), matrices, classes)
            draw_panels(picture, model, manifest, chosen, size, device)
            print(f"picture: {picture}")
    if args.bootstrap:
        add_differences(entries, all_matrices, args.bootstrap)
    print_table(entries)
    if args.json:
        write_json(args.json, entries)


if __name__ == "__main__":
    run_command(main, DataError, ModelError)
