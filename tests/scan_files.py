"Files for the tests of scans: pydicom's collections, DICOM slices made here, folders and zips; and what every refusal must keep."
import io
import signal
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import nibabel
import numpy as np

from hkust_demos.data.scans import ScanError, read_scan


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


@silently()
def truth(name):
    "Header and stored pixels, as pydicom gives them."
    dataset = pydicom.dcmread(find(name), force=True)
    return dataset, dataset.pixel_array.astype(np.float64)


def find(name):
    return next(p for p in (BUNDLED / name, COLLECTIONS["pydicom-data"] / name) if p.exists())


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
