"DICOM: every file of pydicom's collections, values, geometry and polarity, against pydicom and highdicom."
import io
import time
import traceback
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scan_files import BUNDLED, COLLECTIONS, files_of, find, folder_of, made_slice, outcome, refused, secrets_of, silently, truth, zip_of

from hkust_demos.data.scans import Scan, ScanError, cut_spacing, read_scan

EXPECTED = {"pydicom-data": (52, 16), "pydicom": (85, 91)}  # read, refused, with the versions in constraints.txt


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


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm", "693_UNCI.dcm", "bad_sequence.dcm", "explicit_VR-UN.dcm"])
def test_hounsfield_units(name):
    "CT is slope times stored value plus intercept, whatever the compression."
    dataset, stored = truth(name)
    scan = read_scan(find(name))
    assert scan.modality == "CT"
    truly = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    measured = truly >= -1024  # the 693 files are padded with -3024 HU, smeared by compression
    assert np.allclose(scan.array[measured], truly[measured]) and (scan.array[~measured] == truly[measured].min()).all()
    assert measured.all() != name.startswith("693")
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
    ("3 slices at only 2 places",): [made_slice(0), made_slice(3, number=2), made_slice(3, number=3)],
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


# --- facts of a file that change its numbers ------------------------------------------------------------------------------

def single(path, **tags):
    "A made slice as a file, read."
    path.write_bytes(made_slice(**tags))
    return read_scan(path)


def disk_slice(outside, value=None, limit=None, pixels=None, **tags):
    "A signed MR slice: values from 10 in a circle, `outside` in the corners."
    rows, columns = np.mgrid[:24, :24]
    inside = np.hypot(rows - 11.5, columns - 11.5) < 11
    pixels = np.where(inside, 10 + rows + columns, outside).astype("<i2") if pixels is None else pixels
    facts = {"PixelPaddingValue": value, "PixelPaddingRangeLimit": limit}
    return inside, pixels, dict(size=(24, 24), Modality="MR", RescaleSlope=1, RescaleIntercept=0, PixelData=pixels.tobytes(),
                                **{name: fact for name, fact in facts.items() if fact is not None}, **tags)


def test_padding_becomes_the_darkest_measured_value(tmp_path):
    "-2000 outside of the circle is no tissue: as one value, as a range, per slice and in a series."
    for number, (outside, value, limit) in enumerate([(-2000, -2000, None), (-1990, -2000, -1980), (-1990, -1980, -2000), (-1, -1, None)]):
        inside, pixels, tags = disk_slice(outside, value, limit)
        scan = single(tmp_path / f"{number}.dcm", **tags)
        assert np.array_equal(scan.array[inside], pixels[inside]) and (scan.array[~inside] == pixels[inside].min()).all()
        assert "padding set" in scan.source
    inside, pixels, tags = disk_slice(-2000, -1000)  # a padding value that no pixel has changes nothing
    scan = single(tmp_path / "unused.dcm", **tags)
    assert np.array_equal(scan.array, pixels) and "padding" not in scan.source


def test_padding_in_a_series_and_alone(tmp_path):
    "A slice of nothing but padding is dark in a volume, and refused alone."
    inside, pixels, tags = disk_slice(-2000, -2000)
    empty = {**tags, "PixelData": np.full((24, 24), -2000, "<i2").tobytes()}
    volume = read_scan(folder_of(tmp_path / "mr", [made_slice(0, **tags), made_slice(3, number=2, **empty)]))
    assert volume.array.min() == pixels[inside].min() and volume.array[:, :, 1].max() == pixels[inside].min()
    (tmp_path / "empty.dcm").write_bytes(made_slice(**empty))
    refused(tmp_path / "empty.dcm", "nothing but padding")


def test_padding_without_its_sign_and_in_implicit_files(tmp_path):
    "63536 is how many writers store -2000; in implicit files the tag does not tell its own type."
    from pydicom import dcmread
    from pydicom.dataelem import DataElement
    from pydicom.uid import ImplicitVRLittleEndian
    inside, pixels, tags = disk_slice(-2000)
    dataset = dcmread(io.BytesIO(made_slice(**tags)))
    dataset[0x00280120] = DataElement(0x00280120, "US", 63536)
    dataset.save_as(tmp_path / "unsigned.dcm")
    dataset[0x00280120] = DataElement(0x00280120, "SS", -2000)
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset.save_as(tmp_path / "implicit.dcm", implicit_vr=True, little_endian=True)
    for name in ("unsigned", "implicit"):
        scan = read_scan(tmp_path / f"{name}.dcm")
        assert (scan.array[~inside] == pixels[inside].min()).all() and np.array_equal(scan.array[inside], pixels[inside]), name


def test_padding_of_radiographs_is_dark_whatever_the_polarity(tmp_path):
    inside, pixels, tags = disk_slice(0, 0, PixelRepresentation=0, BitsStored=12, HighBit=11)
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        scan = single(tmp_path / f"{photometric}.dcm", **{**tags, "Modality": "DX", "PhotometricInterpretation": photometric})
        assert (scan.array[~inside] == scan.array[inside].min()).all() and scan.array[inside].std() > 0


def test_floating_point_pixels_and_their_padding(tmp_path):
    values = np.linspace(0, 2, 48, dtype="<f4").reshape(6, 8)
    values[0, 0] = -9999
    floats = dict(PixelData=None, FloatPixelData=values.tobytes(), BitsAllocated=32, BitsStored=None, HighBit=None, PixelRepresentation=None,
                  RescaleSlope=None, RescaleIntercept=None, FloatPixelPaddingValue=-9999.0, Modality="MR")
    scan = single(tmp_path / "floats.dcm", **floats)
    assert np.allclose(scan.array[1:], values[1:]) and scan.array[0, 0] == values[0, 1]


def framed(slopes, depths=None, **tags):
    "An enhanced file: one slope and, with depths, one place a frame."
    from pydicom.dataset import Dataset
    def item(**values):
        made = Dataset()
        for name, value in values.items():
            setattr(made, name, value)
        return made
    frames = []
    for k, slope in enumerate(slopes):
        frame = item(PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=k)])
        if depths:
            frame.PlanePositionSequence = [item(ImagePositionPatient=[0, 0, depths[k]])]
        frames.append(frame)
    pixels = np.stack([np.full((6, 8), 10 + k, "<i2") for k in range(len(slopes))])
    return made_slice(NumberOfFrames=len(slopes), PerFrameFunctionalGroupsSequence=frames, PixelData=pixels.tobytes(), RescaleSlope=None, RescaleIntercept=None,
                      ImagePositionPatient=None, **tags)


def test_each_frame_has_its_own_slope(tmp_path):
    (tmp_path / "stack.dcm").write_bytes(framed([1, 2, 0.5], depths=[0, 4, 2]))
    scan = read_scan(tmp_path / "stack.dcm")
    assert scan.array[0, 0].tolist() == [10, 12 * 0.5 + 2, 11 * 2 + 1] and scan.spacing[2] == pytest.approx(2)
    (tmp_path / "times.dcm").write_bytes(framed([1, 2, 0.5], InstanceNumber=None))
    refused(tmp_path / "times.dcm", "frame=0 to frame=2")
    assert read_scan(tmp_path / "times.dcm", frame=1).array[0, 0] == 11 * 2 + 1


@silently()
def table_of(values, first=0, name="LUT"):
    "A lookup table."
    from pydicom.dataelem import DataElement
    from pydicom.dataset import Dataset
    table = Dataset()
    table[0x00283002] = DataElement(0x00283002, "US", [len(values), first, 16])
    table[0x00283006] = DataElement(0x00283006, "OW", np.array(values, "<u2").tobytes())
    table.ModalityLUTType = "US"
    return table


def test_modality_tables_and_tables_for_display(tmp_path):
    "A table instead of a slope is applied; one for display is not, and refuses a radiograph if it falls."
    squares = table_of(np.arange(48) ** 2)
    assert single(tmp_path / "a.dcm", ModalityLUTSequence=[squares], RescaleSlope=None, RescaleIntercept=None, PixelRepresentation=0).array[1, 2] == 100
    negative = single(tmp_path / "b.dcm", ModalityLUTSequence=[squares], RescaleSlope=None, RescaleIntercept=None, PixelRepresentation=0, Modality="CR",
                      PhotometricInterpretation="MONOCHROME1")
    assert negative.array[1, 2] == pytest.approx(1 - 100 / 65535)
    rising, falling = table_of(np.arange(48)), table_of(np.arange(48)[::-1])
    assert np.array_equal(single(tmp_path / "c.dcm", Modality="CR", VOILUTSequence=[rising]).array, single(tmp_path / "d.dcm", Modality="CR").array)
    (tmp_path / "e.dcm").write_bytes(made_slice(Modality="CR", VOILUTSequence=[falling]))
    refused(tmp_path / "e.dcm", "VOI LUT that turns dark and bright round")


def world_map(slope, intercept, last=30000):
    from pydicom.dataset import Dataset
    found = Dataset()
    found.RealWorldValueFirstValueMapped, found.RealWorldValueLastValueMapped = -30000, last
    found.RealWorldValueSlope, found.RealWorldValueIntercept, found.LUTLabel = slope, intercept, "ADC"
    return found


def test_real_world_maps_count_where_there_is_no_slope(tmp_path):
    plain = dict(Modality="MR", RescaleSlope=None, RescaleIntercept=None)
    assert single(tmp_path / "a.dcm", RealWorldValueMappingSequence=[world_map(0.5, 3)], **plain).array[0, 4] == 5
    both = single(tmp_path / "b.dcm", RealWorldValueMappingSequence=[world_map(0.5, 3), world_map(1, 0)], Modality="MR")
    assert both.array[0, 4] == 4 * 2 - 1000 and "2 real-world value maps" in both.warnings[0]
    (tmp_path / "c.dcm").write_bytes(made_slice(RealWorldValueMappingSequence=[world_map(0.5, 3, last=3)], **plain))
    refused(tmp_path / "c.dcm")


def test_polarity(tmp_path):
    "Two tags tell what is bright: together they turn once, against each other they are refused."
    facts = dict(Modality="CR", PixelRepresentation=0, RescaleSlope=None, RescaleIntercept=None)
    plain = single(tmp_path / "plain.dcm", **facts).array
    for number, (photometric, shape, is_negative) in enumerate([("MONOCHROME2", "INVERSE", True), ("MONOCHROME1", "INVERSE", True), ("MONOCHROME1", None, True),
                                                                ("MONOCHROME2", "IDENTITY", False)]):
        shapes = {"PresentationLUTShape": shape} if shape else {}
        array = single(tmp_path / f"{number}.dcm", PhotometricInterpretation=photometric, **shapes, **facts).array
        assert np.allclose(array, 1 - plain if is_negative else plain, atol=1e-6), (photometric, shape)
    (tmp_path / "torn.dcm").write_bytes(made_slice(PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="IDENTITY", **facts))
    refused(tmp_path / "torn.dcm", "MONOCHROME1", "IDENTITY")
    assert single(tmp_path / "falling.dcm", **{**facts, "RescaleSlope": -1, "RescaleIntercept": 0}).array[0, 0] > 0.9
    physical = single(tmp_path / "ct.dcm", PhotometricInterpretation="MONOCHROME1")
    assert physical.array[0, 0] == -1000  # Hounsfield units mean the same however they are shown


def test_a_radiograph_whose_physics_contradict_its_display_warns(tmp_path):
    for number, (photometric, sign, warns) in enumerate([("MONOCHROME2", 1, True), ("MONOCHROME1", 1, False), ("MONOCHROME2", -1, False), ("MONOCHROME1", -1, True)]):
        scan = single(tmp_path / f"{number}.dcm", Modality="DX", PhotometricInterpretation=photometric, PixelIntensityRelationshipSign=sign)
        assert ("dense tissue is dark" in " ".join(scan.warnings)) == warns


def test_bits_of_a_word(tmp_path):
    "Twelve bits in sixteen: what lies above them is an overlay or a sign; a shifted word is refused."
    words = np.arange(48, dtype="<u2").reshape(6, 8)
    twelve = dict(BitsStored=12, HighBit=11, RescaleSlope=1, RescaleIntercept=0)
    assert np.array_equal(single(tmp_path / "overlay.dcm", PixelRepresentation=0, PixelData=(words | 0xF000).tobytes(), **twelve).array, words)
    assert (single(tmp_path / "signed.dcm", PixelRepresentation=1, PixelData=np.full(48, 0x0FFF, "<u2").tobytes(), **twelve).array == -1).all()
    (tmp_path / "shifted.dcm").write_bytes(made_slice(PixelRepresentation=0, PixelData=(words << 4).tobytes(), **{**twelve, "HighBit": 15}))
    refused(tmp_path / "shifted.dcm", "HighBit 15")


def test_pictures_that_are_something_else(tmp_path):
    (tmp_path / "mosaic.dcm").write_bytes(made_slice(Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]))
    refused(tmp_path / "mosaic.dcm", "mosaic", "dcm2niix")
    (tmp_path / "four.dcm").write_bytes(made_slice(SamplesPerPixel=4, PlanarConfiguration=0, PhotometricInterpretation="ARGB", PixelData=bytes(6 * 8 * 8)))
    refused(tmp_path / "four.dcm")
    parts = single(tmp_path / "seg.dcm", Modality="SEG", MaximumFractionalValue=47, PixelRepresentation=0, RescaleSlope=None, RescaleIntercept=None)
    assert parts.array.max() == 1
    assert "relative" in single(tmp_path / "dose.dcm", Modality="RTDOSE", DoseUnits="RELATIVE").warnings[0]


def region(x, y, units=3):
    from pydicom.dataset import Dataset
    made = Dataset()
    made.RegionSpatialFormat, made.PhysicalUnitsXDirection, made.PhysicalUnitsYDirection = 1, units, units
    made.PhysicalDeltaX, made.PhysicalDeltaY = x, y
    return made


@pytest.mark.parametrize("tags, spacing, shape", [
    ({"ImagerPixelSpacing": [0.2, 0.3], "EstimatedRadiographicMagnificationFactor": 1.25}, (0.16, 0.24), (0.16, 0.24)),
    ({"ImagerPixelSpacing": [0.2, 0.3], "EstimatedRadiographicMagnificationFactor": 0.5}, (0.2, 0.3), (0.2, 0.3)),  # nothing shrinks on its way
    ({"NominalScannedPixelSpacing": [0.1, 0.2]}, (0.1, 0.2), (0.1, 0.2)),
    ({"SequenceOfUltrasoundRegions": [region(0.02, 0.03), region(0.02, 0.03)]}, (0.3, 0.2), (0.3, 0.2)),
    ({"SequenceOfUltrasoundRegions": [region(0.02, 0.03), region(0.05, 0.05)]}, None, (1, 1)),
    ({"SequenceOfUltrasoundRegions": [region(0.02, 0.03, units=4)]}, None, (1, 1)),  # seconds
    ({"PixelAspectRatio": [4, 3]}, None, (4 / 3, 1)),
    ({}, None, (1, 1)),
])
def test_sizes_and_shapes_of_pixels(tmp_path, tags, spacing, shape):
    scan = single(tmp_path / "a.dcm", Modality="US", PixelSpacing=None, **tags)
    assert scan.spacing == (None if spacing is None else pytest.approx(spacing)) and cut_spacing(scan) == pytest.approx(shape)
    with_spacing = single(tmp_path / "b.dcm", Modality="US", **tags)
    assert with_spacing.spacing == (0.5, 0.7)


def test_a_tilted_gantry_keeps_its_shear(tmp_path):
    "Slices are pushed back by 0.3 mm a millimeter; each first pixel stays where DICOM says."
    places = [[-10, 20 + 0.3 * z, 30 + z] for z in (0, 3, 6)]
    scan = read_scan(folder_of(tmp_path / "tilt", [made_slice(number=k + 1, GantryDetectorTilt=16.7, ImagePositionPatient=place) for k, place in enumerate(places)]))
    for k, place in enumerate(places):
        assert np.allclose(scan.affine @ [7, 5, k, 1], [-place[0], -place[1], place[2], 1], atol=1e-4)


def test_rounding_in_headers_is_no_difference(tmp_path):
    slices = [made_slice(0, PixelSpacing=[0.5, 0.7]), made_slice(3, number=2, PixelSpacing=[0.50001, 0.7]), made_slice(6, number=3, orientation=(1, 1e-5, 0, -1e-5, 1, 0))]
    assert read_scan(folder_of(tmp_path / "rounded", slices)).array.shape == (8, 6, 3)


@pytest.mark.parametrize("offsets, top", [([0, 5, 10], 40), ([30, 35, 40], 40), ([0, -5, -10], 20)])
def test_offsets_of_dose_frames(tmp_path, offsets, top):
    "Distances from the first frame, or places along the body where the first is not zero."
    doses = np.stack([np.full((6, 8), k + 1, "<i2") for k in range(3)])
    scan = single(tmp_path / "dose.dcm", Modality="RTDOSE", NumberOfFrames=3, GridFrameOffsetVector=offsets, DoseGridScaling=0.5, RescaleSlope=None,
                  RescaleIntercept=None, PixelData=doses.tobytes())
    assert scan.spacing[2] == pytest.approx(5) and {scan.affine[2, 3], (scan.affine @ [0, 0, 2, 1])[2]} == {30, top}
    last = np.argmin(np.abs([(scan.affine @ [0, 0, k, 1])[2] - top for k in range(3)]))
    assert scan.array[0, 0, last] == 1.5


def test_highdicom_finds_the_same_volume():
    "Where highdicom reads a series or a stack, place and values are the same."
    import highdicom
    from pydicom import dcmread
    folder = BUNDLED / "dicomdirtests" / "98892001" / "CT5N"
    with silently():
        theirs = {folder: highdicom.get_volume_from_series([dcmread(path) for path in sorted(folder.iterdir())], dtype=np.float32),
                  find("eCT_Supplemental.dcm"): highdicom.imread(find("eCT_Supplemental.dcm")).get_volume(dtype=np.float32, apply_voi_transform=False)}
    for path, volume in theirs.items():
        ours, to_ras = read_scan(path), np.diag([-1, -1, 1, 1])
        for index in np.ndindex(*(min(n, 3) for n in volume.spatial_shape)):
            place = to_ras @ volume.affine @ [*index, 1]
            here = np.rint(np.linalg.inv(ours.affine) @ place)
            assert np.allclose(ours.affine @ here, place, atol=1e-3)
            assert ours.array[tuple(here[:3].astype(int))] == pytest.approx(volume.array[index], rel=1e-5)
