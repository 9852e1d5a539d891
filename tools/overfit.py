"""Does the loop learn? Drive each model with each loss to a high IoU on 16 real images.

    python tools/overfit.py --coco-root ../shared/coco_real --split train2017 --out /tmp/overfit

Cuts a small COCO root out of a real one: of each class the four images with its largest instances,
since a small network at a small size cannot draw small ones. The validation split holds the same
images under other names, so that the IoU is that of the images trained on. Instead of random crops
the network is trained on what evaluation shows it, padding included: this asks whether the loop can
fit, not whether it generalises. Not part of the test suite: on a CPU it takes two hours.
"""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import dataset
import evaluate
import prepare_masks
import train
from common import DataError, load_manifest, run_command
from models import ModelError

LOSSES = {"ce": [], "weighted": ["--weighted"], "focal": ["--focal"]}
LOSSES["weighted-focal"] = ["--weighted", "--focal"]
PER_CLASS = 4
TARGET = 0.8  # foreground mIoU; below it a run is resumed for MORE epochs
MORE, LONGEST = 8, 120
# Sizes at which images of 4:3 and of 3:2 are padded to one shape, as a batch must have.
SIZES = {"unet": 84, "deeplab": 128}
SETTINGS = {  # sized for two CPU cores
    "unet": f"--size {SIZES['unet']} --width 16 --batch-size 8 --lr 4e-3 --epochs 72",
    "deeplab": f"--size {SIZES['deeplab']} --weights none --batch-size 4 --lr 1e-3 --epochs 20 "
    "--amp bf16",
}


def evaluation_pair(size: int):
    """Transform of an image to what evaluation makes of it, and of its mask likewise.

    Padding matters to a network that has seen few images: DeepLab, whose pooling and dilations
    reach across the whole image, lost up to ten points of IoU where images were padded otherwise.
    """

    def transform(image: tv_tensors.Image, mask: tv_tensors.Mask):
        height, width = dataset.resized_size(*mask.shape, size)
        nearest = v2.InterpolationMode.NEAREST_EXACT
        mask = F.resize(mask.as_subclass(torch.Tensor)[None], [height, width], nearest)
        image = dataset.evaluation_input(image.as_subclass(torch.Tensor), size)
        padding = [0, 0, image.shape[-1] - width, image.shape[-2] - height]
        return image, F.pad(mask, padding, fill=255)[0]

    return transform


def run(script, *arguments: object) -> None:
    """Call a script's main as its command line does."""
    arguments = [str(argument) for argument in arguments]
    print("$ python", Path(script.__file__).name, *arguments, flush=True)
    script.main(arguments)


def cut(root: Path, split: str, out: Path) -> None:
    """Write out/coco: the chosen images as train2017 and, under other names, as val2017."""
    run(prepare_masks, "--coco-root", root, "--split", split, "--out", out / "all")
    manifest = load_manifest(out / "all")
    rows = json.loads((out / "all" / "manifest.json").read_text())["images"]
    instances = np.array([row["instances"] for row in rows])
    shapes = [
        tuple(dataset.padded_size(*native, size) for size in SIZES.values())
        for native in manifest.sizes.tolist()
    ]
    usual = Counter(shapes).most_common(1)[0][0]
    alike = np.array([shape == usual for shape in shapes])
    chosen = []
    for label in range(1, len(manifest.classes)):
        area = alike * manifest.pixels[:, label] / np.maximum(instances[:, label], 1)
        order = np.argsort(-area, kind="stable")[: np.count_nonzero(area)].tolist()
        chosen += [row for row in order if row not in chosen][:PER_CLASS]
    if len(chosen) < PER_CLASS * (len(manifest.classes) - 1):
        raise DataError(f"{split} holds fewer than {PER_CLASS} images of a class: give another one")
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    ids = set(manifest.ids[chosen].tolist())
    images = [image for image in content["images"] if image["id"] in ids]
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    files = dict(zip(manifest.ids.tolist(), manifest.files.tolist()))
    (out / "coco" / "annotations").mkdir(parents=True, exist_ok=True)
    for name, prefix in (("train2017", ""), ("val2017", "copy_")):
        (out / "coco" / name).mkdir(exist_ok=True)
        for image in images:
            target = out / "coco" / name / (prefix + image["file_name"])
            shutil.copy(root / files[image["id"]], target)
        named = [{**image, "file_name": prefix + image["file_name"]} for image in images]
        cut = {"images": named, "annotations": annotations, "categories": content["categories"]}
        (out / "coco" / "annotations" / f"instances_{name}.json").write_text(json.dumps(cut))


def drive(out: Path, flags: list) -> None:
    """Train, and resume until the best epoch reaches TARGET."""
    if not (out / "last.pt").exists():
        run(train, *flags, "--out", out)
    while True:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        if max((line["val_foreground_miou"] or 0 for line in lines), default=0) >= TARGET:
            return
        if len(lines) > LONGEST:
            raise SystemExit(f"{out} does not reach a foreground mIoU of {TARGET}")
        run(train, "--resume", out / "last.pt", "--epochs", len(lines) + MORE)


def main() -> None:
    """Cut, prepare, drive every configuration to TARGET, evaluate all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--coco-root", type=Path, required=True)
    parser.add_argument("--split", default="train2017")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    args = parser.parse_args()
    dataset.training_transform = evaluation_pair
    if not (args.out / "coco" / "annotations" / "instances_val2017.json").exists():
        cut(args.coco_root, args.split, args.out)
    data = args.out / "data"
    splits = ["--split", "train2017", "val2017"]
    if not (data / "manifest.json").exists():
        run(prepare_masks, "--coco-root", args.out / "coco", *splits, "--out", data)
    everything = ["--oversample", 8, "--rare", *load_manifest(data).classes[1:]]
    checkpoints = []
    for model in args.models:
        for name in args.losses:
            out = args.out / "runs" / f"{model}-{name}"
            checkpoints.append(out / "best.pt")
            common = ["--data", data, "--val-split", "val2017", "--wandb", "disabled"]
            settings = [*SETTINGS[model].split(), *LOSSES[name], *everything]
            drive(out, [*common, "--model", model, *settings])
    report = ["--json", args.out / "report.json", "--panels", 8, "--pick", "worst"]
    run(evaluate, "--ckpt", *checkpoints, *report)


if __name__ == "__main__":
    run_command(main, DataError, ModelError)
