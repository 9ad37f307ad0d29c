"What a federated run hands to other syntaxes and processes: values into TOML and shells, a stop signal to children. No Flower process is started."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr")

from flwr.cli.config_utils import load_and_validate  # noqa: E402
from flwr.common.config import parse_config_args  # noqa: E402

from hkust_demos.federated.deploy import Federation, deployment_commands, submit, toml_pairs, write_config, write_flower_app  # noqa: E402

APPS = "hkust_demos.federated.engine:digits_apps"
STRANGE = ["/data/🩺/scans", "naïve, with a comma", 'say "so"', "it's", "C:\\clinic\\new", "two\nlines", "a = b # c", "日本語", "'''", '"""', "\t", "\x7f", "𝒳", ""]


@pytest.mark.parametrize("value", STRANGE)
def test_any_word_reaches_flower_through_a_file(tmp_path, value):
    assert parse_config_args([str(write_config(tmp_path / "run.toml", {"out-dir": value, "rounds": 3}))]) == {"out-dir": value, "rounds": 3}
    app = write_flower_app(tmp_path / "app", APPS, config={"out-dir": value})
    found, complaints = load_and_validate(app / "pyproject.toml")
    assert found["tool"]["flwr"]["app"]["config"]["out-dir"] == value and complaints == []


@pytest.mark.parametrize("value", STRANGE)
def test_on_the_command_line_a_word_arrives_or_is_refused(value):
    try:
        line = toml_pairs({"run-name": value, "lr": 0.5})
    except ValueError as error:
        assert "run-name" in str(error) and ".toml" in str(error) and any(letter in '"\\' or not letter.isprintable() for letter in value)
    else:
        assert parse_config_args([line]) == {"run-name": value, "lr": 0.5}


@pytest.mark.parametrize("value", [1e300, -0.0, 1e-7, float("inf"), 2**62, True])
def test_numbers_keep_their_kind(tmp_path, value):
    assert parse_config_args([toml_pairs({"x": value})]) == parse_config_args([str(write_config(tmp_path / "x.toml", {"x": value}))]) == {"x": value}


def test_classes_of_any_name_travel(tmp_path):
    from PIL import Image

    from hkust_demos.federated import fednpr_apply as fa
    names = ["MEL in situ", "nævus 𝒳", "日本"]
    for name in names:
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (20, 20), (30 * i, 90, 120)).save(tmp_path / "set" / name / f"{i}.png")
    plan = fa.Plan("folder", clients=2, alpha=5, folder=str(tmp_path / "set"))
    config = parse_config_args([str(write_config(tmp_path / "run.toml", fa.run_config(plan)))])
    assert sorted(fa.share_out(plan).classes) == sorted(names)
    assert set(fa.client_data({**config, "partition-id": 0, "data-dir": str(tmp_path / "set")}).train.tensors[1].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("server, told", [("2001:db8::7", "[2001:db8::7]:8000"), ("::1", "[::1]:8000"), ("10.0.0.5", "10.0.0.5:8000"), ("fl.hospital.org", "fl.hospital.org:8000")])
def test_addresses_in_the_guide(server, told):
    guide = deployment_commands(server, 2)
    assert guide.count(f"--superlink {told} ") == 2 and f'address = "{told}"' in guide and f"hosts=('{server}',)" in guide


@pytest.mark.parametrize("server", ["x'); import os; ('", "a b", "https://fl.org", "fl.org:8000", "$(id)", ""])
def test_servers_that_are_no_names_are_refused(server):
    with pytest.raises(ValueError, match="names or addresses"):
        deployment_commands(server, 2)


@pytest.mark.parametrize("said, told", [('{"success": false, "error-message": "Run configuration is bad"}', "refused the run: Run configuration is bad"),
                                        ('{"success": false}', "refused the run"), ("Connection failed", "without JSON: Connection failed"), ("", "nothing")])
def test_a_refused_run_is_a_sentence(tmp_path, said, told):
    class Says(Federation):
        def ask(self, *command):
            return said

    with pytest.raises(RuntimeError, match=told):
        submit(Says(tmp_path, 2), tmp_path / "app", {"rounds": 1})


PROGRAM = """
import sys, time
from pathlib import Path
from hkust_demos.federated.deploy import Federation
from hkust_demos.files import ends_in_order, output_folder

class Sleepers(Federation):
    "Processes that only sleep, in the place of Flower's."
    def start_server(self): self.start("superlink", "python", "-c", "import time; time.sleep(120)")
    def register(self, key): return 0
    def start_client(self, client): self.start(f"client-{client}", "python", "-c", "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(120)'])")

with ends_in_order(), output_folder(sys.argv[1]) as folder, Sleepers(folder / "federation", 3) as federation:
    print(*[process.pid for process in federation.running.values()], flush=True)
    time.sleep(120)
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stopped_run_leaves_neither_children_nor_folders(tmp_path, kind):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parent.parent,
                               preexec_fn=lambda: signal.signal(kind, signal.SIG_DFL))  # whoever started the tests may ignore it
    groups = [int(word) for word in process.stdout.readline().split()]
    assert len(groups) == 4
    process.send_signal(kind)
    process.send_signal(kind)  # impatient
    assert process.wait(60) != 0
    end = time.monotonic() + 20
    while any(alive(group) for group in groups) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(alive(group) for group in groups) and list(tmp_path.iterdir()) == []


def alive(group):
    "True if a process group has members."
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
