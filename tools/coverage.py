"""How often a 95% interval holds the truth: samples of images from a population that is known.

    python tools/coverage.py --trials 1000

A class that m of 200 images hold, in areas and with hits that vary widely from image to image; the
foreground mean of four such classes; and the difference of two models' means.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.random import Generator
from tqdm import trange

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
from metrics import FEWEST, class_interval, jackknife, leave_one_out, scores

IMAGES = 200
POPULATION = 4000  # samples in one


def draw(rng: Generator, images: int, holding: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Counts (images, 3, C) of two models on the same images, of which so many hold each class."""
    both = np.zeros((2, images, 3, 1 + len(holding)), dtype=np.int64)
    both[..., 0] = 200_000  # of the background, which is always right here
    for label, held in enumerate(holding, start=1):
        where = rng.permutation(images)[:held]
        area = np.exp(rng.normal(9, 1.3, held))
        hard = rng.beta(2, 1.2, held)  # for both models alike
        for counts in both:
            hits = area * np.clip(hard + rng.normal(0, 0.1, held), 0, 1)
            wrong = area * np.exp(rng.normal(-1.5, 1, held))
            counts[where, :, label] = np.stack([hits, area, hits + wrong], axis=1)
            stray = rng.random(images) < 0.05
            counts[stray, 2, label] += np.exp(rng.normal(6, 1.5, stray.sum())).astype(int)
    return both[0], both[1]


def simulate(holding: list[int], trials: int) -> dict[str, float]:
    """The share of `trials` samples whose intervals hold the value of the population; of a class
    that fewer than `FEWEST` images hold there is none."""
    rng = np.random.default_rng(0)
    population = draw(rng, IMAGES * POPULATION, [held * POPULATION for held in holding])
    truth = [scores(counts.sum(axis=0)) for counts in population]
    mean = truth[0]["foreground_miou"]
    difference = truth[1]["foreground_miou"] - mean
    judged = [(label, held) for label, held in enumerate(holding, start=1) if held >= FEWEST]
    covered = {f"class in {held} images": 0 for _, held in judged}
    covered |= {"foreground mean": 0, "difference of two": 0}
    for _ in trange(trials, disable=None):
        samples = draw(rng, IMAGES, holding)
        others = [leave_one_out(counts) for counts in samples]
        values = [float(scores(counts.sum(axis=0))["foreground_miou"]) for counts in samples]
        for label, held in judged:
            low, high = class_interval(samples[0][..., label], others[0]["iou"][:, label])
            covered[f"class in {held} images"] += low <= truth[0]["iou"][label] <= high
        left_out = [each["foreground_miou"] for each in others]
        (low, high), _ = jackknife(values[0], left_out[0])
        covered["foreground mean"] += low <= mean <= high
        (low, high), _ = jackknife(values[1] - values[0], left_out[1] - left_out[0])
        covered["difference of two"] += low <= difference <= high
    return {name: count / trials for name, count in covered.items()}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="samples")
    parser.add_argument("--holding", type=int, nargs="+", default=[4, 8, 15, 30], help="m of each")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Simulate, and print the shares."""
    args = build_parser().parse_args(argv)
    if args.trials < 1 or not 1 <= min(args.holding) <= max(args.holding) <= IMAGES:
        raise common.UserError(f"--trials and --holding start at 1, --holding ends at {IMAGES}")
    for name, share in simulate(args.holding, args.trials).items():
        print(f"{name:<24}{share:>7.1%}")


if __name__ == "__main__":
    common.run_command(main)
