"The federated engine where it teaches nothing: bad inputs, odd data sets, Flower's interfaces that an upgrade may change."
import hashlib
import json
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest

pytest.importorskip("flwr")

import torch  # noqa: E402
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.data import Dataset, TensorDataset  # noqa: E402

from hkust_demos.federated import engine  # noqa: E402
from hkust_demos.federated.engine import (Batches, Checkpoint, ClientData, FedAvg, Guard, LocalGrid, NoReplies, NotEnoughNodes,  # noqa: E402
                                          PartialFedAvg, Plugin, RejectedReply, client_app, digits_apps, digits_data, digits_model,
                                          full_config, local_state, run_local, server_app, shared_keys)

SHORT = {"rounds": 2, "evaluate-clients": False}


def same(first, second):
    "Two sets of weights are equal, bit for bit."
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def toy_model(config):
    "Four inputs, two classes."
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def toy_data(config, sizes=(12, 8, 5)):
    "Clients of different sizes."
    generator = torch.Generator().manual_seed(config["partition-id"])
    x = torch.randn(sizes[config["partition-id"]], 4, generator=generator)
    return ClientData(TensorDataset(x, (x.sum(1) > 0).long()), TensorDataset(x, (x.sum(1) > 0).long()))


def test_flower_is_the_version_that_was_read():
    "The engine leans on private names of Flower 1.41; another version must be read first."
    from importlib.metadata import version
    assert version("flwr").startswith("1.41.")
    assert callable(engine.message_to_proto) and hasattr(engine.TaskIdentity, "_run_id")


FRESH = """
import hashlib, json
from hkust_demos.federated.engine import ClientApp, LocalGrid, Message, RecordDict, digits_apps, run_local
import flwr.supercore.telemetry as telemetry
found = {"telemetry": telemetry.FLWR_TELEMETRY_ENABLED}
try:
    Message(RecordDict(), 1000, "train")
except RuntimeError as error:
    found["refused"] = str(error)
LocalGrid(ClientApp(), 1)
found["made"] = Message(RecordDict(), 1000, "train").metadata.dst_node_id
arrays = run_local(*digits_apps(), 2, {"rounds": 1, "evaluate-clients": False}).arrays
found["hash"] = hashlib.sha256(b"".join(arrays[k].numpy().tobytes() for k in sorted(arrays))).hexdigest()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def fresh():
    "What a new process finds, with no word about Flower in its environment."
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FLWR")}
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_messages_need_the_identity_that_the_grid_sets(fresh):
    "A fresh process cannot make a message; behind a LocalGrid it can. An upgrade of Flower that changes this fails here."
    assert fresh["refused"] and fresh["made"] == 1000


def test_telemetry_is_off_before_flower_is_imported(fresh):
    "Importing the engine in a clean environment switches telemetry off."
    assert fresh["telemetry"] == "0"


def test_digits_apps_repeat_in_another_process(fresh):
    "The same weights in another Python process."
    arrays = run_local(*digits_apps(), 2, {"rounds": 1, "evaluate-clients": False}).arrays
    assert fresh["hash"] == hashlib.sha256(b"".join(arrays[k].numpy().tobytes() for k in sorted(arrays))).hexdigest()


@pytest.mark.parametrize("change, word", [({"rounds": 0}, "rounds"), ({"batch-size": 0}, "batch-size"), ({"fraction": 0.0}, "fraction"),
                                          ({"proximal-mu": -1.0}, "proximal-mu"), ({"optimizer": 3}, "optimizer"), ({"reset-optimizer": 0}, "reset-optimizer")])
def test_bad_configuration(change, word):
    "The message names the key."
    with pytest.raises(ValueError, match=word):
        run_local(*digits_apps(), 2, change)


@pytest.mark.parametrize("change, word", [({"strategy": "krum"}, "krum"), ({"optimizer": "lion"}, "lion"), ({"keep-local": "*"}, "nothing is left")])
def test_words_that_nobody_knows(change, word):
    "Unknown strategy, optimizer, or nothing to share."
    with warnings.catch_warnings(action="ignore"), pytest.raises((ValueError, NoReplies), match=word):
        run_local(*digits_apps(), 2, {**SHORT, **change})


def test_no_clients():
    "At least one."
    with pytest.raises(ValueError, match="num_clients"):
        run_local(*digits_apps(), 0)


def test_order_of_nodes_does_not_matter():
    "Flower draws the order from Python's global generator; the result does not follow it."
    results = []
    for seed in (1, 2):
        random.seed(seed)
        results.append(run_local(server_app(toy_model), client_app(toy_model, toy_data), 3, SHORT).arrays)
    assert same(*results)


def test_global_generators_are_left_alone():
    "A run neither uses nor moves torch's and NumPy's global generators."
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    run_local(server_app(toy_model), client_app(toy_model, toy_data), 3, SHORT)
    assert (torch.rand(1).item(), np.random.rand()) == expected


def test_dropout_layers_are_repeatable():
    "Layers that draw from the global generator get a seed of their own."
    model = lambda config: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
    runs = [run_local(server_app(model), client_app(model, toy_data), 2, SHORT).arrays for _ in range(2)]
    assert same(*runs)


def test_serialize_changes_nothing_but_aliasing():
    "The same weights with and without turning messages to bytes; a client that writes into its message hurts nobody else."
    app = client_app(toy_model, toy_data)
    runs = [run_local(server_app(toy_model), app, 3, SHORT, serialize=flag).arrays for flag in (True, False)]
    assert same(*runs)

    def vandal(message, context, call_next):
        reply = call_next(message, context)
        message.content["arrays"].clear()
        message.content["config"]["server-round"] = 99
        return reply

    wild = client_app(toy_model, toy_data, mods=[vandal])
    assert same(run_local(server_app(toy_model), wild, 3, SHORT).arrays, runs[0])


def test_a_data_set_that_is_no_tensor():
    "Any PyTorch data set will do."
    class Listed(Dataset):
        def __init__(self, tensors): self.rows = list(zip(*tensors))
        def __len__(self): return len(self.rows)
        def __getitem__(self, index): return self.rows[index][0], int(self.rows[index][1])

    listed = lambda config: ClientData(*(Listed(part.tensors) for part in toy_data(config)))
    runs = [run_local(server_app(toy_model), client_app(toy_model, data), 3, SHORT).arrays for data in (toy_data, listed)]
    assert same(*runs)


def test_batches():
    "One example makes one batch; a lonely last one joins; empty is refused."
    rows = lambda n: TensorDataset(torch.arange(n), torch.arange(n))
    assert [len(x) for x, _ in Batches(rows(1), 4)] == [1]
    assert [len(x) for x, _ in Batches(rows(8), 4)] == [4, 4]
    assert [len(x) for x, _ in Batches(rows(5), 4)] == [5]
    with pytest.raises(ValueError, match="empty"):
        Batches(rows(0), 4)


def test_an_empty_client_is_left_out():
    "It answers with an error that says so; the others go on."
    data = lambda config: ClientData(TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))) if config["partition-id"] == 1 else toy_data(config)
    with pytest.warns(RejectedReply, match="client 1 has no training examples|no training examples"):
        result = run_local(server_app(toy_model), client_app(toy_model, data), 3, SHORT)
    assert {row[2] for row in result.history.rows if row[1] == "train"} == {-1, 0, 2}


def test_a_client_with_one_class_and_one_example():
    "Training works, also with batch normalization behind two examples."
    data = lambda config: ClientData(TensorDataset(torch.ones(1, 4), torch.zeros(1, dtype=torch.long))) if config["partition-id"] == 0 else toy_data(config)
    result = run_local(server_app(toy_model), client_app(toy_model, data), 3, SHORT)
    assert all(torch.isfinite(value).all() for value in result.arrays.values())


def test_clients_without_a_test_set():
    "Local tests are skipped where there is nothing to test on, and metrics that only some have stay in the history."
    data = lambda config: ClientData(toy_data(config).train) if config["partition-id"] == 0 else toy_data(config)
    history = run_local(server_app(toy_model), client_app(toy_model, data), 3, SHORT).history
    assert {row[2] for row in history.rows if row[1] == "local"} == {1, 2}
    with pytest.warns(RejectedReply, match="no test data"):
        run_local(server_app(toy_model), client_app(toy_model, data), 3, {"rounds": 1})


def test_list_metrics_may_hold_nan():
    "Recall of a class that a client does not have."
    metrics = lambda logits, targets: {"recall": [float("nan"), 0.5]}
    history = run_local(server_app(toy_model), client_app(toy_model, toy_data, metrics_fn=metrics), 3, SHORT).history
    assert history.curve("recall[1]", "local", 2)[1] == [0.5, 0.5] and np.isnan(history.curve("recall[0]", "local", 2)[1][0])


class Counter(Plugin):
    "A plug-in that counts its rounds, and reports what it was told."

    def __init__(self):
        self.rounds, self.seen = torch.zeros(()), 0

    def on_round_start(self, model, loader):
        assert not model.training
        self.rounds, self.seen = self.rounds + 1, sum(len(targets) for _, targets in loader)

    def loss(self, features, targets, round_index):
        assert features.shape == (len(targets), 8)
        return 0.1 * features.square().mean() if round_index > 1 else 0.0

    def metrics(self):
        return {"rounds": float(self.rounds), "seen": self.seen}

    def state(self):
        return {"rounds": self.rounds}

    def load_state(self, tensors):
        self.rounds = tensors.get("rounds", self.rounds)


class Featured(nn.Module):
    "Returns features and logits."

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        features = self.body(x).relu()
        return features, self.head(features)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedavgm"])
def test_plugin_on_any_strategy(strategy):
    "It is called each round, keeps its state, reports, and changes the weights."
    model = lambda config: Featured()
    config = {"rounds": 3, "strategy": strategy, "proximal-mu": 0.1, "evaluate-clients": False}
    with_plugin = run_local(server_app(model), client_app(model, toy_data, make_plugin=lambda config, data: Counter()), 3, config)
    without = run_local(server_app(model), client_app(model, toy_data), 3, config)
    assert with_plugin.history.curve("rounds", "train", 0)[1] == [1, 2, 3] and with_plugin.history.curve("seen", "train", 2)[1] == [5, 5, 5]
    assert local_state(with_plugin.contexts[1])["plugin.rounds"] == 3
    assert not same(with_plugin.arrays, without.arrays)


def test_fedprox_holds_clients_back():
    "A strong leash: the weights move less."
    start = engine.shared_arrays(engine.build_model(toy_model, full_config())).to_torch_state_dict()
    moved = {}
    for mu in (0.0, 10.0):
        config = {"rounds": 1, "strategy": "fedprox", "proximal-mu": mu, "local-epochs": 5, "evaluate-clients": False}
        arrays = run_local(server_app(toy_model), client_app(toy_model, toy_data), 3, config).arrays
        moved[mu] = sum((arrays[name] - start[name]).square().sum().item() for name in start)
    assert moved[10.0] < 0.25 * moved[0.0]


def test_fedprox_with_mu_zero_is_fedavg():
    "And FedAvgM without momentum is, up to rounding."
    runs = {name: run_local(server_app(toy_model), client_app(toy_model, toy_data), 3, {**SHORT, "strategy": name}).arrays
            for name in ("fedavg", "fedprox", "fedavgm")}
    assert same(runs["fedavg"], runs["fedprox"])
    for name, value in runs["fedavg"].items():
        assert torch.allclose(value, runs["fedavgm"][name], atol=1e-6)


def test_personal_model_of_a_client():
    "Averaged body, own head; without a client the head is whatever the model had."
    result = run_local(*digits_apps(), 2, {**SHORT, "keep-local": "head.*"})
    model = result.load(digits_model({}), client=1)
    assert model.head.weight.equal(local_state(result.contexts[1])["model.head.weight"]) and model.body[0].weight.equal(result.arrays["body.0.weight"])
    with pytest.raises(ValueError, match="client is 7"):
        result.load(digits_model({}), client=7)
    with pytest.raises(ValueError, match="another one"):
        result.load(nn.Linear(3, 3))


def reply(partition, arrays, *, node=None, metrics=None, extra=()):
    "A reply as a client would send it."
    LocalGrid(engine.ClientApp(), 1)
    ask = Message(RecordDict(), 1000 + (partition if node is None else node), "train")
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics or {"num-examples": 1}), "client": ConfigRecord({"partition-id": partition})})
    for name in extra:
        content[name] = MetricRecord({"num-examples": 1})
    return Message(content, reply_to=ask)


def guard_with(sent):
    "A guard that has sent these arrays."
    guard = PartialFedAvg()
    guard.sieve.sent = ArrayRecord(sent)
    return guard


@pytest.mark.parametrize("bad, word", [
    (dict(arrays={"w": torch.full((2,), torch.inf)}), "NaN or infinity"), (dict(arrays={"w": torch.ones(2, 1)}), "shape"),
    (dict(arrays={"v": torch.ones(2)}), "not those"), (dict(arrays={}), "not those"), (dict(arrays={"w": torch.ones(2)}, metrics={"loss": 1.0}), "num-examples"),
    (dict(arrays={"w": torch.ones(2)}, metrics={"num-examples": float("nan")}), "num-examples is nan"), (dict(arrays={"w": torch.ones(2)}, extra=["more"]), "sets of metrics"),
    (dict(arrays={"w": torch.ones(2)}, metrics={"num-examples": -3}), "num-examples is -3")])
def test_what_the_guard_leaves_out(bad, word):
    "Each kind of bad reply has its sentence, and the good one counts alone."
    guard = guard_with({"w": torch.zeros(2)})
    with pytest.warns(RejectedReply, match=word):
        arrays, _ = guard.aggregate_train(1, [reply(0, {"w": torch.full((2,), 7.0)}), reply(1, **bad)])
    assert arrays["w"].numpy().tolist() == [7, 7]


def test_two_nodes_with_one_partition():
    "The second is left out."
    guard = guard_with({"w": torch.zeros(1)})
    with pytest.warns(RejectedReply, match="answered already"):
        arrays, _ = guard.aggregate_train(1, [reply(0, {"w": torch.ones(1)}), reply(0, {"w": torch.zeros(1)}, node=5)])
    assert arrays["w"].numpy().tolist() == [1]


def test_order_of_arrays_is_restored():
    "A client that sends its arrays in another order is not mixed up."
    guard = guard_with({"a": torch.zeros(1), "b": torch.zeros(1)})
    arrays, _ = guard.aggregate_train(1, [reply(0, {"b": torch.ones(1) * 2, "a": torch.ones(1)})])
    assert list(arrays) == ["a", "b"] and arrays["b"].numpy().tolist() == [2]


def test_a_strategy_that_returns_nothing_raises():
    "Flower would go on with the old weights."
    class Silent(FedAvg):
        def aggregate_train(self, server_round, replies):
            return None, None

    with pytest.raises(NoReplies, match="Silent"):
        run_local(server_app(toy_model, make_strategy=lambda config: Silent(min_available_nodes=1, min_train_nodes=1)), client_app(toy_model, toy_data), 3, SHORT)


def test_too_few_clients_is_an_error_in_time():
    "Not a hang."
    with pytest.raises(NotEnoughNodes, match="3 of 4"):
        run_local(server_app(toy_model), client_app(toy_model, toy_data), 3, {**SHORT, "num-clients": 4, "wait": 0.1})


def test_a_strategy_of_flower_inside_the_guard():
    "The median of three, from Flower, with one client gone mad but finite."
    from flwr.serverapp.strategy import FedMedian

    def mad(message, context, call_next):
        answer = call_next(message, context)
        if context.node_config["partition-id"] == 2:
            answer.content["arrays"] = ArrayRecord({k: v + 1e6 for k, v in answer.content["arrays"].to_torch_state_dict().items()})
        return answer

    arrays = run_local(server_app(toy_model, make_strategy=lambda config: FedMedian()), client_app(toy_model, toy_data, mods=[mad]), 3, SHORT).arrays
    assert max(value.abs().max() for value in arrays.values()) < 100


def test_resume_needs_the_same_run(tmp_path):
    "More rounds are welcome, another seed is not; nothing is left to do when all rounds are done."
    config = {**SHORT, "checkpoint-dir": str(tmp_path)}
    apps = server_app(toy_model), client_app(toy_model, toy_data)
    first = run_local(*apps, 3, config)
    assert same(run_local(*apps, 3, config).arrays, first.arrays)
    longer = run_local(*apps, 3, {**config, "rounds": 4})
    assert same(longer.arrays, run_local(*apps, 3, {**SHORT, "rounds": 4}).arrays)
    with pytest.raises(ValueError, match="another run"):
        run_local(*apps, 3, {**config, "seed": 1})


def test_a_checkpoint_that_was_cut_short(tmp_path):
    "Half a file under the temporary name harms nobody; half a file under the real name is an error, not a silent restart."
    config = {**SHORT, "checkpoint-dir": str(tmp_path)}
    apps = server_app(toy_model), client_app(toy_model, toy_data)
    (tmp_path / "checkpoint.safetensors.tmp").write_bytes(b"half")
    run_local(*apps, 3, config)
    path = Checkpoint(tmp_path, full_config(config)).path
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(Exception, match="(?i)header|deserializ"):
        run_local(*apps, 3, config)


def test_stopping_from_a_callback():
    "What a callback raises comes out."
    def stop(report):
        if report.round_index == 1:
            raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        run_local(server_app(toy_model), client_app(toy_model, toy_data), 3, {"rounds": 5}, callback=stop)


def test_fractions_are_repeatable_enough():
    "With a fraction, Flower picks clients from Python's global generator: seed it, and the run repeats."
    runs = []
    for _ in range(2):
        random.seed(0)
        result = run_local(server_app(toy_model), client_app(toy_model, toy_data), 3, {**SHORT, "rounds": 3, "fraction": 0.4})
        runs.append(result)
    assert same(runs[0].arrays, runs[1].arrays)
    assert all(len({row[2] for row in runs[0].history.rows if row[:2] == (r, "train")} - {-1}) == 1 for r in (1, 2, 3))


def test_whole_numbers_never_travel():
    "The counter of batch normalization stays, under every baseline."
    for change in engine.BASELINES.values():
        model = digits_model({})
        assert not any("tracked" in name for name in shared_keys(model, engine.local_patterns(full_config(change), model)))


def test_guard_counts_rounds_from_the_restart():
    "Schedules see the true round."
    rounds = []

    class Spy(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            rounds.append(server_round)
            return super().configure_train(server_round, arrays, config, grid)

    grid = LocalGrid(client_app(toy_model, toy_data), 3)
    arrays = engine.shared_arrays(engine.build_model(toy_model, full_config()))
    Guard(Spy(), offset=4, evaluate=False).start(grid, arrays, 2)
    assert rounds == [5, 6]


def test_private_runs():
    "Central and local privacy change the weights, repeat under a seed, and go through the guard."
    from hkust_demos.federated.privacy import private_mod, private_strategy, seeded_noise
    config = {**SHORT, "num-clients": 3, "dp-noise": 0.5, "dp-clip": 0.1}
    central = lambda: run_local(server_app(toy_model, make_strategy=private_strategy), client_app(toy_model, toy_data), 3, config).arrays
    local = lambda: run_local(server_app(toy_model), client_app(toy_model, toy_data, mods=[private_mod(config)]), 3, config).arrays
    for private in (central, local):
        runs = []
        for seed in (0, 0, 1):
            with seeded_noise(seed):
                runs.append(private())
        assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    with pytest.raises(ValueError, match="num-clients"):
        private_strategy(full_config())


def test_partitions_of_odd_sizes():
    "As many clients as examples, one client, and labels that are no labels."
    from hkust_demos.federated.partition import federate, label_skew
    assert [len(part) for part in federate(list(range(5)), "iid", num_clients=5)] == [1] * 5
    assert federate([0, 1, 0, 1], "iid", num_clients=1)[0].tolist() == [0, 1, 2, 3]
    for labels in ([0.5, 1.0], [[0, 1], [1, 0]]):
        with pytest.raises(ValueError, match="whole number"):
            federate(labels, num_clients=1)
    with pytest.raises(ValueError, match="no examples"):
        label_skew(np.array([[0, 0], [1, 2]]))
