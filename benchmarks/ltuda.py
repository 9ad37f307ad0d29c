"""LTUDA's costs, each beside what it replaces, in one run.

    python benchmarks/ltuda.py [--out results/benchmark_ltuda.json] [--rounds 9]

1. The prototype update of one mixed view (8 slices, 64 x 64 pixels, 5 classes of 5 prototypes, 64 numbers a pixel): all classes at once,
   as the library does it, against the straightforward loop over classes and prototypes that the page shows.
2. A whole training step with prototypes (three views of 8 slices, 32 x 32 pixels): with the library's update and with the loop in its place.
3. Sliding-window inference of the small network over a generated volume of 24 x 128 x 128 voxels: voxels a second for two overlaps.

The sides of a comparison take turns, round after round, and each is judged by its fastest round, so that other work on the machine
disturbs both alike and least. `ratio_rounds` holds the slowest and the median ratio of single rounds.
"""
import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from hkust_demos.data.abdomen import abdomen_phantom, abdomen_volume
from hkust_demos.vision import ltuda
from hkust_demos.vision.ltuda import RECIPES, PrototypeBank, make_views, slow_prototype_step, small_segmenter, view_losses, window_hu
from hkust_demos.vision.ltuda_evaluate import slide

from _timing import race


def loop_update(bank: PrototypeBank, e: torch.Tensor, target: torch.Tensor, assign: str = "argmax", predicted=None, **_) -> torch.Tensor:
    "The bank's update by the loop of the page; pixels that are not yet right move nothing."
    right = target if predicted is None else target.where(predicted == target, torch.tensor(-1))
    bank.prototypes = slow_prototype_step(bank.prototypes, e, right, bank.momentum)[0]
    return slow_prototype_step(bank.prototypes, e, target, 1.0)[1] if predicted is not None else slow_prototype_step(bank.prototypes, e, target, bank.momentum)[1]


def training_step(student, optimizer, views, recipe) -> None:
    "Losses, gradients, one step of Adam."
    terms = view_losses(student, views, recipe, True, torch.Generator().manual_seed(0))
    optimizer.zero_grad(set_to_none=True)
    sum(terms.values()).backward()
    optimizer.step()


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_ltuda.json"))
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.manual_seed(0)
    record = {"threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}

    def report(name: str, words: str, slow, fast) -> None:
        record[name] = f = race(slow, fast, args.rounds)[0]
        print(f"{words}: {f['slow_s'] * 1000:.1f} and {f['fast_s'] * 1000:.1f} ms, {f['ratio']:.2f}x (CPU time {f['ratio_cpu_time']:.2f}x; single rounds "
              f"{f['ratio_rounds']['slowest']:.2f}x at least, {f['ratio_rounds']['median']:.2f}x in the middle)", flush=True)

    labels = torch.from_numpy(abdomen_phantom(2, 0, size=64).labels).flatten()
    e, bank = F.normalize(torch.randn(len(labels), 64), dim=1), PrototypeBank()
    report("update", "prototype update of 32,768 pixels, class by class and all at once", lambda: slow_prototype_step(bank.prototypes, e, labels),
           lambda: ltuda.prototype_step(bank.prototypes, e, labels))
    one, other = slow_prototype_step(bank.prototypes, e, labels), ltuda.prototype_step(bank.prototypes, e, labels)
    record["update"]["largest_difference"] = (one[0] - other[0]).abs().max().item()
    record["update"]["same_targets"] = (one[1] == other[1]).float().mean().item()

    found = abdomen_phantom(2, 0, size=32)
    batch, recipe = [torch.from_numpy(part) for part in (found.images, found.labels, found.task_ids)], RECIPES["stable"]
    student = small_segmenter()
    views, optimizer = make_views(*batch, recipe, student, torch.Generator().manual_seed(0)), torch.optim.Adam(student.parameters(), 1e-4, fused=True)
    fast_update = PrototypeBank.update

    def with_loop() -> None:
        PrototypeBank.update = loop_update
        try:
            training_step(student, optimizer, views, recipe)
        finally:
            PrototypeBank.update = fast_update

    report("step", "a training step with prototypes, update by the loop and by the library", with_loop,
           lambda: training_step(student, optimizer, views, recipe))
    volume = window_hu(torch.from_numpy(abdomen_volume(0, size=128, depth=24).volume))
    student.eval()
    record["sliding_window"] = {}
    for overlap in (0.25, 0.5):
        times = []
        for _ in range(max(2, args.rounds // 3)):
            start = time.perf_counter()
            slide(lambda x: student(x).logits.sigmoid(), volume, window=64, overlap=overlap)
            times.append(time.perf_counter() - start)
        speed = volume.numel() / min(times)
        record["sliding_window"][str(overlap)] = {"seconds": min(times), "voxels_per_second": speed}
        print(f"sliding window over {volume.numel():,} voxels, overlap {overlap:g}: {min(times):.2f} s, {speed:,.0f} voxels/s", flush=True)
    record["load_after"] = os.getloadavg()[0]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
