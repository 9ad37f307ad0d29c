"D2UE on people's own files: facts of a header reach the learners, and what no header tells gets a warning where the person is."
import json
import zipfile
from argparse import Namespace

import nibabel
import numpy as np
import pytest
from scan_files import made_slice
from scipy.ndimage import zoom

from hkust_demos.data.phantoms import mni_slices
from hkust_demos.data.scans import read_scan
from hkust_demos.vision.d2ue_apply import run_command
from hkust_demos.vision.d2ue_ensembles import load_ensemble
from hkust_demos.vision.d2ue_findings import examine_scan, warnings_of

SIZE = 128


@pytest.fixture(scope="module")
def healthy():
    "One healthy slice as signed numbers of an MR scanner."
    return np.rint(1000 * mni_slices(7, 1_234, size=SIZE).images[6]).astype("<i2")


@pytest.fixture(scope="module")
def usual(healthy, tmp_path_factory):
    "What the ensemble says about it, square and without padding."
    return found(tmp_path_factory.mktemp("usual") / "a.dcm", healthy)


def found(path, pixels, spacing=(1, 1), **tags):
    "Percentile, warnings and scan of a DICOM slice."
    path.write_bytes(made_slice(size=pixels.shape, Modality="MR", RescaleSlope=1, RescaleIntercept=0, PixelSpacing=list(spacing) if spacing else None,
                                PixelData=pixels.astype("<i2").tobytes(), **tags))
    scan = read_scan(path)
    anomaly_map, findings = examine_scan(scan, load_ensemble("rar"))
    assert anomaly_map.shape == scan.array.shape
    return findings[0].percentile(), warnings_of(scan, findings), anomaly_map


def test_a_healthy_slice_is_usual(usual):
    percentile, warnings, _ = usual
    assert percentile < 90 and warnings == []


def test_padding_is_not_seen_by_the_learners(tmp_path, healthy, usual):
    "-2000 outside of the circle: with its tag nothing changes; without, a warning."
    rows, columns = np.mgrid[:SIZE, :SIZE]
    inside = np.hypot(rows - 63.5, columns - 63.5) < 63
    padded = np.where(inside, healthy, -2000)
    percentile, warnings, anomaly_map = found(tmp_path / "told.dcm", padded, PixelPaddingValue=-2000)
    assert abs(percentile - usual[0]) < 15 and warnings == []
    dark = found(tmp_path / "dark.dcm", np.where(inside, healthy, healthy[inside].min()))
    assert percentile == dark[0] and np.array_equal(anomaly_map, dark[2])
    percentile, warnings, _ = found(tmp_path / "untold.dcm", padded)
    assert percentile > 95 and "padding" in warnings[0]


def test_learners_see_square_pixels(tmp_path, healthy, usual):
    "Pixels of 1 x 1.33 mm: with their spacing the head is round; without, a warning."
    squeezed = np.rint(zoom(healthy.astype(float), (1, 0.75), order=1, grid_mode=True, mode="nearest"))
    percentile, warnings, anomaly_map = found(tmp_path / "told.dcm", squeezed, spacing=(1, 4 / 3))
    assert percentile < 95 and warnings == [] and anomaly_map.shape == (128, 96)
    assert abs(percentile - usual[0]) < 30
    percentile, warnings, _ = found(tmp_path / "untold.dcm", squeezed, spacing=None)
    assert percentile > 95 and "not square" in warnings[0]


def test_warnings_are_printed_and_reported(tmp_path, healthy, capsys):
    "Of a volume without orientation, turned upside down: both kinds of sentence, on the terminal and in the report."
    volume = np.repeat((1000 - healthy).T[::-1, ::-1, None], 2, axis=2)
    image = nibabel.Nifti1Image(volume, None)
    nibabel.save(image, tmp_path / "odd.nii.gz")
    args = Namespace(scan=str(tmp_path / "odd.nii.gz"), frame=None, series=None, slice=None, ensemble="rar", weights=None, score="dual", out=str(tmp_path / "out"), force=False)
    run_command(args)
    printed = capsys.readouterr().err
    assert "Warning: The header tells no orientation" in printed and "Warning: 2 of 2 slices" in printed and "Do not read the map" in printed
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["warnings"]) == 2 and all(sentence in printed for sentence in report["warnings"])


def test_the_app_lets_you_choose_a_series_and_shows_warnings(tmp_path, healthy):
    import gradio as gr

    from hkust_demos.apps.d2ue import _inspect, _run
    two = [made_slice(size=healthy.shape, Modality="MR", series=f"1.2.{k}", PixelSpacing=[1, 1], RescaleSlope=1 + k, RescaleIntercept=0, PixelData=healthy.tobytes()) for k in (0, 1)]
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for k, data in enumerate(two):
            archive.writestr(f"{k}.dcm", data)
    with pytest.raises(gr.Error, match="series=0 to series=1"):
        _inspect(str(tmp_path / "two.zip"))
    assert "DICOM file" in _inspect(str(tmp_path / "two.zip"), None, 1)[1]
    nibabel.save(nibabel.Nifti1Image(np.repeat(healthy.T[::-1, ::-1, None], 2, axis=2), None), tmp_path / "odd.nii")
    assert "**The header tells no orientation" in _inspect(str(tmp_path / "odd.nii"))[1]
    assert "**The header tells no orientation" in _run("my scan", str(tmp_path / "odd.nii"))[0]
