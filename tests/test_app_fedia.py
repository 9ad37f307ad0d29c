"The FedIA app as a program and a person see it."
import json
import re
import zipfile

import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from hkust_demos.apps.fedia import LIVE_KNOBS
from federated_pages import chart, empty_boxes, ends_on_a_phone, finished_page, new_page, stop_in_round

SETTINGS = dict(data="painted lesions", upload=None, clients=2, missing=0.8, images=4, few=2, rounds=3, epochs=1, warmup=2, correct_at=3, threshold=0.5, temperature=1.0, seed=0)
VARIANTS = ["FedAvg", "FedIA"]


@pytest.fixture(scope="module")
def client(hub):
    "A page of the running app."
    return new_page(hub, "fedia")


def run(client, variants=VARIANTS, **changed):
    "Press Run and wait."
    return client.predict(*{**SETTINGS, **changed}.values(), variants, api_name="/run")


@pytest.fixture(scope="module")
def trained(client):
    "What a run gives; the page keeps it for the tests that follow."
    return run(client)


@pytest.fixture(scope="module")
def own_zip(tmp_path_factory):
    "Two clients with bright squares."
    path, rng = tmp_path_factory.mktemp("zip") / "squares.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("north", "south"):
            for i in range(6):
                mask = np.zeros((40, 40), np.uint8)
                mask[5 + i:15 + i, 8:18] = 255
                for side, values in (("images", np.uint8(np.clip(50 + mask // 2 + rng.normal(0, 8, mask.shape), 0, 255))), ("labels", mask)):
                    with archive.open(f"{name}/{side}/{i}.png", "w") as file:
                        Image.fromarray(values).save(file, "PNG")
    return path


def test_endpoints_have_names_and_parameters_defaults(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/live", "/run", "/stop", "/predict", "/files", "/fitting"} <= set(endpoints)
    assert all(not p["parameter_name"].startswith("param_") and p["parameter_has_default"] for e in endpoints.values() for p in e["parameters"])


def test_the_finished_run_answers_to_its_knobs(client):
    picture, told = client.predict(api_name="/live")
    assert picture.startswith("<img") and "data:image/svg+xml;base64," in picture and "Round 30 of 30" in told
    seen = {client.predict(round_index=r, variant=v, api_name="/live")[0] for r in (0, 12) for v in LIVE_KNOBS["variant"]}
    assert len(seen) == 2 * len(LIVE_KNOBS["variant"])
    with pytest.raises(AppError, match="rounds 0 to 30|aximum"):
        client.predict(round_index=31, api_name="/live")


def test_a_run_tells_and_draws(trained):
    done, table, dice, belief, shares, masks = trained
    assert done == "done" and "After 3 of 3 rounds" in table and all(name in table for name in VARIANTS)
    assert [line["name"] for line in chart(dice)["data"]] == VARIANTS and chart(dice)["data"][0]["x"] == [0, 1, 2, 3]
    assert [bar["name"] for bar in chart(belief)["data"]] == ["seen", "true"] and len(chart(shares)["data"]) == 2 and masks["plot"].startswith("data:image")


def test_a_test_slice_and_an_upload(client, trained, tmp_path):
    text, picture = client.predict("a test slice", None, 7, "FedIA", api_name="/predict")
    assert "the truth has" in text and "Not for diagnosis" in text and picture["plot"].startswith("data:image")
    Image.fromarray(np.full((90, 60), 250, np.uint8)).save(tmp_path / "own.png")
    text, _ = client.predict("my picture", handle_file(tmp_path / "own.png"), 0, "FedAvg", api_name="/predict")
    assert "painted brain slices, nothing else" in text and "truth" not in text


def test_the_files_of_a_run(client, trained):
    with zipfile.ZipFile(client.predict(api_name="/files")) as archive:
        assert {"weights.safetensors", "card.json", "report.json", "history.csv", "rounds.npz", "masks.png", "completeness.png", "rounds.png"} == set(archive.namelist())
        assert json.loads(archive.read("report.json"))["true_completeness"]["client 2"] == 1


def test_an_own_zip_is_federated(hub, own_zip):
    page = new_page(hub, "fedia")
    _, table, _, belief, *_ = run(page, ["FedAvg", "FedIA"], data="my own zip", upload=handle_file(own_zip))
    assert "no client called test" in table and [bar["name"] for bar in chart(belief)["data"]] == ["seen"] and chart(belief)["data"][0]["x"] == ["north", "south"]
    with pytest.raises(AppError, match="nobody knows those of your own slices"):
        run(page, ["complete masks"], data="my own zip", upload=handle_file(own_zip))


def test_a_page_keeps_its_run_to_itself(hub, trained):
    other = new_page(hub, "fedia")
    for endpoint, values in (("/predict", ("a test slice", None, 0, "FedIA")), ("/files", ())):
        with pytest.raises(AppError, match="press Run"):
            other.predict(*values, api_name=endpoint)


@pytest.mark.parametrize("variants, changed, told", [([], {}, "at least one"), (["FedIA"], dict(data="my own zip"), "o zip was uploaded"),
                                                     (["FedIA"], dict(missing=3), "missing is 3|aximum"), (["FedIA"], dict(warmup=1), "warmup is 1|inimum")])
def test_runs_that_cannot_be_are_sentences(client, variants, changed, told):
    with pytest.raises(AppError, match=told):
        run(client, variants, **changed)


def test_what_is_no_zip_or_picture_is_refused(client, trained, tmp_path):
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "words.png").write_text("no picture")
    with pytest.raises(AppError, match="text.zip is neither") as error:
        run(client, ["FedIA"], data="my own zip", upload=handle_file(tmp_path / "text.zip"))
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(AppError, match="words.png"):
        client.predict("my picture", handle_file(tmp_path / "words.png"), 0, "FedIA", api_name="/predict")
    with pytest.raises(AppError, match="FedProx was not part of the run"):
        client.predict("a test slice", None, 0, "FedProx", api_name="/predict")


def test_a_stopped_run_can_be_asked(hub):
    page = new_page(hub, "fedia")
    job = page.submit(*{**SETTINGS, "rounds": 60}.values(), ["FedIA"], api_name="/run")
    table = stop_in_round(page, job, "round 2 of 60")
    assert "of 60 rounds" in table
    assert "FedIA sees" in page.predict("a test slice", None, 0, "FedIA", api_name="/predict")[0]


def test_a_person_slides_runs_and_asks_by_keyboard(hub, watched):
    page = finished_page(watched, f"{hub.url}/fedia/")
    page.get_by_label("range slider for Round of the finished run").press("ArrowLeft")
    page.get_by_text("Round 29 of 30").wait_for(timeout=30_000)
    page.get_by_role("tab", name="Federate").press("Enter")
    page.get_by_label("number input for Slices of a careless client").fill("4")
    page.get_by_label("number input for Clients, the last one complete").fill("2")
    page.get_by_role("button", name="Run", exact=True).press("Enter")
    page.get_by_text(re.compile(r"After \d+ of 30 rounds")).first.wait_for(timeout=120_000)
    page.get_by_role("button", name="Stop", exact=True).press("Enter")
    page.wait_for_timeout(4000)  # rounds that the page has not drawn yet may write over the sentence
    page.get_by_role("button", name="Stop", exact=True).press("Enter")
    page.get_by_text("Stopped. After").wait_for(timeout=60_000)
    page.get_by_role("tab", name="Ask").press("Enter")
    assert empty_boxes(page) == 0
    page.get_by_role("button", name="Ask", exact=True).press("Enter")
    page.get_by_text("the truth has").wait_for(timeout=60_000)
    ends_on_a_phone(page)
