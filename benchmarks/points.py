"""Sampling and grouping of point clouds, each beside what it replaces, in one run.

    python benchmarks/points.py [--threads 1] [--out results/benchmark_points.json]

1. Farthest points, 256 -> 64, of a batch of clouds: the library against the plain way (all points as rows of three, gaps updated under a mask).
2. Ball query, 64 centers among 256 points: the nearest eight by selection against sorting all indices, as the published code does.
3. All six levels of PointNet2Lite: one run of picks and four selections, shared, against sampling and querying anew at every level.
4. A training step's forward and backward with the indices at hand against indices anew in each step.

Picks of both ways must be the same, and the members of every ball that is not full.
"""
import argparse
import json
from pathlib import Path

import torch

from _timing import timed
from hkust_demos.memristor.pointnet import LEVELS, PointNet2Lite, ball_query, farthest_point_sample, neighborhoods, unpack_neighborhoods
from hkust_demos.memristor.ternary import build_seeded


def rows_of(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    "Rows of each cloud."
    return values[torch.arange(len(values))[:, None], index]


def plain_sample(xyz: torch.Tensor, m: int) -> torch.Tensor:
    "Farthest points as usually written, started like the library's."
    picks, gap = torch.zeros(len(xyz), m, dtype=torch.long), torch.full(xyz.shape[:2], 1e10)
    pick, clouds = (xyz - xyz.mean(1, keepdim=True)).square().sum(-1).argmax(1), torch.arange(len(xyz))
    for step in range(m):
        picks[:, step] = pick
        distance = ((xyz - xyz[clouds, pick][:, None]) ** 2).sum(-1)
        nearer = distance < gap
        gap[nearer] = distance[nearer]
        pick = gap.max(-1)[1]
    return picks


def plain_query(radius: float, k: int, xyz: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    "The first k indices within the ball from a full sort; distances by the expanded formula."
    squared = (centroids**2).sum(-1)[:, :, None] - 2 * centroids @ xyz.transpose(1, 2) + (xyz**2).sum(-1)[:, None]
    index = torch.arange(xyz.shape[1]).repeat(*centroids.shape[:2], 1)
    index[squared > radius**2] = xyz.shape[1]
    index = index.sort(-1)[0][..., :k]
    return torch.where(index == xyz.shape[1], index[..., :1], index)


def plain_levels(points: torch.Tensor) -> list[torch.Tensor]:
    "Groups of all levels, each level sampled and queried anew."
    groups, source = [], points
    for level in LEVELS:
        centers = rows_of(source, plain_sample(source, level.n_points))
        groups.append(plain_query(level.radius, level.n_neighbors, source, centers))
        source = centers
    return groups


def step(network, points: torch.Tensor, packed: torch.Tensor | None) -> None:
    "Forward and backward."
    network(points, packed)[0].square().mean().backward()


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_points.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    n_clouds, found = 100, {}
    points = torch.randn(n_clouds, 256, 3, generator=torch.Generator().manual_seed(0))
    points = points / points.norm(dim=-1).amax(1)[:, None, None]

    def report(name: str, plain_s: float, ours_s: float) -> None:
        "Milliseconds per cloud and their ratio."
        plain_ms, ours_ms = (1000 * seconds / n_clouds for seconds in (plain_s, ours_s))
        found[name] = {"clouds": n_clouds, "threads": args.threads, "plain_ms_per_cloud": plain_ms, "ms_per_cloud": ours_ms, "ratio": plain_s / ours_s}
        print(f"{name}: {plain_ms:.3f} ms a cloud plain, {ours_ms:.3f} ms here: {plain_s / ours_s:.1f}x")

    plain_s, plain = timed(lambda: plain_sample(points, 64))
    ours_s, picks = timed(lambda: farthest_point_sample(points, 64))
    assert torch.equal(plain, picks)
    report("farthest points, 256 to 64", plain_s, ours_s)

    centers = rows_of(points, picks)
    plain_s, plain = timed(lambda: plain_query(0.3, 8, points, centers))
    ours_s, groups = timed(lambda: ball_query(0.3, 8, points, centers))
    short = (groups[..., 0] == groups[..., -1]) & (plain[..., 0] == plain[..., -1])  # fewer than eight in the ball
    assert short.any() and all(set(a) == set(b) for a, b in zip(groups[short].tolist(), plain[short].tolist()))
    report("ball query, 64 centers of 256", plain_s, ours_s)

    plain_s, _ = timed(lambda: plain_levels(points), 5)
    ours_s, packed = timed(lambda: neighborhoods(points))
    assert torch.equal(unpack_neighborhoods(packed)[0], picks)
    report("six levels", plain_s, ours_s)

    network = build_seeded(PointNet2Lite, seed=0).train()
    anew_s, _ = timed(lambda: step(network, points, None), 5)
    known_s, _ = timed(lambda: step(network, points, packed), 5)
    report("training step, indices anew or at hand", anew_s, known_s)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
