"""torchrun with two processes on a CPU: the run of one process, also when one of them is killed."""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY

import distributed
from dataset import EpochBatches
from distributed import _common_name
from models import load_checkpoint

# Batch norm is frozen: on a CPU torch cannot compute it over several processes.
DRIVER = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import numpy as np
import torch, train
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
step = train.Run.train_step
def deadly(run, batches):
    first_life = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if {kill} and first_life and os.environ["RANK"] == "1" and run.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(run, batches)
train.Run.train_step = deadly
gather = train.gather
def noted(*arguments):
    counts = gather(*arguments)
    if os.environ.get("RANK", "0") == "0":
        np.save(os.path.join(os.path.dirname(__file__), "counts.npy"), counts.numpy())
    return counts
train.gather = noted
train.main(sys.argv[1:])
"""


def launch(folder, data, ranks, batch_size, kill, *flags):
    """Train with so many ranks; with `kill` the second of them dies once in the second epoch."""
    folder.mkdir()
    (folder / "driver.py").write_text(DRIVER.format(scripts=str(SCRIPTS), kill=kill))
    line = [folder / "driver.py", "--data", data, *TINY, "--batch-size", batch_size, "--model"]
    line += ["unet", "--oversample", 3, "--rare", "bus", "dog", "--out", folder / "run", *flags]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", 1]
        line = [*torchrun, "--nproc-per-node", ranks, *line]
    result = subprocess.run(
        [sys.executable, *map(str, line)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def lines_of(folder):
    return [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tried on Linux only")
def test_two_ranks_one_of_which_dies_give_the_run_of_one_process(data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = ["--epochs", 2, "--weighted", "--accumulate", 2, "--save-every", 0]
    flags += ["--dice", "--balance", 0.4]
    launch(one, data, 1, 8, False, *flags)
    result = launch(two, data, 2, 4, True, *flags)
    assert result.stdout.count("images per step") == 2  # rank 0 alone speaks, in both of its lives
    a, b = (load_checkpoint(folder / "run" / "last.pt") for folder in (one, two))
    assert a["progress"]["step"] == b["progress"]["step"] >= 4
    for name, value in a["model"].items():
        torch.testing.assert_close(b["model"][name], value, rtol=1e-3, atol=1e-5)
    assert [line["epoch"] for line in lines_of(two)] == [1, 2]
    for line, other in zip(lines_of(one), lines_of(two)):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tried on Linux only")
def test_two_ranks_count_each_validation_image_once(data, tmp_path):
    """The rate is nothing, so the weights stay the same; two ranks share nine images."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, ranks, batch_size in ((one, 1, 8), (two, 2, 4)):
        launch(folder, data, ranks, batch_size, False, "--epochs", 1, "--lr", 1e-30)
    counts = [np.load(folder / "counts.npy") for folder in (one, two)]
    assert counts[0].shape == (9, 3, 5)
    np.testing.assert_array_equal(counts[0], counts[1])
    (line,), (other,) = lines_of(one), lines_of(two)
    for key in ("val_iou", "val_miou", "val_foreground_miou", "step"):
        assert other[key] == line[key]
    for key in ("train_loss", "val_loss"):
        assert other[key] == pytest.approx(line[key], rel=1e-5)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for orphans in /proc")
def test_ranks_end_when_their_launcher_is_killed(data, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER.format(scripts=str(SCRIPTS), kill=False))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    line += [tmp_path / "driver.py", "--data", data, *TINY, "--model", "unet", "--epochs", 9999]
    line = [sys.executable, *line, "--out", tmp_path / "run"]
    launcher = subprocess.Popen(
        [*map(str, line)], start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    started = time.monotonic()
    while not (tmp_path / "run" / "last.pt").exists():
        assert launcher.poll() is None
        assert time.monotonic() - started < 120
        time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    killed = time.monotonic()
    # The ranks have sessions of their own: they are found by what they run.
    while any(str(tmp_path).encode() in read(p) for p in Path("/proc").glob("[0-9]*/cmdline")):
        assert time.monotonic() - killed < 30
        time.sleep(0.2)


def read(path):
    """What a file holds, nothing if it has gone."""
    with suppress(OSError):
        return path.read_bytes()
    return b""


def test_a_rank_that_waits_alone_gives_up(data, tmp_path):
    """As after a restart whose ranks do not find each other."""
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\nimport distributed, torch\n"
    code += "distributed.RENDEZVOUS = 2\nwith distributed.process_group(): pass"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True,
        timeout=100,
    )  # fmt: skip
    assert result.returncode == 1
    assert b"not all processes have met within 2 s" in result.stderr
    assert time.monotonic() - started < 60


def test_ranks_find_the_name_of_their_own_start():
    """In a store in which those of an earlier start have left what they asked, and an answer."""
    store = torch.distributed.HashStore()
    for number in (1, 2):
        store.set(f"ask/{number}", f"old{number}")
    store.set("answer/old1", "old name")
    names = []
    for start in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = pool.map(lambda number: _common_name(store, number, 3), (2, 0, 1))
        names += set(found)
        assert len(names) == start + 1
    assert names[0] != names[1]
    assert "old name" not in names


def test_every_buffer_is_that_of_rank_0(monkeypatch):
    """Else each rank would validate with statistics of its own."""
    sent, norm = [], torch.nn.BatchNorm2d(3)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed.dist, "broadcast", lambda *told: sent.append(told))
    distributed.share_buffers(norm)
    assert [(id(buffer), 0) for buffer in norm.buffers()] == [(id(b), r) for b, r in sent]


def test_help_under_torchrun_is_shown_once_and_no_failure():
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [sys.executable, *line, str(SCRIPTS / "train.py"), "--help"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("usage:") == 1


FAILING = """
import os, signal, sys
sys.path.insert(0, {scripts!r})
import common, train
def step(*_):
    number = os.environ["RANK"]
    if {how!r} == "killed" and number == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if {how!r} == "refused" and number == "0":
        raise common.UserError("cannot write what rank 0 alone writes")
    return train_step(*_)
train_step, train.Run.train_step = train.Run.train_step, step
common.run_command(lambda: train.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("misspelt", "--model: invalid choice: 'unett'"),
        ("refused", "cannot write what rank 0 alone writes"),
        ("killed", "another of torchrun's processes has died"),
    ],
)
def test_an_error_of_several_ranks_is_one_sentence(data, tmp_path, how, sentence):
    (tmp_path / "driver.py").write_text(FAILING.format(scripts=str(SCRIPTS), how=how))
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    line += [tmp_path / "driver.py", "--data", data, *TINY, "--out", tmp_path / "run"]
    line += ["--model", "unett" if how == "misspelt" else "unet"]
    result = subprocess.run(
        [sys.executable, *map(str, line)], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 1  # torchrun's
    assert [sentence in x for x in result.stderr.splitlines() if "error: " in x] == [True]
    assert result.stderr.count("Traceback (most recent call last)") == 1, result.stderr  # its own
    assert "gloo" not in result.stderr


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(2, 3, 2), (4, 1, 3), (12, 1, 1)])
def test_a_step_holds_the_same_images_however_they_are_dealt_out(batch_size, accumulate, world):
    rows = np.arange(100, 130)
    whole = EpochBatches(rows, 12, seed=3)
    parts = [EpochBatches(rows, batch_size, 3, accumulate, r, world) for r in range(world)]
    for epoch in (0, 1):
        for batches in (whole, *parts):
            batches.set_epoch(epoch)
        steps = [sorted(batch) for batch in whole]
        dealt = [list(part) for part in parts]
        assert len(steps) == 2
        for step, expected in enumerate(steps):
            mine = [d[step * accumulate : (step + 1) * accumulate] for d in dealt]
            keys = [key for batches in mine for batch in batches for key in batch]
            assert sorted(keys) == expected


def test_another_number_of_images_a_step_is_refused_on_resume(data, tmp_path, refused):
    import train

    out = tmp_path / "run"
    flags = ["--data", str(data), *TINY, "--model", "unet", "--epochs", "1", "--out", str(out)]
    train.main(flags)
    resume = ["--resume", out / "last.pt", "--epochs", 2]
    sentence = refused("train", *resume, "--batch-size", 3)
    assert "4 images per step, not 3" in sentence
    train.main([*map(str, resume), "--batch-size", "2", "--accumulate", "2"])
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2


LONELY = """
import os, sys, time
sys.path.insert(0, {scripts!r})
import torch, train
torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
step, restarts = train.Run.train_step, os.environ["TORCHELASTIC_RESTART_COUNT"]
def deadly(run, batches):
    if run.step == 3 and not os.path.exists({died!r}):
        if os.environ["GROUP_RANK"] == "1":
            while not os.path.exists({waits!r}):
                time.sleep(0.1)
            open({died!r}, "w").close()
            os._exit(1)
        open({waits!r}, "w").close()
        time.sleep(300)  # as a rank that waits in nccl, until its launcher ends it
    return step(run, batches)
train.Run.train_step = deadly
print("restarts", restarts, file=sys.stderr, flush=True)
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="gloo between processes is tried on Linux only")
def test_two_machines_of_which_one_loses_a_process_go_on(data, tmp_path):
    """Each counts its own restarts, and only that of the dead process counts one."""
    died = tmp_path / "died"
    names = {"scripts": str(SCRIPTS), "died": str(died), "waits": str(tmp_path / "waits")}
    (tmp_path / "driver.py").write_text(LONELY.format(**names))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1]
    line += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "a"]
    line += ["--max-restarts", 3, tmp_path / "driver.py", "--data", data, *TINY, "--batch-size", 4]
    line += ["--model", "unet", "--epochs", 2, "--save-every", 0, "--out", tmp_path / "run"]
    options = {"text": True, "stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    options["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [subprocess.Popen(list(map(str, line)), **options) for _ in range(2)]
    try:
        errors = [machine.communicate(timeout=200)[1] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], "\n".join(errors)[-3000:]
    assert died.exists()
    assert sorted(error.count("restarts 1") for error in errors) == [0, 1]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
