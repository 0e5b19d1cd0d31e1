import contextlib
import hashlib
import re
import socket
from types import SimpleNamespace

import numpy as np
import pytest
from support.loopback import serving

from stemserve.errors import DigestMismatchError, DownloadError
from stemserve_export import download
from stemserve_export.catalog import PinnedFile
from stemserve_export.download import fetch

MIB = 1 << 20
# Longer than a block of copying, so that a broken connection leaves something to continue from.
DATA = np.random.default_rng(0).bytes(3 * MIB + 12_345)
DIGEST = hashlib.sha256(DATA).hexdigest()


# --- a server that misbehaves ---------------------------------------------------------------


def whole(request):
    """Serve DATA, from where the client asks."""
    request.reply(206 if request.offset else 200, DATA[request.offset :])


def cut_after(count):
    """Announce all that is asked for and close the connection after ``count`` bytes."""

    def behave(request):
        body = DATA[request.offset :]
        request.reply(206 if request.offset else 200, body[:count], announced=len(body))

    return behave


def status(code):
    return lambda request: request.reply(code, b"an error page, no checkpoint")


def announcing(length):
    """Serve DATA and announce another length."""

    def behave(request):
        body = DATA[request.offset :]
        announced = length(body) if callable(length) else length
        request.reply(206 if request.offset else 200, body, announced=announced)

    return behave


def ignore_range(request):
    request.reply(200, DATA)


def wrong_bytes(request):
    request.reply(200, b"x" * len(DATA))


def other_range(request):
    """Claim to continue, and start over."""
    request.reply(206 if request.offset else 200, DATA)


def redirect(url):
    return lambda request: request.reply(302, Location=url)


@pytest.fixture
def serve():
    """Serve on loopback; one behaviour per request, the last one for all that follow."""
    with contextlib.ExitStack() as stack:
        yield lambda *behaviours: stack.enter_context(serving(*behaviours))


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """What the client would have waited between attempts, in seconds."""
    naps = []
    monkeypatch.setattr(download, "time", SimpleNamespace(sleep=naps.append))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return naps


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


def assert_tells_what_to_do_offline(error):
    """The sentence must name both ways out, and where a copy would be found."""
    hint = re.search(
        r" Without a network: fetch it elsewhere and name the copy with --checkpoint file:///…, "
        r"or put it at '(\S+)'\.$",
        str(error),
    )
    assert hint, str(error)
    return hint[1]


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


def test_what_nothing_is_known_of_is_not_continued_by_the_next_run(
    serve, get, kept, tmp_path, monkeypatch
):
    """A user's own file may have changed in between: two halves would make a file of their own."""
    file = PinnedFile("https://host/weights.ckpt")
    folder = tmp_path / "cache" / "checkpoints"
    folder.mkdir(parents=True)
    key = hashlib.sha256(file.source.encode()).hexdigest()[:16]
    (folder / f"{key}-weights.ckpt.part").write_bytes(b"of yesterday")
    found = []

    def continue_download(_requests, _file, part):
        found.append(part.exists())
        part.write_bytes(DATA)
        return True

    monkeypatch.setattr(download, "_continue_download", continue_download)
    assert get(file.source, None).read_bytes() == DATA
    assert found == [False]


def test_a_server_without_ranges_starts_over(serve, get):
    server = serve(cut_after(2 * MIB), ignore_range)
    assert get(server.url).read_bytes() == DATA
    assert server.seen[1] is not None


def test_a_server_that_continues_elsewhere_than_asked(serve, get, kept):
    server = serve(cut_after(2 * MIB), other_range)
    with pytest.raises((DigestMismatchError, DownloadError)):
        get(server.url)
    assert len(server.seen) >= 2
    assert all(name.endswith(".part") for name in kept())


def test_a_redirect_is_followed(serve, get, kept):
    there = serve(whole)
    here = serve(redirect(there.url))
    path = get(here.url)
    assert path.read_bytes() == DATA
    assert (len(here.seen), len(there.seen)) == (1, 1)
    assert kept() == {f"{DIGEST[:16]}-weights.ckpt": len(DATA)}


def test_a_redirect_in_circles(serve, get, kept):
    server = serve(redirect("/models/weights.ckpt"))
    with pytest.raises(DownloadError, match=r"in 5 attempts \(TooManyRedirects\)") as caught:
        get(server.url)
    assert_tells_what_to_do_offline(caught.value)
    assert kept() == {}


# --- lengths that lie -----------------------------------------------------------------------


def test_a_length_announced_too_long(serve, get, kept):
    server = serve(announcing(lambda body: len(body) + 1000))
    with pytest.raises(DownloadError) as caught:
        get(server.url)
    assert str(caught.value).startswith(f"'{server.url}' could not be downloaded in 5 attempts (")
    assert_tells_what_to_do_offline(caught.value)
    assert all(name.endswith(".part") for name in kept())


def test_a_length_announced_too_short(serve, get, kept):
    server = serve(announcing(lambda body: len(body) - 1000))
    with pytest.raises(DigestMismatchError):
        get(server.url)
    assert kept() == {}


@pytest.mark.parametrize("length", ["many", "1e6", "", "²"])
def test_a_length_that_is_none(serve, get, length):
    """Nothing then tells where the file ends but the connection, and the digest."""
    server = serve(announcing(length))
    assert get(server.url).read_bytes() == DATA


def test_a_connection_that_is_cut_where_no_length_was_announced(serve, get, kept, naps):
    server = serve(lambda request: request.reply(200, DATA[:MIB], announced=""), whole)
    assert get(server.url, size=len(DATA)).read_bytes() == DATA
    assert len(naps) == 1
    with pytest.raises(DigestMismatchError):  # where the size is not known, either
        get(serve(lambda request: request.reply(200, DATA[:-1], announced="")).url, "0" * 64)


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


# --- errors ---------------------------------------------------------------------------------


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


def test_a_copy_put_where_the_sentence_says_is_taken(serve, get):
    server = serve(status(404))
    with pytest.raises(DownloadError) as caught:
        get(server.url)
    copy = assert_tells_what_to_do_offline(caught.value)
    with open(copy, "wb") as out:  # noqa: PTH123
        out.write(DATA)
    assert str(get(server.url)) == copy
    assert len(server.seen) == 1


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


@pytest.mark.parametrize("pins", [{}, {"sha256_prefix": DIGEST[:8]}])
def test_http_without_a_whole_digest_is_refused(serve, get, pins):
    server = serve(whole)
    with pytest.raises(DownloadError) as caught:
        get(server.url, sha256=None, **pins)
    assert str(caught.value) == (
        f"'{server.url}' would be fetched unencrypted and unverified; use https."
    )
    assert server.seen == []


@pytest.mark.parametrize("uri", ["ftp://host/file", "w.ckpt", "/weights.ckpt", "s3://b/k", ""])
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
        fetch(PinnedFile(server.url, DIGEST), cache=tmp_path / "file")
    assert str(caught.value) == (
        f"The cache '{tmp_path / 'file' / 'checkpoints'}' cannot be made (Not a directory); choose "
        "another folder with XDG_CACHE_HOME."
    )
    assert server.seen == []


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert download.cache_folder() == tmp_path / "stemserve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/a")
    assert str(download.cache_folder()) == "/home/a/.cache/stemserve"
