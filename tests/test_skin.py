"Phantom lesions, and readers of labelled pictures, beyond what their notebook shows."
import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from hkust_demos.data.scans import ScanError
from hkust_demos.data.skin import (CENTERS, CLASSES, ISIC_COUNTS, SUBTYPES, IchFolder, IsicFolder, color_constancy, dirichlet_counts,
                                   group_split, isic_counts, long_tail_counts, make_federation, make_lesions, read_color, read_ich_labels,
                                   read_labelled)


def png(color=(200, 120, 90), size=(20, 16), mode="RGB"):
    "A small picture as bytes."
    buffer = io.BytesIO()
    Image.new(mode, size, color).save(buffer, "PNG")
    return buffer.getvalue()


def make_zip(path, members):
    "A zip of names and bytes."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# phantoms

def test_counts_keep_proportions():
    small = isic_counts(100)
    assert ((small > 0) == (ISIC_COUNTS > 0)).all()
    big = ISIC_COUNTS > 200
    shares = ISIC_COUNTS / ISIC_COUNTS.sum(1, keepdims=True)
    assert np.abs(small / small.sum(1, keepdims=True) - shares)[big].max() < 0.05
    with pytest.raises(ValueError, match="at least 8"):
        isic_counts(3)


@pytest.mark.parametrize("options", [dict(ratio=2), dict(ratio=-1), dict(num_classes=1)])
def test_a_long_tail_that_is_none(options):
    with pytest.raises(ValueError):
        long_tail_counts(100, **options)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
def test_dirichlet_deals_everything(alpha):
    totals = long_tail_counts(500)
    counts = dirichlet_counts(totals, num_clients=5, alpha=alpha, seed=3, smallest=5)
    assert (counts.sum(0) == totals).all() and counts.sum(1).min() >= 5
    assert (counts == dirichlet_counts(totals, num_clients=5, alpha=alpha, seed=3, smallest=5)).all()
    assert (counts != dirichlet_counts(totals, num_clients=5, alpha=alpha, seed=4, smallest=5)).any()


@pytest.mark.parametrize("options", [dict(alpha=0), dict(alpha=float("nan")), dict(num_clients=0), dict(num_clients=1000)])
def test_dirichlet_refuses(options):
    with pytest.raises(ValueError, match="alpha"):
        dirichlet_counts([50, 50], **{"num_clients": 2, "alpha": 1.0, **options})


@pytest.mark.parametrize("size", [8, 32, 48])
def test_pictures_of_any_size_lie_in_the_unit_range(size):
    found = make_lesions(torch.arange(8).repeat(3), seed=1, centers=torch.arange(24) % 9, size=size)
    assert found.images.shape == (24, 3, size, size) and found.images.dtype == torch.float32
    assert 0 <= found.images.min() and found.images.max() <= 1 and torch.isfinite(found.images).all()


def test_blocks_do_not_show():
    "More than one block of 512: still one seed, one set; both sub-types about as often."
    found = make_lesions([1] * 1100, seed=2)
    assert torch.equal(found.images, make_lesions([1] * 1100, seed=2).images)
    assert 0.4 < found.subtypes.float().mean() < 0.6
    assert found.images.flatten(1).unique(dim=0).shape[0] == 1100


def test_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_lesions([0, 1], seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("labels", [[], [-1], [[0, 1]]])
def test_labels_that_cannot_be_painted(labels):
    with pytest.raises(ValueError, match="labels"):
        make_lesions(labels, seed=0)


@pytest.mark.parametrize("options", [dict(size=4), dict(size=1000), dict(noise=-1)])
def test_options_that_cannot_be_painted(options):
    with pytest.raises(ValueError, match="size|noise"):
        make_lesions([0], seed=0, **options)


def test_federations_differ_by_seed_and_are_balanced_where_promised():
    counts = np.array([[3, 2, 0, 0, 0, 0, 0, 1], [0, 4, 4, 0, 0, 0, 0, 0]])
    one, two = (make_federation(counts, seed=seed, per_class=5, per_class_client=2) for seed in (0, 1))
    assert not torch.equal(one.clients[0].images, two.clients[0].images)
    assert one.test.counts().tolist() == [5] * 8 and one.tests[0].counts().tolist() == [2, 2, 0, 0, 0, 0, 0, 2]
    assert set(one.test.centers.tolist()) == {0, 1} and (one.clients[1].centers == 1).all()


def test_take_keeps_all_columns():
    found = make_lesions([0, 1, 2], seed=0, centers=[3, 4, 5])
    part = found.take(torch.tensor([2, 0]))
    assert part.labels.tolist() == [2, 0] and part.centers.tolist() == [5, 3] and torch.equal(part.subtypes, found.subtypes[[2, 0]])


# pictures

def test_modes_of_pictures(tmp_path):
    for mode, color, is_gray in (("RGB", (10, 20, 30), False), ("RGBA", (10, 20, 30, 255), False), ("P", 0, False), ("L", 90, True), ("1", 1, True),
                                 ("I;16", 3000, True), ("LA", (90, 255), True)):
        image, note = (lambda file: read_color(file))(_write(tmp_path, mode, color))
        assert image.shape == (3, 32, 32) and bool(note) == is_gray and torch.isfinite(image).all(), mode
        assert 0 <= image.min() and image.max() <= 1


def _write(folder, mode, color):
    "A picture of one color in a mode."
    path = folder / f"{mode.replace(';', '')}.png"
    Image.new(mode, (40, 40), color).save(path)
    return path


def test_a_photograph_lying_on_its_side_is_turned(tmp_path):
    array = np.zeros((30, 30, 3), np.uint8)
    array[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(array).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image, _ = read_color(tmp_path / "turned.jpg", size=30)
    assert image[:, :5].mean() < 0.1 and image[:, -5:].mean() > 0.9


def test_a_scan_is_taken_with_a_note(tmp_path):
    np.savez(tmp_path / "scan.npz", np.linspace(-1000, 1000, 900, dtype=np.float32).reshape(30, 30))
    image, note = read_color(tmp_path / "scan.npz")
    assert "not a photograph" in note and torch.equal(image[0], image[2])


@pytest.mark.parametrize("data", [b"", b"hello", png()[:40], b"\x89PNG\r\n\x1a\n" + b"\0" * 50])
def test_a_broken_picture_is_one_sentence(tmp_path, data):
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ScanError, match="^bad.png: "):
        read_color(tmp_path / "bad.png")


def test_a_picture_that_claims_too_many_pixels(tmp_path):
    data = bytearray(png())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    (tmp_path / "huge.png").write_bytes(data)
    with pytest.raises(ScanError, match="huge.png"):
        read_color(tmp_path / "huge.png")


def test_color_constancy_of_black_is_black():
    assert torch.equal(color_constancy(torch.zeros(3, 4, 4)), torch.zeros(3, 4, 4))
    gray = torch.full((3, 4, 4), 0.4)
    torch.testing.assert_close(color_constancy(gray), gray)


# zips

def test_a_folder_around_the_classes_and_mac_leftovers(tmp_path):
    members = {"set/a/1.png": png(), "set/a/2.PNG": png(), "set/b/1.jpg": png((0, 0, 0)), "__MACOSX/set/a/._1.png": b"x", "set/.DS_Store": b"x"}
    found, notes = read_labelled(make_zip(tmp_path / "s.zip", members), size=16)
    assert found.names == ("a", "b") and found.labels.tolist() == [0, 0, 1] and found.images.shape == (3, 3, 16, 16) and notes == []


def test_gray_pictures_are_counted(tmp_path):
    found, notes = read_labelled(make_zip(tmp_path / "s.zip", {"a/1.png": png(90, mode="L"), "b/1.png": png()}))
    assert notes == ["1 gray pictures were copied into three colors"]


@pytest.mark.parametrize("members, sentence", [
    ({"a/1.png": png()}, "1 classes"), ({"1.png": png(), "a/1.png": png()}, "outside of any folder"), ({}, "0 classes"),
    ({"a/1.png": png(), "b/1.png": png()[:30]}, "b/1.png"), ({"a/1.png": png(), "b/1.png": b"text"}, "b/1.png"),
    ({"../a/1.png": png(), "b/1.png": png()}, "leaves its folder"), ({"/a/1.png": png(), "b/1.png": png()}, "leaves its folder"),
    ({"<script>/1.png": png(), "b/1.png": png()}, "class folder"), ({"a/x.npy": b"\x93NUMPY", "b/y.npy": b"\x93NUMPY"}, "0 classes"),
    ({f"c{i}/1.png": png() for i in range(65)}, "65 classes")])
def test_zips_that_are_refused(tmp_path, members, sentence):
    with pytest.raises(ScanError, match=sentence) as caught:
        read_labelled(make_zip(tmp_path / "s.zip", members))
    assert str(caught.value).startswith("s.zip")


def test_a_bomb_and_a_file_that_is_no_zip(tmp_path):
    make_zip(tmp_path / "bomb.zip", {"a/1.png": b"\0" * 60_000_000, "b/1.png": png()})
    with pytest.raises(ScanError, match="packed more than|unpacks to"):
        read_labelled(tmp_path / "bomb.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "bomb.zip").read_bytes()[:500])
    (tmp_path / "text.zip").write_text("no zip")
    for name in ("cut.zip", "text.zip"):
        with pytest.raises(ScanError, match=f"^{name}: "):
            read_labelled(tmp_path / name)
    with pytest.raises(ScanError, match="more than 0.01 MB"):
        read_labelled(tmp_path / "bomb.zip", max_mb=0.01)


def test_links_in_a_folder_are_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(png())
    (tmp_path / "set" / "a" / "2.png").symlink_to(secret)
    assert len(read_labelled(tmp_path / "set")[0]) == 2


# splits and layouts

def test_group_split_edges():
    first, second = group_split(["a"] * 5 + ["b"] * 5, share=0.5, seed=0)
    assert len(first) == len(second) == 5
    first, second = group_split([""] * 10, share=0.3, seed=1)
    assert len(first) == 3 and not set(first) & set(second)
    with pytest.raises(ValueError, match="share is 1"):
        group_split(["a"], share=1)


@pytest.fixture
def isic(tmp_path):
    "A tiny ISIC 2019 tree with four images."
    (tmp_path / "ISIC_2019_Training_Input").mkdir()
    names = [f"ISIC_{i:07d}" for i in range(4)]
    for name in names:
        Image.new("RGB", (30, 20), (120, 100, 80)).save(tmp_path / "ISIC_2019_Training_Input" / f"{name}.jpg")
    truth = ["image," + ",".join(CLASSES) + ",UNK"] + [f"{n}," + ",".join(str(float(c == i % 8)) for c in range(9)) for i, n in enumerate(names)]
    known = ["image,age_approx,anatom_site_general,lesion_id,sex"] + [f"{n},,,{lesion}," for n, lesion in zip(names, ("BCN_1", "HAM_1", "MSK4_1", ""))]
    (tmp_path / "ISIC_2019_Training_GroundTruth.csv").write_text("\n".join(truth))
    (tmp_path / "ISIC_2019_Training_Metadata.csv").write_text("\n".join(known))
    return tmp_path


def test_isic_centers_with_and_without_the_camera_table(isic):
    assert IsicFolder(isic).centers.tolist() == ["BCN", "HAM", "MSK4"]
    (isic / "HAM10000_metadata").write_text("lesion_id,image_id,dataset\nHAM_1,ISIC_0000001,vidir_modern\n")
    found = IsicFolder(isic, size=16)
    assert found.centers.tolist() == ["BCN", "vidir modern", "MSK4"] and set(found.centers) <= set(CENTERS)
    assert found.lesions.tolist() == ["BCN_1", "HAM_1", "MSK4_1"] and found[0][0].shape == (3, 16, 16)


def test_isic_split_file(isic):
    rows = ["image,MEL,target,center,fold,fold2", "ISIC_0000000,1,0,0,train,train_0", "ISIC_0000002,0,2,4,test,test_4"]
    (isic / "train_test_split").write_text("\n".join(rows))
    train, test, both = IsicFolder(isic, "train"), IsicFolder(isic, "test"), IsicFolder(isic)
    assert (len(train), len(test), len(both)) == (1, 1, 2)
    assert test.centers.tolist() == ["MSK4"] and test.labels.tolist() == [2]
    (isic / "train_test_split").write_text("\n".join([rows[0], "ISIC_0000000,1,9,0,train,train_0"]))
    with pytest.raises(ValueError, match="target 0 to 7"):
        IsicFolder(isic, "train")


def test_isic_is_read_when_asked_for(isic):
    found = IsicFolder(isic)
    (isic / "ISIC_2019_Training_Input" / "ISIC_0000000.jpg").unlink()
    with pytest.raises(ScanError, match="ISIC_0000000.jpg"):
        found[0]


@pytest.mark.parametrize("text, sentence", [("image,MEL\nx,1", "no column 'NV'"), ("", "no readable CSV"), ("image," + ",".join(CLASSES) + "\nISIC_0000000" + ",x" * 8, "no number")])
def test_isic_tables_that_are_refused(isic, text, sentence):
    (isic / "ISIC_2019_Training_GroundTruth.csv").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        IsicFolder(isic)


def test_isic_names_cannot_leave_the_folder(isic):
    (isic / "train_test_split").write_text("image,target,center,fold,fold2\n../../etc/passwd,0,0,train,train_0")
    with pytest.raises(ValueError, match="must look like"):
        IsicFolder(isic, "train")


def ich_table(rows):
    "The RSNA table of image -> positive subtypes."
    return "\n".join(["ID,Label", *(f"{image}_{kind},{int(kind in positive)}" for image, positive in rows.items() for kind in (*SUBTYPES, "any"))])


def test_ich_pixels_come_through_a_brain_window(tmp_path):
    from pydicom import dcmread
    from pydicom.data import get_testdata_file
    (tmp_path / "stage_2_train").mkdir()
    (tmp_path / "stage_2_train.csv").write_text(ich_table({"ID_0a": ["epidural", "any"], "ID_0b": []}))
    dcmread(get_testdata_file("CT_small.dcm", download=False)).save_as(tmp_path / "stage_2_train" / "ID_0a.dcm")
    found = IchFolder(tmp_path, size=32)
    image, label = found[0]
    assert len(found) == 1 and label == 0 and image.shape == (1, 32, 32)
    assert 0 <= image.min() and image.max() <= 1 and image.std() > 0.01


@pytest.mark.parametrize("text, sentence", [("ID,Label\nID_1_epidural,2", "each Label"), ("ID,Label\nepidural,1", "each ID"),
                                            ("ID,Label\nID_1_epidural,1", "does not have all"), ("a,b\n1,2", "no column 'ID'")])
def test_ich_tables_that_are_refused(tmp_path, text, sentence):
    (tmp_path / "stage_2_train.csv").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_ich_labels(tmp_path / "stage_2_train.csv")


def test_one_picture_of_a_phone_refuses_no_folder(tmp_path):
    "A multi-picture JPEG counts as its photograph, not as pages of which one must be chosen."
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (200, 0, 0)).save(tmp_path / name / "1.png")
        Image.new("RGB", (40, 40), (200, 0, 0)).save(tmp_path / name / "phone.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (20, 10))])
    found, _ = read_labelled(tmp_path, size=16)
    assert len(found.images) == 4 and (found.images[:, 0] > 0.7).all() and (found.images[:, 1] < 0.1).all()
