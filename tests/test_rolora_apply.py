"RoLoRA's command: what it writes comes back the same in a fresh process, and a wrong record never passes."
import json
import shutil
import subprocess
import sys
import threading
import zipfile
from argparse import ArgumentParser

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hkust_demos.files import write_zip
from hkust_demos.llm import rolora_apply
from hkust_demos.llm.chats import answer_loss, chat_rows, encode_chat, read_chats
from hkust_demos.llm.models import load_llm, prepare
from hkust_demos.llm.quantize import QuantConfig, QuantizedLinear
from hkust_demos.llm.rolora import LoraSettings
from hkust_demos.llm.rolora_apply import FULL, OURS, PLAIN, Recipe, run_recipe, unzip_adapter
from hkust_demos.llm.rolora_example import ask
from hkust_demos.llm.rolora_files import load_quantized
from hkust_demos.llm.rotation import RotationSpec

IDS = torch.arange(200, 230)[None]
CHATS = [{"instruction": "Which letter follows A?", "output": "B, of course."}, {"messages": [
    {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "C."}, {"role": "user", "content": "Last?"}, {"role": "assistant", "content": "Z."}]}]
FAST = ["--clip-shares", "1", "--tokens", "128", "--no-compare"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A tiny random model as a folder of a user's own, and a training file."
    home = tmp_path_factory.mktemp("rolora")
    tokenizer = AutoTokenizer.from_pretrained(prepare())
    for name, seed in (("model", 0), ("other", 1)):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             tie_word_embeddings=True, initializer_range=0.1)
        LlamaForCausalLM(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    (home / "chats.jsonl").write_text("\n".join(json.dumps(chat) for chat in CHATS * 5))
    return home


def command(*words):
    "The method's command on these words."
    parser = ArgumentParser()
    rolora_apply.add_arguments(parser)
    return rolora_apply.run_command(parser.parse_args([*map(str, words)]))


def finish(recipe, **options):
    "The result of a run."
    for step in run_recipe(recipe, **options):
        continue
    return step.result


@pytest.fixture(scope="module")
def tuned(home):
    "Folder that the command wrote after a training."
    command(home / "model", "--bits", "w4a8kv8", "--rotate", "r1,r2,r3,r4", "--train", home / "chats.jsonl", "--steps", 15, "--lr", "3e-2", *FAST, "--out", home / "tuned")
    return home / "tuned"


def loss_of(model, home):
    "Loss of the training file's answers."
    return answer_loss(model, *chat_rows(read_chats(home / "chats.jsonl")[:2], load_llm(str(home / "model"))[1]))


def test_the_folder_holds_what_it_says(tuned):
    report = json.loads((tuned / "report.json").read_text())
    assert {p.name for p in tuned.iterdir()} >= {"README.md", "adapter", "model", "report.json", "rotation.json", "rotation.safetensors"}
    assert (report["rotation"], report["quantization"]) == ("R1+R2+R3+R4", "W4A8KV8 RTN") and report["max_abs_logit_change"] < 1e-3
    assert report["answer_loss"]["tuned"] < 0.8 * report["answer_loss"]["released"] and len(report["history"]) == 15
    assert (report["trained_on"], report["held_out"]) == (8, 2) and set(report["perplexity"]) == {FULL, OURS}
    assert "load_quantized" in (tuned / "README.md").read_text() and "rotated_base" in (tuned / "README.md").read_text()


def test_a_fresh_process_gives_the_same_logits(tuned, home):
    program = ("import sys, torch; from peft import PeftModel; from hkust_demos.llm.rolora_apply import rotated_base; from hkust_demos.llm.rolora_files import load_quantized\n"
               "ids = torch.arange(200, 230)[None]; home = sys.argv[1]\n"
               "adapted = PeftModel.from_pretrained(rotated_base(home + '/adapter'), home + '/adapter')\n"
               "torch.save([load_quantized(home + '/model')[0](ids).logits, adapted(ids).logits], sys.argv[2])")
    subprocess.run([sys.executable, "-c", program, str(tuned), str(home / "logits.pt")], check=True)
    quantized, adapted = torch.load(home / "logits.pt", weights_only=True)
    model = load_quantized(tuned / "model")[0]
    assert torch.allclose(model(IDS).logits, quantized, atol=1e-4)
    here = PeftModel.from_pretrained(rolora_apply.rotated_base(tuned / "adapter", load_llm(str(home / "model"))[0]), tuned / "adapter")
    assert torch.allclose(here(IDS).logits, adapted, atol=1e-4)
    assert {m.a_bits for m in model.modules() if isinstance(m, QuantizedLinear)} == {8} and model.config.kv_bits == 8


def test_a_stock_loader_refuses_the_quantized_model(tuned):
    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(tuned / "model")


def test_the_adapter_brings_its_rotation_to_other_bits(tuned, home):
    command(home / "model", "--bits", "w16a16", "--adapter", tuned / "adapter", *FAST, "--out", home / "again")
    report = json.loads((home / "again" / "report.json").read_text())
    assert report["rotation"] == "R1+R2+R3+R4" and report["quantization"] == "W16A16"
    here = PeftModel.from_pretrained(rolora_apply.rotated_base(tuned / "adapter", load_llm(str(home / "model"))[0]), tuned / "adapter")
    assert abs(loss_of(load_quantized(home / "again" / "model")[0], home) - loss_of(here, home)) < 0.02


@pytest.mark.parametrize("changed", ["seed", "part"])
def test_a_wrong_record_is_refused(tuned, home, tmp_path, changed):
    shutil.copytree(tuned / "adapter", tmp_path / "adapter")
    page = json.loads((tmp_path / "adapter" / "rotation.json").read_text())
    page["spec"].update({"seed": 5} if changed == "seed" else {"r2": False})
    (tmp_path / "adapter" / "rotation.json").write_text(json.dumps(page))
    with pytest.raises(ValueError, match="another model or another rotation"):
        command(home / "model", "--adapter", tmp_path / "adapter", *FAST, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_rotation_or_another_model_is_refused(tuned, home, tmp_path):
    with pytest.raises(ValueError, match=r"trained after R1\+R2\+R3\+R4 \(hadamard, seed 0\), but R1\+R4 \(hadamard, seed 3\)"):
        command(home / "model", "--adapter", tuned / "adapter", "--rotate", "r1,r4", "--seed", 3, *FAST, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="another model or another rotation"):
        command(home / "other", "--adapter", tuned / "adapter", *FAST, "--out", tmp_path / "out")


def test_an_adapter_of_the_released_model_is_merged_before_the_rotation(home, tmp_path):
    common = dict(model=str(home / "model"), quantization=QuantConfig(16, 16), tokens=128)
    plain = finish(Recipe(**common, rotation=RotationSpec(r1=False, r4=False), train=str(home / "chats.jsonl"), lora=LoraSettings(steps=8, lr=3e-2, batch_size=2)),
                   compare=False, keep=True)
    shutil.copytree(plain.adapter, tmp_path / "adapter")
    assert plain.explorer is None and not (tmp_path / "adapter" / "rotation.json").exists()
    assert loss_of(plain.models[FULL], home) > loss_of(plain.models[OURS], home) + 0.5  # the released model is untouched
    rotated = finish(Recipe(**common, rotation=RotationSpec(r2=True), adapter=str(tmp_path / "adapter")), compare=False)
    assert rotated.record.spec.r2 and abs(loss_of(rotated.models[OURS], home) - loss_of(plain.models[OURS], home)) < 0.02


def test_gptq_calibrates_on_another_part_of_the_text(home):
    recipe = Recipe(str(home / "model"), QuantConfig(3, 16, w_method="gptq", n_shares=1), tokens=128, calibration_tokens=128)
    report = finish(recipe).report
    assert set(report["perplexity"]) == {FULL, PLAIN, OURS} and report["quantization"] == "W3A16 GPTQ"


@pytest.mark.parametrize("words, sentence", [
    (["--bits", "w1a4"], "bits is 1"), (["--bits", "w4a17"], "bits is 17"), (["--bits", "four"], "such as w4a4"), (["--rotate", "r9"], "rotate is 'r9'"),
    (["--tokens", "5"], "tokens is 5"), (["--steps", "0"], "at least 1"), (["--train", "missing.jsonl"], "no such file"), (["--adapter", "missing"], "lacks adapter_config"),
    (["--text", "missing.txt"], "no such file"),
])
def test_bad_choices_are_refused_before_a_model_is_read(tmp_path, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rolora_apply, "load_llm", lambda name: pytest.fail("a model was read"))
    with pytest.raises(ValueError, match=sentence):
        command("smollm2-135m", *words, "--out", "out")
    assert not list(tmp_path.iterdir())


def test_short_texts_and_other_families_are_sentences(home, tmp_path):
    (tmp_path / "short.txt").write_text("Too short a text for this.")
    with pytest.raises(ValueError, match=r"short.txt has \d+ tokens; at least 32"):
        finish(Recipe(str(home / "model"), text=str(tmp_path / "short.txt")))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(NotImplementedError, match="supported: Llama"):
        finish(Recipe(), loaded=(gpt2, AutoTokenizer.from_pretrained(home / "model")))


def test_whoever_leaves_a_training_ends_it(home):
    before = threading.active_count()
    steps = run_recipe(Recipe(str(home / "model"), tokens=128, train=str(home / "chats.jsonl"), lora=LoraSettings(steps=500, batch_size=1)), compare=False)
    while "step 2 of 500" not in next(steps).message:
        continue
    steps.close()
    assert threading.active_count() == before


def test_chats_learn_every_answer_and_nothing_else(home):
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    ids, labels = encode_chat(CHATS[1]["messages"], tokenizer)
    learned = tokenizer.decode([label for label in labels if label != -100])
    assert "C." in learned and "Z." in learned and "then" not in learned and tokenizer.decode(ids).count("And then?") == 1

    class Forgetful:
        "A template that keeps the last turn only."
        chat_template, eos_token = "x", ""
        apply_chat_template = staticmethod(lambda chat, tokenize, add_generation_prompt: chat[-1]["content"] + ("|" if add_generation_prompt else ""))
        __call__ = staticmethod(lambda text, add_special_tokens: tokenizer(text, add_special_tokens=False))
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_chat(CHATS[1]["messages"], Forgetful())


def test_a_zip_writes_no_file_but_an_adapters(tuned, tmp_path):
    write_zip(tuned, tmp_path / "all.zip")
    with zipfile.ZipFile(tmp_path / "all.zip", "a") as archive:
        archive.writestr("../../evil.txt", "out of the folder")
        archive.writestr("adapter/run.py", "print()")
    (tmp_path / "in").mkdir()
    unzip_adapter(tmp_path / "all.zip", tmp_path / "in")
    assert {p.name for p in (tmp_path / "in").iterdir()} == {*rolora_apply.ADAPTER_FILES} and {p.name for p in tmp_path.iterdir()} == {"all.zip", "in"}
    assert (tmp_path / "in" / "adapter_model.safetensors").read_bytes() == (tuned / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("content, sentence", [(b"not a zip", "no zip that can be read"), (None, "lacks adapter_config.json")])
def test_a_bad_zip_is_a_sentence(tmp_path, content, sentence):
    if content is None:
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr("readme.txt", "nothing")
    else:
        (tmp_path / "bad.zip").write_bytes(content)
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=sentence):
        unzip_adapter(tmp_path / "bad.zip", tmp_path / "in")


def test_an_oversized_member_is_refused(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(rolora_apply, "MAX_FILE_MB", 0.001)
    write_zip(tuned / "adapter", tmp_path / "adapter.zip")
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="would unpack to more than"):
        unzip_adapter(tmp_path / "adapter.zip", tmp_path / "in")
    assert not list((tmp_path / "in").iterdir())


def test_rotation_saves_the_embedded_model_from_four_bit_activations():
    "The promise of the method on real weights: useless without, usable with R1 and R4."
    result = finish(Recipe(quantization=QuantConfig(16, 4), tokens=128))
    scores = result.report["perplexity"]
    assert scores[PLAIN] > 50 * scores[FULL] and scores[OURS] < 3 * scores[FULL]
    assert result.report["max_abs_logit_change"] < 1e-3 and "of 120 inputs have outliers" in result.report["verdict"]
    middle = ask(result.explorer, 15, "q_proj")
    assert middle.before["kurtosis"] > 50 and middle.after["kurtosis"] < 4 and middle.after["lost"] < 0.3 < 0.8 < middle.before["lost"]
