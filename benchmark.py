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
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

import prepare_masks
from annotations import image_folder
from manifest import (
    DataError,
    class_colors,
    command_parser,
    default_workers,
    load_manifest,
    run_command,
)

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
    import benchmark_model  # here, for it needs torch

    for title, unit, ways in benchmark_model.STAGES[args.stage](args):
        print_rates(ways, args.repeats, title, unit)


if __name__ == "__main__":
    run_command(main, DataError)
