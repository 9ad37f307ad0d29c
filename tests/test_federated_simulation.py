"""The same apps on Flower's simulation engine, which runs clients as Ray actors, handed in by `flwr run` over TLS.

Slow: `make test-slow` runs it where the extra is installed (pip install "hkust-demos[simulation]") and keeps what was measured in
results/federated_simulation.json (HKUST_RESULTS names the folder).
"""
import json
import os
import time
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
APPS = "hkust_demos.federated.engine:digits_apps"


def test_same_weights_as_in_process(tmp_path):
    pytest.importorskip("ray", reason='Ray is not installed; pip install "hkust-demos[simulation]" brings it')
    import torch

    from hkust_demos.federated.deploy import run_engine
    from hkust_demos.federated.engine import digits_apps, run_local
    torch.set_num_threads(1)
    config, begun = {"rounds": 3, "seed": 3, "lr": 0.05, "keep-local": "head.*", "optimizer": "adam", "reset-optimizer": False}, time.monotonic()
    simulated = run_engine(APPS, 3, out=tmp_path / "simulation", run_config=config, engine="simulation", timeout=900)
    seconds, here = time.monotonic() - begun, run_local(*digits_apps(), 3, config)
    assert simulated.arrays.keys() == here.arrays.keys()
    largest = max((here.arrays[name] - simulated.arrays[name]).abs().max().item() for name in here.arrays)
    assert largest <= 1e-6
    assert [row[:4] for row in here.history.rows] == [tuple(row[:4]) for row in simulated.history.rows]
    if folder := os.environ.get("HKUST_RESULTS"):
        found = {"ray": version("ray"), "flwr": version("flwr"), "clients": 3, "rounds": 3, "seconds": round(seconds, 1),
                 "load_average": os.getloadavg()[0], "in_process_against_simulation": largest}
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "federated_simulation.json").write_text(json.dumps(found, indent=2) + "\n")
