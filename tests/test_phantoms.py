"Brain phantoms: the same everywhere, independent of how many, refused with a sentence."
import hashlib
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from hkust_demos.data import phantoms
from hkust_demos.data.phantoms import ICBM_NOTICE, LESION_KINDS, REGIMES, BrainSlices, mni_slices, paint_lesion
from hkust_demos.files import DataNotInstalled


def digest(made):
    return hashlib.sha256(made.images.tobytes() + made.masks.tobytes() + repr(made.kinds).encode()).hexdigest()


@pytest.mark.parametrize("size", [32, 64, 96])
@pytest.mark.parametrize("lesions", [False, True])
def test_shapes_types_and_ranges(size, lesions):
    made = mni_slices(6, seed=3, lesions=lesions, size=size, kinds=LESION_KINDS)
    assert isinstance(made, BrainSlices) and len(made) == 6
    assert made.images.shape == made.masks.shape == (6, size, size) and made.labels.shape == (6,)
    assert (made.images.dtype, made.masks.dtype, made.labels.dtype) == (np.float32, bool, np.int64)
    assert np.isfinite(made.images).all() and 0 <= made.images.min() < made.images.max() <= 1
    assert made.labels.tolist() == [int(lesions)] * 6
    assert made.masks.any(axis=(1, 2)).tolist() == [lesions] * 6
    assert set(made.kinds) <= (set(LESION_KINDS) if lesions else {""}) and type(made.kinds) is list
    assert ICBM_NOTICE in made.source and "phantom" in made.source and "nilearn" in made.source


def test_set_is_frozen():
    with pytest.raises(FrozenInstanceError):
        mni_slices(1, size=32).images = None


@pytest.mark.parametrize("size", [33, 100, 233])
def test_odd_and_native_sizes(size):
    made = mni_slices(1, lesions=True, size=size)
    assert made.images.shape == (1, size, size) and made.masks.any()


@pytest.mark.parametrize("kind", LESION_KINDS)
def test_same_request_same_arrays(kind):
    request = dict(seed=5, lesions=True, size=32, kinds=kind)
    assert digest(mni_slices(3, **request)) == digest(mni_slices(3, **request))


def test_same_arrays_in_another_process():
    code = ("import hashlib; from hkust_demos.data.phantoms import LESION_KINDS, mni_slices; "
            "m = mni_slices(4, seed=9, lesions=True, size=64, regime='subtle', kinds=LESION_KINDS); "
            "print(hashlib.sha256(m.images.tobytes() + m.masks.tobytes() + repr(m.kinds).encode()).hexdigest())")
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    assert answer == digest(mni_slices(4, seed=9, lesions=True, size=64, regime="subtle", kinds=LESION_KINDS))


def test_global_random_state_is_neither_used_nor_changed():
    np.random.seed(1)
    first = digest(mni_slices(2, lesions=True, size=32))
    state = np.random.get_state()[1].copy()
    np.random.seed(1)
    assert np.array_equal(state, np.random.get_state()[1])
    np.random.seed(2)
    assert digest(mni_slices(2, lesions=True, size=32)) == first


@pytest.mark.parametrize("lesions", [False, True])
def test_a_picture_does_not_depend_on_how_many(lesions):
    few, many = (mni_slices(n, seed=1, lesions=lesions, size=32, kinds=LESION_KINDS) for n in (3, 9))
    assert np.array_equal(few.images, many.images[:3]) and np.array_equal(few.masks, many.masks[:3])
    assert few.kinds == many.kinds[:3]


def test_pictures_and_seeds_differ():
    made = np.concatenate([mni_slices(4, seed=seed, size=32).images for seed in (0, 1, 2**32 - 1)])
    assert len({image.tobytes() for image in made}) == 12


@pytest.mark.parametrize("regime", list(REGIMES))
@pytest.mark.parametrize("kind", LESION_KINDS)
def test_a_pair_shares_the_anatomy_far_from_the_lesion(kind, regime):
    from scipy.ndimage import binary_dilation
    healthy = mni_slices(6, seed=2, regime=regime)
    ill = mni_slices(6, seed=2, regime=regime, lesions=True, kinds=kind)
    assert ill.kinds == [kind] * 6
    for before, after, mask in zip(healthy.images, ill.images, ill.masks):
        far = ~binary_dilation(mask, iterations=10 if kind == "mass" else 3)
        assert np.array_equal(before[far], after[far]) and not np.array_equal(before[mask], after[mask])


@pytest.mark.parametrize("regime", list(REGIMES))
@pytest.mark.parametrize("size", [32, 64])
def test_masks_lie_inside_the_brain(size, regime):
    made = mni_slices(40, seed=4, regime=regime, size=size, lesions=True, kinds=LESION_KINDS)
    for i, mask in enumerate(made.masks):
        _, brain = phantoms._anatomy(np.random.default_rng([4, i, 0]), size, REGIMES[regime])
        assert 4 <= mask.sum() and not (mask & ~brain).any()


def test_anatomy_is_the_same_at_every_size():
    large, small = (mni_slices(8, seed=6, size=size).images for size in (96, 32))
    shrunk = large.reshape(8, 32, 3, 32, 3).mean((2, 4))
    assert all(np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.97 for a, b in zip(shrunk, small))


def test_front_is_up_and_the_head_is_centered():
    brain = np.mean([phantoms._anatomy(np.random.default_rng(i), 96, REGIMES["easy"])[1] for i in range(20)], axis=0) > 0.5
    rows, columns = np.argwhere(brain).mean(0)
    assert abs(rows - 47.5) < 4 and abs(columns - 47.5) < 1
    height, width = (np.ptp(np.flatnonzero(brain.any(axis))) for axis in (1, 0))
    assert height > 1.1 * width
    top, bottom = np.flatnonzero(brain.any(1))[[8, -9]]
    assert brain[top].sum() < brain[bottom].sum()  # frontal lobes are the narrower end


def test_lesion_too_large_for_the_brain_shrinks():
    giant = replace(REGIMES["easy"], radius=(60, 60), slices=(125, 125))
    made = mni_slices(5, seed=0, regime=giant, lesions=True, kinds=("hyper", "mass"))
    assert made.masks.any(axis=(1, 2)).all() and np.isfinite(made.images).all()


def test_kinds_by_one_name_and_drawn_with_equal_chance():
    assert mni_slices(2, lesions=True, size=32, kinds="ring").kinds == ["ring", "ring"]
    drawn = mni_slices(150, lesions=True, size=32).kinds
    assert all(30 < drawn.count(kind) < 70 for kind in ("hyper", "hypo", "ring"))


@pytest.mark.parametrize("arguments, message", [
    (dict(n=0), "n is 0"), (dict(n=-1), "n is -1"), (dict(n=2.0), "n is 2.0"), (dict(n=True), "n is True"),
    (dict(seed=-1), "seed is -1"), (dict(seed=2**32), "seed is"), (dict(seed=None), "seed is None"),
    (dict(size=31), "size is 31"), (dict(size=234), "32 to 233"), (dict(size="64"), "size is '64'"),
    (dict(regime="hard"), "easy, subtle"), (dict(regime=None), "regime is None"),
    (dict(regime=replace(REGIMES["easy"], slices=(100, 80))), "slices are"), (dict(regime=replace(REGIMES["easy"], slices=(0, 80))), "55 to 125"),
    (dict(kinds=()), "one or more"), (dict(kinds=None), "kinds is None"), (dict(kinds="blob"), "blob"), (dict(kinds=("hyper", "blob")), "hyper, hypo, ring, texture, mass"),
    (dict(regime=replace(REGIMES["easy"], radius=(0, 4))), "radius is"), (dict(regime=replace(REGIMES["easy"], contrast=(0.5, 1.5))), "contrast is"),
    (dict(regime=replace(REGIMES["easy"], scale=1.0)), "scale is"), (dict(regime=replace(REGIMES["easy"], elastic=float("nan"))), "elastic is"),
])
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mni_slices(**{"n": 1, **arguments})


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (200, 311)])
@pytest.mark.parametrize("kind", LESION_KINDS)
def test_paint_any_size(shape, kind):
    image = np.random.default_rng(0).uniform(0.3, 0.6, shape)
    copy, center = image.copy(), (shape[0] // 2, shape[1] // 3)
    painted, mask = paint_lesion(image, center, 6, kind=kind, seed=3)
    again, same = paint_lesion(image, center, 6, kind=kind, seed=3)
    assert painted.shape == mask.shape == shape and painted.dtype == np.float32 and mask.dtype == bool
    assert np.array_equal(image, copy) and np.array_equal(painted, again) and np.array_equal(mask, same)
    assert mask[center] and 0 <= painted.min() and painted.max() <= 1 and not np.allclose(painted[mask], image[mask], atol=1e-3)
    if kind != "mass":
        assert np.array_equal(painted[~mask], image.astype(np.float32)[~mask])


def test_paint_signs_and_means():
    flat = np.full((96, 96), 0.5, np.float32)
    change = {kind: paint_lesion(flat, (48, 48), 16, contrast=0.3, kind=kind)[0] - flat for kind in LESION_KINDS}
    assert change["hyper"].min() >= 0 and change["hyper"].max() == pytest.approx(0.3, abs=1e-6)
    assert change["hypo"].max() <= 0 and change["hypo"].min() == pytest.approx(-0.3, abs=1e-6)
    assert change["ring"][48, 48] == pytest.approx(-0.15, abs=1e-3) and change["ring"].max() > 0.27
    assert abs(change["texture"].mean()) < 1e-6 and change["texture"].std() > 0.01
    assert np.abs(change["mass"]).max() < 1e-6


def test_mass_moves_the_anatomy_outward_without_folding():
    ramp = np.tile(np.linspace(0, 1, 129), (129, 1))
    pushed, mask = paint_lesion(ramp, (64, 64), 20, contrast=0.5, kind="mass")
    row = pushed[64].astype(float)
    assert (np.diff(row) >= -1e-6).all()  # order along the ray is kept
    assert row[64 + 14] < ramp[64, 64 + 14] - 0.03 and row[64 - 14] > ramp[64, 64 - 14] + 0.03  # read from nearer to the center
    moved = np.abs(row - ramp[64]) * 128
    assert moved[mask[64] & (np.abs(np.arange(129) - 64) > 6)].min() >= 0.24 * moved.max() - 0.05
    assert np.array_equal(pushed[0], ramp[0].astype(np.float32))


def test_paint_at_a_corner_and_on_black():
    painted, mask = paint_lesion(np.zeros((40, 40)), (0, 39), 5, kind="hyper")
    assert mask[0, 39] and painted.max() > 0.25
    for kind in LESION_KINDS:
        assert np.isfinite(paint_lesion(np.zeros((8, 8)), (7, 7), 1, kind=kind)[0]).all()


@pytest.mark.parametrize("arguments, message", [
    (dict(image=np.zeros((3, 32, 32))), "shape"), (dict(image=np.zeros((4, 4))), "at least 8"), (dict(image=np.full((32, 32), 1.2)), "1.2"),
    (dict(image=np.full((32, 32), np.nan)), "finite"), (dict(image=np.full((32, 32), -0.1)), "-0.1"),
    (dict(center=(32, 4)), "center is"), (dict(center=(-1, 4)), "center is"), (dict(center=(4,)), "center is"),
    (dict(center=(float("nan"), 4)), "center is"), (dict(center=5), "center is"),
    (dict(radius=0), "radius is 0"), (dict(radius=17), "1 to 16"), (dict(radius=float("nan")), "radius is nan"),
    (dict(contrast=0), "contrast is 0"), (dict(contrast=1.1), "contrast is 1.1"), (dict(contrast=float("nan")), "contrast is nan"),
    (dict(kind="blob"), "kind is 'blob'"), (dict(seed=-3), "seed is -3"),
])
def test_bad_paint_is_refused(arguments, message):
    arguments = {"image": np.zeros((32, 32)), "center": (10, 10), "radius": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        paint_lesion(arguments.pop("image"), arguments.pop("center"), arguments.pop("radius"), **arguments)


def test_missing_package_says_what_to_install(monkeypatch):
    phantoms._read_template.cache_clear()
    monkeypatch.setattr(phantoms, "carrier_file", lambda package, relative: (_ for _ in ()).throw(DataNotInstalled(f"{package} is missing")))
    try:
        with pytest.raises(DataNotInstalled, match="nilearn"):
            phantoms._read_template()
    finally:
        phantoms._read_template.cache_clear()


def test_import_is_light():
    code = "import sys, hkust_demos.data.phantoms; print([m for m in ('nilearn', 'nibabel', 'scipy', 'torch', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "[]"
    code = "import sys; from hkust_demos.data.phantoms import mni_slices; mni_slices(1); print('nilearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.strip() == "False"
