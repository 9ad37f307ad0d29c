"PNG, JPEG, TIFF and NPZ: every mode, every way to say which end is white, and nothing that is run."
import io
import os
import struct

import numpy as np
import pytest
from PIL import Image
from scan_files import refused, zip_of

from hkust_demos.data.scans import cut_spacing, read_scan


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


# --- facts of a picture that change its numbers ---------------------------------------------------------------------------

def tiff(array, photometric=1, *, fmt=1, orientation=1, samples=1, resolution=None, unit=2):
    "An uncompressed little-endian TIFF with exactly these tags."
    array, entries, extra = np.ascontiguousarray(array), [], b""
    height, width = array.shape[:2]
    tags = {256: (4, [width]), 257: (4, [height]), 258: (3, [8 * array.itemsize] * samples), 259: (3, [1]), 262: (3, [photometric]), 273: (4, [0]), 274: (3, [orientation]),
            277: (3, [samples]), 278: (4, [height]), 279: (4, [array.nbytes]), 339: (3, [fmt] * samples)}
    if resolution:
        tags |= {282: (5, [resolution[0], 1]), 283: (5, [resolution[1], 1]), 296: (3, [unit])}
    start = 14 + 12 * len(tags)
    for tag, (kind, values) in sorted(tags.items()):
        raw = struct.pack("<" + {3: "H", 4: "I", 5: "I"}[kind] * len(values), *values)
        count = len(values) // (2 if kind == 5 else 1)
        if len(raw) > 4:
            raw, extra = struct.pack("<I", start + len(extra)), extra + raw + b"\0" * (len(raw) % 2)
        entries.append((tag, kind, count, raw.ljust(4, b"\0")))
    offset = start + len(extra)
    table = b"".join(struct.pack("<HHI", tag, kind, count) + (struct.pack("<I", offset) if tag == 273 else raw) for tag, kind, count, raw in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(4) + extra + array.tobytes()


RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def read_bytes(path, data, **options):
    path.write_bytes(data)
    return read_scan(path, **options)


def test_white_is_zero_in_every_depth(tmp_path):
    "Films and faxes call zero white; Pillow turns only 8 bits round itself."
    for name, array, fmt in (("bytes", RAMP, 1), ("words", RAMP.astype("<u2") * 257, 1), ("floats", RAMP.astype("<f4") / 255, 3)):
        black, white = (read_bytes(tmp_path / f"{name}{p}.tiff", tiff(array, p, fmt=fmt)).array for p in (1, 0))
        assert np.allclose(black, RAMP / 255, atol=1e-6) and np.allclose(white, 1 - RAMP / 255, atol=1e-6), name
    Image.fromarray(RAMP > 100).save(tmp_path / "bits.tiff")
    assert np.array_equal(read_scan(tmp_path / "bits.tiff").array, RAMP > 100)
    refused_bytes = tiff(RAMP.astype("<f8"), fmt=3)
    (tmp_path / "doubles.tiff").write_bytes(refused_bytes)
    refused(tmp_path / "doubles.tiff", "8 or 16 bits")


def test_signs_of_tiff_numbers(tmp_path):
    "Signed bytes and large unsigned numbers keep their order."
    ramp = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    truly = np.linspace(0, 1, 12).reshape(3, 4)
    for name, array, fmt in (("i1", ramp * np.int8(20), 2), ("i2", ramp.astype("<i2") * 100, 2), ("i4", ramp.astype("<i4") * 10**8, 2), ("u4", (ramp.astype(np.int64) + 6).astype("<u4") * np.uint32(3 * 10**8), 1)):
        scan = read_bytes(tmp_path / f"{name}.tiff", tiff(array, fmt=fmt))
        assert np.allclose(scan.array, truly, atol=1e-6) and "stretched" in scan.source, name


def test_upright_whatever_the_orientation(tmp_path):
    "Eight ways to lie; the shape of the pixels turns with the picture."
    for orientation in range(1, 9):
        scan = read_bytes(tmp_path / f"{orientation}.tiff", tiff(RAMP, orientation=orientation, resolution=(200, 100)))
        turned = RAMP.T if orientation > 4 else RAMP
        assert scan.array.shape == turned.shape and np.allclose(np.sort(scan.array.ravel()), RAMP.ravel() / 255)
        assert cut_spacing(scan) == ((1, 2) if orientation > 4 else (2, 1)), orientation
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert all(read_scan(tmp_path / f"{o}.tiff").array[corner] == 0 for o, corner in corners.items())


def test_pixels_that_are_not_square(tmp_path):
    "Dots per inch say nothing of a body, but their ratio is the shape of a pixel."
    picture = Image.fromarray(RAMP)
    picture.save(tmp_path / "a.png", dpi=(200, 100))
    picture.save(tmp_path / "a.jpg", dpi=(200, 100))
    (tmp_path / "a.tiff").write_bytes(tiff(RAMP, resolution=(200, 100)))
    (tmp_path / "b.tiff").write_bytes(tiff(RAMP, resolution=(2, 1), unit=1))
    for name in ("a.png", "a.jpg", "a.tiff", "b.tiff"):
        scan = read_scan(tmp_path / name)
        assert scan.spacing is None and cut_spacing(scan) == pytest.approx((2, 1), rel=1e-2) and "1 wide and 2 high" in scan.source, name
    for name, data in (("c", tiff(RAMP, resolution=(300, 300))), ("d", tiff(RAMP, resolution=(300, 1))), ("e", tiff(RAMP, resolution=(0, 72)))):
        assert cut_spacing(read_bytes(tmp_path / f"{name}.tiff", data)) == (1, 1), name


def test_a_phones_picture_is_its_first(tmp_path):
    "A multi-picture JPEG: the photograph is read, previews and depth maps stay out; a page can still be chosen."
    small = Image.new("L", (20, 10), 200)
    Image.new("L", (40, 30), 100).save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[small, small])
    scan = read_scan(tmp_path / "phone.jpg")
    assert scan.array.shape == (30, 40) and abs(scan.array.mean() - 100 / 255) < 0.01 and scan.source.startswith("JPEG, first of 3 pictures")
    assert read_scan(tmp_path / "phone.jpg", frame=2).array.shape == (10, 20)
    refused(tmp_path / "phone.jpg", "no frame 3", frame=3)


def chunked(data, kind, content):
    "A PNG with one more chunk behind its header."
    import zlib
    body = kind + content
    return data[:33] + struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def test_gamma_transparency_and_depth_of_png(tmp_path):
    plain = read_bytes(tmp_path / "plain.png", png(RAMP)).array
    usual = read_bytes(tmp_path / "usual.png", chunked(png(RAMP), b"gAMA", struct.pack(">I", 45455)))
    linear = read_bytes(tmp_path / "linear.png", chunked(png(RAMP), b"gAMA", struct.pack(">I", 100_000)))
    assert np.array_equal(usual.array, plain) and usual.source == "PNG"
    assert np.allclose(linear.array, plain ** (1 / 2.2), atol=1e-6) and "gamma 1 converted" in linear.source  # numbers in proportion to light look brighter
    words = RAMP.astype(np.uint16) * 257
    keyed = read_bytes(tmp_path / "key.png", chunked(png(words), b"tRNS", struct.pack(">H", int(words[2, 3]))))
    assert keyed.array[2, 3] == 0 and np.allclose(keyed.array[:2], plain[:2], atol=1e-6)
    indices = Image.fromarray(RAMP // 20 % 2).convert("P")
    indices.putpalette([0, 0, 0, 255, 255, 255])
    for bits in (1, 2, 4, 8):  # a palette turns numbers into colors, whatever their depth
        indices.save(tmp_path / "palette.png", bits=bits)
        assert np.array_equal(read_scan(tmp_path / "palette.png").array, RAMP // 20 % 2)


def test_alpha_and_inks(tmp_path):
    opaque, clear = np.full_like(RAMP, 255), np.zeros_like(RAMP)
    assert np.allclose(read_bytes(tmp_path / "a.png", png(np.dstack([RAMP, RAMP, RAMP, opaque]))).array, RAMP / 255, atol=1e-6)
    assert read_bytes(tmp_path / "b.png", png(np.dstack([RAMP, RAMP, RAMP, clear]))).array.max() == 0
    Image.fromarray(np.dstack([RAMP] * 3)).convert("CMYK").save(tmp_path / "inks.jpg", quality=100, subsampling=0)
    assert np.abs(read_scan(tmp_path / "inks.jpg").array - RAMP / 255).max() < 0.05


# --- facts of an archive of arrays ----------------------------------------------------------------------------------------

def test_geometry_of_arrays(tmp_path):
    volume, affine = np.arange(24).reshape(2, 3, 4), np.diag([-1.0, 2, 3, 1])
    cases = {"spacing": dict(image=volume, spacing=[1.0, 2.0, 5.0]), "affine": dict(volume=volume, affine=affine), "flat": dict(image=volume[0] / 2, spacing=[1.0, 1.5])}
    scans = {}
    for name, arrays in cases.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
        scans[name] = read_scan(tmp_path / f"{name}.npz")
    assert scans["spacing"].spacing == (1, 2, 5) and scans["affine"].spacing == (1, 2, 3)
    assert np.array_equal(scans["affine"].array, volume[::-1]) and cut_spacing(scans["flat"]) == (1, 1.5)
    for number, (arrays, word) in enumerate([(dict(image=volume, voxel_size=[1, 1, 5]), "voxel_size"), (dict(image=volume, spacing=[1, 2]), "2 values of spacing"),
                                             (dict(image=volume, spacing=[1, 2, 0]), "above 0"), (dict(image=volume, affine=np.eye(3)), "4 x 4"),
                                             (dict(image=volume, spacing=np.array([None])), "never opened")]):
        np.savez(tmp_path / f"bad{number}.npz", **arrays)
        refused(tmp_path / f"bad{number}.npz", word)


def test_a_photograph_is_no_volume_of_three_slices(tmp_path):
    np.savez(tmp_path / "photo.npz", np.dstack([np.full((20, 30), 255, np.uint8), np.zeros((20, 30, 2), np.uint8)]))
    scan = read_scan(tmp_path / "photo.npz")
    assert scan.array.shape == (20, 30) and np.allclose(scan.array, 0.299, atol=1e-3) and "gray" in scan.source


def test_formats_that_are_not_read_are_called_by_name(tmp_path):
    for number, (data, word) in enumerate([(b"NRRD0004\n", "NRRD"), (b"ObjectType = Image", "MetaImage"), (b"\0\0\0\x18ftypheic", "HEIC"), (b"RIFF\0\0\0\0WEBP", "WebP"),
                                           (b"%PDF-1.7", "PDF"), (b"<!DOCTYPE html>", "web page"), (b"GIF89a", "GIF"), (b"\x93NUMPY\x01", "np.savez")]):
        (tmp_path / f"{number}.dcm").write_bytes(data)
        refused(tmp_path / f"{number}.dcm", word, "give DICOM")
