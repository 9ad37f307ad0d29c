"""GPFM's costs, each beside what it replaces, in one run.

    python benchmarks/gpfm.py [--out results/benchmark_gpfm.json] [--rounds 7]

1. One distillation step (16 tiles: two large and two small crops each, three experts): one forward pass of the student for all terms and one of
   the teacher, as the library does it, against the straightforward form in which every term asks for its own passes.
2. A student asking large experts: fresh answers of three EfficientNet-Lites at 96 pixels in every step, against answers that were drawn before (`ViewPool`).
3. Feature extraction of the shipped student: tiles a second, one by one and in batches of 64.

The sides of a comparison take turns, round after round, and each is judged by its fastest round, so that other work on the machine
disturbs both alike and least. `ratio_rounds` holds the slowest and the median ratio of single rounds.
"""
import argparse
import json
import os
from pathlib import Path

import torch

from _timing import race, timed
from hkust_demos.data.backbones import RECIPES
from hkust_demos.data.he_phantom import tile_mix
from hkust_demos.vision.encoder_files import load_encoder
from hkust_demos.vision.encoders import SPECIALTIES, PhotoExpert, extract_features
from hkust_demos.vision.gpfm import UnifiedDistiller, dino_loss, expert_cls_loss, expert_patch_loss, ibot_loss, koleo_loss, term_weight
from hkust_demos.vision.gpfm_training import TrainConfig, ViewPool, distillation, fresh_views


def separate(d: UnifiedDistiller, views, temperature: float = 0.05) -> torch.Tensor:
    "The same sum, every term with passes of its own."
    x, local, masks = views.global_crops, views.local_crops, views.masks
    body, head, teacher, their = d.student["body"], d.student["head"], d.teacher["body"], d.teacher["head"]
    views_of = lambda logits, n: logits.unflatten(0, (n, -1))
    terms = {}
    with torch.no_grad():
        cls = d.cls_center(their(teacher(x).cls[:, 0]), temperature)
        patches = d.patch_center(their(teacher(x).patches[masks]), temperature)
    n_local = len(local) // (len(x) // 2)
    found = dino_loss(views_of(head(body(local).cls[:, 0]), n_local), views_of(head(body(x, masks).cls[:, 0]), 2), views_of(cls, 2).flip(0))
    terms["dino local"], terms["dino global"] = found["local"], found["global"]
    terms["ibot"] = ibot_loss(head(body(x, masks).patches[masks]), patches, masks)
    terms["koleo"] = sum(map(koleo_loss, body(x, masks).cls[:, 0].chunk(2)))
    for name, expert in d.experts.items():
        with torch.no_grad():
            first, second = expert(x).cls, expert(x).patches
        terms[f"{name} cls"] = expert_cls_loss(d.heads[name](body(x, masks).cls), first)
        terms[f"{name} patch"] = expert_patch_loss(d.heads[name](body(x, masks).patches), second)
    return sum(term_weight(d, name) * term for name, term in terms.items())


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_gpfm.json"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    record = {"threads": 1, "load_before": os.getloadavg()[0]}

    def report(name: str, words: str, slow, fast) -> None:
        record[name] = found = race(slow, fast, args.rounds)[0]
        print(f"{words}: {1000 * found['slow_s']:.0f} and {1000 * found['fast_s']:.0f} ms, {found['ratio']:.2f}x (CPU time {found['ratio_cpu_time']:.2f}x; single rounds "
              f"{found['ratio_rounds']['slowest']:.2f}x at least, {found['ratio_rounds']['median']:.2f}x in the middle)", flush=True)

    tiles, config = tile_mix(64, 0).images, TrainConfig(batch_size=16, standardize=32)
    d = distillation(tiles, {name: load_encoder(name) for name in SPECIALTIES}, config).eval()  # without drop path both sums are the same
    views = fresh_views(tiles, config, 0, 0, 6)
    shared = lambda: d.losses(views.global_crops, views.local_crops, views.masks, teacher_temp=0.05)["total"]
    states = [{key: value.clone() for key, value in d.state_dict().items()} for _ in range(1)]
    one = separate(d, views).item()
    d.load_state_dict(states[0])
    record["largest_difference"] = abs(one - shared().item())
    report("step", "one step with gradients, a pass a term and shared passes", lambda: separate(d, views).backward(), lambda: shared().backward())

    photos = {name: PhotoExpert(name, 96).eval() for name in RECIPES}
    large, some = distillation(tiles, photos, config).eval(), tiles[:16]
    pool = ViewPool(some, large.experts, config, passes=1)
    step = lambda seen: large.losses(seen.global_crops, seen.local_crops, seen.masks, teacher_temp=0.05, targets=seen.targets)["total"].backward()
    report("pool", "one step with three photo networks, asked now and asked before", lambda: step(fresh_views(some, config, 0, 1, 6)), lambda: step(pool(1)))

    student, many = load_encoder("gpfm"), tile_mix(128, 1).images
    record["tiles_per_second"] = {}
    for size in (1, 64):
        seconds, _ = timed(lambda: extract_features(student, many, size), 5)
        record["tiles_per_second"][str(size)] = len(many) / seconds
        print(f"features of {len(many)} tiles in batches of {size}: {len(many) / seconds:,.0f} tiles a second", flush=True)
    record["load_after"] = os.getloadavg()[0]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
