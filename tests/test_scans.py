"Scans: every file of pydicom's collections, formats made here, hostile files, random damage, and the way back onto the grid."
import gzip
import io
import os
import signal
import subprocess
import sys
import time
import traceback
import tracemalloc
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from hkust_demos.data.scans import Scan, ScanError, read_scan, slice_of, to_unit, write_scan



@contextmanager
def silently():
    "No warnings; also as a decorator."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


with silently():
    import data_store
    import pydicom

COLLECTIONS = {"pydicom-data": Path(data_store.__file__).parent / "data", "pydicom": Path(pydicom.__file__).parent / "data" / "test_files"}
BUNDLED = COLLECTIONS["pydicom"]
NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"
EXPECTED = {"pydicom-data": (52, 16), "pydicom": (85, 91)}  # read, refused, with the versions in constraints.txt


@contextmanager
def at_most(seconds):
    "Raise in the main thread when time is up."
    def stop(*_):
        raise TimeoutError(f"took longer than {seconds} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(path, **options):
    "A Scan or a ScanError; anything else fails the test that asks. A hang fails too: TimeoutError would be swallowed as an OSError."
    begun = time.monotonic()
    try:
        with at_most(15):
            result = read_scan(path, **options)
    except ScanError as error:
        result = error
    assert time.monotonic() - begun < 14, f"{path} hangs"
    if isinstance(result, ScanError):
        assert result.__context__ is None and result.__cause__ is None
        assert Path(path).name in str(result) and str(Path(path).parent) not in str(result)
    else:
        assert result.array.dtype == np.float32 and result.array.ndim in (2, 3) and np.isfinite(result.array).all()
        assert result.affine.shape == (4, 4)
    return result


def refused(path, *words, **options):
    "The sentence of a refusal, which holds these words."
    result = outcome(path, **options)
    assert isinstance(result, ScanError), f"{Path(path).name} was read: {result}"
    for word in words:
        assert word in str(result), f"{word!r} is missing in: {result}"
    return str(result)


@silently()
def secrets_of(path):
    "What a DICOM file tells of a patient."
    try:
        dataset = pydicom.dcmread(path, force=True)
        values = [str(dataset.get(name) or "") for name in ("PatientName", "PatientID", "PatientBirthDate", "ReferringPhysicianName", "InstitutionName")]
    except Exception:  # no DICOM at all
        return []
    return [value for value in values if len(value) > 3]


def files_of(collection):
    return sorted(p for p in COLLECTIONS[collection].rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc"))


@pytest.mark.timeout(50)
@pytest.mark.parametrize("collection", COLLECTIONS)
def test_every_file_of_pydicom(collection, capfd, caplog):
    "Each file is read or refused; no crash, no hang, no name in any text, nothing printed or logged."
    counts, said = [0, 0], []
    secrets = {path: secrets_of(path) for path in files_of(collection)}
    assert any(secrets.values())
    capfd.readouterr(), caplog.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for path in secrets:
            result = outcome(path)
            counts[isinstance(result, ScanError)] += 1
            text = repr(result) if isinstance(result, Scan) else "".join(traceback.format_exception(result)).replace(str(path), "")
            said += [(path.name, secret) for secret in secrets[path] if secret in text.replace(path.name, "")]
            if isinstance(result, ScanError) and "frame=1" in str(result) and "too_short" not in path.name:
                assert outcome(path, frame=1).array.ndim == 2, path.name
    printed = capfd.readouterr()
    assert said == [] and printed.out + printed.err == "" and caplog.text == ""
    assert [str(w.message) for w in warned] == []
    assert tuple(counts) == EXPECTED[collection]


@silently()
def truth(name):
    "Header and stored pixels, as pydicom gives them."
    dataset = pydicom.dcmread(find(name), force=True)
    return dataset, dataset.pixel_array.astype(np.float64)


def find(name):
    return next(p for p in (BUNDLED / name, COLLECTIONS["pydicom-data"] / name) if p.exists())


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm", "693_UNCI.dcm", "bad_sequence.dcm", "explicit_VR-UN.dcm"])
def test_hounsfield_units(name):
    "CT is slope times stored value plus intercept, whatever the compression."
    dataset, stored = truth(name)
    scan = read_scan(find(name))
    assert scan.modality == "CT"
    assert np.allclose(scan.array, stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept))
    assert scan.spacing == pytest.approx(tuple(float(s) for s in dataset.PixelSpacing))


@pytest.mark.parametrize("name", ["MR_small.dcm", "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_bigendian.dcm",
                                  "MR_small_implicit.dcm", "MR_small_padded.dcm", "zipMR.gz"])
def test_one_image_in_many_encodings(name):
    _, stored = truth("MR_small.dcm")
    assert np.array_equal(read_scan(find(name)).array, stored)


@pytest.mark.parametrize("name", ["RG1_UNCR.dcm", "RG3_J2KR.dcm"])
def test_monochrome1_is_inverted(name):
    "Large stored numbers are dark there."
    dataset, stored = truth(name)
    assert dataset.PhotometricInterpretation == "MONOCHROME1"
    assert np.allclose(read_scan(find(name)).array, 1 - stored / (2**dataset.BitsStored - 1), atol=1e-6)


@pytest.mark.parametrize("name", ["SC_rgb.dcm", "SC_rgb_rle.dcm", "SC_rgb_16bit.dcm", "SC_rgb_expb_32bit.dcm", "SC_rgb_jpeg_gdcm.dcm", "SC_ybr_full_uncompressed.dcm",
                                  "SC_rgb_dcmtk_+eb+cy+np.dcm", "SC_rgb_gdcm_KY.dcm"])
def test_color_turns_gray_by_luminance(name):
    "RGB in 8, 16 and 32 bits, YBR, RLE, JPEG and JPEG 2000 give one gray picture."
    _, color = truth("SC_rgb.dcm")
    scan = read_scan(find(name))
    assert np.abs(scan.array - color @ [0.299, 0.587, 0.114] / 255).max() < 0.04
    assert "gray" in scan.source


def test_palettes_in_both_byte_orders():
    pictures = [read_scan(find(f"OBXXXX1A{suffix}.dcm")).array for suffix in ("", "_expb", "_rle")]
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])
    assert pictures[0].max() > 0.9


def test_stacks_in_one_file():
    ct, dose = read_scan(find("eCT_Supplemental.dcm")), read_scan(find("rtdose.dcm"))
    dataset, stored = truth("rtdose.dcm")
    assert ct.array.shape == (512, 512, 2) and ct.spacing[2] == pytest.approx(10) and ct.array.min() < -900
    assert dose.spacing == pytest.approx((10, 10, 5))
    assert np.isclose(dose.array.sum(), stored.sum() * float(dataset.DoseGridScaling), rtol=1e-5)


# --- series -------------------------------------------------------------------------------------------------------------

@silently()  # some tags are wrong on purpose
def made_slice(depth=0.0, number=1, series="1.2.3", value=0, size=(6, 8), orientation=(1, 0, 0, 0, 1, 0), **tags):
    "A small CT slice as bytes; with a name that must not appear anywhere."
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID, dataset.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.SeriesInstanceUID = CTImageStorage, f"1.2.3.{number}", series
    dataset.PatientName, dataset.PatientID, dataset.Modality = "DOE^JANE", "SECRET-77", "CT"
    dataset.Rows, dataset.Columns = size
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.RescaleSlope, dataset.RescaleIntercept = 2, -1000
    dataset.PixelSpacing, dataset.SliceThickness, dataset.InstanceNumber = [0.5, 0.7], 3, number
    dataset.ImageOrientationPatient = list(orientation)
    dataset.ImagePositionPatient = list(np.array([-10, 20, 30]) + depth * np.cross(orientation[:3], orientation[3:]))
    pixels = (np.arange(np.prod(size)).reshape(size) + 100 * value).astype("<i2")
    dataset.PixelData = pixels.tobytes()
    for name, content in tags.items():
        if content is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, content)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def folder_of(path, slices):
    path.mkdir()
    for index, data in enumerate(slices):
        (path / f"{index:03}.dcm").write_bytes(data)
    return path


def zip_of(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def test_series_is_sorted_by_position(tmp_path):
    "Names and numbers say one thing, positions another: positions win."
    depths = [6, 0, 9, 3]
    slices = [made_slice(d, number=k + 1, value=d) for k, d in enumerate(depths)]
    scan = read_scan(folder_of(tmp_path / "ct", slices))
    assert scan.array.shape == (8, 6, 4) and scan.spacing == pytest.approx((0.7, 0.5, 3))
    assert scan.array[-1, -1].tolist() == [100 * d * 2 - 1000 for d in sorted(depths)]  # the first pixel lies right and in front
    assert nibabel.aff2axcodes(scan.affine) == ("R", "A", "S")
    zipped = read_scan(zip_of(tmp_path / "ct.zip", [(f"DOE/{k}", s) for k, s in enumerate(slices)] + [("__MACOSX/._0", b"x"), ("readme.txt", b"x")]))
    assert np.array_equal(zipped.array, scan.array) and "DOE" not in repr(zipped)


def test_a_position_in_the_body_is_where_dicom_says(tmp_path):
    "The affine takes the voxel of the first pixel to its DICOM position, left and back turned around; also when oblique."
    turned = (0.8, 0.6, 0, 0, 0, -1)
    scan = read_scan(folder_of(tmp_path / "oblique", [made_slice(d, number=d + 1, value=d, orientation=turned) for d in (0, 2, 4)]))
    brightest = np.unravel_index(np.argmin(scan.array), scan.array.shape)
    assert np.allclose(scan.affine @ [*brightest, 1], [10, -20, 30, 1], atol=1e-4)


def test_order_by_instance_number(tmp_path):
    slices = [made_slice(number=n, value=n, ImagePositionPatient=None) for n in (3, 1, 2)]
    scan = read_scan(folder_of(tmp_path / "numbered", slices))
    assert scan.array[-1, -1].tolist() == [-800, -600, -400] and "instance number" in scan.source and scan.spacing[2] == 3


@pytest.mark.parametrize("words, slices", {
    ("2 series", "series=0 to series=1"): [made_slice(0), made_slice(0, series="1.2.4")],
    ("at one place",): [made_slice(0), made_slice(3, number=2), made_slice(3, number=3)],
    ("3.00 to 9.00 mm",): [made_slice(0), made_slice(3), made_slice(12)],
    ("different directions",): [made_slice(0), made_slice(3, orientation=(1, 0, 0, 0, 0, -1))],
    ("different sizes",): [made_slice(0), made_slice(3, size=(8, 8))],
    ("no order",): [made_slice(ImagePositionPatient=None), made_slice(ImagePositionPatient=None)],
    ("separate pictures",): [made_slice(0, Modality="CR"), made_slice(3, Modality="CR")],
    ("holds 0 files",): [],
    ("no DICOM slices",): [b"hello", b"world"],
}.items())
def test_series_that_are_refused(tmp_path, words, slices):
    message = refused(folder_of(tmp_path / "series", slices), *words)
    assert "DOE" not in message and "SECRET" not in message


def test_choose_a_series_and_leave_localizers_out(tmp_path):
    two = folder_of(tmp_path / "two", [made_slice(0), made_slice(3), made_slice(0, series="1.2.4", value=5)])
    assert read_scan(two, series=0).array.shape == (8, 6, 2) and read_scan(two, series=1).array.max() > 0
    refused(two, "no series 2", series=2)
    overview = made_slice(0, size=(4, 4), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    assert "localizers left out: 1" in read_scan(folder_of(tmp_path / "with", [made_slice(0), made_slice(3), overview])).source


def test_bundled_series():
    folder = BUNDLED / "dicomdirtests"
    scan = read_scan(folder / "98892001" / "CT5N")
    assert scan.array.shape == (16, 16, 5) and scan.spacing[2] == pytest.approx(2.5)
    refused(folder / "98892003", "7 series")
    refused(folder / "98892003" / "MR700", "different directions")
    refused(folder / "77654033" / "CT2", "1.25 to 202.50 mm")


def test_odd_dicom(tmp_path):
    "Empty, absent and senseless values."
    for number, tags in enumerate([{"PixelSpacing": None}, {"RescaleSlope": None}, {"ImageOrientationPatient": None}, {"ImageOrientationPatient": [0] * 6},
                                   {"PixelSpacing": [0, 0]}, {"Modality": "DOE^JANE"}, {"InstanceNumber": None}, {"SeriesInstanceUID": None}]):
        (tmp_path / f"{number}.dcm").write_bytes(made_slice(**tags))
        assert "DOE" not in repr(read_scan(tmp_path / f"{number}.dcm"))
    for number, tags in enumerate([{"Rows": 40000, "Columns": 40000}, {"NumberOfFrames": 2_000_000_000}, {"NumberOfFrames": -1}, {"PixelData": b"12"},
                                   {"BitsAllocated": 12}, {"SamplesPerPixel": 7}, {"PhotometricInterpretation": "DOE^JANE"}]):
        (tmp_path / f"bad{number}.dcm").write_bytes(made_slice(**tags))
        assert "DOE" not in refused(tmp_path / f"bad{number}.dcm")


def test_deflated_dicom_is_unpacked_within_the_limit(tmp_path):
    import zlib
    whole = find("image_dfl.dcm").read_bytes()
    assert read_scan(find("image_dfl.dcm")).array.shape == (512, 512)
    engine = zlib.compressobj(9, zlib.DEFLATED, -15)
    start = 144 + int.from_bytes(whole[140:144], "little")
    bomb = tmp_path / "bomb.dcm"
    bomb.write_bytes(whole[:start] + engine.compress(bytes(30_000_000)) + engine.flush())
    refused(bomb, "unpacks to more than 5 MB", max_mb=5)


def test_a_compressed_frame_may_not_claim_more_than_the_limit(tmp_path):
    data = bytearray(find("MR_small_jp2klossless.dcm").read_bytes())
    place = data.index(b"\xff\x4f\xff\x51")
    data[place + 8:place + 16] = (60_000).to_bytes(4, "big") * 2
    (tmp_path / "claim.dcm").write_bytes(data)
    refused(tmp_path / "claim.dcm", "claims 60000 x 60000")


# --- NIfTI --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["anatomical.nii", "example4d.nii.gz", "example_nifti2.nii.gz", "functional.nii", "reoriented_anat_moved.nii"])
def test_nifti_round_trip(name, tmp_path):
    "A map written back has the file's shape and affine, and each value lies on its own voxel."
    original = nibabel.load(NIBABEL / name)
    frame = 1 if len(original.shape) == 4 else None
    if frame:
        refused(NIBABEL / name, f"holds {original.shape[3]} volumes", "frame=0")
        refused(NIBABEL / name, "has no frame 99", frame=99)
    scan = read_scan(NIBABEL / name, frame=frame)
    assert nibabel.aff2axcodes(scan.affine) == ("R", "A", "S")
    voxels = np.asarray(original.dataobj[..., frame] if frame else original.dataobj, np.float32)
    back = nibabel.load(write_scan(scan.array, tmp_path / "map.nii.gz", like=scan))
    assert back.shape == voxels.shape and np.allclose(back.affine, original.affine, atol=1e-4)
    assert np.array_equal(np.asarray(back.dataobj), voxels)
    again = read_scan(tmp_path / "map.nii.gz")
    assert np.array_equal(again.array, scan.array) and np.allclose(again.affine, scan.affine, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_random_orientations_round_trip(seed, tmp_path):
    "Any order of axes, any flips, any tilt."
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3) + rng.uniform(-0.2, 0.2, (3, 3))) * rng.uniform(0.5, 3, 3)
    affine[:3, 3] = rng.uniform(-50, 50, 3)
    voxels = rng.normal(size=(4, 5, 6)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "in.nii")
    scan = read_scan(tmp_path / "in.nii")
    marked = np.zeros_like(scan.array)
    marked[1, 2, 3] = 7
    back = nibabel.load(write_scan(marked, tmp_path / "out.nii", like=scan))
    there = np.argwhere(np.asarray(back.dataobj) == 7)[0]
    assert np.allclose(back.affine @ [*there, 1], scan.affine @ [1, 2, 3, 1], atol=1e-3)
    assert voxels[tuple(there)] == scan.array[1, 2, 3]


def test_dicom_result_lies_on_the_dicom_grid(tmp_path):
    scan = read_scan(folder_of(tmp_path / "ct", [made_slice(d, number=d + 1, value=d) for d in (0, 3, 6)]))
    back = nibabel.load(write_scan(scan, tmp_path / "map.nii", like=scan))
    assert back.shape == (8, 6, 3)  # columns, rows, slices
    assert np.asarray(back.dataobj)[2, 1, 0] == (1 * 8 + 2) * 2 - 1000
    assert np.allclose(back.affine @ [0, 0, 0, 1], [10, -20, 30, 1])
    assert np.array_equal(read_scan(tmp_path / "map.nii").array, scan.array)
    picture = read_scan(find("CT_small.dcm"))
    flat = nibabel.load(write_scan(picture, tmp_path / "flat.nii.gz", like=picture))
    assert flat.shape == (128, 128, 1) and np.array_equal(np.asarray(flat.dataobj)[:, :, 0], picture.array.T)


def test_nifti_that_is_refused(tmp_path):
    header = bytearray(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)).to_bytes())
    header[42:48] = np.array([1000, 1000, 500], "<i2").tobytes()  # 2 GB of float32
    (tmp_path / "claim.nii").write_bytes(header)
    (tmp_path / "claim.nii.gz").write_bytes(gzip.compress(bytes(header)))
    tracemalloc.start()
    for name in ("claim.nii", "claim.nii.gz"):
        refused(tmp_path / name, "claims 1000 x 1000 x 500")
        refused(tmp_path / name, "claims more than 500 MB", max_pixels=10**9)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    header[42:48] = np.array([100, 100, 100], "<i2").tobytes()
    (tmp_path / "short.nii").write_bytes(header)
    refused(tmp_path / "short.nii", "cut short")
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bytes(header) + bytes(50_000_000)))
    refused(tmp_path / "bomb.nii.gz", "unpacks to more than 10 MB", max_mb=10)
    for name, array, word in [("nan", np.full((2, 2, 2), np.nan, np.float32), "not finite"),
                              ("inf", np.full((2, 2, 2), 1e300), "not finite"),
                              ("complex", np.zeros((2, 2, 2), np.complex64), "complex"),
                              ("five", np.zeros((2, 2, 2, 1, 3), np.float32), "5 axes")]:
        (tmp_path / f"{name}.nii").write_bytes(nibabel.Nifti1Image(array, np.eye(4)).to_bytes())
        refused(tmp_path / f"{name}.nii", word)
    refused(NIBABEL / "resampled_anat_moved.nii", "not finite")
    for number, row in enumerate(([0, 0, 0, 0], [1, 0, 0, 0], [0, 0, np.nan, 0])):
        flat = bytearray(nibabel.Nifti1Image(np.zeros((2, 2, 2), np.float32), np.eye(4)).to_bytes())
        flat[312:328] = np.array(row, "<f4").tobytes()  # the third row of the affine
        (tmp_path / f"flat{number}.nii").write_bytes(flat)
        refused(tmp_path / f"flat{number}.nii", "inverted")
    nibabel.save(nibabel.Nifti1Pair(np.zeros((2, 2, 2), np.float32), np.eye(4)), tmp_path / "pair.img")
    refused(tmp_path / "pair.hdr", "one .nii file")


# --- pictures and arrays --------------------------------------------------------------------------------------------------

def test_pictures(tmp_path):
    ramp = np.linspace(0, 255, 12).reshape(3, 4).astype(np.uint8)
    for ending, tolerance in (("png", 0), ("tiff", 0), ("jpg", 0.1)):
        Image.fromarray(ramp).save(tmp_path / f"ramp.{ending}")
        scan = read_scan(tmp_path / f"ramp.{ending}")
        assert scan.array.shape == (3, 4) and scan.spacing is None and np.abs(scan.array - ramp / 255).max() <= tolerance + 1e-6
    Image.fromarray(ramp.astype(np.uint16) * 16).save(tmp_path / "twelve.png")
    scan = read_scan(tmp_path / "twelve.png")
    assert np.allclose(scan.array, ramp * (16 / 4095)) and "12 bits in 16" in scan.source
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "sixteen.tiff")
    assert np.allclose(read_scan(tmp_path / "sixteen.tiff").array, ramp / 255, atol=1e-6)
    Image.fromarray(ramp.astype(np.float32) * 3 - 40).save(tmp_path / "floats.tiff")
    scan = read_scan(tmp_path / "floats.tiff")
    assert (scan.array.min(), scan.array.max()) == (0, 1) and "stretched" in scan.source
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "nan.tiff")
    refused(tmp_path / "nan.tiff", "not finite")


def test_modes_of_pictures(tmp_path):
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    for mode, ending in (("RGB", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "tiff"), ("YCbCr", "jpg")):
        red.convert(mode).save(tmp_path / f"{mode}.{ending}")
        assert np.allclose(read_scan(tmp_path / f"{mode}.{ending}").array, 0.299, atol=0.01), mode
    Image.new("RGBA", (4, 3), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert read_scan(tmp_path / "clear.png").array.max() == 0
    Image.new("1", (4, 3), 1).save(tmp_path / "bit.png")
    assert read_scan(tmp_path / "bit.png").array.min() == 1
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "DOE^JANE"
    Image.new("L", (4, 3)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_scan(tmp_path / "turned.jpg").array.shape == (4, 3)


def test_pages_and_bombs_of_pictures(tmp_path):
    pages = [Image.new("L", (4, 3), 50 * k) for k in range(3)]
    pages[0].save(tmp_path / "pages.tiff", save_all=True, append_images=pages[1:])
    refused(tmp_path / "pages.tiff", "frame=0")
    refused(tmp_path / "pages.tiff", "no such frame", frame=3)
    refused(tmp_path / "pages.tiff", frame=-1)
    assert np.allclose(read_scan(tmp_path / "pages.tiff", frame=2).array, 100 / 255)
    Image.new("1", (12_000, 12_000)).save(tmp_path / "bomb.png")
    refused(tmp_path / "bomb.png", "Pillow opens safely")
    Image.new("1", (1000, 1000)).save(tmp_path / "large.png")
    refused(tmp_path / "large.png", "claims 1000 x 1000 pixels", max_pixels=1000)


def test_npz(tmp_path):
    volume = np.arange(24).reshape(2, 3, 4)
    for name, arrays, shape in (("one", {"x": volume}, (2, 3, 4)), ("named", {"image": volume, "label": volume}, (2, 3, 4)), ("flat", {"x": volume[0] / 2}, (3, 4))):
        np.savez_compressed(tmp_path / f"{name}.npz", **arrays)
        assert read_scan(tmp_path / f"{name}.npz").array.shape == shape
    np.savez(tmp_path / "times.npz", np.zeros((2, 3, 4, 5)))
    refused(tmp_path / "times.npz", "5 volumes")
    assert read_scan(tmp_path / "times.npz", frame=4).array.shape == (2, 3, 4)
    bad = {"two": ({"a": volume, "b": volume}, "2 arrays"), "nan": ({"a": np.array([[np.inf]])}, "not finite"), "line": ({"a": np.zeros(3)}, "1 axes"),
           "text": ({"a": np.array([["x"]])}, "plain numbers"), "complex": ({"a": np.zeros((2, 2), complex)}, "plain numbers"), "none": ({"a": np.zeros((0, 3))}, "no pixels")}
    for name, (arrays, word) in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        refused(tmp_path / f"{name}.npz", word)


class Trap:
    "Unpickling this would leave a trace."

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "trap.npz", image=np.array([[Trap(tmp_path / "sprung")]]))
    refused(tmp_path / "trap.npz", "never opened")
    assert not (tmp_path / "sprung").exists()
    header = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999, 99999), }".ljust(117) + b"\n"
    refused(zip_of(tmp_path / "claim.npz", [("image.npy", header)]), "claims 99999 x 99999")
    header = header.replace(b"99999, 99999", b"999, 9999   ")
    refused(zip_of(tmp_path / "short.npz", [("image.npy", header)]), "cut short")


# --- archives and folders -------------------------------------------------------------------------------------------------

def test_archives_that_are_refused(tmp_path):
    slice_ = made_slice()
    for number, name in enumerate(["../x.dcm", "/etc/x.dcm", "C:/x.dcm", "a/../../x.dcm", "..\\x.dcm"]):
        refused(zip_of(tmp_path / f"path{number}.zip", [(name, slice_)]), "leaves its folder")
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    refused(zip_of(tmp_path / "link.zip", [(link, "/etc/passwd")]), "symbolic link")
    refused(zip_of(tmp_path / "bomb.zip", [(f"{k}.dcm", bytes(60_000_000)) for k in range(9)]), "unpacks to more than 500 MB")
    refused(zip_of(tmp_path / "ratio.zip", [("a.dcm", bytes(60_000_000))]), "packed more than")
    refused(zip_of(tmp_path / "many.zip", [(f"{k}", b"") for k in range(5001)], zipfile.ZIP_STORED), "more than 5000 files")
    refused(zip_of(tmp_path / "rare.zip", [("a.dcm", slice_)], zipfile.ZIP_LZMA), "rare compression")
    refused(zip_of(tmp_path / "nested.zip", [("a.zip", (tmp_path / "link.zip").read_bytes())]), "no DICOM slices")
    refused(zip_of(tmp_path / "empty.zip", []), "holds 0 files")
    encrypted = bytearray(zip_of(tmp_path / "encrypted.zip", [("a.dcm", slice_)]).read_bytes())
    encrypted[6] |= 1
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "encrypted.zip").write_bytes(encrypted)
    refused(tmp_path / "encrypted.zip", "encrypted")
    assert read_scan(zip_of(tmp_path / "one.zip", [("DOE^JANE.nii", nibabel.Nifti1Image(np.zeros((2, 3, 4), np.float32), np.eye(4)).to_bytes())])).array.shape == (2, 3, 4)


def test_folders_and_paths_that_are_refused(tmp_path):
    folder = folder_of(tmp_path / "folder", [made_slice()])
    (folder / ".hidden").write_bytes(b"x")
    assert read_scan(folder).array.shape == (6, 8)
    refused(folder, "holds more than 0.0001 MB", max_mb=0.0001)
    (folder / "link").symlink_to("/etc/passwd")
    refused(folder, "symbolic link")
    refused(tmp_path / "absent.nii", "no such file")
    os.mkfifo(tmp_path / "pipe.nii")
    refused(tmp_path / "pipe.nii", "no regular file")
    (tmp_path / "large.nii").write_bytes(bytes(2_000_000))
    refused(tmp_path / "large.nii", "more than 1 MB", max_mb=1)
    for name, data, word in (("empty.dcm", b"", "empty"), ("text.nii", b"hello", "no known kind"), ("a.gz", gzip.compress(b"hello"), "without NIfTI or DICOM")):
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, word)


# --- damage ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small_files(tmp_path_factory):
    "One small valid file of each kind, and three compressed ones."
    home = tmp_path_factory.mktemp("small")
    volume = np.random.default_rng(0).integers(0, 900, (5, 6, 7)).astype(np.int16)
    picture = np.random.default_rng(1).integers(0, 255, (9, 11)).astype(np.uint8)
    (home / "slice.dcm").write_bytes(made_slice())
    (home / "volume.nii").write_bytes(nibabel.Nifti1Image(volume, np.eye(4)).to_bytes())
    (home / "volume.nii.gz").write_bytes(gzip.compress((home / "volume.nii").read_bytes()))
    for ending in ("png", "tiff", "jpg"):
        Image.fromarray(picture).save(home / f"picture.{ending}")
    np.savez_compressed(home / "array.npz", image=volume)
    zip_of(home / "series.zip", [(f"{d}", made_slice(d, number=d + 1)) for d in (0, 3, 6)])
    for name in ("MR_small_RLE.dcm", "rtdose.dcm", "SC_rgb_small_odd_jpeg.dcm"):
        (home / name).write_bytes(find(name).read_bytes())
    return sorted(home.iterdir())


def damaged(data, rng):
    "Truncations first, then flipped bits, half of them near the start, where headers are."
    for share in (0.0, 0.02, 0.1, 0.5, 0.9, 0.999):
        yield data[:int(len(data) * share)]
    for index in range(26):
        changed = bytearray(data)
        end = min(len(data), 700) if index % 2 else len(data)
        for place in rng.integers(0, end, 1 + index % 5):
            changed[place] ^= 1 << rng.integers(8)
        yield bytes(changed)


@pytest.mark.timeout(50)
def test_damaged_files_give_a_scan_or_a_sentence(small_files, tmp_path):
    rng, counts = np.random.default_rng(7), [0, 0]
    for path in small_files:
        assert isinstance(outcome(path), Scan), path.name
        for data in damaged(path.read_bytes(), rng):
            (tmp_path / path.name).write_bytes(data)
            result = outcome(tmp_path / path.name, max_mb=50, max_pixels=2_000_000)
            counts[isinstance(result, ScanError)] += 1
            assert "DOE" not in str(result) and "SECRET" not in str(result)
    assert sum(counts) >= 300 and min(counts) > 50, counts


@pytest.mark.timeout(30)
def test_a_decoder_that_dies_or_hangs_gives_a_sentence(tmp_path, monkeypatch):
    "The compiled decoders live in a child; this process outlives it."
    from hkust_demos.data import decoder
    path = find("MR_small_jpeg_ls_lossless.dcm")
    read_scan(path)
    child = decoder.DECODER.process
    os.kill(child.pid, signal.SIGSTOP)
    monkeypatch.setattr(decoder, "DECODE_S", 0.3)
    refused(path, "no decoder here could read")
    monkeypatch.undo()
    assert child.poll() is not None and read_scan(path).array.shape == (64, 64) and decoder.DECODER.process is not child
    decoder.DECODER.process.kill()
    outcome(path)  # the death is noticed now or at the next scan
    assert read_scan(path).array.shape == (64, 64)


def test_readers_in_threads():
    "A hub reads uploads in threads."
    from concurrent.futures import ThreadPoolExecutor
    names = ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small.dcm", "MR_small_jpeg_ls_lossless.dcm"] * 4
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(lambda name: read_scan(find(name)).array, names))
    assert all(np.array_equal(array, arrays[0]) for array in arrays)


# --- writing, showing, importing ------------------------------------------------------------------------------------------

def test_writing_is_whole_or_not_at_all(tmp_path):
    scan = read_scan(find("CT_small.dcm"))
    unit = to_unit(scan.array)
    for bits in (8, 16):
        path = write_scan(unit, tmp_path / "new" / f"{bits}.png", like=scan, bits=bits)
        assert np.abs(read_scan(path).array - unit).max() <= 0.51 / (2**bits - 1)
    (tmp_path / "mine.png").write_bytes(b"mine")
    for arguments, word in ((("mine.png", {}), "--force"), (("a.jpg", {}), ".nii.gz"), (("a.png", {"bits": 12}), "8 or 16"), (("new", {}), "ending")):
        with pytest.raises(ScanError, match=word):
            write_scan(unit, tmp_path / arguments[0], like=scan, **arguments[1])
    for array, word in ((scan.array, "to_unit"), (unit[1:], "shape"), (unit * np.nan, "not finite")):
        with pytest.raises(ScanError, match=word):
            write_scan(array, tmp_path / "b.png", like=scan)
    assert (tmp_path / "mine.png").read_bytes() == b"mine" and sorted(p.name for p in tmp_path.iterdir()) == ["mine.png", "new"]
    assert read_scan(write_scan(unit, tmp_path / "mine.png", like=scan, force=True)).array.shape == (128, 128)
    (tmp_path / "link.png").symlink_to(tmp_path / "mine.png")
    with pytest.raises(ScanError, match="link"):
        write_scan(unit, tmp_path / "link.png", like=scan, force=True)
    first, second = (write_scan(scan, tmp_path / f"{n}.nii.gz", like=scan).read_bytes() for n in "ab")
    assert first == second


def test_a_scan_made_by_hand_is_written_as_it_is(tmp_path):
    volume = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    scan = Scan(volume, (2.0, 2.0, 2.0), np.diag([2.0, 2, 2, 1]), "CT", "phantom")
    back = nibabel.load(write_scan(scan, tmp_path / "a.nii", like=scan))
    assert np.array_equal(np.asarray(back.dataobj), volume) and np.allclose(back.affine, scan.affine)


def test_nothing_of_the_patient_reaches_the_result(tmp_path):
    scan = read_scan(folder_of(tmp_path / "ct", [made_slice(d, number=d + 1) for d in (0, 3)]))
    data = write_scan(scan, tmp_path / "map.nii", like=scan).read_bytes()
    assert b"DOE" not in data and b"SECRET" not in data and "DOE" not in repr(scan) + repr(scan.__dict__)


def test_cuts_show_the_right_side_on_the_left():
    volume = np.zeros((4, 5, 6), np.float32)
    volume[3, 4, 5] = 1  # right, front, head
    assert [slice_of(volume, axis, n).argmax() for axis, n in (("axial", 5), ("coronal", 4), ("sagittal", 3))] == [0, 0, 0]
    assert [slice_of(volume, axis).shape for axis in ("axial", "coronal", "sagittal")] == [(5, 4), (6, 4), (6, 5)]


def test_import_is_quick():
    code = "import sys, numpy, time; t = time.perf_counter(); import hkust_demos.data.scans; print(time.perf_counter() - t, *sys.modules)"
    seconds, *modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydicom", "nibabel", "PIL", "gdcm", "torch"} & set(modules)
    assert float(seconds) < 0.3
