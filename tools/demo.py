"""A small synthetic COCO and the whole pipeline on it: masks, training, evaluation, a picture.

    python tools/demo.py --out demo

Draws 400 scenes with simple people, cars, buses and dogs, writes them with annotations in COCO's
format, and runs the scripts on them with the command lines that a user would type. Nothing is
downloaded, and a laptop's CPU is enough.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as rle

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import DataError, command_parser, run_command

COMMANDS = [
    "prepare_masks.py --coco-root {out}/coco --split train2017 val2017 --out {out}/data",
    "train.py --data {out}/data --val-split val2017 --model unet --width 16 --size 64"
    " --oversample 6 --epochs {epochs} --batch-size 8 --lr 5e-3 --device cpu --wandb disabled"
    " --out {out}/runs/unet",
    "evaluate.py --ckpt {out}/runs/unet/best.pt --json {out}/report.json --panels 6 --pick random",
]
TARGET = 0.6  # foreground mIoU that shows that the pipeline has learned
MARKER = ".demo"  # tells an earlier demo's folder from a user's own that happens to hold data/
OWN = {"coco", "data", "runs", "panels.png", "report.json", MARKER}

SEED = 0
COUNTS = {"train2017": 320, "val2017": 80}
# As skewed as COCO: bus and dog are in fewer than 5% of the training images and so count as rare.
SHARES = {"crowd": 0.02, "person": 0.5, "car": 0.14, "bus": 0.047, "dog": 0.047}
FEWEST = 6  # images of each in a split, so that validation can tell
CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
    {"id": 6, "name": "bus", "supercategory": "vehicle"},
    {"id": 15, "name": "bench", "supercategory": "outdoor"},
    {"id": 18, "name": "dog", "supercategory": "animal"},
    {"id": 64, "name": "potted plant", "supercategory": "furniture"},
]
# Back to front, the reverse of prepare_masks.py's default priority: so whole outlines suffice.
DEPTH = ["crowd", "bus", "car", "person", "dog"]
DISTRACTORS = ["tree", "house", "board", "lamp", "bench", "potted plant"]
SIZES = [(160, 120)] * 6 + [(120, 160)] * 2 + [(176, 132), (128, 128), (157, 113)]

# A line is a tone and its parts, back to front, in units of the size, from the ground up. Parts:
# box x0 y0 x1 y1, oval x y rx ry, poly x y x y ..., limb x0 y0 x1 y1 width, where two further
# numbers let the far end swing. A kind's variants have a number behind its name.
SHAPES = {
    "person": """
        trousers: limb -.06 .5 -.13 0 .12 .07 0, limb .06 .5 .13 0 .12 .07 0
        skin: limb -.12 .74 -.23 .7 .08 .07 .28, limb .12 .74 .23 .7 .08 .07 .28
        shirt: poly -.16 .8 .16 .8 .12 .43 -.12 .43
        hair: oval 0 .905 .1 .1
        skin: oval .02 .88 .08 .085""",
    "car": """
        body: poly -.4 .23 -.31 .4 .08 .4 .28 .23, poly -.5 .08 -.5 .24 .3 .24 .5 .19 .5 .08
        glass: poly -.36 .24 -.29 .365 -.14 .365 -.14 .24, poly -.1 .24 -.1 .365 .07 .365 .2 .24
        rubber: oval -.29 .1 .1 .1, oval .29 .1 .1 .1""",
    "car 2": """
        body: poly -.49 .2 -.46 .45 .12 .45 .3 .23, poly -.5 .08 -.5 .24 .3 .24 .5 .2 .5 .08
        glass: box -.43 .25 -.21 .41, poly -.17 .25 -.17 .41 .1 .41 .22 .25
        rubber: oval -.3 .1 .1 .1, oval .3 .1 .1 .1""",
    "bus": """
        livery: box -.5 .06 .5 .46
        glass: box -.47 .25 -.3 .4, box -.27 .25 -.14 .4, box -.11 .25 .02 .4, box .05 .25 .18 .4
        glass: box .21 .25 .34 .4, box .38 .09 .46 .4
        rubber: oval -.3 .075 .075 .075, oval .26 .075 .075 .075""",
    "bus 2": """
        livery: box -.45 .06 .45 .62
        glass: box -.41 .44 -.23 .56, box -.2 .44 -.02 .56, box .01 .44 .19 .56, box .22 .44 .42 .56
        glass: box -.41 .22 -.2 .36, box -.17 .22 .04 .36, box .07 .22 .28 .36, box .33 .1 .41 .36
        rubber: oval -.28 .075 .075 .075, oval .22 .075 .075 .075""",
    "dog": """
        fur: limb -.25 .34 -.25 0 .08 .08 0, limb -.16 .34 -.16 0 .08 .08 0
        fur: limb .16 .34 .16 0 .08 .08 0, limb .25 .34 .25 0 .08 .08 0
        fur: limb -.26 .42 -.45 .55 .06 .04 .2, oval 0 .37 .31 .13, limb .2 .38 .36 .6 .17
        fur: oval .36 .6 .12 .11, oval .48 .565 .1 .06
        hair: limb .33 .69 .26 .5 .08
        rubber: oval .55 .58 .028 .026, oval .42 .635 .02 .02""",
    "tree": """
        wood: box -.05 0 .05 .6
        leaf: oval -.13 .6 .22 .2, oval .13 .6 .22 .2, oval 0 .8 .22 .2""",
    "house": """
        wall: box -.5 0 .5 .5
        pot: poly -.55 .5 0 .7 .55 .5
        glass: box -.4 .22 -.22 .4, box -.1 .22 .08 .4, box .2 .22 .38 .4""",
    "board": "wall: box -.5 0 .5 .45",
    "board 2": "pot: box -.2 0 .2 .8",
    "lamp": "wood: box -.03 0 .03 1\nwall: oval 0 .93 .09 .07",
    "bench": "wood: box -.5 .22 .5 .3, box -.5 .4 .5 .5, box -.4 0 -.34 .5, box .34 0 .4 .5",
    "potted plant": """
        leaf: limb 0 .35 -.3 .8 .15, limb 0 .35 -.05 1 .15, limb 0 .35 .3 .75 .15
        pot: poly -.2 .4 .2 .4 .13 0 -.13 0""",
}
# The largest size of a kind, as a share of the square root of the picture's area; else 0.9.
LARGEST = {"crowd": 0.2, "person": 0.8, "car": 0.85, "bus": 1, "dog": 0.75, "potted plant": 0.5}
MOST = {"crowd": 1, "person": 3}  # in a picture that holds any; else 2
# Each class leans to colours of its own, so that two minutes of training can tell them apart.
PALETTE = {
    "sky": [(150, 185, 220), (200, 210, 220), (170, 170, 185)],
    "ground": [(120, 120, 122), (95, 135, 75), (150, 145, 120), (200, 195, 185)],
    "wall": [(225, 215, 195), (190, 180, 170), (160, 160, 150)],
    "pot": [(140, 130, 125), (200, 200, 205)],
    "shirt": [(150, 50, 160), (215, 70, 140), (105, 60, 185)],
    "body": [(40, 110, 210), (20, 160, 190), (60, 80, 150)],
    "trousers": [(60, 50, 110), (50, 40, 65)],
    "skin": [(236, 188, 150), (205, 150, 110), (141, 85, 54), (90, 56, 40)],
    "hair": [(30, 24, 20), (60, 45, 40), (20, 20, 30)],
    "livery": [(205, 30, 30), (240, 190, 20), (220, 90, 20)],
    "fur": [(120, 70, 25), (190, 125, 55), (90, 55, 30)],
    "wood": [(95, 90, 85), (130, 125, 115), (75, 70, 70)],
    "leaf": [(50, 110, 45), (90, 130, 40)],
    "glass": [(60, 75, 95), (150, 185, 210), (35, 40, 48)],
    "rubber": [(28, 28, 30), (45, 42, 40)],
}
SUPERSAMPLING = 2


# --- pictures ------------------------------------------------------------------------------------


def polygon(part: str, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) points of a part of a shape, such as "oval 0 .5 .2 .1"."""
    form, *words = part.split()
    numbers = np.array(words, dtype=float)
    start, end = numbers[:2], numbers[2:4]
    match form:
        case "oval":
            angles = np.linspace(0, 2 * np.pi, 14, endpoint=False)
            return start + end * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        case "box":
            return np.array([start, (end[0], start[1]), end, (start[0], end[1])])
        case "limb":
            if len(numbers) > 5:
                end = end + numbers[5:] * rng.uniform(-1, 1, 2)
            along = (end - start) / np.hypot(*(end - start))
            across = along[::-1] * (-0.5, 0.5) * numbers[4]
            return np.array([start + across, end + across, end - across, start - across])
    return numbers.reshape(-1, 2)


def tone_color(tone: str, rng: np.random.Generator) -> np.ndarray:
    """One of the tone's colours, lighter or darker and a little off; (3,) uint8."""
    bases = PALETTE[tone]
    color = np.array(bases[rng.integers(len(bases))]) * rng.uniform(0.85, 1.1)
    return (color + rng.normal(0, 8, 3)).clip(0, 255).astype(np.uint8)


def background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Sky and ground in gradients, blotches or blocks on them, at times stripes."""
    y, x = np.mgrid[:height, :width, :1][:2]
    tones = [tone_color(tone, rng).astype(float) for tone in ("sky", "sky", "ground", "ground")]
    sky, ground = (a + (b - a) * y / height for a, b in (tones[:2], tones[2:]))
    pixels = np.where(y < height * rng.uniform(0.3, 0.6), sky, ground)
    blotches = Image.fromarray(rng.normal(0, 12, (9, 12)).astype(np.float32))
    filters = [Image.Resampling.BICUBIC, Image.Resampling.NEAREST]
    pixels += np.array(blotches.resize((width, height), filters[rng.integers(2)]))[..., None]
    if rng.random() < 0.3:
        along, across, strength = rng.uniform((-0.6, -0.6, 5), (0.6, 0.6, 15))
        pixels += strength * np.sign(np.sin(along * x + across * y))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_figure(
    draw: ImageDraw.ImageDraw, kind: str, place: np.ndarray, size: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Draw a figure that stands at `place` (x, y); returns its outline, as polygons in pixels."""
    shape = rng.choice([name for name in SHAPES if name.startswith(kind)])
    tilt, stretch = rng.normal(0, 0.05), size * rng.uniform(0.87, 1.15, 2)
    turn = np.array([(np.cos(tilt), np.sin(tilt)), (np.sin(tilt), -np.cos(tilt))])
    turn *= stretch[:, None] * ((rng.choice([-1, 1]),), (1,))  # mirrored or not
    colors, outline = {}, []
    for line in SHAPES[shape].strip().splitlines():
        tone, parts = line.strip().split(": ")
        color = colors.setdefault(tone, tuple(tone_color(tone, rng).tolist()))
        polygons = [polygon(part, rng) @ turn + place for part in parts.split(", ")]
        for points in polygons:
            # Pillow counts from the centre of the first pixel, COCO from its corner.
            draw.polygon((SUPERSAMPLING * points - 0.5).ravel().tolist(), fill=color)
        outline += polygons if tone != "glass" else []  # windows lie inside the body
    return outline


def clip(points: np.ndarray, width: int, height: int) -> np.ndarray:
    """The part of a polygon that lies in the picture (Sutherland-Hodgman); may be empty."""
    for axis, sign, bound in ((0, 1, 0), (0, -1, width), (1, 1, 0), (1, -1, height)):
        inside, kept = sign * (points[:, axis] - bound), []
        if inside.min(initial=0) >= 0:
            continue
        for a, b, at_a, at_b in zip(points, np.roll(points, -1, 0), inside, np.roll(inside, -1)):
            if at_a >= 0:
                kept.append(a)
            if (at_a >= 0) != (at_b >= 0):
                kept.append(a + (b - a) * at_a / (at_a - at_b))
        points = np.array(kept).reshape(-1, 2)
    return points


def annotation(
    category_id: int, outline: list[np.ndarray], width: int, height: int, crowd: bool
) -> dict:
    """COCO's annotation of an outline, but for the ids."""
    polygons = [clip(points, width, height).round(2).ravel().tolist() for points in outline]
    polygons = [points for points in polygons if len(points) >= 6]
    encoded = rle.merge(rle.frPyObjects(polygons, height, width))
    segmentation = polygons
    if crowd:  # COCO writes a crowd as run lengths down the columns, zeros first
        pixels = rle.decode(encoded).ravel(order="F")
        ends = [*np.flatnonzero(np.diff(pixels, prepend=0)), pixels.size]
        segmentation = {"counts": np.diff(ends, prepend=0).tolist(), "size": [height, width]}
    return {
        "category_id": category_id,
        "bbox": rle.toBbox(encoded).tolist(),
        "area": float(rle.area(encoded)),
        "segmentation": segmentation,
        "iscrowd": int(crowd),
    }


def draw_scene(held: list[str], rng: np.random.Generator) -> tuple[Image.Image, list[dict]]:
    """A picture with distractors and, before them, the classes `held`; and its annotations."""
    width, height = SIZES[rng.integers(len(SIZES))]
    enlarged = (SUPERSAMPLING * width, SUPERSAMPLING * height)
    image = background(width, height, rng).resize(enlarged, Image.Resampling.NEAREST)
    draw, annotations = ImageDraw.Draw(image), []
    category_ids = {category["name"]: category["id"] for category in CATEGORIES}
    kinds = rng.choice(DISTRACTORS, rng.integers(0, 4)).tolist()
    for kind in (kind for kind in DEPTH if kind in held):
        kinds += [kind] * int(rng.integers(1, MOST.get(kind, 2), endpoint=True))
    for kind in kinds:
        crowd, outline = kind == "crowd", []
        name = "person" if crowd else kind
        count, far, near = (rng.integers(10, 21), 0.5, 0.6) if crowd else (1, 0.65, 1)
        for _ in range(count):
            place = rng.uniform((0.1, far), (0.9, near)) * (width, height)
            size = LARGEST.get(kind, 0.9) * rng.uniform(0.7, 1) * np.sqrt(width * height)
            outline += draw_figure(draw, name, place, size, rng)
        if name in category_ids:
            annotations.append(annotation(category_ids[name], outline, width, height, crowd))
    pixels = np.array(image.reduce(SUPERSAMPLING)) * rng.uniform(0.75, 1.1)
    pixels += rng.normal(0, rng.uniform(2, 6), pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    gray = rng.random() < 0.03  # COCO holds a few as well
    return image.convert("L") if gray else image, annotations


# --- the dataset ---------------------------------------------------------------------------------


def write_coco(root: Path, seed: int) -> None:
    """Write `root`/annotations and the images of both splits, the same for the same seed."""
    rng = np.random.default_rng(seed)
    image_ids = iter((1 + rng.choice(600_000, sum(COUNTS.values()), replace=False)).tolist())
    (root / "annotations").mkdir(parents=True)
    for split, count in COUNTS.items():
        (root / split).mkdir()
        held = [[] for _ in range(count)]
        for kind, share in SHARES.items():
            for index in rng.permutation(count)[: max(FEWEST, round(share * count))]:
                held[index].append(kind)
        images, annotations = [], []
        for kinds in held:
            image, found = draw_scene(kinds, rng)
            image_id = next(image_ids)
            name = f"{image_id:012}.jpg"
            image.save(root / split / name, quality=90)
            size = {"height": image.height, "width": image.width}
            images.append({"id": image_id, "file_name": name, **size, "license": 1})
            for number, fields in enumerate(found, start=1):
                annotations.append({"id": 100 * image_id + number, "image_id": image_id, **fields})
        rng.shuffle(annotations)  # as in COCO, the order tells nothing of the depth
        content = {
            "info": {"description": "synthetic scenes in COCO's format", "version": "1.0"},
            "licenses": [{"id": 1, "name": "CC0", "url": ""}],
            "images": images,
            "annotations": annotations,
            "categories": CATEGORIES,
        }
        path = root / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")


# --- command line --------------------------------------------------------------------------------


def clear(out: Path) -> None:
    """Make `out` an empty folder of the demo's. Raises DataError if it holds anything else."""
    found = sorted(path.name for path in out.iterdir()) if out.exists() else []
    foreign = [name for name in found if name not in OWN or MARKER not in found]
    if foreign:
        raise DataError(f"{out} holds {foreign[0]}, which is no demo's: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()
    for path in (out / name for name in found if name != MARKER):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser(
        "Write a small synthetic COCO and run the whole pipeline on it.",
        "python tools/demo.py --out demo",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="its folder, emptied first")
    parser.add_argument("--epochs", type=int, default=7, help="epochs of training")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Write the dataset, run the scripts on it, report what came of it; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs {args.epochs}: give 1 or more")
    start = time.perf_counter()
    try:
        clear(args.out)
        write_coco(args.out / "coco", SEED)
    except OSError as error:
        raise DataError(
            f"cannot write to {args.out} ({error.strerror}): choose another --out"
        ) from None
    print(f"{sum(COUNTS.values())} images and their annotations in {args.out / 'coco'}")
    for command in COMMANDS:
        words = [word.format(out=args.out, epochs=args.epochs) for word in command.split()]
        print(f"\n$ {shlex.join(['python', *words])}", flush=True)
        words[0] = str(Path(__file__).parents[1] / words[0])
        code = subprocess.run([sys.executable, *words], check=False).returncode
        if code:
            return code if code > 0 else 128 - code  # as a shell reports a signal
    report = json.loads((args.out / "report.json").read_text(encoding="utf-8"))
    score = report[0]["foreground_miou"]
    print(f"\n{time.perf_counter() - start:.0f} s in all, foreground mIoU {score:.3f}")
    picture = shutil.copyfile(args.out / "runs/unet/best_panels.png", args.out / "panels.png")
    print(f"image, mask and prediction: {picture}")
    if score < TARGET:
        print(f"demo.py: the foreground mIoU is not {TARGET}: train longer", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_command(main, DataError)
