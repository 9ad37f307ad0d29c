"Properties of FedNPR beyond those that its notebook shows."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from hkust_demos.federated import engine, fednpr
from hkust_demos.federated.engine import ClientData, local_state, run_local, server_app
from hkust_demos.federated.fednpr import (RUN_CONFIG, LesionNet, NPRConfig, NPRRegulariser, Prototypes, balanced_softmax_loss, class_log_prior,
                                          client_app, extract_features, lesion_net, linear_probe, npr_config, npr_logits, npr_loss,
                                          recall_metrics, sinkhorn_assign, sinkhorn_plan, skin_federation, update_prototypes)
from hkust_demos.federated.fednpr_study import METRICS, NEEDS, NPR, VARIANTS, baselines, build_study, digits_federation, run_config

TINY = {**RUN_CONFIG, "rounds": 2, "skin-largest": 24, "npr-start": 0, "local-epochs": 1}


def normal(*shape, seed=0):
    "Standard normal numbers."
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Sinkhorn

def oracle_plan(similarity, eps, iters=2000):
    "Sinkhorn as the textbook writes it, in plain numbers of double precision."
    kernel = np.exp((similarity - similarity.max()) / eps)
    n, k = kernel.shape
    row, column = np.ones(n), np.ones(k)
    for _ in range(iters):
        column = (1 / k) / (kernel.T @ row)
        row = (1 / n) / (kernel @ column)
    return row[:, None] * kernel * column


@pytest.mark.parametrize("n, k, eps", [(30, 4, 0.05), (5, 3, 0.2), (2, 4, 0.5), (1, 4, 0.05), (50, 1, 0.05)])
def test_plan_agrees_with_the_textbook(n, k, eps):
    similarity = torch.rand(n, k, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 2 - 1
    plan = sinkhorn_plan(similarity, eps, 2000)
    np.testing.assert_allclose(plan.numpy(), oracle_plan(similarity.numpy(), eps), rtol=2e-3, atol=1e-4 / n)
    assert (plan.sum(0) - 1 / k).abs().max() < 1e-3 and (plan.sum(1) - 1 / n).abs().max() < 1e-3


def test_plan_follows_permutations_of_centers_and_survives_large_numbers():
    similarity, order = normal(20, 4), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(sinkhorn_plan(similarity)[:, order], sinkhorn_plan(similarity[:, order]))
    assert torch.isfinite(sinkhorn_plan(1e4 * similarity)).all()


@pytest.mark.parametrize("bad", [dict(similarity=torch.zeros(3)), dict(similarity=torch.zeros(0, 2)), dict(eps=0.0)])
def test_plan_refuses(bad):
    with pytest.raises(ValueError, match="similarity has shape"):
        sinkhorn_plan(**{"similarity": torch.zeros(3, 2), **bad})


def test_balanced_clusters_are_found_and_the_released_argmax_is_the_worst():
    truth = torch.arange(3).repeat_interleave(20)
    centers = F.normalize(normal(3, 16), dim=1)
    similarity = F.normalize(centers[truth] + 0.05 * normal(60, 16, seed=1), dim=1) @ centers.T
    assert torch.equal(sinkhorn_assign(similarity), truth) and torch.equal(similarity.argmax(1), truth)
    released = torch.softmax(-similarity.double().flatten() * 3 * math.log(60) / 0.05, 0).view(60, 3).argmax(1)
    assert not (released == truth).any()


# scores and losses

def oracle_loss(features, centers, targets, present, log_prior):
    "The NPR loss in NumPy, one example after the other."
    losses = []
    for f, y in zip(features, targets):
        if not present[y]:
            continue
        s = [max(float(f @ p / np.linalg.norm(f) / np.linalg.norm(p)) for p in group) for group in centers]
        inside = np.array(s)[present]
        z = (inside - inside.mean()) / np.sqrt(inside.var() + 1e-5) + log_prior[present]
        losses.append(np.log(np.exp(z).sum()) - z[int(np.sum(present[:y]))])
    return np.mean(losses)


@pytest.mark.parametrize("absent", [(), (1,), (0, 4)])
def test_loss_agrees_with_an_oracle(absent):
    features, centers, targets = normal(12, 6).double(), normal(5, 3, 6, seed=1).double(), torch.arange(12) % 5
    present, log_prior = torch.tensor([c not in absent for c in range(5)]), class_log_prior([5, 4, 3, 2, 1]).double()
    expected = oracle_loss(features.numpy(), centers.numpy(), targets.numpy(), present.numpy(), log_prior.numpy())
    assert abs(npr_loss(features, centers, targets, present, log_prior).item() - expected) < 1e-9


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_loss_turns_features_and_never_stretches_them(scale):
    features = (scale * normal(9, 7).double()).requires_grad_()
    centers = normal(4, 2, 7, seed=2).double().requires_grad_()
    loss = npr_loss(features, centers, torch.arange(9) % 4)
    loss.backward()
    assert centers.grad is None and (features.grad * features).sum(1).abs().max() < 1e-9
    assert abs(loss.item() - npr_loss(features.detach() / scale, centers, torch.arange(9) % 4).item()) < 1e-9


def test_two_classes_still_have_a_gradient_and_one_class_has_nothing_to_say():
    features, centers = normal(6, 5).requires_grad_(), normal(3, 2, 5, seed=1)
    two, one = torch.tensor([True, True, False]), torch.tensor([True, False, False])
    gradient, = torch.autograd.grad(npr_loss(features, centers, torch.arange(6) % 2, two), features)
    assert gradient.norm() > 0.01
    assert npr_loss(features, centers, torch.zeros(6, dtype=torch.long), one).item() == 0
    nobody = npr_loss(features, centers, torch.full((6,), 2), two)
    nobody.backward()
    assert nobody.item() == 0 and features.grad.abs().max() == 0


@pytest.mark.parametrize("features, targets, sentence", [
    (torch.zeros(4), torch.zeros(4, dtype=torch.long), "features has shape"), (torch.zeros(4, 6), torch.zeros(4, dtype=torch.long), "features has shape"),
    (torch.zeros(3, 5), torch.zeros(4, dtype=torch.long), "features has shape"), (torch.ones(2, 5), torch.tensor([0, 3]), "from 0 to 3"),
    (torch.ones(2, 5), torch.tensor([-1, 0]), "from -1 to 0")])
def test_loss_refuses(features, targets, sentence):
    with pytest.raises(ValueError, match=sentence):
        npr_loss(features, normal(3, 2, 5), targets)


def test_balanced_softmax_is_the_bayes_rule():
    "Logits of p(x | y) with the prior added give p(y | x): the loss is lowest at the true likelihoods."
    counts, likelihood = torch.tensor([6.0, 2.0]), torch.tensor([[0.7, 0.2], [0.3, 0.8]])  # x, y
    joint = likelihood * counts / counts.sum()
    logits = likelihood.log().requires_grad_()
    loss = sum(joint[x, y] * balanced_softmax_loss(logits[x:x + 1], torch.tensor([y]), counts) for x in range(2) for y in range(2))
    gradient, = torch.autograd.grad(loss, logits)
    assert gradient.abs().max() < 1e-6
    assert balanced_softmax_loss(logits, torch.tensor([0, 1]), counts, "none").shape == (2,)


@pytest.mark.parametrize("counts", [[0, 0], [-1, 2], [[1, 2]]])
def test_counts_that_are_none(counts):
    with pytest.raises(ValueError, match="class_counts"):
        class_log_prior(counts)


# prototypes

@pytest.mark.parametrize("n", [2, 3, 50])
def test_prototypes_stay_on_the_sphere_and_empty_ones_stay_put(n):
    prototypes = Prototypes(3, 8, 6, torch.Generator().manual_seed(1))
    before = prototypes.centers.clone()
    update_prototypes(prototypes, normal(n, 6), torch.zeros(n, dtype=torch.long))
    assert (prototypes.centers.norm(dim=-1) - 1).abs().max() < 1e-5
    moved = (prototypes.centers != before).any(-1).sum(1)
    assert 1 <= moved[0] <= min(n, 8) and moved[1:].tolist() == [0, 0] and prototypes.present.tolist() == [True, False, False]


def test_one_center_is_the_class_mean():
    prototypes, features = Prototypes(2, 1, 5), normal(9, 5)
    update_prototypes(prototypes, features, torch.ones(9, dtype=torch.long))
    torch.testing.assert_close(prototypes.centers[1, 0], F.normalize(F.normalize(features, dim=1).mean(0), dim=0))


def test_prototypes_carry_no_graph():
    prototypes, features = Prototypes(2, 2, 5), normal(9, 5).requires_grad_()
    update_prototypes(prototypes, features, torch.zeros(9, dtype=torch.long))
    assert not prototypes.centers.requires_grad


# the plug-in

def small_batch():
    "A batch of three classes, one of them with a single picture."
    return torch.rand(9, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0] * 4 + [1] * 4 + [2])


@pytest.mark.parametrize("options", [dict(num_clusters=0), dict(start=-1), dict(eps=0), dict(assign="best"), dict(lam=float("nan"))])
def test_settings_that_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        NPRConfig(**options)


def test_plug_in_state_survives_a_round_trip():
    net, batch = LesionNet().eval(), small_batch()
    one = NPRRegulariser(NPRConfig(), [4, 4, 1], seed=3, client=1)
    one.on_round_start(net, [batch])
    two = NPRRegulariser(NPRConfig(), [4, 4, 1], seed=3, client=1)
    two.load_state({name: tensor.clone() for name, tensor in one.state().items()})
    for plug in (one, two):
        plug.on_round_start(net, [batch])
    assert torch.equal(one.prototypes.centers, two.prototypes.centers) and one.prototypes.present.tolist() == [True, True, False]
    NPRRegulariser(NPRConfig(), [4, 4, 1]).load_state({})


@pytest.mark.parametrize("options", [{}, dict(mask_absent=False), dict(prior_adjust=True), dict(assign="random"), dict(num_clusters=1)])
def test_plug_in_gives_a_finite_loss_to_the_features_only(options):
    net, (images, labels) = LesionNet(num_classes=3), small_batch()
    plug = NPRRegulariser(NPRConfig(lam=1.0, **options), [4, 4, 1])
    plug.on_round_start(net, [(images, labels)])
    features, logits = net(images)
    plug.loss(features, labels, 1).backward()
    assert net.head.weight.grad is None and all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.trunk[0][0].parameters())
    assert net.training


def test_doubling_the_weight_doubles_the_gradient_at_every_parameter():
    "The released code adds the weight, so there nothing would change."
    images, labels = small_batch()
    found = []
    for lam in (0.5, 1.0):
        net = engine.build_model(lesion_net, {"seed": 0}).eval()
        plug = NPRRegulariser(NPRConfig(lam=lam), [4, 4, 1, 0, 0, 0, 0, 0])
        plug.on_round_start(net, [(images, labels)])
        plug.loss(net(images)[0], labels, 1).backward()
        found.append(torch.cat([p.grad.flatten() for p in net.trunk.parameters()]))
    torch.testing.assert_close(found[1], 2 * found[0])


# federated runs

def spied(config, **options):
    "A run whose messages are kept."
    seen = []

    def spy(message, context, call_next):
        reply = call_next(message, context)
        seen.extend([message, reply])
        return reply

    return run_local(server_app(lesion_net), client_app(mods=[spy], **options), 6, config), seen


def test_prototypes_are_in_no_message_but_in_the_client():
    result, seen = spied(TINY)
    names = {name for message in seen if message.has_content() for record in message.content.array_records.values() for name in record}
    assert names == set(engine.shared_keys(LesionNet(), ()))
    assert len(seen) == 24 and local_state(result.contexts[0])["plugin.centers"].shape == (8, 4, 48)
    numbers = {name for message in seen if message.has_content() for record in message.content.metric_records.values() for name in record}
    assert not any(word in name for name in numbers for word in ("center", "count", "prior", "proto"))


def test_a_personal_head_never_travels():
    result, seen = spied({**TINY, "keep-local": "head.*"})
    names = {name for message in seen if message.has_content() for record in message.content.array_records.values() for name in record}
    assert not any(name.startswith("head.") for name in names) and "head.weight" not in result.arrays
    heads = [local_state(context)["model.head.weight"] for context in result.contexts]
    assert not torch.equal(heads[0], heads[1])
    assert torch.equal(result.load(LesionNet(), client=1).head.weight, heads[1])


def test_runs_repeat_and_the_seed_matters():
    one, two, other = (run_local(server_app(lesion_net), client_app(), 6, {**TINY, "seed": seed}).arrays for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one) and not torch.equal(one["head.weight"], other["head.weight"])


def test_no_weight_is_no_plug_in():
    "With lam 0, and before the start, the run is exactly the one without prototypes."
    runs = [run_local(server_app(lesion_net), client_app(), 6, {**TINY, **changes}).arrays for changes in ({"npr-lam": 0.0}, {"npr-start": 2}, {})]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["trunk.0.0.weight"], runs[2]["trunk.0.0.weight"])


def test_one_pass_a_batch():
    "Features and logits come from one pass of the trunk; the released code needs two."
    net, calls = LesionNet(), []
    net.trunk.register_forward_hook(lambda *_: calls.append(1))
    images, labels = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
    plug = NPRRegulariser(NPRConfig(), [22, 21, 21, 0, 0, 0, 0, 0])
    plug.on_round_start(net, [(images, labels)])
    calls.clear()
    engine.train_model(net, TensorDataset(images, labels), config=engine.full_config(TINY), plugin=plug)
    assert len(calls) == 2


def test_a_client_of_one_class_and_one_of_a_single_picture():
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    sets = [TensorDataset(images, torch.zeros(12, dtype=torch.long)), TensorDataset(images, torch.arange(12) % 8), TensorDataset(images[:2], torch.tensor([0, 1]))]
    result = run_local(server_app(lesion_net), client_app(lesion_net, lambda c: ClientData(sets[c["partition-id"]], sets[1])), 3, TINY)
    assert all(tensor.isfinite().all() for tensor in result.arrays.values())


def test_another_number_of_classes_is_read_from_the_run():
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = ClientData(*[TensorDataset(images, torch.arange(12) % 3)] * 2)
    config = {**TINY, "num-classes": 3, "in-channels": 1}
    result = run_local(server_app(lesion_net), client_app(lesion_net, lambda c: data), 2, config)
    assert result.arrays["head.weight"].shape == (3, 48)


@pytest.mark.parametrize("strategy", [{"strategy": "fedprox", "proximal-mu": 0.01}, {"strategy": "fedavgm", "server-momentum": 0.5}, {"keep-local": "batchnorm"}])
def test_the_plug_in_does_not_care_about_the_strategy(strategy):
    result = run_local(server_app(lesion_net), client_app(), 6, {**TINY, **strategy})
    assert "plugin.centers" in local_state(result.contexts[5]) and all(t.isfinite().all() for t in result.arrays.values())


def test_dirichlet_clients_beyond_six():
    assert len(skin_federation(8, seed=2, largest=40, alpha=0.5).clients) == 8
    with pytest.raises(ValueError, match="num_clients is 0"):
        skin_federation(0)


# measures and the study

def test_recalls_of_a_missing_class_do_not_count():
    found = recall_metrics(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 0, 1]))
    assert found["balanced"] == 0.75 and math.isnan(found["recall"][2])


def test_probe_of_separable_features_is_perfect_and_features_keep_the_mode():
    labels = torch.arange(40) % 4
    features = torch.eye(4)[labels] + 0.01 * normal(40, 4)
    assert linear_probe((features, labels), (features, labels)) == 1
    net = LesionNet().eval()
    extract_features(net, [(torch.zeros(2, 3, 32, 32), torch.zeros(2))])
    assert not net.training


def test_every_row_of_the_study_has_a_configuration_that_the_engine_takes():
    for name in VARIANTS:
        config = engine.full_config(run_config(name, 1))
        assert config["seed"] == 1 and config["rounds"] == (25 if name.startswith("digits") else 30) and (not name.startswith(tuple(NEEDS)) or config["npr-start"] in (0, 10))
        assert npr_config(config).lam >= 0
    assert npr_config(run_config("npr/paper", 0)) == NPRConfig() and npr_config(run_config("npr/released", 0)).assign == "random"
    assert set(baselines().values()) <= set(VARIANTS) and "fedavg/bsm" in VARIANTS and len(NPR) == 13
    assert build_study().metrics == METRICS


def test_digits_are_real_and_dealt_once():
    clients, test, probe = digits_federation(1)
    assert sum(len(c.train) for c in clients) == len(torch.cat([c.train.tensors[0].flatten(1) for c in clients]).unique(dim=0))
    assert len(test) == 450 and len(probe) == 247


def test_module_hands_out_the_apps():
    assert all(app is not None for app in fednpr.flower_apps())
    assert npr_logits(normal(2, 5), normal(3, 1, 5)).shape == (2, 3)
