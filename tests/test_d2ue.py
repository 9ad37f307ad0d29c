"Properties of D2UE beyond those that its notebooks show."
import base64
import copy
import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hkust_demos.data.phantoms import mni_slices, paint_lesion
from hkust_demos.data.scans import Scan, read_scan, slice_of, write_scan
from hkust_demos.vision.autoencoders import ConvAutoencoder, DenseAutoencoder, ReconstructionOutput
from hkust_demos.vision.d2ue import (cka_matrix, detection_report, dual_space_uncertainty, image_scores, linear_cka, reconstruction_loss,
                                     repulsion_loss, train_ensemble)
from hkust_demos.vision.d2ue_ensembles import healthy_reference, healthy_squares, load_ensemble, retrain
from hkust_demos.vision.d2ue_findings import examine, examine_scan, truth_report
from hkust_demos.vision.folders import OneClassImageFolder
from hkust_demos.vision.frames import from_learner, to_learner
from hkust_demos.vision.lean import lean


def signed(pictures):
    "[0, 1] pictures as a batch in [-1, 1]."
    return torch.from_numpy(np.asarray(pictures, np.float32))[:, None] * 2 - 1


@pytest.fixture(scope="module")
def healthy():
    "Healthy slices of 32 pixels."
    return signed(mni_slices(192, 0, size=32).images)


def oracle_cka(x, y):
    "Centered kernel alignment as the literature writes it, with the centering matrix, in NumPy."
    n = len(x)
    H = np.eye(n) - np.ones((n, n)) / n
    hsic = lambda a, b: np.sum((H @ a @ a.T @ H) * (H @ b @ b.T @ H))
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("widths", [(3, 5), (40, 5), (60, 70)])
def test_cka_agrees_with_the_textbook(widths):
    generator = np.random.default_rng(0)
    x, y = (generator.normal(size=(30, width)) for width in widths)
    assert abs(linear_cka(torch.from_numpy(x), torch.from_numpy(y)).item() - oracle_cka(x, y)) < 1e-12
    assert 0 <= oracle_cka(x, y) <= 1


def test_cka_of_constant_features_has_a_finite_gradient():
    x = torch.ones(10, 4, requires_grad=True)
    loss = linear_cka(x, torch.randn(10, 3))
    loss.backward()
    assert loss.item() == 0 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4, 1e8])
def test_cka_does_not_depend_on_scale(scale):
    x = torch.randn(64, 300, generator=torch.Generator().manual_seed(0))
    assert abs(linear_cka(scale * x, x).item() - 1) < 1e-5 and abs(linear_cka(scale * x, scale * x).item() - 1) < 1e-5


def test_small_samples_flatter():
    generator = torch.Generator().manual_seed(0)
    values = [linear_cka(*(torch.randn(64, 16, generator=generator) for _ in range(2))).item() for _ in range(50)]
    assert abs(np.mean(values) - 16 / (16 + 64)) < 0.02


def test_repulsion_is_the_mean_over_seniors():
    x, *seniors = torch.randn(4, 20, 6, generator=torch.Generator().manual_seed(0))
    assert torch.isclose(repulsion_loss(x, seniors), torch.stack([linear_cka(x, s) for s in seniors]).mean())


def test_seniors_do_not_change_while_a_junior_learns(healthy):
    first = train_ensemble(healthy, 1, 0.0, epochs=2, model_fn=DenseAutoencoder)
    before = copy.deepcopy(first.learners[0].state_dict())
    both = train_ensemble(healthy, 2, 1.0, epochs=2, model_fn=DenseAutoencoder, seniors=first.learners)
    assert all(torch.equal(before[name], value) for name, value in both.learners[0].state_dict().items())
    assert [record["learner"] for record in both.history] == [1, 1]


def test_training_is_deterministic_and_seeds_differ(healthy):
    runs = [train_ensemble(healthy, 1, 0.0, epochs=1, seed=seed, model_fn=DenseAutoencoder).learners[0].state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["blocks.0.0.weight"], runs[2]["blocks.0.0.weight"])


def test_repulsion_lowers_held_out_similarity_at_a_bounded_price(healthy):
    held_out = signed(mni_slices(96, 9, size=32).images)
    plain = train_ensemble(healthy, 2, 0.0, epochs=60, lr=1e-3, model_fn=DenseAutoencoder)
    pushed = train_ensemble(healthy, 2, 1.0, epochs=60, lr=1e-3, model_fn=DenseAutoencoder, seniors=plain.learners[:1])
    before, after = (cka_matrix(run.learners, held_out)[0, 1].item() for run in (plain, pushed))
    error = [(dual_space_uncertainty(run.learners, held_out).recon[1] - held_out[:, 0]).square().mean().item() for run in (plain, pushed)]
    assert before - after > 0.5 and error[1] < 2 * error[0]


class Linear(nn.Module):
    "f(x) = A x on flattened pixels: the map has a closed form."
    layers = ("z",)

    def __init__(self, seed, n=36):
        super().__init__()
        self.A = nn.Parameter(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / n)

    def forward(self, image):
        return ReconstructionOutput((image.flatten(1) @ self.A.T).view_as(image), [image.flatten(1)])


def test_a_linear_learner_has_the_closed_form():
    x = torch.rand(5, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    learners = [Linear(seed) for seed in range(3)]
    flat, parts = x.flatten(1), []
    for learner in learners:
        e = flat @ learner.A.T - flat
        parts.append(e.abs() * (e.sign() @ learner.A - e.sign()) / 36)
    expected = torch.stack(parts).std(0).view(5, 6, 6)
    assert torch.allclose(dual_space_uncertainty(learners, x).dual, expected, atol=1e-15)


@pytest.mark.parametrize("variant", ["ae", "aeu", "memae"])
def test_batches_do_not_change_the_maps(variant):
    torch.manual_seed(0)
    learners = [ConvAutoencoder(32, base_width=4, hidden=16, variant=variant).double().train() for _ in range(2)]
    x = torch.rand(6, 1, 32, 32, dtype=torch.float64) * 2 - 1
    whole, alone = dual_space_uncertainty(learners, x), dual_space_uncertainty(learners, x, batch_size=1)
    for name in vars(whole):
        assert torch.allclose(getattr(whole, name), getattr(alone, name), atol=1e-12)
    assert all(learner.training for learner in learners) and all(p.grad is None for l in learners for p in l.parameters())


def test_identical_learners_never_disagree():
    learner = ConvAutoencoder(32, base_width=4, hidden=16)
    maps = dual_space_uncertainty([learner] * 3, torch.rand(2, 1, 32, 32) * 2 - 1)
    assert max(maps.output_std.max(), maps.input_std.max(), maps.dual.max()) == 0


@pytest.mark.parametrize("bad, sentence", [(torch.rand(4, 1, 32, 32) * 3, "must lie in"), (torch.full((4, 1, 32, 32), float("inf")), "NaN"),
                                           (torch.zeros(4, 32, 32), "shape")])
def test_bad_images_are_refused(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        dual_space_uncertainty([DenseAutoencoder(), DenseAutoencoder()], bad)


def test_learners_of_another_shape_are_refused():
    with pytest.raises((ValueError, RuntimeError)):
        dual_space_uncertainty([DenseAutoencoder(), DenseAutoencoder(16)], torch.zeros(2, 1, 32, 32))


def test_losses_are_finite_for_extreme_variance():
    output = ReconstructionOutput(torch.zeros(1, 1, 2, 2), [], torch.full((1, 1, 2, 2), 20.0))
    assert torch.isfinite(reconstruction_loss(output, torch.ones(1, 1, 2, 2)))


def test_scores_of_the_brightest_pixels():
    maps = torch.arange(100.0).view(1, 10, 10)
    assert image_scores(maps, 0.1).item() == pytest.approx(94.5) and image_scores(maps).item() == pytest.approx(49.5)
    with pytest.raises(ValueError, match="top is 0"):
        image_scores(maps, 0)


def test_report_of_a_random_map_is_chance():
    generator = np.random.default_rng(0)
    found = detection_report(torch.from_numpy(generator.random(2000)), generator.integers(0, 2, 2000))
    assert abs(found["image_auroc"] - 0.5) < 0.05


# ---- the shipped learners ----

@pytest.fixture(scope="module")
def ensemble():
    "The shipped pushed ensemble."
    return load_ensemble("rar")


def test_the_card_tells_where_the_weights_come_from():
    from hkust_demos.checkpoints import load_checkpoint, shipped_folder
    tensors, card = load_checkpoint(shipped_folder("d2ue"))
    assert card["command"] == "hkust-demos train d2ue" and card["bytes"] < 3e6
    assert card["metrics"]["cka_rar"] < 0.1 < 0.5 < card["metrics"]["cka_plain"]
    assert tensors["rar.scores.dual"].shape == (card["n_held_out"],)


def test_the_example_that_is_shipped_is_what_the_code_draws_today():
    from hkust_demos.checkpoints import shipped_folder
    from hkust_demos.vision.d2ue_views import EXAMPLE, live_view
    stored = json.loads((shipped_folder("d2ue") / EXAMPLE).read_text())
    tiles, words = live_view()
    drawn, kept = ([np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB"), int) for one in re.findall(r"base64,([^\"]+)", page)]
                   for page in (tiles, stored["tiles"]))
    assert words == stored["words"] and len(drawn) == len(kept) == 4
    assert all(np.abs(a - b).mean() < 1 for a, b in zip(drawn, kept))  # rounding may move a color by a step


def test_a_bright_lesion_does_not_darken_the_head():
    head = mni_slices(1, 5, size=128).images[0]
    for contrast in (0.3, 0.8):
        painted, mask = paint_lesion(head, (56, 76), 10, contrast=contrast)
        squares = [to_learner(picture)[0][0, 0] for picture in (head, painted)]
        far = ~torch.from_numpy(mask.reshape(64, 2, 64, 2).any((1, 3)))
        assert (squares[0] - squares[1]).abs()[far].mean() < 0.03


def test_healthy_slices_are_ordinary_and_lesions_are_not(ensemble):
    fresh, sick = mni_slices(60, 77).images, mni_slices(60, 77, lesions=True).images
    ordinary = [f.percentile("ensemble_error") for f in examine(list(fresh), ensemble)]
    strange = [f.percentile("ensemble_error") for f in examine(list(sick), ensemble)]
    assert np.mean(strange) > np.mean(ordinary) + 15


def test_the_map_points_at_a_painted_lesion(ensemble):
    scores = []
    for seed in range(12):
        picture, mask = paint_lesion(mni_slices(1, 300 + seed).images[0], (28, 36), 6, contrast=0.4)
        scores.append(truth_report(examine(picture, ensemble)[0], mask)["pixel_auroc"])
    assert np.mean(scores) > 0.75


@pytest.mark.parametrize("kind", ["checkerboard", "noise", "ramp"])
def test_another_kind_of_picture_is_warned_about(ensemble, kind):
    rows, columns = np.mgrid[:128, :128]
    picture = {"checkerboard": ((rows // 16 + columns // 16) % 2), "ramp": (columns / 127) ** 3,
               "noise": np.random.default_rng(0).random((128, 128))}[kind].astype(np.float32)
    assert "looks like something else" in (examine(picture, ensemble)[0].warning or "")


def test_a_volume_comes_back_on_its_own_grid(ensemble, tmp_path):
    import nibabel
    volume = np.zeros((70, 80, 6), np.float32)
    for k in range(1, 5):
        slice_of(volume, "axial", k)[8:72, 3:67] = mni_slices(1, k).images[0]
    affine = np.array([[-2, 0, 0, 70], [0, 0, 2, -60], [0, 2.5, 0, -30], [0, 0, 0, 1.0]])
    nibabel.Nifti1Image(volume.transpose(0, 2, 1)[::-1], affine).to_filename(tmp_path / "scan.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    anomaly_map, findings = examine_scan(scan, ensemble)
    write_scan(anomaly_map, tmp_path / "map.nii.gz", like=scan)
    back = nibabel.load(tmp_path / "map.nii.gz")
    assert back.shape == (70, 6, 80) and np.allclose(back.affine, affine) and len(findings) == 4


def test_the_way_back_keeps_the_place():
    picture = np.zeros((90, 130), np.float32)
    picture[20:80, 50:110] = mni_slices(1, 1, size=60).images[0]
    square, frame = to_learner(picture)
    again = from_learner((square[0, 0] + 1) / 2, frame)
    head = picture > 0.2
    assert again.shape == picture.shape and np.corrcoef(again[head], picture[head])[0, 1] > 0.9


def test_the_command_writes_map_and_report(tmp_path):
    from hkust_demos.vision.d2ue_apply import add_arguments, run_command
    from argparse import ArgumentParser
    parser = ArgumentParser()
    add_arguments(parser)
    like = Scan(mni_slices(1, 5).images[0], None, np.eye(4), "MR", "")
    write_scan(like, tmp_path / "slice.png", like=like)
    paths = run_command(parser.parse_args([str(tmp_path / "slice.png"), "--score", "output_std", "--out", str(tmp_path / "maps")]))
    report = json.loads(paths[1].read_text())
    assert report["score_name"] == "output_std" and report["not_for_diagnosis"] and 0 <= report["healthy_percentile"] <= 100
    assert read_scan(paths[0]).array.shape == (64, 64)
    with pytest.raises(FileExistsError, match="--force"):
        run_command(parser.parse_args([str(tmp_path / "slice.png"), "--out", str(tmp_path / "maps")]))


def test_your_own_healthy_pictures_train_an_ensemble(own_pictures, tmp_path):
    from hkust_demos.vision.d2ue_apply import train
    paths = train(str(own_pictures), str(tmp_path / "mine"), epochs=1)
    card = json.loads(paths[1].read_text())
    assert (card["n_train"], card["n_held_out"]) == (64, 8) and str(own_pictures) not in paths[1].read_text()
    mine = load_ensemble("plain", str(tmp_path / "mine"))
    assert len(mine.learners) == 3 and examine(mni_slices(1, 3).images[0], mine)[0].map().shape == (64, 64)
    with pytest.raises(FileExistsError, match="already"):
        train(str(own_pictures), str(tmp_path / "mine"), epochs=1)
    shutil.copytree(own_pictures, tmp_path / "less")
    (tmp_path / "less" / "images" / "005.png").unlink()
    with pytest.raises(FileNotFoundError, match="005.png"):
        train(str(tmp_path / "less"), str(tmp_path / "again"), epochs=1)


@pytest.mark.parametrize("content, sentence", [({"train": ["a.png"]}, "no list"), ({"train": {"0": []}}, "no list"), ([], "no list"),
                                               ({"train": {"0": ["/etc/passwd"]}}, "bare file names")])
def test_bad_lists_are_sentences(tmp_path, content, sentence):
    (tmp_path / "images").mkdir()
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        OneClassImageFolder(tmp_path)


def test_weights_of_something_else_are_refused(tmp_path):
    from hkust_demos.checkpoints import save_checkpoint
    save_checkpoint(tmp_path / "other", {"weight": torch.zeros(3)}, dict(command="", data="", seed=0, metrics={}))
    with pytest.raises(ValueError, match="something else"):
        load_ensemble("rar", str(tmp_path / "other"))


def test_names_of_other_rooms_are_handed_on():
    from hkust_demos.vision.d2ue import OneClassImageFolder, mni_slices as slices, read_image
    assert slices is mni_slices and OneClassImageFolder and read_image


# ---- the lean form, other variants, other sizes ----

def plain_maps(learners, image):
    "The maps by their definition: autograd through the networks as they are, one learner and image at a time, torch.std."
    recon, noise, gradient = [], [], []
    for learner in learners:
        x = image.clone().requires_grad_()
        output = learner.eval()(x)
        e = output.recon - x
        loss = e.abs().mean() if output.log_var is None else (e.square() * torch.exp(-output.log_var)).mean()
        gradient.append(torch.autograd.grad(loss, x)[0])
        recon.append(output.recon.detach())
        noise.append(torch.zeros_like(image) if output.log_var is None else output.log_var.detach())
    recon, gradient, variance = torch.stack(recon), torch.stack(gradient), torch.stack(noise).exp()
    root, e = variance.mean(0).sqrt(), recon - image
    maps = {"single": e[0].square() / variance[0], "ensemble_error": (recon.mean(0) - image).square() / root.square(),
            "output_std": recon.std(0) / root, "input_std": gradient.std(0), "dual": (e.abs() * gradient / root).std(0)}
    return {name: values.mean(1) for name, values in maps.items()}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("variants", [("ae",) * 3, ("aeu",) * 3, ("memae",) * 2, ("ae", "aeu", "memae")])
def test_the_fast_maps_are_the_defined_ones(variants, channels):
    torch.manual_seed(0)
    learners = [ConvAutoencoder(32, channels, base_width=4, hidden=16, variant=variant).double() for variant in variants]
    images = torch.rand(5, channels, 32, 32, dtype=torch.float64) * 2 - 1
    for learner in learners:
        for _ in range(3):
            learner(torch.rand_like(images))  # normalization takes note
        for module in learner.modules():
            if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.normal_(module.weight, 1, 0.2), nn.init.normal_(module.bias, 0, 0.2)
    fast = dual_space_uncertainty(learners, images)
    for i, image in enumerate(images.split(1)):
        for name, values in plain_maps(learners, image).items():
            assert torch.allclose(getattr(fast, name)[i:i + 1], values, atol=1e-12, rtol=1e-9), name


def test_the_shipped_learners_give_the_defined_map(ensemble):
    learners = [copy.deepcopy(learner).double() for learner in ensemble.learners]
    images = signed(mni_slices(4, 5, lesions=True).images).double()
    defined = torch.cat([plain_maps(learners, image)["dual"] for image in images.split(1)])
    assert (dual_space_uncertainty(learners, images).dual - defined).abs().max() < 1e-12
    single = dual_space_uncertainty(ensemble.learners, images.float()).dual
    assert (single - defined).abs().flatten(1).amax(1).median() < 1e-6


def test_maps_leave_networks_as_they_were_and_subclasses_answer_for_themselves():
    class Own(ConvAutoencoder):
        def forward(self, image):
            return super().forward(-image)

    own, images = Own(32, base_width=4, hidden=16).eval(), torch.rand(2, 1, 32, 32) * 2 - 1
    assert lean(own) is own
    learner = ConvAutoencoder(32, base_width=4, hidden=16).eval()
    weights, state = [p.clone() for p in learner.parameters()], copy.deepcopy(learner.state_dict())
    dual_space_uncertainty([learner, own], images)
    assert all(torch.equal(a, b) for a, b in zip(weights, learner.parameters())) and all(p.requires_grad and p.grad is None for p in learner.parameters())
    assert all(torch.equal(state[name], value) for name, value in learner.state_dict().items())


@pytest.mark.parametrize("n_learners", [2, 4, 5])
def test_other_numbers_of_shipped_learners_have_their_own_reference(n_learners, ensemble):
    other = load_ensemble("rar", None, n_learners)
    assert len(other.learners) == n_learners and other.cka.shape == (n_learners, n_learners)
    assert not torch.equal(other.healthy_scores["dual"][:8], ensemble.healthy_scores["dual"][:8])
    fresh = [f.percentile("dual") for f in examine(list(mni_slices(40, 77).images), other)]
    assert 25 < np.mean(fresh) < 75


def test_three_shipped_learners_measure_what_is_stored(ensemble):
    measured = healthy_reference(ensemble.learners, healthy_squares(256, 1))
    assert torch.allclose(measured["scores.dual"], ensemble.healthy_scores["dual"], rtol=1e-3)
    assert torch.allclose(measured["pixels.output_std"], ensemble.pixel_quantiles["output_std"], rtol=1e-3, atol=1e-6)


def test_sizes_that_do_not_exist_are_refused():
    for n_learners in (1, 6, 2.5):
        with pytest.raises(ValueError, match="from 2 to 5"):
            load_ensemble("rar", None, n_learners)
    with pytest.raises(ValueError, match="3 learners only"):
        load_ensemble("rar", "somewhere", 4)


@pytest.fixture()
def few_slices(monkeypatch):
    "A training on the page with one batch an epoch."
    monkeypatch.setattr("hkust_demos.vision.d2ue_ensembles.RETRAIN_SLICES", 64)


def test_retraining_steps_and_stops(few_slices):
    steps = retrain(2, 0.5, epochs=2, seed=3)
    first, second = next(steps), next(steps)
    assert first.fraction == 0 and 0 < second.fraction < 1 and "learner 1 of 2, epoch 1 of 2" in second.message
    steps.close()  # as the app's Stop does
    *_, last = retrain(2, 0.5, epochs=2, seed=3)
    assert last.fraction == 1 and len(last.history) == 4 and len(last.ensemble.learners) == 2 and last.ensemble.name == "retrained"
    assert last.errors()["learner 1"][0] == [1, 2] and last.history[0] == second.history[0]
    assert examine(mni_slices(1, 3).images[0], last.ensemble)[0].map().shape == (64, 64)


@pytest.mark.parametrize("wrong", [dict(n_learners=1), dict(repulsion=-1), dict(repulsion=float("nan")), dict(epochs=0), dict(epochs=1000)])
def test_a_training_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="from"):
        next(retrain(**wrong))


@pytest.fixture(scope="module")
def own_pictures(tmp_path_factory):
    "A folder as the released code wants it, with 72 healthy pictures."
    home = tmp_path_factory.mktemp("own")
    like = Scan(mni_slices(1, 0).images[0], None, np.eye(4), "MR", "")
    (home / "images").mkdir()
    names = [f"{i:03}.png" for i in range(72)]
    for name, picture in zip(names, mni_slices(72, 0).images):
        write_scan(picture, home / "images" / name, like=like, bits=8)
    (home / "data.json").write_text(json.dumps({"train": {"0": names}}))
    return home


@pytest.mark.parametrize("variant", ["ae", "aeu", "memae"])
def test_the_command_trains_each_variant_and_loading_builds_it(variant, own_pictures, tmp_path, capsys):
    from hkust_demos.cli import main
    options = [] if variant == "ae" else ["--variant", variant]
    assert main(["train", "d2ue", "--data", str(own_pictures), "--out", str(tmp_path / "mine"), *options, "--epochs", "2"]) == 0
    card = json.loads((tmp_path / "mine" / "card.json").read_text())
    assert card["variant"] == variant and card["epochs"] == 2 and card["lr"] == (1e-3 if variant == "aeu" else 5e-4)
    assert card["command"] == " ".join(["hkust-demos train d2ue --data DIR --out FOLDER", *options, "--epochs 2"])
    for kind in ("plain", "rar"):
        mine = load_ensemble(kind, str(tmp_path / "mine"))
        assert {learner.variant for learner in mine.learners} == {mine.variant} == {variant}
    like = Scan(mni_slices(1, 5).images[0], None, np.eye(4), "MR", "")
    write_scan(like, tmp_path / "slice.png", like=like)
    wanted = ["d2ue", str(tmp_path / "slice.png"), "--weights", str(tmp_path / "mine"), "--out", str(tmp_path / "maps")]
    assert main(wanted) == 0
    assert json.loads((tmp_path / "maps" / "report.json").read_text())["variant"] == variant
    (tmp_path / "maps" / "report.json").write_text("old")
    assert main(wanted) == 2 and (tmp_path / "maps" / "report.json").read_text() == "old" and "--force" in capsys.readouterr().err
    assert main([*wanted, "--force"]) == 0 and json.loads((tmp_path / "maps" / "report.json").read_text())["variant"] == variant


@pytest.mark.parametrize("options, sentence", [(["--variant", "vae", "--data", "here", "--out", "there"], "use one of ae, aeu, memae"),
                                               (["--variant", "aeu"], "need --out"), (["--epochs", "3"], "need --out"),
                                               (["--epochs", "0", "--data", "here", "--out", "there"], "at least 1")])
def test_trainings_that_cannot_be_are_sentences(options, sentence, tmp_path, monkeypatch, capsys):
    from hkust_demos.cli import main
    monkeypatch.chdir(tmp_path)
    assert main(["train", "d2ue", *options]) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and "Traceback" not in shown and not list(tmp_path.iterdir())


def test_a_card_with_another_variant_is_refused(tmp_path, own_pictures):
    from hkust_demos.vision.d2ue_apply import train
    page = train(str(own_pictures), str(tmp_path / "mine"), variant="aeu", epochs=1)[1]
    card = json.loads(page.read_text())
    for wrong, sentence in (("ae", "something else"), ("vae", "use one of"), (["ae"], "use one of")):
        page.write_text(json.dumps({**card, "variant": wrong}))
        load_ensemble.cache_clear()
        with pytest.raises(ValueError, match=sentence):
            load_ensemble("rar", str(tmp_path / "mine"))
