"""Each stage beside a baseline, the way that most scripts do it: medians, ratios to the first row.

    python tools/benchmark.py masks --coco-root coco --split val2017 --images 5000
    python tools/benchmark.py index --coco-root coco --split val2017 --images 118287
    python tools/benchmark.py sample --data data --size 128 512
    python tools/benchmark.py step --data data --model deeplab --size 512 --amp off bf16
    python tools/benchmark.py loss --classes 5 81
    python tools/benchmark.py metric --classes 5 21

Every run is a process of its own, and all take turns. Let nothing else run meanwhile. On a GPU its
own events are the clock.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.coco import COCO

sys.path.insert(0, str(Path(__file__).parents[1]))
import coco
import common
import prepare_masks


def alone(function: Callable, *arguments: object) -> list[float]:
    """A call in a process of its own, forked from a small server: a peak of memory is inherited."""
    try:
        with ProcessPoolExecutor(1, get_context("forkserver")) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenExecutor:
        raise common.UserError("a measured process died, killed or out of memory") from None


def measure(stage: Callable[..., Iterator[int]], *arguments: object) -> list[float]:
    """Items per second and seconds of a stage, peak MB: of this process, its child, a GPU."""
    sys.stdout = None  # what the stage prints
    work = stage(*arguments)
    items, start = next(work), time.perf_counter()
    torch = sys.modules.get("torch")
    gpu = torch.cuda if torch and torch.cuda.is_initialized() else None
    if gpu:
        first, last = (gpu.Event(enable_timing=True) for _ in range(2))
        first.record()
    next(work, None)
    seconds, gpu_memory = time.perf_counter() - start, 0
    if gpu:
        last.record()
        last.synchronize()
        seconds, gpu_memory = first.elapsed_time(last) / 1000, gpu.max_memory_allocated() / 2**20
    usage = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    megabyte = 2**10 if sys.platform == "linux" else 2**20  # of ru_maxrss
    return [items / seconds, seconds, *(each.ru_maxrss / megabyte for each in usage), gpu_memory]


def repeat_images(coco_root: Path, split: str, count: int, root: Path) -> None:
    """Write a COCO root of `count` images: a real one's over and over, as links to one copy."""
    (source,) = coco.find_sources(coco_root, [split])
    content = json.loads(source.path.read_bytes())
    for name in ("annotations", "repeated"):
        (root / name).mkdir(parents=True)
    images, annotations, originals = [], [], content["images"]
    folder = coco.locate([image["file_name"] for image in originals], source.folders)[0]
    for name in [image["file_name"] for image in originals[:count]]:
        (root / "repeated" / name).write_bytes((folder / name).read_bytes())
    for number in range(count):
        image, name = originals[number % len(originals)], f"repeated_{number}.jpg"
        (root / "repeated" / name).symlink_to(image["file_name"])
        images.append({**image, "id": number, "file_name": name})
    first = {image["id"]: number for number, image in enumerate(originals)}
    for annotation in content["annotations"]:
        for number in range(first[annotation["image_id"]], count, len(originals)):
            annotations.append({**annotation, "id": len(annotations), "image_id": number})
    content |= {"images": images, "annotations": annotations}
    content["categories"] = content.pop("categories")  # last, as in the official files
    (root / "annotations" / "instances_repeated.json").write_text(json.dumps(content))


def masks(method: str, count: int, args: argparse.Namespace) -> Iterator[int]:
    """Masks in labels and in colours. Baseline: each instance decoded and painted by itself."""
    root, out = Path(args.work, str(count)), Path(tempfile.mkdtemp(dir=args.work))
    yield count
    if method != "baseline":
        line = ["--coco-root", str(root), "--split", "repeated", "--out", str(out)]
        prepare_masks.main([*line, *method.split()[1:]])
    else:
        coco = COCO(root / "annotations" / "instances_repeated.json")
        labels = {coco.getCatIds([name])[0]: i for i, name in enumerate(prepare_masks.CLASSES, 1)}
        colors = common.class_colors(len(labels) + 1)
        for image in coco.loadImgs(coco.getImgIds()):
            mask = np.zeros((image["height"], image["width"]), dtype=np.uint8)
            colored = np.zeros((*mask.shape, 3), dtype=np.uint8)
            for annotation in coco.loadAnns(coco.getAnnIds(image["id"], list(labels))):
                instance, label = coco.annToMask(annotation) == 1, labels[annotation["category_id"]]
                mask[instance] = label
                for channel in range(3):  # a third of the time that all three at once would take
                    colored[..., channel][instance] = colors[label][channel]
            Image.fromarray(mask).save(out / f"raw_{image['id']}.png")
            Image.fromarray(colored).save(out / f"colored_{image['id']}.png")


def index(method: str, count: int, args: argparse.Namespace) -> Iterator[int]:
    """What to do for each image, before any mask is painted. Baseline: json.load of the file."""
    (source,) = coco.find_sources(root := Path(args.work, str(count)), ["repeated"])
    yield count
    if method == "baseline":
        with open(source.path) as file:
            json.load(file)
    else:
        found = coco.read_index(source)
        classes = coco.choose_classes(prepare_masks.CLASSES, [found])
        assert len(coco.split_tasks(found, root, classes, coco.Skipped())) == count


def square(args: argparse.Namespace) -> None:
    """Prepare 200 of the images, and their masks, as squares of `--side` pixels."""
    sys.stdout = None  # of prepare_masks.py
    manifest, root = common.load_manifest(args.data), Path(args.work, "square")
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for index in range(min(len(manifest), 200)):
        image = Image.open(manifest.root / manifest.files[index]).convert("RGB")
        image = image.resize((args.side, args.side), Image.Resampling.BICUBIC)
        image.save(root / "images" / f"{index}.jpg", quality=95)
        mask = Image.open(manifest.data / "masks_raw" / manifest.masks[index])
        mask.resize(image.size, Image.Resampling.NEAREST).save(root / "masks" / f"{index}.png")
    line = ["--masks", root / "masks", "--images-dir", root / "images", "--out", root / "data"]
    prepare_masks.main([*map(str, line), "--classes", *manifest.classes[1:]])


def sample(method: str, size: int, args: argparse.Namespace) -> Iterator[int]:
    """Crops of one loader process. Baseline: torchvision's transforms of whole decoded images. And
    where albumentations is installed, which works with OpenCV, the same with it."""
    import torch
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    import dataset

    torch.set_num_threads(1)
    manifest = common.load_manifest(args.data)
    crops, indices = dataset.TrainingSet(manifest, size, seed=0), range(min(len(manifest), 200))
    scales = {"scale": (0.25, 1), "ratio": (3 / 4, 4 / 3), "antialias": True}
    jitter = v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03)
    transforms = [v2.RandomResizedCrop(size, **scales), v2.RandomHorizontalFlip(), jitter]
    transform = v2.Compose([v2.ToImage(), *transforms])
    if method == "albumentations":
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)
        crop = A.RandomResizedCrop((size, size), scale=(0.25, 1), ratio=(3 / 4, 4 / 3))
        transform = A.Compose([crop, A.HorizontalFlip(), A.ColorJitter(0.3, 0.3, 0.3, 0.03, p=1)])
    yield len(indices)
    for index in indices:
        if method == "baseline":
            image = Image.open(manifest.root / manifest.files[index]).convert("RGB")
            mask = Image.open(manifest.data / "masks_raw" / manifest.masks[index])
            image, mask = transform(image, tv_tensors.Mask(np.array(mask)))
        elif method == "albumentations":
            image = cv2.imread(manifest.root / manifest.files[index])
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            path = manifest.data / "masks_raw" / manifest.masks[index]
            mask = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
            image, mask = map(torch.from_numpy, transform(image=image, mask=mask).values())
            image = image.permute(2, 0, 1)
        else:
            image, mask = crops[0, index, index, 0]
        assert image.shape[1:] == mask.shape == (size, size)


def step(method: str, size: int, args: argparse.Namespace) -> Iterator[int]:
    """Training steps on one batch. Baseline: as in torchvision's own scripts, contiguous float32,
    `F.cross_entropy` of each head, and each loss read."""
    import torch
    from torch.nn.functional import cross_entropy, interpolate

    from dataset import normalize
    from train import Run, parse_args

    line = f"--model {args.model} --width {args.width} --size {size} --batch-size {args.batch_size}"
    line += " --workers 0 --wandb disabled --out runs/none --seed 1"
    flags = ["--amp", "off"] if method == "baseline" else method.split()[1:]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    line = ["--data", args.data, *line.split(), "--weights", "none", *flags]
    run = Run(parse_args(line)[0], device, weights="none")
    batch = [tensor.to(device) for tensor in next(iter(run.loader))]
    run.model.train()
    torch.backends.cudnn.benchmark = True  # as train.py has it

    def baseline() -> float:
        """A step as in torchvision's reference loop. Returns the loss."""
        outputs = model(images).values()
        if args.model == "deeplab":
            outputs = (interpolate(x, (size, size), mode="bilinear") for x in outputs)
        out, *aux = (cross_entropy(x, masks, ignore_index=255) for x in outputs)
        loss = out + 0.5 * sum(aux)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    if method == "baseline":
        images, masks = normalize(batch[0]).contiguous(), batch[1].long()
        model = run.model.to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for number in range(2 + args.steps):
        if number == 2:  # warm by now
            yield args.steps * args.batch_size
        loss = baseline() if method == "baseline" else run.train_step([batch])
    assert 0 < float(loss) < 10


def loss(method: str, classes: int, args: argparse.Namespace) -> Iterator[int]:
    """From the logits of DeepLab's two heads, an eighth of the size, to their gradients. Baseline:
    `F.interpolate` and `F.cross_entropy`, of logits as a network in channels last gives them."""
    import torch
    from torch.nn.functional import cross_entropy, interpolate

    from losses import total_loss

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    last = {"memory_format": torch.channels_last, "device": device}

    def run(ours: bool, side: int) -> tuple:
        """The gradients of both heads, (N, C, side / 8, side / 8) each."""
        torch.manual_seed(0)
        heads = [torch.randn(args.batch_size, classes, side // 8, side // 8) for _ in range(2)]
        heads = [head.to(**last).requires_grad_() for head in heads]
        masks = torch.randint(classes, (args.batch_size, side, side), device=device)
        if ours:
            loss = total_loss(dict(zip(("out", "aux"), heads)), masks.byte())
        else:
            large = [interpolate(x, (side, side), mode="bilinear") for x in heads]
            out, aux = (cross_entropy(x, masks, ignore_index=255) for x in large)
            loss = out + 0.5 * aux
        return torch.autograd.grad(loss, heads)

    for mine, theirs in zip(run(True, 64), run(False, 64)):  # small, since memory is compared
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-8)
    run(method != "baseline", args.size[0])
    yield args.steps * args.batch_size
    for _ in range(args.steps):
        run(method != "baseline", args.size[0])


def metric(method: str, classes: int, _: argparse.Namespace) -> Iterator[int]:
    """From logits to the confusion matrix, on a CPU. Baseline: as torchvision's own scripts."""
    import torch

    from evaluate import ConfusionMatrix, Predictor

    logits = torch.randn(classes, 384, 512)
    mask = torch.randint(classes, (480, 640), dtype=torch.uint8)
    mask[:40] = common.IGNORE_INDEX
    cpu = torch.device("cpu")
    ours, predictor = ConfusionMatrix(50, classes, cpu), Predictor(None, 384, cpu)
    baseline = torch.zeros(classes, classes, dtype=torch.int64)
    yield 50
    for image in range(50):
        if method != "baseline":
            ours.update(image, predictor.labels(logits, 480, 640), mask)
            continue
        native = torch.nn.functional.interpolate(logits[None], (480, 640), mode="bilinear")
        valid = mask < classes
        bins = classes * mask[valid].long() + native.argmax(1)[0][valid]
        baseline += torch.bincount(bins, minlength=classes**2).reshape(classes, classes)


# What does it, what it counts, the flag with a table per value, ours and its flag with a row each.
STAGES = {
    "masks": (masks, "image", "images", "prepare_masks.py", "workers"),
    "index": (index, "image", "images", "prepare_masks.py", None),
    "sample": (sample, "crop", "size", "dataset.py", None),
    "step": (step, "image", "size", "train.py", "amp"),
    "loss": (loss, "image", "classes", "losses.py", None),
    "metric": (metric, "image", "classes", "evaluate.py", None),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("stage", choices=STAGES, help="what to measure")
    add("--repeats", type=int, default=3, help="runs of each, of which the median counts")
    add("--workers", type=int, nargs="+", default=[1, common.default_workers()], help="processes")
    add("--coco-root", type=Path, default="coco", help="masks, index: real images and annotations")
    add("--split", default="val2017", help="masks, index: instances_<split>.json to repeat")
    many = "masks, index: how many to make of them"
    add("--images", type=int, nargs="+", default=[5000], help=many)
    add("--data", default="data", help="sample, step: prepared masks")
    add("--side", type=int, help="sample: make the pictures squares of so many pixels")
    add("--model", default="unet", help="step: network")
    add("--width", type=int, default=64, help="step: of the U-Net")
    add("--batch-size", type=int, default=8, help="step, loss: images")
    add("--steps", type=int, default=5, help="step, loss: how many are timed")
    add("--size", type=int, nargs="+", default=[512], help="sample, step, loss: side of the crops")
    rows = "step: a row for each, with what follows it, as 'bf16 --compile'"
    add("--amp", nargs="+", default=["auto"], help=rows)
    add("--classes", type=int, nargs="+", default=[5, 21], help="loss, metric: labels")
    add("--json", type=Path, metavar="FILE", help="write the medians here too")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Measure the rows of each table in turns, and print their medians."""
    args = build_parser().parse_args(argv)
    if min(args.repeats, *args.workers, *args.images, *args.classes) < 1:
        raise common.UserError("--repeats, --workers, --images and --classes start at 1")
    stage, item, flag, script, varied = STAGES[args.stage]
    ours = [f"{script} --{varied} {x}" for x in getattr(args, varied)] if varied else [script]
    heads = ["seconds", f"{item}s/s", f"ms/{item}", "ratio", "parent MB", "worker MB", "GPU MB"]
    found, repeats = [], range(args.repeats)
    with tempfile.TemporaryDirectory() as args.work:
        if stage is sample and args.side:
            alone(square, args)
            args.data = str(Path(args.work, "square", "data"))
        for value in getattr(args, flag):
            methods = ["baseline", *ours]
            if stage is sample and find_spec("albumentations"):
                methods.append("albumentations")
            if stage in (masks, index):
                alone(repeat_images, args.coco_root, args.split, value, Path(args.work, str(value)))
            runs = [[alone(measure, stage, m, value, args) for m in methods] for _ in repeats]
            rate, seconds, *peaks = np.median(runs, axis=0).T
            columns = [seconds, rate, 1000 / rate, rate / rate[0], *peaks]
            print(f"--{flag} {value}".ljust(28), *(f"{head:>11}" for head in heads))
            for method, *figures in zip(methods, *columns):
                print(method.ljust(28), *(f"{figure:>11.2f}" for figure in figures), flush=True)
                found.append({flag: value, "method": method, **dict(zip(heads, figures))})
    if args.json:
        common.write_text(args.json, json.dumps({"arguments": sys.argv[1:], "rows": found}))


if __name__ == "__main__":
    common.run_command(main)
