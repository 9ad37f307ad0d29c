"""Adapters find their basis again, move between bases, and train through quantizers; every public name of the method is there."""
import copy
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hkust_demos.llm import rolora
from hkust_demos.llm.quantize import QuantConfig, QuantizedLinear, quantize_model
from hkust_demos.llm.rolora import (LoraSettings, RotationRecord, RotationSpec, convert_adapter, fine_tune, merge_adapter, quantizers_in_loop,
                                    rotate_model, save_adapter, train_lora)

EVERYWHERE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(1))
MAKE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
def fresh():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         initializer_range=0.15, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "norm" in name:
            value.copy_(0.5 + torch.rand(value.shape))
    return model
"""
exec(MAKE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "An adapter on a rotated model, saved with its record; folder, logits of the model that was trained."
    folder = tmp_path_factory.mktemp("rolora") / "adapter"
    base = rotate_model(fresh(), RotationSpec(r2=True, seed=4))
    record = base.rotation
    run = train_lora(base, IDS, LoraSettings(r=4, alpha=4, targets=EVERYWHERE, lr=2e-2, steps=30))
    assert run.history[-1] < 0.8 * run.history[0]
    save_adapter(run, folder, "tiny", record)
    return folder, run.model(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("name", "hadamard_matrix hadamard_transform random_hadamard random_orthogonal RotationSpec untie_embeddings fuse_norms rotate_model "
                         "invariance_error fake_quant_activation quantize_weight_rtn gptq_quantize QuantConfig quantize_model set_activation_bits train_lora "
                         "LoraSettings convert_adapter merge_adapter activation_stats channel_absmax perplexity choice_accuracy memory_report".split())
def test_the_promised_names_are_there(name):
    assert callable(getattr(rolora, name))


def test_a_fresh_process_gives_the_same_logits(trained, tmp_path):
    folder, logits = trained
    script = MAKE + f"""
from hkust_demos.llm.rolora import RotationRecord, merge_adapter, rotate_model
model = merge_adapter(rotate_model(fresh(), RotationRecord.load({str(folder)!r}).spec), {str(folder)!r})
torch.save(model(torch.load({str(tmp_path / 'ids.pt')!r})).logits.detach(), {str(tmp_path / 'logits.pt')!r})
"""
    torch.save(IDS, tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    assert (torch.load(tmp_path / "logits.pt") - logits).abs().max() < 1e-4


@pytest.mark.parametrize("spec", [RotationSpec(r2=True, seed=5), RotationSpec(r2=False, seed=4), RotationSpec(r2=True, seed=4, mode="random"), None])
def test_another_rotation_is_refused_and_would_say_something_else(trained, spec):
    folder, logits = trained
    model = fresh() if spec is None else rotate_model(fresh(), spec)
    with pytest.raises(ValueError, match="another model or another rotation"):
        merge_adapter(model, folder)
    assert (merge_adapter(model, folder, check=False)(IDS).logits - logits).abs().max() > 0.1


def test_there_and_back_is_the_same_adapter(trained, tmp_path):
    folder, logits = trained
    record = RotationRecord.load(folder)
    home = convert_adapter(folder, record, tmp_path / "home", "to_original", head_dim=8)
    again = convert_adapter(home, record, tmp_path / "again", head_dim=8)
    assert (merge_adapter(fresh(), home)(IDS).logits - logits).abs().max() < 1e-3
    assert (merge_adapter(rotate_model(fresh(), record.spec), again)(IDS).logits - logits).abs().max() < 1e-3


def test_embeddings_keep_their_mean():
    "The released code subtracts it, a step for LayerNorm models."
    model = fresh()
    before = model.get_input_embeddings().weight.clone()
    assert torch.equal(rolora.fuse_norms(model).get_input_embeddings().weight, before)


def test_stock_peft_loads_the_adapter(trained):
    from peft import PeftModel
    folder, logits = trained
    loaded = PeftModel.from_pretrained(rotate_model(fresh(), RotationRecord.load(folder).spec), folder)
    assert (loaded(input_ids=IDS).logits - logits).abs().max() < 1e-4


def test_the_loop_leaves_weights_and_forwards_alone():
    base = fresh()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    run = train_lora(base, IDS, LoraSettings(steps=2), quant_aware=QuantConfig(4, 4))
    after = {name.replace("base_model.model.", "").replace(".base_layer", ""): value for name, value in run.model.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any("forward" in vars(module) for module in run.model.modules())


def test_the_loop_ends_when_training_breaks():
    run = train_lora(fresh(), IDS, LoraSettings(steps=1))
    with pytest.raises(KeyError), quantizers_in_loop(run.model, QuantConfig(4, 4)):
        raise KeyError
    assert not any("forward" in vars(module) for module in run.model.modules())


def test_training_in_the_loop_pays_on_its_own_grid():
    settings, four = LoraSettings(r=4, alpha=4, targets=EVERYWHERE, lr=2e-2, steps=60), QuantConfig(4, 4)
    losses = {}
    for name, quant_aware in (("plain", None), ("loop", four)):
        merged = train_lora(fresh(), IDS, settings, quant_aware=quant_aware).model.merge_and_unload()
        losses[name] = rolora.perplexity(quantize_model(merged, four, grids_of=fresh()), IDS).value
    assert losses["loop"] < losses["plain"]


def test_labels_are_all_that_is_learned():
    "Columns without a label change nothing, and the head is asked for none of them."
    labels = torch.full_like(IDS, -100)
    labels[:, 9] = IDS[:, 9]
    other = IDS.clone()
    other[:, 10:] = 0
    first, second = (train_lora(fresh(), ids, LoraSettings(steps=3, lr=1e-2), labels=labels).history for ids in (IDS, other))
    assert first == second


def test_orders_of_the_whole_method():
    settings, logits = LoraSettings(r=4, targets=EVERYWHERE, lr=1e-2, steps=10), {}
    for order in ("lora", "lbr", "lar"):
        model = fine_tune(fresh(), IDS, order, settings=settings)
        logits[order] = model(IDS).logits
        assert hasattr(model, "rotation") == (order != "lora")
        assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert (logits["lora"] - logits["lbr"]).abs().max() < 1e-3 < (logits["lora"] - logits["lar"]).abs().max()


def test_a_tuned_model_quantizes_like_any_other():
    model = fine_tune(fresh(), IDS, settings=LoraSettings(steps=2))
    kept = copy.deepcopy(model)
    assert torch.isfinite(quantize_model(model, QuantConfig(4, 4, w_method="gptq"), IDS)(IDS).logits).all()
    assert torch.equal(kept(IDS).logits, model(IDS).logits)
