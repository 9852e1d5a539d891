"""The evaluation of real checkpoints: native size, any batch size, report, picture, refusals."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, given, settings, some_images, st, write_coco
from PIL import Image
from test_metric import confusion_of, counts_of

import evaluate as evaluation
import metrics
import prepare_masks
from common import load_manifest
from dataset import (
    evaluation_input,
    evaluation_loader,
    load_image,
    load_mask,
    normalize,
    padded_size,
    resized_size,
)
from evaluate import Predictor, evaluate
from metrics import as_text, report, scores, tables
from models import load_checkpoint, model_from_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(checkpoint):
    return model_from_checkpoint(load_checkpoint(checkpoint), CPU)


def test_any_batch_size_gives_the_same_matrix(data, model):
    manifest = load_manifest(data)
    rows = np.arange(33)
    results = [
        evaluate(Predictor(model, 64, CPU), evaluation_loader(manifest, rows, 64, *how), "")
        for how in ((1, 0), (3, 1), (8, 0))
    ]
    assert results[0].counts.shape == (33, 3, 5)
    for other in results[1:]:
        assert torch.equal(results[0].counts, other.counts)
        assert torch.equal(results[0].total, other.total)
    np.testing.assert_array_equal(results[0].counts[:, 1], manifest.pixels)
    np.testing.assert_array_equal(results[0].total.sum(dim=1), manifest.pixels.sum(axis=0))


def test_equals_one_image_at_a_time_by_hand(data, model):
    """Truth at native size, logits resized, padding cut: spelled out for each image."""
    manifest = load_manifest(data)
    rows = np.array([0, 1, 2, 30])
    matrices = [
        evaluate(
            Predictor(model, 48, CPU), evaluation_loader(manifest, rows[i : i + 1], 48, 2, 0), ""
        )
        for i in range(len(rows))
    ]
    matrices = [found.total for found in matrices]
    for matrix, row in zip(matrices, rows):
        image, mask = load_image(manifest, row), torch.from_numpy(load_mask(manifest, row))
        height, width = mask.shape
        h, w = resized_size(height, width, 48)
        padded = evaluation_input(image, 48)[None]
        with torch.inference_mode():
            logits = model(normalize(padded))["out"][:, :, :h, :w]
            logits = F.interpolate(logits, size=(height, width), mode="bilinear")
        prediction = logits[0].argmax(dim=0).numpy()
        for truth in range(5):
            for label in range(5):
                expected = ((mask.numpy() == truth) & (prediction == label)).sum()
                assert matrix[truth, label] == expected


def test_logits_are_resized_not_labels():
    logits = torch.zeros(2, 2, 2)
    logits[1] = torch.tensor([[3.0, -1.0], [3.0, -1.0]])
    prediction = Predictor(None, 2, CPU).labels(logits, 8, 8)
    # Bilinear, the difference of the logits falls 3, 3, 2.5, 1.5, 0.5, -0.5, -1, -1: five columns,
    # where resized labels would give four.
    assert prediction.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] * 8


@given(
    classes=st.integers(1, 25),
    height=st.integers(1, 300),
    width=st.integers(1, 400),
    size=st.integers(1, 90),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_class_by_class_is_the_same_as_all_at_once(classes, height, width, size, seed):
    """Bit for bit: where classes tie, as integers do, and where only the rounding decides."""
    h, w = padded_size(height, width, size)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, classes, h, w, generator=generator)
    logits = logits.round() if seed % 2 else logits[:, :1] + 1e-7 * logits
    logits = logits.to(memory_format=torch.channels_last)[0]
    h, w = resized_size(height, width, size)
    # Classes as the batch: how the kernels round depends on the number of channels.
    cut = logits[:, None, :h, :w].float()
    at_once = F.interpolate(cut, size=(height, width), mode="bilinear")[:, 0].max(dim=0).indices
    by_class = Predictor(None, size, CPU).labels(logits, height, width)
    assert by_class.dtype == torch.uint8
    assert torch.equal(at_once.to(torch.uint8), by_class)


def test_the_loss_is_the_mean_over_pixels_that_count():
    """At the size of the network: a picture of 32 x 16 pixels at size 8 is 16 x 8, padded to 16."""
    logits = torch.zeros(2, 32, 32)
    logits[1, :16, :8] = math.log(3)  # probabilities 1/4 and 3/4
    logits[:, 16:] = logits[:, :, 8:] = 99 * torch.randn(2, 1, 1)  # padding, cut off
    mask = torch.full((32, 16), 255, dtype=torch.uint8)
    mask[:8, :8], mask[8:16, 8:] = 0, 1  # 4 x 4 pixels of each at size 8
    total, pixels = Predictor(None, 8, CPU).loss(logits, mask).tolist()
    assert pixels == 32
    assert total == pytest.approx(16 * math.log(4) + 16 * math.log(4 / 3))


def test_the_mask_of_the_loss_is_sampled_at_pixel_centres():
    """Of each two by two pixels the last one, whose corner is the centre."""
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[1::2, 1::2] = 1
    logits = torch.stack([torch.zeros(32, 32), torch.full((32, 32), 50.0)])
    loss, pixels = Predictor(None, 32, CPU).loss(logits, mask)
    assert (loss.item(), pixels.item()) == (0, 32 * 32)


def test_a_tie_is_the_lowest_label():
    logits = torch.tensor([1.0, 2, 2, 0, 2]).view(5, 1, 1).expand(5, 32, 32)
    assert (Predictor(None, 16, CPU).labels(logits, 200, 100) == 1).all()


def test_report(checkpoint, tmp_path):
    copy = tmp_path / "other.pt"
    shutil.copy(checkpoint, copy)
    file = tmp_path / "report.json"
    result = command(
        "evaluate.py", "--ckpt", checkpoint, copy, "--json", file, "--panels", 3,
        "--pick", "random", "--workers", 1, "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert str(checkpoint) in result.stdout
    first, second = json.loads(file.read_text())
    assert first["classes"] == ["background", "person", "car", "bus", "dog"]
    assert first["images"] == 9
    confusion = np.array(first["confusion"])
    expected = scores(counts_of(confusion))
    for name, iou in zip(first["classes"], expected["iou"]):
        assert first["iou"][name] == pytest.approx(iou)
    assert first["miou"] == pytest.approx(expected["miou"])
    low, high = first["interval"]["miou"]
    assert low <= first["miou"] <= high
    assert second["difference"]["miou"]["value"] == 0
    assert second["difference"]["miou"]["p"] == 1
    metrics = (checkpoint.parent / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["val_miou"] == pytest.approx(first["miou"])
    picture = Image.open(checkpoint.parent / "last_panels.png")
    assert picture.width > 1000
    assert picture.height > 3 * 200


def test_absent_class_is_null(data, checkpoint, tmp_path):
    """Truth and prediction without a class: null in the JSON, and in no mean."""
    matrices = np.zeros((2, 3, 3), dtype=np.int64)
    matrices[:, 0, 0], matrices[:, 1, 1], matrices[:, 1, 0] = 5, 6, 2
    matrices[1, 1, 2] = 3  # pixels that are taken for it
    confusion = confusion_of(np.repeat(matrices, 2, axis=0))
    entry = report("x", ["background", "person", "car"], confusion, True, "validation")
    assert entry["iou"]["car"] is None
    assert entry["interval"]["iou"]["car"] is None
    assert entry["miou"] == pytest.approx((20 / 28 + 24 / 38) / 2)
    assert entry["foreground_miou"] == pytest.approx(24 / 38)
    assert entry["false_positives"] == {"car": 6}
    assert "car: 6 pixels, though no image holds it" in as_text(tables([entry])[0])
    assert entry["images_with_class"] == {"background": 4, "person": 4, "car": 0}
    assert "car" in as_text(tables([entry])[0])
    json.dumps(entry, allow_nan=False)


def test_refusals(data, checkpoint, tmp_path, refused):
    assert "no checkpoint at /nowhere.pt" in refused("evaluate", "--ckpt", "/nowhere.pt")
    sentence = refused("evaluate", "--ckpt", checkpoint, "--data", tmp_path)
    assert f"no manifest at {tmp_path}" in sentence
    content = json.loads((data / "manifest.json").read_text())
    content["classes"][4] = "cat"
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    sentence = refused("evaluate", "--ckpt", checkpoint, "--data", tmp_path)
    assert "holds person, car, bus, cat: give the data directory" in sentence
    content["classes"][4] = "dog"
    content["images"] = content["images"][:-1]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    sentence = refused("evaluate", "--ckpt", checkpoint, "--data", tmp_path)
    assert "other masks" in sentence
    assert "--other-data" in sentence
    sentence = refused("evaluate", "--ckpt", checkpoint, "--data", tmp_path, "--other-data")
    assert "use --images all" in sentence
    sentence = refused("evaluate", "--ckpt", checkpoint, "--json", tmp_path / "none" / "x.json")
    assert f"cannot write {tmp_path / 'none' / 'x.json'}: give a file, in a folder" in sentence
    assert "cannot write" in refused("evaluate", "--ckpt", checkpoint, "--html", tmp_path)
    assert "--pick cow" in refused("evaluate", "--ckpt", checkpoint, "--pick", "cow")


def test_a_checkpoint_that_is_replaced_meanwhile(checkpoint, tmp_path, refused, monkeypatch):
    moving, find = tmp_path / "best.pt", evaluation.find_subject
    shutil.copy(checkpoint, moving)

    def find_then_train(*arguments):
        subject, state = find(*arguments), load_checkpoint(moving)
        state["progress"]["epoch"] += 1
        save_checkpoint(moving, state)
        return subject

    monkeypatch.setattr(evaluation, "find_subject", find_then_train)
    assert f"{moving} was replaced meanwhile" in refused("evaluate", "--ckpt", moving)


def evaluated(checkpoint, file, *flags):
    """The JSON entry of an evaluation through the command line."""
    flags = ["--json", str(file), "--workers", "0", "--no-intervals", "--device", "cpu", *flags]
    evaluation.main(["--ckpt", str(checkpoint), *flags])
    return json.loads(file.read_text())[0]


def test_training_images_and_other_data_are_evaluated_when_asked_for(coco, checkpoint, tmp_path):
    file = tmp_path / "report.json"
    validation, training, everything = (
        evaluated(checkpoint, file, "--images", name) for name in ("validation", "training", "all")
    )
    assert [e["images"] for e in (validation, training, everything)] == [9, 24, 33]
    assert [e["evaluated_on"] for e in (validation, training)] == ["validation", "training"]
    total = np.add(validation["confusion"], training["confusion"])
    np.testing.assert_array_equal(everything["confusion"], total)

    # The same images prepared another way: still those that it was validated on.
    flags = ["--coco-root", str(coco), "--split", "train2017", "val2017", "--workers", "1"]
    prepare_masks.main([*flags, "--out", str(tmp_path / "b"), "--priority", "car"])
    entry = evaluated(checkpoint, file, "--data", str(tmp_path / "b"), "--other-data")
    assert entry["images"] == 9
    # Other images: all of them.
    write_coco(tmp_path / "c", some_images(4, "x", 7), "val2017", first_id=900)
    flags = ["--coco-root", str(tmp_path / "c"), "--out", str(tmp_path / "d"), "--workers", "1"]
    prepare_masks.main(flags)
    entry = evaluated(checkpoint, file, "--data", str(tmp_path / "d"), "--other-data")
    assert (entry["images"], entry["evaluated_on"]) == (4, "all")


def prepared(root, out, prefix, priority="dog"):
    """Nine images whose splits and ids are those of the checkpoint's; the prefix is another's."""
    write_coco(root, some_images(9, prefix, 5), "val2017", first_id=101)
    flags = ["--coco-root", str(root), "--workers", "1", "--priority", priority, "--out", str(out)]
    prepare_masks.main(flags)
    return str(out)


def test_other_images_of_the_same_ids_are_no_validation_images(checkpoint, tmp_path, refused):
    """As of two projects of CVAT, in which every split is `default` and ids begin at 1."""
    file, other = tmp_path / "report.json", prepared(tmp_path / "b", tmp_path / "c", "x")
    entry = evaluated(checkpoint, file, "--data", other, "--other-data")
    assert (entry["images"], entry["evaluated_on"]) == (9, "all")
    sentence = refused("evaluate", "--ckpt", checkpoint, "--data", other, "--other-data",
                       "--images", "training")  # fmt: skip
    assert "use --images all" in sentence
    # Checkpoints of before, whose keys have no file names, still know theirs.
    state = load_checkpoint(checkpoint)
    state["val_ids"] = [key[:2] for key in state["val_ids"]]
    save_checkpoint(tmp_path / "old.pt", state)
    assert evaluated(tmp_path / "old.pt", file)["evaluated_on"] == "validation"


def test_training_images_are_only_those_of_the_run(coco, checkpoint, tmp_path, refused):
    """Not the rest of other data, and none where a validation image has left the data."""
    flags = ["--coco-root", coco, "--split", "train2017", "val2017", "--workers", 1]
    prepare_masks.main([*map(str, flags), "--out", str(tmp_path / "b"), "--priority", "car"])
    line = ["evaluate", "--ckpt", checkpoint, "--data", tmp_path / "b", "--other-data"]
    assert "use --images all" in refused(*line, "--images", "training")
    state = load_checkpoint(checkpoint)
    state["val_ids"] = [*state["val_ids"], ["val2017", "999", "gone.jpg"]]
    save_checkpoint(tmp_path / "gone.pt", state)
    for images in ("validation", "training"):
        sentence = refused("evaluate", "--ckpt", tmp_path / "gone.pt", "--images", images)
        assert "use --images all" in sentence


def test_runs_on_other_images_or_masks_are_not_compared(checkpoint, tmp_path, refused):
    state = load_checkpoint(checkpoint)
    for name, prefix, priority in (("a", "x", "dog"), ("b", "y", "dog"), ("c", "x", "car")):
        data = prepared(tmp_path / name, tmp_path / f"{name}-data", prefix, priority)
        manifest = load_manifest(data)
        keys = manifest.keys(np.arange(9))
        own = {"val_ids": keys, "fingerprint": manifest.fingerprint}
        args = {**state["args"], "data": data}
        save_checkpoint(tmp_path / f"{name}.pt", {**state, **own, "args": args})
    for other in "bc":
        sentence = refused("evaluate", "--ckpt", tmp_path / "a.pt", tmp_path / f"{other}.pt")
        assert "other images, masks or classes" in sentence
    masks = [load_manifest(tmp_path / f"{name}-data").checksums.tolist() for name in "ac"]
    assert masks[0] != masks[1]


def test_of_other_data_no_image_counts_as_one_of_the_training(data, checkpoint):
    manifest, state = load_manifest(data), load_checkpoint(checkpoint)
    for fingerprint, count in ((manifest.fingerprint, "24"), ("other", "0")):
        state["fingerprint"] = fingerprint
        subject = evaluation.Subject("a.pt", state, manifest, np.arange(9), "all")
        assert evaluation.images_table(subject)[1][-1][1] == count


def test_runs_of_one_setting_differ_in_the_seed_not_in_the_data():
    def setting(fingerprint, **arguments):
        state = {"args": {"lr": 0.1, **arguments}, "fingerprint": fingerprint}
        return evaluation.Subject("a.pt", state, None, None, "all").setting()

    assert setting("x", seed=1, data="a") == setting("x", seed=2, data="b")
    assert setting("x") != setting("y")
    assert setting("x") != setting("x", lr=0.2)


def test_tables_as_text_and_as_markdown(checkpoint, tmp_path):
    copy = shutil.copy(checkpoint, tmp_path / "other.pt")
    file = tmp_path / "report.md"
    result = command(
        "evaluate.py", "--ckpt", checkpoint, copy, "--markdown", file, "--workers", 0,
        "--device", "cpu",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Difference to" in result.stdout
    blocks = [block for block in file.read_text().split("\n\n") if block.startswith("|")]
    assert len(blocks) == 2 + 2 * 2
    for block in blocks:
        assert len({line.count("|") for line in block.strip().splitlines()}) == 1


def test_confusions_by_hand():
    classes = ["background", "person", "car"]
    matrices = np.array([[[6, 2, 0], [1, 3, 0], [0, 0, 0]]])
    entry = report("x.pt", classes, confusion_of(matrices), False, "")
    (_, scored), (_, confused) = tables([entry])
    assert scored[2] == ["person", "50.0", "", "60.0", "75.0", "1"]
    assert scored[3] == ["car", "-", "", "-", "-", "0"]
    assert scored[5] == ["foreground mean", "50.0", "", "", "", ""]
    assert confused == [
        ["", *classes],
        ["background", "75.0", "25.0", "0.0"],
        ["person", "25.0", "75.0", "0.0"],
        ["car", "-", "-", "-"],
    ]
    many = np.zeros((1, 20, 20), dtype=np.int64)
    many[0, 7, 3], many[0, 7, 7], many[0, 2, 9] = 1, 3, 5
    entry = report("x.pt", [f"class {n}" for n in range(20)], confusion_of(many), False, "")
    rows = tables([entry])[1][1]
    assert rows[1:3] == [["class 2", "class 9", "100.0"], ["class 7", "class 3", "25.0"]]


def test_no_report_takes_the_place_of_an_input(checkpoint, data, tmp_path, refused):
    before = checkpoint.read_bytes()
    for flags in (
        ("--json", checkpoint),
        ("--html", data / "manifest.json"),
        ("--json", tmp_path / "x", "--markdown", tmp_path / "x"),
    ):
        assert "is an input, or named twice" in refused("evaluate", "--ckpt", checkpoint, *flags)
    assert checkpoint.read_bytes() == before


def test_markdown_of_any_names():
    table = metrics.as_markdown(("title", [["", "a|b"], ["two\nlines", "1"]]))
    assert table.splitlines()[2:] == ["|  | a\\|b |", "| --- | ---: |", "| two lines | 1 |"]
