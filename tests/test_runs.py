"""What could lose a run, mix it up with another, or end it without need: signals, locks, pipes."""

import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY, command

import common
import dataset
import prepare_masks
import train
from common import UserError, default_workers, locked, write_text
from dataset import SIGNALS, EpochBatches, evaluation_loader
from models import load_checkpoint

FLAGS = [*TINY, "--model", "unet"]


def run(data, out, *flags):
    """Train in this process."""
    train.main([str(flag) for flag in ["--data", data, *FLAGS, "--out", out, *flags]])


def start(data, out, *flags, **options):
    """Train in a process of its own, in a group that a signal can be sent to."""
    line = [sys.executable, SCRIPTS / "train.py", "--data", data, *FLAGS, "--out", out, *flags]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([*map(str, line)], start_new_session=True, **options)


def wait_for(path, process):
    """Until a file is there."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


needs_groups = pytest.mark.skipif(os.name == "nt", reason="Windows knows no process groups")


@needs_groups
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_the_whole_group_saves_and_ends_within_seconds(data, tmp_path, number):
    """As `timeout`, torchrun, Slurm and a terminal send it: to the loader processes as well."""
    out = tmp_path / "my run"
    process = start(data, out, "--epochs", 5000, "--workers", 2)
    wait_for(out / "best.pt", process)
    os.killpg(process.pid, number)
    text, error = process.communicate(timeout=30)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error
    assert f"--resume '{out / 'last.pt'}'" in text
    progress = load_checkpoint(out / "last.pt")["progress"]
    assert progress["step"] >= progress["epoch"] >= 1
    with pytest.raises(ProcessLookupError):  # and nobody is left
        os.killpg(process.pid, 0)


SLOW = """
import sys, time
sys.path.insert(0, {scripts!r})
import evaluate, train
labels = evaluate.Predictor.labels
def slow(*arguments):
    with open({note!r}, "a") as note:
        note.write("x")
    time.sleep(0.5)
    return labels(*arguments)
evaluate.Predictor.labels = slow
train.main(sys.argv[1:])
"""


@needs_groups
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_in_validation_is_answered_there_and_the_epoch_is_kept(data, tmp_path, number):
    out, note = tmp_path / "run", tmp_path / "validates"
    code = SLOW.format(scripts=str(SCRIPTS), note=str(note))
    line = [sys.executable, "-c", code, "--data", data, *FLAGS, "--out", out, "--epochs", 2]
    process = subprocess.Popen([*map(str, line)], start_new_session=True, stdout=subprocess.PIPE)
    wait_for(note, process)
    os.killpg(process.pid, number)
    process.communicate(timeout=30)
    assert note.stat().st_size < 9  # images that were looked at
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    progress = load_checkpoint(out / "last.pt")["progress"]
    assert (progress["epoch"], progress["batch"], progress["step"]) == (0, 6, 6)
    run(data, tmp_path / "whole", "--epochs", 2)
    train.main(["--resume", str(out)])  # the folder stands for its last.pt
    one, other = (load_checkpoint(p / "last.pt") for p in (out, tmp_path / "whole"))
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    lines = zip(one["progress"]["history"], other["progress"]["history"], strict=True)
    assert all(
        a["val_iou"] == b["val_iou"] and a["train_loss"] == b["train_loss"] for a, b in lines
    )


@needs_groups
def test_a_closed_pipe_does_not_end_a_training(data, tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        process = start(data, tmp_path / "run", "--epochs", 2, stdout=pipe)
        error = process.communicate(timeout=100)[1]
    assert process.returncode == 0, error
    assert error == ""
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_log_on_a_full_disk_does_not_end_a_training(data, tmp_path):
    with open("/dev/full", "wb") as full:
        process = start(data, tmp_path / "run", "--epochs", 2, stdout=full)
        error = process.communicate(timeout=100)[1]
    assert (process.returncode, error) == (0, "")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["progress"]["epoch"] == 2


@needs_groups
def test_no_output_at_all_and_a_terminal_that_closes_end_no_training(data, tmp_path):
    """As of some daemons; and as after nohup, which lets SIGHUP be ignored."""
    out = tmp_path / "run"
    line = [sys.executable, SCRIPTS / "train.py", "--data", data, *FLAGS, "--out", out]
    line = shlex.join(map(str, [*line, "--epochs", 40, "--workers", 1]))
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' HUP; exec {line} >&- 2>&-"], start_new_session=True
    )
    wait_for(out / "best.pt", process)
    os.killpg(process.pid, signal.SIGHUP)
    assert process.wait(timeout=100) == 0
    assert load_checkpoint(out / "last.pt")["progress"]["epoch"] == 40


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path, refused):
    (tmp_path / "args.json").write_text("{}")
    error = refused("train", "--resume", tmp_path / "last.pt")
    assert f"{tmp_path} ended before its first checkpoint: start without --resume" in error


def test_two_runs_into_one_folder(data, tmp_path, refused):
    out = tmp_path / "run"
    code = f"import sys, time; sys.path.insert(0, {str(SCRIPTS)!r}); import common, pathlib\n"
    code += f"with common.locked(pathlib.Path({str(out)!r})):\n"
    code += "    print('held', flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        sentence = refused("train", "--data", data, *FLAGS, "--epochs", 1, "--out", out)
        assert "is in use by another run" in sentence
        assert sorted(os.listdir(out)) == [".lock"]
        other.kill()
    run(data, out, "--epochs", 1)


def test_a_run_that_came_in_between_is_not_overwritten(data, tmp_path):
    """Two start at once; the one has ended when the other gets its lock."""
    line = ["--data", str(data), *FLAGS, "--out", str(tmp_path / "run")]
    late = train.Run(train.parse_args(line)[0], torch.device("cpu"), weights="none")
    run(data, tmp_path / "run", "--epochs", 1)
    with pytest.raises(UserError, match="holds a run already"):
        late.begin(new=True)


def test_a_lock_is_not_inherited(tmp_path):
    """A loader process that outlives a killed parent for seconds must not stop the next run."""
    code = f"import sys, time, os; sys.path.insert(0, {str(SCRIPTS)!r}); import common, pathlib\n"
    code += f"with common.locked(pathlib.Path({str(tmp_path)!r})):\n"
    code += "    child = os.fork()\n    if child: print(child, flush=True)\n    time.sleep(99)"
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        child = int(other.stdout.readline())
        other.kill()
        other.wait()
        try:
            with locked(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_resume_into_another_folder(data, tmp_path, refused):
    one, other, empty = (tmp_path / name for name in ("one", "other", "empty"))
    for out in (one, other):
        run(data, out, "--epochs", 1)
    before = {p: p.read_bytes() for p in other.iterdir()}
    flags = ["--resume", one / "last.pt", "--epochs", 2]
    assert f"{other} holds a run already" in refused("train", *flags, "--out", other)
    assert {p: p.read_bytes() for p in other.iterdir()} == before
    state = load_checkpoint(one / "last.pt")
    state["progress"]["best"] = 2.0  # as if no epoch could be better
    from models import save_checkpoint

    save_checkpoint(one / "last.pt", state)
    train.main([*map(str, flags), "--out", str(empty)])
    assert (empty / "best.pt").read_bytes() == (one / "best.pt").read_bytes()
    assert json.loads((empty / "args.json").read_text())["out"] == str(empty)


def test_a_refused_resume_changes_nothing(data, tmp_path, refused):
    out = tmp_path / "run"
    run(data, out, "--epochs", 1)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}
    flags = ["--resume", out / "last.pt", "--epochs", 2]
    assert "images per step" in refused("train", *flags, "--batch-size", 3)
    assert "--size" in refused("train", *flags, "--size", 64)
    assert "no manifest" in refused("train", *flags, "--data", tmp_path)
    assert "holds no optimizer" in refused("train", "--resume", out / "best.pt", "--epochs", 2)
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()} == before


def test_a_rate_that_jumps_is_said_and_can_be_chosen(data, tmp_path, capsys):
    out = tmp_path / "run"
    run(data, out, "--epochs", 2)
    capsys.readouterr()
    train.main(["--resume", str(out / "last.pt"), "--epochs", "8"])
    assert "the learning rate continues at" in capsys.readouterr().out
    train.main(["--resume", str(out / "last.pt"), "--epochs", "9", "--lr", "1e-5"])
    rates = [line["lr"] for line in load_checkpoint(out / "last.pt")["progress"]["history"]]
    assert rates[-1] < 1e-5 < rates[0]


def test_weights_that_are_not_finite_are_never_saved(data, tmp_path, monkeypatch, refused):
    out, step = tmp_path / "run", train.Run.train_step

    def poisoned(self, batches):
        loss = step(self, batches)
        if self.step == 11:  # the last of the second epoch: its own loss is finite
            with torch.no_grad():
                self.model.classifier.bias.fill_(float("nan"))
        return loss

    monkeypatch.setattr(train.Run, "train_step", poisoned)
    flags = ["--data", data, *FLAGS, "--epochs", 3, "--out", out]
    sentence = refused("train", *flags)
    assert "the weights became infinite or not a number in one of the steps" in sentence
    assert f"{out / 'last.pt'} is from before" in sentence
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(out / name)
        assert all(value.isfinite().all() for value in state["model"].values())
    assert load_checkpoint(out / "last.pt")["progress"]["step"] <= 6


def test_best_holds_no_more_than_evaluation_needs(checkpoint):
    best, last = (load_checkpoint(checkpoint.with_name(name)) for name in ("best.pt", "last.pt"))
    assert set(last) - set(best) == {"optimizer", "scaler"}


def test_the_default_name_tells_runs_apart():
    names = set()
    flags = "lr 0.01,seed 1,width 8,size 64,gamma 1,gamma 3,batch-size 4,weights a/best.pt"
    for flag in ("", *flags.split(","), "freeze-norm"):
        line = f"--model unet --{flag}" if flag else "--model unet"
        names.add(train.default_out(train.build_parser().parse_args(line.split())))
    assert str(Path("runs", "unet")) in names
    assert len(names) == 10


def test_a_restart_goes_on_with_its_own_run_only(data, tmp_path, monkeypatch, refused):
    out = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    run(data, out, "--epochs", 1)
    line = ["--data", str(data), *FLAGS, "--epochs", "2", "--out", str(out)]
    assert train.parse_args(line)[1] is not None
    other = ["--resume", str(out / "last.pt"), "--out", str(tmp_path / "other")]
    run(data, tmp_path / "other", "--epochs", 1)  # what was resumed into another folder
    assert train.parse_args(other)[0].resume == str(tmp_path / "other" / "last.pt")
    for name in ("two", None):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name) if name else monkeypatch.undo()
        assert "holds a run already" in refused("train", *line)
        assert "holds a run already" in refused("train", *other)


def test_a_run_from_weights_is_validated_before_its_first_step(data, tmp_path, monkeypatch):
    import models

    donor = models.DeepLab(len(models.DONOR.meta["categories"])).state_dict()
    monkeypatch.setattr(models, "pretrained_state", lambda _: donor)
    line = ["--data", str(data), *TINY, "--model", "deeplab", "--width", "64", "--epochs", "1"]
    out = tmp_path / "run"
    train.main([*line, "--out", str(out), "--weights", "coco", "--batch-size", "12"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(0, 0), (1, 2)]
    assert lines[0]["train_loss"] is None
    assert lines[0]["val_miou"] is not None


def test_a_log_that_is_no_terminal_hears_of_the_loss(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOG_EVERY", 2)
    monkeypatch.setattr(train, "TELL_EVERY", 0)
    run(data, tmp_path / "run", "--epochs", 2)
    assert "epoch 2/2: step 4/6, loss 0." in capsys.readouterr().out


def test_an_epoch_tells_how_long_it_waited_for_data(data, tmp_path, monkeypatch):
    read = dataset.load_image

    def slow(*arguments):
        time.sleep(0.1)
        return read(*arguments)

    run(data, tmp_path / "fast", "--epochs", 1, "--batch-size", 12)
    monkeypatch.setattr(dataset, "load_image", slow)
    run(data, tmp_path / "slow", "--epochs", 1, "--batch-size", 12)
    shares = []
    for name in ("fast", "slow"):
        line = json.loads((tmp_path / name / "metrics.jsonl").read_text())
        shares.append(line["data_wait"])
    assert 0 < shares[0] < shares[1] < 1
    assert shares[1] > 0.8


def test_no_compiler_is_one_sentence(data, tmp_path):
    flags = ["--data", data, *FLAGS, "--epochs", 1, "--out", tmp_path / "run", "--compile"]
    environment = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")}
    result = command("train.py", *flags, env={**os.environ, **environment})
    assert result.returncode == 2
    assert "--compile finds no working C++ compiler" in result.stderr.splitlines()[-1]


def test_a_stray_world_size_is_no_torchrun(data, tmp_path):
    flags = ["--data", data, *FLAGS, "--epochs", 1, "--out", tmp_path / "run"]
    result = command("train.py", *flags, env={**os.environ, "WORLD_SIZE": "4"})
    assert result.returncode == 0, result.stderr


def test_a_rename_that_fails_for_a_moment_and_a_disk_without_fsync(tmp_path, monkeypatch, capsys):
    failures, replace = [PermissionError("held by a scanner")] * 2, os.replace

    def flaky(*arguments):
        if failures:
            raise failures.pop()
        replace(*arguments)

    def no_fsync(_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(os, "replace", flaky)
    monkeypatch.setattr(os, "fsync", no_fsync)
    write_text(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"
    assert "does not support fsync" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot write .*none/a \(No such .*: give another path"):
        write_text(tmp_path / "none" / "a", "")


def test_images_that_an_epoch_left_out_come_first_in_the_next():
    batches = EpochBatches(np.arange(47), 32, seed=5)
    epochs = []
    for epoch in range(47):
        batches.set_epoch(epoch)
        epochs.append([index for batch in batches for _, _, index, _ in batch])
    left = set(range(47)) - set(epochs[0])
    assert len(left) == 15
    assert set(epochs[1][:15]) == left
    counts = np.bincount(np.concatenate(epochs), minlength=47)
    assert (counts == 32).all()  # of 47 epochs with 32 images each


def test_loader_processes_do_not_pile_up(data, tmp_path, monkeypatch):
    seen, evaluate = [], train.evaluate
    before = set(dataset.multiprocessing.active_children())  # that earlier tests have left

    def counted(*arguments, **named):
        result = evaluate(*arguments, **named)
        seen.append(len(set(dataset.multiprocessing.active_children()) - before))
        return result

    monkeypatch.setattr(train, "evaluate", counted)
    run(data, tmp_path / "run", "--epochs", 3, "--workers", 1)
    assert seen == [1, 1, 1]  # those of training


def test_no_wait_without_an_end(data, monkeypatch):
    manifest = train.common.load_manifest(data)
    monkeypatch.setattr(dataset, "TIMEOUT", 1)
    monkeypatch.setattr(dataset, "load_image", lambda *_: time.sleep(30))
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        list(evaluation_loader(manifest, np.arange(2), 32, 1, 1))


SMALL = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
may_mount = shutil.which("unshare") and not subprocess.run(
    ["unshare", "-m", "sh", "-c", SMALL], capture_output=True, check=False
).returncode  # fmt: skip


@pytest.mark.skipif(not may_mount, reason="only root may make /dev/shm small")
def test_a_full_dev_shm_is_a_sentence(data, checkpoint, tmp_path):
    """As in Docker: here 1 MB of it, and pictures whose batches are larger."""
    lines = [
        ["evaluate.py", "--ckpt", checkpoint, "--size", "512", "--workers", "1"],
        ["train.py", "--data", data, *FLAGS, "--size", "512", "--workers", "1", "--out"],
    ]
    lines[1].append(tmp_path / "run")
    for script, *flags in lines:
        line = [f'{SMALL} && exec "$@"', "sh", sys.executable, SCRIPTS / script, *flags]
        line = ["unshare", "-m", "sh", "-c", *map(str, line)]
        result = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert result.returncode == 2, result.stderr
        assert "--shm-size" in result.stderr.splitlines()[-1]


def test_what_a_loader_process_says_is_heard(data, tmp_path):
    """An error in it is not the death of it."""
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); sys.argv[0] = 'train.py'\n"
    code += "import dataset, train, common\n"
    code += "def broken(*_): raise RuntimeError(TEXT)\n"
    code += "dataset.load_image = broken\ncommon.run_command(lambda: train.main(sys.argv[1:]))"
    flags = ["--data", data, *FLAGS, "--workers", 1, "--out"]
    for text, expected in (
        ("unable to allocate shared memory(shm) for file </torch_1>", "--shm-size"),
        ("something else", "RuntimeError: something else"),
    ):
        line = [sys.executable, "-c", f"TEXT = {text!r}\n{code}", *flags, tmp_path / text[:3]]
        result = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=100)
        assert expected in result.stderr
        assert "a loader process died" not in result.stderr


@needs_groups
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_signal_while_loader_processes_start_is_a_stop(data, tmp_path, method):
    """They take seconds to start where they do not fork; the terminal sends Ctrl-C to them too."""
    script, out = tmp_path / "script.py", tmp_path / "run"
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\nimport multiprocessing, train\n"
    code += "from types import SimpleNamespace\n"
    code += "if __name__ == '__main__':\n"
    code += f"    multiprocessing.set_start_method({method!r})\n"
    code += "    train.dataset.sys = SimpleNamespace(platform='darwin')\n"  # else it forks
    code += "    train.common.run_command(lambda: train.main(sys.argv[1:]))"
    script.write_text(code)
    line = [sys.executable, script, "--data", data, *FLAGS, "--out", out, "--workers", 2]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*map(str, line)], start_new_session=True, **pipes)
    wait_for(out / "args.json", process)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    text, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "SIGINT: saved. Go on with" in text
    assert load_checkpoint(out / "last.pt")["progress"]["step"] == 1


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_scripts_where_processes_do_not_fork(data, coco, tmp_path, method):
    """As on macOS and Windows, and anywhere with Python 3.14."""
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
    code += "import multiprocessing, prepare_masks, train, evaluate, predict\n"
    code += "from types import SimpleNamespace\n"
    code += "if __name__ == '__main__':\n"
    code += f"    multiprocessing.set_start_method({method!r})\n"
    code += "    train.dataset.sys = SimpleNamespace(platform='darwin')\n"  # else it forks
    code += "    context = multiprocessing.get_context\n"
    code += "    multiprocessing.get_context = lambda method=None: context()\n"
    code += "    globals()[sys.argv[1]].main(sys.argv[2:])"
    script = tmp_path / "script.py"
    script.write_text(code)
    out, ckpt = tmp_path / "data", tmp_path / "run" / "last.pt"
    for line in (
        ["prepare_masks", "--coco-root", coco, "--out", out, "--workers", 2],
        ["train", "--data", data, *FLAGS, "--out", ckpt.parent, "--epochs", 1, "--workers", 1],
        ["evaluate", "--ckpt", ckpt, "--workers", 1],
        ["predict", "--ckpt", ckpt, "--images", coco / "val2017", "--out", tmp_path / "p"],
    ):
        line = [sys.executable, script, *line]
        result = subprocess.run([*map(str, line)], capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr


def test_paths_are_expanded_where_the_shell_does_not(checkpoint, tmp_path, monkeypatch):
    parser = train.common.ArgumentParser(description="")
    parser.add_argument("--ckpt", nargs="+")
    parser.add_argument("--out")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a", "b", "x[1]"):
        (tmp_path / name).mkdir()
        shutil.copy(checkpoint, tmp_path / name / "best.pt")
    args = parser.parse_args(["--ckpt", "~/?/best.pt", "--out=~/o"])
    assert args.ckpt == [str(tmp_path / name / "best.pt") for name in "ab"]
    assert args.out == str(tmp_path / "o")
    args = parser.parse_args(["--ckpt", str(tmp_path / "x[1]" / "best.pt"), "none*"])
    assert args.ckpt == [str(tmp_path / "x[1]" / "best.pt"), "none*"]


def test_a_file_that_is_called_like_a_pattern_is_itself(tmp_path):
    for name in ("a[1].jpg", "a1.jpg"):
        (tmp_path / name).touch()
    word = str(tmp_path / "a[1].jpg")
    assert common.ArgumentParser.expanded(word) == [word]


def test_a_regular_expression_is_no_glob(tmp_path, monkeypatch):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    args = train.build_parser().parse_args(["--group", ".*/", "--rare", "?", "--data", "?"])
    assert (args.group, args.rare, args.data) == (".*/", ["?"], str(tmp_path / "x"))


def test_paths_of_a_run_hold_elsewhere_and_when_the_command_is_repeated(
    data, coco, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "start.pt")
    data, coco = os.path.relpath(data), os.path.relpath(coco)
    line = ["--data", data, *FLAGS, "--epochs", "1", "--out", "run", "--weights", "start.pt"]
    line += ["--coco-root", coco]
    train.main(line)
    train.main([*line[:-2], "--coco-root", coco, "--epochs", "2", "--resume"])
    monkeypatch.chdir("/")
    for name in ("best.pt", "last.pt"):
        args = load_checkpoint(tmp_path / "run" / name)["args"]
        assert all(os.path.isabs(args[key]) for key in ("data", "coco_root", "weights"))


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with common.locked(tmp_path):
        pass
    assert f"the disk of {tmp_path} does not support locks" in capsys.readouterr().err


def test_a_width_that_is_not_that_of_the_weights_is_refused(data, checkpoint, tmp_path, refused):
    """Of 64 too, which is the default."""
    line = ["--data", data, "--weights", checkpoint, "--out", tmp_path / "run", "--width", 64]
    assert f"--width 64: {checkpoint} has 4" in refused("train", *line)


def test_validation_that_overflows_or_has_nothing_to_find(data, tmp_path, monkeypatch):
    """An infinite loss is none; without a class in validation no epoch is the best."""
    import evaluate

    infinite = torch.tensor([math.inf, 9])
    monkeypatch.setattr(evaluate.Predictor, "loss", lambda *_: infinite)
    monkeypatch.setattr(train.metrics, "scores", nothing_held(train.metrics.scores))
    run(data, tmp_path / "run", "--epochs", 2)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    assert [line["val_loss"] for line in state["progress"]["history"]] == [None, None]
    assert not (tmp_path / "run" / "best.pt").exists()


def nothing_held(scores):
    """`scores` as if no image held a class."""

    def found(counts, **options):
        return {**scores(counts, **options), "foreground_miou": np.array(np.nan)}

    return found


def test_workers_are_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3}, raising=False)
    assert default_workers() == 1


def test_the_report_comes_before_the_pictures(data, checkpoint, tmp_path, refused):
    content = json.loads((data / "manifest.json").read_text())
    for row in content["images"]:
        row["pixels"].pop("4", None)
    flags = ["--workers", 0, "--device", "cpu", "--panels", 2]
    copy = shutil.copy(checkpoint, tmp_path / "last.pt")
    result = command("evaluate.py", "--ckpt", copy, "--pick", "dog", *flags)
    assert result.returncode == 0, result.stderr
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert "in a folder that you can write to" in refused("evaluate", "--ckpt", copy, *flags)
        tmp_path.chmod(0o700)


def test_evaluation_takes_the_precision_of_the_run(data, tmp_path):
    import evaluate

    out = tmp_path / "run"
    run(data, out, "--epochs", 1, "--amp", "bf16")
    cpu, line = torch.device("cpu"), ["--ckpt", str(out / "last.pt")]
    args = evaluate.build_parser().parse_args(line)
    state = load_checkpoint(out / "last.pt")
    assert evaluate.load_predictor(state, cpu, args).dtype == torch.bfloat16
    for stored, dtype in (("bf16", torch.bfloat16), ("off", None)):  # whatever "auto" is here
        state["args"]["amp"], state["precision"] = "auto", stored
        assert evaluate.load_predictor(state, cpu, args).dtype == dtype
    args.amp = "off"
    predictor = evaluate.load_predictor(state, cpu, args, 48)
    assert (predictor.dtype, predictor.size) == (None, 48)


def test_a_folder_is_no_checkpoint(tmp_path, refused):
    assert f"{tmp_path} is a folder: give best.pt" in refused("evaluate", "--ckpt", tmp_path)


MUTATED = [  # each once ended in a traceback, a crash of the interpreter or 10^9 processes
    (["version"], torch.zeros(3)),
    (["fingerprint"], None),
    (["scaler"], None),
    (["wandb_id"], None),
    (["images_per_step"], [4]),
    (["val_ids"], [["a", []]]),
    (["args", "size"], 30_000),
    (["args", "workers"], 10**9),
    (["args", "seed"], 10**30),
    (["args", "lr"], None),
    (["args", "data"], 3),
    (["args", "group"], 3.5),
    (["args", "fresh"], [3.5]),
    (["args", 3], 3),
    (["args", "out"], torch.zeros(3)),
    (["origin"], {1: "x"}),
    (["colors"], [[0, 0], [0, 0, 0, 0], [0] * 3, [0] * 3, [0] * 3]),
    (["precision"], "int4"),
    (["progress", "history", 0, "seconds"], "abc"),
    (["progress", "step"], 10**9),
    (["progress", "epoch"], -1),
    (["progress", "history"], [torch.zeros(1)]),
    (["optimizer", "state", 2, "exp_avg"], torch.zeros(3)),
    (["optimizer", "state", 2, "exp_avg_sq"], None),
    (["optimizer", "state", 2, "step"], torch.zeros(3)),
    (["optimizer", "state", 99], {"exp_avg": torch.zeros(3)}),
]


@pytest.mark.parametrize(("place", "value"), MUTATED, ids=lambda x: str(x)[:40])
def test_a_mutated_checkpoint_is_refused_by_resume(checkpoint, tmp_path, place, value, refused):
    state = load_checkpoint(checkpoint)
    inner = state
    for key in place[:-1]:
        inner = inner[key]
    if value is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    torch.save(state, tmp_path / "last.pt")
    sentence = refused("train", "--resume", tmp_path / "last.pt", "--epochs", 9)
    assert str(tmp_path) in sentence or str(value) in sentence
    assert os.listdir(tmp_path) == ["last.pt"]


# --- a start of one's own ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_data(coco, tmp_path_factory):
    """The masks of `coco` for other classes in another order; the run of `checkpoint` knows all but
    the chair."""
    out = tmp_path_factory.mktemp("other") / "data"
    line = ["--coco-root", coco, "--split", "train2017", "val2017", "--out", out, "--workers", 1]
    prepare_masks.main([*map(str, line), "--classes", "bus", "chair", "person"])
    return out


def test_a_run_starts_from_another_by_class_names(checkpoint, other_data, tmp_path, capsys):
    out, donor = tmp_path / "run", load_checkpoint(checkpoint)["model"]
    line = [
        "--data",
        str(other_data),
        *TINY[:2],
        *TINY[4:],
        "--weights",
        os.path.relpath(checkpoint),
    ]
    line += ["--out", str(out), "--epochs", "1", "--lr", "1e-12"]
    train.main(line)  # the network and its width are those of the checkpoint
    state = load_checkpoint(out / "last.pt")
    assert state["args"]["model"] == "unet"
    assert state["args"]["fresh"] == ["chair"]
    assert "except chair, which start fresh" in capsys.readouterr().out
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert [x["epoch"] for x in lines] == [0, 1]  # what the weights do at first, before a step
    found = state["model"]
    for name in donor:
        if not name.startswith("classifier") and "running" not in name and "tracked" not in name:
            torch.testing.assert_close(found[name], donor[name], msg=name)
    for ours, theirs in {0: 0, 1: 3, 3: 1}.items():  # background, bus, person
        for name in ("classifier.weight", "classifier.bias"):
            torch.testing.assert_close(found[name][ours], donor[name][theirs])
    rates = [group["factor"] for group in state["optimizer"]["param_groups"]]
    assert sorted(set(rates)) == [1, 10]
    moved = checkpoint.rename(tmp_path / "moved.pt")  # it is not needed any more
    train.main(["--resume", str(out), "--epochs", "2"])
    moved.rename(checkpoint)
    again = load_checkpoint(out / "last.pt")
    assert again["args"]["fresh"] == ["chair"]
    assert [g["factor"] for g in again["optimizer"]["param_groups"]] == rates


def test_the_start_decides_the_network(checkpoint, data, tmp_path, refused):
    line = ["--data", data, "--out", tmp_path / "run", "--weights", checkpoint]
    assert f"--model deeplab: {checkpoint} has unet" in refused(
        "train", *line, "--model", "deeplab"
    )
    assert f"--width 8: {checkpoint} has 4" in refused("train", *line, "--width", 8)
    assert "no checkpoint at cocoo" in refused("train", *line[:4], "--weights", "cocoo")
    frozen = refused("train", *line, "--freeze-backbone")
    assert "--freeze-backbone: only for --model deeplab" in frozen
    assert not (tmp_path / "run").exists()


def test_a_frozen_backbone_stays_as_it_was(data, tmp_path):
    """Its batch norm too; the heads learn, and the run goes on after it ended."""
    first, out = tmp_path / "first", tmp_path / "run"
    line = ["--data", str(data), *TINY[:2], *TINY[4:], "--batch-size", "12", "--epochs", "1"]
    train.main([*line, "--model", "deeplab", "--weights", "none", "--out", str(first)])
    start = ["--weights", str(first / "last.pt"), "--freeze-backbone", "--out", str(out)]
    train.main([*line, *start])
    before, after = (load_checkpoint(x / "last.pt") for x in (first, out))
    for name, value in before["model"].items():
        if name.startswith("backbone."):
            assert torch.equal(value, after["model"][name]), name
    assert not torch.equal(
        before["model"]["classifier.4.weight"], after["model"]["classifier.4.weight"]
    )
    assert len(after["optimizer"]["state"]) < len(before["optimizer"]["state"]) / 2
    train.main(["--resume", str(out), "--epochs", "2"])
    last = load_checkpoint(out / "last.pt")["model"]
    assert torch.equal(last["backbone.conv1.weight"], before["model"]["backbone.conv1.weight"])
