"Models, texts and evaluation: what is refused, and with which sentence."
import json

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from hkust_demos.data.text import python_reference, read_documents
from hkust_demos.llm import evaluate
from hkust_demos.llm.evaluate import run_lm_eval
from hkust_demos.llm.models import load_llm


def tiny_llama(**more):
    "A random Llama of a few thousand weights."
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **more))


def test_encoder_only_folder_is_refused(tmp_path):
    BertForMaskedLM(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BertForMaskedLM; a causal language model"):
        load_llm(tmp_path)


def test_quantized_checkpoint_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ValueError, match="already quantized"):
        load_llm(tmp_path)


def test_pickled_weights_are_never_read(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot open"):
        load_llm(tmp_path)


def test_empty_folder_and_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="cannot open"):
        load_llm(tmp_path)
    with pytest.raises(ValueError, match="no internet"):
        load_llm("nobody/no-such-model")
    for name in ("../up", "a/b/c", "; rm -rf", ""):
        with pytest.raises(ValueError):
            load_llm(name)


def test_gguf_that_is_none_or_unknown(tmp_path):
    (tmp_path / "picture.gguf").write_bytes(b"\x89PNG" + bytes(100))
    with pytest.raises(ValueError, match="not a GGUF file"):
        load_llm(tmp_path / "picture.gguf")
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "strange.gguf", "strange-architecture")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="strange.gguf: this GGUF cannot be read"):
        load_llm(tmp_path / "strange.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "strange.gguf").read_bytes()[:30])
    with pytest.raises(ValueError, match="cut.gguf"):
        load_llm(tmp_path / "cut.gguf")


@pytest.mark.parametrize("name, content, sentence", [
    ("a.txt", b"\xff\xfe\x00\x01", "not UTF-8"),
    ("a.txt", b"abc\x00def", "binary"),
    ("a.txt", b"   \n", "empty"),
    ("a.pdf", b"%PDF", "not a text file"),
    ("a.txt", b"word " * 1_100_000, "at most"),
    ("a.jsonl", b'{"a": 1}\n', "no text field"),
    ("a.jsonl", b"[1, 2]\n", "not a JSON object"),
    ("a.jsonl", b"{broken\n", "line 1"),
])
def test_uploads_are_refused_with_a_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_documents(tmp_path / name)


def test_uploads_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOne.\n\nStill one.\n\n\nTwo.", encoding="utf-8")
    assert read_documents(tmp_path / "a.txt").documents == ("One.\n\nStill one.", "Two.")
    (tmp_path / "a.jsonl").write_text('{"id": "x", "body": "Long text."}\n')
    assert read_documents(tmp_path / "a.jsonl", field="body").documents == ("Long text.",)


def test_python_halves_share_no_paragraph():
    halves = [{p for d in python_reference(part).documents for p in d.split("\n\n")} for part in ("calibration", "evaluation")]
    assert not halves[0] & halves[1] and min(map(len, halves)) > 100


def test_lm_eval_runs_a_task_from_a_local_file(tmp_path):
    pytest.importorskip("lm_eval")
    from hkust_demos.llm.models import load_demo_lm

    rows = [{"question": "The capital city of France is", "choices": ["Paris", "zebra"], "answer": 0},
            {"question": "One, two, three,", "choices": ["purple", "four"], "answer": 1}]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {"task": "two_questions", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}
    model, tokenizer = load_demo_lm()
    assert run_lm_eval(model, tokenizer, [task], batch_size=2)["two_questions"]["acc"] == 1.0


def test_missing_lm_eval_is_a_sentence(monkeypatch):
    import builtins
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RuntimeError, match=r"hkust-demos\[eval\]"):
        evaluate.run_lm_eval(None, None, ["x"])
