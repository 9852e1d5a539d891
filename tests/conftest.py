"""A tiny COCO root, made afresh for each test session, and ways to run the scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).parents[1]
REAL = SCRIPTS.parent / "shared" / "coco_real"
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "tools")]
os.environ["WANDB_SILENT"] = "true"

CATEGORIES = {"person": 1, "car": 3, "bus": 6, "dog": 18, "chair": 62}

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:  # then the tests that need it are skipped
    st = MagicMock()

    def given(*_, **__):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(**_):
        return lambda test: test


needs_real_images = pytest.mark.skipif(
    not REAL.exists(), reason="no real COCO images beside the repo"
)


def polygon(x, y, w, h):
    """The rectangle as a COCO polygon."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(name, segmentation, iscrowd=0):
    """An annotation without ids; `write_coco` gives them."""
    return {"category_id": CATEGORIES[name], "segmentation": segmentation, "iscrowd": iscrowd}


def write_coco(root, images, split="val2017", folder=None, first_id=1):
    """Write a split. `images`: (file name, height, width, annotations), or a dict to take as is."""
    content = {"images": [], "annotations": []}
    content["categories"] = [{"id": id_, "name": name} for name, id_ in CATEGORIES.items()]
    folder = root / (folder or split)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first_id)
    for number, (name, height, width, annotations) in enumerate(images, start=first_id):
        content["images"].append(
            {"id": number, "file_name": name, "height": height, "width": width}
        )
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        for item in annotations:  # something to learn: a colour per class
            segmentation = item["segmentation"]
            if (
                isinstance(segmentation, list)
                and len(segmentation) == 1
                and len(segmentation[0]) == 8
            ):
                x, y, _, _, x2, y2, _, _ = map(int, segmentation[0])
                pixels[max(y, 0) : y2, max(x, 0) : x2, item["category_id"] % 3] = 200
        Image.fromarray(pixels).save(folder / name, quality=95)
        for item in annotations:
            ids = {"id": 1000 * first_id + len(content["annotations"]), "image_id": number}
            content["annotations"].append({**item, **ids})
    (root / "annotations").mkdir(exist_ok=True)
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


def some_images(count, prefix, seed):
    """People in most images, cars in a third, a bus in every eighth, a dog in the last one only."""
    rng = np.random.default_rng(seed)
    images = []
    for number in range(count):
        height, width = ((48, 64), (64, 48), (40, 40))[number % 3]
        names = ["person"] * (number % 4 != 0) + ["car"] * (number % 3 == 0)
        names += ["bus"] * (number % 8 == 1) + ["dog"] * (number == count - 1)
        annotations = []
        for name in names:
            x, y = (int(v) for v in rng.integers(0, 20, 2))
            annotations.append(annotation(name, polygon(x, y, 18, 16)))
        images.append((f"{prefix}{number:03}.jpg", height, width, annotations))
    return images


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """Root with 24 training and 9 validation images."""
    root = tmp_path_factory.mktemp("coco")
    write_coco(root, some_images(24, "t", 0), "train2017")
    write_coco(root, some_images(9, "v", 1), "val2017", first_id=101)
    return root


@pytest.fixture(scope="session")
def data(coco, tmp_path_factory):
    """The prepared data directory of `coco`."""
    import prepare_masks

    out = tmp_path_factory.mktemp("prepared") / "data"
    splits = ["--split", "train2017", "val2017"]
    prepare_masks.main(["--coco-root", str(coco), *splits, "--out", str(out), "--workers", "1"])
    return out


@pytest.fixture(scope="session")
def checkpoint(data, tmp_path_factory):
    """last.pt of a U-Net trained for two epochs."""
    import train

    out = tmp_path_factory.mktemp("runs") / "unet"
    train.main([*TINY, "--data", str(data), "--model", "unet", "--epochs", "2", "--out", str(out)])
    return out / "last.pt"


TINY = "--size 32 --width 4 --batch-size 4 --val-split val2017 --workers 0 --device cpu".split()
TINY += ["--wandb", "disabled", "--amp", "off"]


def command(script, *arguments, **options):
    """Run a script in a process of its own, as a user would; the result has text outputs."""
    line = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": 250, **options}
    return subprocess.run(line, **options)


@pytest.fixture
def refused(capsys):
    """Run a script's main in this process; it must refuse with one sentence and exit code 2."""
    import importlib

    from common import run_command

    def run(script, *arguments):
        module = importlib.import_module(script)
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: module.main([str(a) for a in arguments]))
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2, error
        assert "Traceback" not in error
        sentence = error.splitlines()[-1]
        assert "error: " in sentence
        return sentence

    return run
