"""The federation as real processes on loopback: a SuperLink, three SuperNodes, TLS, keys.

Slow (minutes): `make test-slow` runs them and keeps what was measured in results/federated_deploy.json (HKUST_RESULTS names the folder).
"""
import json
import os
import re
import time
import warnings
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
pytest.importorskip("flwr")

import torch  # noqa: E402

from hkust_demos.federated.deploy import (Federation, end_process, make_certificates, make_node_key, read_result, run_log, run_status, submit,  # noqa: E402
                                          wait_for_run, write_flower_app)
from hkust_demos.federated.engine import client_app, digits_apps, digits_data, digits_model, run_local  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
APPS = "hkust_demos.federated.engine:digits_apps"
CLIENTS = 3
REPORT = {}
TIMEOUT = float(os.environ.get("HKUST_DEPLOY_TIMEOUT", "120"))  # seconds for a round; a loaded machine needs them
# A client app that misbehaves where the run config says so: "kind:client:round" with commas between.
FAULTY = '''
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord

from hkust_demos.federated.engine import client_app as make_client, digits_apps, digits_data, digits_model


def faults(message, context, call_next):
    number, client = message.content["config"]["server-round"], context.node_config["partition-id"]
    Path(context.node_config["state-dir"], f"began-{number}").parent.mkdir(parents=True, exist_ok=True)
    Path(context.node_config["state-dir"], f"began-{number}").touch()
    kinds = [f.split(":")[0] for f in str(context.run_config["faults"]).split(",") if f.split(":")[1:] == [str(client), str(number)]]
    if "slow" in kinds or "hang" in kinds:
        time.sleep(context.run_config["timeout"] + 30)
    reply = call_next(message, context)
    arrays = reply.content["arrays"].to_torch_state_dict()
    if "nan" in kinds:
        reply.content["arrays"] = ArrayRecord({k: v * torch.nan for k, v in arrays.items()})
    if "shape" in kinds:
        reply.content["arrays"] = ArrayRecord({k: torch.zeros(3, 3) for k in arrays})
    if "raise" in kinds:
        raise OSError("the scanner's disk is gone")
    return reply


_apps = digits_apps()
server_app = _apps[0]
client_app = make_client(digits_model, digits_data, mods=[faults])
'''
SETTINGS = {"evaluate-clients": False, "lr": 0.05, "seed": 3}


def difference(first, second):
    "The largest difference of two sets of weights."
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def took_part(history, number):
    "Clients whose training was used in a round."
    return sorted(row[2] for row in history.rows if row[0] == number and row[1] == "train" and row[3] == "loss" and row[2] >= 0)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    "Server and clients, for all tests of this file."
    torch.set_num_threads(1)
    begun = time.monotonic()
    with Federation(tmp_path_factory.mktemp("federation"), CLIENTS) as running:
        REPORT["start_s"] = round(time.monotonic() - begun, 1)
        REPORT["load_average"] = os.getloadavg()[0]
        yield running
    for name, process in running.running.items():
        assert process.poll() is not None, f"{name} is still running"
    if "resumed_against_undisturbed" in REPORT and (folder := os.environ.get("HKUST_RESULTS")):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "federated_deploy.json").write_text(json.dumps(REPORT, indent=2) + "\n")


@pytest.fixture(scope="module")
def plain_app(federation):
    "The digits app."
    return write_flower_app(federation.folder / "plain", APPS)


@pytest.fixture(scope="module")
def faulty_app(federation):
    "The digits app with a client that misbehaves."
    folder = write_flower_app(federation.folder / "faulty", APPS, config={"faults": "none:9:9"}, name="faulty-app")
    (folder / "faulty_app" / "app.py").write_text(FAULTY)
    return folder


def run(federation, app, name, config):
    "A run from hand-in to result."
    out = federation.folder / "out" / name
    begun = time.monotonic()
    number = submit(federation, app, {**SETTINGS, "num-clients": CLIENTS, "out-dir": str(out), **config})
    wait_for_run(federation, number, timeout=900)
    REPORT[f"{name}_s"] = round(time.monotonic() - begun, 1)
    return read_result(out)


def test_same_weights_as_in_process(federation, plain_app):
    "In-process and four processes over TLS end with the same weights, personal heads and optimizer memory included."
    config = {**SETTINGS, "rounds": 3, "keep-local": "head.*", "optimizer": "adam", "reset-optimizer": False}
    deployed = run(federation, plain_app, "equal", config)
    here = run_local(*digits_apps(), CLIENTS, config)
    REPORT["in_process_against_deployment"] = difference(here.arrays, deployed.arrays)
    assert REPORT["in_process_against_deployment"] <= 1e-6  # measured: 0
    assert [row[:4] for row in here.history.rows] == [tuple(row[:4]) for row in deployed.history.rows]
    assert max(abs(a[4] - b[4]) for a, b in zip(here.history.rows, deployed.history.rows)) < 1e-5


def test_wrong_keys_are_refused(federation):
    "A SuperNode whose key nobody registered does not get in."
    folder = federation.folder / "stranger"
    make_node_key(folder / "key")
    process = federation.start_client(0, key=folder / "key", name="stranger")
    end = time.monotonic() + 180
    while time.monotonic() < end and "Exit Code" not in federation.log("stranger"):
        time.sleep(0.5)
    end_process(process, patience=30)
    log = re.sub(r"\x1b\[\d+m", "", federation.log("stranger"))
    says = next((line.strip() for line in log.splitlines() if "Failed to activate" in line), "")
    REPORT["stranger"] = {"exit_code": int(re.search(r"Exit Code: (\d+)", log)[1]), "says": says}
    assert REPORT["stranger"]["exit_code"] == 305 and "Failed to activate" in says
    assert len(federation.call("flwr", "supernode", "list", "federation")["nodes"]) == CLIENTS


def test_a_wrong_server_is_refused(federation, tmp_path):
    "A SuperNode that trusts another authority does not talk to this server, whatever its key."
    other = make_certificates(tmp_path / "other")
    make_node_key(tmp_path / "key")
    process = federation.start_client(0, key=tmp_path / "key", authority=other["ca"], name="suspicious")
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None and "certificate" not in federation.log("suspicious").lower():
        time.sleep(0.5)
    end_process(process, patience=30)
    REPORT["wrong_authority"] = next((line.strip() for line in federation.log("suspicious").splitlines() if "certificate" in line.lower()), "")
    assert "certificate verify failed" in REPORT["wrong_authority"].lower(), federation.log("suspicious")[-1500:]


def test_bad_replies_stragglers_and_a_killed_client(federation, faulty_app):
    "NaN in round 1, wrong shapes in 2, an exception in 3; in 4 a straggler and a SuperNode that is killed: the run ends, without them."
    out = federation.folder / "out" / "faults"
    faults = "nan:0:1,shape:1:2,raise:2:3,slow:0:4,hang:1:4"
    config = {**SETTINGS, "rounds": 5, "faults": faults, "num-clients": CLIENTS, "min-nodes": 2, "timeout": TIMEOUT, "out-dir": str(out)}
    begun, number = time.monotonic(), submit(federation, faulty_app, config)
    wait_until(lambda: (federation.folder / "state-1" / "began-4").exists(), federation, number)
    end_process(federation.running["client-1"], hard=True)
    wait_for_run(federation, number, timeout=1200)
    REPORT["faults_s"] = round(time.monotonic() - begun, 1)
    result, log = read_result(out), run_log(federation, number)
    REPORT["took_part"] = parts = {r: took_part(result.history, r) for r in range(1, 6)}
    assert [parts[r] for r in (1, 2, 3, 4)] == [[1, 2], [0, 2], [0, 1], [2]]
    assert parts[5] and set(parts[5]) <= {0, 2}
    for words in ("holds NaN", "has shape", "the scanner's disk is gone", "no reply within the time limit"):
        assert words in log, words
    assert same_as_in_process(result, parts)
    federation.start_client(1)


def wait_until(condition, federation, number):
    "Wait for something to happen in a run that goes on."
    end, look = time.monotonic() + 1200, time.monotonic() + 20
    while not condition():
        if time.monotonic() > look:
            assert not run_status(federation, number).startswith("finished"), run_log(federation, number)[-1500:]
            look = time.monotonic() + 20
        assert time.monotonic() < end
        time.sleep(0.2)


def same_as_in_process(result, parts):
    "The weights are those of a run in this process in which the same clients were missing."
    gone = lambda message: message.metadata.dst_node_id - 1000 not in parts[message.content["config"]["server-round"]]
    with warnings.catch_warnings(action="ignore"):
        here = run_local(digits_apps()[0], client_app(digits_model, digits_data), CLIENTS, {**SETTINGS, "rounds": 5}, drop=gone)
    REPORT["faults_against_in_process"] = difference(here.arrays, result.arrays)
    return REPORT["faults_against_in_process"] <= 1e-6


def test_killed_server_resumes(federation, plain_app):
    "The SuperLink is killed after a checkpoint, started again, the run handed in again: the weights are those of an undisturbed run."
    config = {**SETTINGS, "rounds": 4, "keep-local": "head.*", "strategy": "fedavgm", "server-momentum": 0.5, "run-name": "resume"}
    folder = federation.folder / "out" / "resume"
    saved = {**config, "checkpoint-dir": str(folder), "out-dir": str(folder), "num-clients": CLIENTS, "wait": 300.0}
    begun = time.monotonic()
    number = submit(federation, plain_app, saved)
    wait_until(lambda: (folder / "checkpoint.safetensors").exists(), federation, number)
    end_process(federation.running["superlink"], hard=True)
    assert not (folder / "model.safetensors").exists(), "the run had ended before the server was killed"
    federation.start_server()
    wait_for_run(federation, submit(federation, plain_app, saved), timeout=900)
    REPORT["resume_s"] = round(time.monotonic() - begun, 1)
    here = run_local(*digits_apps(), CLIENTS, config)
    resumed = read_result(folder)
    REPORT["resumed_against_undisturbed"] = difference(here.arrays, resumed.arrays)
    assert REPORT["resumed_against_undisturbed"] <= 1e-6
    assert resumed.history.curve("accuracy")[0] == [0, 1, 2, 3, 4]
