"FedNPR on a user's input: bad files, odd splits, the command, and what a run may never do."
import json
import threading
import zipfile
from argparse import ArgumentParser

import numpy as np
import pytest
import torch
from PIL import Image

from hkust_demos.federated import fednpr_apply as fa
from hkust_demos.federated import fednpr_look as look
from hkust_demos.federated import partition
from hkust_demos.federated.commands import run_weights
from hkust_demos.federated.engine import local_state, run_local
from hkust_demos.federated.runs import SteppedRun, compare, score_table

QUICK = dict(images=24, rounds=1, local_epochs=1, start=0)


def picture(shade, size=24, seed=0):
    "A noisy picture of one color."
    noise = np.random.default_rng(seed).normal(0, 12, (size, size, 3))
    return Image.fromarray(np.uint8(np.clip(np.array(shade) + noise, 0, 255)))


def labelled_zip(path, classes=("red", "blue", "green"), n=10, gray=False):
    "A zip of CLASS/number.png."
    shades = [(190, 60, 60), (60, 60, 190), (60, 170, 60), (120, 120, 120)]
    with zipfile.ZipFile(path, "w") as archive:
        for c, name in enumerate(classes):
            for i in range(n):
                with archive.open(f"{name}/{i}.png", "w") as file:
                    image = picture(shades[c % 4], seed=100 * c + i)
                    (image.convert("L") if gray else image).save(file, "PNG")
    return path


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A zip of three colors."
    return labelled_zip(tmp_path_factory.mktemp("own") / "colors.zip", n=16)


@pytest.fixture(scope="module")
def trained(own):
    "A comparison of two variants on that zip, three clients."
    *_, last = compare(fa.FEDNPR, fa.Plan("folder", clients=3, alpha=5, folder=str(own), rounds=2, local_epochs=1, start=0), ("bsm", "npr-per"))
    return last.comparison


def test_a_zip_is_federated(trained):
    federation = trained.cohort
    assert federation.shares.classes == ("blue", "green", "red") and federation.shares.counts.sum() == 36 and len(federation.test) == 12
    assert federation.sizes() == federation.shares.counts.sum(1).tolist() and min(federation.sizes()) >= 4
    assert [row["variant"] for row in score_table(trained)] == ["bsm", "npr-per"] and all(0 <= row["global"] <= 1 for row in score_table(trained))
    assert trained.tracks["npr-per"].config["num-classes"] == 3


def test_no_test_picture_is_trained_on(trained):
    training = {image.numpy().tobytes() for client in trained.cohort.clients for image in client.images}
    testing = {image.numpy().tobytes() for images in (trained.cohort.test, *trained.cohort.tests) for image in images.images}
    assert not training & testing and len(training) == 36


@pytest.mark.parametrize("plan", [fa.Plan(**QUICK), fa.Plan("dirichlet", clients=4, alpha=0.1, **QUICK), fa.Plan("digits", clients=3, **QUICK)])
def test_the_split_on_the_page_is_the_split_that_trains(plan):
    federation = fa.gather(plan)
    assert np.array_equal(np.stack([client.counts() for client in federation.clients]), fa.share_out(plan).counts)
    for client, test in zip(federation.clients, federation.tests):
        assert set(test.labels.tolist()) <= set(client.labels.tolist()) and len(test)


def test_alpha_means_skew():
    spread = [fa.share_out(fa.Plan("dirichlet", alpha=alpha)).counts for alpha in (0.05, 100)]
    assert (spread[0] == 0).sum() > 15 and (spread[1] == 0).sum() == 0


def write(path, content):
    path.write_bytes(content)
    return path


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(60_000_000))
    return path


def climber(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../outside/a.png", b"x" * 200)
    return path


def with_a_text(path):
    labelled_zip(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("red/words.png", "no picture at all")
    return path


BAD = {"text.zip": lambda path: write(path, b"no zip"), "cut.zip": lambda path: write(path, labelled_zip(path).read_bytes()[:900]), "bomb.zip": bomb,
       "climb.zip": climber, "words.zip": with_a_text, "one.zip": lambda path: labelled_zip(path, ("red",)), "few.zip": lambda path: labelled_zip(path, n=3),
       "small.zip": lambda path: labelled_zip(path, n=5), "none.zip": lambda path: path}


@pytest.mark.parametrize("name", BAD)
def test_bad_zips_are_one_sentence(tmp_path, name):
    path = BAD[name](tmp_path / name)
    with pytest.raises((ValueError, OSError)) as error:
        fa.share_out(fa.Plan("folder", folder=str(path)))
    text = str(error.value)
    assert 20 < len(text) < 300 and "\n" not in text and str(tmp_path) not in text and "Traceback" not in text


def test_gray_pictures_are_taken_with_a_note(tmp_path):
    shares = fa.share_out(fa.Plan("folder", clients=2, alpha=5, folder=str(labelled_zip(tmp_path / "gray.zip", n=12, gray=True))))
    assert "36 gray pictures" in shares.doubts()[0]


def test_one_class_clients_are_named_and_trained(tmp_path):
    plan = fa.Plan("folder", clients=3, alpha=0.02, seed=3, folder=str(labelled_zip(tmp_path / "skewed.zip", n=40)), rounds=1, local_epochs=1, start=0)
    shares = fa.share_out(plan)
    assert any((row > 0).sum() == 1 for row in shares.counts) and "a single class" in shares.doubts()[0]
    *_, last = compare(fa.FEDNPR, plan, ("fedavg", "npr", "npr-per"))
    assert all(torch.isfinite(value).all() for track in last.comparison.tracks.values() for value in track.arrays.values())


def test_a_changed_zip_is_read_again(tmp_path):
    path = labelled_zip(tmp_path / "mine.zip", n=12)
    before = fa.share_out(fa.Plan("folder", clients=2, alpha=5, folder=str(path)))
    labelled_zip(path, n=20)
    assert fa.share_out(fa.Plan("folder", clients=2, alpha=5, folder=str(path))).counts.sum() > before.counts.sum()


@pytest.mark.parametrize("text, told", [("", "empty"), ("picture,kind\na,b\n", "needed are image and label"), ("image,label\n", "needed are image and label"),
                                        ("image,label\na,\n", "row 2 has no label"), ("image,a,b,c\nx,1,1,0\n", "row 2 names 2 classes"),
                                        ("image,label\n" + "\n".join(f"a,{i}" for i in range(70)), "70 different values"), ("\x00,\x01\n", "binary")])
def test_bad_tables_are_one_sentence(tmp_path, text, told):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=told) as error:
        partition.read_label_table(tmp_path / "table.csv")
    assert "table.csv" in str(error.value)


def test_a_table_with_centers_is_split_by_them(tmp_path):
    (tmp_path / "split.csv").write_text("\ufeffImage,Label,Center\n" + "\n".join(f"i{i},{'ab'[i % 2]},{i % 3}" for i in range(30)))
    table = partition.read_label_table(tmp_path / "split.csv")
    assert partition.table_shares(table).counts.tolist() == [[5, 5]] * 3 and partition.table_shares(table).clients == ("0", "1", "2")


@pytest.mark.parametrize("client", [0, 2])
@pytest.mark.parametrize("variant", ["bsm", "npr-per"])
def test_a_picture_is_judged(trained, tmp_path, variant, client):
    picture((60, 60, 190), 200, 7).save(tmp_path / "blue.jpg")
    found = look.predict(trained.tracks[variant], trained.cohort, tmp_path / "blue.jpg", client=client)
    assert set(found.head) == {"blue", "green", "red"} and abs(sum(found.head.values()) - 1) < 1e-5
    assert found.neighbors[0][0] == "blue" or variant == "npr-per"
    assert found.picture.shape == (32, 32, 3) and not any("mean nothing" in text for text in found.warnings)


def test_strange_pictures_are_warned_about(trained, tmp_path):
    Image.fromarray(np.uint8(255 * (np.indices((90, 90)).sum(0) // 9 % 2))).save(tmp_path / "board.png")
    warnings = look.predict(trained.tracks["bsm"], trained.cohort, tmp_path / "board.png").warnings
    assert any("gray" in text for text in warnings) and any("the answer means nothing" in text for text in warnings)


def test_what_is_no_picture_is_refused(trained, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(ValueError, match="words.png"):
        look.predict(trained.tracks["bsm"], trained.cohort, tmp_path / "words.png")


def test_prototypes_and_own_heads_stay_with_the_clients(trained):
    track = trained.tracks["npr-per"]
    assert not [name for name in track.arrays if "head" in name or "plugin" in name or "centers" in name]
    assert all("plugin.centers" in local_state(context) and "model.head.weight" in local_state(context) for context in track.contexts)
    assert not [name for name in run_weights(track) if "plugin" in name or "centers" in name]


def test_side_by_side_is_the_same_as_alone():
    plan = fa.Plan(**{**QUICK, "rounds": 2})
    *_, last = compare(fa.FEDNPR, plan, ("fedavg", "npr"))
    for variant, track in last.comparison.tracks.items():
        alone = run_local(*fa.flower_apps(), 6, fa.run_config(plan, variant))
        assert all(torch.equal(value, track.arrays[name]) for name, value in alone.arrays.items())
        assert alone.history.curve("balanced") == track.history.curve("balanced")


def test_stopping_leaves_no_thread_and_keeps_what_there_is():
    before = threading.active_count()
    running = compare(fa.FEDNPR, fa.Plan(**{**QUICK, "rounds": 50}), ("bsm", "npr"))
    kept = [next(running) for _ in range(7)][-1].comparison
    running.close()
    assert threading.active_count() == before
    assert [track.done for track in kept.tracks.values()] == [2, 1] and len(score_table(kept)) == 2
    assert look.feature_map(kept.tracks["npr"], kept.cohort).points.keys() == {0, 1}


def test_an_error_in_a_round_reaches_the_one_who_asks():
    def broken(callback):
        raise ValueError("told")
    run = SteppedRun(broken)
    with pytest.raises(ValueError, match="told"):
        run.step()
    run.stop()


def test_a_client_with_a_folder_of_its_own(own, tmp_path):
    config = fa.run_config(fa.Plan("folder", clients=3, folder=str(own)), "npr") | {"partition-id": 0}
    data = fa.client_data({**config, "data-dir": str(labelled_zip(tmp_path / "site.zip", ("red", "green"), 8))})
    assert sorted(set(data.train.tensors[1].tolist())) == [1, 2] and (len(data.train), len(data.test)) == (12, 4)
    with pytest.raises(ValueError, match="class pink; the run knows blue, green, red"):
        fa.client_data({**config, "data-dir": str(labelled_zip(tmp_path / "other.zip", ("red", "pink"), 8))})


def command(words):
    "Parse and run."
    parser = ArgumentParser()
    fa.add_arguments(parser)
    return fa.run_command(parser.parse_args([str(word) for word in words]))


def test_the_command_federates_a_zip(own, tmp_path, capsys):
    options = ["--data", own, "--clients", 3, "--alpha", 5, "--rounds", 2, "--local-epochs", 1, "--compare"]
    written = command([*options, "--out", tmp_path / "run"])
    assert {path.name for path in written} == {"weights.safetensors", "card.json", "report.json", "history.csv", "rounds.npz", "partition.png", "rounds.png", "recall.png",
                                               "features.png"} and all(path.stat().st_size for path in written)
    report, card = (json.loads((tmp_path / "run" / name).read_text()) for name in ("report.json", "card.json"))
    assert [row["variant"] for row in report["scores"]] == ["fedavg", "bsm", "npr"] and report["not_for_diagnosis"]
    assert "--data DIR" in card["command"] and str(own.parent) not in json.dumps([card, report])
    assert "round 2 of 2" in capsys.readouterr().err
    before = (tmp_path / "run" / "weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="--force"):
        command([*options, "--out", tmp_path / "run"])
    command([*options[:-1], "--out", tmp_path / "run", "--force"])  # alone, as side by side
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == before


def test_a_refused_command_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="up to 6"):
        command(["--clients", 9, "--out", tmp_path / "run"])
    with pytest.raises(ValueError, match="no such file"):
        command(["--data", tmp_path / "nothing.zip", "--out", tmp_path / "run"])
    assert list(tmp_path.iterdir()) == []
