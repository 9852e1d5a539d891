"""Every stage of the benchmark runs, and both ways of it do the same work."""

import json
import os
from argparse import Namespace

import benchmark
import numpy as np
import pytest
from conftest import annotation, command, polygon, write_coco
from PIL import Image

import prepare_masks
from common import UserError, load_manifest


def test_both_ways_make_the_same_masks(tmp_path):
    """Where no instances overlap; of two images that are repeated to five."""
    people = [annotation("person", polygon(1, 1, 9, 9)), annotation("dog", polygon(12, 3, 5, 5))]
    root = tmp_path / "coco"
    write_coco(root, [("a.jpg", 20, 30, people), ("b.jpg", 24, 16, people[:1])])
    work = tmp_path / "work"
    benchmark.repeat_images(root, "val2017", 5, work / "5")
    assert sum(not path.is_symlink() for path in (work / "5" / "repeated").iterdir()) == 2
    for way in ("prepare_masks.py --workers 1", "baseline"):
        assert list(benchmark.masks(way, 5, Namespace(work=work))) == [5]
    (ours,) = work.glob("*/masks_raw")
    (theirs,) = {path.parent for path in work.glob("*/raw_*.png")}
    assert len(list(ours.iterdir())) == 5
    assert len(list(theirs.iterdir())) == 10
    for number in range(5):
        for kind in ("raw", "colored"):
            one = Image.open(ours.with_name(f"masks_{kind}") / f"repeated_{number}.png")
            other = Image.open(theirs / f"{kind}_{number}.png")
            np.testing.assert_array_equal(np.array(one), np.array(other))
            assert np.array(one).any()


@pytest.mark.parametrize("stage", ["masks", "index", "sample", "step", "loss", "metric"])
def test_every_stage_prints_rates_and_ratios(coco, data, stage, tmp_path):
    flags = {
        "masks": ["--coco-root", coco, "--images", 12, "--workers", 1, 2],
        "index": ["--coco-root", coco, "--images", 12],
        "sample": ["--data", data, "--size", 32],
        "step": ["--data", data, "--width", 4, "--size", 32, "--steps", 1, "--amp", "bf16"],
        "loss": ["--classes", 3, "--size", 32, "--steps", 1, "--batch-size", 2],
        "metric": ["--classes", 3],
    }
    file = tmp_path / "rows.json"
    result = command("tools/benchmark.py", stage, "--repeats", 1, "--json", file, *flags[stage])
    assert result.returncode == 0, result.stderr
    baseline, *ours = json.loads(file.read_text())["rows"]
    assert len(ours) == (2 if stage == "masks" else 1)
    (rate,) = [key for key in baseline if key.endswith("s/s")]
    (milliseconds,) = [key for key in baseline if key.startswith("ms/")]
    for row in ours:
        assert row[rate] * row[milliseconds] == pytest.approx(1000)
        assert row["ratio"] == pytest.approx(row[rate] / baseline[rate])
        assert f"{row[rate]:.2f}" in result.stdout
    if stage == "masks":
        assert max(row["parent MB"] for row in [baseline, *ours]) < 150, "torch takes 300 MB"
        assert ours[1]["worker MB"] > 10, "memory of the workers"


def test_refusals(tmp_path, refused):
    assert "no folder coco" in refused("benchmark", "masks")
    assert "--repeats" in refused("benchmark", "metric", "--repeats", 0)
    flags = ["--coco-root", tmp_path, "--split", "x"]
    assert "no annotation file" in refused("benchmark", "masks", *flags)
    assert f"no manifest at {tmp_path}" in refused("benchmark", "step", "--data", tmp_path)


def test_what_train_refuses():
    result = command("tools/benchmark.py", "step", "--model", "x")
    assert result.returncode == 2
    assert "benchmark.py: error: argument --model" in result.stderr.splitlines()[-1]


def test_a_killed_process_is_told():
    with pytest.raises(UserError, match="killed or out of memory"):
        benchmark.alone(os._exit, 1)


def test_overfit_chooses_images_of_every_class_and_of_one_shape(tmp_path, monkeypatch):
    import overfit

    kinds = ["person", "car", "bus", "dog"]
    images = [(f"{kind}.jpg", 48, 64, [annotation(kind, polygon(2, 2, 9, 9))]) for kind in kinds]
    images += [(f"small {kind}.jpg", 48, 64, images[i][3][:0]) for i, kind in enumerate(kinds)]
    images.append(("large dog.jpg", 64, 48, [annotation("dog", polygon(2, 2, 30, 30))]))
    write_coco(tmp_path, images)
    flags = ["--coco-root", str(tmp_path), "--out", str(tmp_path / "data"), "--workers", "1"]
    prepare_masks.main(flags)
    monkeypatch.setattr(overfit, "PER_CLASS", 1)
    chosen = overfit.choose_images(tmp_path / "data")
    files = load_manifest(tmp_path / "data").files[chosen]
    assert set(files) == {f"val2017/{kind}.jpg" for kind in kinds}
    monkeypatch.setattr(overfit, "PER_CLASS", 2)
    with pytest.raises(UserError, match="too few images with person"):
        overfit.choose_images(tmp_path / "data")


@pytest.mark.parametrize("model", ["unet", "deeplab"])
def test_both_recipes_train_for_the_same_time_and_are_measured_alike(data, model, capsys):
    import recipe

    line = ["--data", str(data), "--model", model, "--size", "32", "--epochs", "1", "--seeds", "0"]
    line += ["--width", "4"] if model == "unet" else ["--width", "64"]
    args = recipe.build_parser().parse_args(line)
    mine = recipe.timed(*recipe.ours(args, 0))
    theirs = recipe.timed(*recipe.usual(args, 0), mine[-1][0])
    assert theirs[-1][0] >= mine[-1][0]
    manifest = load_manifest(data)
    expected = manifest.pixels[manifest.splits == "val2017"]
    for _, foreground, counts in (mine[0], mine[-1], theirs[0], theirs[-1]):
        np.testing.assert_array_equal(counts[:, 1], expected)
        ious = counts.sum(0)[0] / (counts.sum(0)[1] + counts.sum(0)[2] - counts.sum(0)[0])
        assert foreground == pytest.approx(ious[1:].mean())
    said = capsys.readouterr().out
    assert f"{model}, " in said


def test_the_usual_recipe_learns(data):
    import recipe

    line = f"--data {data} --size 32 --width 8".split()
    steps, validate = recipe.usual(recipe.build_parser().parse_args(line), 0)
    scores = []
    for count in (1, 150):
        for _ in range(count):
            next(steps)
        counts = validate().counts.numpy().sum(axis=0)
        scores.append(counts[0].sum() / counts[1].sum())
    assert scores[1] > scores[0]
