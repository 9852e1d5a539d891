"""Does the loop learn? Fit each model with each loss to 16 images.

    python prepare_masks.py --coco-root coco --split train2017 --out data
    python tools/overfit.py --data data --out overfit

Trains and validates on the same images, for each class the four with most pixels of it, and on
what evaluation shows of them instead of random crops: this asks whether the loop can fit, and so
expects a foreground mIoU above 0.8. Two CPU cores take two hours; an interrupted run goes on.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import dataset
import evaluate
import train

LOSSES = {"ce": "", "weighted": "--weighted", "focal": "--focal"}
LOSSES["weighted-focal"] = "--weighted --focal"
PER_CLASS = 4
# For two CPU cores; at these sizes images of 4:3 and of 3:2 are padded to one shape.
SETTINGS = {
    "unet": {"size": 84, "width": 16, "batch-size": 8, "lr": 4e-3, "epochs": 72},
    "deeplab": {"size": 128, "batch-size": 4, "lr": 1e-3, "epochs": 20, "amp": "bf16"},
}


def choose_images(data: Path) -> np.ndarray:
    """Indices of the images to fit, all of one padded shape. Raises UserError if there are few."""
    manifest = common.load_manifest(data)
    sizes = [settings["size"] for settings in SETTINGS.values()]
    shapes = [
        tuple(dataset.padded_size(*native, size) for size in sizes)
        for native in manifest.sizes.tolist()
    ]
    usual = Counter(shapes).most_common(1)[0][0]
    alike = np.array([shape == usual for shape in shapes])
    chosen = []
    for label, name in enumerate(manifest.classes[1:], start=1):
        area = alike * manifest.pixels[:, label]
        largest = np.argsort(-area, kind="stable")[: np.count_nonzero(area)].tolist()
        found = [index for index in largest if index not in chosen][:PER_CLASS]
        if len(found) < PER_CLASS:
            raise common.UserError(f"{data} holds too few images with {name}: prepare more")
        chosen += found
    return np.sort(chosen)


def evaluation_pair(image, mask, _, size: int, __) -> tuple:
    """In place of `dataset.augment`: an image as evaluation shows it, and its mask likewise. A
    DeepLab that has memorised few images loses ten points of IoU where they are padded otherwise.
    """
    height, width = dataset.resized_size(*mask.shape, size)
    mask = F.resize(mask[None], [height, width], InterpolationMode.NEAREST_EXACT)
    image = dataset.evaluation_input(image, size)
    padding = [0, 0, image.shape[-1] - width, image.shape[-2] - height]
    return image, F.pad(mask, padding, fill=common.IGNORE_INDEX)[0]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="prepared masks")
    parser.add_argument("--out", type=Path, default=Path("overfit"), help="run directories")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    return parser


def main() -> None:
    """Train every configuration, or what is left of it, then evaluate all of them."""
    args = build_parser().parse_args()
    chosen = choose_images(args.data)
    dataset.split_indices = lambda *_: (chosen, chosen)
    dataset.augment, dataset.decoder_scale = evaluation_pair, lambda *_: 1
    classes = common.load_manifest(args.data).classes[1:]
    checkpoints = []
    for model in args.models:
        for loss in args.losses:
            flags = f"--model {model} --weights none --wandb disabled {LOSSES[loss]} --data".split()
            flags += [str(args.data), "--workers", "0", "--oversample", "8", "--rare", *classes]
            for name, value in SETTINGS[model].items():
                flags += [f"--{name}", str(value)]
            out = args.out / f"{model}-{loss}"
            lines = out / "metrics.jsonl"
            done = lines.read_text().count("\n") if lines.exists() else 0
            if done < SETTINGS[model]["epochs"]:
                train.main([*(["--resume"] if lines.exists() else flags), "--out", str(out)])
            checkpoints.append(str(out / "best.pt"))
    evaluate.main(["--ckpt", *checkpoints, "--panels", "8"])


if __name__ == "__main__":
    common.run_command(main)
