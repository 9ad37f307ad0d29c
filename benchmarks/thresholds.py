"""Exit thresholds: coordinate descent beside TPE, and beside what each replaces, in one run on cached similarities.

    python benchmarks/thresholds.py [--threads 1] [--seeds 3] [--trials 200] [--out results/benchmark_thresholds.json]

The similarities are those of the teaching network of nbs/memristor/04_thresholds (digits seen through growing numbers of principal components, random
ReLU features, a memory programmed with 15 % noise), searched by 400 digits.

1. Nine exits, tolerance 0 and 2 %: time and objective of coordinate descent from one start, with 8 and with 64 restarts; of TPE alone (first trial
   "never exit") and of TPE that starts from coordinate descent; of one threshold for all exits.
2. One round of coordinate descent: gains of a whole grid in one matrix product against deciding anew for each candidate.
3. Three of five exits, where all combinations of the grid can be tried: how often each search reaches the optimum, and how much is missing.
"""
import argparse
import json
import math
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from sklearn.datasets import load_digits

from _timing import timed
from hkust_demos.memristor.cam import SemanticMemory
from hkust_demos.memristor.device import DeviceModel
from hkust_demos.memristor.thresholds import _coordinate, _global, _grid, _pose, _tpe

TRAIN, SEARCH = slice(0, 1000), slice(1000, 1400)
BLOCK, MATCH, HEAD, GRID = 10_000, 960, 960, 25


def cached_answers(depths: tuple[int, ...], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Similarities, logits and labels of the search set; one seed draws the features and the chip."
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(123))
    digits = torch.tensor(load_digits().data / 16, dtype=torch.float32)[order]
    labels = torch.tensor(load_digits().target)[order]
    middle, generator = digits[TRAIN].mean(0), torch.Generator().manual_seed(seed)
    axes, features = torch.linalg.svd(digits[TRAIN] - middle, full_matrices=False).Vh, []
    for depth in depths:
        mixing = torch.randn(depth, 96, generator=generator) / depth**0.5
        features.append(torch.relu((digits - middle) @ axes[:depth].T @ mixing + torch.randn(96, generator=generator).exp()))
    chip = SemanticMemory.fit([feature[TRAIN] for feature in features], labels[TRAIN], 10).program(DeviceModel(), seed=seed)
    inputs, targets = torch.cat([features[-1], torch.ones(1797, 1)], 1), torch.nn.functional.one_hot(labels, 10).float()
    logits = inputs @ torch.linalg.solve(inputs[TRAIN].T @ inputs[TRAIN] + torch.eye(97), inputs[TRAIN].T @ targets[TRAIN])
    return chip.similarity([feature[SEARCH] for feature in features]), logits[SEARCH], labels[SEARCH]


def posed(answers, exits, n_blocks: int, tolerance: float):
    "The search problem of a network with some of its exits, and the accuracy that must be kept."
    sims, logits, labels = answers
    cost = [BLOCK * (index + 1) + MATCH * (place + 1) for place, index in enumerate(exits)]
    cost = torch.tensor([*cost, BLOCK * n_blocks + MATCH * len(exits) + HEAD], dtype=torch.float64)
    problem, static = _pose(sims[:, list(exits)], logits, labels, cost, float(BLOCK * n_blocks + HEAD), "max")
    return problem, torch.tensor([static - tolerance], dtype=torch.float64)


def plain_coordinate(problem, target: torch.Tensor, rounds: int) -> float:
    "Coordinate descent from one start as usually written: every candidate decides for all samples anew."
    points = _grid(problem.scores, GRID)
    cuts = torch.full((len(points),), math.inf, dtype=points.dtype)
    value = lambda thresholds: problem.objective(*problem.sums(thresholds[None]), target).item()
    for _ in range(rounds):
        for index in range(len(cuts)):
            trials = []
            for point in points[index].flip(0):  # the highest of equals wins, as in the library
                cuts[index] = point
                trials.append((value(cuts), point))
            cuts[index] = max(trials, key=lambda trial: trial[0])[1]
    return value(cuts)


def searches(problem, target: torch.Tensor, trials: int, seed: int) -> dict:
    "Name -> a search that returns its objective."
    never = torch.full((problem.scores.shape[1],), math.inf, dtype=problem.scores.dtype)
    coordinate = lambda restarts: lambda: _coordinate(problem, target, GRID, 2, restarts, seed)

    def both():
        (start,), _ = coordinate(8)()
        return _tpe(problem, target.item(), start, trials, seed)[1][-1]

    return {"one start": lambda: coordinate(0)()[1][-1], "8 restarts": lambda: coordinate(8)()[1][-1],
            "64 restarts": lambda: coordinate(64)()[1][-1], "TPE alone": lambda: _tpe(problem, target.item(), never, trials, seed)[1][-1],
            "8 restarts, then TPE": both, "one shared threshold": lambda: _global(problem, target.item(), GRID)[1][-1]}


def compare_nine(seeds: int, trials: int) -> dict:
    "Time and objective on nine exits, one entry a tolerance."
    found = {}
    for tolerance in (0.0, 0.02):
        rows = {}
        for seed in range(seeds):
            problem, target = posed(cached_answers((2, 3, 4, 6, 8, 12, 16, 24, 32), seed), range(9), 9, tolerance)
            for name, action in searches(problem, target, trials, seed).items():
                seconds, value = timed(action, 1 if "TPE" in name else 9)
                rows.setdefault(name, []).append((seconds, value))
        found[f"tolerance {tolerance:g}"] = {name: {"seconds": mean(s for s, _ in row), "objective": mean(v for _, v in row)}
                                             for name, row in rows.items()}
    return found


def compare_rounds(seed: int = 0) -> dict:
    "Two rounds over nine exits from one start: matrix products against deciding anew."
    problem, target = posed(cached_answers((2, 3, 4, 6, 8, 12, 16, 24, 32), seed), range(9), 9, 0.0)
    product_s, product = timed(lambda: _coordinate(problem, target, GRID, 2, 0, 0)[1][-1])
    anew_s, anew = timed(lambda: plain_coordinate(problem, target, 2))
    return {"product_s": product_s, "anew_s": anew_s, "ratio": anew_s / product_s, "difference": abs(product - anew)}


def compare_exhaustive(seeds: int, trials: int) -> dict:
    "How far from the optimum on the grid, over all triples of five exits."
    gaps = {}
    for seed in range(seeds):
        answers = cached_answers((2, 4, 8, 16, 32), seed)
        for tolerance in (0.0, 0.02):
            for exits in combinations(range(5), 3):
                problem, target = posed(answers, exits, 5, tolerance)
                every = torch.cartesian_prod(*_grid(problem.scores, GRID))
                optimum = max(problem.objective(*problem.sums(part), target).max().item() for part in every.split(4000))
                for name, action in searches(problem, target, trials, seed).items():
                    gaps.setdefault(name, []).append(optimum - action())
    return {name: {"cases": len(gap), "reached": sum(g < 1e-6 for g in gap), "missing_mean": mean(gap), "missing_worst": max(gap)}
            for name, gap in gaps.items()}


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_thresholds.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    found = {"threads": args.threads, "seeds": args.seeds, "trials": args.trials, "nine_exits": compare_nine(args.seeds, args.trials)}
    for tolerance, rows in found["nine_exits"].items():
        slow = rows["TPE alone"]["seconds"]
        print(f"nine exits, {tolerance}:", *(f"  {name:22} {row['seconds'] * 1000:8.1f} ms  {slow / row['seconds']:6.1f}x faster than TPE alone  "
                                             f"J {row['objective']:.4f}" for name, row in rows.items()), sep="\n")
    found["rounds"] = compare_rounds()
    print("two rounds over nine exits: {anew_s:.3f} s deciding anew, {product_s:.4f} s by products: {ratio:.0f}x, difference of J {difference:.0e}"
          .format(**found["rounds"]))
    found["three_exits"] = compare_exhaustive(args.seeds, args.trials)
    print("three exits, optimum known:", *(f"  {name:22} reached {row['reached']:3} of {row['cases']}, missing {row['missing_mean']:.4f} on average, "
                                           f"{row['missing_worst']:.4f} at worst" for name, row in found["three_exits"].items()), sep="\n")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
