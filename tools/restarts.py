"""Kill one of two ranks again and again, and count the restarts that go on with the run.

    python tools/restarts.py --data data --kills 50

Each kill is in the second step of a life; every step is saved.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import distributed
import train

FLAGS = "--model unet --width 4 --size 32 --batch-size 4 --workers 0 --device cpu --save-every 0"


def train_and_die(kills: int, argv: list[str]) -> None:
    """As a rank: note each life's first step. Rank 1 dies in its second; in the end, both end."""
    step, notes = train.Run.train_step, Path(argv[argv.index("--out") + 1], "lives")
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]

    def deadly(run, batches):
        """A step; the second of each life kills rank 1, until there were enough."""
        loss = step(run, batches)
        lives = notes.read_text().splitlines() if notes.exists() else []
        if not lives or lives[-1].split()[0] != life:
            if distributed.rank() == 0:
                with open(notes, "a") as file:
                    file.write(f"{life} {run.step} {time.time()}\n")
        elif len(lives) > kills:
            time.sleep(3 * (distributed.rank() == 0))  # the other may still wait for this one
            os._exit(0)
        elif distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    train.Run.train_step = deadly
    train.main(argv)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="data", help="what prepare_masks.py wrote")
    parser.add_argument("--kills", type=int, default=50, help="how many")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Start the ranks, and report on the lives that they have noted."""
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as out:
        flags = [*FLAGS.split(), "--wandb", "disabled", "--epochs", "99999", "--data", args.data]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", "2", "--max-restarts", str(2 * args.kills)]
        line = [*torchrun, __file__, "as-a-rank", str(args.kills), *flags, "--out", out]
        code = subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE).returncode
        lives = [row.split() for row in Path(out, "lives").read_text().splitlines()]
    numbers, steps, times = zip(*lives)
    waits = [float(b) - float(a) for a, b in pairwise(times)]
    went_on = sum(int(b) >= int(a) for a, b in pairwise(steps))
    given_up = int(numbers[-1]) - len(waits)
    print(f"{went_on} restarts of {args.kills} went on with the run; torchrun ended with {code}")
    print(f"rendezvous given up: {given_up}; longest time between two lives: {max(waits):.1f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["as-a-rank"]:
        train_and_die(int(sys.argv[2]), sys.argv[3:])
    else:
        common.run_command(main)
