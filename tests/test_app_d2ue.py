"The D2UE app as a program sees it."
import io
import json
import struct
import zipfile

import nibabel
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hkust_demos.data.phantoms import mni_slices

CHOICES = dict(source="paint a lesion", upload=None, index=-1, frame=None, seed=7, kind="hyper", row=26, column=38, radius=5, contrast=0.3,
               ensemble="pushed apart (RAR)", score="dual-space uncertainty (D2UE)", quantile=0.99, opacity=0.6)


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
    "A healthy slice as a PNG."
    Image.fromarray(np.uint8(255 * mni_slices(1, 5, size=96).images[0])).save(tmp_path / "slice.png")
    return tmp_path / "slice.png"


def test_endpoints_have_names(client):
    assert {"/run", "/inspect", "/maps"} <= set(client.view_api(return_format="dict")["named_endpoints"])


def test_the_painted_default_returns_everything(client):
    text, panels, learners, histogram, similar = press(client)
    assert "healthy slices" in text and "pixel AUROC" in text
    assert all("plot" in picture for picture in (panels, learners, histogram, similar))
    assert json.loads(histogram["plot"])["layout"]["annotations"][0]["text"] == "this slice"
    assert np.shape(json.loads(similar["plot"])["data"][0]["z"]) == (3, 3)


@pytest.mark.parametrize("changed", [dict(kind="none"), dict(kind="mass"), dict(ensemble="plain"), dict(score="reconstruction error"),
                                     dict(row=0, column=0), dict(quantile=0.9, opacity=0)])
def test_other_choices_answer(client, changed):
    assert "healthy slices" in press(client, **changed)[0]


def test_an_uploaded_picture_and_its_map(client, slice_file):
    assert "healthy slices" in upload(client, slice_file)[0]
    chosen = {**CHOICES, "source": "my scan", "upload": handle_file(slice_file)}
    archive = client.predict(*list(chosen.values())[:12], api_name="/maps")
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
    assert "healthy slices" in upload(client, tmp_path / "brain.nii.gz")[0]
    with pytest.raises(AppError, match="constant"):
        upload(client, tmp_path / "brain.nii.gz", index=0)


def test_a_frame_is_asked_for_and_taken(client, tmp_path):
    series = np.zeros((64, 64, 3, 2), np.float32)
    series[:, :, 1, 0] = mni_slices(1, 5).images[0].T[::-1, ::-1]
    nibabel.Nifti1Image(series, np.eye(4)).to_filename(tmp_path / "series.nii.gz")
    with pytest.raises(AppError, match="frame"):
        upload(client, tmp_path / "series.nii.gz")
    assert "healthy slices" in upload(client, tmp_path / "series.nii.gz", frame=0)[0]


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
        for name in range(3):
            archive.writestr(f"{name}.dcm", bytes(300_000_000))


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


def test_a_twelve_bit_picture_is_read(client, tmp_path):
    Image.fromarray(np.uint16(4095 * mni_slices(1, 5).images[0])).save(tmp_path / "twelve.png")
    assert "healthy slices" in upload(client, tmp_path / "twelve.png")[0]


def test_wrong_modality_constant_and_missing_files(client, tmp_path):
    rows, columns = np.mgrid[:128, :128]
    Image.fromarray(np.uint8(255 * ((rows // 16 + columns // 16) % 2))).save(tmp_path / "board.png")
    assert "looks like something else" in upload(client, tmp_path / "board.png")[0]
    Image.fromarray(np.full((64, 64), 90, np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(AppError, match="constant"):
        upload(client, tmp_path / "flat.png")
    with pytest.raises(AppError, match="no file was uploaded"):
        press(client, source="my scan")
