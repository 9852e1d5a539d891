"""The page, in a real browser too, and the curves: what they hold, and what they withstand."""

import json
import re
import shutil
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from conftest import TINY, command
from PIL import Image

import evaluate
import metrics
import models
import report
from common import class_colors
from models import load_checkpoint

WORDS = "word " * 40
HOSTILE = ["background", "<script>alert(1)</script>", "行人", "a\"b'&c\x07\ud800", "n" * 200, WORDS]


def lines_of(classes, epochs):
    """A history with line 0; nothing is known of the last class."""
    known = {name: i / len(classes) for i, name in enumerate(classes)}
    return [
        {
            "epoch": epoch, "lr": 1e-3 / (epoch + 1), "train_loss": 2 / epoch if epoch else None,
            "val_foreground_miou": 0.5 * epoch / epochs,
            "val_iou": known | {classes[-1]: None},
        }
        for epoch in range(epochs + 1)
    ]  # fmt: skip


def shown(classes, checkpoints, epochs, pictures=1):
    """Parts of a page, of better and better checkpoints, and their counts."""
    rng, colors, parts, all_counts = np.random.default_rng(0), class_colors(len(classes)), [], []
    for number in range(checkpoints):
        confusion = metrics.ConfusionMatrix(12, len(classes), torch.device("cpu"))
        for image in range(12):
            mask = torch.from_numpy(rng.integers(0, max(2, len(classes) - 1), (30, 30)))
            right = torch.from_numpy(rng.random((30, 30)) < 0.1 + 0.07 * number)
            confusion.update(image, torch.where(right, mask, 0), mask)
        entry = metrics.report(f"runs/{number}/best.pt", classes, confusion, True, "validation")
        labels = rng.integers(0, len(classes), (30, 40)).astype(np.uint8)
        example = report.Example(Image.new("RGB", (40, 30)), labels, labels, "NUMBER <b>.jpg")
        figures = [
            report.figure(example, classes, colors, f"{number}-{i}") for i in range(pictures)
        ]
        history = lines_of(classes, epochs) if epochs else []
        facts = [("How", [["", ""], ["arguments", "<script>" + "x" * 300]])]
        parts.append(report.Shown(entry, history, colors, facts, figures))
        all_counts.append(confusion.counts.numpy())
    metrics.add_differences([part.entry for part in parts], all_counts)
    return parts, all_counts


def write_page(path, *arguments):
    parts, counts = shown(*arguments)
    path.write_text(report.page(parts, metrics.winners(counts), "python evaluate.py --ckpt '<x>'"))
    return path


SIZES = {
    "one class, one epoch": (["background", "thing"], 1, 1),
    "twelve checkpoints": (["background", "a", "b", "c", "d"], 12, 9),
    "81 classes": (["background", *(f"class {n}" for n in range(80))], 2, 3),
    "no history": (["background", "a", "b"], 1, 0),
    "hostile": (HOSTILE, 3, 2, 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_page_is_one_file_without_scripts(name, tmp_path):
    page = write_page(tmp_path / "page.html", *SIZES[name]).read_text()
    assert not re.search(r"<(script|link|iframe|object|b>\.jpg)", page)
    assert "default-src 'none'" in page
    loaded = re.findall(r"""(?:src|href)=["']?([^"'> ]*)|url\(([^)]*)""", page)
    assert all(source.startswith("data:image/") for source, _ in loaded)
    assert not any(url for _, url in loaded)
    assert len(re.findall("<h1>", page)) == 1
    assert len(re.findall(r'<svg class="chart"', page)) == (
        3 * SIZES[name][1] * (name != "no history")
    )
    for drawing in re.findall(r"<svg class=.chart.*?</svg>", page):
        ET.fromstring(drawing)  # well-formed, whatever the names


def test_names_stand_as_they_are(tmp_path):
    page = write_page(tmp_path / "page.html", *SIZES["hostile"]).read_text()
    for words in (
        "&lt;script&gt;alert(1)&lt;/script&gt;",
        "行人",
        "a&quot;b&#x27;&amp;c",
        "n" * 200,
    ):
        assert words in page


def test_each_picture_switches_for_itself(tmp_path):
    page = write_page(tmp_path / "page.html", *SIZES["hostile"]).read_text()
    names = re.findall(r'<input type="radio" name="([^"]*)"', page)
    assert sorted(names.count(name) for name in set(names)) == [4] * 6
    assert "NUMBER" in page


def test_the_best_stands_out_only_where_it_is_clear():
    """Twelve images each; the second checkpoint hits more of class 1 in all, and of class 2 in one
    image only, which says nothing."""
    counts = np.zeros((2, 12, 3, 3), dtype=np.int64)
    counts[:, :, 1] = counts[:, :, 2] = [800, 100, 100]
    counts[:, :, 0] = [700, 40, 40]
    counts[:, ::2, 0] -= 5
    counts[1, :, 0, 1] = 70
    counts[1, 0, 0, 2], counts[1, 1, 0, 2] = 90, 10
    won = metrics.winners(list(counts))
    assert won[1] == 1
    assert won[2] is None
    assert metrics.winners([counts[0]]) == [None] * 5
    assert metrics.winners([counts[0], counts[0]]) == [None] * 5
    assert metrics.winners(list(counts[::-1]))[1] == 0
    few = counts.copy()
    few[:, 3:, :, 1] = 0  # three images hold class 1
    assert metrics.winners(list(few))[1] is None
    few[:, 3] = counts[:, 3]  # four
    assert metrics.winners(list(few))[1] == 1
    near = counts[1].copy()  # as good, but for single images: whichever is asked last
    near[::2, 0, 1], near[1::2, 0, 1] = 40, 98
    for three in ([*counts, near], [near, counts[1], counts[0]], [counts[0], near, counts[1]]):
        assert metrics.winners(three)[1] is None


def test_the_gallery_takes_turns():
    counts = np.zeros((10, 3, 3), dtype=np.int64)
    counts[:, 1:, 0], counts[:, 0, 0] = 50, 50
    counts[:, 1:, 1] = 10
    counts[:, 0, 1] = np.arange(10)  # image 0 is the worst
    counts[7, 1:, 2], counts[3, 1:, 2] = 9, 5
    classes = ["background", "many", "rare"]
    chosen = metrics.gallery(4, counts, classes)
    assert list(chosen.values()) == ["random", "worst", "most of rare", "most of many"]
    (drawn,) = metrics.pick("random", 1, counts, classes)
    assert chosen[drawn] == "random"
    assert chosen[1 if drawn == 0 else 0] == "worst"
    assert next(image for image, why in chosen.items() if why == "most of rare") in (7, 3)
    assert sorted(metrics.gallery(99, counts, classes)) == list(range(10))  # each once
    assert metrics.gallery(3, counts[:0], classes) == {}


def test_ticks_and_labels():
    assert report._ticks(1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert report._ticks(0.00093) == pytest.approx([0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001])
    assert report._ticks(7) == [0, 1, 2, 3, 4, 5, 6, 7]
    places = [50.0, 52.0, report.BOTTOM, report.BOTTOM - 1]
    spread = report._spread(places)
    assert spread[:2] == [50, 64]
    assert spread[2:] == [report.BOTTOM, report.BOTTOM - 14]


def test_curves_show_the_history():
    """The line of a class ends at its last value, on the scale from 0 to 1."""
    history = lines_of(["background", "a", "b"], 4)
    root = ET.fromstring(report.curves(history, ["background", "a", "b"], class_colors(3)))
    lines = {line.findtext("{*}title"): line for line in root.findall(".//{*}polyline")}
    lines = {name: line.get("points").split() for name, line in lines.items() if name is not None}
    assert "b" not in lines  # never known
    assert [len(lines[name]) for name in ("training", "", "foreground", "a")] == [4, 5, 5, 5]
    middle = (report.TOP + report.BOTTOM) / 2
    assert lines["foreground"][-1] == f"{float(report.RIGHT)},{middle}"
    texts = [text.text for text in root.findall(".//{*}text")]
    assert "IoU (best: epoch 4)" in texts
    assert "foreground 50.0" in texts


def test_a_run_draws_its_curves(data, tmp_path, monkeypatch, capsys):
    """After each epoch; where that fails, it is a warning."""
    import train

    run = tmp_path / "run"
    line = [*TINY, "--data", str(data), "--model", "unet", "--out", str(run), "--epochs"]
    train.main([*line, "2"])
    epochs = [json.loads(x)["epoch"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    texts = [t.text for t in ET.parse(run / "curves.svg").findall(".//{*}text")]
    assert epochs == [1, 2]
    assert "2" in texts
    for name in ("curves.svg", "metrics.jsonl"):  # as a program of Windows that has it open
        (run / name).unlink()
        (run / name).mkdir()
    began = load_checkpoint(run / "last.pt")["origin"]
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "--resume"])
    train.main(["--resume", str(run), "--epochs", "3"])
    warnings = capsys.readouterr().out
    assert f"warning: cannot write {run / 'curves.svg'}" in warnings
    assert f"warning: cannot write {run / 'metrics.jsonl'}" in warnings
    state = load_checkpoint(run / "last.pt")
    assert state["progress"]["epoch"] == 3
    both = f"{began['command']}; python train.py --resume"  # what makes the run again
    assert state["origin"] == began | {"command": both}
    assert state["origin"] == json.loads((run / "args.json").read_text())["origin"]
    assert models.origin(torch.device("cpu"))["command"] == "python train.py --resume"


def test_html(checkpoint, data, tmp_path, refused):
    """By command: what the checkpoint is and how it was trained stands in the page, and nothing is
    written where that cannot be."""
    old = tmp_path / "old.pt"  # of a time without a history and an origin
    state = load_checkpoint(checkpoint)
    del state["origin"], state["progress"]["history"]
    torch.save(state, old)
    page = tmp_path / "page.html"
    shared = ["--workers", 0, "--device", "cpu", "--html", page]
    result = command("evaluate.py", "--ckpt", checkpoint, old, *shared, "--merge-seeds")
    assert result.returncode == 0, result.stderr
    content = page.read_text()
    commit = load_checkpoint(checkpoint)["origin"]["scripts"]
    assert f"{checkpoint} and 1 more" in result.stdout
    for words in (
        "and 1 more",
        str(checkpoint),
        f"torch {torch.__version__}",
        commit,
        "--html",
        "most of bus",
    ):
        assert words in content
    assert content.count('<svg class="chart"') == 3
    assert 10 <= content.count("<fieldset>") <= evaluate.GALLERY
    sentence = refused("evaluate", "--ckpt", checkpoint, "--html", tmp_path / "none" / "page.html")
    assert "in a folder that you can write to" in sentence
    command("evaluate.py", "--ckpt", checkpoint, *shared, "--no-intervals").check_returncode()


HISTORIES = [
    [{"epoch": 1}],
    [{**lines_of(["a", "b"], 1)[0], "epoch": "1"}],
    [{**lines_of(["a", "b"], 1)[0], "val_iou": {"person": float("nan")}}],
    7,
]


@pytest.mark.parametrize("history", HISTORIES, ids=range(4))
def test_a_hostile_history_is_refused(history, checkpoint, tmp_path, refused):
    state = load_checkpoint(checkpoint)
    state["progress"]["history"] = history
    torch.save(state, tmp_path / "best.pt")
    sentence = refused("evaluate", "--ckpt", tmp_path / "best.pt", "--html", tmp_path / "p.html")
    assert "is not a valid checkpoint" in sentence


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on this machine")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("name", SIZES)
def test_in_a_browser(name, width, browser, tmp_path):
    """Nothing is asked for, nothing goes wrong, nothing is wider than the window."""
    file, found = write_page(tmp_path / "page.html", *SIZES[name]), []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: found.append(request.url))
    page.goto(file.as_uri())
    assert [url for url in found if not url.startswith("data:image/webp")] == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = "e => e.scrollWidth > e.clientWidth + 1 && e.matches('div, section, fieldset, figure')"
    assert page.evaluate(f"[...document.querySelectorAll('*')].filter({wider}).length") == 0
    decoded = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert page.evaluate(decoded)
    labels = """[...document.querySelectorAll('.chart')].every(chart => {
        const boxes = [...chart.querySelectorAll('text')].map(e => e.getBoundingClientRect());
        return boxes.every((a, i) => boxes.every((b, j) => i <= j || a.right <= b.left + 1 ||
            b.right <= a.left + 1 || a.bottom <= b.top + 3 || b.bottom <= a.top + 3)) })"""
    assert page.evaluate(labels), "labels of a chart collide"
    page.close()


def test_the_layers_switch_without_javascript(browser, tmp_path):
    file = write_page(tmp_path / "page.html", *SIZES["hostile"])
    context = browser.new_context(viewport={"width": 400, "height": 900}, java_script_enabled=False)
    page = context.new_page()
    page.goto(file.as_uri())
    box = page.locator("fieldset").nth(1)
    for number, title in enumerate(report.TITLES):
        box.get_by_label(title, exact=True).check()
        seen = [figure.is_visible() for figure in box.locator("figure").all()]
        assert seen == [n == number for n in range(4)]
    others = page.locator("fieldset").nth(0).locator("figure").all()  # keep their own
    assert [figure.is_visible() for figure in others] == [False, False, True, False]
    page.set_viewport_size({"width": 1400, "height": 900})
    assert all(figure.is_visible() for figure in box.locator("figure").all())
    context.close()


def test_long_names_stand_whole_in_the_legend_and_beside_each_other():
    names = ["construction--barrier--fence", "construction--barrier--guard-rail", "läuferin"]
    colors = [(0, 0, 0), (9, 9, 200), (9, 200, 9), (200, 9, 9)]
    pixels = np.array(report._legend(["background", *names], colors)).astype(int)[6:24]
    lefts = [np.flatnonzero((pixels[8] == color).all(axis=1))[0] for color in colors[1:]]
    for left, end in zip(lefts, [*lefts[1:], report.WIDTH]):
        dark = np.flatnonzero((pixels[:, left + 20 : end - 3].sum(axis=2) < 384).any(axis=0))
        assert 30 < dark[-1] < end - 3 - left - 20 - 4  # a gap before the next one
    assert report._font(15, "person").getname() == report.ImageFont.load_default(15).getname()
