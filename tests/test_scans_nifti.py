"NIfTI: values, affines, units, and the way back onto the voxels."
import gzip
import tracemalloc

import nibabel
import numpy as np
import pytest
from scan_files import NIBABEL, find, folder_of, made_slice, refused

from hkust_demos.data.scans import read_scan, write_scan


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


# --- facts of a header that change numbers --------------------------------------------------------------------------------

def made(path, affine=np.diag([-2.0, 2, 3, 1]), *, unit=None, q=None, s=None, intent=None, raw=()):
    "A small file with facts in its header."
    image = nibabel.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), affine)
    if unit:
        image.header.set_xyzt_units(unit)
    if q is not None:
        image.set_qform(*q)
    if s is not None:
        image.set_sform(*s)
    if intent:
        image.header.set_intent(intent)
    data = bytearray(image.to_bytes())
    for place, content in raw:
        data[place:place + len(content)] = content
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("unit, factor", [(None, 1), ("mm", 1), ("micron", 1e-3), ("meter", 1000)])
def test_units_of_length_become_millimeters(tmp_path, unit, factor):
    "Read in millimeters, written in millimeters, on the same voxels."
    scan = read_scan(made(tmp_path / "a.nii", unit=unit))
    assert scan.spacing == pytest.approx((2 * factor, 2 * factor, 3 * factor))
    back = nibabel.load(write_scan(scan, tmp_path / "map.nii", like=scan))
    assert np.allclose(back.affine, np.diag([-2 * factor, 2 * factor, 3 * factor, 1])) and back.header.get_xyzt_units()[0] == "mm"
    assert np.array_equal(np.asarray(back.dataobj), np.arange(24).reshape(2, 3, 4))
    assert read_scan(tmp_path / "map.nii").spacing == pytest.approx(scan.spacing)
    assert any("is the unit of its header right" in warning for warning in scan.warnings) == (unit == "meter")


def test_units_that_do_not_exist_are_refused(tmp_path):
    refused(made(tmp_path / "a.nii", raw=[(123, bytes([5]))]), "xyzt_units 5")
    assert read_scan(made(tmp_path / "b.nii", raw=[(123, bytes([2 + 8]))])).spacing == pytest.approx((2, 2, 3))  # mm and seconds


def test_two_affines(tmp_path):
    "The sform counts; a difference is said; a mirror image is refused."
    plain, moved, mirrored = np.diag([-2.0, 2, 3, 1]), np.diag([-2.0, 2, 3, 1]), np.diag([2.0, 2, 3, 1])
    moved[:3, 3] = 40
    assert read_scan(made(tmp_path / "a.nii", q=(plain, 1), s=(plain, 1))).warnings == ()
    scan = read_scan(made(tmp_path / "b.nii", q=(plain, 1), s=(moved, 4)))
    assert "qform and sform" in scan.warnings[0] and scan.affine[2, 3] == 40
    refused(made(tmp_path / "c.nii", q=(plain, 1), s=(mirrored, 4)), "left and right are unsure")
    neither = read_scan(made(tmp_path / "d.nii", q=(plain, 0), s=(plain, 0)))
    assert "no orientation" in neither.warnings[0] and neither.spacing == pytest.approx((2, 2, 3))
    only = read_scan(made(tmp_path / "e.nii", q=(moved, 1), s=(plain, 0)))
    assert only.warnings == () and only.affine[2, 3] == 40


def test_scaling_intent_and_display(tmp_path):
    slope = [(112, np.array([0.5, 7], "<f4").tobytes())]
    assert read_scan(made(tmp_path / "a.nii", raw=slope)).array.max() == 23 * 0.5 + 7
    shown = [(124, np.array([5, 1], "<f4").tobytes())]  # cal_max, cal_min
    assert read_scan(made(tmp_path / "b.nii", raw=shown)).array.max() == 23
    assert "labels" in read_scan(made(tmp_path / "c.nii", intent="label")).warnings[0]
    none = [(112, np.array([0, 7], "<f4").tobytes())]  # a slope of zero means no scaling
    assert read_scan(made(tmp_path / "d.nii", raw=none)).array.max() == 23
