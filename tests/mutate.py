"""Feed prepare_masks.py with broken annotation files: one process, many seeds.

    python tests/mutate.py ROOT SPLIT WORK FIRST LAST

Takes a few images of a real root, mutates their annotation file once per seed and prepares masks of
it. Each seed must end in complete masks that agree with their manifest, or in a refusal without a
manifest; anything else, a crash of the interpreter included, ends this process with a failure.
"""

import copy
import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import prepare_masks
from common import UserError, load_manifest
from images import read_mask

EVIL = [
    None, True, False, 0, 1, -1, 2, 3.5, 1e7, 1e8, -1e8, 1e308, float("nan"), float("inf"),
    2**31, 2**63, 10**30, "", "0", "person", "../x.jpg", "/etc/passwd", "a\0b", "\ud800",
    "é" * 300, [], {}, [[]], [{}], [1, 2, 3, 4], [[1, 2, 3, 4]], [[0, 0, 9, 0, 9, 1e9]],
    {"size": [1, 1], "counts": "0"}, {"size": [480, 640], "counts": [1]},
    {"size": [480, 640], "counts": "oooooooooo"},
]  # fmt: skip


def base(root: Path, split: str) -> dict:
    """The annotations of six images, among them crowds and instances of all the classes."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    crowds = [a["image_id"] for a in content["annotations"] if a["iscrowd"]][:2]
    others = [a["image_id"] for a in content["annotations"] if a["category_id"] in (1, 3, 6, 18)]
    ids = list(dict.fromkeys(crowds + others))[:6]
    content["images"] = [image for image in content["images"] if image["id"] in ids]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    return content


def nodes(value: object) -> list[tuple]:
    """(container, key) of every place in a JSON tree."""
    found = []
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found += [(value, key), *nodes(value[key])]
    return found


def mutated(content: dict, rng: random.Random) -> bytes:
    """The file with one to four places changed, at times damaged as text too."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 4)):
        # Half of the time a place near the top: most of the tree is coordinates.
        places = nodes(content)
        shallow = [place for place in places if isinstance(place[1], str)]
        container, key = rng.choice(shallow if rng.random() < 0.7 else places)
        action = rng.choice(["evil", "evil", "evil", "delete", "copy", "scale"])
        if action == "delete":
            del container[key]
        elif action == "copy" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif action == "scale" and type(container[key]) in (int, float):
            container[key] = container[key] * rng.choice([-1, 0, 2, 1000, 0.5])
        else:
            container[key] = copy.deepcopy(rng.choice(EVIL))
    text = json.dumps(content).encode()
    if rng.random() < 0.1:
        text = text[: rng.randrange(len(text))]
    if rng.random() < 0.1:
        place = rng.randrange(len(text) or 1)
        text = text[:place] + bytes([rng.randrange(256)]) + text[place + 1 :]
    return text


def check(out: Path, work: Path) -> None:
    """Masks and manifest agree, and nothing was written beside them."""
    manifest = load_manifest(out)
    for row, name in enumerate(manifest.masks):
        mask = read_mask(out / "masks_raw" / name, int(manifest.checksums[row]))
        assert mask.shape == tuple(manifest.sizes[row])
        counts = np.bincount(mask.ravel(), minlength=256)
        assert counts[: len(manifest.classes)].tolist() == manifest.pixels[row].tolist()
        with Image.open(out / "masks_colored" / name) as image:
            assert image.size == mask.shape[::-1]
    assert sorted(path.name for path in work.iterdir()) == ["data", "root"]
    allowed = {".lock", "manifest.json", "masks_raw", "masks_colored"}
    assert {path.name for path in out.iterdir()} == allowed


def main() -> None:
    """Prepare masks from the mutants FIRST to LAST; print how each ended."""
    root, split, work = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    content = base(root, split)
    (work / "root" / "annotations").mkdir(parents=True)
    (work / "root" / split).symlink_to((root / split).resolve())
    for seed in range(int(sys.argv[4]), int(sys.argv[5])):
        print("seed", seed, end=" ", flush=True)
        shutil.rmtree(work / "data", ignore_errors=True)
        path = work / "root" / "annotations" / f"instances_{split}.json"
        path.write_bytes(mutated(content, random.Random(seed)))
        flags = ["--split", split, "--workers", "1", "--out", str(work / "data")]
        refusal = ""
        try:
            prepare_masks.main(["--coco-root", str(work / "root"), *flags])
        except UserError as error:
            refusal = str(error)
        if refusal:
            assert "\n" not in refusal
            assert not (work / "data" / "manifest.json").exists()
            print("refused:", refusal.encode("ascii", "replace")[:120], flush=True)
        else:
            check(work / "data", work)
            print("prepared", flush=True)


if __name__ == "__main__":
    main()
