"Models, texts and evaluation: what is refused, and with which sentence."
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM,
                          MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM)

from hkust_demos.data.text import Corpus, python_reference, read_documents, split_corpus
from hkust_demos.llm import evaluate
from hkust_demos.llm.compress import _inverse_factor, plain_sweep, prune_sparsegpt, quantize_gptq
from hkust_demos.llm.adapters import check_adaptable, export_peft, load_peft
from hkust_demos.llm.calibration import collect_input_statistics, compressed_share, linear_layers
from hkust_demos.llm.evaluate import continue_text, next_token_probabilities, perplexity, run_lm_eval
from hkust_demos.llm.lowrank import LowRankPath
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


# the model that runs is the model that was given

def words(folder, n=300):
    "A tokenizer of n words in a folder."
    from tokenizers import Tokenizer, models, pre_tokenizers
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")
    found.save_pretrained(folder)
    return found


@pytest.fixture
def given(tmp_path):
    "The folder of a whole model."
    tiny_llama().save_pretrained(tmp_path / "given")
    words(tmp_path / "given")
    return tmp_path / "given"


def rewrite(folder, change):
    "Change the tensors of a folder."
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **settings):
    "Change the configuration of a folder."
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


def test_a_whole_folder_gives_its_own_weights(given):
    model, _ = load_llm(given)
    stored = load_file(given / "model.safetensors")
    assert {*model.state_dict()} == {*stored} and all(torch.equal(model.state_dict()[key], value) for key, value in stored.items())


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("change, sentence", [
    (lambda t: t.pop(UP), f"1 of 12 tensors are missing, such as {UP}"),
    (lambda t: t.pop("lm_head.weight"), "1 of 12 tensors are missing, such as lm_head.weight"),
    (lambda t: t.update({"model.layers.5.mlp.up_proj.weight": torch.zeros(2, 2)}), "holds 1 tensors that LlamaForCausalLM has no place for, such as model.layers.5"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}), "no place for, such as model.layers.0.self_attn.q_proj.bias"),
    (lambda t: t.update({"model.norm.weight": torch.zeros(7)}), r"model.norm.weight has shape \(7,\), but config.json asks for \(16,\)"),
    (lambda t: t.update({"model.norm.weight": torch.full((16,), float("nan"))}), "model.norm.weight holds NaN"),
    (lambda t: t.update({UP: (100 * t[UP]).to(torch.int8)}), "holds I8 numbers, so it is quantized"),
    (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), "holds F8_E4M3 numbers, so it is quantized")])
def test_weights_that_are_not_all_there(given, change, sentence):
    rewrite(given, change)
    with pytest.raises(ValueError, match=sentence):
        load_llm(given)


@pytest.mark.parametrize("settings, sentence", [({"num_hidden_layers": 2}, "9 of 21 tensors are missing"),
                                                ({"attention_bias": True}, "4 of 16 tensors are missing"),
                                                ({"intermediate_size": 32}, "has shape .* but config.json asks for")])
def test_a_configuration_of_another_model(given, settings, sentence):
    configure(given, **settings)
    with pytest.raises(ValueError, match=sentence):
        load_llm(given)


def test_harmless_leftovers_of_older_files_are_read(given):
    rewrite(given, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert torch.isfinite(load_llm(given)[0](torch.tensor([[1, 2]])).logits).all()


def test_a_missing_shard_and_two_models_in_one_folder(given):
    sharded = given.parent / "sharded"
    load_llm(given)[0].save_pretrained(sharded, max_shard_size="10KB")
    words(sharded)
    names = sorted(path.name for path in sharded.glob("model-*"))
    assert len(names) > 2 and load_llm(sharded)[0].num_parameters() == load_llm(given)[0].num_parameters()
    shutil.copy(given / "model.safetensors", sharded)
    with pytest.raises(ValueError, match="holds model.safetensors and an index of other files"):
        load_llm(sharded)
    (sharded / "model.safetensors").unlink()
    (sharded / names[1]).unlink()
    with pytest.raises(ValueError, match=f"1 of {len(names)} weight files are missing, such as {names[1]}"):
        load_llm(sharded)


def test_pointers_cut_files_and_adapters(given):
    weights = given / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short"):
        load_llm(given)
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_llm(given)
    (given / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, not a model"):
        load_llm(given)


def tiny_gguf(path, drop=(), n_parts=1):
    "A Llama of one block as a GGUF file, some tensors left out."
    gguf, generator = pytest.importorskip("gguf"), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 16), ("feed_forward_length", 24), ("head_count", 2),
                        ("head_count_kv", 2), ("layer_norm_rms_eps", 1e-5), ("vocab_size", 300), ("rope_dimension_count", 8),
                        ("tokenizer_model", "gpt2"), ("token_list", ["a", "b", "ab", *(f"t{i}" for i in range(297))]), ("token_merges", ["a b"]),
                        ("token_types", [1] * 300), ("bos_token_id", 0), ("eos_token_id", 1)):
        getattr(writer, f"add_{name}")(value)
    if n_parts > 1:
        writer.add_uint16("split.count", n_parts)
    shapes = {"token_embd": (300, 16), "output_norm": (16,), "output": (300, 16), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,),
              **{f"blk.0.attn_{part}": (16, 16) for part in ("q", "k", "v", "output")}, "blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16),
              "blk.0.ffn_down": (16, 24)}
    for name, shape in shapes.items():
        if name not in drop:
            writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return path


def test_gguf_files_that_are_whole_and_that_are_not(tmp_path):
    model, _ = load_llm(tiny_gguf(tmp_path / "whole.gguf"))
    assert model.num_parameters() == 11824
    with pytest.raises(ValueError, match="drop.gguf: 1 of 12 tensors are missing, such as model.layers.0.mlp.up_proj.weight"):
        load_llm(tiny_gguf(tmp_path / "drop.gguf", drop=("blk.0.ffn_up",)))
    with pytest.raises(ValueError, match="one of 2 parts of a model; join them"):
        load_llm(tiny_gguf(tmp_path / "tiny-00001-of-00002.gguf", n_parts=2))


def test_an_expert_that_lacks_a_matrix(given):
    sizes = dict(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    shutil.rmtree(given)
    MixtralForCausalLM(MixtralConfig(num_local_experts=4, **sizes)).save_pretrained(given)
    words(given)
    assert len(linear_layers(load_llm(given)[0])) == 4
    rewrite(given, lambda t: t.pop("model.layers.0.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(ValueError, match=r"1 tensors of the experts are missing, such as model.layers.0.block_sparse_moe.experts.2.w1.weight"):
        load_llm(given)


@pytest.mark.parametrize("maker", [lambda **s: MixtralForCausalLM(MixtralConfig(num_local_experts=8, intermediate_size=24, **s)),
                                   lambda **s: Qwen3MoeForCausalLM(Qwen3MoeConfig(num_experts=8, moe_intermediate_size=24, head_dim=8, **s))])
def test_experts_are_named_as_not_compressed(maker):
    model = maker(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    found = compressed_share(model)
    by_hand = sum(layer.weight.numel() for layer in linear_layers(model).values())
    assert found.n_compressed == by_hand and found.n_compressed + sum(found.left_out.values()) == model.num_parameters() == found.n_parameters
    assert found.share < 0.15 and list(found.left_out)[0] == "model.layers.*.mlp.experts.gate_up_proj"
    assert found.sentence.startswith("Most of this model is not compressed") and "experts" in found.sentence


def test_a_dense_model_and_a_tied_head_count_once():
    model = tiny_llama(tie_word_embeddings=True)
    found = compressed_share(model)
    assert found.n_parameters == model.num_parameters() and found.left_out == {"model.embed_tokens": 4800, "norms and biases": 48}


def test_rows_that_a_model_cannot_hold(tmp_path):
    tokenizer = words(tmp_path, 400)
    short = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)).eval()
    for model in (short, tiny_llama(max_position_embeddings=32)):
        rows = torch.arange(40)[None]
        for call in (lambda: perplexity(model, rows), lambda: continue_text(model, tokenizer, "w1 w2", 31),
                     lambda: next_token_probabilities(model, tokenizer, "w1 " * 33)):
            with pytest.raises(ValueError, match="reads at most 32"):
                call()
        with pytest.raises(ValueError, match="token number 399, but this model knows 300 tokens"):
            next_token_probabilities(model, tokenizer, "w399")
    with pytest.raises(ValueError, match="reads at most 32"):
        collect_input_statistics(tiny_llama(max_position_embeddings=32), torch.arange(40)[None])


def test_layers_that_peft_refuses_are_refused_before_the_work():
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="peft cannot put an adapter on this MambaForCausalLM"):
        check_adaptable(model, linear_layers(model))
    check_adaptable(tiny_llama(), linear_layers(tiny_llama()))


def test_an_adapter_is_not_put_on_the_released_model_unseen(given):
    from peft import AutoPeftModelForCausalLM
    released = load_llm(given)[0]
    compressed = tiny_llama()
    compressed.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
    path = LowRankPath(torch.ones(24, 1), torch.ones(1, 16), torch.ones(16))
    from hkust_demos.llm.adapters import base_hash
    folder = export_peft({"model.layers.0.mlp.up_proj": path}, given.parent / "adapter", str(given), base_sha256=base_hash(compressed))
    with pytest.raises(OSError, match="a compressed copy of"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="made for another compressed base"):
        load_peft(folder, released)
    assert base_hash(compressed) in (folder / "README.md").read_text()
    rows = torch.arange(8)[None]
    before = compressed(rows).logits
    assert not torch.equal(load_peft(folder, compressed)(rows).logits, before)


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


@pytest.mark.parametrize("text", ["从前有一座山山上有一座庙" * 300, "むかしむかしあるところにおじいさんとおばあさんがいました。" * 100, "กาลครั้งหนึ่งนานมาแล้ว" * 200,
                                  "A title in English with some words\n\n\n" + "从前有一座山，山上有一座庙。" * 200, "word " * 900, "एक समय की बात है।" * 200])
def test_a_text_of_any_script_is_cut_by_its_length(text):
    parts = split_corpus(Corpus("mine", (text,), "your file", "yours"))
    assert [part.part for part in parts] == ["calibration", "evaluation"]
    assert 0.7 < parts[0].n_characters / len(text) < 0.83 and parts[0].n_characters + parts[1].n_characters > 0.99 * len(text)
    assert parts[0].documents[0] in text and parts[1].documents[0] in text


def test_line_separators_inside_of_json_strings(tmp_path):
    lines = [json.dumps({"text": f"One{sign}two."}, ensure_ascii=False) for sign in "\u2028\u2029\x85"]
    (tmp_path / "a.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    assert read_documents(tmp_path / "a.jsonl").documents == ("One\u2028two.", "One\u2029two.", "One\x85two.")


STORY = "Once upon a time there was a story that went on for a while. "


@pytest.mark.parametrize("record, field", [
    ({"source": "crawl", "id": "a9f3", "story": STORY * 3}, "story"), ({"meta": "from the web", "text": STORY}, "text"),
    ({"url": "https://example.org/" + "a" * 500, "body": STORY}, "body"), ({"image": "iVBORw0KGgo" * 200, "caption": STORY}, "caption"),
    ({"text": "see body", "body": STORY * 5}, "body"), ({"title": "一个故事", "内容": "从前有一座山。" * 30}, "内容"), ({"a": "Paris"}, "a"),
    ({"messages": [{"role": "user", "content": STORY}, {"role": "assistant", "content": STORY}], "model": "x"}, "messages"),
    ({"conversations": [{"from": "human", "value": STORY}]}, "conversations")])
def test_the_field_that_is_the_text(tmp_path, record, field):
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(record)] * 3))
    found = read_documents(tmp_path / "a.jsonl")
    assert found.source == f"your file a.jsonl, field {field!r}" and len(found.documents) == 3
    assert found.documents[0].startswith((record[field][0].get("content") or record[field][0]["value"]).strip() if isinstance(record[field], list) else record[field].strip())


def test_two_fields_that_could_both_be_the_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"english": STORY, "german": STORY}))
    with pytest.raises(ValueError, match="'english' and 'german' could both be the text; say which one is meant"):
        read_documents(tmp_path / "a.jsonl")
    assert len(read_documents(tmp_path / "a.jsonl", field="german").documents) == 1


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


@pytest.mark.slow
def test_lm_eval_refuses_a_name_that_it_does_not_know():
    pytest.importorskip("lm_eval")
    with pytest.raises((KeyError, ValueError)):
        run_lm_eval(tiny_llama(), load_llm("smollm2-135m")[1], ["no_such_task"])


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


@pytest.mark.parametrize("options", [dict(bits=3), dict(bits=3, group_size=64), dict(n=2), dict(bits=4, n=2), dict(bits=4, n=2, group_size=64)])
def test_blocked_walk_is_the_plain_walk(options):
    "320 columns, so that errors cross from block to block, with and without groups."
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(800, 320, generator=generator) @ (torch.eye(320) + torch.randn(320, 320, generator=generator) / 20)
    weight, hessian = torch.randn(16, 320, generator=generator), inputs.T @ inputs / 800
    plain = plain_sweep(weight, _inverse_factor(hessian, 0.01), **options)
    n, rest = options.get("n"), {k: v for k, v in options.items() if k != "n"}
    blocked = prune_sparsegpt(weight, hessian, n, **rest) if n else quantize_gptq(weight, hessian, **rest)
    assert (plain - blocked).norm() < 1e-4 * plain.norm() and (plain - weight).norm() > 0.05 * weight.norm()


def test_a_run_says_what_it_read_and_what_it_compressed(given, capsys):
    from hkust_demos.cli import main
    sizes = dict(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
    MixtralForCausalLM(MixtralConfig(num_local_experts=8, **sizes)).save_pretrained(given)
    text, out = given.parent / "text.jsonl", given.parent / "out"
    text.write_text("\n".join([json.dumps({"id": "x", "story": " ".join(f"w{i % 290}" for i in range(400))})] * 4))
    command = ["eora", str(given), "--rank", "4", "--calibration", str(text), "--tokens", "256", "--evaluation-tokens", "0", "--out", str(out)]
    assert main(command) == 0
    printed, report = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    assert "field 'story'; Most of this model is not compressed: 5% of 20,016 parameters" in printed and report["compressed_share"] == 1024 / 20016
    assert next(iter(report["not_compressed"])) == "model.layers.*.mlp.experts.gate_up_proj" and "experts" in (out / "README.md").read_text()
    assert report["warning"] == "" and report["recipe"]["calibration"] == str(text) and "calibrated on 256 tokens of your file text.jsonl" in printed
