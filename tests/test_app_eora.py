"The EoRA app as a program sees it."
import json
import time
import zipfile
from pathlib import Path

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from peft import PeftModel

from hkust_demos.apps.eora import LIVE_KNOBS, OPENING
from hkust_demos.llm.adapters import read_paths
from hkust_demos.llm.eora_apply import rebuild_base
from hkust_demos.llm.eora_example import shipped_example
from hkust_demos.llm.lowrank import attach_paths, detach_paths
from hkust_demos.llm.models import load_demo_lm
from hkust_demos.llm.whole_model import first_blocks

CHOICES = dict(model="", pruning="Wanda", bits="16 (none)", group="64", rounding="GPTQ", source="Python reference", upload=None,
               field="", pasted="", tokens=512, rank=16, budget=0, methods=["SVD"], prompt="The for statement is used to iterate over the")


@pytest.fixture(scope="module")
def client(hub):
    "A client of the running app."
    return Client(f"{hub.url}/eora/", verbose=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "The first four blocks of the embedded model, as a folder of a user's own."
    folder = tmp_path_factory.mktemp("eora") / "four-blocks"
    model, tokenizer = load_demo_lm()
    first_blocks(model, 4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def press(client, small):
    "Press the button with these choices."
    return lambda **changed: client.predict(**{**CHOICES, "model": small, **changed}, api_name="/run")


@pytest.fixture(scope="module")
def finished(client, small):
    "One finished run, with the intermediate states that were shown."
    job = client.submit(**{**CHOICES, "model": small}, api_name="/run")
    return job.result(timeout=400), job.outputs()


def plotly(value):
    "The figure inside a gr.Plot value."
    return json.loads(value["plot"])


def test_endpoints_have_names(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/run", "/live", "/layer", "/rank", "/prompt", "/adapter", "/tokens"} <= set(named)
    for name in ("/run", "/live", "/tokens"):
        assert all(p["parameter_has_default"] and not p["parameter_name"].startswith("param_") for p in named[name]["parameters"]), name


def test_knobs_answer_from_the_shipped_example(client):
    picture, words, sizes = client.predict(api_name="/live")
    assert 'src="data:image/png' in picture and 'src="data:image/png' in sizes and f"{OPENING['compression']}, block {OPENING['block']}, {OPENING['layer']}" in words
    for compression in shipped_example().compressions:
        words = client.predict(rank=128, compression=compression, api_name="/live")[1]
        assert compression in words and "78.2 MB" in words and "tokens" in words
    assert "measured at the ranks" in client.predict(rank=8, api_name="/live")[1]
    for knob, values in LIVE_KNOBS.items():
        assert len({client.predict(**{knob: value}, api_name="/live")[0] for value in values}) == len(values)
    with pytest.raises(AppError, match="no layer|not in the list|maximum|minimum|no rank"):
        client.predict(block=99, api_name="/live")


def test_time_and_scarcity_are_told_before_a_run(client):
    few, enough, most = (client.predict(tokens=n, api_name="/tokens") for n in (2_560, 16_384, 131_072))
    assert "seconds of reading" in few and "below 15,360" in few and "Few" not in enough and "minutes of reading" in most
    assert client.predict(api_name="/tokens") == enough


def test_run_starts_without_any_argument(hub):
    "The default run is accepted as it is and reads its text; finishing it takes a minute (slow test below)."
    job = Client(f"{hub.url}/eora/", verbose=False, httpx_kwargs={"timeout": 120}).submit(api_name="/run")
    begun = time.monotonic()
    while not any("reading calibration text" in str(state) for state in job.outputs()):
        assert time.monotonic() - begun < 120 and not job.done(), job.status()
        time.sleep(0.3)
    job.cancel()


@pytest.mark.slow
def test_default_run_finishes(hub):
    status, *pictures = Client(f"{hub.url}/eora/", verbose=False).predict(api_name="/run")
    assert "Wanda 2:4" in status and "16,384 tokens" in status and len(pictures) == 7


@pytest.mark.parametrize("changed, sentence", [
    (dict(source="pasted text", pasted="  "), "text box is empty"),
    (dict(source="pasted text", pasted="Too short a text."), r"has \d+ tokens"),
    (dict(source="my file"), "no file was uploaded"),
    (dict(model="nobody/no-such-model"), "no internet"),
    (dict(model="what is this?"), "neither a folder"),
    (dict(model=""), "neither a folder"),
    (dict(pruning="none"), "nothing to compress"),
    (dict(model="missing.gguf"), "no such file"),
])
def test_bad_choices_are_sentences(press, changed, sentence):
    with pytest.raises(AppError, match="(?i)" + sentence) as error:
        press(**changed)
    assert "Traceback" not in str(error.value)


def test_binary_upload_is_refused(press, tmp_path):
    (tmp_path / "noise.txt").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(AppError, match="not UTF-8"):
        press(source="my file", upload=handle_file(tmp_path / "noise.txt"))
    (tmp_path / "program.exe").write_bytes(b"MZ")
    with pytest.raises(Exception, match="(?i)file"):
        press(source="my file", upload=handle_file(tmp_path / "program.exe"))


def test_encoder_only_folder_is_refused(press, tmp_path):
    from transformers import BertConfig, BertForMaskedLM
    BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path)
    with pytest.raises(AppError, match="a causal language model"):
        press(model=str(tmp_path))


def test_rank_above_the_narrowest_layer_is_refused(press):
    with pytest.raises(AppError, match="192|128"):
        press(rank=200)


def test_follow_ups_without_a_run_are_sentences(hub):
    fresh = Client(f"{hub.url}/eora/", verbose=False)
    for call in (dict(api_name="/adapter"), dict(prompt="Hello", api_name="/prompt")):
        with pytest.raises(AppError, match="press Compress"):
            fresh.predict(**call)


def test_run_returns_all_pictures(finished):
    (status, spectrum, curves, heat, sizes, words, text, layer), shown = finished
    assert "Wanda 2:4" in status and "EoRA" in status and "512 calibration tokens are few for inputs of 1,536 features" in status
    assert "directions" in plotly(spectrum)["layout"]["title"]["text"]
    assert {trace["name"] for trace in plotly(curves)["data"]} == {"EoRA", "SVD"}
    assert len(plotly(heat)["data"][0]["y"]) == 4
    assert {"EoRA", "SVD"} <= {trace["name"] for trace in plotly(sizes)["data"]}
    assert {trace["name"] for trace in plotly(words)["data"]} == {"released", "compressed", "EoRA"}
    assert "released" in text and len(shown) > 6


def test_the_spectrum_is_shown_before_the_work_is_done(finished):
    early = next(index for index, state in enumerate(finished[1]) if isinstance(state[1], dict) and "plot" in state[1])
    assert early <= 3 < len(finished[1]) - 3


def test_layer_rank_and_prompt_answer(client, finished):
    name = "model.layers.3.mlp.down_proj"
    spectrum, curves = client.predict(name, 16, api_name="/layer")
    assert "1536" in plotly(spectrum)["layout"]["title"]["text"] and plotly(curves)["data"]
    with pytest.raises(AppError, match="not in the list of choices|no layer"):
        client.predict("model.layers.99", 16, api_name="/layer")
    _, _, size = client.predict(name, 8, api_name="/rank")
    assert "Rank 8" in size
    words, text = client.predict("A function is", api_name="/prompt")
    assert plotly(words)["data"] and "A function is" in text
    with pytest.raises(AppError, match="prompt is empty"):
        client.predict("  ", api_name="/prompt")


def test_adapter_loads_with_stock_peft(client, finished, tmp_path):
    client.predict("model.layers.3.mlp.down_proj", 8, api_name="/rank")
    archive, report = client.predict(api_name="/adapter")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors", "base.json", "report.json"}
    assert json.loads(Path(report).read_text())["recipe"]["sparsity"] == "2:4"
    base, tokens = rebuild_base(tmp_path / "report.json"), torch.arange(100, 140)[None]
    with torch.inference_mode():
        expected = attach_paths(base, read_paths(tmp_path))(tokens).logits
        loaded = PeftModel.from_pretrained(detach_paths(base), tmp_path)
        assert (loaded(tokens).logits - expected).abs().max() < 1e-4


def visible_plots(page):
    "Plot boxes that a visitor sees."
    return [box for box in page.locator(".gradio-container .plot-container, [data-testid=plot], .js-plotly-plot").all() if box.is_visible()]


@pytest.fixture()
def page(hub, browser):
    "The app in a browser."
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(f"{hub.url}/eora/")
    yield page
    page.close()


def test_page_opens_on_a_finished_picture(page):
    picture = page.locator("#finished img")
    picture.wait_for(state="visible", timeout=30_000)
    assert picture.evaluate("image => image.complete && image.naturalWidth > 300") and visible_plots(page) == []
    before, slider = picture.evaluate("image => image.nextElementSibling.style.left"), page.get_by_label("number input for Rank", exact=True)
    slider.fill("8")
    slider.press("Enter")
    page.get_by_text("measured at the ranks").wait_for(timeout=30_000)
    assert picture.evaluate("image => image.nextElementSibling.style.left") != before


@pytest.mark.slow
def test_a_run_fills_the_hidden_boxes(page, small):
    page.get_by_label("Model").fill(small)
    page.get_by_label("number input for Calibration tokens").fill("512")
    page.get_by_label("number input for Calibration tokens").press("Enter")
    page.get_by_role("button", name="Compress and repair", exact=True).click()
    page.locator(".js-plotly-plot").nth(4).wait_for(state="visible", timeout=300_000)
    assert all(box.bounding_box()["width"] > 150 for box in page.locator(".js-plotly-plot").all())
