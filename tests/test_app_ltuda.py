"The LTUDA app as a program and as a person see it."
import json
import re
import time

import nibabel
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from scan_files import made_slice, zip_of

from hkust_demos.catalog import ready_methods
from hkust_demos.data.abdomen import abdomen_volume
from hkust_demos.data.archives import archive_folder
from hkust_demos.files import DataNotInstalled

pytestmark = pytest.mark.skipif("ltuda" not in ready_methods(), reason="the catalog does not call LTUDA ready yet")
MINE = "my CT"


@pytest.fixture(scope="module")
def client(hub):
    "A client of the running app."
    return Client(f"{hub.url}/ltuda/", verbose=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A generated belly with its truth, as files."
    folder, belly = tmp_path_factory.mktemp("bellies"), abdomen_volume(6, site=3, size=64, depth=8)
    for name, array in (("ct", belly.scan().array), ("truth", belly.label_array())):
        nibabel.save(nibabel.Nifti1Image(array, belly.scan().affine), folder / f"{name}.nii.gz")
    slices = [made_slice(depth=25.0 * k, number=k + 1, size=(64, 64), RescaleSlope=1, RescaleIntercept=0, PixelSpacing=[6.25, 6.25],
                         PixelData=np.rint(belly.volume[k]).astype("<i2").tobytes()) for k in range(8)]
    zip_of(folder / "series.zip", [(f"{k}.dcm", data) for k, data in enumerate(slices)])
    return folder


def upload(client, path, **more):
    "Segment a file."
    return client.predict(source=MINE, upload=handle_file(path), **more, api_name="/run")


def table(words):
    "Dice table in the words: network -> numbers."
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in words.splitlines() if line.startswith("| ") and "---" not in line]
    return {row[0]: row[1:] for row in rows[1:]}


def test_endpoints_have_names(client):
    assert {"/live", "/run", "/view", "/inspect"} <= set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])


def test_a_slider_moves_the_slice_and_the_box(client):
    tiles, words = client.predict(api_name="/live")
    assert tiles.count("<img ") == 10 and set(table(words)) == {"partial labels only", "pseudo-labels, no mixing", "LTUDA"}
    pictures = tiles.split("<img ")[1:]
    other_slice, other_box = (client.predict(**knob, api_name="/live")[0].split("<img ")[1:] for knob in (dict(index=6), dict(row=0.8)))
    assert [a == b for a, b in zip(pictures, other_slice)] == [False] * 5 + [True] * 5
    assert [a == b for a, b in zip(pictures, other_box)] == [True] * 7 + [False] * 3
    begun = time.monotonic()
    for index in (9, 10, 11):
        client.predict(index=index, api_name="/live")
    assert (time.monotonic() - begun) / 3 < 5  # patience, not the promise: benchmarks/apps.py measures


@pytest.mark.parametrize("bad, words", [(dict(site=9), "(?i)site is 9|maximum"), (dict(index=99), "(?i)slices 0 to 23|maximum")])
def test_knobs_beyond_their_range_are_sentences(client, bad, words):
    with pytest.raises(AppError, match=words):
        client.predict(**bad, api_name="/live")


def test_the_generated_volume_comes_back_in_time_with_its_files(client):
    begun = time.monotonic()
    words, tiles, slider, written = client.predict(api_name="/run")
    assert time.monotonic() - begun < 15
    assert "not for a clinical CT" in words and "mL" in words and tiles.count("<img ") == 5 and slider["maximum"] == 23
    scores = table(words)
    assert float(scores["LTUDA"][0]) > 0.8 and len(scores["LTUDA"]) == 5
    image = nibabel.load(next(f for f in written if f.endswith(".nii.gz")))
    assert image.shape == (128, 128, 24) and {0, 1, 2} <= set(np.unique(np.asarray(image.dataobj))) <= {0, 1, 2, 3, 4}
    record = json.loads(open(next(f for f in written if f.endswith(".json"))).read())
    assert round(record["dice"]["liver"], 2) == float(scores["LTUDA"][0])


def test_the_window_changes_the_picture_and_not_the_organs(client):
    first, narrow = client.predict(index=10, api_name="/view"), client.predict(index=10, level=40, width=200, api_name="/view")
    assert first.count("<img ") == 5 and first != narrow and first.split("<img ")[-1] == narrow.split("<img ")[-1]
    with pytest.raises(AppError, match="(?i)width|minimum"):
        client.predict(index=10, width=0, api_name="/view")


def test_a_ct_of_ones_own_with_a_reference(client, files):
    words, tiles, slider, written = upload(client, files / "ct.nii.gz", reference=handle_file(files / "truth.nii.gz"))
    assert slider["maximum"] == 7 and float(table(words)["LTUDA"][0]) > 0.5 and "the reference" in tiles
    image = nibabel.load(written[0])
    assert image.shape == (64, 64, 8) and np.allclose(image.affine, nibabel.load(files / "ct.nii.gz").affine)
    assert client.predict(3, source=MINE, upload=handle_file(files / "ct.nii.gz"), api_name="/view").count("<img ") == 5
    assert "64 x 64 x 8" in client.predict(handle_file(files / "ct.nii.gz"), api_name="/inspect")


def test_a_zip_of_a_series_gives_what_its_nifti_gives(client, files):
    found = [np.asarray(nibabel.load(upload(client, files / name)[3][0]).dataobj) for name in ("series.zip", "ct.nii.gz")]
    assert (found[0] > 0).sum() > 50 and abs(int((found[0] == 1).sum()) - int((found[1] == 1).sum())) < 0.05 * (found[1] == 1).sum()


def test_prototypes_decide_too(client):
    words = client.predict(classifier="nearest prototype, unlabeled bank", clean=False, api_name="/run")[0]
    assert len(table(words)["LTUDA"]) == 5 and table(words) != table(client.predict(api_name="/run")[0])


def test_the_real_slab_in_time_or_a_sentence(client):
    try:
        archive_folder("ct-organs")
    except DataNotInstalled:
        with pytest.raises(AppError, match="hkust-demos data get ct-organs"):
            client.predict(source="real CT (one person)", api_name="/run")
        return
    begun = time.monotonic()
    words, tiles, slider, written = client.predict(source="real CT (one person)", api_name="/run")
    assert time.monotonic() - begun < 30
    assert nibabel.load(written[0]).shape == (122, 101, 30) and slider["maximum"] == 29 and "not for a clinical CT" in words


def bad_files(folder):
    "name -> (file, words of the refusal)"
    random = np.random.default_rng(0)
    volumes = {"series4d.nii.gz": (random.normal(-200, 400, (20, 20, 4, 3)), "choose one with frame"), "mr.nii.gz": (random.random((30, 30, 5)) * 900, "look like a CT"),
               "air.nii.gz": (random.normal(-1000, 3, (30, 30, 5)), "no body"), "empty.nii.gz": (np.zeros((30, 30, 5)), "constant"),
               "nan.nii.gz": (np.full((30, 30, 5), np.nan), "finite")}
    for name, (array, words) in volumes.items():
        nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), folder / name)
    (folder / "mr.dcm").write_bytes(made_slice(size=(64, 64), Modality="MR"))
    (folder / "text.nii.gz").write_bytes(b"no scan")
    return {**{name: words for name, (_, words) in volumes.items()}, "mr.dcm": "modality MR", "text.nii.gz": "give DICOM"}


def test_bad_files_are_sentences(client, tmp_path):
    for name, words in bad_files(tmp_path).items():
        with pytest.raises(AppError) as error:
            upload(client, tmp_path / name)
        text = str(error.value)
        assert words in text and len(text) > 30 and "Traceback" not in text and "unforeseen" not in text and str(tmp_path) not in text, (name, text)
    with pytest.raises(AppError, match="no file was uploaded"):
        client.predict(source=MINE, api_name="/run")


def test_a_reference_of_another_scan_is_a_sentence(client, files, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 3), np.uint8), np.eye(4)), tmp_path / "small.nii.gz")
    with pytest.raises(AppError, match="small.nii.gz has 9 x 9 x 3 voxels and the scan 64 x 64 x 8"):
        upload(client, files / "ct.nii.gz", reference=handle_file(tmp_path / "small.nii.gz"))


def test_another_plane_is_turned(client, files, tmp_path):
    image = nibabel.load(files / "ct.nii.gz")
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(image.affine), nibabel.orientations.axcodes2ornt("SPL"))
    nibabel.save(image.as_reoriented(turn), tmp_path / "turned.nii.gz")
    written = upload(client, tmp_path / "turned.nii.gz")[3]
    straight = upload(client, files / "ct.nii.gz")[3]
    assert nibabel.load(written[0]).shape == (8, 64, 64)
    assert np.array_equal(nibabel.as_closest_canonical(nibabel.load(written[0])).get_fdata(), nibabel.as_closest_canonical(nibabel.load(straight[0])).get_fdata())


def test_a_person_moves_segments_and_downloads_by_keyboard(hub, watched, files):
    page = watched(f"{hub.url}/ltuda/", height=1000)
    page.locator("#finished img").first.wait_for(timeout=60_000)
    assert page.locator("#finished img:visible").count() == 10 and page.get_by_text("not for a clinical CT").first.is_visible()
    assert page.get_by_text("Label map (.nii.gz)").filter(visible=True).count() == 0
    before = page.locator("#finished img").nth(3).get_attribute("src")
    page.get_by_label("number input for Axial slice (0: lowest)").fill("7")
    page.wait_for_function("before => document.querySelectorAll('#finished img')[3].src !== before", arg=before, timeout=60_000)
    page.get_by_role("button", name="My CT").press("Enter")
    page.locator("input[type=file]").first.set_input_files(str(files / "ct.nii.gz"))
    page.get_by_text("64 x 64 x 8").wait_for(timeout=60_000)
    page.get_by_role("radio", name=MINE).check()
    page.get_by_role("button", name="Segment", exact=True).press("Enter")
    page.get_by_text("LTUDA finds").wait_for(timeout=60_000)
    page.get_by_text("ct-organs").first.wait_for(timeout=60_000)
    page.get_by_role("button", name="soft tissue: 40 / 400").press("Enter")
    page.wait_for_function("() => document.querySelector('[aria-label=\"number input for Window (HU)\"]').value === '400'", timeout=60_000)
    page.close()
    assert page.problems == [] and page.outside == []
