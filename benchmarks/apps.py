"""How soon each app shows its finished example, and how fast its live knobs answer, through one running hub.

    python benchmarks/apps.py [METHOD ...] [--openings 3] [--moves 20] [--out results/benchmark_apps.json]

The examples are prepared as `make demo` prepares them, then a hub is started. `opening`: from the start of the navigation to a loaded picture
inside the element `finished`, in a Chromium whose cache is empty; median of the openings. `live`: moves of the knobs that the app module lists in
LIVE_KNOBS, one knob a move, through gradio_client and the endpoint /live; seconds of the wall, and CPU seconds of the hub, which a busy machine
does not change. `run`: the endpoint /run without any argument. `memory`: resident megabytes of the hub after all that.
"""
import argparse
import importlib
import json
import shutil
import subprocess
import time
from itertools import cycle
from pathlib import Path
from statistics import median

from _timing import COMMAND, Hub
from gradio_client import Client
from playwright.sync_api import sync_playwright

from hkust_demos.catalog import METHODS, ready_methods

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
LIMITS = {"opening_s": 3.0, "live_median_ms": 300, "live_worst_ms": 600}
FINISHED = """() => [...document.querySelectorAll('#finished img, #finished svg')].some(picture => {
    const box = picture.getBoundingClientRect();
    return box.width >= 100 && box.height >= 40 && (picture.tagName !== 'IMG' || (picture.complete && picture.naturalWidth > 0));
}) && performance.now()"""


def openings(browser, address: str, times: int) -> list[float]:
    "Seconds from the navigation to the finished picture, each with an empty cache."
    seconds = []
    for _ in range(times):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        page = context.new_page()
        page.goto(address, wait_until="commit")
        seconds.append(page.wait_for_function(FINISHED, polling="raf", timeout=60_000).json_value() / 1000)
        context.close()
    return seconds


def moves(hub: Hub, page: Client, knobs: dict[str, list], times: int) -> tuple[list[float], list[float]]:
    "(milliseconds, CPU milliseconds of the hub) of moves of the live knobs, after one answer that is not counted."
    walks, chosen, wall, cpu = {name: cycle(values) for name, values in knobs.items()}, {}, [], []
    page.predict(api_name="/live")
    for name, _ in zip(cycle(knobs), range(times)):
        chosen[name] = next(walks[name])
        spent, begun = hub.cpu_s(), time.perf_counter()
        page.predict(**chosen, api_name="/live")
        wall.append(1000 * (time.perf_counter() - begun))
        cpu.append(1000 * (hub.cpu_s() - spent))
    return wall, cpu


def measure(hub: Hub, browser, name: str, n_openings: int, n_moves: int) -> dict:
    "All numbers of one app."
    address = f"{hub.url}/{name}/"
    seen = openings(browser, address, n_openings)
    page = Client(address, verbose=False)
    wall, cpu = moves(hub, page, importlib.import_module(METHODS[name].app).LIVE_KNOBS, n_moves)
    begun = time.perf_counter()
    page.predict(api_name="/run")
    return {"opening_s": median(seen), "opening_worst_s": max(seen), "live_median_ms": median(wall), "live_worst_ms": max(wall),
            "live_cpu_median_ms": median(cpu), "run_s": time.perf_counter() - begun, "memory_mb": hub.memory_mb()}


def table(record: dict[str, dict]) -> str:
    "One row an app; what is over its limit carries a star."
    columns = list(next(iter(record.values())))
    rows = [f"{'app':12}" + "".join(f"{name:>19}" for name in columns)]
    for app, numbers in record.items():
        cells = [f"{numbers[name]:.2f}{'*' if numbers[name] > LIMITS.get(name, float('inf')) else ' '}" for name in columns]
        rows.append(f"{app:12}" + "".join(f"{cell:>19}" for cell in cells))
    return "\n".join([*rows, f"* over its limit: {', '.join(f'{name} {limit:g}' for name, limit in LIMITS.items())}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="default: every ready method")
    parser.add_argument("--openings", type=int, default=3)
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_apps.json"))
    args = parser.parse_args()
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    if executable is None:
        parser.error("no Chromium found; `make browser` installs one where apt-get can")
    subprocess.run([*COMMAND, "prepare"], check=True, stdout=subprocess.DEVNULL)
    record = {}
    with Hub() as hub, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        for name in args.methods or ready_methods():
            record[name] = {key: round(value, 3) for key, value in measure(hub, browser, name, args.openings, args.moves).items()}
        browser.close()
    print(table(record))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
