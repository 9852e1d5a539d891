"""Every stage of the benchmark runs, and both ways of it do the same work."""

import benchmark
import numpy as np
import pytest
from conftest import annotation, command, polygon, write_coco
from PIL import Image


def test_both_ways_make_the_same_masks(tmp_path):
    """Where no instances overlap; of two images that are repeated to five."""
    people = [annotation("person", polygon(1, 1, 9, 9)), annotation("dog", polygon(12, 3, 5, 5))]
    root = tmp_path / "coco"
    write_coco(root, [("a.jpg", 20, 30, people), ("b.jpg", 24, 16, people[:1])])
    repeated = tmp_path / "repeated"
    benchmark.repeat_images(root, "val2017", 5, repeated)
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    benchmark.our_masks(1, repeated, "val2017", tmp_path / "ours")
    benchmark.straightforward_masks(repeated, "val2017", tmp_path / "theirs")
    for folder in ("masks_raw", "masks_colored"):
        ours = sorted((tmp_path / "ours" / folder).iterdir())
        theirs = sorted((tmp_path / "theirs" / folder).iterdir())
        assert [path.name for path in ours] == [path.name for path in theirs]
        assert len(ours) == 5
        for one, other in zip(ours, theirs):
            np.testing.assert_array_equal(np.array(Image.open(one)), np.array(Image.open(other)))


@pytest.mark.parametrize("stage", ["masks", "train", "metric", "bootstrap"])
def test_every_stage_prints_rates(coco, data, stage):
    flags = {
        "masks": ["--coco-root", coco, "--images", 12, "--workers", 1, 2],
        "train": ["--data", data, "--width", 4, "--size", 32, "--workers", 1, "--amp", "bf16"],
        "metric": ["--classes", 3],
        "bootstrap": ["--classes", 3],
    }
    result = command("tools/benchmark.py", stage, "--repeats", 1, *flags[stage])
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    ours = [line for line in lines if line[0] in ("prepare_masks", "train.py", "evaluate.py")]
    ours += [line for line in lines if line[0] == "report.py"]
    assert len(ours) == (2 if stage == "masks" else 1)
    (baseline,) = [line for line in lines if line[0] == "straightforward"]
    if stage != "masks":
        assert float(ours[0][-2]) / float(baseline[-2]) == pytest.approx(
            float(ours[0][-1]), abs=0.06, rel=0.1
        )


def test_refusals(tmp_path, refused):
    assert "--coco-root" in refused("benchmark", "masks")
    assert "--repeats" in refused("benchmark", "metric", "--repeats", 0)
    flags = ["--coco-root", tmp_path, "--split", "x"]
    assert "no images of x" in refused("benchmark", "masks", *flags)
    (tmp_path / "x").mkdir()
    assert "check --coco-root" in refused("benchmark", "masks", *flags)
    assert f"no manifest at {tmp_path}" in refused("benchmark", "train", "--data", tmp_path)
