"The RoLoRA app as a program and a browser see it."
import json
import time
import zipfile

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hkust_demos.apps.rolora import LIVE_KNOBS, OPENING
from hkust_demos.catalog import METHODS
from hkust_demos.llm.models import prepare

pytestmark = pytest.mark.skipif(not METHODS["rolora"].ready, reason="RoLoRA is not ready in the catalog")
CHOICES = dict(rotations=["R1", "R4"], w_bits=8, a_bits=4, method="RTN", source="Python reference", upload=None, pasted="", tokens=128, kv_bits=16, mode="Hadamard", seed=0,
               prompt="Hello")


@pytest.fixture(scope="module")
def client(hub):
    "A client of the running app."
    return Client(f"{hub.url}/rolora/", verbose=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny random model and a training file of a user's own."
    home, tokenizer = tmp_path_factory.mktemp("rolora-app"), AutoTokenizer.from_pretrained(prepare())
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    LlamaForCausalLM(config).save_pretrained(home / "mine")
    tokenizer.save_pretrained(home / "mine")
    (home / "chats.jsonl").write_text("\n".join([json.dumps({"instruction": "Which letter follows A?", "input": "", "output": "B, of course."})] * 6))
    return home


@pytest.fixture(scope="module")
def press(client, home):
    "Press a button with these choices."
    return lambda button, **changed: client.predict(**{"model": str(home / "mine"), **CHOICES, **changed}, api_name=button)


@pytest.fixture(scope="module")
def trained(client, home):
    "A finished training with the states that were shown, and the archive it gave."
    job = client.submit(model=str(home / "mine"), **CHOICES, chats=handle_file(home / "chats.jsonl"), steps=4, rank=4, lr=0.02, api_name="/train")
    last = job.result(timeout=400)
    return last, job.outputs(), client.predict(api_name="/files")


def test_endpoints_have_names(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert {*named} == {"/live", "/run", "/train", "/stop", "/bits", "/files"}
    assert all(p["parameter_has_default"] and not p["parameter_name"].startswith("param_") for about in named.values() for p in about["parameters"])


def test_knobs_answer_from_the_prepared_file(client):
    maps, words, tails = client.predict(api_name="/live")
    assert 'src="data:image/png' in maps and 'src="data:image/png' in tails and "no logit moved by more than" in words
    assert f"Block {OPENING['layer']}, input of {OPENING['module']}" in words and "after" in words
    others = [client.predict(layer=28, module="down_proj", scale="linear", api_name="/live"), client.predict(module="o_proj", api_name="/live")]
    assert len({maps, *(other[0] for other in others)}) == 3 and "Only R2 turns this input" in others[1][1] and "Only R2" not in others[0][1]
    assert set(LIVE_KNOBS) == set(OPENING)
    with pytest.raises(AppError, match="no block 99|maximum"):
        client.predict(layer=99, api_name="/live")


@pytest.mark.parametrize("changed, sentence", [
    (dict(source="pasted text", pasted=" "), "text box is empty"),
    (dict(source="pasted text", pasted="Too short a text."), r"has \d+ tokens; at least 32"),
    (dict(source="my file"), "no file was uploaded"),
    (dict(model="nobody/no-such-model"), "no internet"),
    (dict(model="what is this?"), "neither a folder"),
    (dict(w_bits=1), "bits is 1|minimum"),
    (dict(a_bits=17), "bits is 17|maximum"),
])
def test_bad_choices_are_sentences(press, changed, sentence):
    with pytest.raises(AppError, match="(?i)" + sentence) as error:
        press("/run", **changed)
    assert "Traceback" not in str(error.value)


def test_a_family_without_these_norms_is_refused(press, home):
    GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=16, n_layer=1, n_head=2)).save_pretrained(home / "gpt2")
    AutoTokenizer.from_pretrained(home / "mine").save_pretrained(home / "gpt2")
    with pytest.raises(AppError, match="supported: Llama"):
        press("/run", model=str(home / "gpt2"))


def test_training_files_are_checked(press, tmp_path):
    with pytest.raises(AppError, match="No training file"):
        press("/train")
    (tmp_path / "bad.jsonl").write_text('{"text": "no question"}')
    with pytest.raises(AppError, match="line 1: fields .*neither an instruction"):
        press("/train", chats=handle_file(tmp_path / "bad.jsonl"))


def test_follow_ups_without_a_run_are_sentences(hub):
    fresh = Client(f"{hub.url}/rolora/", verbose=False)
    for name in ("/files", "/bits"):
        with pytest.raises(AppError, match="press Quantize"):
            fresh.predict(api_name=name)


def test_training_shows_every_loss_and_gives_the_adapter(trained, tmp_path):
    (status, table, *_, loss), shown, (archive, report) = trained
    assert "Loss of held-out answers: released" in status and "tuned and quantized" in status and "W8A4" in table
    told = [state[0] for state in shown]
    assert [f"step {n} of 4" for n in range(1, 5)] == [f"step {n} of 4" for n in range(1, 5) if any(f"step {n} of 4" in text for text in told)]
    assert len(json.loads(loss["plot"])["data"][0]["y"]) == 4
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter", "report.json", "rotation.json", "rotation.safetensors"}
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "base.json", "rotation.json", "rotation.safetensors"}
    assert json.loads((tmp_path / "report.json").read_text())["history"] == json.load(open(report))["history"]


def test_an_adapter_comes_back_and_belongs_to_one_rotation(press, trained):
    archive = trained[2][0]
    with pytest.raises(AppError, match="seed 0.*but R1.R4 .hadamard, seed 3. is asked for"):
        press("/run", adapter=handle_file(archive), seed=3)
    status, table, *_ = press("/run", adapter=handle_file(archive))
    assert "full precision" in status and table.count("<tr>") == 4


def test_run_compares_three_models_and_activations_can_be_asked_again(client, press):
    status, table, *_ = press("/run")
    assert "W8A4 RTN, R1+R4" in status and "128 of" in status and "no logit moved" in status and "outliers" in status
    assert table.count("<tr>") == 4 and "no rotation" in table
    again = client.predict(bits=16, prompt="Hello", api_name="/bits")
    assert "W8A16 RTN, R1+R4" in again and "W8A4" not in again and again.count("<tr>") == 4
    assert "press Quantize" not in client.predict(shown="my last run", layer=1, api_name="/live")[1]
    with pytest.raises(AppError, match="no block 29 in mine"):
        client.predict(shown="my last run", layer=29, api_name="/live")


def test_stop_ends_a_training(client, home):
    job = client.submit(model=str(home / "mine"), **CHOICES, chats=handle_file(home / "chats.jsonl"), steps=200, rank=4, lr=0.001, api_name="/train")
    begun = time.monotonic()
    while not any("step 2 of 200" in str(state[0]) for state in job.outputs()):
        assert time.monotonic() - begun < 120 and not job.done(), job.status()
        time.sleep(0.1)
    assert "stopping" in client.predict(api_name="/stop")
    with pytest.raises(AppError, match=r"stopped after \d+ of 200 steps"):
        job.result(timeout=60)


@pytest.mark.slow
def test_default_run_finishes(hub):
    status, table, *_ = Client(f"{hub.url}/rolora/", verbose=False).predict(api_name="/run")
    assert "W4A4 RTN, R1+R4" in status and table.count("<tr>") == 4


def test_page_opens_on_the_explorer_and_follows_the_slider(hub, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{hub.url}/rolora/")
    picture = page.locator("#finished img")
    picture.wait_for(state="visible", timeout=30_000)
    before = picture.get_attribute("src")
    assert picture.evaluate("image => image.complete && image.naturalWidth > 300")
    assert [box for box in page.locator(".js-plotly-plot, table").all() if box.is_visible()] == []
    slider = page.get_by_label("number input for Block", exact=True)
    slider.fill("28")
    slider.press("Enter")
    page.get_by_text("Block 28, input of q_proj").wait_for(timeout=30_000)
    assert picture.get_attribute("src") != before
    page.close()
