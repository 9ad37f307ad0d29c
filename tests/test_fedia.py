"Properties of FedIA beyond those that its notebook shows."
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from hkust_demos.data.lesions import LesionSet, drop_instances, lesion_federation, make_slices
from hkust_demos.federated import engine
from hkust_demos.federated.engine import ClientData, LocalGrid, RejectedReply, local_state, run_local, server_app
from hkust_demos.federated.fedia import (RUN_CONFIG, CorrectionTrigger, FedIAPlugin, FedIAStrategy, annotation_completeness, client_app, completeness_weights,
                                         correct_labels, count_instances, fit_line, foreground, iou_from_dice_loss, kept_labels, lesion_unet, make_strategy,
                                         overlap_metrics, soft_dice_loss)
from hkust_demos.federated.fedia_study import METRICS, VARIANTS, WORDS, baselines, build_study, run_config

TINY = {**RUN_CONFIG, "rounds": 3, "fedia-warmup": 2, "fedia-correction": "3", "local-epochs": 1, "lesion-sizes": "4,4,3", "lesion-keep": "0.2,0.3,1", "test-local": False}


def apps(data_fn=None):
    "Server and clients of the painted slices, or of other data."
    return server_app(lesion_unet, make_strategy=make_strategy), client_app(**({"data_fn": data_fn} if data_fn else {}))


@pytest.fixture(scope="module")
def trained():
    "Three rounds with three clients; all correct in the last."
    reports = []
    result = run_local(*apps(), 3, TINY, callback=reports.append)
    return result, reports


# counting

def flood(mask, corners=False):
    "Number of components, by flooding."
    left, found = {tuple(place) for place in np.argwhere(mask)}, 0
    while left:
        found, wave = found + 1, [left.pop()]
        while wave:
            place = wave.pop()
            near = {n for n in left if sum(abs(a - b) for a, b in zip(n, place)) == 1 or corners and max(abs(a - b) for a, b in zip(n, place)) == 1}
            left -= near
            wave += near
    return found


@pytest.mark.parametrize("shape", [(9, 11), (4, 5, 6)])
def test_components_agree_with_flooding(shape):
    for seed in range(6):
        mask = np.random.default_rng(seed).random(shape) < 0.3
        assert count_instances(mask) == flood(mask) and count_instances(mask, len(shape)) == flood(mask, corners=True)
    assert count_instances(np.zeros(shape)) == 0 and count_instances(torch.ones(shape)) == 1


def test_counts_do_not_depend_on_batches_or_order():
    found = lesion_federation(0, sizes=(4, 4, 3), keep=(0.2, 0.3, 1.0))
    labels, truth = found.clients[0].labels.numpy(), found.clients[0].truth.numpy()
    whole, order = annotation_completeness(labels, truth), [2, 0, 3, 1]
    assert annotation_completeness(labels[order], truth[order]) == whole
    parts = [sum(count_instances(mask) for mask in masks) for masks in (labels[:1], labels[1:], truth[:1], truth[1:])]
    assert (parts[0] + parts[1]) / (parts[2] + parts[3]) == whole
    stacked = np.zeros((2, 5, 5), int)
    stacked[:, 2, 2] = stacked[0, 0, 0] = 1
    assert count_instances(stacked) == 2 and sum(map(count_instances, stacked)) == 3  # what the released code counts, and what is there


def test_specks_do_not_count_where_a_smallest_size_is_set():
    mask = np.zeros((12, 12), int)
    mask[1:4, 1:4], mask[6, 6], mask[9, 1:3] = 1, 1, 1
    assert [count_instances(mask, smallest=n) for n in (1, 2, 3, 9, 10)] == [3, 2, 1, 1, 0]
    seen, given = mask.copy(), np.where(np.arange(12)[:, None] < 5, mask, 0)
    assert annotation_completeness([given], [seen]) == pytest.approx(1 / 3) and annotation_completeness([given], [seen], smallest=3) == 1


@pytest.mark.parametrize("labels, predictions", [([np.ones((3, 3))], []), ([np.ones((3, 3))], [np.ones((3, 4))]), ([np.full((3, 3), 2)], [np.ones((3, 3))])])
def test_completeness_refuses(labels, predictions):
    with pytest.raises(ValueError, match="needed"):
        annotation_completeness(labels, predictions)


# weights

@pytest.mark.parametrize("a, l", [([0.2, 0.9], [0.4, 0.3]), ([5.0, 0.1, 0.0], [1e-6, 0.5, 0.5]), ([0.3] * 4, [0.2] * 4), ([1.0], [0.0])])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_weights_are_weights(a, l, temperature):
    found = completeness_weights(a, l, temperature)
    assert np.isfinite(found).all() and abs(found.sum() - 1) < 1e-12 and (found >= 0).all()
    order = np.random.default_rng(0).permutation(len(a))
    np.testing.assert_allclose(completeness_weights(np.array(a)[order], np.array(l)[order], temperature), found[order])


def test_weights_agree_with_the_formula_and_are_monotone():
    a, l = np.array([0.2, 0.4, 1.0]), np.array([0.5, 0.4, 0.3])
    np.testing.assert_allclose(completeness_weights(a, l), np.exp(a / l) / np.exp(a / l).sum())
    for k in range(3):
        more, less = a + 0.1 * np.eye(3)[k], l - 0.1 * np.eye(3)[k]
        assert completeness_weights(more, l)[k] > completeness_weights(a, l)[k] and completeness_weights(a, less)[k] > completeness_weights(a, l)[k]


@pytest.mark.parametrize("a, l, t", [([0, 0], [1, 1], 1), ([1, -1], [1, 1], 1), ([1, 1], [1], 1), ([float("nan"), 1], [1, 1], 1), ([1, 1], [-1, 1], 1), ([1, 1], [1, 1], 0)])
def test_weights_refuse(a, l, t):
    with pytest.raises(ValueError, match="completeness is|loss is"):
        completeness_weights(a, l, t)


# correction and trigger

def test_correction_only_adds_and_is_idempotent():
    prob = torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = (torch.rand(5, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.2).to(torch.int16)
    for threshold in (0.2, 0.5, 0.8):
        found = correct_labels(prob, labels, threshold)
        assert (found >= labels).all() and found.dtype == labels.dtype and torch.equal(correct_labels(prob, found, threshold), found)
        assert torch.equal(found - labels, ((labels == 0) & (prob > max(threshold, 0.5))).to(labels))  # a pixel must be lesion for the network, whatever the threshold
    top = float(prob.max())
    assert torch.equal(correct_labels(prob, labels, top), labels)


@pytest.mark.parametrize("prob, labels, threshold", [(torch.zeros(2), torch.zeros(2), 0.0), (torch.zeros(2), torch.zeros(2), 1.0), (torch.zeros(2), torch.zeros(3), 0.5),
                                                    (torch.full((2,), 1.1), torch.zeros(2), 0.5), (torch.full((2,), -0.1), torch.zeros(2), 0.5)])
def test_correction_refuses(prob, labels, threshold):
    with pytest.raises(ValueError, match="threshold is|prob_fg has"):
        correct_labels(prob, labels, threshold)


@pytest.mark.parametrize("slope, intercept", [(0.02, 0.3), (0.0, 0.5), (-0.01, 0.9)])
def test_a_line_never_triggers(slope, intercept):
    trigger = CorrectionTrigger(5)
    assert all(trigger.update(r, slope * r + intercept) is None for r in range(1, 40))
    np.testing.assert_allclose(fit_line([slope * r + intercept for r in range(5)]), (slope, intercept), atol=1e-12)


def test_the_trigger_waits_for_the_warm_up_and_fires_once():
    trigger = CorrectionTrigger(6)
    found = [trigger.update(r, 0.1 * min(r, 4)) for r in range(1, 20)]  # bends within the warm-up
    assert found[:6] == [None] * 6 and [r for r in found if r] == [trigger.fired + 1] and trigger.fired > 6
    late = CorrectionTrigger(3)
    for r in (1, 3, 5, 9):  # a client that was often away
        late.update(r, 0.1 * min(r, 4))
    assert late.fired == 5  # 0.1 r is expected, 0.4 is there
    stranger = CorrectionTrigger(3)  # was there once in the warm-up: no line, no trigger
    assert [stranger.update(r, 1 / r) for r in range(3, 9)] == [None] * 6


def test_dice_and_iou_are_those_of_sets():
    for seed in range(5):
        p, y = (torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(seed)) < 0.4).float()
        loss = soft_dice_loss(p, y).item()
        assert abs(iou_from_dice_loss(loss) - ((p * y).sum() / ((p + y) > 0).sum()).item()) < 1e-4


# annotators and slices

@pytest.mark.parametrize("shape", [(20, 20), (6, 12, 12)])
def test_annotators_drop_whole_lesions(shape):
    instances = np.zeros(shape, np.int32)
    for n in range(1, 6):
        instances[..., 2 * n, 1:4] = n
    for keep in (0.0, 0.3, 0.7, 1.0):
        drawn = drop_instances(instances, keep, np.random.default_rng(3))
        shares = [drawn[instances == n].mean() for n in range(1, 6)]
        assert set(shares) <= {0.0, 1.0} and sum(shares) >= 1 and not drawn[instances == 0].any()
    assert drop_instances(instances, 0, np.random.default_rng(0)).sum() == (instances == 1).sum()
    assert not drop_instances(np.zeros(shape, int), 1, np.random.default_rng(0)).any()


def test_annotators_keep_their_share():
    instances = np.arange(1, 10_001).reshape(100, 100)
    assert abs(drop_instances(instances, 0.3, np.random.default_rng(0)).mean() - 0.3) < 0.02
    for keep in (-0.1, 1.1):
        with pytest.raises(ValueError, match="from 0 to 1"):
            drop_instances(instances, keep, np.random.default_rng(0))
    with pytest.raises(ValueError, match="whole numbers"):
        drop_instances(instances / 2, 0.5, np.random.default_rng(0))


def test_slices_hold_what_their_map_says():
    slices = make_slices(8, seed=3)
    for one in slices.instances.numpy():
        assert count_instances(one > 0, 2) == one.max() >= 3  # apart, by corners too
    inside = slices.truth.bool()
    assert slices.images[:, 0][inside].mean() > slices.images[:, 0][~inside].mean() + 0.2 and slices.images[:, 1][inside].mean() < slices.images[:, 1][slices.images[:, 1] > 0.2].mean()
    with pytest.raises(ValueError, match="at least 1"):
        make_slices(0)


# server

def noted(strategy, round_index, clients):
    "Tell a strategy what clients said: completeness, Dice loss."
    for k, (_, loss) in clients.items():
        strategy.note(round_index, k, {"dice-loss": loss, "corrected": 0.0, "completeness": 1.0})
    strategy.end_warmup(round_index, {k: a for k, (a, _) in clients.items()})


def test_a_client_that_was_away_gets_the_mean_until_it_replies():
    server = FedIAStrategy(2)
    noted(server, 1, {0: (0.2, 0.5), 1: (1.0, 0.5), 2: (0.5, 0.5)})
    noted(server, 2, {0: (0.2, 0.5), 1: (1.0, 0.5)})
    assert server.started == 2 and server.view(2).completeness is None
    three = server.weights(3, {0: 5, 1: 5, 2: 5})
    np.testing.assert_allclose([*three.values()], completeness_weights([0.2, 1.0, 0.6], [0.5] * 3))
    two = server.weights(3, {0: 5, 2: 5})
    assert two.keys() == {0, 2} and abs(sum(two.values()) - 1) < 1e-12
    noted(server, 3, {2: (0.4, 0.5), 0: (0.9, 0.5)})
    assert server.view(2).completeness == 0.4 and server.view(0).completeness == 0.2  # kept from the end of the warm-up


def test_an_estimate_in_doubt_counts_as_the_mean_of_the_others_until_it_falls():
    server, sizes = FedIAStrategy(2, doubt=1.5), {0: 5, 1: 5, 2: 5}
    for r in (1, 2):
        noted(server, r, {0: (0.2, 0.5), 1: (0.8, 0.5), 2: (9.0, 0.5)})
    np.testing.assert_allclose([*server.weights(3, sizes).values()], completeness_weights([0.2, 0.8, 0.5], [0.5] * 3))
    noted(server, 3, {0: (0.3, 0.5), 1: (0.9, 0.5), 2: (0.6, 0.5)})
    np.testing.assert_allclose([*server.weights(4, sizes).values()], completeness_weights([0.2, 0.8, 0.6], [0.5] * 3))
    noted(server, 4, {2: (0.1, 0.5)})
    assert server.view(2).completeness == 0.6  # believed once, kept


def test_nobody_believed_is_plain_averaging():
    server = FedIAStrategy(2, doubt=1.5)
    for r in (1, 2):
        noted(server, r, {0: (1.1, 0.5), 1: (9.0, 0.5)})
    server.view(0).completeness = 7.0
    assert server.weights(3, {0: 4, 1: 6}) == {0: 4.0, 1: 6.0}


def test_a_warm_up_that_is_too_short_goes_on_and_ends():
    server = FedIAStrategy(2)
    with pytest.warns(UserWarning, match="warm-up goes on"):
        noted(server, 2, {0: (9.0, 0.9), 1: (4.0, 0.9)})
    assert server.started is None and server.weights(3, {0: 4, 1: 6}) == {0: 4.0, 1: 6.0}
    noted(server, 3, {0: (0.5, 0.6), 1: (1.3, 0.6)})
    assert server.started == 3
    stubborn = FedIAStrategy(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for r in range(2, 7):
            noted(stubborn, r, {0: (9.0, 0.9), 1: (4.0, 0.9)})
    assert stubborn.started == 6  # three warm-ups are enough; the weights are what they are


def test_weights_end_as_released_or_stay():
    for stays in (True, False):
        server = FedIAStrategy(2, correction=4, reestimate=stays)
        for r in (1, 2):
            noted(server, r, {0: (0.2, 0.5), 1: (1.0, 0.5)})
        for k in (0, 1):
            server.note(4, k, {"dice-loss": 0.4, "corrected": 1.0, "completeness": 0.9})
        weights = server.weights(5, {0: 8, 1: 2})
        assert weights == {0: 8.0, 1: 2.0} if not stays else abs(weights[0] - 0.5) < 1e-12
        assert server.view(0).completeness == (0.9 if stays else 0.2)


def test_equal_clients_are_averaged_equally():
    server = FedIAStrategy(2)
    for r in (1, 2):
        noted(server, r, {k: (1.02, 0.3) for k in range(4)})
    np.testing.assert_allclose([*server.weights(3, {k: 9 for k in range(4)}).values()], 0.25)


@pytest.mark.parametrize("options, sentence", [(dict(warmup=1), "at least 2"), (dict(correction="later"), "correction is"), (dict(correction=-3), "correction is"), (dict(threshold=0.0), "threshold is")])
def test_strategy_refuses(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        FedIAStrategy(**options)


# whole runs

def test_everything_happens_in_a_run(trained):
    result, reports = trained
    frame = result.history.frame()
    train = frame[frame.phase == "train"]
    shares = np.array([[train[(train.metric == f"share[{k}]") & (train["round"] == r)].value.item() for k in range(3)] for r in (1, 2, 3)])
    np.testing.assert_allclose(shares.sum(1), 1)
    np.testing.assert_allclose(shares[:2], np.array([[4, 4, 3]] * 2) / 11)  # warm-up: sample counts
    last = [[train[(train.metric == name) & (train.client == k) & (train["round"] == r)].value.item() for k in range(3)] for name, r in (("completeness", 2), ("dice-loss", 3), ("corrected", 3))]
    assert last[2] == [1, 1, 1] and train[(train.metric == "corrected") & (train["round"] < 3) & (train.client >= 0)].value.sum() == 0
    np.testing.assert_allclose(shares[2], completeness_weights(last[0], last[1]) if TINY["fedia-reestimate"] else np.array([4, 4, 3]) / 11, atol=1e-6)


def test_corrected_masks_are_those_of_the_model_that_came_in(trained):
    result, reports = trained
    found = lesion_federation(0, sizes=(4, 4, 3), keep=(0.2, 0.3, 1.0))
    model = lesion_unet(TINY)
    model.load_state_dict(reports[2].arrays, strict=False)  # after round 2: what round 3 received
    for context, client in zip(result.contexts, found.clients):
        prob = foreground(model, [(client.images, client.labels)])
        assert torch.equal(kept_labels(context, client.labels), correct_labels(prob, client.labels, 0.8))


def test_masks_never_travel(trained):
    result, _ = trained
    assert all(set(result.arrays) == set(report.arrays) for report in trained[1]) and not any("label" in name for name in result.arrays)
    assert all("plugin.labels" in local_state(context) for context in result.contexts)


def test_two_runs_are_one_and_order_does_not_matter(trained):
    again = run_local(*apps(), 3, TINY)
    assert all(torch.equal(again.arrays[name], value) for name, value in trained[0].arrays.items())


def test_a_run_that_is_cut_goes_on_the_same(trained, tmp_path):
    class Plug(Exception):
        pass

    def pull(report):
        if report.round_index == 2:
            raise Plug
    config = {**TINY, "checkpoint-dir": str(tmp_path / "server"), "run-name": "cut"}
    with pytest.raises(Plug):
        run_local(*apps(), 3, config, callback=pull, state_dir=tmp_path / "clients")
    resumed = run_local(*apps(), 3, config, state_dir=tmp_path / "clients")
    assert all(torch.equal(resumed.arrays[name], value) for name, value in trained[0].arrays.items())


def test_a_dropped_client_leaves_the_others_their_weights():
    gone = lambda message: message.metadata.dst_node_id == 1001 and message.content["config"]["server-round"] == 3
    with pytest.warns(RejectedReply):
        result = run_local(*apps(), 3, {**TINY, "fedia-correction": "none"}, drop=gone)
    share = {row[3]: row[4] for row in result.history.rows if row[0] == 3 and row[3].startswith("share")}
    assert share["share[1]"] == 0 and abs(sum(share.values()) - 1) < 1e-9 and all(torch.isfinite(value).all() for value in result.arrays.values())


def test_other_strategies_hear_nothing_of_masks():
    result = run_local(*apps(), 3, {**TINY, "rounds": 1, "strategy": "fedprox", "proximal-mu": 0.01})
    names = {row[3] for row in result.history.rows}
    assert not {"completeness", "corrected"} & names and "dice-loss" in names


def test_another_network_and_other_pictures():
    images, masks = torch.randn(6, 3, 16, 16), torch.zeros(6, 16, 16, dtype=torch.long)
    masks[:, 4:8, 4:8] = 1
    result = run_local(*apps(lambda config: ClientData(TensorDataset(images, masks), TensorDataset(images, masks))), 2, {**TINY, "rounds": 2, "in-channels": 3, "test-local": True})
    assert {"dice", "recall"} <= {row[3] for row in result.history.rows if row[1] == "local"}


def test_empty_masks_agree():
    nothing = torch.stack([torch.ones(2, 4, 4), -torch.ones(2, 4, 4)], 1)
    assert overlap_metrics(nothing, torch.zeros(2, 4, 4, dtype=torch.long))["dice"] == 1
    assert overlap_metrics(-nothing, torch.zeros(2, 4, 4, dtype=torch.long))["dice"] == 0


# study

def test_rows_have_words_and_baselines():
    assert set(WORDS) == set(VARIANTS) and set(build_study().variants) == set(VARIANTS) and len(build_study().needs) == 1
    assert all(other in VARIANTS for other in baselines().values()) and baselines()["complete/fedia"] == "oracle"
    assert run_config("fedia", 3)["fedia-correction"] == "trigger" and run_config("fedia", 3)["fedia-temperature"] == 1.0  # the paper's form
    assert run_config("weights/t3", 0)["fedia-temperature"] == 3.0 and len(METRICS) == len(set(METRICS))
