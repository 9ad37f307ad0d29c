"The D2UE app as a program sees it."
import io
import json
import re
import struct
import time
import zipfile

import nibabel
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hkust_demos.checkpoints import shipped_folder
from hkust_demos.data.phantoms import mni_slices

CHOICES = dict(source="insert a lesion", upload=None, index=-1, frame=None, seed=7, kind="hyper", row=52, column=76, radius=10, contrast=0.3,
               ensemble="pushed apart (RAR)", n_learners=3, score="dual-space uncertainty (D2UE)", quantile=0.99, opacity=0.6)


@pytest.fixture(scope="module")
def client(hub):
    "A client of the running app."
    return Client(f"{hub.url}/d2ue/", verbose=False)


def press(client, **changed):
    "Press Examine with these choices."
    return client.predict(*{**CHOICES, **changed}.values(), api_name="/run")


def upload(client, path, **changed):
    "Examine a file."
    return press(client, source="my scan", upload=handle_file(path), **changed)


@pytest.fixture()
def slice_file(tmp_path):
    "A healthy slice as a PNG of twelve bits; other tests send eight."
    Image.fromarray(np.uint16(4095 * mni_slices(1, 5, size=96).images[0])).save(tmp_path / "slice.png")
    return tmp_path / "slice.png"


def test_endpoints_have_names(client):
    assert {"/live", "/run", "/inspect", "/maps", "/retrain", "/stop"} <= set(client.view_api(return_format="dict")["named_endpoints"])


def test_the_painted_default_returns_everything(client):
    text, panels, learners, histogram, similar = client.predict(api_name="/run")  # no argument: the default example
    assert text.startswith("**reconstruction error, 3 learners") and "healthy slices" in text and "pixel AUROC" in text
    assert all("plot" in picture for picture in (panels, learners, histogram, similar))
    assert json.loads(histogram["plot"])["layout"]["annotations"][0]["text"] == "this slice"
    assert np.shape(json.loads(similar["plot"])["data"][0]["z"]) == (3, 3)


def test_a_move_of_a_knob_answers_with_tiles_and_words(client):
    tiles, words = client.predict(api_name="/live")
    stored = json.loads((shipped_folder("d2ue") / "example.json").read_text())
    assert tiles.count("<img ") == stored["tiles"].count("<img ") == 4 and words == stored["words"]
    moved = [client.predict(**knob, api_name="/live")[0] for knob in (dict(kind="mass"), dict(row=60), dict(contrast=0.5))]
    assert len({tiles, *moved}) == 4
    assert "AUROC" not in client.predict(kind="none", api_name="/live")[1]


@pytest.mark.parametrize("changed", [dict(kind="none", quantile=0.9, opacity=0, ensemble="plain", n_learners=5),
                                     dict(kind="mass", score="reconstruction error", row=0, column=0, n_learners=2)])
def test_other_choices_answer_with_as_many_learners_as_asked_for(client, changed):
    text, _, _, _, similar = press(client, **changed)
    assert "healthy slices" in text and f"{changed['n_learners']} learners" in text
    assert np.shape(json.loads(similar["plot"])["data"][0]["z"]) == (changed["n_learners"], changed["n_learners"])


def test_an_uploaded_picture_and_its_map(client, slice_file):
    assert "healthy slices" in upload(client, slice_file)[0]
    chosen = {**CHOICES, "source": "my scan", "upload": handle_file(slice_file)}
    archive = client.predict(*list(chosen.values())[:13], api_name="/maps")
    with zipfile.ZipFile(archive) as file:
        assert set(file.namelist()) == {"anomaly_map.png", "report.json"}
        assert Image.open(io.BytesIO(file.read("anomaly_map.png"))).size == (96, 96)


def test_a_volume_fits_its_slider(client, tmp_path):
    volume = np.zeros((64, 64, 9), np.float32)
    volume[:, :, 4] = mni_slices(1, 5).images[0].T[::-1, ::-1]
    nibabel.Nifti1Image(volume, np.eye(4)).to_filename(tmp_path / "brain.nii.gz")
    slider, about = client.predict(handle_file(tmp_path / "brain.nii.gz"), None, api_name="/inspect")
    assert slider["maximum"] == 8 and slider["value"] == 4 and "64 x 64 x 9" in about
    assert "healthy slices" in upload(client, tmp_path / "brain.nii.gz", index=4)[0]
    with pytest.raises(AppError, match="constant"):
        upload(client, tmp_path / "brain.nii.gz", index=0)


def test_a_frame_is_asked_for_and_taken(client, tmp_path):
    series = np.zeros((64, 64, 3, 2), np.float32)
    series[:, :, 1, 0] = mni_slices(1, 5).images[0].T[::-1, ::-1]
    nibabel.Nifti1Image(series, np.eye(4)).to_filename(tmp_path / "series.nii.gz")
    with pytest.raises(AppError, match="frame"):
        upload(client, tmp_path / "series.nii.gz")
    assert "healthy slices" in upload(client, tmp_path / "series.nii.gz", frame=0)[0]  # without an index: the middle slice, which alone is not constant


def test_a_ribbon_is_refused_before_it_costs_memory(client, tmp_path):
    Image.fromarray(np.zeros((20, 60_000), np.uint8)).save(tmp_path / "ribbon.png")
    with pytest.raises(AppError, match="4096"):
        upload(client, tmp_path / "ribbon.png")


def huge_header(path):
    "A NIfTI header that claims two gigabytes."
    image = nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)).to_bytes()
    path.write_bytes(image[:40] + struct.pack("<8h", 3, 1000, 1000, 500, 1, 1, 1, 1) + image[56:])


def bomb(path):
    "A zip that grows a thousandfold."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.dcm", bytes(60_000_000))


def climber(path):
    "A zip with a member that would leave its folder."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../outside.dcm", b"x" * 200)


def not_a_number(path):
    "A volume with NaN."
    nibabel.Nifti1Image(np.full((20, 20, 3), np.nan, np.float32), np.eye(4)).to_filename(path)


@pytest.mark.parametrize("name, make", [("huge.nii", huge_header), ("bomb.zip", bomb), ("climb.zip", climber), ("nan.nii", not_a_number),
                                        ("text.png", lambda path: path.write_text("no picture")), ("empty.nii.gz", lambda path: path.write_bytes(b""))])
def test_bad_files_are_sentences(client, tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(AppError) as error:
        upload(client, tmp_path / name)
    text = str(error.value)
    assert name in text and len(text) > 30 and "Traceback" not in text and "unforeseen" not in text and str(tmp_path) not in text


def test_wrong_modality_constant_and_missing_files(client, tmp_path):
    rows, columns = np.mgrid[:128, :128]
    Image.fromarray(np.uint8(255 * ((rows // 16 + columns // 16) % 2))).save(tmp_path / "board.png")
    assert "looks like something else" in upload(client, tmp_path / "board.png")[0]
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(AppError, match="constant"):
        upload(client, tmp_path / "flat.png")
    with pytest.raises(AppError, match="no file was uploaded"):
        press(client, source="my scan")


@pytest.mark.parametrize("n_learners", [1, 6])
def test_other_numbers_of_learners_are_refused(client, n_learners):
    with pytest.raises(AppError, match="(?i)learners is|minimum|maximum|from 2 to 5"):
        press(client, n_learners=n_learners)


RETRAINED = "retrained on this page"
EPOCH = re.compile(r"epoch ([2-9]|1\d) of 20")  # a page may miss one: it lasts a quarter of a second


def test_a_page_trains_and_uses_its_own_learners(hub):
    mine, other = (Client(f"{hub.url}/d2ue/", verbose=False) for _ in range(2))
    with pytest.raises(AppError, match="press Retrain first"):
        press(mine, ensemble=RETRAINED)
    job = mine.submit(2, 0.5, 2, 1, api_name="/retrain")
    text, curves, chosen = job.result(timeout=120)
    seen = [output[0] for output in job.outputs()]
    assert "2 learners trained for 2 epochs" in text and chosen == RETRAINED
    assert any("learner 2 of 2, epoch 1 of 2" in words for words in seen)
    assert [line["name"] for line in json.loads(curves["plot"])["data"]] == ["learner 1", "learner 2"]
    shown, _, _, _, similar = press(mine, ensemble=RETRAINED)
    assert "2 learners" in shown and np.shape(json.loads(similar["plot"])["data"][0]["z"]) == (2, 2)
    archive = mine.predict(*list({**CHOICES, "ensemble": RETRAINED}.values())[:13], api_name="/maps")
    with zipfile.ZipFile(archive) as file:
        report = json.loads(file.read("report.json"))
    assert (report["ensemble"], report["n_learners"]) == ("retrained", 2)
    with pytest.raises(AppError, match="press Retrain first"):
        press(other, ensemble=RETRAINED)
    assert "3 learners" in press(mine)[0]


def test_a_training_can_be_stopped(hub):
    page = Client(f"{hub.url}/d2ue/", verbose=False)
    job = page.submit(5, 1, 100, 0, api_name="/retrain")
    begun = time.monotonic()
    while not any("epoch" in output[0] for output in job.outputs()) and time.monotonic() - begun < 60:
        time.sleep(0.2)
    assert job.cancel()
    assert "the same as before" in page.predict(api_name="/stop")
    with pytest.raises(AppError, match="press Retrain first"):
        press(page, ensemble=RETRAINED)
    text, *_ = page.predict(2, 0, 1, 0, api_name="/retrain")  # the place is free again at once, not after 500 epochs
    assert "2 learners trained" in text and time.monotonic() - begun < 90


@pytest.mark.parametrize("settings", [(1, 1, 5, 0), (3, -1, 5, 0), (3, 1, 0, 0), (3, 1, 10_000, 0)])
def test_trainings_that_cannot_be_are_sentences(client, settings):
    with pytest.raises(AppError) as error:
        client.predict(*settings, api_name="/retrain")
    assert "from" in str(error.value) or "imum" in str(error.value)
    assert "Traceback" not in str(error.value)


@pytest.fixture(scope="module")
def page(hub, watched):
    "The app's page; the tests below use it one after the other."
    page = watched(f"{hub.url}/d2ue/", height=1000)
    yield page
    page.close()


def test_the_page_opens_finished_and_without_empty_boxes(page):
    page.locator("#finished img").first.wait_for(timeout=20_000)
    assert page.locator("#finished img:visible").count() == 4
    assert page.locator("#finished img").evaluate_all("pictures => pictures.every(one => one.complete && one.naturalWidth > 100)")
    assert page.get_by_text("Map and report (.zip)", exact=True).filter(visible=True).count() == 0
    assert page.get_by_test_id("matplotlib").filter(visible=True).count() == 0
    assert page.locator(".js-plotly-plot:visible, .empty:visible").count() == 0
    before = page.locator("#finished img").first.get_attribute("src")
    page.get_by_role("radio", name="mass").check()
    page.wait_for_function("before => document.querySelector('#finished img').src !== before", arg=before, timeout=20_000)
    assert page.problems == []


def expect(what):
    "Playwright's patient assertions."
    return pytest.importorskip("playwright.sync_api").expect(what)


def starts_training(page):
    "Open the part that retrains, press Retrain and wait for its second epoch or a later one."
    if not page.get_by_role("button", name="Retrain", exact=True).is_visible():
        page.get_by_role("button", name="Retrain the learners").press("Enter")
    page.get_by_role("button", name="Retrain", exact=True).press("Enter")
    page.get_by_text(EPOCH).first.wait_for(timeout=60_000)


def test_retrain_rests_until_a_stop_has_arrived(page):
    "On a busy machine that takes as long as an epoch, and the page would drop what is pressed meanwhile."
    train, held = page.get_by_role("button", name="Retrain", exact=True), []
    page.route("**/cancel", lambda route: held.append(route))
    starts_training(page)
    with page.expect_request("**/cancel"):
        page.get_by_role("button", name="Stop", exact=True).press("Enter")
    expect(train).to_be_disabled()
    held.pop().continue_()
    page.unroute("**/cancel")
    expect(train).to_be_enabled(timeout=20_000)
    page.get_by_role("button", name="Stop", exact=True).press("Enter")  # an epoch that ended meanwhile may have written over its sentence
    page.get_by_text("The learners in use are the same as before").wait_for(timeout=20_000)


def test_a_person_trains_stops_and_trains_again_by_keyboard_and_sees_the_maps(page):
    train = page.get_by_role("button", name="Retrain", exact=True)
    starts_training(page)
    page.get_by_role("button", name="Stop", exact=True).press("Enter")
    page.get_by_text("The learners in use are the same as before").wait_for(timeout=20_000)
    page.wait_for_timeout(1500)  # an epoch takes a quarter of a second: a training that goes on would write over the sentence
    assert page.get_by_text("The learners in use are the same as before").count() == 1
    page.get_by_label("number input for Epochs").fill("1")
    expect(train).to_be_enabled(timeout=20_000)
    train.press("Enter")
    page.get_by_text("3 learners trained for 1 epoch with").wait_for(timeout=60_000)
    assert page.get_by_role("radio", name="retrained on this page").is_checked()
    page.get_by_role("button", name="Examine").press("Enter")
    page.get_by_text("Against the inserted lesion").wait_for(timeout=60_000)
    page.locator(".js-plotly-plot").nth(1).wait_for()
    assert page.get_by_text("Not for diagnosis").count() and page.problems == [] and page.outside == []
