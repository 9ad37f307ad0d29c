"The EoRA app as a program sees it."
import json
import zipfile
from pathlib import Path

import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from peft import PeftModel

from hkust_demos.llm.eora_apply import rebuild_base
from hkust_demos.llm.lowrank import attach_paths, detach_paths
from hkust_demos.llm.adapters import read_paths

CHOICES = dict(model="smollm2-135m", pruning="Wanda", bits="16 (none)", group="64", rounding="GPTQ", source="Python reference", upload=None,
               field="", pasted="", tokens=512, rank=16, budget=0, methods=["SVD"], prompt="The for statement is used to iterate over the")


@pytest.fixture(scope="module")
def client(hub):
    "A client of the running app."
    return Client(f"{hub.url}/eora/", verbose=False)


def press(client, **changed):
    "Press the button with these choices."
    return client.predict(*{**CHOICES, **changed}.values(), api_name="/run")


@pytest.fixture(scope="module")
def finished(client):
    "One finished run, with the intermediate states that were shown."
    job = client.submit(*CHOICES.values(), api_name="/run")
    return job.result(timeout=400), job.outputs()


def plotly(value):
    "The figure inside a gr.Plot value."
    return json.loads(value["plot"])


def test_endpoints_have_names(client):
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/run", "/layer", "/rank", "/prompt", "/adapter"} <= set(named)


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
def test_bad_choices_are_sentences(client, changed, sentence):
    with pytest.raises(AppError, match="(?i)" + sentence) as error:
        press(client, **changed)
    assert "Traceback" not in str(error.value)


def test_binary_upload_is_refused(client, tmp_path):
    (tmp_path / "noise.txt").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(AppError, match="not UTF-8"):
        press(client, source="my file", upload=handle_file(tmp_path / "noise.txt"))
    (tmp_path / "program.exe").write_bytes(b"MZ")
    with pytest.raises(Exception, match="(?i)file"):
        press(client, source="my file", upload=handle_file(tmp_path / "program.exe"))


def test_encoder_only_folder_is_refused(client, tmp_path):
    from transformers import BertConfig, BertForMaskedLM
    BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path)
    with pytest.raises(AppError, match="a causal language model"):
        press(client, model=str(tmp_path))


def test_rank_above_the_narrowest_layer_is_refused(client):
    with pytest.raises(AppError, match="192|128"):
        press(client, rank=200)


def test_follow_ups_without_a_run_are_sentences(hub):
    fresh = Client(f"{hub.url}/eora/", verbose=False)
    for call in (dict(api_name="/adapter"), dict(prompt="Hello", api_name="/prompt")):
        with pytest.raises(AppError, match="press Compress"):
            fresh.predict(**call)


def test_run_returns_all_pictures(finished):
    (status, spectrum, curves, heat, sizes, words, text, layer), shown = finished
    assert "Wanda 2:4" in status and "EoRA" in status
    assert "directions" in plotly(spectrum)["layout"]["title"]["text"]
    assert {trace["name"] for trace in plotly(curves)["data"]} == {"EoRA", "SVD"}
    assert len(plotly(heat)["data"][0]["y"]) == 30
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
