"What a distillation must not get wrong: whose gradient, whose center, whose view; a killed run, two processes, foreign files."
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hkust_demos.data.he_phantom import he_phantom, tile_mix
from hkust_demos.vision import gpfm
from hkust_demos.vision.encoder_files import load_encoder
from hkust_demos.vision.encoders import EncoderOutput, Specialist, Standardized, ViTEncoder
from hkust_demos.vision.gpfm import DistillConfig, ExpertWeight, TeacherCentering, UnifiedDistiller, block_masks
from hkust_demos.vision.gpfm_training import TrainConfig, fresh_views, pretrain
from hkust_demos.vision.probes import z_scored

QUICK = TrainConfig(steps=4, batch_size=8, prototypes=32, standardize=0)
NAMES = """EncoderOutput Expert ExpertWeight ViTEncoder ProjectionHead TeacherCentering sinkhorn dino_loss ibot_loss koleo_loss expert_cls_loss expert_patch_loss block_masks
cosine_schedule UnifiedDistiller extract_features linear_probe knn_probe retrieval_accuracy ABMIL fit_abmil nll_survival_loss concordance_index average_ranks nemenyi_cd he_phantom
tile_image load_encoder TileSet""".split()


@pytest.fixture(scope="module")
def tiles():
    return tile_mix(24, 0, size=48).images


@pytest.fixture(scope="module")
def experts():
    torch.manual_seed(0)
    return {name: Specialist(name).eval() for name in ("nuclear", "stain")}


@pytest.fixture()
def distiller(experts):
    torch.manual_seed(0)
    return UnifiedDistiller(ViTEncoder(depth=1), experts, config=DistillConfig(prototypes=32, hidden=32, bottleneck=16)).train()


@pytest.fixture(scope="module")
def views(tiles):
    return fresh_views(tiles, QUICK, 0, 0, 6)


def losses(distiller, views, **changes):
    views = replace(views, **changes)
    return distiller.losses(views.global_crops, views.local_crops, views.masks, teacher_temp=0.04)


@pytest.mark.parametrize("name", NAMES)
def test_the_public_names_are_here(name):
    assert hasattr(gpfm, name)


def test_gradients_reach_student_and_heads_and_nobody_else(distiller, views, experts):
    losses(distiller, views)["total"].backward()
    assert all(p.grad is None for p in distiller.teacher.parameters())
    assert all(p.grad is None for expert in experts.values() for p in expert.parameters())
    assert all(p.grad is not None for part in (distiller.student, distiller.heads) for p in part.parameters())
    assert not any(key.startswith("experts") for key in distiller.state_dict()) and "cls_center.center" in distiller.state_dict()


def test_train_takes_a_mode_and_the_teacher_stays_in_evaluation(distiller):
    assert distiller.train().student.training and not distiller.teacher.training and not distiller.teacher["body"].training
    assert not distiller.eval().student.training


def test_the_total_is_the_weighted_sum_and_finite_when_cold(distiller, views):
    terms = losses(distiller, views)
    weights = {"dino local": 1, "dino global": 1, "ibot": 1, "koleo": 0.1, "nuclear cls": 1, "nuclear patch": 0.25, "stain cls": 0.5, "stain patch": 0.125}
    assert set(terms) == {*weights, "total"}
    assert terms["total"].item() == pytest.approx(sum(weights[name] * terms[name].item() for name in weights), rel=1e-5)
    assert all(torch.isfinite(term) for term in terms.values())


def test_experts_and_teacher_see_crops_unmasked(distiller, views):
    "Only the student's patches are hidden: other masks leave the experts' targets and the teacher's tile probabilities as they were."
    other = block_masks(len(views.masks), 6, generator=torch.Generator().manual_seed(9))
    asked = [gpfm.expert_targets(distiller.experts, views.global_crops)["stain"].cls for _ in range(2)]
    said = []
    for masks in (views.masks, other):
        distiller.cls_center = TeacherCentering(32)
        said.append(gpfm.teacher_says(distiller, views.global_crops, masks, 0.04)[0])
    assert torch.equal(*said) and torch.equal(*asked)


def test_the_order_of_stacking_matters(distiller, views):
    "View after view is right; tile after tile, the classic silent bug, gives another loss."
    distiller.eval()
    wrong = views.global_crops.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
    with torch.no_grad():
        right, other = losses(distiller, views)["dino global"], losses(distiller, views, global_crops=wrong)["dino global"]
    assert abs(right - other) > 1e-4


def test_swapping_views_matters_where_they_differ_and_nowhere_else():
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7).softmax(-1)
    local = torch.randn(3, 5, 7)
    straight, swapped = (gpfm.dino_loss(local, student, t)["global"] for t in (teacher, teacher.flip(0)))
    assert abs(straight - swapped) > 1e-3
    same, one = student[:1].expand(2, -1, -1), teacher[:1].expand(2, -1, -1)
    assert torch.equal(gpfm.dino_loss(local, same, one)["global"], gpfm.dino_loss(local, same, one.flip(0))["global"])


def test_the_teacher_moves_by_exactly_its_share(distiller):
    with torch.no_grad():
        for p in distiller.student.parameters():
            p.add_(torch.randn_like(p))
    before = [p.clone() for p in distiller.teacher.parameters()]
    distiller.update_teacher(0.9)
    for old, new, ours in zip(before, distiller.teacher.parameters(), distiller.student.parameters()):
        assert torch.allclose(new, 0.9 * old + 0.1 * ours, atol=1e-6)


def test_only_hidden_patches_count_and_none_gives_zero():
    mask = torch.zeros(4, 9, dtype=torch.bool)
    assert gpfm.ibot_loss(torch.zeros(0, 5), torch.zeros(0, 5), mask).item() == 0
    mask[0, :2] = mask[3, :4] = True
    even = gpfm.ibot_loss(torch.zeros(6, 5), torch.full((6, 5), 0.2), mask)
    assert even.item() == pytest.approx(2 / 4 * np.log(5), rel=1e-5)  # of four crops two are masked; all four divide


def test_what_is_scaled_changes_size_and_not_direction(monkeypatch):
    z, pred, target = torch.randn(6, 8), torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    assert torch.allclose(gpfm.koleo_loss(7 * z), gpfm.koleo_loss(z), atol=1e-4)
    direction = lambda p: gpfm.expert_patch_loss(p, target, alpha=1.0, beta=0.0)
    assert torch.allclose(direction(3 * pred), direction(pred), atol=1e-6) and gpfm.expert_patch_loss(3 * pred, target) > gpfm.expert_patch_loss(pred, target)
    assert gpfm.expert_patch_loss(target, target).abs() < 1e-6
    monkeypatch.setattr(F, "interpolate", lambda *a, **k: pytest.fail("equal grids are interpolated"))
    gpfm.expert_patch_loss(pred, target)
    with pytest.raises(ValueError, match="no square number"):
        gpfm.expert_patch_loss(pred, target[:, :8])


def test_an_experts_head_is_no_richer_than_its_bottleneck():
    said = gpfm.ProjectionHead(64, 96, 1, bottleneck_dim=8)(torch.randn(200, 64))
    assert torch.linalg.matrix_rank(said).item() == 8 and said.abs().max() <= 1


def test_a_query_does_not_find_itself_and_test_tiles_do_not_set_the_scale():
    x, y = np.eye(4, dtype=np.float32), np.array([0, 1, 2, 3])
    assert gpfm.retrieval_accuracy(x, y, x, y, ks=(1,))["acc@1"] == 0
    train, test = z_scored(np.random.default_rng(0).normal(5, 3, (50, 4)), np.full((3, 4), 5.0))
    assert np.allclose(train.std(0), 1) and abs(test).max() < 1


def test_ties_share_their_rank():
    ranks = gpfm.average_ranks(pd.DataFrame({"t": {"a": 0.9, "b": 0.9, "c": 0.1}}))
    assert ranks["average"].to_dict() == {"a": 1.5, "b": 1.5, "c": 3.0}


def test_a_weight_of_zero_silences_an_expert_and_no_self_weight_all_of_self(experts, views):
    weights = {"nuclear": ExpertWeight(1.0, 0.0), "stain": ExpertWeight(0.5, 0.1)}
    quiet = UnifiedDistiller(ViTEncoder(depth=1), experts, weights, config=DistillConfig(self_weight=0.0))
    assert set(losses(quiet, views)) == {"nuclear cls", "stain cls", "stain patch", "total"} and "head" not in quiet.student


def test_the_center_waits_a_step_and_is_stored():
    center, logits = TeacherCentering(3), torch.tensor([[2.0, 0, 0], [4.0, 0, 0]])
    first, second = center(logits, 1.0), center(logits, 1.0)
    assert torch.allclose(first, logits.softmax(-1)) and torch.allclose(second, (logits - 0.1 * logits.mean(0)).softmax(-1))
    again = TeacherCentering(3)
    again.load_state_dict(center.state_dict())
    assert torch.equal(again(logits, 1.0), center(logits, 1.0)) and not list(center.parameters())


@pytest.mark.parametrize("n, grid", [(8, 6), (16, 16), (2, 3)])
def test_masks_never_exceed_their_target(n, grid):
    for seed in range(10):
        masks = block_masks(n, grid, generator=torch.Generator().manual_seed(seed))
        counts = masks.sum(1).sort(descending=True).values
        bins = torch.linspace(0.1, 0.5, n // 2 + 1)
        assert masks.shape == (n, grid * grid) and (counts[n // 2:] == 0).all()
        assert all(count <= int(grid * grid * top) for count, top in zip(counts, bins.flip(0)))


def test_most_of_a_large_mask_is_filled():
    masks = torch.cat([block_masks(16, 16, ratio=(0.4, 0.5), generator=torch.Generator().manual_seed(seed)) for seed in range(6)])
    assert masks[masks.any(1)].float().mean() > 0.38


def test_duplicated_tiles_give_a_large_finite_koleo():
    cls = torch.randn(6, 8)
    cls[1] = cls[0]
    cls.requires_grad_()
    loss = gpfm.koleo_loss(cls)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(cls.grad).all()


def test_kl_is_that_of_a_batch_mean():
    pred, target = torch.randn(5, 1, 7), torch.randn(5, 1, 7)
    p, q = target.softmax(-1), pred.softmax(-1)
    assert gpfm.expert_cls_loss(pred, target, "kl").item() == pytest.approx(((p * (p / q).log()).sum() / 5).item(), rel=1e-4)


def test_standardizing_takes_out_what_a_lazy_student_would_learn(tiles):
    class Shifted(torch.nn.Module):
        dim, grid = 4, 1

        def forward(self, images):
            found = 100 + F.avg_pool2d(images, 24).flatten(1)[:, :4, None].mT
            return EncoderOutput(found, found)
    raw, even = Shifted()(tiles).cls, Standardized(Shifted(), tiles)(tiles).cls
    lazy = lambda t: F.cosine_similarity(t, t.mean(0, keepdim=True) + 1e-9, dim=-1).mean()
    assert lazy(raw) > 0.99 and abs(lazy(even)) < 0.4


@pytest.mark.parametrize("source", ["gpfm", "self-only", "expert-only", "nuclear", "concat", "random", "handcrafted"])
def test_shipped_encoders_open_by_name(source, tiles):
    encoder = load_encoder(source)
    assert gpfm.extract_features(encoder, tiles[:2]).shape == (2, encoder.dim)


def test_the_same_seed_gives_the_same_history(tiles, experts):
    one, two = (pretrain(tiles, experts, config=QUICK, seed=3).history for _ in range(2))
    other = pretrain(tiles, experts, config=QUICK, seed=4).history
    assert np.allclose(one, two, atol=1e-5) and not np.allclose(one["total"], other["total"])


def test_what_is_handed_out_is_the_teacher(tiles, experts):
    found = pretrain(tiles, experts, config=QUICK)
    assert found.encoder is found.distiller.teacher["body"] and not any(p.requires_grad for p in found.encoder.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(found.encoder.parameters(), found.distiller.student["body"].parameters()))


def test_released_options_run(tiles, experts):
    config = replace(QUICK, steps=2, natural=True, layer_decay=0.9, patch_rate=0.2, freeze_last=0.5, centering="sinkhorn", cls_loss="kl")
    assert pretrain(tiles, experts, config=config).history.total.notna().all()


PROGRAM = """
import json
from accelerate import Accelerator
from test_gpfm import shared_steps
accelerator = Accelerator(cpu=True)
sums = shared_steps(accelerator)
if accelerator.is_main_process:
    print(json.dumps({"sums": sums, "n": accelerator.num_processes}), flush=True)
"""


def shared_steps(accelerator=None):
    "Three steps of eight tiles; sums of the student's weights."
    torch.manual_seed(0)
    experts = {"nuclear": Specialist("nuclear").eval()}
    student = ViTEncoder(depth=1, drop_path=0.0)
    config = replace(QUICK, steps=3, koleo=0.0)
    found = pretrain(tile_mix(24, 0, size=48).images, experts, config=config, student=student, accelerator=accelerator)
    return [p.double().sum().item() for p in found.distiller.student.parameters()]


def test_two_processes_with_half_a_batch_each_take_the_steps_of_one(tmp_path):
    "Without KoLeo, whose neighbors are those of a process, gradients are means over tiles, and means of means are the same."
    (tmp_path / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(tmp_path / "program.py")]
    paths = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    both = subprocess.run(launch, capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths})
    assert both.returncode == 0, both.stderr[-3000:]
    two = json.loads(next(line for line in both.stdout.splitlines() if line.startswith("{")))
    assert two["n"] == 2 and np.allclose(shared_steps(), two["sums"], atol=2e-3)


@pytest.mark.parametrize("tiles, told", [(torch.rand(4, 1, 48, 48), "float \\(B, 3"), (2 * torch.ones(30, 3, 48, 48), "in \\[0, 1\\]"), (torch.full((30, 3, 48, 48), float("nan")), "finite"),
                                         (torch.rand(3, 3, 48, 48), "no more than there are")])
def test_wrong_tiles_are_sentences(tiles, told):
    with pytest.raises(ValueError, match=told):
        pretrain(tiles, config=QUICK)


def test_foreign_weights_are_sentences(tmp_path):
    save_file({"something": torch.zeros(2)}, tmp_path / "odd.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    for name in ("odd", "bad"):
        with pytest.raises(ValueError, match=f"{name}.safetensors"):
            load_encoder(str(tmp_path / f"{name}.safetensors"))
    (tmp_path / "GPFM.pth").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="never opened here"):
        load_encoder(str(tmp_path / "GPFM.pth"))


def test_a_held_out_laboratory_stays_out():
    assert 3 not in tile_mix(60, 0, size=16).factors["center"].tolist() and he_phantom(2, 0, center=3, size=16).center == 3
