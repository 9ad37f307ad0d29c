"FedMLP on a user's input: tables with holes, public layouts as tiny trees, the command, and bad input as sentences."
import json
import zipfile
from argparse import ArgumentParser

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset

from hkust_demos.federated import fedmlp_apply as fa
from hkust_demos.federated import fedmlp_data
from hkust_demos.federated.commands import write_run
from hkust_demos.federated.runs import compare, read_stored

FINDINGS = ("spot", "stripe")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def picture(spot, stripe, seed):
    "A gray picture with or without two things."
    generator = np.random.default_rng(seed)
    image = np.clip(generator.normal(90, 8, (24, 24)), 0, 255)
    image[8:14, 8:14] += 90 * spot
    image[:, 18:20] += 90 * stripe
    return Image.fromarray(np.uint8(np.clip(image, 0, 255)))


def write_site(folder, n=64, clients=True, change=lambda lines: lines):
    "Pictures and their table: north labels spots, south labels stripes; two pictures a patient."
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,client,patient,spot,stripe" if clients else "image,patient,spot,stripe"]
    for i in range(n):
        has = (i // 2) % 2, (i // 4) % 2
        picture(*has, i).save(folder / f"{i}.png")
        known = (has[0], "") if i < n // 2 else ("", has[1])
        lines.append(",".join([f"{i}.png", *(["north" if i < n // 2 else "south"] if clients else []), f"p{i // 2}", *map(str, known if clients else has)]))
    (folder / "labels.csv").write_text("\n".join(change(lines)))
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with clients of its own."
    return write_site(tmp_path_factory.mktemp("site") / "own")


def plan(folder="", **changes):
    "A short plan."
    return fa.Plan(**{**dict(clients=2 if folder else 5, images=30, rounds=3, stage1=1, negatives=0.3, positives=0.3, folder=str(folder)), **changes})


@pytest.fixture(scope="module")
def trained(site):
    "Two variants on the table's own clients."
    *_, last = compare(fa.FEDMLP, plan(site), ("adjusted", "fedmlp"))
    return last.comparison


def test_a_table_with_clients_is_federated(trained):
    here = trained.cohort
    assert here.findings == FINDINGS and here.annotated.tolist() == [[True, False], [False, True]]
    assert sum(here.sizes()) + len(here.test_inputs) == 64 and here.data(0).train.tensors[1][:, 1].isnan().all()
    assert trained.tracks["fedmlp"].done == 3 and fa.client_count(plan(here and trained.plan.folder)) == 2


def test_holes_of_the_test_do_not_count(trained):
    "Half of the test's labels are unknown, and all scores are finite."
    assert trained.cohort.test_truth.isnan().any()
    labels, values = fa.finding_table(trained, "ap")
    assert labels == ["logit adjustment alone", "FedMLP"] and np.isfinite(values).all()


def test_patients_stand_on_one_side(site):
    here = fa.gather(plan(site))
    training = {part.numpy().tobytes() for inputs in here.inputs for part in inputs}
    assert not training & {part.numpy().tobytes() for part in here.test_inputs}
    table, images = fa._own(plan(site))
    place = {((image - 0.5) / 0.25).numpy().tobytes(): patient for image, patient in zip(images, table.patients)}
    sides = [{place[part.numpy().tobytes()] for part in parts} for parts in ([p for inputs in here.inputs for p in inputs], here.test_inputs)]
    assert not sides[0] & sides[1]


def test_a_table_without_clients_is_dealt_out(tmp_path):
    here = fa.gather(plan(write_site(tmp_path / "plain", clients=False), annotates="spot;stripe"))
    assert len(here.inputs) == 2 and here.annotated.tolist() == [[True, False], [False, True]]


def test_uncertain_cells_are_refused_or_unknown(tmp_path):
    spoil = lambda lines: [lines[0], lines[1].replace(",0,", ",-1,"), *lines[2:]]
    folder = write_site(tmp_path / "chexpert", change=spoil)
    with pytest.raises(ValueError, match="uncertain means unknown"):
        fa.gather(plan(folder))
    assert fa.gather(plan(folder, uncertain=1)).findings == FINDINGS


def write_broken(path, kind):
    "Uploads that are no table of findings."
    if kind == "text":
        path.write_text("no zip")
    elif kind == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", bytes(300_000_000))
    elif kind == "climb":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../../labels.csv", "image,a,b\n")
    elif kind == "picture":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("labels.csv", "image,a,b\n" + "\n".join(f"{i}.png,{i % 2},{i % 2}" for i in range(9)))
            for i in range(9):
                archive.writestr(f"{i}.png", "no picture")


@pytest.mark.parametrize("kind", ["text", "bomb", "climb", "picture"])
def test_bad_uploads_are_sentences(tmp_path, kind):
    path = tmp_path / f"{kind}.zip"
    write_broken(path, kind)
    with pytest.raises(ValueError) as error:
        fa.gather(plan(path))
    assert path.name in str(error.value) and str(tmp_path) not in str(error.value) and len(str(error.value)) > 30


@pytest.mark.parametrize("changes, told", [(dict(clients=3), "nobody labels"), (dict(rounds=0), "rounds is 0"), (dict(negatives=2), "negatives is 2"), (dict(size=8), "size is 8"),
                                           (dict(annotates="0;1;2;3"), "4 clients"), (dict(annotates="0;1;2;3;ghost"), "ghost"), (dict(annotates="0;1;2;3;3"), "nobody labels pneumothorax")])
def test_plans_that_cannot_be_are_sentences(changes, told):
    with pytest.raises(ValueError, match=told):
        plan(**changes)


def slice_file(path, patient, value):
    "A CT slice."
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.SeriesInstanceUID, data.Modality, data.PatientID, data.InstanceNumber = "1.2.3", "CT", patient, 1
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = 32, 32, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept, data.PixelSpacing = 1, 0, [1, 1]
    data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    data.PixelData = np.random.default_rng(value).integers(0, 80, (32, 32)).astype(np.int16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def write_ich(root):
    "RSNA hemorrhage: fifteen slices of five patients, one row doubled."
    kinds = fedmlp_data.real_findings("rsna-ich")
    rows = [f"ID_{i:03d}_{kind},{int((i + c) % 3 == 0)}" for i in range(15) for c, kind in enumerate(kinds)] + [f"ID_{i:03d}_any,1" for i in range(15)]
    (root / "rsna_ich").mkdir(parents=True)
    (root / "rsna_ich/stage_2_train.csv").write_text("\n".join(["ID,Label", *rows, rows[0]]))
    for i in range(15):
        slice_file(root / f"rsna_ich/stage_2_train/ID_{i:03d}.dcm", f"Person^{i // 3}", i)


def write_eyes(root):
    "ODIR-5K: both eyes of eight patients."
    lines = ["ID,Patient Age,Patient Sex,Left-Diagnostic Keywords,Right-Diagnostic Keywords,N,D,G,C,A,H,M,O,labels,filename"]
    for i in range(8):
        flags = [int(c in (i, (i + 3) % 8)) for c in range(8)]
        for side in ("left", "right"):
            name = f"{i}_{side}"
            lines.append(f"{i},50,Male,a,b,{','.join(map(str, flags))},\"['{'NDGCAHMO'[i]}']\",{name}.jpg")
            (root / "odir5k/images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng([i, len(side)]).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(root / f"odir5k/images/{name}_50_male_{'NDGCAHMO'[i]}.jpg")
    (root / "odir5k/full_df.csv").write_text("\n".join(lines))


@pytest.fixture
def public(tmp_path, monkeypatch):
    "A folder of public sets and an empty cache."
    fedmlp_data.real_federation.cache_clear()
    fedmlp_data._real_inputs.cache_clear()
    monkeypatch.setenv("HKUST_DEMOS_DATA", str(tmp_path))
    return tmp_path


def test_rsna_hemorrhage_becomes_clients(public):
    write_ich(public)
    here = fedmlp_data.real_federation("rsna-ich", "0,1,2;3,4", size=32)
    assert [len(part) for part in here.inputs] and sum(here.sizes()) + len(here.test_truth) == 15 and here.inputs[0].shape[1] == 1280
    assert len(here.test_truth) % 3 == 0 and all(size % 3 == 0 for size in here.sizes())  # whole patients
    assert here.data(1).train.tensors[1][:, :3].isnan().all() and "split by patient" in here.source


def test_two_eyes_are_one_patient(public):
    write_eyes(public)
    here = fedmlp_data.real_federation("odir5k", "0,1,2,3;4,5,6,7", size=32)
    assert len(here.test_inputs) == 2 * len(here.test_truth) and sum(here.sizes()) + len(here.test_inputs) == 16
    logits, truth = here.scored(torch.randn(len(here.test_inputs), 8))
    assert logits.shape == truth.shape == here.test_truth.shape and (truth.sum(1) == 2).all()


def arguments(*words):
    "Parsed options."
    parser = ArgumentParser()
    fa.add_arguments(parser)
    return parser.parse_args([*map(str, words)])


def test_the_command_writes_a_whole_folder(tmp_path):
    out = tmp_path / "run"
    written = fa.run_command(arguments("--images", 24, "--rounds", 3, "--stage1", 1, "--negatives", 0.3, "--positives", 0.3, "--annotates", "0;1;2;3;effusion,4", "--compare", "--out", out))
    names = {path.name for path in written}
    assert {"weights.safetensors", "card.json", "report.json", "history.csv", "rounds.npz", "labels.png", "findings.png", "tags.png", "rounds.png"} <= names
    report, card = (json.loads((out / name).read_text()) for name in ("report.json", "card.json"))
    assert report["annotates"] == "0;1;2;3;0,4" and report["not_for_diagnosis"] and [row["variant"] for row in report["scores"]] == ["partial", "adjusted", "oracle", "fedmlp"]
    assert "--annotates '0;1;2;3;effusion,4'" in card["command"]
    stored = read_stored(out / "rounds.npz")
    assert stored.rounds == 3 and stored.arrays["fedmlp tags"].shape == (4, 5, 4) and "right" in fa.tag_words(stored, 3)
    with pytest.raises(FileExistsError, match="run exists already"):
        fa.run_command(arguments("--images", 24, "--rounds", 1, "--out", out))


def test_a_folder_on_the_command_line(site, tmp_path):
    fa.run_command(arguments("--data", site, "--rounds", 2, "--stage1", 1, "--form", "paper", "--out", tmp_path / "own"))
    report = json.loads((tmp_path / "own/report.json").read_text())
    assert report["findings"] == [*FINDINGS] and report["plan"]["folder"] == "own" and str(tmp_path) not in json.dumps(report)


def test_a_run_without_a_round_writes_nothing(trained, tmp_path):
    track = trained.tracks["fedmlp"]
    blank = type(track)(track.method, track.cohort, "fedmlp", track.config)
    with pytest.raises(ValueError, match="no round yet"):
        write_run(tmp_path, type(trained)(trained.method, trained.plan, trained.cohort, {"fedmlp": blank}), "fedmlp")


def test_a_node_reads_its_own_folder(site):
    config = {**fa.run_config(plan(site)), "partition-id": 0, "data-dir": str(site)}
    assert len(fa.client_data(config).train) == 64
    hidden = fa.client_data({**config, "annotates": "1"}).train.tensors[1]
    assert hidden[:, 0].isnan().all() and (~hidden[:, 1].isnan()).any()


def test_one_picture_through_all_variants(trained, tmp_path):
    picture(1, 0, 99).convert("RGB").save(tmp_path / "new.png")
    shown, said = fa.predict(trained, tmp_path / "new.png")
    assert shown.shape == (32, 32) and set(said) == {"logit adjustment alone", "FedMLP"} and all(set(row) == set(FINDINGS) for row in said.values())
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match="words.png"):
        fa.predict(trained, tmp_path / "words.png")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engine", ["deployment", "simulation"])
def test_the_other_engines_give_the_same_weights(engine, tmp_path):
    if engine == "simulation":
        pytest.importorskip("ray", reason='Ray is not installed; pip install "hkust-demos[simulation]" brings it')
    from hkust_demos.federated.deploy import run_engine
    from hkust_demos.federated.engine import run_local
    config = fa.run_config(plan(annotates="0,1;2,3,4", clients=2, images=24))
    there = run_engine(fa.APPS, 2, out=tmp_path / engine, run_config=config, engine=engine, timeout=900)
    here = run_local(*fa.flower_apps(), 2, config)
    assert max((here.arrays[name] - there.arrays[name]).abs().max().item() for name in here.arrays) <= 1e-6
    confidence = [row for row in there.history.rows if row[3].startswith("confidence[") and row[2] == -1]
    assert len(confidence) == 5 * 3  # prototypes and confidence travelled from round 1 on
