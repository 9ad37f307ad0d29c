"LTUDA: targets, losses, mixing, prototypes, teacher, training and its resumption, scores, shipped networks, study."
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from hkust_demos.data.abdomen import ORGANS, abdomen_phantom
from hkust_demos.vision import ltuda
from hkust_demos.vision.ltuda import (RECIPES, PartialSegmenter, PrototypeBank, View, cross_set_mix, cross_site_partners, dead_classes, ema_update,
                                      evaluate_dice, full_targets, make_views, merge_labels, partial_bce, partial_targets, predict_all,
                                      prototype_loss, pseudo_labels, random_boxes, sinkhorn, slow_prototype_step, small_segmenter, small_unet,
                                      train_partial, view_losses, weak_view, window_hu)
from hkust_demos.vision.ltuda_evaluate import dice_table, entropy_map, hd95_table, largest_pieces, slide
from hkust_demos.vision.ltuda_prototypes import class_sinkhorn, prototype_step, spherical_kmeans


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def slices():
    "Sixteen slices, four of each site, 32 pixels."
    found = abdomen_phantom(4, 3, size=32)
    return tuple(torch.from_numpy(part) for part in (found.images, found.labels, found.task_ids))


@pytest.fixture(scope="module")
def first_stage(slices):
    "A few steps of CDA."
    return train_partial(*slices, "cda", steps=6, warmup=2, seed=1)


# ---- window and targets ----

def test_the_window_of_the_paper():
    assert window_hu(torch.tensor([-1000.0, -325, 0, 325, 2000])).tolist() == [-1, -1, 0, 1, 1]
    assert np.allclose(window_hu(np.array([-1000, 65], np.int16)), [-1, 0.2])
    assert window_hu(torch.tensor([0.0]), -160, 240).item() == pytest.approx(-0.2)
    with pytest.raises(ValueError, match="below"):
        window_hu(torch.zeros(1), 5, 5)


def test_partial_targets_know_one_channel(slices):
    _, labels, tasks = slices
    targets = partial_targets(labels, tasks)
    for one, label, task in zip(targets, labels, tasks.tolist()):
        assert torch.equal(one[task - 1], (label == task).float())
        assert (one[[k for k in range(4) if k != task - 1]] == -1).all()
    assert torch.equal(full_targets(labels).sum(1), (labels > 0).float())


@pytest.mark.parametrize("labels, tasks", [(torch.zeros(2, 8, 8), [1, 2]), (torch.full((2, 8, 8), 5), [1, 2]), (torch.full((2, 8, 8), -1), [1, 2]),
                                           (torch.zeros(2, 8, 8, dtype=torch.long), [0, 2]), (torch.zeros(2, 8, 8, dtype=torch.long), [1, 5]),
                                           (torch.zeros(2, 8, 8, dtype=torch.long), [1])])
def test_labels_and_tasks_that_do_not_exist_are_refused(labels, tasks):
    with pytest.raises(ValueError, match=r"0\.\.4|1\.\.4"):
        partial_targets(labels, torch.tensor(tasks))


# ---- the partial loss ----

def test_unknown_channels_get_no_gradient_and_do_not_matter(slices):
    _, labels, tasks = slices
    targets = partial_targets(labels, tasks)
    logits = torch.randn(targets.shape, generator=chance()).requires_grad_()
    for reduction in ("sum", "mean"):
        for normalise in ("all", "known"):
            loss = partial_bce(logits, targets, reduction, normalise)
            (gradient,) = torch.autograd.grad(loss, logits)
            assert (gradient[targets == -1] == 0).all() and (gradient[targets >= 0] != 0).any()
            wild = logits.detach().where(targets >= 0, torch.tensor(float("inf")))
            assert partial_bce(wild, targets, reduction, normalise) == loss


def test_all_known_is_the_common_loss():
    targets = (torch.rand(3, 4, 8, 8, generator=chance()) < 0.3).float()
    logits = torch.randn(3, 4, 8, 8, generator=chance(1))
    common = F.binary_cross_entropy_with_logits(logits, targets)
    assert torch.allclose(partial_bce(logits, targets), 3 * common) and torch.allclose(partial_bce(logits, targets, "mean"), common)
    assert torch.allclose(partial_bce(logits, targets, "mean", "known"), common)


def test_the_released_form_divides_by_all_pixels_and_the_other_by_known_ones():
    targets, logits = torch.full((2, 2, 4, 4), -1.0), torch.zeros(2, 2, 4, 4)
    targets[0, 0, :2] = 1  # 8 of 32 pixels of one channel
    log2 = torch.tensor(2.0).log()
    assert torch.allclose(partial_bce(logits, targets), log2 * 8 / 16) and torch.allclose(partial_bce(logits, targets, "mean", "known"), log2)


@pytest.mark.parametrize("logits, targets, words", [(torch.zeros(2, 4, 8, 8), torch.full((2, 4, 8, 8), -1.0), "unknown"),
                                                    (torch.zeros(2, 4, 8, 8), torch.full((2, 4, 8, 8), 0.5), "only -1"),
                                                    (torch.zeros(2, 4, 8, 8), torch.zeros(2, 3, 8, 8), "shape")])
def test_targets_that_cannot_be_learned_are_refused(logits, targets, words):
    with pytest.raises(ValueError, match=words):
        partial_bce(logits, targets)
    with pytest.raises(ValueError, match="sum or mean"):
        partial_bce(logits, torch.zeros_like(logits), "median")


# ---- pseudo-labels and merging ----

def test_pseudo_labels_take_the_likeliest_organ_or_background():
    logits = torch.tensor([[-1.0, -2, -3, -4], [1, 3, 2, 0], [-9, 0.1, -9, -9]])[:, :, None, None]
    assert pseudo_labels(logits).flatten().tolist() == [0, 2, 2] and pseudo_labels(logits, 0.9).flatten().tolist() == [0, 2, 0]


def test_merging_keeps_the_own_organ_and_covers_every_pixel():
    generator = chance(5)
    labels, pseudo = (torch.randint(0, 5, (40, 6, 6), generator=generator) for _ in range(2))
    tasks = torch.randint(1, 5, (40,), generator=generator)
    merged, labeled, unlabeled = merge_labels(labels, tasks, pseudo)
    t, own = tasks[:, None, None], labels == tasks[:, None, None]
    assert (merged[own] == t.expand_as(merged)[own]).all() and not (merged == t)[~own].any()
    assert torch.equal(merged[~own & (pseudo != t)], pseudo[~own & (pseudo != t)])
    both = (labeled > 0) & (unlabeled > 0)
    assert not both.any() and ((labeled >= 0) | (unlabeled >= 0)).all()
    assert torch.equal(torch.maximum(labeled, unlabeled), merged) and torch.equal((labeled == 0), (unlabeled == 0))


# ---- boxes and mixing ----

def test_boxes_keep_the_area_they_drew():
    masks = random_boxes(4000, 64, generator=chance())
    area = 1 - masks.mean((1, 2, 3))
    assert 0.018 < area.min() and area.max() < 0.405
    deciles = torch.quantile(area, torch.linspace(0, 1, 11))
    assert torch.allclose(deciles, torch.linspace(0.02, 0.4, 11), atol=0.015)  # uniform: big boxes are not thinned out by those that do not fit
    assert abs(area.mean() - 0.21) < 0.005 and abs(area.std() - 0.38 / 12**0.5) < 0.005


def test_boxes_are_rectangles_of_the_drawn_shape_inside_the_picture():
    for mask in random_boxes(300, (48, 80), generator=chance(1))[:, 0]:
        inside = (mask == 0).nonzero()
        low, high = inside.amin(0), inside.amax(0) + 1
        assert len(inside) == (high - low).prod() and 0.28 < (high - low)[0] / (high - low)[1] < 3.6
    assert torch.equal(random_boxes(5, 32, generator=chance(2)), random_boxes(5, 32, generator=chance(2)))


@pytest.mark.parametrize("area, aspect", [((0.0, 0.4), (0.3, 3)), ((0.1, 1.2), (0.3, 3)), ((0.4, 0.1), (0.3, 3)), ((0.1, 0.5), (3, 4)), ((0.1, 0.2), (-1, 2))])
def test_boxes_that_never_fit_are_refused(area, aspect):
    with pytest.raises(ValueError, match="area"):
        random_boxes(2, 32, area, aspect)


def test_mixing_is_a_paste_from_the_next_image():
    places = torch.arange(4 * 8 * 8).view(4, 8, 8)
    mask = random_boxes(4, 8, generator=chance(3))
    image, index = cross_set_mix(mask, places[:, None].float(), places)
    assert index.dtype == torch.long and torch.equal(image[:, 0].long(), index)
    outside = mask[:, 0].bool()
    assert torch.equal(index[outside], places[outside]) and torch.equal(index[~outside], places.roll(-1, 0)[~outside])
    (same,) = cross_set_mix(torch.ones(4, 1, 8, 8), places)
    (next_one,) = cross_set_mix(torch.zeros(4, 1, 8, 8), places)
    assert torch.equal(same, places) and torch.equal(next_one[3], places[0])
    a, b = torch.randn(2, 4, 3, 8, 8, generator=chance()).unbind()
    assert torch.allclose(cross_set_mix(mask, 2 * a - b)[0], 2 * cross_set_mix(mask, a)[0] - cross_set_mix(mask, b)[0])
    with pytest.raises(ValueError, match="at least 2"):
        cross_set_mix(torch.ones(1, 1, 8, 8), places[:1])


def test_partners_of_other_sites():
    for seed in range(50):
        tasks = torch.randint(1, 5, (8,), generator=chance(seed))
        partners = cross_site_partners(tasks)
        assert sorted(partners.tolist()) == list(range(8))
        if tasks.bincount().max() <= 4:
            assert (tasks[partners] != tasks).all()
    mixed = cross_set_mix(torch.zeros(2, 1, 4, 4), torch.tensor([1, 2])[:, None, None].expand(2, 4, 4), partners=torch.tensor([1, 0]))[0]
    assert mixed[:, 0, 0].tolist() == [2, 1]


def test_the_weak_view_moves_picture_and_labels_alike():
    labels = torch.zeros(64, 32, 32, dtype=torch.long)
    labels[:, 8:20, 10:26] = 2
    images = labels[:, None].float() / 2 * 1.6 - 0.8
    x, y = weak_view(images, labels, chance())
    assert set(y.unique().tolist()) == {0, 2} and x.min() >= -1 and x.max() <= 0.8 + 1e-5
    assert (((x[:, 0] > 0) == (y == 2)).float().mean()) > 0.98
    still = torch.isclose(x, images, atol=1e-5).flatten(1).all(1)
    assert 0.1 < still.float().mean() < 0.45  # a quarter is neither scaled nor turned
    sizes = (y == 2).flatten(1).sum(1) / 192
    assert sizes.min() > 0.5 and sizes.max() < 1.65
    assert (x[:, 0, 0, 0] + 1).abs().min() < 1e-6  # air comes in where a picture shrank


# ---- prototypes ----

def test_sinkhorn_shares_out_evenly():
    scores = torch.rand(400, 5, generator=chance()) * 2 - 1
    q = sinkhorn(scores)
    assert torch.allclose(q.sum(1), torch.ones(400), atol=1e-5)
    assert (sinkhorn(scores, 60).sum(0) - 80).abs().max() < 0.1
    assert (q.sum(0) - 80).abs().max() < (scores.div(0.05).softmax(1).sum(0) - 80).abs().max()
    assert torch.allclose(sinkhorn(torch.full((7, 4), 0.3)), torch.full((7, 4), 0.25))
    assert torch.allclose(sinkhorn(scores[:2]).sum(1), torch.ones(2), atol=1e-5) and sinkhorn(scores[:0]).shape == (0, 5)
    assert sinkhorn(1e4 * scores).isfinite().all()


def test_all_classes_at_once_equal_one_after_the_other():
    scores, target = torch.rand(300, 4, generator=chance()).double(), torch.randint(0, 6, (300,), generator=chance(1))
    fast = class_sinkhorn(scores, target, 6)
    for k in range(6):
        assert torch.allclose(fast[target == k], sinkhorn(scores[target == k]), atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_the_fast_update_is_the_plain_one(momentum):
    e = F.normalize(torch.randn(500, 16, generator=chance(), dtype=torch.float64), dim=1)
    P = F.normalize(torch.randn(5, 3, 16, generator=chance(1), dtype=torch.float64), dim=2)
    target = torch.randint(-1, 4, (500,), generator=chance(2))  # the last class has no pixels
    fast, slow = prototype_step(P, e, target, momentum=momentum), slow_prototype_step(P, e, target, momentum)
    assert torch.equal(fast[1], slow[1]) and torch.allclose(fast[0], slow[0], atol=1e-10)
    assert torch.allclose(fast[0].norm(dim=2), torch.ones(5, 3, dtype=torch.float64))
    assert torch.equal(fast[0][4], P[4]) and torch.equal(fast[1] == -1, target == -1)
    if momentum == 1:
        assert torch.allclose(fast[0], P)
    if momentum == 0:
        mine = e[fast[1] == 4]
        assert torch.allclose(fast[0][1, 1], F.normalize(mine.sum(0), dim=0))


def test_pixels_that_are_wrong_have_a_prototype_and_move_none():
    bank = PrototypeBank(3, 2, 8, 0.5)
    e, target = F.normalize(torch.randn(60, 8, generator=chance()), dim=1), torch.arange(60) % 3
    before = bank.prototypes.clone()
    chosen = bank.update(e, target, predicted=(target + 1) % 3)
    assert torch.equal(bank.prototypes, before) and torch.equal(chosen // 2, target)
    bank.update(e, target, predicted=torch.zeros_like(target))
    assert not torch.equal(bank.prototypes[0], before[0]) and torch.equal(bank.prototypes[1:], before[1:])
    with pytest.raises(ValueError, match="argmax, gumbel"):
        bank.update(e, target, assign="soft")


def test_banks_are_buffers_on_the_sphere():
    bank = PrototypeBank()
    assert not list(bank.parameters()) and bank.prototypes.shape == (5, 5, 64) and bank.momentum == 0.999
    assert torch.allclose(bank.prototypes.norm(dim=2), torch.ones(5, 5))
    e = bank.prototypes.flatten(0, 1)
    assert torch.equal(bank.logits(e).argmax(1), torch.arange(25) // 5) and bank.similarity(e).shape == (25, 5, 5)


def test_prototype_loss_adds_its_three_parts():
    S = torch.rand(30, 5, 4, generator=chance()) * 2 - 1
    target, chosen = torch.arange(30) % 5, torch.full((30,), -1)
    chosen[:10] = (target * 4 + 1)[:10]
    g = S.amax(2)
    plain = F.cross_entropy(g, target)
    assert torch.equal(prototype_loss(g, target, S, torch.full((30,), -1)), plain)
    flat = S[:10].flatten(1)
    near = (1 - flat[torch.arange(10), chosen[:10]]).square().mean()
    expected = plain + 0.01 * F.cross_entropy(flat, chosen[:10]) + 0.001 * near
    assert torch.allclose(prototype_loss(g, target, S, chosen), expected)
    rare = torch.zeros(30, dtype=torch.long)
    rare[0] = 3
    balanced = prototype_loss(g, rare, S, torch.full((30,), -1), balanced=True)
    by_class = torch.stack([F.cross_entropy(g[rare == k], rare[rare == k]) for k in (0, 3)]).mean()
    assert torch.allclose(balanced, by_class)


def test_kmeans_banks_begin_where_the_data_are():
    centers = F.normalize(torch.randn(4, 16, generator=chance()), dim=1)
    e = F.normalize(centers[torch.arange(200) % 4] + 0.05 * torch.randn(200, 16, generator=chance(1)), dim=1)
    found = spherical_kmeans(e, 4)
    assert ((found @ centers.T).amax(0) > 0.98).all() and torch.allclose(found.norm(dim=1), torch.ones(4))


# ---- network and teacher ----

def test_the_segmenter_answers_in_three_ways(slices):
    torch.manual_seed(0)
    model = PartialSegmenter().eval()
    output = model(slices[0][:2])
    assert output.logits.shape == (2, 4, 32, 32) and output.features.shape == (2, 64, 32, 32)
    for classifier in ltuda.CLASSIFIERS:
        said = model.predict(slices[0][:2], classifier)
        assert said.shape == (2, 32, 32) and said.dtype == torch.long and said.min() >= 0 and said.max() <= 4
    e = model.embed(output.features)
    assert e.shape == (2048, 64) and torch.allclose(e.norm(dim=1), torch.ones(2048), atol=1e-5)
    direct = model.class_norm(model.unlabeled.logits(e)).argmax(1)
    assert torch.equal(model.predict(slices[0][:2], "unlabeled").flatten(), direct)
    assert (model.predict(slices[0][:2], threshold=1.0) == 0).all()
    with pytest.raises(ValueError, match="linear, labeled, unlabeled"):
        model.predict(slices[0], "both")
    with pytest.raises(ValueError, match="multiples of 8"):
        model(torch.zeros(1, 1, 30, 32))


def test_another_backbone_fits():
    from monai.networks.nets import BasicUNet
    model = PartialSegmenter(BasicUNet(2, 1, 8, features=(8, 8, 8, 8, 8, 8)), 2, 8)
    assert model(torch.zeros(2, 1, 32, 32)).logits.shape == (2, 2, 32, 32)


def test_the_teacher_follows():
    student, teacher = small_segmenter(), small_segmenter().requires_grad_(False)
    student.backbone(torch.randn(4, 1, 32, 32))  # batch norm takes note
    old = [p.clone() for p in teacher.parameters()]
    ema_update(teacher, student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(old, teacher.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(student.buffers(), teacher.buffers()))
    assert {b.dtype for b in teacher.buffers()} == {torch.float32, torch.int64} and torch.equal(teacher.labeled.prototypes, student.labeled.prototypes)
    ema_update(teacher, student, 0.5)
    assert all(torch.allclose(c, (a + b) / 2, atol=1e-6) for a, b, c in zip(old, student.parameters(), teacher.parameters()))
    ema_update(teacher, student, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters()))


# ---- training ----

def test_views_are_told_what_their_recipe_says(slices):
    images, labels, tasks = (part[:8] for part in slices)
    seen = {}
    for kind in ("partial", "background", "full"):
        (weak,) = make_views(images, labels, tasks, replace(RECIPES["ignore"], targets=kind), None, chance())
        seen[kind] = weak.targets
        assert (weak.unlabeled[weak.merged == 0] == 0).all()
    assert torch.equal(seen["partial"].clamp(min=0), seen["background"]) and (seen["full"] >= seen["background"]).all()
    views = make_views(images, labels, tasks, RECIPES["cda"], small_segmenter(), chance())
    assert len(views) == 3 and isinstance(views[0], View) and not torch.equal(views[1].images, views[2].images)
    for view in views[1:]:
        known = (view.targets >= 0).any(1)
        assert known.all()  # every pixel of a mixed view has the one known channel of the image it came from


def test_losses_of_a_recipe(slices):
    images, labels, tasks = (part[:8] for part in slices)
    student = small_segmenter()
    for name, terms in (("ignore", {"partial"}), ("ignore+mix", {"partial"}), ("cda", {"partial", "pseudo"}), ("pda", {"partial", "pseudo", "prototypes"})):
        recipe = RECIPES[name]
        views = make_views(images, labels, tasks, recipe, student, chance())
        found = view_losses(student, views, recipe, recipe.pseudo, chance())
        assert set(found) == terms and all(term.isfinite() and term > 0 for term in found.values())
        assert set(view_losses(student, views, recipe, False, chance())) == {"partial"}


def test_unlabeled_organs_of_the_truth_are_never_looked_at(slices):
    images, labels, tasks = slices
    hidden = labels.where(labels == tasks[:, None, None], 0)
    for method in ("ignore", "background", "cda"):
        seeing, blind = (train_partial(images, told, tasks, method, steps=3, warmup=1) for told in (labels, hidden))
        assert all(torch.equal(a, b) for a, b in zip(seeing.student.parameters(), blind.student.parameters()))


def test_a_training_learns_and_is_the_same_each_time(slices):
    images, labels, tasks = slices
    result = train_partial(*slices, "full", steps=40, seed=2)
    assert result.history[-1]["partial"] < 0.6 * result.history[0]["partial"] and [r["step"] for r in result.history] == list(range(1, 41))
    assert evaluate_dice(result.student, images, labels)["liver"] > 0.25  # liver everywhere would be 0.17
    again = train_partial(*slices, "full", steps=3, seed=2), train_partial(*slices, "full", steps=3, seed=2), train_partial(*slices, "full", steps=3, seed=3)
    first, second, other = (next(r.student.backbone.parameters()) for r in again)
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not any(p.requires_grad for p in result.teacher.parameters())


def test_a_second_stage_begins_where_the_first_ended(slices, first_stage):
    result = train_partial(*slices, "pda", first_stage, steps=2, lr=0.0)
    for name in ("backbone", "head"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(result.student, name).parameters(), getattr(first_stage.student, name).parameters()))
    for bank in (result.student.labeled, result.student.unlabeled):
        assert torch.allclose(bank.prototypes.norm(dim=2), torch.ones(5, 5), atol=1e-5)
    one = train_partial(*slices, "pda", first_stage, steps=1, num_prototypes=2)
    assert one.student.labeled.prototypes.shape == (5, 2, 16)


def test_data_make_banks_without_dead_classes(slices, first_stage):
    images, labels, tasks = slices
    taught = train_partial(*slices, "full", steps=40, seed=2)
    result = train_partial(images, labels, tasks, "stable", taught, steps=4, lr=1e-3)
    assert dead_classes(result.student, images, labels, "labeled") == []


@pytest.mark.parametrize("change, words", [(dict(method="magic"), "use one of"), (dict(batch_size=1), "2 to 16"), (dict(batch_size=17), "2 to 16")])
def test_trainings_that_cannot_be_are_sentences(slices, change, words):
    with pytest.raises(ValueError, match=words):
        train_partial(*slices, steps=1, **change)


def test_hounsfield_units_are_sent_to_the_window(slices):
    with pytest.raises(ValueError, match="call window_hu first"):
        train_partial(slices[0] * 325, slices[1], slices[2], steps=1)
    with pytest.raises(ValueError, match="NaN"):
        train_partial(slices[0] * float("nan"), slices[1], slices[2], steps=1)


KILLED = """
import os, signal, sys, torch
from hkust_demos.data.abdomen import abdomen_phantom
from hkust_demos.vision.ltuda import train_partial
found = abdomen_phantom(4, 3, size=32)
slices = [torch.from_numpy(part) for part in (found.images, found.labels, found.task_ids)]
first = train_partial(*slices, "cda", steps=6, warmup=2, seed=1)
kill = lambda done, steps, record: done < 20 or os.kill(os.getpid(), signal.SIGKILL)
train_partial(*slices, "pda", first, steps=26, seed=4, checkpoint=sys.argv[1], save_every=4, progress=kill)
"""


def test_a_killed_training_goes_on_to_the_same_weights(slices, first_stage, tmp_path):
    path = tmp_path / "run.safetensors"
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLED), str(path)], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert process.returncode == -signal.SIGKILL
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "20"
    options = dict(steps=26, seed=4)
    resumed = train_partial(*slices, "pda", first_stage, checkpoint=path, **options)
    through = train_partial(*slices, "pda", first_stage, **options)
    for one, other in ((resumed.student, through.student), (resumed.teacher, through.teacher)):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert resumed.history == through.history and len(through.history) == 26
    with pytest.raises(ValueError, match="other settings"):
        train_partial(*slices, "pda", first_stage, steps=26, seed=5, checkpoint=path)


def test_a_checkpoint_of_something_else_is_refused(slices, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"PK\\x03\\x04 not a checkpoint")
    with pytest.raises(ValueError, match="no checkpoint"):
        train_partial(*slices, steps=2, checkpoint=tmp_path / "bad.safetensors")


# ---- scores and volumes ----

def test_scores_against_a_plain_computation():
    generator = chance(7)
    predicted, truth = (torch.randint(0, 3, (4, 16, 16), generator=generator) for _ in range(2))
    truth[3][truth[3] == 2] = 0
    table = dice_table(predicted, truth, 2)
    for i in range(4):
        for k in (1, 2):
            a, b = predicted[i] == k, truth[i] == k
            assert table[i, k - 1].isnan() if not b.any() else table[i, k - 1] == pytest.approx(2 * (a & b).sum().item() / (a.sum() + b.sum()).item())
    assert hd95_table(truth, truth, 2)[0].tolist() == [0, 0]


def test_hd95_is_the_shift_of_a_square_and_a_miss_costs_the_diagonal():
    truth = torch.zeros(2, 40, 30, dtype=torch.long)
    truth[:, 10:20, 5:15] = 1
    said = truth.roll(4, 1)
    said[1] = 0
    assert hd95_table(said, truth, 1)[:, 0].tolist() == pytest.approx([4, 50])


def test_volumes_in_windows_and_islands():
    volume = torch.rand(3, 70, 40, generator=chance()) * 2 - 1
    torch.manual_seed(0)
    model = small_segmenter().eval()
    whole = slide(lambda x: model(x).logits, volume[:, :32, :32], window=32)
    with torch.no_grad():
        assert torch.allclose(whole, model(volume[:, None, :32, :32]).logits.movedim(1, 0), atol=1e-5)
    assert slide(lambda x: model(x).logits, volume, window=32, overlap=0.5).shape == (4, 3, 70, 40)
    labels = torch.zeros(1, 4, 12, 12, dtype=torch.long)
    labels[0, :3, 1:5, 1:5], labels[0, 3, 9:11, 9:11], labels[0, 0, 8, 8] = 3, 3, 3
    cleaned = largest_pieces(labels, {3: 2})
    assert cleaned[0, 0, 8, 8] == 0 and cleaned[0, 3, 9, 9] == 3 and cleaned.sum() == labels.sum() - 3
    assert entropy_map(torch.tensor([[0.5], [0.99]])).item() == pytest.approx(1)
    with pytest.raises(ValueError, match="both must"):
        dice_table(labels, labels[0])


def test_predictions_in_parts_are_those_of_the_whole(slices, first_stage):
    whole, parts = (predict_all(first_stage.student, slices[0], batch_size=n) for n in (16, 5))
    assert torch.equal(whole, parts)
    assert set(evaluate_dice(first_stage.teacher, *slices[:2], "labeled")) == set(ORGANS)
    assert json.dumps(first_stage.history)


# ---- what is shipped, and the study ----

def test_shipped_networks_know_what_they_were_told():
    from hkust_demos.vision.ltuda_shipped import NETWORKS, load_segmenter, phantom_tensors
    images, labels, _ = phantom_tensors(6, 11, only_task=False)
    scores = {name: evaluate_dice(load_segmenter(name), images, labels) for name in NETWORKS}
    mean = {name: np.mean([*organs.values()]) for name, organs in scores.items()}
    assert min(mean.values()) > 0.3 and mean["full"] > mean["ignore"] and all(organs["liver"] > 0.7 for organs in scores.values())
    network = load_segmenter("ltuda")
    assert load_segmenter("ltuda") is network and not any(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="use one of"):
        load_segmenter("best")


def test_networks_are_stored_and_read_back(slices, tmp_path):
    from hkust_demos.checkpoints import save_checkpoint
    from hkust_demos.vision.ltuda_shipped import load_segmenter, train_shipped
    paths = train_shipped(tmp_path / "mine", slices, names=("ignore", "ltuda"), first=1, second=1, test=slices[:2], data="four slices a site",
                          checkpoints=tmp_path / "kept")
    card = json.loads(paths[1].read_text())
    assert card["networks"] == ["ignore", "ltuda"] and set(card["metrics"]["dice"]["ltuda"]) == set(ORGANS) and card["not_for_diagnosis"]
    assert {path.stem for path in (tmp_path / "kept").iterdir()} == {"ignore-first", "ignore", "cda-first", "ltuda"}
    assert load_segmenter("ltuda", str(tmp_path / "mine")).predict(slices[0][:1], "labeled").shape == (1, 32, 32)
    with pytest.raises(ValueError, match="hold no network 'cda'"):
        load_segmenter("cda", str(tmp_path / "mine"))
    with pytest.raises(FileExistsError, match="already"):
        train_shipped(tmp_path / "mine", slices)
    save_checkpoint(tmp_path / "other", {"ltuda.weight": torch.zeros(3)}, dict(command="", data="", seed=0, metrics={}))
    with pytest.raises(ValueError, match="something else"):
        load_segmenter("ltuda", str(tmp_path / "other"))


def test_the_study_pairs_what_can_be_compared():
    from hkust_demos.vision.ltuda_study import BATCH, PLANS, all_variants, baselines, build_study
    study, pairs = build_study(), baselines(all_variants())
    assert study.needs == {"patients/": "ct-organs"} and set(pairs) < set(study.variants)
    for variant, other in pairs.items():
        one, rival = (PLANS[name.split("/")[1]] for name in (variant, other))
        assert variant.split("/")[0] == other.split("/")[0] and bool(one.after) == bool(rival.after)
        if one.after:
            assert one.views() == rival.views() or one.method in ("ignore+mix", "full+mix")
    assert PLANS["cda"].views() == PLANS["ignore x3"].views() == PLANS["pseudo x3"].views() == PLANS["full x3"].views() == 600 and BATCH == 8


def test_worlds_of_the_study_keep_patients_apart():
    from hkust_demos.vision.ltuda_study import world_data
    train, test = world_data("phantom", 1, False)
    assert train[0].shape == (40, 1, 32, 32) and test[0].shape == (60, 1, 32, 32)
    again, _ = world_data("phantom", 2, False)
    assert not any(torch.equal(one, other) for one in train[0] for other in torch.cat([test[0], again[0]]))
