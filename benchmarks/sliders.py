"""A slider of the memristor app beside a click on Run for the same chip: what each costs, and how well the slider's few samples agree.

    python benchmarks/sliders.py [--moves 8] [--out results/benchmark_sliders.json]

A hub is started and asked through gradio_client, as a page asks it. First the live knobs of the default page, 20 moves each (thresholds, and the
prepared steps of write noise), then sliders for which nothing is prepared. Then each move sets another write noise, the change that leaves nothing
in the caches; the slider comes first and Run after it, so that both answer for the same new chip. Seconds are those until the sentences with the
new accuracy arrive, those until everything is there (a slider's charts follow in a call of their own), and CPU time of the hub (one thread). `rms` is the root of the mean squared difference between the
slider's numbers and Run's, in points.
"""
import argparse
import json
import os
import re
import time
from pathlib import Path
from statistics import median

import numpy as np
from _timing import Hub
from gradio_client import Client

CHOICES = dict(source="a test digit", network="8 x 8 pixels", pick="by its number", number=3, drawing=None, picture=None, shape="chair", which=0,
               mesh=None, up="z is up", noise="the same for every cell (range)", amount=0.15, read_noise=0.02, stuck=0, adc_bits=8, rows=128, ohms=0,
               tolerance=0, mapping="ternary", reestimate=True, seed=0, shift=0)
OTHERS = (dict(amount=0.12), dict(amount=0.13), dict(tolerance=1), dict(adc_bits=5), dict(read_noise=0.04))  # nothing of these is prepared
TASKS = {"digits": {}, "mnist": dict(network="28 x 28 pixels (MNIST)"), "shapes": dict(source="a generated shape")}
NUMBERS = {"dynamic": r"([\d.]+)% right", "static": r"([\d.]+)% without", "work_saved": r"save (-?\d+)% of the work"}


def ask(hub: Hub, page: Client, api_name: str, **changed) -> tuple[dict[str, float], dict[str, float]]:
    "(numbers of the test set in percent, seconds) of one call."
    cpu, begun, marks = hub.cpu_s(), time.perf_counter(), []
    for text, *_ in page.submit(*{**CHOICES, **changed}.values(), api_name=api_name):
        marks.append(time.perf_counter() - begun)
    numbers = {name: float(re.search(pattern, text)[1]) for name, pattern in NUMBERS.items()}
    return numbers, {"first_s": marks[0], "whole_s": marks[-1], "cpu_s": hub.cpu_s() - cpu}


def knobs(hub: Hub, moves: int) -> dict:
    "Median and worst seconds of moves of the live knobs, on the default page; then of sliders for which nothing is prepared."
    from hkust_demos.apps.memristor import LIVE_KNOBS
    page, found = Client(f"{hub.url}/memristor/", verbose=False), {}
    for name, values in LIVE_KNOBS.items():
        took = [ask(hub, page, "/live", **{name: value})[1] for value in (values * moves)[:moves]]
        found[name] = {"median_s": median(one["whole_s"] for one in took), "worst_s": max(one["whole_s"] for one in took), "cpu_s": median(one["cpu_s"] for one in took)}
    took = [ask(hub, page, "/live", **changed)[1] for changed in OTHERS]
    found["others"] = {"median_s": median(one["whole_s"] for one in took), "worst_s": max(one["whole_s"] for one in took), "cpu_s": median(one["cpu_s"] for one in took)}
    return found


def compare(hub: Hub, chosen: dict, moves: int) -> dict:
    "Seconds and agreement of one task."
    page = Client(f"{hub.url}/memristor/", verbose=False)
    ask(hub, page, "/run", **chosen)
    ask(hub, page, "/live", **chosen, amount=0.31)
    asked = [[ask(hub, page, name, **chosen, amount=float(amount)) for name in ("/live", "/run")] for amount in np.linspace(0.06, 0.29, moves)]
    slider, run = ({name: [pair[side][1][name] for pair in asked] for name in asked[0][side][1]} for side in (0, 1))
    return {"slider": {name: median(values) for name, values in slider.items()}, "slider_worst": {name: max(values) for name, values in slider.items()},
            "run": {name: median(values) for name, values in run.items()}, "ratio_cpu": median(b / a for a, b in zip(slider["cpu_s"], run["cpu_s"])),
            "rms": {name: float(np.sqrt(np.mean([(few[0][name] - whole[0][name]) ** 2 for few, whole in asked]))) for name in NUMBERS}}


def main() -> None:
    "Serve the app, ask, print, store."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_sliders.json"))
    args = parser.parse_args()
    record = {"load_before": os.getloadavg()[0], "moves": args.moves}
    with Hub() as hub:
        record["knobs"] = knobs(hub, 20)
        for name, row in record["knobs"].items():
            print(f"/live, {name}: median {1000 * row['median_s']:.0f} ms, worst {1000 * row['worst_s']:.0f} ms, {1000 * row['cpu_s']:.0f} ms of CPU", flush=True)
        for task, chosen in TASKS.items():
            found = record[task] = compare(hub, chosen, args.moves)
            usual, worst = found["slider"], found["slider_worst"]
            print(f"{task}: accuracy after {usual['first_s']:.2f} s (worst {worst['first_s']:.2f}), charts after {usual['whole_s']:.2f} s (worst "
                  f"{worst['whole_s']:.2f}), {usual['cpu_s']:.2f} s of CPU; Run takes {found['ratio_cpu']:.1f}x the CPU; apart by "
                  + ", ".join(f"{name} {points:.1f}" for name, points in found["rms"].items()) + " points", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
