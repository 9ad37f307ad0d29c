"FedIA on a user's slices: bad files, odd plans, the command, the engines, and what a run may never do."
import json
import os
import time
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hkust_demos.data import lesion_sets
from hkust_demos.data.limits import ScanError
from hkust_demos.federated import fedia_apply as fa
from hkust_demos.federated import fedia_views as views
from hkust_demos.federated.engine import full_config, run_local
from hkust_demos.federated.runs import compare, read_stored, score_table, store_run, write_stored

TINY = dict(images=4, few=2, size=24, rounds=2, warmup=2, local_epochs=1)


def slices(n=6, size=28, seed=0, color=False):
    "Pairs of picture and mask: bright squares on noise."
    rng = np.random.default_rng(seed)
    for i in range(n):
        mask = np.zeros((size, size + 4), np.uint8)
        mask[4 + i % 5:11 + i % 5, 3:9] = mask[18:23, 16:22] = 255
        picture = np.uint8(np.clip(60 + 0.5 * mask + rng.normal(0, 10, mask.shape), 0, 255))
        yield i, (np.repeat(picture[..., None], 3, 2) if color else picture), mask


def own_zip(path, clients=("north", "south"), n=6, extra=(), outer=""):
    "A zip of CLIENT/images and CLIENT/labels."
    with zipfile.ZipFile(path, "w") as archive:
        for c, client in enumerate(clients):
            for i, picture, mask in slices(n, seed=c, color=c == 1):
                for side, values in (("images", picture), ("labels", mask)):
                    with archive.open(f"{outer}{client}/{side}/{i}.png", "w") as file:
                        Image.fromarray(values).save(file, "PNG")
        for name, content in extra:
            archive.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A zip of two clients."
    return own_zip(tmp_path_factory.mktemp("own") / "slices.zip", outer="export/")


@pytest.fixture(scope="module")
def trained(own):
    "Averaging and FedIA on that zip."
    *_, last = compare(fa.FEDIA, fa.Plan("folder", clients=2, folder=str(own), **{**TINY, "rounds": 3}, correct_at=3), ("fedavg", "fedia"))
    return last.comparison


def test_a_zip_is_federated(trained):
    assert trained.cohort.names() == ("north", "south") and trained.cohort.sizes() == [5, 5] and len(trained.cohort.found.test) == 2
    assert [row["variant"] for row in score_table(trained)] == ["fedavg", "fedia"] and "no client called test" in trained.cohort.doubts()[0]
    assert fa._report(trained)["true_completeness"] == {} and set(fa._report(trained)["completeness"]["fedia"]) == {"north", "south"}
    assert np.nansum(fa.heard(trained.tracks["fedia"], "corrected")) == 2  # both in round 3


def test_no_test_slice_is_trained_on(trained):
    training = {image.numpy().tobytes() for client in trained.cohort.found.clients for image in client.images}
    testing = {image.numpy().tobytes() for image in trained.cohort.found.test.images}
    assert not training & testing and len(training) == 10


def test_a_client_called_test_is_the_test(tmp_path):
    found, notes = lesion_sets.read_clients(own_zip(tmp_path / "t.zip", ("a", "b", "test")), size=24)
    assert found.names == ("a", "b") and len(found.test) == 6 and notes == []


def test_stored_runs_come_back_and_are_drawn(trained, tmp_path):
    stored = read_stored(write_stored(store_run(trained, command="x"), tmp_path / "run.npz"))
    first, last = (views.stored_picture(stored, r, "fedavg") for r in (0, 3))
    assert first != last and first.count("<image") == 2 + 2 and "true" not in last  # nobody knows the truth of a zip
    masks = views._masks(stored, "fedia masks", 3)
    assert (masks >= views._masks(stored, "own given")).all() and views._masks(stored, "fedia masks", 2).sum() == views._masks(stored, "own given").sum()


# what cannot be read

def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/images/0.png", bytes(60_000_000))
    return path


def with_mask(values):
    "A zip with one mask more."
    def make(path):
        own_zip(path)
        with zipfile.ZipFile(path, "a") as archive:
            for side, array in (("images", np.zeros((20, 20), np.uint8)), ("labels", values)):
                with archive.open(f"north/{side}/z.png", "w") as file:
                    Image.fromarray(array).save(file, "PNG")
        return path
    return make


def text(path):
    path.write_text("no zip")
    return path


BAD = {"text.zip": text, "bomb.zip": bomb, "climb.zip": lambda path: own_zip(path, extra=[("../../outside/a.png", b"x" * 200)]), "none.zip": lambda path: path,
       "one.zip": lambda path: own_zip(path, ("north",)), "few.zip": lambda path: own_zip(path, n=2), "words.zip": lambda path: own_zip(path, extra=[("north/images/w.png", "words"), ("north/labels/w.png", "words")]),
       "alone.zip": lambda path: own_zip(path, extra=[("north/images/w.png", "words")]), "size.zip": with_mask(np.ones((9, 9), np.uint8)),
       "classes.zip": with_mask(np.arange(400, dtype=np.uint8).reshape(20, 20))}


@pytest.mark.parametrize("name", BAD)
def test_bad_zips_are_one_sentence(tmp_path, name):
    path = BAD[name](tmp_path / name)
    with pytest.raises((ValueError, OSError)) as error:
        fa.gather(fa.Plan("folder", clients=2, folder=str(path), **TINY))
    told = str(error.value)
    assert 20 < len(told) < 300 and "\n" not in told and str(tmp_path) not in told and "Traceback" not in told


def test_a_client_without_any_lesion_is_refused(tmp_path):
    for client in ("a", "b"):
        for i, picture, mask in slices(5):
            for side, values in (("images", picture), ("labels", mask if client == "a" else 0 * mask)):
                (tmp_path / client / side).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(tmp_path / client / side / f"{i}.png")
    with pytest.raises(ScanError, match="masks of b are all empty"):
        lesion_sets.read_clients(tmp_path)


@pytest.mark.parametrize("change, told", [(dict(data="moon"), "data is"), (dict(clients=1), "clients is 1"), (dict(missing=-0.1), "missing is"), (dict(rounds=0), "rounds is"), (dict(warmup=1), "warmup is"),
                                         (dict(threshold=1.0), "threshold is"), (dict(temperature=0), "temperature is"), (dict(size=30), "multiple of 4"), (dict(data="folder"), "no zip")])
def test_plans_that_cannot_be(change, told):
    with pytest.raises(ValueError, match=told):
        fa.Plan(**change)


def test_truth_is_not_asked_of_those_who_have_none(own):
    plan = fa.Plan("folder", clients=2, folder=str(own), **TINY)
    for variant in fa.NEEDS_TRUTH:
        with pytest.raises(ValueError, match="nobody knows"):
            fa.run_config(plan, variant)


def test_the_official_lists_are_read_and_their_faults_told(tmp_path):
    for key in ("a", "b", "t"):
        for place in (f"image/{key}_dwi", f"image/{key}_adc", f"label/{key}", f"2DlabelSingle/{key}"):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            values = np.zeros((32, 32), np.uint8)
            values[5:9, 5:9] = 255
            values[15:19, 5:9] = 0 if place.startswith("2D") else 255
            Image.fromarray(values).save(tmp_path / f"{place}.png")
    (tmp_path / "client0.txt").write_text("a.png\nb.png\n")
    with pytest.raises(ScanError, match="no test.txt"):
        lesion_sets.read_lists(tmp_path)
    (tmp_path / "test.txt").write_text("t.png\n")
    found = lesion_sets.read_lists(tmp_path, size=32)
    assert found.clients[0].completeness == 0.5 and int(found.test.instances.max()) == 2 and found.clients[0].images.shape == (2, 2, 32, 32)
    (tmp_path / "client1.txt").write_text("\n")
    with pytest.raises(ScanError, match="names no slice"):
        lesion_sets.read_lists(tmp_path)


# variants

def test_all_weight_to_one_client_is_that_client_alone():
    "What the others hold changes nothing."
    results = [run_local(*fa.flower_apps(), 4, fa.run_config(fa.Plan(**TINY, missing=missing), "alone") | {"server-test": False}) for missing in (0.8, 0.3)]
    for name, value in results[0].arrays.items():
        torch.testing.assert_close(value, results[1].arrays[name], atol=1e-6, rtol=1e-6)  # the others' weight is 1e-12, not zero
    assert {row[4] for row in results[0].history.rows if row[3] == "share[3]"} == {1.0}


def test_side_by_side_is_the_same_as_alone():
    plan = fa.Plan(**TINY)
    *_, both = compare(fa.FEDIA, plan, ("fedavg", "fedia"))
    *_, one = compare(fa.FEDIA, plan, ("fedia",))
    tracks = [step.comparison.tracks["fedia"] for step in (both, one)]
    assert all(torch.equal(tracks[0].arrays[name], tracks[1].arrays[name]) for name in tracks[0].arrays)


def test_a_client_with_a_folder_of_its_own(tmp_path):
    for i, picture, mask in slices(5):
        for side, values in (("images", picture), ("labels", mask)):
            (tmp_path / side).mkdir(exist_ok=True)
            Image.fromarray(values).save(tmp_path / side / f"{i}.png")
    data = fa.client_data({**fa.run_config(fa.Plan(**TINY)), "partition-id": 0, "data-dir": str(tmp_path)})
    assert len(data.train) == 5 and data.test is None and data.train.tensors[0].shape == (5, 3, 24, 24)
    for path in (tmp_path / "labels").glob("*"):
        path.unlink()
    os.utime(tmp_path, (1, 1))
    with pytest.raises(ScanError, match="one side only"):
        fa.client_data({**fa.run_config(fa.Plan(**TINY)), "partition-id": 0, "data-dir": str(tmp_path)})


# pictures of one's own

def test_one_picture_is_segmented(trained, tmp_path):
    plan = trained.plan
    _, picture, _ = next(slices())
    Image.fromarray(picture).save(tmp_path / "one.png")
    found = fa.segment(trained.tracks["fedia"], trained.cohort, str(tmp_path / "one.png"), plan)
    assert found.prob.shape == (24, 24) and 0 <= found.prob.min() <= found.prob.max() <= 1 and "your slices" in found.warnings[-1]
    (tmp_path / "words.png").write_text("words")
    with pytest.raises(ValueError, match="words.png cannot be read"):
        fa.segment(trained.tracks["fedia"], trained.cohort, str(tmp_path / "words.png"), plan)


# command and engines

def parsed(*words):
    parser = ArgumentParser()
    fa.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def test_the_command_federates_a_zip(own, tmp_path, capsys):
    out = tmp_path / "run"
    written = fa.run_command(parsed("--data", own, "--rounds", 2, "--size", 24, "--warmup", 2, "--local-epochs", 1, "--compare", "--out", out))
    assert {"weights.safetensors", "card.json", "report.json", "history.csv", "rounds.npz", "masks.png", "completeness.png", "rounds.png"} == {path.name for path in written}
    report = json.loads((out / "report.json").read_text())
    assert report["clients"] == ["north", "south"] and report["plan"]["clients"] == 2 and report["plan"]["folder"] == "slices.zip" and report["not_for_diagnosis"]
    assert "no client called test" in capsys.readouterr().err
    with pytest.raises((ValueError, OSError), match="run"):
        fa.run_command(parsed("--data", own, "--rounds", 1, "--out", out))


def test_a_refused_command_leaves_nothing(tmp_path):
    for words in (("--missing", 2), ("--data", tmp_path / "absent.zip")):
        with pytest.raises((ValueError, OSError)):
            fa.run_command(parsed(*words, "--out", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ["simulation", "deployment"])
def test_the_same_weights_behind_other_engines(tmp_path, engine):
    if engine == "simulation":
        pytest.importorskip("ray", reason='Ray is not installed; pip install "hkust-demos[simulation]" brings it')
    from hkust_demos.federated.deploy import run_engine
    plan = fa.Plan(clients=2, **{**TINY, "rounds": 3}, correct_at=3)
    config, begun = fa.run_config(plan), time.monotonic()
    elsewhere = run_engine(fa.APPS, 2, out=tmp_path / engine, run_config=config, engine=engine, timeout=1500)
    seconds, here = time.monotonic() - begun, run_local(*fa.flower_apps(), 2, config)
    assert elsewhere.arrays.keys() == here.arrays.keys() and max((here.arrays[n] - elsewhere.arrays[n]).abs().max().item() for n in here.arrays) <= 1e-6
    told = lambda result: {tuple(row[:4]): round(row[4], 5) for row in result.history.rows if row[3] in ("completeness", "corrected") or row[3].startswith("share")}
    assert told(here) == told(elsewhere) and seconds > 0 and Path(tmp_path / engine).exists()
