"The command line: light, safe, and without tracebacks."
import json
import re
import signal
import subprocess
import sys

import pytest

from hkust_demos import cli
from hkust_demos.catalog import METHODS, ready_methods
from hkust_demos.files import MARKER
from hkust_demos.study import Study


def run(*arguments):
    "The command in a fresh interpreter."
    return subprocess.run([sys.executable, "-c", "import sys; from hkust_demos.cli import main; sys.exit(main())", *arguments],
                          capture_output=True, text=True, timeout=300)


def test_list_loads_nothing_heavy():
    program = "import sys; from hkust_demos.cli import main; main(['list']); print([m for m in ('torch', 'pandas', 'matplotlib', 'gradio') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == list(METHODS)


def test_import_is_cheap():
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", "import hkust_demos"], capture_output=True, text=True)
    line = next(line for line in done.stderr.splitlines() if line.rstrip().endswith("| hkust_demos"))
    assert int(line.split("|")[1]) < 300_000


@pytest.mark.parametrize("command", ["list", "study", "train", "prepare", "demo", *ready_methods()])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and "usage: hkust-demos" in capsys.readouterr().out


def test_every_option_of_eora_has_a_help_and_a_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["eora", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "(default: 64)" in text and "(default: 16384)" in text and "--budget-mb" in text


@pytest.mark.parametrize("arguments, sentence", [
    (["study", "nothing"], "there is no method 'nothing'"),
    (["eora", "smollm2-135m", "--bits", "9", "--out", "x"], "bits is 9"),
    (["eora", "smollm2-135m", "--sparsity", "half", "--out", "x"], "kept:group"),
    (["eora", "smollm2-135m", "--rank", "0", "--out", "x"], "rank is 0"),
    (["eora", "no/such/model", "--out", "x"], "neither a folder"),
    (["eora", "smollm2-135m", "--calibration", "missing.txt", "--out", "x"], "no such file"),
])
def test_refusals_are_sentences(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    shown = capsys.readouterr().err
    assert sentence in shown and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_coming_methods_say_so(capsys):
    for name in METHODS:
        if not METHODS[name].ready:
            assert cli.main([name, "scan.png", "--out", "maps"]) == 2
            assert "coming" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory):
    "A folder with a random Llama of two blocks and the tokenizer of the embedded model."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from hkust_demos.llm.models import load_demo_lm
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = load_demo_lm()[1]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_eora_writes_an_adapter_and_respects_what_is_there(tmp_path, small_llama, capsys):
    out = tmp_path / "adapter"
    wanted = ["eora", str(small_llama), "--sparsity", "2:4", "--pruning", "magnitude", "--rank", "4", "--tokens", "256",
              "--evaluation-tokens", "0", "--out", str(out)]
    done = run(*wanted)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{64}", report["base_sha256"]) and set(report["ranks"].values()) == {4}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "base.json"} <= {p.name for p in out.iterdir()}
    assert str(out / "report.json") in done.stdout
    assert cli.main(wanted) == 2
    refused = capsys.readouterr().err
    assert "--force" in refused and "Traceback" not in refused
    assert cli.main([*wanted, "--force"]) == 0
    (out / MARKER).unlink()
    assert cli.main([*wanted, "--force"]) == 2
    assert "was not made by" in capsys.readouterr().err and (out / "report.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_study_writes_table_and_record(tmp_path, monkeypatch, capsys):
    tiny = Study("eora", ["a", "b"], ["score"], lambda variant, seed, quick: {"score": seed + (variant == "b")}, baseline="a")
    monkeypatch.setattr("hkust_demos.llm.eora_study.build_study", lambda quick=False: tiny)
    assert cli.main(["study", "eora", "--seeds", "2", "--out", str(tmp_path)]) == 0
    assert len((tmp_path / "eora.csv").read_text().splitlines()) == 5
    assert json.loads((tmp_path / "eora.json").read_text())["command"] == "hkust-demos study eora --seeds 2"
    assert str(tmp_path / "eora.csv") in capsys.readouterr().out
    assert cli.main(["study", "eora", "--seeds", "2", "--only", "b", "--out", str(tmp_path / "part")]) == 0
    assert json.loads((tmp_path / "part" / "eora.json").read_text())["command"] == "hkust-demos study eora --seeds 2 --only b"
    assert cli.main(["study", "eora", "--seeds", "2", "--only", "a", "--out", str(tmp_path / "part")]) == 0
    assert json.loads((tmp_path / "part" / "eora.json").read_text())["command"] == (
        "hkust-demos study eora --seeds 2 --only b && hkust-demos study eora --seeds 2 --only a")
    assert cli.main(["study", "eora", "--seeds", "1-2", "--out", str(tmp_path / "which")]) == 0
    assert (tmp_path / "which" / "eora.csv").read_text().count("\na,") == 2 and json.loads((tmp_path / "which" / "eora.json").read_text())["seeds"] == [1, 2]
    assert json.loads((tmp_path / "which" / "eora.json").read_text())["command"] == "hkust-demos study eora --seeds 1-2"
    assert cli.main(["study", "eora", "--only", "zebra", "--out", str(tmp_path / "none")]) == 2


def test_train_says_that_nothing_is_needed(capsys):
    assert cli.main(["train", "eora"]) == 2
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_ended_from_outside_leaves_no_hidden_folder(tmp_path, kind):
    program = ("import sys, time; from hkust_demos import cli; from hkust_demos.files import output_folder\n"
               "def slow(argv):\n    with output_folder(argv[0]): print('begun', flush=True); time.sleep(60)\n"
               "cli._call = slow; sys.exit(cli.main([sys.argv[1]]))")
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "maps")], stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(kind, signal.SIG_DFL))  # whoever started the tests may ignore it
    assert process.stdout.readline() == "begun\n" and len(list(tmp_path.iterdir())) == 1
    process.send_signal(kind)
    assert process.wait(30) == 128 + kind and list(tmp_path.iterdir()) == []
