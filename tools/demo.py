"""Run the whole pipeline on a small synthetic COCO: no network, and a laptop's CPU is enough.

    python tools/demo.py --out demo

Draws 400 scenes with people, cars, buses and dogs, annotates them in COCO's format, and runs
prepare_masks.py, train.py and evaluate.py on them with the command lines that it prints. The page
that comes of it, report.html, has the tables, the curves and pictures.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageChops, ImageDraw
from pycocotools import mask as rle

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from common import ArgumentParser, UserError, run_command

COMMANDS = [
    "prepare_masks.py --coco-root {out}/coco --split train2017 val2017 --out {out}/data",
    "train.py --data {out}/data --val-split val2017 --model unet --width 16 --size 64"
    " --oversample 6 --epochs {epochs} --batch-size 8 --lr 5e-3 --device cpu --wandb disabled"
    " --out {out}/runs/unet",
    "evaluate.py --ckpt {out}/runs/unet/best.pt --json {out}/report.json"
    " --html {out}/report.html --panels 6 --pick random",
]
TARGET = 0.6  # foreground mIoU that shows that the pipeline has learned

COUNTS = {"train2017": 320, "val2017": 80}
FEWEST = 6  # images that hold a kind, in either split: with fewer, its IoU would say little
SIZES = [(160, 120)] * 6 + [(120, 160)] * 2 + [(176, 132), (128, 128), (157, 113)]
CATEGORIES = {"person": 1, "car": 3, "bus": 6, "bench": 15, "dog": 18, "potted plant": 64}
# Size, fewest and most in an image that holds any, share of the images that do: as in COCO, buses
# and dogs are rare. Drawn from back to front, the reverse of prepare_masks.py's --priority.
KINDS = {
    "tree": (1.0, 1, 3, 0.4),
    "bench": (0.7, 1, 1, 0.3),
    "potted plant": (0.4, 1, 2, 0.3),
    "crowd": (0.3, 10, 20, 0.02),
    "bus": (1.2, 1, 1, 0.047),
    "car": (1.0, 1, 2, 0.14),
    "person": (0.85, 1, 3, 0.5),
    "dog": (0.8, 1, 1, 0.047),
}
SKY, GROUND = ["lightblue", "lightsteelblue", "gainsboro"], ["darkseagreen", "tan", "darkgray"]
# Colours, of which one is chosen, and the parts in it, from back to front. Parts are in units of
# the figure's size, and y counts up from the ground: box x0 y0 x1 y1, oval x y rx ry,
# poly x y x y x y ..., and limb x0 y0 x1 y1 width, which swings about its first end.
SHAPES = {
    "tree": """dimgray slategray: box -.05 0 .05 .6;
        olivedrab darkolivegreen: oval -.15 .6 .2 .18, oval .15 .6 .2 .18, oval 0 .78 .22 .2""",
    "bench": "dimgray: box -.5 .2 .5 .3, box -.5 .4 .5 .5, box -.4 0 -.3 .5, box .3 0 .4 .5",
    "potted plant": """seagreen: limb 0 .3 -.3 .8 .15, limb 0 .3 0 1 .15, limb 0 .3 .3 .8 .15;
        rosybrown gray silver: poly -.22 .4 .22 .4 .14 0 -.14 0""",
    "person": """black saddlebrown: oval -.02 .91 .1 .1;
        midnightblue darkslateblue indigo: limb -.07 .45 -.1 0 .13, limb .07 .45 .1 0 .13;
        burlywood peru sienna saddlebrown: limb -.14 .75 -.22 .4 .08, limb .14 .75 .22 .4 .08,
            box -.04 .7 .04 .83, oval .025 .88 .085 .09;
        mediumvioletred darkorchid hotpink: poly -.12 .8 .12 .8 .18 .73 .13 .4 -.13 .4 -.18 .73""",
    "car": """royalblue teal steelblue: poly -.5 .1 -.5 .24 -.4 .24 -.3 .4 .1 .4 .3 .24 .5 .2 .5 .1;
        powderblue slategray darkslategray: poly -.35 .24 -.27 .37 -.13 .37 -.13 .24,
            poly -.09 .24 -.09 .37 .08 .37 .22 .24;
        black: oval -.29 .1 .1 .1, oval .29 .1 .1 .1""",
    "bus": """crimson gold yellow: box -.5 .06 .5 .5;
        powderblue slategray darkslategray: box -.46 .28 -.31 .43, box -.27 .28 -.12 .43,
            box -.08 .28 .07 .43, box .11 .28 .26 .43, box .31 .1 .4 .43, box .45 .22 .5 .43;
        black: oval -.3 .08 .08 .08, oval .2 .08 .08 .08""",
    "dog": """saddlebrown sienna peru: limb -.25 .34 -.25 0 .08, limb -.16 .34 -.16 0 .08,
            limb .16 .34 .16 0 .08, limb .25 .34 .25 0 .08, oval 0 .37 .31 .13, oval .36 .6 .1 .1,
            limb -.26 .42 -.45 .55 .06, poly .12 .4 .28 .69 .44 .56 .3 .3, oval .48 .56 .1 .06;
        black: limb .33 .69 .26 .5 .08, oval .55 .58 .03 .03, oval .42 .63 .02 .02""",
}
SHAPES["crowd"] = SHAPES["person"]


def corners(part: str, rng: Generator) -> np.ndarray:
    """(N, 2) corners of a part of a shape, such as "oval 0 .5 .2 .1"."""
    form, *words = part.split()
    numbers = np.array(words, dtype=float)
    start, end = numbers[:2], numbers[2:4]
    if form == "box":
        return np.array([start, (end[0], start[1]), end, (start[0], end[1])])
    if form == "oval":
        angles = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        return start + end * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if form == "limb":
        along = end - start
        along += along[::-1] * (-1, 1) * rng.normal(0, 0.2)
        across = along[::-1] * (-0.5, 0.5) * numbers[4] / np.hypot(*along)
        return start + [across, along + across, along - across, -across]
    return numbers.reshape(-1, 2)


def draw_figure(image: Image.Image, kind: str, x: float, y: float, rng: Generator) -> list:
    """Draw a figure that stands at (x, y), in pixels; returns its parts as COCO's polygons."""
    size = KINDS[kind][0] * min(image.size) * (0.4 + 0.6 * y / image.height)  # nearer is larger
    scale = size * rng.uniform(0.9, 1.1, 2) * (rng.choice([-1, 1]), -1)  # mirrored or not
    draw, polygons = ImageDraw.Draw(image), []
    for paint in SHAPES[kind].split(";"):
        colors, parts = paint.split(":")
        color = rng.choice(colors.split())
        for part in parts.split(","):
            points = (x, y) + scale * corners(part, rng)
            draw.polygon(points.ravel().tolist(), fill=color)
            polygons.append(points.round(2).ravel().tolist())
    return polygons


def annotate(kind: str, polygons: list, width: int, height: int) -> dict:
    """COCO's annotation of a figure or a crowd, but for the ids."""
    parts, crowd = rle.frPyObjects(polygons, height, width), kind == "crowd"
    encoded = rle.merge(parts)
    runs = {"size": [height, width], "counts": encoded["counts"].decode()}
    # The share of each part that lies within each other one: all of a window, for example.
    shares = rle.iou(parts, parts, [1] * len(parts)) - np.eye(len(parts))
    outer = [polygon for polygon, share in zip(polygons, shares.max(axis=1)) if share < 1]
    return {
        "category_id": CATEGORIES["person" if crowd else kind],
        "segmentation": runs if crowd else outer,
        "area": int(rle.area(encoded)),
        "bbox": rle.toBbox(encoded).tolist(),
        "iscrowd": int(crowd),
    }


def draw_scene(kinds: list[str], rng: Generator) -> tuple[Image.Image, list[dict]]:
    """A picture with figures of `kinds`, given from back to front, and their annotations."""
    width, height = SIZES[rng.integers(len(SIZES))]
    image, annotations = Image.new("RGB", (width, height), rng.choice(SKY)), []
    ground = (0, height * rng.uniform(0.35, 0.6), width, height)
    ImageDraw.Draw(image).rectangle(ground, fill=rng.choice(GROUND))
    for distance, kind in enumerate(kinds):
        _, fewest, most, _ = KINDS[kind]
        nearness = distance + np.sort(rng.random(rng.integers(fewest, most + 1)))
        feet = height * (0.6 + 0.37 * nearness / len(kinds))  # farther back is higher up
        figures = [draw_figure(image, kind, width * rng.uniform(0.1, 0.9), y, rng) for y in feet]
        if kind == "crowd":  # a single annotation
            figures = [[part for figure in figures for part in figure]]
        if kind in CATEGORIES or kind == "crowd":
            annotations += [annotate(kind, polygons, width, height) for polygons in figures]
    light = Image.fromarray(rng.integers(170, 256, (3, 4), dtype=np.uint8)).resize(image.size)
    image = ImageChops.multiply(image, light.convert("RGB"))  # patches of light and shadow
    return image.convert("L" if rng.random() < 0.03 else "RGB"), annotations  # a few are grey


def write_coco(root: Path, rng: Generator) -> None:
    """Write `root`/annotations and the images of both splits."""
    (root / "annotations").mkdir(parents=True)
    ids = iter(range(1, 1_000_000))
    for split, count in COUNTS.items():
        (root / split).mkdir()
        numbers = {kind: max(FEWEST, round(row[-1] * count)) for kind, row in KINDS.items()}
        holders = {kind: rng.permutation(count)[:number] for kind, number in numbers.items()}
        images, annotations = [], []
        for index in range(count):
            image, found = draw_scene([kind for kind in KINDS if index in holders[kind]], rng)
            row = {"id": next(ids), "width": image.width, "height": image.height}
            row["file_name"] = f"{row['id']:012}.jpg"
            image.save(root / split / row["file_name"], quality=90)
            images.append(row)
            annotations += [{"id": next(ids), "image_id": row["id"], **each} for each in found]
        rng.shuffle(annotations)  # as in COCO, the order tells nothing of the depth
        categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def clear(out: Path) -> None:
    """Make `out` a folder without an earlier demo. Raises UserError if it holds other things."""
    if out.exists() and any(out.iterdir()) and not (out / ".demo").exists():
        raise UserError(f"{out} holds other things than a demo: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / ".demo").touch()
    for folder in ("coco", "data", "runs"):
        shutil.rmtree(out / folder, ignore_errors=True)


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(description=__doc__)
    folder = "folder to write, empty or an earlier demo's"
    parser.add_argument("--out", type=Path, default="demo", help=folder)
    parser.add_argument("--epochs", type=int, default=7, help="epochs of training")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the dataset, run the scripts on it, report what came of it; returns the exit code."""
    args, start = build_parser().parse_args(argv), time.perf_counter()
    clear(args.out)
    write_coco(args.out / "coco", np.random.default_rng(seed=0))
    for command in COMMANDS:
        line = command.format(out=shlex.quote(str(args.out)), epochs=args.epochs)
        print(f"\n$ python {line}", flush=True)
        script, *words = shlex.split(line)
        code = subprocess.run([sys.executable, ROOT / script, *words], check=False).returncode
        if code:
            return code if code > 0 else 128 - code  # as a shell reports a signal
    score = json.loads((args.out / "report.json").read_text())[0]["foreground_miou"]
    shutil.copy(args.out / "runs/unet/best_panels.png", args.out / "panels.png")
    print(f"\n{time.perf_counter() - start:.0f} s in all, foreground mIoU {score:.3f}")
    print(f"open {args.out / 'report.html'}")
    if score < TARGET:
        print(f"demo.py: the foreground mIoU is below {TARGET}: train longer", file=sys.stderr)
    return int(score < TARGET)


if __name__ == "__main__":
    run_command(main)
