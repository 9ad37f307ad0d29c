"""`hkust-demos federate fednpr --resume`, killed and called again. Slow: `make test-slow` runs it."""
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMMAND = [sys.executable, "-c", "import sys; from hkust_demos.cli import main; sys.exit(main())", "federate", "fednpr"]
OPTIONS = "--clients 4 --rounds 8 --images 60 --start 2 --head local --seed 5 --resume --out".split()


def largest_difference(first, second):
    "Of two files of tensors."
    from safetensors.torch import load_file
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys() and first
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    "Averaged weights, history, and what each client keeps (own head, optimizer memory, prototypes) are those of an undisturbed run."
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run([*COMMAND, *OPTIONS, str(whole)], check=True, capture_output=True, timeout=600)
    process = subprocess.Popen([*COMMAND, *OPTIONS, str(broken)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 300
    while not (broken / "checkpoint.safetensors").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (broken / "model.safetensors").exists(), "the run had ended before it was killed"
    subprocess.run([*COMMAND, *OPTIONS, str(broken)], check=True, capture_output=True, timeout=600)
    assert largest_difference(whole / "model.safetensors", broken / "model.safetensors") == 0
    assert (whole / "history.csv").read_text() == (broken / "history.csv").read_text()
    kept = sorted(path.relative_to(whole) for path in whole.glob(".hkust-demos/*/client-*/000008.safetensors"))
    assert len(kept) == 4 and all(largest_difference(whole / path, broken / path) == 0 for path in kept)
