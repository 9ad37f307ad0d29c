"""Rounds of federated learning: the engine's LocalGrid against Flower's own simulation on Ray, in one run.

    python benchmarks/federated.py [--clients 4 8 16] [--rounds 6] [--out results/benchmark_federated.json]

1. Seconds until the first round is done, seconds for each further round, and peak memory of all processes, with 4, 8 and 16 clients. The very
   same server and client apps (8 x 8 digits) run on both, each run in a fresh process with one thread a client, and must end with the same weights.
2. A training step of a small convolutional network that needs features and logits: one forward pass, as the engine takes them, against two, as the
   released code of FedNPR does.

Ray is an extra (`pip install "flwr[simulation]==1.41.*"`). Where it is not installed, or does not start, this says so and measures the rest.
"""
import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
PATIENCE_S = 300


def clocked_apps(rounds: int, began: float):
    "The digits' apps; the server's test of each round is the time since `began`."
    from flwr.serverapp import ServerApp

    from hkust_demos.federated.engine import client_app, digits_data, digits_model, server_app
    inner = server_app(digits_model, evaluate_fn=lambda model, config: {"clock": time.time() - began})
    outer = ServerApp()

    @outer.main()
    def main(grid, context):
        context.run_config = {"rounds": rounds, "evaluate-clients": False, "wait": 120.0}
        inner(grid, context)
        outer.left = context.state

    return outer, client_app(digits_model, digits_data)


def child(kind: str, clients: int, rounds: int) -> None:
    "One run in this process; prints the clock of each round and a fingerprint of the weights."
    import hashlib
    began = time.time()
    from flwr.app import Context, RecordDict

    from hkust_demos.federated.engine import History, LocalGrid
    server, client = clocked_apps(rounds, began)
    if kind == "local":
        server(LocalGrid(client, clients), Context(1, 1, {}, RecordDict(), {}))
    else:
        from flwr.simulation import run_simulation
        run_simulation(server, client, clients, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                                                                "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False}})
    arrays, run = server.left["arrays"].to_torch_state_dict(), server.left["run"]
    digest = hashlib.sha256(b"".join(arrays[name].numpy().tobytes() for name in sorted(arrays))).hexdigest()
    print("RESULT " + json.dumps({"clock": History.from_json(run["history"]).curve("clock")[1], "weights": digest}), flush=True)


def tree_mb(process) -> float:
    "Memory of a process and all below it."
    import psutil
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 1e6


def measure(kind: str, clients: int, rounds: int) -> dict | None:
    "A run in a fresh process, watched; None if it did not end well."
    import psutil
    command = [sys.executable, __file__, "--child", kind, "--clients", str(clients), "--rounds", str(rounds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        peak, end = 0.0, time.monotonic() + PATIENCE_S
        while running.poll() is None and time.monotonic() < end:
            try:
                peak = max(peak, tree_mb(psutil.Process(running.pid)))
            except psutil.NoSuchProcess:
                break
            time.sleep(0.1)
        if running.poll() is None:
            for member in psutil.Process(running.pid).children(recursive=True):
                member.kill()
            running.kill()
        out, err = running.communicate()
    lines = [line for line in out.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"  {kind}, {clients} clients: no result; the end of its log: {' '.join((err or out).split())[-300:]}")
        return None
    found = json.loads(lines[0].removeprefix("RESULT "))
    clock = found["clock"]
    return {"first_round_s": clock[1], "round_s": median(b - a for a, b in zip(clock[1:], clock[2:])), "peak_mb": peak, "weights": found["weights"]}


def compare_engines(client_numbers: list[int], rounds: int, found: dict) -> None:
    "LocalGrid, and Flower's simulation beside it."
    has_ray = importlib.util.find_spec("ray") is not None
    if not has_ray:
        print('Ray is not installed (pip install "flwr[simulation]==1.41.*"): Flower\'s simulation is left out.')
    found["ray"] = "installed" if has_ray else "not installed"
    for clients in client_numbers:
        local = found[f"local, {clients} clients"] = measure("local", clients, rounds)
        print(f"{clients} clients, LocalGrid: first round after {local['first_round_s']:.1f} s, then {local['round_s']:.3f} s a round, {local['peak_mb']:.0f} MB")
        ray = found[f"ray, {clients} clients"] = measure("ray", clients, rounds) if has_ray else None
        if ray:
            print(f"{clients} clients, Ray: first round after {ray['first_round_s']:.1f} s, then {ray['round_s']:.3f} s a round, {ray['peak_mb']:.0f} MB; "
                  f"ratios Ray to LocalGrid: start {ray['first_round_s'] / local['first_round_s']:.1f}, round {ray['round_s'] / local['round_s']:.1f}, "
                  f"memory {ray['peak_mb'] / local['peak_mb']:.1f}; same weights: {ray['weights'] == local['weights']}")


def compare_passes(found: dict, repeats: int = 60) -> None:
    "A training step with one forward pass, and with two."
    import torch
    from torch import nn
    torch.manual_seed(0)
    body = nn.Sequential(*(layer for a, b in ((3, 12), (12, 24), (24, 48)) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head, images, seconds = nn.Linear(48, 8), torch.randn(32, 3, 32, 32), {"one": [], "two": []}
    for _ in range(repeats):
        for name in seconds:
            begun = time.perf_counter()
            features = body(images)
            logits = head(features) if name == "one" else head(body(images))
            (logits.square().mean() + features.square().mean()).backward()
            seconds[name].append(time.perf_counter() - begun)
    one, two = (1000 * median(seconds[name][5:]) for name in ("one", "two"))
    found["passes"] = {"one_ms": one, "two_ms": two, "ratio": two / one}
    print(f"training step, batch of 32: {two:.2f} ms with two forward passes, {one:.2f} ms with one: {two / one:.2f}x")


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_federated.json"))
    parser.add_argument("--child", choices=["local", "ray"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.clients[0], args.rounds)
    found = {"cpus": os.cpu_count(), "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None, "rounds": args.rounds}
    compare_engines(args.clients, args.rounds, found)
    compare_passes(found)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
