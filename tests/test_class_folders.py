"Folders of classes as people lay them out: the label that is meant, or the sentence."
import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from hkust_demos.data.class_folders import LayoutError, class_name, decode_names, folder_names, is_leftover, understand
from hkust_demos.data.scans import ScanError
from hkust_demos.data.skin import read_color, read_labelled


def picture(shade=90, kind="PNG", **more):
    "The bytes of a small picture."
    file = io.BytesIO()
    Image.new("RGB", (12, 12), (shade, 60, 30)).save(file, kind, **more)
    return file.getvalue()


def folder(root, files):
    "A folder of files, name -> bytes."
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


# labels from names

@pytest.mark.parametrize("names, classes, groups, parts", [
    (["mel/train/1.png", "mel/test/2.png", "nv/train/3.png"], ["mel", "mel", "nv"], ["", "", ""], ["train", "test", "train"]),
    (["Training/mel/1.png", "Validation/nv/2.png"], ["mel", "nv"], ["", ""], ["Training", "Validation"]),
    (["mel/patient_01/1.png", "nv/patient_02/2.png", "nv/patient_01/3.png"], ["mel", "nv", "nv"], ["patient_01", "patient_02", "patient_01"], ["", "", ""]),
    (["mel/patient_mel_001/1.png", "nv/patient_nv_002/2.png"], ["mel", "nv"], ["patient_mel_001", "patient_nv_002"], ["", ""]),
    (["mel/1/1.png", "nv/1/2.png"], ["mel", "nv"], ["mel/1", "nv/1"], ["", ""]),
    (["sub-01/mel/1.png", "sub-02/nv/2.png"], ["mel", "nv"], ["sub-01", "sub-02"], ["", ""]),
    (["mel/1.png", "mel/masks/1.png", "nv/2.png"], ["mel", None, "nv"], ["", "", ""], ["", "", ""]),
    (["mel/images/1.png", "mel/ground_truth/1.png", "nv/images/2.png"], ["mel", None, "nv"], ["", "", ""], ["", "", ""]),
    (["benign/benign (1).png", "benign/benign (1)_mask.png", "benign/benign (1)_mask_1.png", "normal/2.png"], ["benign", None, None, "normal"], [""] * 4, [""] * 4),
    (["mel/1.png", "nv/2.png", "masks/1.png"], ["mel", "nv", None], ["", "", ""], ["", "", ""]),
    (["set/fold_1/mel/1.png", "set/fold_2/nv/2.png"], ["mel", "nv"], ["", ""], ["fold_1", "fold_2"]),
    (["0/1.png", "1/2.png"], ["0", "1"], ["", ""], ["", ""]),
    (["T1/patient1/1.png", "T2/patient2/1.png"], ["T1", "T2"], ["patient1", "patient2"], ["", ""]),
    (["with_mask/1.png", "without_mask/2.png"], ["with_mask", "without_mask"], ["", ""], ["", ""])])
def test_the_label_that_is_meant(names, classes, groups, parts):
    found = understand(names)
    assert [*found.classes] == classes and [*found.groups] == groups and [*found.parts] == parts
    assert bool(found.notes) == (None in classes or any(groups) or any(parts))


@pytest.mark.parametrize("names, sentence", [
    (["train/1.png", "test/2.png"], "'test', 'train', which is no class; put one folder a class below"),
    (["test/1.png", "control/2.png"], "parts of a set, or classes"),
    (["male/mel/1.png", "female/nv/1.png"], "are 'female', 'male' the classes, or 'mel', 'nv'"),
    (["mel/1.png", "mel/new/2.png", "nv/3.png"], "the classes, or 'new'"),
    (["patient_1/1.png", "patient_2/2.png"], "named like patients or cases"),
    (["10023/1.png", "10024/1.png"], "named like patients or cases"),
    (["mel/1.png", "nv/2.png", "mask/9.png"], "a class, or masks"),
    (["mel/masks/1.png", "nv/masks/2.png"], "0 classes: only masks"),
    (["train/Mel/1.png", "test/mel/2.png", "test/nv/2.png"], "only in capital letters"),
    (["images/1.png", "images/2.png"], "'images', which is no class"),
    (["1.png", "mel/2.png"], "outside of any folder")])
def test_what_names_cannot_decide(names, sentence):
    with pytest.raises(LayoutError, match=sentence):
        understand(names)


def test_leftovers_of_computers():
    for name in ("__MACOSX/mel/._1.png", "mel/.DS_Store", "mel/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "mel/Thumbs.db", "#recycle/1.png", "mel/~$list.docx",
                 "$RECYCLE.BIN/1.png", "mel/.1.png.icloud", "mel/.ipynb_checkpoints/1.png"):
        assert is_leftover(name), name
    assert not any(map(is_leftover, ("mel/1.png", "mel/eaDir/1.png", "thumbs/1.png")))


# names

@pytest.mark.parametrize("name, label", [("me\u0301lanome", "m\u00e9lanome"), ("मेलेनोमा", "मेलेनोमा"), ("basal & squamous", "basal & squamous"), ("ไฝ", "ไฝ"),
                                         (" nevus ", "nevus"), ("شامة", "شامة"), ("a'b, c; d", "a'b, c; d"), ("Grad II–III", "Grad II–III"), ("🙂", "🙂")])
def test_names_in_any_script(name, label):
    assert class_name(name) == label


@pytest.mark.parametrize("name", ["<b>", "a\nb", "a\u202eb", "a\\b", "", "x" * 61, "\ud800"])
def test_names_that_are_refused(name):
    with pytest.raises(LayoutError, match="rename it"):
        class_name(name)


@pytest.mark.parametrize("encoding, names, language", [
    ("gb18030", ["黑色素瘤/1.png", "良性痣/2.png"], "GBK"), ("shift_jis", ["メラノーマ/1.png", "良性/表.png"], "Shift JIS"), ("big5", ["黑色素瘤/1.png", "良性/2.png"], "Big5"),
    ("cp437", ["Mélanome/1.png", "bénin/2.png"], "DOS"), ("cp1252", ["Mélanome/1.png", "bénin/2.png"], "Windows"), ("cp866", ["Меланома/1.png", "Невус/2.png"], "Cyrillic")])
def test_names_of_old_archives(tmp_path, encoding, names, language):
    raw = [name.encode(encoding) for name in names]
    found, note = decode_names(raw)
    assert found == names and language in note
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for index in range(len(names)):
            archive.writestr("\x7f" * (len(raw[index]) - 1) + str(index), picture())
    data = packed.getvalue()
    for index, name in enumerate(raw):  # as an old program wrote them: bytes, and no word on their encoding
        data = data.replace(b"\x7f" * (len(name) - 1) + str(index).encode(), name)
    (tmp_path / "old.zip").write_bytes(data)
    labelled, notes = read_labelled(tmp_path / "old.zip")
    assert {*labelled.names} == {name.split("/")[0] for name in names} and any(language in note for note in notes)


def test_utf8_names_without_their_flag_and_bytes_that_fit_nothing():
    assert decode_names(["黑色素瘤".encode(), b"plain"]) == (["黑色素瘤", "plain"], "")
    with pytest.raises(LayoutError, match="encoding that cannot be told"):
        decode_names([b"\xff\xb3\xfe\xb0/1.png"])
    assert folder_names([os.fsdecode("良性痣/1.png".encode("gb18030"))])[0] == ["良性痣/1.png"]


def test_two_spellings_of_one_name_are_one_class(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name in ("me\u0301lanome/1.png", "m\u00e9lanome/2.png", "b\u00e9nin/3.png"):
            archive.writestr(name, picture())
    assert read_labelled(tmp_path / "s.zip")[0].names == ("b\u00e9nin", "m\u00e9lanome")


# pictures

def test_a_folder_from_a_nas_with_parts_masks_and_patients(tmp_path):
    files = {f"{part}/{name}/patient_{i}/{i}.png": picture(40 + i) for i, (part, name) in enumerate([("train", "mel"), ("train", "nv"), ("test", "mel"), ("test", "nv")])}
    files |= {"train/mel/patient_0/0_mask.png": picture(), "train/mel/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg": b"x", "train/Thumbs.db": b"x", "notes.csv": b"x"}
    found, notes = read_labelled(folder(tmp_path / "set", files))
    assert found.names == ("mel", "nv") and sorted(found.labels.tolist()) == [0, 0, 1, 1]
    assert {*found.groups} == {f"patient_{i}" for i in range(4)} and sorted(found.parts) == ["test", "test", "train", "train"]
    assert len(notes) == 4 and "1 pictures were taken for masks" in " ".join(notes) and "1 files that are no pictures were skipped (.csv)" in notes
    assert found.take([3]).groups == found.groups[3:] and found.take([3]).parts == found.parts[3:]


def test_pictures_of_every_kind(tmp_path):
    kinds = {"1.jfif": "JPEG", "2.bmp": "BMP", "3.webp": "WEBP", "4.gif": "GIF", "5.TIFF": "TIFF", "6.jpe": "JPEG"}
    files = {f"mel/{name}": picture(kind=kind) for name, kind in kinds.items()} | {"nv/1.png": picture()}
    found, notes = read_labelled(folder(tmp_path / "set", files), size=12)
    assert found.labels.tolist() == [0] * 6 + [1] and notes == [] and (found.images - found.images[-1]).abs().max() < 0.06


def test_a_class_that_cannot_be_read_does_not_vanish(tmp_path):
    files = {"mel/1.png": picture(), "nv/1.png": picture(), "scc/IMG_1.HEIC": b"x"}
    with pytest.raises(ScanError, match="has a class 'scc' of .HEIC files only, which are not read; save them as PNG"):
        read_labelled(folder(tmp_path / "set", files))
    (tmp_path / "set/scc/2.png").write_bytes(picture())
    found, notes = read_labelled(tmp_path / "set")
    assert found.names == ("mel", "nv", "scc") and notes == ["1 files that are no pictures were skipped (.heic)"]


def test_a_phone_and_a_book(tmp_path):
    first, second = Image.new("RGB", (12, 12), (200, 60, 30)), Image.new("RGB", (12, 12), (0, 0, 0))
    folder(tmp_path, {"set/nv/1.png": picture()})
    (tmp_path / "set/mel").mkdir()
    first.save(tmp_path / "set/mel/phone.jpg", "MPO", save_all=True, append_images=[second])
    assert abs(read_color(tmp_path / "set/mel/phone.jpg")[0][0].mean().item() - 200 / 255) < 0.03
    assert len(read_labelled(tmp_path / "set")[0]) == 2
    second.copy().save(tmp_path / "set/mel/book.tif", save_all=True, append_images=[Image.new("RGB", (12, 12))])
    with pytest.raises(ScanError, match="book.tif: holds 2 pages or pictures; save the one that you mean"):
        read_labelled(tmp_path / "set")


def test_patients_are_said_once_and_arrays_are_not_opened(tmp_path):
    np.save(folder(tmp_path / "set", {"mel/1.png": picture(), "nv/2.png": picture()}) / "mel/a.npy", np.zeros(2))
    assert read_labelled(tmp_path / "set")[1] == ["1 files that are no pictures were skipped (.npy)"]
