"The FedNPR app as a program and a person see it."
import io
import json
import time
import zipfile

import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hkust_demos.apps.fednpr import LIVE_KNOBS
from federated_pages import chart, empty_boxes, ends_on_a_phone, finished_page, new_page, stop_in_round

SETTINGS = dict(partition="painted skin, six true clinics", upload=None, clients=3, alpha=0.3, imbalance=0.1, images=30, seed=0, rounds=2, epochs=1, size=32,
                lam=0.3, clusters=2, start=0)
VARIANTS = ["FedAvg", "FedNPR, own heads"]


@pytest.fixture(scope="module")
def client(hub):
    "A page of the running app."
    return new_page(hub, "fednpr")


def run(client, variants=VARIANTS, **changed):
    "Press Run and wait."
    return client.predict(*{**SETTINGS, **changed}.values(), variants, api_name="/run")


def ask(client, source="a test picture", upload=None, number=70, variant="FedNPR, own heads", place=1):
    "Press Ask."
    return client.predict(source, upload, number, variant, place, api_name="/predict")


@pytest.fixture(scope="module")
def trained(client):
    "What a run gives; the page keeps it for the tests that follow."
    return run(client)


@pytest.fixture(scope="module")
def own_zip(tmp_path_factory):
    "Two classes of colors, twelve pictures each."
    path, generator = tmp_path_factory.mktemp("zip") / "colors.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for name, shade in (("brown", (120, 80, 50)), ("pink", (220, 150, 160))):
            for i in range(12):
                with archive.open(f"{name}/{i}.png", "w") as file:
                    Image.fromarray(np.uint8(np.clip(shade + generator.normal(0, 15, (20, 20, 3)), 0, 255))).save(file, "PNG")
    return path


def test_endpoints_have_names(client):
    named = set(client.view_api(return_format="dict")["named_endpoints"])
    assert {"/live", "/partition", "/fitting", "/run", "/stop", "/inside", "/predict", "/split", "/files"} <= named


def test_every_parameter_has_a_name_and_a_default(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert all(not p["parameter_name"].startswith("param_") and p["parameter_has_default"] for e in endpoints.values() for p in e["parameters"])


def test_the_finished_run_answers_to_its_knobs(client):
    picture, told = client.predict(api_name="/live")
    assert picture.startswith("<img") and "data:image/svg+xml;base64," in picture and "Round 30 of 30" in told
    seen = {client.predict(round_index=r, variant=v, api_name="/live")[0] for r in (0, 12) for v in LIVE_KNOBS["variant"]}
    assert len(seen) == 6
    with pytest.raises(AppError, match="rounds 0 to 30|aximum"):
        client.predict(round_index=31, api_name="/live")


def test_a_program_may_say_nothing(hub):
    page = new_page(hub, "fednpr")
    job = page.submit(api_name="/run")
    begun = time.monotonic()
    while not any("round 1 of 20" in output[0] for output in job.outputs()) and not job.done() and time.monotonic() - begun < 180:
        time.sleep(0.2)
    assert job.cancel() and any("round 1 of 20" in output[0] for output in job.outputs())
    assert "six clinics" in page.predict(api_name="/split")[1] and chart(page.predict(api_name="/partition")[0])["data"]


def test_the_split_is_shown_before_any_training(client):
    figure, notes = client.predict(*SETTINGS.values(), api_name="/partition")
    assert chart(figure)["data"][0]["y"][0] == "BCN (32)" and notes == ""
    figure, _ = client.predict(*{**SETTINGS, "partition": "painted skin, Dirichlet", "clients": 5}.values(), api_name="/partition")
    assert len(chart(figure)["data"][0]["y"]) == 5


def test_widgets_fit_the_partition(client):
    answers = client.predict("painted skin, six true clinics", 9, api_name="/fitting")
    assert answers[0]["maximum"] == 6 and answers[0]["value"] == 6


def test_a_run_tells_and_draws(trained):
    done, table, rounds, clients, recall, features = trained
    assert done == "done" and "After 2 of 2 rounds" in table and all(name in table for name in VARIANTS)
    assert [line["name"] for line in chart(rounds)["data"]][:2] == VARIANTS and chart(rounds)["data"][0]["x"] == [0, 1, 2]
    assert [bar["x"] for bar in chart(clients)["data"]] == [["BCN", "vidir molemax", "vidir modern"]] * 2
    assert np.shape(chart(recall)["data"][0]["z"]) == (2, 8) and len(chart(features)["data"]) == 16


@pytest.mark.parametrize("changed", [dict(partition="handwritten digits, Dirichlet"), dict(partition="painted skin, Dirichlet", alpha=0.1)])
def test_other_pictures(hub, changed):
    _, table, *_ = run(new_page(hub, "fednpr"), ["FedNPR"], rounds=1, images=40, **changed)
    assert "FedNPR" in table


def test_look_inside(client, trained):
    slider, text, features, cosines, nearest = client.predict("FedNPR, own heads", 2, 0, api_name="/inside")
    assert slider["maximum"] == 2 and "vidir molemax" in text and "round 0" in chart(features)["layout"]["title"]["text"]
    names = chart(cosines)["data"][0]["y"]
    assert len(names) == len(set(names)) and np.shape(chart(cosines)["data"][0]["z"]) == (len(names),) * 2 and nearest["plot"].startswith("data:image")


def test_a_test_picture_and_an_upload(client, trained, tmp_path):
    text, judges, neighbors = ask(client)
    assert "the truth is NV" in text and "Not for diagnosis" in text and "BCN" in text
    assert [bar["name"] for bar in chart(judges)["data"]] == ["head: probability", "nearest prototype: cosine"] and neighbors["plot"].startswith("data:image")
    Image.fromarray(np.full((300, 200), 90, np.uint8)).save(tmp_path / "ct.png")
    text, _, _ = ask(client, "my picture", handle_file(tmp_path / "ct.png"), place=3)
    assert "gray" in text and "the answer means nothing" in text and "truth" not in text


def test_the_files_of_a_run(client, trained):
    with zipfile.ZipFile(client.predict(api_name="/files")) as archive:
        assert {"weights.safetensors", "card.json", "report.json", "history.csv", "rounds.npz", "partition.png", "rounds.png", "recall.png", "features.png"} == set(archive.namelist())
        assert json.loads(archive.read("report.json"))["not_for_diagnosis"]
        assert Image.open(io.BytesIO(archive.read("features.png"))).size[0] > 400


def test_an_own_zip_is_federated(hub, own_zip):
    page = new_page(hub, "fednpr")
    own = dict(partition="my own zip, Dirichlet", upload=handle_file(own_zip), clients=2, alpha=5)
    figure, _ = page.predict(*{**SETTINGS, **own}.values(), api_name="/partition")
    assert chart(figure)["data"][0]["x"] == ["brown", "pink"]
    assert "After 2 of 2 rounds" in run(page, ["FedNPR"], **own)[1]
    assert "your pictures from colors.zip" in ask(page, number=1, variant="FedNPR", place=2)[0]


def test_a_page_keeps_its_run_to_itself(hub, trained):
    other = new_page(hub, "fednpr")
    for endpoint, values in (("/inside", ("FedNPR", 1, 0)), ("/predict", ("a test picture", None, 0, "FedNPR", 1)), ("/files", ())):
        with pytest.raises(AppError, match="press Run"):
            other.predict(*values, api_name=endpoint)


def test_a_table_of_labels(client, tmp_path):
    (tmp_path / "labels.csv").write_text("image,label,client\n" + "\n".join(f"i{i},{'ab'[i % 2]},site {i % 3}" for i in range(90)))
    figure, _ = client.predict(handle_file(tmp_path / "labels.csv"), "the table's own clients", 6, 0.3, 0, api_name="/split")
    assert chart(figure)["data"][0]["y"] == ["site 0 (30)", "site 1 (30)", "site 2 (30)"]
    figure, _ = client.predict(handle_file(tmp_path / "labels.csv"), "a Dirichlet draw", 4, 1, 0, api_name="/split")
    assert len(chart(figure)["data"][0]["y"]) == 4
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(AppError, match="other.csv .* needed are image and label"):
        client.predict(handle_file(tmp_path / "other.csv"), "a Dirichlet draw", 4, 1, 0, api_name="/split")


def bomb(path):
    "A zip that grows a thousandfold."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(60_000_000))


def climber(path):
    "A zip with a member that would leave its folder."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../outside/a.png", b"x" * 200)


@pytest.mark.parametrize("name, make", [("bomb.zip", bomb), ("climb.zip", climber), ("text.zip", lambda path: path.write_text("no zip"))])
def test_bad_zips_are_sentences(client, tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(AppError) as error:
        client.predict(*{**SETTINGS, "partition": "my own zip, Dirichlet", "upload": handle_file(tmp_path / name)}.values(), api_name="/partition")
    text = str(error.value)
    assert name in text and len(text) > 30 and "Traceback" not in text and "unforeseen" not in text and str(tmp_path) not in text


@pytest.mark.parametrize("variants, changed, told", [([], {}, "at least one"), (["FedNPR"], dict(partition="my own zip, Dirichlet"), "o zip was uploaded"),
                                                     (["FedNPR"], dict(images=2), "images is 2|inimum"), (["FedNPR"], dict(alpha=0), "alpha is 0|inimum")])
def test_runs_that_cannot_be_are_sentences(client, variants, changed, told):
    with pytest.raises(AppError, match=told):
        run(client, variants, **changed)


def test_what_is_no_picture_is_refused(client, trained, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(AppError, match="words.png"):
        ask(client, "my picture", handle_file(tmp_path / "words.png"))
    with pytest.raises(AppError, match="FedNPR was not part of the run"):
        ask(client, variant="FedNPR")


def test_a_stopped_run_can_be_looked_into(hub):
    page = new_page(hub, "fednpr")
    job = page.submit(*{**SETTINGS, "rounds": 60}.values(), ["FedNPR"], api_name="/run")
    table = stop_in_round(page, job, "round 2 of 60")
    assert "of 60 rounds" in table
    assert page.predict("FedNPR", 1, 60, api_name="/inside")[0]["maximum"] < 60
    assert "After 1 of 1 rounds" in run(page, ["FedNPR"], rounds=1)[1]  # the place is free again


def test_a_person_slides_runs_stops_and_asks_by_keyboard(hub, watched):
    page = finished_page(watched, f"{hub.url}/fednpr/")
    page.get_by_label("range slider for Round of the finished run").press("ArrowLeft")
    page.get_by_text("Round 29 of 30").wait_for(timeout=30_000)
    page.get_by_role("tab", name="Federate").press("Enter")
    page.get_by_text("9 of 48 cells empty").wait_for(timeout=60_000)
    assert empty_boxes(page) == 0
    page.get_by_label("number input for Pictures of a client").fill("30")
    page.get_by_role("button", name="Run", exact=True).press("Enter")
    page.get_by_text("After 2 of 20 rounds").wait_for(timeout=120_000)
    page.get_by_role("button", name="Stop", exact=True).press("Enter")
    page.wait_for_timeout(4000)  # rounds that the page has not drawn yet may write over the sentence
    page.get_by_role("button", name="Stop", exact=True).press("Enter")
    page.get_by_text("Stopped. After").wait_for(timeout=60_000)
    page.get_by_role("tab", name="Ask").press("Enter")
    assert empty_boxes(page) == 0
    page.get_by_role("button", name="Ask", exact=True).press("Enter")
    page.get_by_text("the truth is NV").wait_for(timeout=60_000)
    ends_on_a_phone(page)
