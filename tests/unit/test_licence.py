"""The licence of weights is asked for, and told to everyone whom a served model reaches."""

import pytest
from support.toy_family import ToyFamily, everything, toy_entry, write_weights

from stemserve.errors import LicenceError
from stemserve.repository import read_config
from stemserve.spec import ModelSpec
from stemserve_export.catalog import SINGLE_FILE, load_catalog
from stemserve_export.choices import with_checkpoint, with_name, with_options, with_precision
from stemserve_export.exporter import export_model

RESEARCH = {
    "licence": "CC-BY-NC-SA-4.0",
    "licence_source": "https://host/licence",
    "commercial_use": "forbidden",
}
FORBIDDEN = [name for name, entry in load_catalog().items() if entry.commercial_use == "forbidden"]


@pytest.fixture
def family(monkeypatch, tmp_path):
    return ToyFamily.installed(monkeypatch, tmp_path)


@pytest.fixture
def entry(tmp_path):
    """Weights for research only."""
    return toy_entry(write_weights(tmp_path), **RESEARCH)


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "model_repository"


def export(entry, repository, **options):
    return export_model(entry, repository, report=lambda text: None, **options)


def served(repository, name="tiny"):
    return ModelSpec.from_config(read_config(repository, name)).checkpoint


def test_a_licence_that_forbids_commercial_use_must_be_accepted(entry, family, repository):
    with pytest.raises(LicenceError) as caught:
        export(entry, repository)
    assert str(caught.value) == (
        "The weights of 'tiny' are licensed for CC-BY-NC-SA-4.0 and not for commercial use "
        "(https://host/licence). If you agree to that, export with --accept-licence."
    )
    assert caught.value.exit_code == 55
    assert family.builds == []
    assert not repository.exists()


def test_nothing_is_fetched_before_it_is_accepted(entry, family, repository, tmp_path):
    (tmp_path / "model.ckpt").unlink()
    with pytest.raises(LicenceError):
        export(entry, repository)


def test_an_accepted_licence_travels_into_the_served_configuration(entry, family, repository):
    done = export(entry, repository, accept_licence=True)
    checkpoint = served(repository)
    assert (checkpoint.licence, checkpoint.commercial_use) == ("CC-BY-NC-SA-4.0", "forbidden")
    text = (repository / "tiny" / "config.pbtxt").read_text()
    assert 'key: "stemserve.checkpoint.commercial_use"' in text
    assert done.record["spec"]["stemserve.checkpoint.commercial_use"] == "forbidden"


def test_it_is_asked_for_again_at_the_next_export(entry, family, repository):
    """Agreeing is the user's, and a repository may be somebody else's."""
    export(entry, repository, accept_licence=True)
    before = everything(repository)
    with pytest.raises(LicenceError):
        export(entry, repository)
    assert everything(repository) == before


@pytest.mark.parametrize("use", ["allowed", "unknown"])
@pytest.mark.parametrize("accept", [False, True])
def test_other_licences_are_not_asked_for(family, repository, tmp_path, use, accept):
    entry = toy_entry(write_weights(tmp_path), commercial_use=use)
    assert export(entry, repository, accept_licence=accept).built
    assert served(repository).commercial_use == use


def test_weights_of_the_users_own_are_not_under_the_published_licence(
    entry, family, repository, tmp_path
):
    mine = tmp_path / "mine.ckpt"
    mine.write_bytes(b"mine")
    assert export(with_checkpoint(entry, [mine.as_uri()]), repository).built
    checkpoint = served(repository)
    assert (checkpoint.licence, checkpoint.commercial_use) == ("unknown", "unknown")
    assert checkpoint.training_data == "unknown"


def test_naming_the_published_file_is_no_way_around_it(entry, family, repository):
    published = with_checkpoint(entry, [entry.files[SINGLE_FILE].source])
    with pytest.raises(LicenceError):
        export(published, repository)


def test_one_file_of_the_users_own_leaves_the_others_under_their_licence(
    family, repository, tmp_path
):
    files = write_weights(tmp_path, "vocals", "accompaniment", "mine")
    mine = files.pop("mine").as_uri()
    entry = with_checkpoint(toy_entry(files, **RESEARCH), [f"vocals={mine}"])
    with pytest.raises(LicenceError, match=r"for CC-BY-NC-SA-4\.0 and unknown and not for"):
        export(entry, repository)
    export(entry, repository, accept_licence=True)
    assert served(repository).commercial_use == "forbidden"
    free = with_checkpoint(toy_entry(files), [f"vocals={mine}"])
    export(free, repository)
    checkpoint = served(repository)
    assert (checkpoint.licence, checkpoint.commercial_use) == ("MIT and unknown", "unknown")


def test_specialists_carry_the_licence_each(family, repository, tmp_path):
    files = write_weights(tmp_path, "vocals", "accompaniment")
    entry = toy_entry(files, specialists=True, **RESEARCH)
    with pytest.raises(LicenceError):
        export(entry, repository)
    assert not repository.exists()
    export(entry, repository, accept_licence=True)
    for name in ("tiny", "tiny_vocals", "tiny_accompaniment"):
        assert served(repository, name).commercial_use == "forbidden"


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_choice_of_artefact_lifts_a_published_licence(name):
    entry = load_catalog()[name]
    chosen = with_name(with_precision(with_options(entry, {}), "fp16", "fp16"), "mine")
    for artefact in (chosen, *chosen.parts()):
        assert artefact.commercial_use == "forbidden"
        assert artefact.licence == entry.licence
        assert artefact.licence_source.startswith("https://")


def test_the_models_that_must_be_accepted():
    """As their licences were read; a change here needs the source that catalog.toml names."""
    assert FORBIDDEN == ["umxl", "htdemucs", "htdemucs_6s", "htdemucs_ft", "hdemucs_mmi"]
