"""Semantic memory, exits and threshold search: properties and edge cases beyond those that the notebook shows."""
import itertools
import math
from dataclasses import replace

import optuna
import pytest
import torch
from safetensors.torch import load_file, save_file

from hkust_demos.memristor.cam import ExitPolicy, SemanticMemory, class_centers, exit_scores, match
from hkust_demos.memristor.device import DeviceModel, read_sigma
from hkust_demos.memristor.thresholds import METHODS, budget_curve, exit_objective, search_thresholds

KINDS = ("proportional", "range", "wan2022")
WIDTHS, CLASSES = (6, 11, 16), 4
COST = torch.tensor([10.0, 20.0, 30.0, 32.0])
STATIC = 29.0


def made(n_samples=200, seed=0):
    "Nonnegative features of three exits that get clearer, and labels."
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_samples) % CLASSES
    features = []
    for exit_index, width in enumerate(WIDTHS):
        patterns = torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(exit_index))
        noise = torch.randn(n_samples, width, generator=generator) * (1.2 - 0.3 * exit_index)
        features.append(torch.relu(patterns[labels] + noise + 1))
    return features, labels


@pytest.fixture(scope="module")
def sample():
    return made()


@pytest.fixture(scope="module")
def memory(sample):
    return SemanticMemory.fit(*sample, CLASSES)


@pytest.fixture(scope="module")
def cached():
    "Similarities, logits, labels of samples that did not fit the memory."
    features, labels = made(300, seed=1)
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.nn.functional.one_hot(labels, CLASSES) + torch.randn(300, CLASSES, generator=generator)
    return SemanticMemory.fit(*made(), CLASSES).similarity(features), logits, labels


# what is stored

def test_means_and_centers_by_hand():
    feature = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    mean, centers = class_centers(feature, torch.tensor([0, 0, 1]), 2)
    assert torch.equal(mean, torch.tensor([2.0, 1.0])) and torch.equal(centers, torch.tensor([[-1.0, 0.0], [2.0, 0.0]]))
    mean, centers = class_centers(feature, torch.tensor([0, 0, 1]), 2, center=False)
    assert not mean.any() and torch.equal(centers, torch.tensor([[1.0, 1.0], [4.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ternary_rows_are_three_valued(sample, dtype):
    memory = SemanticMemory.fit([feature.to(dtype) for feature in sample[0]], sample[1], CLASSES)
    for rows in memory.centers:
        assert rows.dtype == dtype
        for row in rows:
            assert len(row.abs().unique()) <= 2 and row.abs().min() == 0


def test_uncentered_relu_features_have_no_negative_sign(sample):
    features, labels = sample
    assert all((rows >= 0).all() for rows in SemanticMemory.fit(features, labels, CLASSES, center=False).centers)
    assert all((rows < 0).any() for rows in SemanticMemory.fit(features, labels, CLASSES).centers)


def test_float_memory_keeps_its_centers(sample):
    memory = SemanticMemory.fit(*sample, CLASSES, ternary=False)
    for feature, mean, rows in zip(sample[0], memory.means, memory.centers):
        assert torch.allclose(rows[2] + mean, feature[sample[1] == 2].mean(0), atol=1e-6)
    quiet = memory.program(DeviceModel(write_noise=0), seed=0)
    assert torch.allclose(quiet.similarity(sample[0]), memory.similarity(sample[0]), atol=1e-5)


def test_fit_leaves_features_and_gradients_alone(sample):
    features = [feature.clone().requires_grad_() for feature in sample[0]]
    memory = SemanticMemory.fit(features, sample[1], CLASSES)
    assert not memory.centers[0].requires_grad and not memory.similarity(features).requires_grad
    assert all(torch.equal(feature, kept) for feature, kept in zip(features, sample[0]))


# similarity

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ternary", [True, False])
def test_similarity_stays_in_its_interval(sample, kind, ternary):
    memory = SemanticMemory.fit(*sample, CLASSES, ternary=ternary)
    device = DeviceModel(write_noise=0.3, read_noise=0.3, noise_kind=kind, stuck_on=0.02, stuck_off=0.02)
    chip = memory.program(device, seed=0)
    for generator in (None, torch.Generator().manual_seed(0)):
        sims = chip.similarity(made(seed=5)[0], generator=generator)
        assert sims.shape == (200, 3, CLASSES) and sims.isfinite().all() and sims.abs().max() <= 1


@pytest.mark.parametrize("factor", [1e-3, 0.5, 7.0, 1e4])
def test_similarity_ignores_positive_scaling_about_the_mean(sample, memory, factor):
    chip = memory.program(DeviceModel(), seed=3)
    features = [feature.double() for feature in sample[0]]
    chip = replace(chip, means=tuple(mean.double() for mean in chip.means),
                   programmed=tuple(replace(cells, g_pos=cells.g_pos.double(), g_neg=cells.g_neg.double()) for cells in chip.programmed))
    scaled = [mean + factor * (feature - mean) for feature, mean in zip(features, chip.means)]
    assert torch.allclose(chip.similarity(scaled), chip.similarity(features), atol=1e-10)


def test_similarity_is_the_cosine(sample, memory):
    sims = memory.similarity(sample[0])
    for index, (feature, mean, rows) in enumerate(zip(sample[0], memory.means, memory.centers)):
        expected = torch.nn.functional.cosine_similarity((feature - mean)[:, None], rows[None], dim=2)
        assert torch.allclose(sims[:, index], expected, atol=1e-5)


def test_blank_and_constant_inputs_match_nothing():
    features = [torch.zeros(8, 5), torch.full((8, 3), 0.1)]
    memory = SemanticMemory.fit(features, torch.arange(8) % 2, 2)
    for held in (memory, memory.program(DeviceModel(), seed=0)):
        for generator in (None, torch.Generator().manual_seed(0)):
            assert torch.equal(held.similarity(features, generator=generator), torch.zeros(8, 2, 2))
            assert torch.equal(held.similarity([torch.rand(8, 5), torch.rand(8, 3)], generator=generator), torch.zeros(8, 2, 2))


def test_rounding_is_no_sign():
    "Means of 0.1 differ in the last digit between classes of different size; that must not be stored as a pattern."
    generator = torch.Generator().manual_seed(0)
    constant = torch.rand(1, 50, dtype=torch.float64, generator=generator).expand(97, 50)
    labels = torch.tensor([0] * 7 + [1] * 31 + [2] * 59)
    assert any((constant[labels == k].mean(0) != constant.mean(0)).any() for k in range(3))
    assert not class_centers(constant, labels, 3)[1].any()
    assert not SemanticMemory.fit([constant], labels, 3).similarity([torch.rand(4, 50, dtype=torch.float64)]).any()


def test_a_feature_at_the_mean_matches_nothing(memory):
    blank = [mean[None] for mean in memory.means]
    assert torch.equal(memory.program(DeviceModel(), seed=0).similarity(blank), torch.zeros(1, 3, CLASSES))


@pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e30, 1e37])
def test_extreme_lengths_do_not_overflow(factor):
    deviation, stored = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), torch.eye(7)[:3]
    assert torch.allclose(match(deviation * factor, stored), match(deviation, stored), atol=1e-5)


def test_no_sample_gives_no_row(memory):
    assert memory.similarity([torch.zeros(0, width) for width in WIDTHS]).shape == (0, 3, CLASSES)


# chips

@pytest.mark.parametrize("ternary", [True, False])
def test_one_seed_is_one_chip_and_the_ideal_memory_stays(sample, ternary):
    memory = SemanticMemory.fit(*sample, CLASSES, ternary=ternary)
    before, state = [rows.clone() for rows in memory.centers], torch.get_rng_state()
    chips = [memory.program(DeviceModel(), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state()) and not memory.programmed
    assert all(torch.equal(rows, kept) for rows, kept in zip(memory.centers, before))
    assert all(torch.equal(a, b) for a, b in zip(chips[0].stored, chips[1].stored))
    assert not torch.equal(chips[0].stored[0], chips[2].stored[0])


def test_programming_again_starts_from_what_was_asked_for(memory):
    twice = memory.program(DeviceModel(write_noise=0.5), seed=0).program(DeviceModel(), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(twice.stored, memory.program(DeviceModel(), seed=1).stored))


@pytest.mark.parametrize("kind", KINDS)
def test_read_noise_has_the_spread_of_all_cells(memory, kind):
    "2e5 reads, 5 sigma: the standard error of a spread is spread / sqrt(2 n)."
    n_reads, device = 200_000, DeviceModel(read_noise=0.05, noise_kind=kind)
    chip = memory.program(device, seed=0)
    features = [made(1, seed=9)[0][index].expand(n_reads, -1) for index in range(3)]
    sims, exact = chip.similarity(features, generator=torch.Generator().manual_seed(0)), chip.similarity([f[:1] for f in features])
    for index, (cells, feature, mean) in enumerate(zip(chip.programmed, features, chip.means)):
        deviation = feature[0] - mean
        variance = cells.scale**2 * sum(read_sigma(g, device).square() for g in (cells.g_pos, cells.g_neg)) @ deviation.square()[:, None]
        spread = variance[:, 0].sqrt() / (deviation.norm() * cells.effective().norm(dim=1))
        inside = (exact[0, index].abs() + 6 * spread) < 1  # no clamp
        assert inside.any()
        assert torch.allclose(sims[:, index].std(0)[inside], spread[inside], rtol=5 / math.sqrt(2 * n_reads))
        error = (sims[:, index].double().mean(0) - exact[0, index]).abs()
        assert (error < 5 * spread / math.sqrt(n_reads) + 1e-6)[inside].all()


def test_noiseless_reads_and_ideal_memories_draw_nothing(sample, memory):
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    quiet = memory.program(DeviceModel(read_noise=0), seed=0)
    for held in (memory, quiet):
        assert torch.equal(held.similarity(sample[0], generator=generator), held.similarity(sample[0]))
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("device", [None, DeviceModel(write_noise=0.1, read_noise=0.05, noise_kind="wan2022", wan_time="1d", stuck_on=0.01)])
@pytest.mark.parametrize("ternary", [True, False])
def test_state_survives_a_file(sample, device, ternary, tmp_path):
    memory = SemanticMemory.fit(*sample, CLASSES, ternary=ternary)
    memory = memory.program(device, seed=0) if device else memory
    save_file(memory.state_dict(), tmp_path / "memory.safetensors")
    back = SemanticMemory.from_state_dict(load_file(tmp_path / "memory.safetensors"))
    read = lambda held: held.similarity(sample[0], generator=torch.Generator().manual_seed(1))
    assert torch.equal(read(back), read(memory)) and back.ternary == ternary
    assert [cells.device for cells in back.programmed] == [device] * (3 if device else 0)
    assert torch.equal(back.program(DeviceModel(), seed=4).stored[1], memory.program(DeviceModel(), seed=4).stored[1])


@pytest.mark.parametrize("gone", ["ternary", "mean.0", "center.1", "g_neg.2", "scale.0"])
def test_incomplete_states_are_refused(memory, gone):
    state = memory.program(DeviceModel(), seed=0).state_dict()
    del state[gone]
    with pytest.raises(ValueError, match="state lacks .*state_dict"):
        SemanticMemory.from_state_dict(state)


# refusals of the memory

def bad_labels(labels, **changes):
    "Labels with one of them changed."
    changed = labels.clone()
    changed[0] = changes["first"]
    return changed


@pytest.mark.parametrize("change, message", [
    (lambda f, y: (f, y.clamp(max=2), 4), "no sample of class 3"),
    (lambda f, y: (f, y, 6), "no sample of class 4, 5"),
    (lambda f, y: (f, bad_labels(y, first=4), 4), "labels reach"),
    (lambda f, y: (f, bad_labels(y, first=-1), 4), "labels reach"),
    (lambda f, y: (f, y.float(), 4), "labels is torch.float32"),
    (lambda f, y: (f, y[:-1], 4), "labels is .*shape"),
    (lambda f, y: (f, y, 1), "n_classes is 1"),
    (lambda f, y: (f, y, 4.0), "n_classes is 4.0"),
    (lambda f, y: ([], y, 4), "features is list"),
    (lambda f, y: (f[0], y, 4), "features is Tensor"),
    (lambda f, y: ([f[0], f[1][:-1]], y, 4), r"features\[1\] has 199 rows"),
    (lambda f, y: ([f[0].long()], y, 4), r"features\[0\] is torch.int64"),
    (lambda f, y: ([f[0][:, 0]], y, 4), r"features\[0\] is .*shape"),
    (lambda f, y: ([f[0], f[1] * math.nan], y, 4), r"features\[1\] holds NaN"),
    (lambda f, y: ([f[0] / 0], y, 4), r"features\[0\] holds NaN or infinite")])
def test_what_cannot_be_fitted(sample, change, message):
    with pytest.raises(ValueError, match=message):
        SemanticMemory.fit(*change(*sample))


@pytest.mark.parametrize("change, message", [
    (lambda f: f[:2], "features has 2 exits; this memory has 3"),
    (lambda f: [f[1], f[0], f[2]], r"features\[0\] has width 11"),
    (lambda f: [f[0], f[1], f[2] + math.inf], r"features\[2\] holds NaN or infinite"),
    (lambda f: [f[0][:5], f[1], f[2]], r"features\[1\] has 200 rows")])
def test_what_cannot_be_searched(sample, memory, change, message):
    with pytest.raises(ValueError, match=message):
        memory.similarity(change(sample[0]))


# exits

def slow_decision(sims, logits, cost, thresholds, score):
    "The rule as one would say it, sample by sample."
    answers = []
    for row, final in zip(sims.tolist(), logits.tolist()):
        for index, similarities in enumerate(row):
            first, second = sorted(similarities)[-1], sorted(similarities)[-2]
            if (first if score == "max" else torch.tensor(first) - torch.tensor(second)) >= torch.tensor(thresholds[index]):
                answers.append((similarities.index(first), index, cost[index].item()))
                break
        else:
            answers.append((final.index(max(final)), len(row), cost[-1].item()))
    return answers


@pytest.mark.parametrize("score, thresholds", [("max", [0.8, 0.7, 0.6]), ("margin", [0.5, 0.4, 0.3]), ("max", [math.inf, 0.75, -math.inf])])
def test_decisions_agree_with_the_rule(cached, score, thresholds):
    sims, logits, _ = cached
    found = ExitPolicy(thresholds, score=score).decide(sims, logits, COST)
    assert list(zip(*(part.tolist() for part in found))) == slow_decision(sims, logits, COST, thresholds, score)
    assert len(found.exit_index.unique()) > 1


@pytest.mark.parametrize("score", ["max", "margin"])
def test_extreme_thresholds(cached, score):
    sims, logits, _ = cached
    never = ExitPolicy(torch.full((3,), math.inf), score=score).decide(sims, logits, COST)
    assert torch.equal(never.pred, logits.argmax(1)) and (never.exit_index == 3).all() and (never.cost == 32).all()
    always = ExitPolicy([-math.inf] * 3, score=score).decide(sims, logits, COST)
    assert torch.equal(always.pred, sims[:, 0].argmax(1)) and (always.exit_index == 0).all() and (always.cost == 10).all()


@pytest.mark.parametrize("score", ["max", "margin"])
@pytest.mark.parametrize("lowered", range(3))
def test_lower_thresholds_never_delay(cached, score, lowered):
    sims, logits, _ = cached
    thresholds, last = torch.full((3,), 0.9), None
    for value in (0.9, 0.7, 0.5, 0.0, -1.0, -math.inf):
        thresholds[lowered] = value
        found = ExitPolicy(thresholds.clone(), score=score).decide(sims, logits, COST)
        assert last is None or ((found.exit_index <= last.exit_index).all() and (found.cost <= last.cost).all())
        last = found


def test_cost_rises_with_the_exit(cached):
    sims, logits, _ = cached
    found = ExitPolicy([0.8, 0.8, 0.8]).decide(sims, logits, COST)
    assert len(found.exit_index.unique()) == 4
    assert (found.cost[found.exit_index.argsort()].diff() >= 0).all()


def test_ties_go_to_the_lower_class_and_the_threshold_itself_fires():
    sims = torch.tensor([[[0.5, 0.5, 0.1]], [[0.1, 0.5, 0.5]], [[0.4, 0.3, 0.3]]])
    logits = torch.tensor([[1.0, 1.0, 1.0]] * 3)
    found = ExitPolicy([0.5]).decide(sims, logits, [1, 2])
    assert found.pred.tolist() == [0, 1, 0] and found.exit_index.tolist() == [0, 0, 1]
    assert ExitPolicy([0.0], score="margin").decide(sims, logits, [1, 2]).exit_index.tolist() == [0, 0, 0]
    assert ExitPolicy([0.05], score="margin").decide(sims, logits, [1, 2]).exit_index.tolist() == [1, 1, 0]


def test_no_sample_to_decide():
    found = ExitPolicy([0.5] * 3).decide(torch.zeros(0, 3, 4), torch.zeros(0, 4), COST)
    assert [part.shape for part in found] == [(0,)] * 3


def test_margin_of_two_classes():
    assert torch.allclose(exit_scores(torch.tensor([[[-0.5, 0.25]]]), score="margin"), torch.tensor([[0.75]]))


@pytest.mark.parametrize("change, message", [
    (lambda s, l, c: (s, l, c[:-1]), "exit_cost is"),
    (lambda s, l, c: (s, l, c.flip(0)), "never falling"),
    (lambda s, l, c: (s, l, c - 11), "at least 0"),
    (lambda s, l, c: (s, l, c * math.inf), "finite"),
    (lambda s, l, c: (s[0], l, c), "sims is"),
    (lambda s, l, c: (s.long(), l, c), "sims is torch.int64"),
    (lambda s, l, c: (s * math.nan, l, c), "sims holds NaN"),
    (lambda s, l, c: (s, l / 0, c), "logits holds NaN or infinite"),
    (lambda s, l, c: (s, l[:, :-1], c), "sims has shape"),
    (lambda s, l, c: (s, l[1:], c), "sims has shape"),
    (lambda s, l, c: (s[..., :1], l[:, :1], c), "at least 2")])
def test_what_cannot_be_decided(cached, change, message):
    with pytest.raises(ValueError, match=message):
        ExitPolicy([0.5] * 3).decide(*change(cached[0], cached[1], COST))


@pytest.mark.parametrize("policy, message", [(ExitPolicy([0.5] * 2), "must be 3 numbers"), (ExitPolicy([0.5, math.nan, 0.5]), "none NaN"),
                                             (ExitPolicy([0.5] * 3, score="entropy"), "score is 'entropy'")])
def test_policies_that_make_no_sense(cached, policy, message):
    with pytest.raises(ValueError, match=message):
        policy.decide(cached[0], cached[1], COST)


# search

def objective_of(cached, thresholds, tolerance=0.0, score="max", static_cost=STATIC):
    "J from the decisions, without the search's own bookkeeping."
    sims, logits, labels = cached
    found = ExitPolicy(thresholds, score=score).decide(sims, logits, COST)
    static = (logits.argmax(1) == labels).double().mean()
    accuracy = (found.pred == labels).double().mean()
    return exit_objective(accuracy, found.cost.mean(), target_accuracy=static - tolerance, static_cost=static_cost).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("score", ["max", "margin"])
@pytest.mark.parametrize("tolerance", [0.0, 0.02])
def test_results_are_what_the_policy_does_and_never_worse_than_never_leaving(cached, method, score, tolerance):
    found = search_thresholds(*cached, COST, method=method, score=score, tolerance=tolerance, static_cost=STATIC, trials=25)
    policy = ExitPolicy(found.thresholds, score=score).decide(*cached[:2], COST)
    assert found.accuracy == pytest.approx((policy.pred == cached[2]).double().mean().item(), abs=1e-12)
    assert found.cost == pytest.approx(policy.cost.mean().item(), abs=1e-9)
    reached = objective_of(cached, found.thresholds, tolerance, score)
    assert found.history[-1] == pytest.approx(reached, abs=1e-8)
    assert reached >= objective_of(cached, [math.inf] * 3, tolerance, score) - 1e-12
    assert found.history == sorted(found.history)


def test_searches_are_ordered(cached):
    best = {method: search_thresholds(*cached, COST, method=method, static_cost=STATIC, trials=25).history[-1] for method in METHODS}
    assert best["tpe"] >= best["coordinate"] >= best["global"]
    shared = search_thresholds(*cached, COST, method="global").thresholds
    assert len(shared.unique()) == 1


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_is_one_result(cached, method):
    options = dict(method=method, trials=15, restarts=2, tolerance=0.01)
    state = torch.get_rng_state()
    a, b = (search_thresholds(*cached, COST, seed=3, **options) for _ in range(2))
    assert torch.equal(a.thresholds, b.thresholds) and a[1:] == b[1:]
    assert torch.equal(state, torch.get_rng_state())


def test_trials_follow_the_seed(cached):
    "A coarse start leaves room, so that trials show in the history."
    options = dict(method="tpe", grid=2, restarts=0, trials=40, tolerance=0.02)
    histories = [search_thresholds(*cached, COST, seed=seed, **options).history for seed in (0, 0, 1)]
    assert histories[0] == histories[1] != histories[2] and histories[0][-1] > histories[0][0]


def test_incremental_evaluation_finds_the_best_cut(cached):
    "With one exit, coordinate descent is a search over all grid points."
    sims, logits, labels = cached[0][:, 1:2], *cached[1:]
    found = search_thresholds(sims, logits, labels, [20, 32], grid=40, restarts=0, rounds=1, static_cost=STATIC)
    ranks = torch.linspace(0, len(sims) - 1, 40, dtype=torch.float64).round().long()
    grid = [*exit_scores(sims)[:, 0].sort().values[ranks].tolist(), math.inf]
    static = (logits.argmax(1) == labels).double().mean()
    values = []
    for threshold in grid:
        result = ExitPolicy([threshold]).decide(sims, logits, [20, 32])
        values.append(exit_objective((result.pred == labels).double().mean(), result.cost.mean(), target_accuracy=static, static_cost=STATIC).item())
    assert found.history[-1] == pytest.approx(max(values), abs=1e-8)


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.03])
def test_many_starts_reach_the_exhaustive_optimum(cached, tolerance):
    sims, _, _ = cached
    ranks = torch.linspace(0, len(sims) - 1, 9, dtype=torch.float64).round().long()
    grid = torch.cat([exit_scores(sims).sort(0).values[ranks], torch.full((1, 3), math.inf)])
    optimum = max(objective_of(cached, list(point), tolerance) for point in itertools.product(*grid.T.tolist()))
    few, many = (search_thresholds(*cached, COST, static_cost=STATIC, tolerance=tolerance, grid=9, restarts=n).history[-1] for n in (0, 100))
    assert few <= many <= optimum + 1e-8
    assert many == pytest.approx(optimum, abs=1e-8)


def test_more_restarts_never_hurt(cached):
    reached = [search_thresholds(*cached, COST, tolerance=0.01, restarts=n).history[-1] for n in (0, 8)]
    assert reached[1] >= reached[0]


def test_exits_that_are_always_wrong_stay_closed(cached):
    sims, logits, labels = cached
    wrong = torch.nn.functional.one_hot((labels + 1) % CLASSES, CLASSES).float()[:, None].expand(-1, 3, -1)
    right = torch.nn.functional.one_hot(labels, CLASSES).float()
    for method in METHODS:
        found = search_thresholds(wrong, right, labels, COST, method=method, trials=10, static_cost=STATIC)
        assert found.thresholds.tolist() == [math.inf] * 3 and found.accuracy == 1 and found.cost == 32
        found = search_thresholds(right[:, None].expand(-1, 3, -1), right, labels, COST, method=method, trials=10, static_cost=STATIC)
        assert found.cost == 10 and found.accuracy == 1
        if method == "coordinate":  # nobody gets that far: the careful choice is never
            assert found.thresholds[1:].tolist() == [math.inf] * 2


def test_static_cost_defaults_to_never_leaving(cached):
    a, b = search_thresholds(*cached, COST), search_thresholds(*cached, COST, static_cost=32)
    assert torch.equal(a.thresholds, b.thresholds) and a.history == b.history


def test_one_sample_is_enough():
    found = search_thresholds(torch.tensor([[[0.2, 0.9]]]), torch.tensor([[0.0, 1.0]]), torch.tensor([1]), [1, 3], method="tpe", trials=3)
    assert found.accuracy == 1 and found.cost == 1


def test_logging_of_optuna_is_left_as_it_was(cached, caplog):
    level = optuna.logging.get_verbosity()
    optuna.logging.enable_propagation()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        search_thresholds(*cached, COST, method="tpe", trials=3)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG and not caplog.records
    finally:
        optuna.logging.disable_propagation()
        optuna.logging.set_verbosity(level)


@pytest.mark.parametrize("options, message", [
    (dict(method="luck"), "method is 'luck'"), (dict(score="entropy"), "score is 'entropy'"), (dict(tolerance=-0.1), "tolerance is"),
    (dict(tolerance=math.nan), "tolerance is"), (dict(grid=1), "grid is 1"), (dict(grid=1, method="global"), "grid is 1"),
    (dict(rounds=0), "rounds is 0"), (dict(restarts=-1), "restarts is -1"), (dict(restarts=2.5), "restarts is 2.5"),
    (dict(trials=0, method="tpe"), "trials is 0"), (dict(static_cost=0), "static_cost is 0"), (dict(static_cost=math.inf), "static_cost is inf")])
def test_searches_that_make_no_sense(cached, options, message):
    with pytest.raises(ValueError, match=message):
        search_thresholds(*cached, COST, **options)


@pytest.mark.parametrize("change, message", [
    (lambda s, l, y: (s, l, y + 1), "labels reach"), (lambda s, l, y: (s, l, y[1:]), "labels is"),
    (lambda s, l, y: (s[:0], l[:0], y[:0]), "labels is empty"), (lambda s, l, y: (s[:, :2], l, y), "exit_cost is")])
def test_search_sets_that_make_no_sense(cached, change, message):
    with pytest.raises(ValueError, match=message):
        search_thresholds(*change(*cached), COST)


# the curve

def test_curve_agrees_with_single_searches_and_policies(cached):
    features, labels = made(250, seed=7)
    judge = (SemanticMemory.fit(*made(), CLASSES).similarity(features), torch.nn.functional.one_hot(labels, CLASSES).float(), labels)
    curve = budget_curve(cached, judge, COST, tolerances=[0.02], static_cost=STATIC)
    found = search_thresholds(*cached, COST, tolerance=0.02, static_cost=STATIC)
    result = ExitPolicy(found.thresholds).decide(*judge[:2], COST)
    assert curve[0]["accuracy"] == pytest.approx((result.pred == labels).double().mean().item(), abs=1e-12)
    assert curve[0]["saved"] == pytest.approx(1 - result.cost.mean().item() / STATIC, abs=1e-12)


def test_more_tolerance_never_reaches_less_on_the_search_set(cached):
    tolerances = [0.0, 0.01, 0.02, 0.05, 0.1, 0.3]
    curve = budget_curve(cached, cached, COST, tolerances=tolerances, static_cost=STATIC)
    static = (cached[1].argmax(1) == cached[2]).double().mean().item()
    reached = [exit_objective(point["accuracy"], (1 - point["saved"]) * STATIC, target_accuracy=static - t, static_cost=STATIC).item()
               for point, t in zip(curve, tolerances)]
    assert [point["tolerance"] for point in curve] == tolerances
    assert all(b >= a - 1e-9 for a, b in zip(reached, reached[1:]))


@pytest.mark.parametrize("options, message", [(dict(tolerances=[]), "tolerance is"), (dict(tolerances=[0.1, 2]), "tolerance is"),
                                              (dict(restarts=-1), "restarts is -1"), (dict(grid=0), "grid is 0")])
def test_curves_that_make_no_sense(cached, options, message):
    with pytest.raises(ValueError, match=message):
        budget_curve(cached, cached, COST, **options)
