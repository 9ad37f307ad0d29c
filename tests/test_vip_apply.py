"The ViP command: pictures in, readings out; prompts and projections from folders of one's own; what is shipped."
import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

from hkust_demos import cli
from hkust_demos.checkpoints import load_checkpoint, shipped_folder
from hkust_demos.data.lesion_world import DISEASES, disease_set
from hkust_demos.data.limits import ScanError
from hkust_demos.files import DataNotInstalled
from hkust_demos.vision import vip_apply, vip_own
from hkust_demos.vision.aligned_towers import load_towers
from hkust_demos.vision.symptoms import load_symptoms
from hkust_demos.vision.toy_clip import load_toy_clip
from hkust_demos.vision.vip_own import load_prompts

NAMES = list(DISEASES)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Painted lesions as a user's folder, and lists of symptoms."
    folder = tmp_path_factory.mktemp("vip")
    images, labels, _ = disease_set(40, 21)
    for k, (image, label) in enumerate(zip(images, labels)):
        place = folder / "set" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 * image.permute(1, 2, 0)).byte().numpy()).resize((120, 100)).save(place / f"{k}.png")
    (folder / "toy.json").write_text(json.dumps(load_symptoms("toy")))
    (folder / "turned.json").write_text(json.dumps(dict(reversed(load_symptoms("toy").items()))))
    return folder


@pytest.fixture(scope="module")
def prompts(home):
    "Prompts that learned for a moment."
    made = vip_apply.train(str(home / "set"), str(home / "prompts"), epochs=4)
    assert [path.name for path in made] == ["weights.safetensors", "card.json"]
    return home / "prompts"


def run(home, *options, image="set/nevus/1.png", out="reading"):
    "The command on a picture; its record."
    parser = argparse.ArgumentParser()
    vip_apply.add_arguments(parser)
    written = vip_apply.run_command(parser.parse_args([str(home / image), "--out", str(home / out), "--force", *map(str, options)]))
    return json.loads(written[0].read_text()), written


def test_a_picture_is_read_symptom_by_symptom(home, capsys):
    record, written = run(home, "--classes", home / "toy.json")
    reading = record["readings"][0]
    assert [path.name for path in written] == ["reading.json", "01-1.png"] and Image.open(written[1]).width > 500
    assert list(reading["symptoms"]) == NAMES and sum(reading["probabilities"]["symptoms, no training"].values()) == pytest.approx(1, abs=1e-3)
    assert not record["trained"] and "ViP" not in reading["probabilities"] and "not for diagnosis" in capsys.readouterr().err


def test_trained_prompts_answer_beside_the_plain_ensemble_and_take_other_words(home, prompts):
    own = run(home, "--prompts", prompts)[0]["readings"][0]["probabilities"]["ViP"]
    same = run(home, "--prompts", prompts, "--classes", home / "turned.json")[0]["readings"][0]["probabilities"]["ViP"]
    assert same == pytest.approx(own, abs=1e-3)  # the order of a file means nothing
    words = {**load_symptoms("toy"), "nevus": ["red color", "dark streaks"]}
    (home / "other.json").write_text(json.dumps(words))
    other = run(home, "--prompts", prompts, "--classes", home / "other.json")[0]
    assert other["readings"][0]["probabilities"]["ViP"] != own and any("'dark streaks' is listed for more than one class" in note for note in other["notes"])


def test_the_card_tells_what_the_prompts_are(prompts):
    card = json.loads((prompts / "card.json").read_text())
    assert card["class_names"] == sorted(NAMES) and card["clip"] == "toy" and card["n_train"] + card["n_test"] == 40 and card["not_for_diagnosis"]
    assert set(card["metrics"]) == {"ViP", "CoOp", "linear probe"} and str(prompts.parent) not in json.dumps(card)


def test_prompts_before_another_clip_and_foreign_weights_are_sentences(home, prompts, tmp_path):
    with pytest.raises(ValueError, match="not prompts of ViP"):
        load_prompts(shipped_folder("vip"), *load_toy_clip())
    with pytest.raises((ValueError, DataNotInstalled), match="not projections|data get minilm"):
        load_towers(prompts)
    card = json.loads((prompts / "card.json").read_text())
    tensors, _ = load_checkpoint(prompts)
    vip_own.save_checkpoint(tmp_path / "bad", {**tensors, "merge.u": torch.zeros(4, 32)}, card)
    with pytest.raises(ValueError, match="before another CLIP"):
        load_prompts(tmp_path / "bad", *load_toy_clip())
    (prompts.parent / "broken").mkdir()
    (prompts.parent / "broken" / "card.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no weights"):
        load_prompts(prompts.parent / "broken", *load_toy_clip())


@pytest.mark.parametrize("options, words", [
    ([], "--classes is missing"), (["--classes", "nothing.json"], "no such file"), (["--classes", "skin", "--clip", "two words"], "is no CLIP"),
    (["--classes", "toy", "--ask", "http://127.0.0.1:9/v1"], "gave no answer"), (["--ask", "http://127.0.0.1:9/v1"], "--ask needs --classes"), (["--prompts", "nowhere"], "holds no weights")])
def test_bad_options_are_sentences(home, options, words):
    with pytest.raises((ValueError, RuntimeError), match=words):
        run(home, *options, out="refused")
    assert not (home / "refused").exists()


@pytest.mark.parametrize("text, words", [('{"melanoma": "brown", "nevus": []}', "symptoms of 'melanoma' are brown"), ('["melanoma"]', "at least two classes"), ("{", "is no JSON"), ("3", "at least two classes")])
def test_a_bad_list_to_fall_back_on_is_a_sentence_before_anybody_is_asked(home, text, words):
    (home / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        run(home, "--classes", str(home / "classes.json"), "--ask", "http://127.0.0.1:9/v1", out="refused")


def test_bad_pictures_are_sentences(home):
    (home / "text.png").write_bytes(b"no picture")
    (home / "empty.png").write_bytes(b"")
    Image.new("L", (30, 30), 128).save(home / "gray.png")
    for name in ("text.png", "empty.png", "nothing.png"):
        with pytest.raises((ScanError, ValueError, OSError), match=name):
            run(home, "--classes", "toy", image=name, out="refused")
    record, _ = run(home, "--classes", "toy", image="gray.png", out="gray")
    assert record["readings"][0]["picture"] == "gray.png" and any("gray" in note for note in record["notes"])


def test_an_output_that_exists_is_left_alone(home):
    target = home / "mine"
    target.mkdir()
    (target / "thesis.txt").write_text("x")
    parser = argparse.ArgumentParser()
    vip_apply.add_arguments(parser)
    with pytest.raises(FileExistsError, match="mine"):
        vip_apply.run_command(parser.parse_args([str(home / "set/nevus/1.png"), "--classes", "toy", "--out", str(target), "--force"]))
    assert (target / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("arguments, words", [
    (dict(data="set"), "needs --out"), (dict(out="x"), "need --data"), (dict(data="nothing", out="x"), "is no folder"), (dict(data="set", out="x", epochs=0), "use 1 to 500"),
    (dict(data="set", out="prompts"), "already"), (dict(data="set", out="x", variant="no clip"), "is no CLIP")])
def test_training_refuses_early(home, prompts, arguments, words):
    places = {name: str(home / value) if name in ("data", "out") else value for name, value in arguments.items()}
    with pytest.raises((ValueError, FileExistsError), match=words):
        vip_apply.train(**places)


def test_classes_without_symptoms_are_a_sentence(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (20, 20), (40 * k, 9, 9)).save(tmp_path / "set" / name / f"{k}.png")
    with pytest.raises(ValueError, match="no symptoms.json"):
        vip_apply.train(str(tmp_path / "set"), str(tmp_path / "out"))
    (tmp_path / "set" / "symptoms.json").write_text(json.dumps({"a": ["red color"], "c": ["x"]}))
    with pytest.raises(ValueError, match="same names"):
        vip_apply.train(str(tmp_path / "set"), str(tmp_path / "out2"))


def test_what_is_shipped_is_small_true_to_its_card_and_sees_colors():
    tensors, card = load_checkpoint(shipped_folder("vip"))
    assert card["bytes"] < 1_000_000 and card["command"] == "hkust-demos train vip" and {value.dtype for value in tensors.values()} <= {torch.float16, torch.int64}
    told = card["metrics"]["attribute_accuracy"]
    assert told["photo"]["color"] > 0.9 > 0.6 > told["photo"]["shape"]  # it never learned shape, and says so


@pytest.mark.slow
def test_projections_are_trained_with_one_command_and_opened_like_a_clip(tmp_path):
    try:
        from hkust_demos.data.archives import archive_folder
        archive_folder("minilm")
    except DataNotInstalled as missing:
        pytest.skip(str(missing))
    rows = ["file,text"]
    for k in range(30):
        Image.fromarray(np.uint8(np.random.default_rng(k).normal((200, 40, 40) if k % 2 else (40, 40, 200), 20, (60, 60, 3)).clip(0, 255))).save(tmp_path / f"{k}.png")
        rows.append(f"{k}.png,{'a red patch' if k % 2 else 'a blue patch'}")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    assert cli.main(["train", "vip", "--data", str(tmp_path), "--out", str(tmp_path / "towers")]) == 0
    assert json.loads((tmp_path / "towers" / "card.json").read_text())["metrics"]["true_phrase_beats_false"] > 0.9
    (tmp_path / "c.json").write_text(json.dumps({"red": ["a red patch"], "blue": ["a blue patch"]}))
    assert cli.main(["vip", str(tmp_path / "1.png"), "--classes", str(tmp_path / "c.json"), "--clip", str(tmp_path / "towers"), "--out", str(tmp_path / "o")]) == 0
    found = json.loads((tmp_path / "o" / "reading.json").read_text())["readings"][0]["probabilities"]["symptoms, no training"]
    assert found["red"] > found["blue"]
