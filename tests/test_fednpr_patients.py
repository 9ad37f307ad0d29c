"Patients of a folder stand on one side of the split."
import numpy as np
import pytest
from PIL import Image

from hkust_demos.federated.fednpr_apply import Plan, _own_sets


def test_a_patient_is_on_one_side_of_the_split(tmp_path):
    generator = np.random.default_rng(0)
    for number, name in enumerate(("mel", "nv")):
        for patient in range(8):
            folder = tmp_path / "set" / name / f"patient_{number * 8 + patient}"
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    train, test, notes = _own_sets(Plan(partition="folder", folder=str(tmp_path / "set"), size=16))
    assert not {*train.groups} & {*test.groups} and len(train) + len(test) == 48 and {*test.labels.tolist()} == {0, 1}
    assert any("16 folders such as" in note for note in notes)


def test_too_few_patients_are_said(tmp_path):
    for name in ("mel", "nv"):
        for i in range(6):
            (tmp_path / "set" / name / "patient_1").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(tmp_path / "set" / name / "patient_1" / f"{i}.png")
    with pytest.raises(ValueError, match="too few patients"):
        _own_sets(Plan(partition="folder", folder=str(tmp_path / "set"), size=16))
