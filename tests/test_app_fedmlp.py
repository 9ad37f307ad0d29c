"The FedMLP app as a program and a person see it."
import json
import zipfile

import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hkust_demos.apps.fedmlp import FINDINGS, LIVE_KNOBS, OWN
from hkust_demos.catalog import METHODS
from federated_pages import chart, empty_boxes, ends_on_a_phone, finished_page, new_page, stop_in_round

pytestmark = pytest.mark.skipif(not METHODS["fedmlp"].ready, reason="FedMLP is not ready: the hub does not serve it yet")

SHORT = dict(images=30, rounds=3, stage1=1, negatives=0.3, positives=0.3)
VARIANTS = ["FedAvg, labeled only", "FedMLP"]


@pytest.fixture(scope="module")
def client(hub):
    "A page of the running app."
    return new_page(hub, "fedmlp")


@pytest.fixture(scope="module")
def trained(client):
    "What a run gives; the page keeps it for the tests that follow."
    return client.predict(**SHORT, variants=VARIANTS, api_name="/run")


@pytest.fixture(scope="module")
def own_zip(tmp_path_factory):
    "Two clients, two findings, each labeled by one."
    path, generator = tmp_path_factory.mktemp("zip") / "site.zip", np.random.default_rng(0)
    lines = ["image,client,spot,stripe"]
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(32):
            has = (i // 2) % 2, (i // 4) % 2
            image = np.clip(generator.normal(90, 8, (20, 20)), 0, 255)
            image[6:12, 6:12] += 90 * has[0]
            image[:, 15:17] += 90 * has[1]
            with archive.open(f"{i}.png", "w") as file:
                Image.fromarray(np.uint8(np.clip(image, 0, 255))).save(file, "PNG")
            lines.append(f"{i}.png,north,{has[0]}," if i < 16 else f"{i}.png,south,,{has[1]}")
        archive.writestr("labels.csv", "\n".join(lines))
    return path


def table(*rows):
    "Check marks: for each client the findings that it labels."
    return {"headers": ["labels", *FINDINGS], "data": [[f"client {k + 1}", *[name in row for name in FINDINGS]] for k, row in enumerate(rows)], "metadata": None}


def test_endpoints_have_names_and_every_parameter_a_default(client):
    endpoints = client.view_api(print_info=False, return_format="dict")["named_endpoints"]
    assert {"/live", "/labels", "/fitting", "/run", "/stop", "/predict", "/files"} <= set(endpoints)
    assert all(not p["parameter_name"].startswith("param_") and p["parameter_has_default"] for e in endpoints.values() for p in e["parameters"])


def test_the_finished_run_answers_to_its_knobs(client):
    picture, told = client.predict(api_name="/live")
    assert picture.startswith("<img") and "data:image/svg+xml;base64," in picture and "Round 36 of 36" in told and "right" in told
    assert "no tags yet" in client.predict(round_index=10, api_name="/live")[1]
    seen = {client.predict(round_index=r, finding=f, api_name="/live")[0] for r in (19, 30) for f in LIVE_KNOBS["finding"]}
    assert len(seen) == 10
    with pytest.raises(AppError, match="rounds 0 to 36|aximum"):
        client.predict(round_index=37, api_name="/live")


def test_who_labels_what_is_shown_before_any_training(client):
    figure, notes = client.predict(api_name="/labels")
    assert chart(figure)["data"][0]["x"] == FINDINGS and "5 of 25 cells" in chart(figure)["layout"]["title"]["text"] and notes == ""
    figure, notes = client.predict(table=table(FINDINGS, []), images=30, api_name="/labels")
    assert len(chart(figure)["data"][0]["y"]) == 2 and "labels nothing" in notes


def test_sliders_fill_the_table(client):
    rows = client.predict(clients=3, per_client=2, api_name="/fitting")[0]
    rows = rows["value"]["data"] if "value" in rows else rows["data"]
    assert len(rows) == 3 and all(any(row[c + 1] for row in rows) for c in range(5))


def test_a_run_tells_and_draws(trained):
    done, told, balanced, precision, findings, tags = trained
    assert done == "done" and "After 3 of 3 rounds" in told and all(name in told for name in VARIANTS)
    assert [line["name"] for line in chart(balanced)["data"]] == VARIANTS and chart(precision)["data"][0]["x"] == [0, 1, 2, 3]
    assert np.shape(chart(findings)["data"][0]["z"]) == (2, 5)
    present = next(line for line in chart(tags)["data"] if line["name"] == "present")
    assert present["y"][-1] >= present["y"][0] and present["y"][-1] > 0


def test_a_test_picture_and_an_upload(client, trained, tmp_path):
    text, said, picture = client.predict(number=3, api_name="/predict")
    assert "The truth" in text and "Not for diagnosis" in text and [bar["name"] for bar in chart(said)["data"]] == VARIANTS and picture["plot"].startswith("data:image")
    Image.fromarray(np.full((300, 200), 90, np.uint8)).save(tmp_path / "chest.png")
    text, *_ = client.predict(source="my picture", upload=handle_file(tmp_path / "chest.png"), api_name="/predict")
    assert "The truth" not in text and "Not for diagnosis" in text
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(AppError, match="words.png"):
        client.predict(source="my picture", upload=handle_file(tmp_path / "words.png"), api_name="/predict")


def test_the_files_of_a_run(client, trained):
    with zipfile.ZipFile(client.predict(api_name="/files")) as archive:
        assert {"weights.safetensors", "card.json", "report.json", "history.csv", "rounds.npz", "labels.png", "rounds.png", "findings.png", "tags.png"} == set(archive.namelist())
        assert json.loads(archive.read("report.json"))["not_for_diagnosis"]


def test_an_own_table_is_federated(hub, own_zip):
    page, own = new_page(hub, "fedmlp"), dict(source=OWN, upload=handle_file(own_zip))
    figure, _ = page.predict(**own, api_name="/labels")
    assert chart(figure)["data"][0]["x"] == ["spot", "stripe"] and "2 of 4 cells" in chart(figure)["layout"]["title"]["text"]
    assert "After 3 of 3 rounds" in page.predict(**own, **SHORT, variants=["FedMLP"], api_name="/run")[1]
    assert "your pictures from site.zip" in page.predict(number=1, api_name="/predict")[0]


def test_a_page_keeps_its_run_to_itself(hub, trained):
    other = new_page(hub, "fedmlp")
    for endpoint in ("/predict", "/files"):
        with pytest.raises(AppError, match="press Run"):
            other.predict(api_name=endpoint)


@pytest.mark.parametrize("changed, told", [(dict(variants=[]), "at least one"), (dict(source=OWN), "o zip was uploaded"), (dict(images=2), "images is 2|inimum"),
                                           (dict(table=table(["nodule"], ["effusion"])), "obody labels cardiomegaly"), (dict(negatives=3), "negatives is 3|aximum")])
def test_runs_that_cannot_be_are_sentences(client, changed, told):
    with pytest.raises(AppError, match=told):
        client.predict(**{**SHORT, "variants": ["FedMLP"], **changed}, api_name="/run")


def test_bad_zips_are_sentences(client, tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("a.png", b"x" * 200)
    for name in ("text.zip", "empty.zip"):
        with pytest.raises(AppError) as error:
            client.predict(source=OWN, upload=handle_file(tmp_path / name), api_name="/labels")
        text = str(error.value)
        assert name in text and "labels.csv" in text and "Traceback" not in text and str(tmp_path) not in text


def test_a_stopped_run_can_be_asked(hub):
    page = new_page(hub, "fedmlp")
    job = page.submit(**{**SHORT, "rounds": 60}, variants=["FedMLP"], api_name="/run")
    told = stop_in_round(page, job, "round 2 of 60")
    assert "of 60 rounds" in told
    assert "FedMLP" in page.predict(api_name="/predict")[0]


def test_a_person_slides_runs_stops_and_asks_by_keyboard(hub, watched):
    page = finished_page(watched, f"{hub.url}/fedmlp/")
    page.get_by_label("range slider for Round of the finished run").press("ArrowLeft")
    page.get_by_text("Round 35 of 36").wait_for(timeout=30_000)
    page.get_by_role("tab", name="Federate").press("Enter")
    page.get_by_text("5 of 25 cells are labeled").wait_for(timeout=60_000)
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
    page.get_by_text("The truth:").wait_for(timeout=60_000)
    ends_on_a_phone(page)
