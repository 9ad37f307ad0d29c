"Scans: archives and folders, hostile files, random damage, the child that decodes, and the way back onto the grid."
import gzip
import os
import signal
import subprocess
import sys
import zipfile

import nibabel
import numpy as np
import pytest
from PIL import Image
from scan_files import find, folder_of, made_slice, outcome, refused, zip_of

from hkust_demos.data.scans import Scan, ScanError, cut_spacing, onto_grid, read_scan, slice_of, square_pixels, to_unit, write_scan


def test_archives_that_are_refused(tmp_path):
    slice_ = made_slice()
    for number, name in enumerate(["../x.dcm", "/etc/x.dcm", "C:/x.dcm", "a/../../x.dcm", "..\\x.dcm"]):
        refused(zip_of(tmp_path / f"path{number}.zip", [(name, slice_)]), "leaves its folder")
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    refused(zip_of(tmp_path / "link.zip", [(link, "/etc/passwd")]), "symbolic link")
    refused(zip_of(tmp_path / "bomb.zip", [(f"{k}.dcm", bytes(3_000_000)) for k in range(2)]), "unpacks to more than 5 MB", max_mb=5)
    refused(zip_of(tmp_path / "ratio.zip", [("a.dcm", bytes(21_000_000))]), "packed more than")
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
    for name, data, word in (("empty.dcm", b"", "empty"), ("text.nii", b"hello", "no known kind"), ("a.gz", gzip.compress(b"hello"), "without NIfTI or DICOM"),
                             ("b.nii.gz", gzip.compress(gzip.compress(b"hello")), "packed twice")):
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


@pytest.mark.parametrize("axis, size", [("axial", (3, 2)), ("coronal", (5, 2)), ("sagittal", (5, 3))])
def test_cuts_know_the_size_of_their_pixels(axis, size):
    scan = Scan(np.zeros((4, 5, 6), np.float32), (2.0, 3.0, 5.0), np.diag([2.0, 3, 5, 1]), "MR", "made here")
    assert cut_spacing(scan, axis) == size
    cut = square_pixels(slice_of(scan, axis), size)
    rows, columns = slice_of(scan, axis).shape
    assert cut.shape[0] / cut.shape[1] == pytest.approx(rows * size[0] / (columns * size[1]), rel=0.1)


def test_a_map_finds_back_from_square_pixels():
    "A blob stays where it is; a constant stays what it is."
    rows, columns = np.mgrid[:60, :90]
    blob = np.exp(-((rows - 20) ** 2 + ((columns - 60) / 1.33) ** 2) / 50).astype(np.float32)
    square = square_pixels(blob, (1.33, 1.0))
    back = onto_grid(square, blob.shape)
    assert square.shape == (80, 90) and np.abs(back - blob).max() < 0.03
    assert np.unravel_index(back.argmax(), back.shape) == (20, 60)
    assert np.allclose(square_pixels(np.full((20, 30), 7.0), (1, 3)), 7)


def test_import_is_quick():
    code = "import sys, numpy, time; t = time.perf_counter(); import hkust_demos.data.scans; print(time.perf_counter() - t, *sys.modules)"
    seconds, *modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pydicom", "nibabel", "PIL", "gdcm", "torch"} & set(modules)
    assert float(seconds) < 0.3
