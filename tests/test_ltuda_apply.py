"The LTUDA command: a CT in, a label map on its own voxels out; training from sets that label one organ each."
import argparse
import json

import nibabel
import numpy as np
import pytest
import torch
from scan_files import folder_of, made_slice, zip_of

from hkust_demos.checkpoints import load_checkpoint, shipped_folder
from hkust_demos.data.abdomen import ORGANS, abdomen_volume
from hkust_demos.data.grid import Scan
from hkust_demos.data.limits import ScanError
from hkust_demos.data.scans import read_scan
from hkust_demos.vision import ltuda_apply, ltuda_views
from hkust_demos.vision.ltuda_scans import organ_dice, organ_scores, prepare_scan, segment, write_segmentation
from hkust_demos.vision.ltuda_shipped import SIZE, load_segmenter


def save(path, array, affine):
    "A NIfTI file."
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A belly with its truth, and sets of one's own: five livers and two pancreases."
    folder = tmp_path_factory.mktemp("ltuda")
    belly = abdomen_volume(4, site=2, size=64, depth=10)
    save(folder / "scan.nii.gz", belly.scan().array, belly.scan().affine)
    save(folder / "truth.nii.gz", belly.label_array(), belly.scan().affine)
    for number, organ, n in ((1, "liver", 5), (4, "pancreas", 2)):
        for k in range(n):
            one = abdomen_volume(10 * number + k, site=number, size=48, depth=10)
            save(folder / f"sets/{organ}/images/p{k}.nii.gz", one.scan().array, one.scan().affine)
            save(folder / f"sets/{organ}/labels/p{k}.nii.gz", (one.label_array() == number).astype(np.uint8), one.scan().affine)
    return folder


@pytest.fixture(scope="module")
def weights(home):
    "A network that learned for a moment from the sets."
    made = ltuda_apply.train(str(home / "sets"), str(home / "weights"), variant="ltuda", epochs=2)
    assert [path.name for path in made] == ["weights.safetensors", "card.json"]
    return home / "weights"


def run(home, *options, scan="scan.nii.gz", out="seg.nii.gz", weights=None):
    "The command on a file; its paths."
    parser = argparse.ArgumentParser()
    ltuda_apply.add_arguments(parser)
    extra = ["--weights", str(weights)] if weights else []
    return ltuda_apply.run_command(parser.parse_args([str(home / scan), "--out", str(home / out), *extra, *map(str, options)]))


def test_a_training_of_ones_own_tells_what_it_was(weights):
    card = json.loads((weights / "card.json").read_text())
    assert card["networks"] == ["ltuda"] and "held-out cases" in card["data"] and card["command"].endswith("--data DIR --out FOLDER")
    dice = card["metrics"]["dice"]["ltuda"]
    assert set(dice) == set(ORGANS) and dice["liver"] == dice["liver"] and str(weights.parent) not in json.dumps(card)


def test_the_label_map_lies_on_the_voxels_of_the_file(home, capsys):
    written = run(home, "--reference", home / "truth.nii.gz")
    image, scan = nibabel.load(written[0]), nibabel.load(home / "scan.nii.gz")
    labels, record = np.asarray(image.dataobj), json.loads(written[1].read_text())
    assert image.shape == scan.shape and np.allclose(image.affine, scan.affine) and image.get_data_dtype() == np.uint8
    assert record["labels"] == {"0": "background", "1": "liver", "2": "spleen", "3": "kidney", "4": "pancreas"} and "teaching" in record["note"]
    voxel = abs(np.linalg.det(scan.affine)) / 1000
    assert record["milliliters"]["liver"] == pytest.approx((labels == 1).sum() * voxel, abs=0.06)
    assert record["dice"] == organ_dice(labels, np.asarray(nibabel.load(home / "truth.nii.gz").dataobj))
    assert record["weights_sha256"] == load_checkpoint(shipped_folder("ltuda"))[1]["sha256"] and "teaching" in capsys.readouterr().err
    assert record["dice"]["liver"] > 0.7


@pytest.mark.parametrize("codes", ["LPS", "SPL", "AIL"])
def test_another_orientation_of_the_file_gets_the_same_organs_in_its_own_axes(home, codes):
    image = nibabel.load(home / "scan.nii.gz")
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(codes))
    nibabel.save(image.as_reoriented(turn), home / f"{codes}.nii.gz")
    second = run(home, scan=f"{codes}.nii.gz", out=f"{codes}-seg.nii.gz")
    turned = nibabel.load(second[0])
    assert nibabel.aff2axcodes(turned.affine) == tuple(codes)
    assert (np.asarray(turned.dataobj) == 1).sum() > 100
    assert np.array_equal(read_scan(second[0]).array, read_scan(run(home, "--force", out="b.nii.gz")[0]).array)


def dicom_slices(belly, **tags):
    "A belly as slices of a DICOM series, head first or not."
    depth, size = belly.volume.shape[0], belly.volume.shape[1:]
    return [made_slice(depth=20.0 * k, number=k + 1, size=size, RescaleSlope=1, RescaleIntercept=0, PixelSpacing=[6.25, 6.25], SliceThickness=20,
                       PixelData=np.rint(belly.volume[k]).astype("<i2").tobytes(), **tags) for k in range(depth)]


def test_a_dicom_series_in_a_folder_or_zip_gives_what_its_nifti_gives(home, tmp_path):
    belly = abdomen_volume(4, site=2, size=64, depth=10)
    slices = dicom_slices(belly)
    folder_of(tmp_path / "series", slices)
    zip_of(tmp_path / "series.zip", [(f"{k}.dcm", data) for k, data in enumerate(slices)])
    save(tmp_path / "whole.nii.gz", np.rint(belly.scan().array), belly.scan().affine)
    labels = [read_scan(run(tmp_path, scan=name, out=f"{k}.nii.gz")[0]).array for k, name in enumerate(("series", "series.zip", "whole.nii.gz"))]
    assert (labels[0] == 1).sum() > 100 and np.array_equal(labels[0], labels[1]) and np.array_equal(labels[0], labels[2]) and "DOE" not in (tmp_path / "0.json").read_text()


def test_one_slice_and_a_picture_without_units(home, tmp_path, capsys):
    belly = abdomen_volume(4, site=2, size=64, depth=10)
    (tmp_path / "one.dcm").write_bytes(dicom_slices(belly)[5])
    assert nibabel.load(run(tmp_path, scan="one.dcm")[0]).shape == (64, 64, 1)
    np.savez(tmp_path / "picture.npz", image=(belly.volume[5].clip(-325, 325) / 650 + 0.5).astype(np.float32))
    record = json.loads(run(tmp_path, scan="picture.npz", out="p.nii.gz")[1].read_text())
    assert "no Hounsfield units" in record["warnings"][0] and "no Hounsfield units" in capsys.readouterr().err
    assert record["milliliters"]["liver"] is None


def test_an_official_file_brings_its_reference(tmp_path):
    belly = abdomen_volume(4, site=2, size=64, depth=6)
    np.savez(tmp_path / "case_11.npz", belly.volume.transpose(2, 1, 0), belly.labels.transpose(2, 1, 0))
    written = run(tmp_path, scan="case_11.npz")
    assert json.loads(written[1].read_text())["dice"]["liver"] > 0.5
    assert nibabel.load(written[0]).shape == (64, 64, 6)


def four_axes(home, folder):
    array = np.repeat(np.asarray(nibabel.load(home / "scan.nii.gz").dataobj)[..., None], 2, 3)
    return save(folder / "series.nii.gz", array, np.eye(4)), "choose one with frame"


def magnetic(home, folder):
    (folder / "mr.dcm").write_bytes(made_slice(size=(64, 64), Modality="MR"))
    return folder / "mr.dcm", "modality MR"


def unscaled(home, folder):
    return save(folder / "mr.nii.gz", np.random.default_rng(0).random((40, 40, 4), np.float32) * 800, np.eye(4)), "not look like a CT"


def only_air(home, folder):
    return save(folder / "air.nii.gz", np.random.default_rng(0).normal(-1000, 5, (40, 40, 4)).astype(np.float32), np.eye(4)), "no body"


def empty(home, folder):
    return save(folder / "empty.nii.gz", np.zeros((40, 40, 4), np.float32), np.eye(4)), "constant"


def missing(home, folder):
    return folder / "nothing.nii.gz", "no such file"


@pytest.mark.parametrize("bad", [four_axes, magnetic, unscaled, only_air, empty, missing])
def test_what_is_no_ct_of_a_belly_is_refused_and_nothing_is_written(home, tmp_path, bad):
    path, words = bad(home, tmp_path)
    with pytest.raises(ScanError, match=words):
        run(tmp_path, scan=path.name)
    assert not (tmp_path / "seg.nii.gz").exists() and not (tmp_path / "seg.json").exists()


def test_a_reference_of_another_scan_or_numbering_is_refused(home, tmp_path):
    small = save(tmp_path / "small.nii.gz", np.zeros((10, 10, 3), np.uint8), np.eye(4))
    with pytest.raises(ScanError, match="small.nii.gz has 10 x 10 x 3 voxels and the scan 64 x 64 x 10"):
        run(home, "--reference", small, out="x.nii.gz")
    elsewhere = save(tmp_path / "far.nii.gz", np.zeros((64, 64, 10), np.uint8), np.diag([6.25, 6.25, 20, 1]) + np.eye(4, k=3) * 50)
    with pytest.raises(ScanError, match="elsewhere in space"):
        run(home, "--reference", elsewhere, out="x.nii.gz")
    high = save(tmp_path / "high.nii.gz", np.full((64, 64, 10), 41, np.uint8), nibabel.load(home / "scan.nii.gz").affine)
    with pytest.raises(ValueError, match="holds the label 41"):
        run(home, "--reference", high, out="x.nii.gz")
    assert not (home / "x.nii.gz").exists()


def test_files_are_never_replaced_without_being_told(home, tmp_path):
    first = run(tmp_path, scan=home / "scan.nii.gz")
    before = first[0].stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="--force"):
        run(tmp_path, scan=home / "scan.nii.gz")
    assert first[0].stat().st_mtime_ns == before and run(tmp_path, "--force", scan=home / "scan.nii.gz") == first
    (tmp_path / "other.json").write_text("mine")
    with pytest.raises(FileExistsError, match="other.json"):
        run(tmp_path, scan=home / "scan.nii.gz", out="other.nii.gz")
    with pytest.raises(ValueError, match="written as .nii or .nii.gz"):
        run(tmp_path, scan=home / "scan.nii.gz", out="seg.png")


def test_weights_of_ones_own_answer_and_those_of_something_else_are_a_sentence(home, weights, tmp_path, capsys):
    record = json.loads(run(tmp_path, scan=home / "scan.nii.gz", out="own.nii.gz", weights=weights)[1].read_text())
    assert record["weights_sha256"] == load_checkpoint(weights)[1]["sha256"] and "teaching" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="no network 'pseudo'"):
        run(tmp_path, "--network", "pseudo", scan=home / "scan.nii.gz", weights=weights)
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="holds no weights.safetensors"):
        run(tmp_path, scan=home / "scan.nii.gz", weights=tmp_path / "weights")


@pytest.mark.parametrize("options, words", [
    (dict(data="sets"), "needs --out"), (dict(epochs=3), "need --data"), (dict(data="sets", out="w", variant="full"), "variant is 'full'"),
    (dict(data="sets", out="w", epochs=0), "epochs is 0"), (dict(data="nowhere", out="w"), "is no folder")])
def test_trainings_that_cannot_be_are_refused_early(options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        ltuda_apply.train(**options)


def test_one_organ_alone_is_nothing_to_merge(home, tmp_path):
    for what in ("images", "labels"):
        (tmp_path / "sets/liver" / what).mkdir(parents=True)
        (tmp_path / "sets/liver" / what / "p0.nii.gz").write_bytes((home / f"sets/liver/{what}/p0.nii.gz").read_bytes())
    with pytest.raises(ValueError, match="1 organ"):
        ltuda_apply.training_sets(tmp_path / "sets")


def test_held_out_cases_are_in_no_training_slice(home):
    (images, labels, task_ids), held, words = ltuda_apply.training_sets(home / "sets")
    rows = {image.numpy().tobytes() for image in images}
    assert "held-out" in words and not rows & {image.numpy().tobytes() for image in held[0]}
    assert all(set(label.unique().tolist()) <= {0, task} for label, task in zip(labels, task_ids.tolist()))


def test_islands_go_and_the_background_is_what_no_organ_reaches():
    network, square = load_segmenter("ltuda"), abdomen_volume(4, site=2, size=SIZE, depth=6).volume
    raw, clean = (organ_scores(network, square, threshold=0.4, clean=keep) for keep in (False, True))
    assert raw.shape == (5, 6, SIZE, SIZE) and (raw[0] == np.float32(0.4)).all()
    before, after = raw.argmax(0), clean.argmax(0)
    assert 0 < (after > 0).sum() <= (before > 0).sum()
    from scipy.ndimage import label
    assert all(label(after == organ)[1] <= (2 if organ == 3 else 1) for organ in range(1, 5))
    with pytest.raises(ValueError, match="threshold"):
        organ_scores(network, square, threshold=1.5)


def test_the_labels_of_a_finer_grid_are_those_of_the_square():
    network, belly = load_segmenter("ltuda"), abdomen_volume(4, site=2, size=64, depth=6)
    fine = Scan(belly.scan().array.repeat(3, 0).repeat(3, 1), (400 / 192, 400 / 192, 200 / 6), np.diag([400 / 192, 400 / 192, 200 / 6, 1]), "CT", "")
    coarse, detailed = (segment(prepare_scan(scan), network).labels for scan in (belly.scan(), fine))
    assert detailed.shape == (192, 192, 6) and (coarse > 0).sum() > 100 and (detailed[1::3, 1::3] == coarse).mean() > 0.9


def test_uncertainty_is_a_bit_at_most_and_lies_where_networks_waver():
    found = segment(prepare_scan(abdomen_volume(4, site=2, size=64, depth=4).scan()), load_segmenter("ltuda"))
    doubt = found.uncertainty()
    p = found.scores[1:].clip(1e-7, 1 - 1e-7).astype(np.float64)
    assert np.allclose(doubt, (-p * np.log2(p) - (1 - p) * np.log2(1 - p)).max(0), atol=1e-3)
    sure = np.abs(found.scores[1:] - 0.5).min(0) > 0.499
    assert doubt.shape == (4, SIZE, SIZE) and 0 <= doubt.min() and 0.5 < doubt.max() <= 1 and sure.any() and doubt[sure].max() < 0.1


def test_a_map_that_cannot_be_finished_leaves_nothing(home, tmp_path, monkeypatch):
    found = segment(prepare_scan(read_scan(home / "scan.nii.gz")), load_segmenter("ltuda"))
    with pytest.raises(TypeError):
        write_segmentation(tmp_path / "seg.nii.gz", found, {"bad": object()})
    assert not (tmp_path / "seg.json").exists()


def test_views_draw_the_window_and_refuse_what_is_not_there():
    belly = abdomen_volume(4, site=2, size=64, depth=4)
    network = load_segmenter("ltuda")
    found = {caption: segment(prepare_scan(belly.scan()), network) for caption in ltuda_views.COMPARED}
    plain, narrow = (np.asarray(ltuda_views.slice_tiles(found, 2, level=level, width=width)[0][1]) for level, width in ((0, 650), (40, 200)))
    assert plain.shape == narrow.shape == (256, 256, 3) and plain.std() < narrow.std()
    words = ltuda_views.dice_words(found, np.where(belly.label_array() == 4, 0, belly.label_array()))
    assert words.count("not shown") == 3 and words.count("\n") == 4
    with pytest.raises(ValueError, match="slices 0 to 3"):
        ltuda_views.slice_tiles(found, 4)
    with pytest.raises(ValueError, match="width"):
        ltuda_views.slice_tiles(found, 1, width=0)


def test_scores_of_torch_and_numpy_agree():
    network = load_segmenter("ltuda")
    square = abdomen_volume(4, site=2, size=SIZE, depth=3).volume
    images = torch.from_numpy((square.clip(-325, 325) / 325).astype(np.float32))[:, None]
    assert (organ_scores(network, square, clean=False).argmax(0) == network.predict(images).numpy()).mean() > 0.999
    assert (organ_scores(network, square, "unlabeled", clean=False).argmax(0) == network.predict(images, "unlabeled").numpy()).mean() > 0.999
