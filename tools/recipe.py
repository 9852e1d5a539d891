"""This project's recipe for little data beside the usual one, for the same time of one core.

    python tools/recipe.py --data data --seeds 0 1 2

Both train the same network on the same images for as many seconds of the processor, validation not
counted, and each shows the best of ten validations, by one confusion matrix at native size. The
usual recipe is a first script's: images squashed to squares, without augmentation, cross entropy,
Adam at 1e-4, batches of 8, float32.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, interpolate
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import dataset
import metrics
import models
import train
from evaluate import evaluate

RECIPE = "--dice --balance 0.5 --weighted"
VALIDATIONS = 10


def ours(args: argparse.Namespace, seed: int) -> tuple[Iterator[float], Callable]:
    """Steps of `train.py`, which yield the share that is done, and what validates."""
    line = f"--model {args.model} --width {args.width} --size {args.size} --workers 0 --seed {seed}"
    line += f" --weights none --wandb disabled --out runs/none --epochs {args.epochs} {args.flags}"
    line = [*line.split(), "--data", args.data, "--val-split", args.val_split]
    run = train.Run(train.parse_args(line)[0], torch.device("cpu"), "none")

    def steps() -> Iterator[float]:
        for epoch in range(args.epochs):
            run.batches.set_epoch(epoch)
            for batch in run.loader:
                run.model.train()
                run.train_step([batch])
                run.step += 1
                yield run.step / run.batches.steps / args.epochs

    return steps(), lambda: evaluate(run.predictor, run.val_loader, "validate")


def usual(args: argparse.Namespace, seed: int) -> tuple[Iterator[float], Callable]:
    """Steps of the usual recipe, without an end, and what validates."""
    manifest = common.load_manifest(args.data)
    train_rows, val_rows = dataset.split_indices(manifest, seed, args.val_split)
    torch.manual_seed(seed)
    model = models.MODELS[args.model](len(manifest.classes), args.width)
    optimizer, rng = torch.optim.Adam(model.parameters(), lr=1e-4), np.random.default_rng(seed)
    square = [args.size, args.size]

    def load(row: int) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.from_numpy(dataset.load_mask(manifest, row))
        return F.resize(dataset.load_image(manifest, row), square, antialias=True), mask

    def steps() -> Iterator[float]:
        while True:
            order = rng.permutation(train_rows).tolist()
            for start in range(0, len(order) - 7, 8):
                model.train()
                images, masks = zip(*map(load, order[start : start + 8]))
                masks = [interpolate(m[None, None], square, mode="nearest-exact")[0] for m in masks]
                masks = torch.cat(masks).long()
                logits = model(dataset.normalize(torch.stack(images)).contiguous()).values()
                logits = (interpolate(x, square, mode="bilinear") for x in logits)
                loss, *auxiliary = (cross_entropy(x, masks, ignore_index=255) for x in logits)
                optimizer.zero_grad()
                (loss + 0.5 * sum(auxiliary)).backward()
                optimizer.step()
                yield 0.0

    @torch.inference_mode()
    def validate() -> metrics.ConfusionMatrix:
        model.eval()
        shape = len(val_rows), len(manifest.classes)
        confusion = metrics.ConfusionMatrix(*shape, torch.device("cpu"))
        for number, row in enumerate(val_rows.tolist()):
            image, mask = load(row)
            logits = model(dataset.normalize(image[None]).contiguous())["out"]
            logits = interpolate(logits, mask.shape, mode="bilinear")
            confusion.update(number, logits[0].argmax(dim=0).byte(), mask)
        return confusion

    return steps(), validate


def timed(steps: Iterator[float], validate: Callable, seconds: float = math.inf) -> list[tuple]:
    """Train for that time, or all steps. Seconds, foreground mIoU and counts of each validation."""
    used, found, started = 0.0, [], time.process_time()
    for share in tqdm(steps, leave=False, disable=None, unit=" steps"):
        used += time.process_time() - started
        if max(share, used / seconds) * VALIDATIONS >= len(found) + 1:
            counts = validate().counts.numpy()
            found.append((used, float(metrics.scores(counts.sum(0))["foreground_miou"]), counts))
        if used >= seconds:
            break
        started = time.process_time()
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--data", default="data", help="prepared masks")
    add("--val-split", metavar="NAME", default="val2017", help="split that validates")
    add("--model", choices=list(models.MODELS), default="unet", help="network, from scratch")
    add("--width", type=int, default=16, help="of the U-Net; 64 for DeepLab")
    add("--size", type=int, default=96, help="side of the crops, and of the squares")
    add("--epochs", type=int, default=90, help="of ours; the usual recipe gets the time they take")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each per seed")
    add("--flags", default=RECIPE, help="of train.py: the recipe")
    return parser


def main() -> None:
    """Train with both recipes and each seed; print each best validation and the difference."""
    args = build_parser().parse_args()
    torch.set_num_threads(1)
    print("seed recipe", *common.load_manifest(args.data).classes, "foreground  at seconds")
    gains = []
    for seed in args.seeds:
        found = {"ours": timed(*ours(args, seed))}
        found["usual"] = timed(*usual(args, seed), found["ours"][-1][0])
        best = {name: max(validations, key=lambda v: v[1]) for name, validations in found.items()}
        for name, (_, foreground, counts) in best.items():
            iou = " ".join(f"{x:.3f}" for x in metrics.scores(counts.sum(axis=0))["iou"])
            curve = " ".join(f"{value:.3f}@{seconds:.0f}s" for seconds, value, _ in found[name])
            print(f"{seed} {name:>6} {iou} {foreground:.3f}  {curve}", flush=True)
        others = [metrics.leave_one_out(v[2])["foreground_miou"] for v in best.values()]
        gains.append((best["ours"][1] - best["usual"][1], others[0] - others[1]))
    gain, others = (np.mean(values, axis=0) for values in zip(*gains))
    low, high = metrics.jackknife(gain, others)[0]
    print(f"ours - usual, mean of the seeds: {gain:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    common.run_command(main)
