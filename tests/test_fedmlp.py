"FedMLP: what may never happen, the corners of its arithmetic, hostile replies, and a run that is broken off."
import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from hkust_demos.data.thorax import FINDINGS
from hkust_demos.federated import engine, fedmlp
from hkust_demos.federated.fedmlp_data import Federation, thorax_clients, thorax_federation
from hkust_demos.federated.multilabel import annotation_matrix, multilabel_metrics, read_annotations

SMALL = {**fedmlp.RUN_CONFIG, "rounds": 4, "mlp-stage1": 2, "images": 40, "test": 30, "mlp-negatives": 0.2, "mlp-positives": 0.2}
N_CLIENTS = 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(config=SMALL, data_fn=fedmlp.thorax_data, clients=N_CLIENTS, **options):
    "A small federation."
    server = engine.server_app(fedmlp.findings_net, make_strategy=fedmlp.make_strategy)
    return engine.run_local(server, fedmlp.client_app(data_fn=data_fn), clients, config, **options)


def tags_of(contexts):
    "The clients' tags."
    return [engine.local_state(context)["plugin.tags"] for context in contexts]


@pytest.fixture(scope="module")
def watched():
    "A run, bytes on the wire and strict clients, with the tags after each round."
    seen = []
    done = run(callback=lambda report: seen.append([tags.clone() for tags in tags_of(report.contexts)] if report.round_index else []))
    return done, seen


def same(first, second):
    "Two dictionaries of tensors are equal to the bit."
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_tags_only_grow_and_never_touch_what_is_labeled(watched):
    _, seen = watched
    annotated = annotation_matrix(N_CLIENTS, FINDINGS)
    assert all((tags == -1).all() for tags in seen[1] + seen[2])  # stage one, and the round in which prototypes are first sent
    for before, after in zip(seen[1:], seen[2:]):
        for k in range(N_CLIENTS):
            had = before[k] >= 0
            assert torch.equal(after[k][had], before[k][had]) and (after[k][:, annotated[k]] == -1).all()
    grown = [sum((tags >= 0).sum().item() for tags in row) for row in seen[1:]]
    assert grown[1] == 0 < grown[2] < grown[3]
    assert {*torch.cat(seen[-1]).unique().tolist()} == {-1, 0, 1}


def test_the_same_run_twice_and_as_objects_instead_of_bytes(watched):
    done, seen = watched
    again = run(serialize=False, strict=False)
    assert same(done.arrays, again.arrays) and all(map(torch.equal, seen[-1], tags_of(again.contexts)))


def test_hidden_labels_change_nothing_in_training(watched):
    "Whatever a client does not label may be anything: weights, tags and prototypes are the same to the bit."
    here = thorax_clients(SMALL)
    flipped = [torch.where(torch.from_numpy(labels), y, 1 - y) for labels, y in zip(here.annotated, here.truth)]
    other = Federation(here.inputs, flipped, here.annotated, here.test_inputs, here.test_truth, here.findings, "flipped")
    assert same(watched[0].arrays, run(data_fn=lambda config: other.data(config["partition-id"])).arrays)


@pytest.mark.parametrize("changes", [{"mlp-unknown": "negative"}, {"mlp-unknown": "fixmatch"}, {"mlp-adjust": True}, {"strategy": "fedprox", "proximal-mu": 0.01}])
def test_rivals_do_not_peek_either(changes):
    here, config = thorax_clients(SMALL), {**SMALL, "rounds": 1, "mlp-tags": False, **changes}
    flipped = [torch.where(torch.from_numpy(labels), y, 1 - y) for labels, y in zip(here.annotated, here.truth)]
    other = Federation(here.inputs, flipped, here.annotated, here.test_inputs, here.test_truth, here.findings, "flipped")
    assert same(run(config).arrays, run(config, data_fn=lambda c: other.data(c["partition-id"])).arrays)


def test_the_teacher_is_the_incoming_model_and_stays_so():
    here = thorax_clients(SMALL)
    config = engine.full_config({**SMALL, "partition-id": 1})
    model, data = engine.build_model(fedmlp.findings_net, config), here.data(1)
    received = copy.deepcopy(model.state_dict())
    plugin = fedmlp.FedMLPClient(fedmlp.mlp_config(config), data.train.tensors[1])
    plugin.on_round_start(model.eval(), engine.Batches(data.train, 64))
    engine.train_model(model, data.train, config=config, loss_fn=fedmlp.make_loss(config, data), plugin=plugin)
    assert same(plugin.teacher.state_dict(), received) and not plugin.teacher.training
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in plugin.teacher.parameters())
    assert not torch.equal(model.state_dict()["head.weight"], received["head.weight"])


def test_a_broken_run_goes_on_to_the_same_weights(tmp_path, watched):
    class Unplugged(Exception):
        pass

    def pull(report):
        if report.round_index == 3:
            raise Unplugged

    config = {**SMALL, "checkpoint-dir": str(tmp_path), "run-name": "broken"}
    with pytest.raises(Unplugged):
        run(config, callback=pull, state_dir=tmp_path)
    done = run(config, state_dir=tmp_path)
    assert same(done.arrays, watched[0].arrays) and all(map(torch.equal, tags_of(done.contexts), watched[1][-1]))


def test_annotators_that_drop_out_leave_their_prototypes_behind():
    "Client 2 is gone after round 2, when its prototypes had been sent: the others go on tagging nodules."
    seen = []
    with pytest.warns(engine.RejectedReply):
        run({**SMALL, "rounds": 5}, callback=lambda report: seen.append([context for context in tags_or_none(report.contexts)]),
            drop=lambda message: message.metadata.dst_node_id == 1002 and message.content["config"]["server-round"] > 2)
    nodules = [sum((tags[:, 2] >= 0).sum().item() for tags in row if tags is not None) for row in seen]
    assert nodules[2] == 0 < nodules[3] < nodules[4] < nodules[5]


def tags_or_none(contexts):
    "Tags of each client, None for one that never worked."
    return [engine.local_state(context).get("plugin.tags") for context in contexts]


def test_clients_that_label_all_or_nothing():
    word = "0,1,2,3,4;"
    done = run({**SMALL, "annotates": word}, clients=2)
    full, none = tags_of(done.contexts)
    assert (full == -1).all() and (none >= 0).any()
    assert np.isfinite(fedmlp.score_findings(done.load(fedmlp.findings_net(SMALL)), {**SMALL, "annotates": word})["map"])


def test_a_finding_that_nobody_labels_is_named():
    with pytest.raises(ValueError, match="nobody labels nodule"):
        thorax_federation(read_annotations("0;1;3;4", FINDINGS))
    with pytest.raises(engine.NoReplies, match="nobody labels nodule"):
        run({**SMALL, "annotates": "0;1;0;3;4"})


def extra(n_classes=3, dim=4, **changes):
    "A client's extra arrays."
    return {"prototypes": torch.randn(n_classes, 2, dim), "counts": torch.ones(n_classes, 2), "confidence": torch.full((n_classes,), 0.5), **changes}


def test_a_client_without_positives_does_not_count():
    protos, counts = torch.stack([torch.ones(1, 2, 4), torch.zeros(1, 2, 4)]), torch.tensor([[[3.0, 2.0]], [[5.0, 0.0]]])
    found = fedmlp.aggregate_prototypes(protos, [10, 90], np.ones((2, 1), bool), counts)
    assert torch.equal(found[0, 1], torch.ones(4)) and torch.allclose(found[0, 0], torch.full((4,), 0.1))


def test_all_annotators_gone_keeps_what_was_known():
    known = fedmlp.combine({}, [(10.0, extra())])
    silent = extra(counts=torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    after = fedmlp.combine(known, [(10.0, silent)])
    assert torch.equal(after["prototypes"][0], known["prototypes"][0]) and torch.equal(after["prototypes"][1], silent["prototypes"][1])


def test_hostile_prototypes_are_left_out_and_the_round_goes_on():
    class Liar(fedmlp.FedMLPClient):
        def arrays(self):
            found = super().arrays()
            return {**found, "prototypes": found["prototypes"] * torch.nan} if found else {}

    def make_plugin(config, data):
        kind = Liar if config["partition-id"] == 3 else fedmlp.FedMLPClient
        return kind(fedmlp.mlp_config(config), data.train.tensors[1])

    liars = engine.client_app(fedmlp.findings_net, fedmlp.thorax_data, make_loss=fedmlp.make_loss, make_plugin=make_plugin)
    server = engine.server_app(fedmlp.findings_net, make_strategy=fedmlp.make_strategy)
    with pytest.warns(engine.RejectedReply, match="prototypes holds NaN"):
        done = engine.run_local(server, liars, N_CLIENTS, SMALL)
    tags = torch.cat(tags_of(done.contexts))
    assert (tags[:, 3] == -1).all() and (tags[:, 0] >= 0).any() and all(torch.isfinite(value).all() for value in done.arrays.values())


@pytest.mark.parametrize("n, share, wanted", [(15, 0.05, 0), (20, 0.05, 1), (39, 0.05, 1), (40, 0.05, 2), (3, 1.0, 3), (100, 0.29, 29)])
def test_shares_are_rounded_down(n, share, wanted):
    score, free = torch.linspace(-1, -0.1, n)[:, None], torch.ones(n, 1, dtype=torch.bool)
    assert (fedmlp.select_pseudo_labels(score, free, 0.0, share) == 1).sum() == wanted


def test_positive_and_negative_tags_never_meet():
    generator = torch.Generator().manual_seed(0)
    score, free = torch.randn(200, 4, generator=generator), torch.rand(200, 4, generator=generator) < 0.7
    score[:5] = 0  # no side is nearer: a negative candidate
    tags = fedmlp.select_pseudo_labels(score, free, 1.0, 1.0)
    assert torch.equal(tags == 1, free & (score < 0)) and torch.equal(tags == 0, free & (score >= 0))


def test_scores_survive_dead_and_shifted_features():
    generator = torch.Generator().manual_seed(1)
    features, protos = torch.rand(30, 8, generator=generator), torch.rand(3, 2, 8, generator=generator)
    free = torch.ones(30, 3, dtype=torch.bool)
    plain, moved = (fedmlp.select_pseudo_labels(fedmlp.prototype_score(f, p), free, 0.2, 0.2) for f, p in ((features, protos), (features + 3, protos + 3)))
    assert torch.equal(plain, moved)
    dead = fedmlp.prototype_score(torch.zeros(5, 8), protos, center=False)
    assert torch.equal(dead, torch.zeros(5, 3))


def test_shuffled_clients_give_the_same_prototypes():
    generator = torch.Generator().manual_seed(2)
    extras = [(float(n), extra(counts=torch.randint(0, 3, (3, 2), generator=generator).float())) for n in (5, 9, 40)]
    first, second = (fedmlp.combine({}, [extras[i] for i in order]) for order in ((0, 1, 2), (2, 0, 1)))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_one_client_is_plain_training():
    "A single client that labels everything: the federation is training on the spot."
    config = {**SMALL, "annotates": "0,1,2,3,4", "rounds": 2}
    here = thorax_clients(config)
    model, full = engine.build_model(fedmlp.findings_net, engine.full_config(config)), engine.full_config(config)
    for number in (1, 2):
        engine.train_model(model, here.data(0).train, config=full, round_index=number, loss_fn=fedmlp.make_loss(config, here.data(0)), augment=fedmlp.jitter)
    done = run(config, clients=1)
    state = model.state_dict()
    assert all(torch.allclose(done.arrays[name], state[name], atol=1e-6) for name in done.arrays)


@pytest.mark.parametrize("call, told", [
    (lambda: fedmlp.partial_bce(torch.zeros(3, 2), torch.zeros(3, 3), torch.zeros(3, 2, dtype=torch.bool)), "same"),
    (lambda: fedmlp.select_pseudo_labels(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), -0.1, 0.1), "from 0 to 1"),
    (lambda: fedmlp.select_pseudo_labels(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.tensor([0.1, 2.0]), 0.1), "from 0 to 1"),
    (lambda: fedmlp.confident_share(torch.zeros(2, 2), 0.7, 0.7), "low < high"),
    (lambda: fedmlp.MLPConfig(low=0.7, high=0.3), "low below high"), (lambda: fedmlp.MLPConfig(negatives=1.2), "0 to 1"),
    (lambda: fedmlp.mask_labels(torch.zeros(3, 2), np.ones(3, bool)), "(N, C)"),
    (lambda: annotation_matrix(3, ("one",)), "2 or more"), (lambda: multilabel_metrics(torch.zeros(3), torch.zeros(3)), "N, C")])
def test_what_does_not_fit_is_refused_in_a_sentence(call, told):
    with pytest.raises(ValueError, match=told.replace("(", r"\(").replace(")", r"\)")):
        call()


def test_the_network_that_returns_logits_alone_works_until_features_are_needed():
    "Rivals without tags ask for logits only."
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(32 * 32, 5)

        def forward(self, image):
            return self.head(image.flatten(1))

    server = engine.server_app(lambda config: Bare())
    done = engine.run_local(server, fedmlp.client_app(lambda config: Bare()), N_CLIENTS, {**SMALL, "rounds": 1, "mlp-tags": False})
    assert json.loads(done.history.to_json())
