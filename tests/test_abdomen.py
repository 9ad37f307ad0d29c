"The data of LTUDA: phantom, semi-real patients, any CT to a network's square, and public organ sets."
import nibabel
import numpy as np
import pytest

from hkust_demos.data.abdomen import ORGANS, SITES, abdomen_phantom, abdomen_volume
from hkust_demos.data.belly import axial_stack, find_belly, from_square, from_stack, hounsfield, stack_spacing, to_square
from hkust_demos.data.collections import open_collection
from hkust_demos.data.examples import CollectionError, decode_all
from hkust_demos.data.grid import Scan
from hkust_demos.data.limits import ScanError
from hkust_demos.data.organ_sets import TOY_CASES, open_partial_sets, organ_patches, organ_slices
from hkust_demos.data.patients import real_person, semi_real_federation, semi_real_patient
from hkust_demos.data.scans import read_scan, slice_of, write_scan
from hkust_demos.files import DataNotInstalled


@pytest.fixture(scope="module")
def belly():
    "A volume without contrast agent, cheap to make."
    return abdomen_volume(3, site=5, size=64, depth=12)


@pytest.mark.parametrize("size", [32, 48, 96])
def test_one_seed_draws_the_same_patient_at_every_size(size):
    small, large = abdomen_phantom(2, 3, size=size, only_task=False), abdomen_phantom(2, 3, size=2 * size, only_task=False)
    agree = (large.labels[:, ::2, ::2] == small.labels).mean()
    assert agree > 0.95 and small.images.shape == (8, 1, size, size) and small.images.dtype == np.float32 and small.labels.dtype == np.int64


def test_a_set_is_the_same_twice_and_another_with_another_seed():
    first, again, other = abdomen_phantom(3, 5, size=32), abdomen_phantom(3, 5, size=32), abdomen_phantom(3, 6, size=32)
    assert np.array_equal(first.images, again.images) and not np.array_equal(first.images, other.images)
    assert first[first.sites == 2].task_ids.tolist() == [2, 2, 2] and len(first[:4]) == 4


def test_the_held_out_site_labels_nothing_and_has_its_own_contrast():
    held, seen = (abdomen_phantom(12, 1, size=48, sites=(site,), only_task=False) for site in (5, 1))
    assert held.task_ids.tolist() == [0] * 12
    kidney = [325 * s.images[:, 0][s.labels == 3].mean() for s in (held, seen)]
    assert kidney[0] < 60 and kidney[1] > 90


@pytest.mark.parametrize("options", [dict(n_per_site=0), dict(n_per_site=2.5), dict(n_per_site=1, seed=-1), dict(n_per_site=1, size=8), dict(n_per_site=1, sites=()),
                                     dict(n_per_site=1, sites=6), dict(n_per_site=1, sites=(0,)), dict(n_per_site=True)])
def test_what_cannot_be_drawn_is_refused_by_name(options):
    with pytest.raises(ValueError, match="n_per_site|seed|size|sites"):
        abdomen_phantom(**options)


def test_a_volume_lies_in_space_as_a_person_does(belly):
    scan, labels = belly.scan(), belly.label_array()
    middle = {organ: np.argwhere(labels == k).mean(0) for k, organ in enumerate(ORGANS, 1)}
    assert middle["liver"][0] > 32 > middle["spleen"][0]  # x grows to the right of the patient
    assert middle["kidney"][1] < middle["pancreas"][1] and middle["kidney"][2] < middle["liver"][2]
    assert np.array_equal(slice_of(scan, "axial", 5), belly.volume[5])
    assert scan.spacing == pytest.approx((400 / 64, 400 / 64, 200 / 12)) and scan.modality == "CT"


def test_a_volume_survives_the_way_through_a_file(belly, tmp_path):
    write_scan(belly.scan(), tmp_path / "belly.nii.gz", like=belly.scan())
    write_scan(belly.label_array(), tmp_path / "labels.nii.gz", like=belly.scan())
    assert np.array_equal(read_scan(tmp_path / "belly.nii.gz").array, belly.scan().array)
    assert nibabel.load(tmp_path / "labels.nii.gz").get_data_dtype() == np.uint8
    assert nibabel.load(tmp_path / "belly.nii.gz").get_data_dtype() == np.float32


def test_semi_real_patients_differ_by_seed_and_site_and_keep_their_truth(belly):
    one, other = (semi_real_patient(seed, site=3, size=48, person=belly) for seed in (0, 1))
    assert one.site == 3 and (one.labels != other.labels).mean() > 0.01
    kidney, fat = one.volume[one.labels == 3].mean(), np.median(one.volume[one.labels == 0])
    assert kidney > 60 and fat < 0 and abs((one.labels > 0).mean() / (other.labels > 0).mean() - 1) < 0.5


def test_a_federation_keeps_patients_together(belly):
    found = semi_real_federation(2, 4, size=48, slices=3, person=belly)
    assert len(found.groups) == len(found) and all(len({*found.sites[found.groups == g]}) == 1 for g in set(found.groups))
    assert set(found.task_ids) == {1, 2, 3, 4} and np.array_equal(found[found.sites == 1].groups, found.groups[found.sites == 1])


def test_the_real_person_is_there_or_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    real_person.cache_clear()
    monkeypatch.setenv("HKUST_DEMOS_CACHE", str(tmp_path))
    with pytest.raises(DataNotInstalled, match="hkust-demos data get ct-organs"):
        semi_real_patient(0)
    real_person.cache_clear()


def plain(array, **changed):
    "A scan of unknown origin."
    return Scan(np.asarray(array, np.float32), changed.get("spacing"), changed.get("affine", np.eye(4)), changed.get("modality", "unknown"), "a test")


def test_only_a_ct_becomes_hounsfield_units(belly):
    good = belly.scan().array
    assert hounsfield(plain(good)).warnings == ()
    for bad, words in ((plain(good, modality="MR"), "modality MR"), (plain(good.clip(0)), "not look like a CT"), (plain(0.1 * good), "not look like a CT"),
                       (plain(np.full((30, 30, 3), -1000)), "constant"), (plain(good.clip(None, -600)), "no body")):
        with pytest.raises(ScanError, match=words):
            hounsfield(bad)


def test_a_picture_without_units_is_taken_for_the_window_and_says_so(belly):
    picture = belly.volume[6].clip(-325, 325) / 650 + 0.5
    taken = hounsfield(plain(picture))
    assert np.allclose(taken.array, belly.volume[6].clip(-325, 325), atol=0.01) and "no Hounsfield units" in taken.warnings[0]


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_every_orientation_of_a_file_gives_the_same_stack(belly, tmp_path, axes, flips):
    scan = belly.scan()
    image = nibabel.Nifti1Image(scan.array, scan.affine)
    turn = nibabel.orientations.axcodes2ornt([("LR", "PA", "IS")[a][(f + 1) // 2] for a, f in zip(axes, flips)])
    moved = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(scan.affine), turn))
    nibabel.save(moved, tmp_path / "turned.nii.gz")
    again = read_scan(tmp_path / "turned.nii.gz")
    assert np.array_equal(axial_stack(again.array), belly.volume) and stack_spacing(again) == pytest.approx(belly.spacing)


def test_the_square_is_laid_around_the_body_wherever_it_is(belly):
    frame = find_belly(belly.volume, belly.spacing)
    moved = np.full((12, 80, 90), -1000, np.float32)
    moved[:, 4:68, 20:84] = belly.volume
    shifted = find_belly(moved, belly.spacing)
    assert (shifted.top - frame.top, shifted.left - frame.left, shifted.height, shifted.width) == (4, 20, frame.height, frame.width)
    assert np.abs(to_square(moved, shifted, 32) - to_square(belly.volume, frame, 32)).max() < 60  # AIR beyond the picture is 24 HU below the phantom's air
    with pytest.raises(ScanError, match="no body"):
        find_belly(np.full((3, 30, 30), -900.0))


def test_maps_go_back_to_where_they_came_from(belly):
    frame = find_belly(belly.volume, belly.spacing)
    truth = np.stack([belly.labels == k for k in range(5)]).astype(float)
    square = np.stack([to_square(one, frame, 64) for one in truth + 0.0])
    back = from_square(square.clip(0), frame).argmax(0)
    inside = (slice(None), slice(max(frame.top, 0) + 2, 60), slice(max(frame.left, 0) + 2, 60))
    assert (back[inside] == belly.labels[inside]).mean() > 0.97
    assert np.array_equal(from_stack(axial_stack(belly.scan().array), belly.scan().array), belly.scan().array)


def save(path, array, affine):
    "A NIfTI file."
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


PUBLISHED = {  # set: (scan, label, publisher's number of each of our organs)
    "lits": ("LiTS/volume-{k}.nii.gz", "LiTS/segmentation-{k}.nii.gz", {1: 1}),
    "msd/Task09_Spleen": ("msd/Task09_Spleen/imagesTr/spleen_{k}.nii.gz", "msd/Task09_Spleen/labelsTr/spleen_{k}.nii.gz", {2: 1}),
    "kits19": ("kits19/case_0000{k}/imaging.nii.gz", "kits19/case_0000{k}/segmentation.nii.gz", {3: 1}),
    "abdomenct-1k": ("AbdomenCT-1K/Case_0000{k}_0000.nii.gz", "AbdomenCT-1K/Case_0000{k}.nii.gz", {1: 1, 2: 3, 3: 2, 4: 4})}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "Four published layouts with two tiny patients each."
    root = tmp_path_factory.mktemp("sets")
    for scan_name, label_name, numbers in PUBLISHED.values():
        for k in (1, 2):
            one = abdomen_volume(k, site=1, size=32, depth=12)
            lookup = np.zeros(5, np.uint8)
            lookup[list(numbers)] = list(numbers.values())
            save(root / scan_name.format(k=k), one.scan().array.astype(np.int16), one.scan().affine)
            save(root / label_name.format(k=k), lookup[one.label_array()], one.scan().affine)
    return root


def test_published_layouts_are_found_and_numbered_alike(tree):
    sets = open_partial_sets(tree)
    assert [one.name for one in sets] == list(PUBLISHED)
    for one in sets:
        for index in (0, 1):
            organs, truth = one.read(index).organs, abdomen_volume(index + 1, site=1, size=32, depth=12).label_array()
            assert all(np.array_equal(organs == k, truth == k) for k in one.read(index).labelled)


def test_slices_hold_one_organ_and_a_set_of_all_organs_plays_several(tree):
    found = organ_slices(open_partial_sets(tree), size=32, most=3, least=5)
    assert found.task_ids[found.sites == 2].tolist() == [2] * (found.sites == 2).sum() and set(found.task_ids[found.sites == 4]) == {1, 2}
    assert all(set(np.unique(label)) == {0, task} for label, task in zip(found.labels, found.task_ids))
    assert np.bincount(found.groups).max() <= 3 and found.images.min() >= -1


def test_a_swapped_order_would_show(tree):
    one = open_collection("abdomenct-1k", tree)
    organs = axial_stack(one.read(0).organs)
    middle = {k: np.argwhere(organs == k).mean(0)[2] for k in (1, 2)}
    assert middle[1] < 16 < middle[2] and (organs == 1).sum() > (organs == 2).sum()


def test_patches_are_boxes_around_the_labeled_organ(tree):
    spleens = open_collection("msd/Task09_Spleen", tree)
    found = organ_patches(spleens, 1, size=(4, 16, 16), n=8, seed=3)
    assert found.images.shape == (8, 1, 4, 16, 16) and set(np.unique(found.labels)) == {0, 2} and (found.task_ids == 2).all()
    assert np.array_equal(found.images, organ_patches(spleens, 1, size=(4, 16, 16), n=8, seed=3).images)
    assert not np.array_equal(found.images, organ_patches(spleens, 1, size=(4, 16, 16), n=8, seed=4).images)
    assert organ_patches(spleens, 0, size=(40, 48, 48), n=1).images.min() == -1  # larger than the scan: padded with air


def official(root, name, number=3, shape=(16, 16, 1), **changed):
    "One official file."
    hu, organs = np.full(shape, -900, np.float32), np.zeros(shape, np.uint8)
    hu[4:10, 5:9], organs[4:10, 5:9] = 60, number
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, *changed.get("arrays", (hu, organs)))


def test_the_official_union_is_read_by_its_folders(tmp_path):
    root = tmp_path / "Partially_labeled_dataset"
    for number, folder in enumerate(("0liver", "1spleen", "2kidney", "3pancreas"), 1):
        for case in (7, 8):
            official(root, f"train/{folder}/npy_foreground/{folder[1:]}_{case}_31.npz", number)
    found = open_collection("ltuda-slices", tmp_path)
    assert decode_all(found) == [] and len(set(found.groups)) == 8 and set(found.official) == {"train"}
    assert sorted(found.read(i).labelled[0] for i in range(8)) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert len(organ_slices([found], size=16, least=1)) == 8


def test_the_toy_tables_name_forty_cases_once():
    cases = [case for organ in TOY_CASES.values() for case in organ]
    assert len(cases) == len(set(cases)) == 40 and not set(cases) & {1, 6, 11, 16, 21, 26, 31, 36, 41, 46}


@pytest.mark.parametrize("name, options, words", [
    ("AbdomenCT-1K/slice_npz/Organ12_40_7.npz", dict(number=9), "labels from 0 to 9"),
    ("AbdomenCT-1K/slice_npz/Organ12_40_7.npz", dict(arrays=(np.zeros((4, 4, 1)), np.zeros((4, 5, 1)))), "must be \\(x, y, z\\) and alike"),
    ("AbdomenCT-1K/slice_npz/Organ12_40_7.npz", dict(arrays=(np.zeros((4, 4)),)), "no .npz with arr_0 and arr_1"),
    ("AbdomenCT-1K/slice_npz/Organ12_40_7.npz", dict(arrays=(np.array([{}], object), np.zeros(1))), "pickled"),
    ("AbdomenCT-1K/slice_npz/nameless.npz", {}, "names no case")])
def test_damaged_official_files_are_refused_by_name(tmp_path, name, options, words):
    official(tmp_path / "Toy_dataset", name, **options)
    with pytest.raises(CollectionError, match=words):
        open_collection("ltuda-slices", tmp_path).read(0)


def test_a_folder_without_sets_says_what_would_be_read(tmp_path):
    with pytest.raises(CollectionError, match="lits.*ltuda-slices.*liver/, spleen/"):
        open_partial_sets(tmp_path)
    with pytest.raises(CollectionError, match="is no folder"):
        open_partial_sets(tmp_path / "none")


def test_the_sites_are_the_five_of_the_page():
    assert len(SITES) == 5 and all(len(site.organs) == 4 for site in SITES)
