"The ViP app as a program and as a person see it."
import io
import json
import time
import zipfile

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hkust_demos.apps.vip import TEXT
from hkust_demos.catalog import ready_methods
from hkust_demos.data.lesion_world import DISEASES, disease_set

pytestmark = pytest.mark.skipif("vip" not in ready_methods(), reason="the catalog does not call ViP ready yet")
NAMES = list(DISEASES)


@pytest.fixture(scope="module")
def client(hub):
    "A client of the running app."
    return Client(f"{hub.url}/vip/", verbose=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "A picture, and a zip of labeled pictures."
    folder = tmp_path_factory.mktemp("vip")
    images, labels, _ = disease_set(48, 31)
    pictures = [Image.fromarray((255 * image.permute(1, 2, 0)).byte().numpy()) for image in images]
    pictures[1].resize((200, 160)).save(folder / "nevus.png")
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        for k, (picture, label) in enumerate(zip(pictures, labels)):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            archive.writestr(f"{NAMES[label]}/{k}.png", buffer.getvalue())
    return folder


def test_endpoints_have_names(client):
    assert {"/live", "/run", "/ask", "/train", "/stop"} <= set(client.view_api(return_format="dict", print_info=False)["named_endpoints"])


def test_a_word_and_a_weight_move_the_drawing(client):
    first, words = client.predict(api_name="/live")
    assert first.count("<img ") == 2 and "**ViP**" in words
    word = client.predict(text=TEXT.replace("several colors", "brown color"), api_name="/live")[0]
    assert word != first and client.predict(weight=0, api_name="/live")[0] != first and word.split("<img ")[1] == first.split("<img ")[1]
    begun = time.monotonic()
    for number in (5, 6, 7):
        client.predict(number=number, api_name="/live")
    assert (time.monotonic() - begun) / 3 < 5  # patience, not the promise: benchmarks/apps.py measures


@pytest.mark.parametrize("bad, words", [(dict(text="melanoma"), "write CLASS"), (dict(text="only: one"), "at least two"), (dict(text="a: " + "edge " * 30 + "\nb: x"), "has 37 tokens"),
                                        (dict(number=900), "(?i)maximum|0 to 500"), (dict(text="a: x\na: y"), "each class once")])
def test_bad_symptoms_are_sentences(client, bad, words):
    with pytest.raises(AppError, match=words):
        client.predict(**bad, api_name="/live")


def test_other_classes_get_the_plain_ensemble_and_a_word_on_unknown_words(client):
    shown, words = client.predict(text="wart: zigzag surface\nspot: red color", sign=0, api_name="/live")
    assert "never read: zigzag" in words and "**ViP**" not in words and "<script" not in client.predict(text="<script>: red color\nspot: brown color", sign=0, api_name="/live")[0]


def test_a_picture_of_ones_own(client, files):
    shown, maps, words = client.predict(source="my picture", upload=handle_file(files / "nevus.png"), api_name="/run")
    assert shown.count("<img ") == 2 and maps.count("<img ") == 4 and "not for diagnosis" in words
    with pytest.raises(AppError, match="no file was uploaded"):
        client.predict(source="my picture", api_name="/run")
    with pytest.raises(AppError, match="is no CLIP"):
        client.predict(clip="../somewhere else", api_name="/run")


def test_bad_files_are_sentences(client, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.writestr("nevus/1.png", b"x")
    for name, call in (("a.png", lambda f: client.predict(source="my picture", upload=f, api_name="/run")), ("a.zip", lambda f: client.predict(upload=f, api_name="/train")),
                       ("one.zip", lambda f: client.predict(upload=f, api_name="/train"))):
        with pytest.raises(AppError) as error:
            call(handle_file(tmp_path / name))
        text = str(error.value)
        assert len(text) > 30 and "Traceback" not in text and "unforeseen" not in text and str(tmp_path) not in text, (name, text)


def test_training_on_a_zip_with_live_curves(client, files):
    job = client.submit(upload=handle_file(files / "set.zip"), shots=4, epochs=10, api_name="/train")
    words, curve, table, archive = job.result(60)
    assert len(job.outputs()) >= 3 and "Epoch 5" in job.outputs()[0][0]  # it told on the way
    assert "| ViP |" in words and "| CoOp |" in words and "12 others" in words
    card = json.loads(zipfile.ZipFile(archive).read("card.json"))
    assert card["class_names"] == sorted(NAMES) and card["n_train"] == 16


def test_a_zip_of_other_classes_is_a_sentence(client, files):
    with pytest.raises(AppError, match="same names"):
        client.predict(upload=handle_file(files / "set.zip"), text="wart: red color\nspot: brown color", api_name="/train")


def test_asking_for_an_unknown_class_or_address_is_a_sentence(client):
    with pytest.raises(AppError, match="no line for"):
        client.predict(name="wart", api_name="/ask")
    with pytest.raises(AppError, match="gave no answer"):
        client.predict(address="http://127.0.0.1:9/v1", api_name="/ask")


@pytest.mark.slow
def test_the_embedded_model_is_asked_and_its_answer_filtered(client):
    text, said = client.predict(api_name="/ask")
    assert text.count("\n") == 3 and "Dropped" in said and ("stays as it was" in said) == (text.splitlines()[1] == TEXT.splitlines()[1])


def test_a_person_edits_a_symptom_and_sees_the_decision_move(hub, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    try:
        page.goto(f"{hub.url}/vip/")
        page.wait_for_selector("#finished img")
        before = page.locator("#finished img").nth(1).get_attribute("src")
        box = page.get_by_label("Symptoms: one line a class", exact=False)
        box.fill(TEXT.replace("several colors", "brown color * 3"))
        page.wait_for_function("before => document.querySelectorAll('#finished img')[1]?.getAttribute('src') !== before", arg=before, timeout=30_000)
        page.get_by_role("button", name="Read the picture").click()
        page.wait_for_function("() => document.querySelectorAll('img[alt^=\"melanoma\"]').length > 0", timeout=60_000)
    finally:
        page.close()
