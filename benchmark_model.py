"""The stages of benchmark.py that need torch, which must not count as memory of making masks.

Each stage yields tables: a title, a unit, and the ways to do it by name, the straightforward one
first, as a function that returns a rate in that unit and its arguments.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dataset import MEAN, STD, split_rows
from evaluate import ConfusionMatrix, native_prediction
from manifest import IGNORE_INDEX, DataError, Manifest, load_manifest
from models import build_model
from report import bootstrap, scores

Stages = Iterator[tuple[str, str, dict[str, tuple]]]


# --- training ------------------------------------------------------------------------------------


class StraightforwardSet(Dataset):
    """Crops as most scripts make them: float32, normalised in the loader's processes."""

    def __init__(self, manifest: Manifest, rows: np.ndarray, size: int):
        self.manifest, self.rows, self.size = manifest, rows, size
        self.jitter = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        manifest, row, size = self.manifest, self.rows[index], [self.size, self.size]
        with Image.open(manifest.root / manifest.files[row]) as file:
            image = F.pil_to_tensor(file.convert("RGB"))
        with Image.open(manifest.data / "masks_raw" / manifest.masks[row]) as file:
            mask = F.pil_to_tensor(file)
        box = v2.RandomResizedCrop.get_params(image, scale=(0.25, 1), ratio=(3 / 4, 4 / 3))
        image = F.resized_crop(image, *box, size, antialias=True)
        mask = F.resized_crop(mask, *box, size, v2.InterpolationMode.NEAREST)[0]
        if torch.rand(()) < 0.5:
            image, mask = F.hflip(image), F.hflip(mask)
        image = F.normalize(F.to_dtype(self.jitter(image), scale=True), list(MEAN), list(STD))
        return image, mask.long()


def straightforward_training(flags: argparse.Namespace) -> float:
    """Images a second of an epoch of the loop that most scripts have: each loss read at once."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest = load_manifest(flags.data)
    rows, _ = split_rows(manifest, seed=0)
    model = build_model(flags.model, manifest.classes, flags.width)
    model = model.to(device, memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(
        StraightforwardSet(manifest, rows, flags.size),
        batch_size=flags.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=flags.workers[-1],
    )
    start, losses = time.perf_counter(), []
    for images, masks in loader:
        images, masks = images.to(device), masks.to(device)
        outputs = model(images)
        loss = cross_entropy(outputs["out"], masks, ignore_index=IGNORE_INDEX)
        if "aux" in outputs:
            loss = loss + 0.5 * cross_entropy(outputs["aux"], masks, ignore_index=IGNORE_INDEX)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return len(losses) * flags.batch_size / (time.perf_counter() - start)


def our_training(flags: argparse.Namespace, amp: str) -> float:
    """Images a second of an epoch of train.py, by its own account."""
    with tempfile.TemporaryDirectory() as out:
        line = [sys.executable, Path(__file__).with_name("train.py"), "--out", out, "--amp", amp]
        line += ["--epochs", 1, "--weights", "none", "--wandb", "disabled"]
        for name in ("data", "model", "width", "size", "batch_size"):
            line += ["--" + name.replace("_", "-"), getattr(flags, name)]
        line += ["--workers", flags.workers[-1]]
        result = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
        if result.returncode:
            raise DataError(result.stderr.strip().splitlines()[-1])
        return json.loads(Path(out, "metrics.jsonl").read_text())["images_per_second"]


def training(flags: argparse.Namespace) -> Stages:
    """Images a second of an epoch of training, loading included."""
    ways = {"straightforward": (straightforward_training, flags)}
    ways |= {f"train.py --amp {amp}": (our_training, flags, amp) for amp in flags.amp}
    yield f"{flags.model}, {flags.size} pixels", "images/s", ways


# --- metric and bootstrap ------------------------------------------------------------------------


def logits_and_mask(classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a network of that many classes gives for an image of 480 x 640, and its mask."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(classes, 384, 512, generator=generator)
    mask = torch.randint(0, classes, (480, 640), dtype=torch.uint8, generator=generator)
    mask[:40] = IGNORE_INDEX
    return logits, mask


def straightforward_metric(classes: int, images: int) -> float:
    """Images a second: argmax over the classes, boolean indexing and bincount, as torchvision's
    reference scripts do."""
    logits, mask = logits_and_mask(classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(images):
        native = interpolate(logits[None], size=(480, 640), mode="bilinear")
        truth, prediction = mask.flatten().long(), native.argmax(1).flatten()
        valid = (truth >= 0) & (truth < classes)
        bins = classes * truth[valid] + prediction[valid]
        confusion += torch.bincount(bins, minlength=classes**2).reshape(classes, classes)
    return images / (time.perf_counter() - start)


def our_metric(classes: int, images: int) -> float:
    """Images a second from logits to counts, as evaluate.py does."""
    logits, mask = logits_and_mask(classes)
    confusion = ConfusionMatrix(images, classes, torch.device("cpu"))
    start = time.perf_counter()
    for image in range(images):
        confusion.update(image, native_prediction(logits, 480, 640, 384), mask)
    confusion.matrices()
    return images / (time.perf_counter() - start)


def metric(flags: argparse.Namespace) -> Stages:
    """Images a second from logits to the confusion matrix, on a CPU."""
    for classes in flags.classes:
        ways = {
            "straightforward": (straightforward_metric, classes, 50),
            "evaluate.py": (our_metric, classes, 50),
        }
        yield f"{classes} classes, 480 x 640", "images/s", ways


def straightforward_bootstrap(matrices: np.ndarray, resamples: int) -> float:
    """Resamples a second: draw images, add up their matrices, score."""
    rng, start = np.random.default_rng(0), time.perf_counter()
    for _ in range(resamples):
        scores(matrices[rng.integers(len(matrices), size=len(matrices))].sum(axis=0))
    return resamples / (time.perf_counter() - start)


def our_bootstrap(matrices: np.ndarray, resamples: int) -> float:
    """Resamples a second: all of them in one matrix product."""
    start = time.perf_counter()
    bootstrap(matrices, resamples)
    return resamples / (time.perf_counter() - start)


def resampling(flags: argparse.Namespace) -> Stages:
    """Resamples a second of 5,000 images."""
    for classes in flags.classes:
        matrices = np.random.default_rng(0).integers(0, 10**5, (5000, classes, classes))
        ways = {
            "straightforward": (straightforward_bootstrap, matrices, 200),
            "report.py": (our_bootstrap, matrices, 2000),
        }
        yield f"{classes} classes, 5,000 images", "resamples/s", ways


STAGES = {"train": training, "metric": metric, "bootstrap": resampling}
