from dataclasses import replace

import pytest

from stemserve.errors import ExportError
from stemserve_export.catalog import SINGLE_FILE, PinnedFile, find_model
from stemserve_export.choices import with_checkpoint, with_name, with_options, with_precision

STEMS = ("vocals", "drums", "bass", "other")


@pytest.fixture
def single():
    """A model whose weights are one file."""
    return find_model("htdemucs")


@pytest.fixture
def per_stem():
    """A model with a file per stem."""
    return find_model("umxl")


@pytest.fixture
def folder(tmp_path):
    """A folder with a file per stem, named as published, and others beside them."""
    folder = tmp_path / "my models"
    folder.mkdir()
    for name in (
        "vocals-b62c91ce.pth",
        "drums.pth",
        "bass.th",
        "other.safetensors",
        "separator.json",
    ):
        (folder / name).touch()
    return folder


def refused(choice, *arguments):
    with pytest.raises(ExportError) as caught:
        choice(*arguments)
    return str(caught.value)


def sources(entry):
    return {key: file.source for key, file in entry.files.items()}


# --- options --------------------------------------------------------------------------------


def test_options_replace_those_of_the_catalogue(per_stem):
    changed = with_options(per_stem, {"wiener_iterations": "0"})
    assert changed.options == {"wiener_iterations": "0"}
    assert per_stem.options == {"wiener_iterations": "1"}
    assert with_options(per_stem, {}) == per_stem


def test_an_option_that_the_model_does_not_have(per_stem, single):
    assert refused(with_options, per_stem, {"shape": "round"}) == (
        "Model 'umxl' has no option 'shape'; it has wiener_iterations."
    )
    assert refused(with_options, replace(single, options={}), {"shape": "round"}) == (
        "Model 'htdemucs' has no option 'shape'; it has none."
    )


# --- precision ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "wire", "name"),
    [
        ("fp32", "fp32", "htdemucs"),
        ("fp16", "fp32", "htdemucs_fp16"),
        ("fp32", "fp16", "htdemucs"),
        ("fp16", "fp16", "htdemucs_fp16"),
    ],
)
def test_an_artefact_is_named_after_its_precision(single, precision, wire, name):
    changed = with_precision(single, precision, wire)
    assert (changed.name, changed.precision, changed.wire_dtype) == (name, precision, wire)
    assert changed.family == "htdemucs"


def test_the_wire_is_fp32_unless_it_is_chosen(single):
    assert with_precision(single, "fp16").wire_dtype == "fp32"


def test_specialists_have_the_precision_and_the_name_of_the_whole():
    whole = with_name(with_precision(find_model("htdemucs_ft"), "fp16", "fp16"), "mine")
    assert [part.name for part in whole.parts()] == [
        "mine_drums", "mine_bass", "mine_other", "mine_vocals",
    ]  # fmt: skip
    assert {(part.precision, part.wire_dtype) for part in whole.parts()} == {("fp16", "fp16")}
    named = [part.name for part in with_precision(find_model("htdemucs_ft"), "fp16").parts()]
    assert named[0] == "htdemucs_ft_fp16_drums"


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mine", "my-model_2.1", "2stems", "a+b"])
def test_a_name_of_the_users_own(single, name):
    assert with_name(single, name).name == name


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "a\n", "../a", "a:b"])
def test_a_name_that_is_no_folders(single, name):
    assert refused(with_name, single, name) == (
        f"'{name}' is no name for a model; use letters, digits, '_', '-' and '.', with a letter "
        "or digit first."
    )


# --- checkpoints ----------------------------------------------------------------------------


def test_no_choice_changes_nothing(single, per_stem):
    assert with_checkpoint(single, []) is single
    assert with_checkpoint(single, [single.files[SINGLE_FILE].source]) is single
    published = [f"{stem}={file.source}" for stem, file in per_stem.files.items()]
    assert with_checkpoint(per_stem, published) is per_stem


@pytest.mark.parametrize(
    "choice", ["file:///w.th", "model=file:///w.th", "https://host/w.th?a=b&vocals=c"]
)
def test_a_file_of_the_users_own(single, choice):
    changed = with_checkpoint(single, [choice])
    assert changed.files == {SINGLE_FILE: PinnedFile(choice.removeprefix("model="))}
    assert single.files[SINGLE_FILE].sha256 is not None


def test_nothing_published_is_told_of_weights_of_the_users_own(single, per_stem):
    own = [f"{stem}=file:///{stem}.pth" for stem in STEMS]
    for changed in (
        with_checkpoint(single, ["file:///w.th"]),
        with_checkpoint(per_stem, own),
    ):
        assert (changed.licence, changed.licence_source) == ("unknown", "")
        assert (changed.commercial_use, changed.training_data) == ("unknown", "unknown")
        assert changed.scores is None


def test_a_file_of_one_stem_leaves_the_others(per_stem):
    changed = with_checkpoint(per_stem, ["bass=file:///b.pth", "vocals=https://host/v.pth?x=1"])
    assert sources(changed) == {
        **sources(per_stem), "bass": "file:///b.pth", "vocals": "https://host/v.pth?x=1",
    }  # fmt: skip
    assert list(changed.files) == list(per_stem.files)
    assert changed.files["drums"] == per_stem.files["drums"]
    assert changed.files["bass"] == PinnedFile("file:///b.pth")


def test_the_licence_of_what_is_still_published_holds(per_stem):
    changed = with_checkpoint(per_stem, ["bass=file:///b.pth"])
    assert changed.commercial_use == "forbidden"
    assert changed.licence == "CC-BY-NC-SA-4.0 and unknown"
    assert changed.licence_source == per_stem.licence_source
    assert changed.training_data == f"{per_stem.training_data} and unknown"
    assert changed.scores is None
    free = with_checkpoint(find_model("umxhq"), ["bass=file:///b.pth"])
    assert (free.licence, free.commercial_use) == ("MIT and unknown", "unknown")


def test_a_folder_with_a_file_per_stem(per_stem, folder):
    changed = with_checkpoint(per_stem, [folder.as_uri()])
    assert sources(changed) == {
        "vocals": (folder / "vocals-b62c91ce.pth").as_uri(),
        "drums": (folder / "drums.pth").as_uri(),
        "bass": (folder / "bass.th").as_uri(),
        "other": (folder / "other.safetensors").as_uri(),
    }
    assert list(changed.files) == list(per_stem.files)


def test_a_folder_of_specialists(folder):
    changed = with_checkpoint(find_model("htdemucs_ft"), [folder.as_uri()])
    parts = {part.stems[0]: part.files[SINGLE_FILE].source for part in changed.parts()}
    assert parts["drums"] == (folder / "drums.pth").as_uri()
    assert {part.commercial_use for part in changed.parts()} == {"unknown"}


def test_a_folder_may_be_the_one_checkpoint_of_a_model(folder):
    """TensorFlow's checkpoints are several files."""
    changed = with_checkpoint(find_model("spleeter_4stems"), [folder.as_uri()])
    assert sources(changed) == {SINGLE_FILE: folder.as_uri()}


@pytest.mark.parametrize(
    ("names", "found"), [([], 0), (["bass-2.pth"], 2), (["bassoon.pth", "my-bass.pth"], 0)]
)
def test_a_folder_without_just_one_file_for_a_stem(per_stem, folder, names, found):
    if found < 2:
        (folder / "bass.th").unlink()
    for name in names:
        (folder / name).touch()
    assert refused(with_checkpoint, per_stem, [folder.as_uri()]) == (
        f"The folder '{folder}' holds {found} checkpoints for 'bass'; expected one, named like "
        "bass.pth. Name the files one by one as bass=URI."
    )


@pytest.mark.parametrize(
    "choice",
    ["file:///w.pth", "https://host/w.pth", "piano=file:///w.pth", "model=file:///w.pth", "vocals"],
)
def test_one_file_for_a_model_with_a_file_per_stem(per_stem, choice):
    assert refused(with_checkpoint, per_stem, [choice]) == (
        "Model 'umxl' has a checkpoint per stem; name them as vocals=URI, or name a folder that "
        "holds them."
    )


def test_a_checkpoint_that_is_named_twice(single, per_stem, folder):
    assert refused(with_checkpoint, single, ["file:///a.th", "file:///b.th"]) == (
        "The checkpoint for model 'htdemucs' is named twice, as 'file:///a.th' and 'file:///b.th'; "
        "name one."
    )
    assert refused(with_checkpoint, per_stem, [folder.as_uri(), "bass=file:///b.th"]) == (
        "The checkpoint of 'bass' for model 'umxl' is named twice, as "
        f"'{(folder / 'bass.th').as_uri()}' and 'file:///b.th'; name one."
    )


@pytest.mark.parametrize("uri", ["", "file:///my weights.th", "file:///a\nb"])
def test_a_uri_with_white_space_or_none(single, uri):
    """The served configuration lists URIs with white space between them."""
    assert refused(with_checkpoint, single, [uri]) == (
        f"'{uri}' is no URI of a checkpoint; expected one without white space (%20 stands for a "
        "blank), e.g. file:///folder/model.pth."
    )


def test_an_empty_uri_of_a_stem(per_stem):
    assert refused(with_checkpoint, per_stem, ["vocals="]).startswith(
        "'' is no URI of a checkpoint"
    )
