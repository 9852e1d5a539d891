"""Each stage beside the straightforward way of doing it, as ratios in one run.

    python benchmark.py masks --coco-root coco --split val2017 --images 5000
    python benchmark.py train --data data --model deeplab --size 512
    python benchmark.py metric
    python benchmark.py bootstrap

Every measurement runs in a process of its own and is repeated; the median stands in the table. Do
nothing else on the machine meanwhile.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))


import prepare_masks
from coco import image_folder
from common import (
    IGNORE_INDEX,
    DataError,
    Manifest,
    class_colors,
    command_parser,
    default_workers,
    load_manifest,
    run_command,
)
from dataset import MEAN, STD, split_rows
from evaluate import ConfusionMatrix, native_prediction
from metrics import bootstrap, scores
from models import build_model

MEGABYTE = 1 << (10 if sys.platform == "linux" else 20)  # of ru_maxrss


# --- measuring -----------------------------------------------------------------------------------


def measured(function: Callable, *arguments: object) -> dict:
    """Result and seconds of a call in a fresh process; peak memory in MB of that and of its largest
    child."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise DataError(f"{function.__name__} failed, see above") from None
    finally:
        process.join()


def _measure(sender, function: Callable, arguments: tuple) -> None:
    with open("/dev/null", "w") as null, redirect_stdout(null):
        start = time.perf_counter()
        result = function(*arguments)
        seconds = time.perf_counter() - start
    peaks = [
        resource.getrusage(who).ru_maxrss / MEGABYTE
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    figures = {"seconds": seconds, "parent": peaks[0], "worker": peaks[1]}
    sender.send({**figures, "result": result})


def median(runs: list[dict]) -> dict[str, float]:
    """The median of each figure."""
    keys = ("seconds", "parent", "worker")
    return {key: statistics.median(run[key] for run in runs) for key in keys}


# --- masks ---------------------------------------------------------------------------------------


def repeat_images(root: Path, split: str, count: int, target: Path) -> None:
    """Write a COCO root of `count` images at `target`: those of a real one, over and over.

    Each image file is copied once; its repetitions are links to the copy, under names of their own.
    """
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_bytes())
    folder = image_folder(root, split)
    annotations = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    repeated = {"images": [], "annotations": [], "categories": content["categories"]}
    (target / "annotations").mkdir(parents=True)
    (target / split).mkdir()
    for number in range(count):
        image = content["images"][number % len(content["images"])]
        name = f"{number:012}.jpg"
        original = target / split / f"{number % len(content['images']):012}.jpg"
        if number < len(content["images"]):
            shutil.copy(folder / image["file_name"], original)
        else:
            (target / split / name).symlink_to(original.name)
        repeated["images"].append({**image, "id": number, "file_name": name})
        for annotation in annotations[image["id"]]:
            ids = {"id": len(repeated["annotations"]), "image_id": number}
            repeated["annotations"].append({**annotation, **ids})
    (target / "annotations" / f"instances_{split}.json").write_text(json.dumps(repeated))


def straightforward_masks(root: Path, split: str, out: Path) -> None:
    """What most scripts do: decode each instance, boolean indexing into label and colours."""
    coco = COCO(root / "annotations" / f"instances_{split}.json")
    names = prepare_masks.CLASSES
    labels = {coco.getCatIds(catNms=[name])[0]: label for label, name in enumerate(names, start=1)}
    colors = class_colors(len(names) + 1)
    for folder in ("masks_raw", "masks_colored"):
        (out / folder).mkdir()
    for image_id in coco.getImgIds():
        image = coco.loadImgs(image_id)[0]
        mask = np.zeros((image["height"], image["width"]), dtype=np.uint8)
        colored = np.zeros((*mask.shape, 3), dtype=np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image_id, catIds=list(labels))):
            instance = coco.annToMask(annotation) == 1
            label = labels[annotation["category_id"]]
            mask[instance] = label
            for channel in range(3):
                colored[..., channel][instance] = colors[label][channel]
        name = Path(image["file_name"]).with_suffix(".png").name
        Image.fromarray(mask).save(out / "masks_raw" / name)
        Image.fromarray(colored).save(out / "masks_colored" / name)


def our_masks(workers: int, root: Path, split: str, out: Path) -> None:
    """prepare_masks.py's command line."""
    flags = ["--split", split, "--workers", str(workers)]
    prepare_masks.main(["--coco-root", str(root), "--out", str(out), *flags])


def load_json(root: Path, split: str, _: Path) -> None:
    """Only parse the annotation file: what any reader of it needs."""
    with open(root / "annotations" / f"instances_{split}.json", "rb") as file:
        json.load(file)


def benchmark_masks(args: argparse.Namespace, work: Path) -> None:
    """Print seconds, images a second, ratio and memory of both ways, at each number of images."""
    line = "{:<28}{:>8}{:>10}{:>11}{:>8}{:>10}{:>10}".format
    columns = ("seconds", "images/s", "ms/image", "ratio", "parent MB", "worker MB")
    for count in args.images:
        root = work / f"coco{count}"
        measured(repeat_images, args.coco_root, args.split, count, root)
        ways = {"json.load alone": (load_json, root, args.split)}
        if count <= args.baseline_up_to:
            ways["straightforward"] = (straightforward_masks, root, args.split)
        for workers in args.workers:
            name = f"prepare_masks --workers {workers}"
            ways[name] = (our_masks, workers, root, args.split)
        runs = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                # Nothing is deleted between runs: for half a minute ext4 would not reuse the
                # deleted files' inodes, and looking for others costs more than making a mask.
                runs[name].append(measured(*way, Path(tempfile.mkdtemp(dir=work))))
        print(line(f"{count} images", *columns))
        figures = {name: median(each) for name, each in runs.items()}
        baseline = figures.get("straightforward", {}).get("seconds")
        for name, figure in figures.items():
            seconds, decodes = figure["seconds"], name != "json.load alone"
            speed = [f"{count / seconds:.0f}", f"{1000 * seconds / count:.2f}"]
            ratio = f"{baseline / seconds:.1f}" if baseline and decodes else ""
            worker = f"{figure['worker']:.0f}" if figure["worker"] else ""
            print(line(name, f"{seconds:.1f}", *speed, ratio, f"{figure['parent']:.0f}", worker))


# --- the other stages ----------------------------------------------------------------------------


def print_rates(ways: dict, repeats: int, title: str, unit: str) -> None:
    """A table of rates, the highest beside the first; the ways take turns."""
    runs = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            runs[name].append(measured(*way)["result"])
    rates = {name: statistics.median(each) for name, each in runs.items()}
    baseline = next(iter(rates.values()))
    line = "{:<28}{:>14}{:>8}".format
    print(line(title, unit, "ratio"))
    for name, rate in rates.items():
        print(line(name, f"{rate:.1f}", f"{rate / baseline:.1f}"))


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
        line = [sys.executable, Path(__file__).parents[1] / "train.py", "--out", out, "--amp", amp]
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


# --- command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser(
        "Measure each stage beside the straightforward way of doing it.",
        "python benchmark.py masks --coco-root coco --images 5000",
    )
    stages = ["masks", "train", "metric", "bootstrap"]
    parser.add_argument("stage", choices=stages, help="what to measure")
    add = parser.add_argument
    add("--repeats", type=int, default=3, help="runs of each way, of which the median counts")
    workers = "processes (train: the last number)"
    add("--workers", type=int, nargs="+", default=[1, default_workers()], help=workers)
    add = parser.add_argument_group("masks").add_argument
    add("--coco-root", type=Path, help="real images and annotations to repeat")
    add("--split", default="val2017", help="instances_<split>.json to read")
    add("--images", type=int, nargs="+", default=[5000], help="how many to make of them")
    add("--baseline-up-to", type=int, default=5000, metavar="N", help="more images: ours alone")
    add = parser.add_argument_group("train").add_argument
    add("--data", type=Path, default=Path("data"), help="what prepare_masks.py wrote")
    add("--model", choices=["unet", "deeplab"], default="unet", help="network")
    add("--width", type=int, default=64, help="first channels of the U-Net")
    add("--size", type=int, default=512, help="side of the crops")
    add("--batch-size", type=int, default=8, help="images at once")
    precisions = ["auto", "off", "bf16", "fp16"]
    add("--amp", nargs="+", choices=precisions, default=["auto"], help="ours: autocast")
    add = parser.add_argument_group("metric, bootstrap").add_argument
    add("--classes", type=int, nargs="+", default=[5, 21], help="with the background")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.repeats, *args.workers, *args.images, *args.classes) < 1:
        parser.error("--repeats, --workers, --images and --classes start at 1")
    if args.stage == "masks":
        if args.coco_root is None:
            parser.error("masks: give --coco-root")
        image_folder(args.coco_root, args.split)
        path = args.coco_root / "annotations" / f"instances_{args.split}.json"
        if not path.is_file():
            raise DataError(f"no annotation file {path}: check --coco-root and --split")
        with tempfile.TemporaryDirectory() as work:
            benchmark_masks(args, Path(work))
        return
    if args.stage == "train":
        load_manifest(args.data)
    for title, unit, ways in STAGES[args.stage](args):
        print_rates(ways, args.repeats, title, unit)


if __name__ == "__main__":
    run_command(main, DataError)
