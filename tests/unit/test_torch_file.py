"""Checkpoints are data: names and arrays are read, and nothing that they ask for is run."""

import builtins
import io
import os
import pickle
import tarfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from stemserve.errors import CheckpointError
from stemserve_export.weights.torch_file import load_plain, read_arrays, state_dict

REFUSED_BEGIN = "'w.ckpt' cannot be read as plain weights ("
REFUSED_END = (
    "); expected a file that torch.save wrote, of names and arrays only. Nothing in it was run."
)


def saved(content, **options):
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def refused(read, data):
    with pytest.raises(CheckpointError) as caught:
        read(data, "w.ckpt")
    return str(caught.value)


# --- code -----------------------------------------------------------------------------------


class Call:
    """Calls a function when it is unpickled by someone who trusts it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Built:
    """Sets its state, which is where a call hides from those who look at the classes alone."""

    def __init__(self, state):
        self.state = state

    def __reduce__(self):
        return OrderedDict, (), self.state


def attacks(marker):
    """Ways to run code that makes the file ``marker``, by the name that each asks for."""
    command = f"touch '{marker}'"
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "posix.system": Call(os.system, command),
        "os.popen": Call(os.popen, command),
        "builtins.eval": Call(builtins.eval, code),
        "builtins.exec": Call(builtins.exec, code),
        "builtins.getattr": Call(builtins.getattr, Call(__import__, "os"), "system"),
        "torch.load": Call(torch.load, str(marker)),
        "pathlib.Path.touch": Call(getattr, Call(__import__, "pathlib"), "Path"),
    }


ATTACKS = list(attacks("x"))
PLACES = {
    "alone": lambda attack: attack,
    "a value": lambda attack: {"a": torch.zeros(1), "b": attack},
    "a key's neighbour": lambda attack: OrderedDict([("a", torch.zeros(1)), ("b", [(attack,)])]),
    "state of a container": lambda attack: {"a": Built({"hook": attack})},
    "arguments of a tensor": lambda attack: {
        "a": Call(torch._utils._rebuild_tensor_v2, attack, 0, (1,), (1,), False, OrderedDict())
    },
    "hooks of a tensor": lambda attack: {
        "a": Call(torch._utils._rebuild_parameter, torch.zeros(1), False, attack)
    },
}


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ATTACKS)
def test_a_checkpoint_that_would_run_code(tmp_path, name, place, form):
    marker = tmp_path / "it ran"
    content = PLACES[place](attacks(marker)[name])
    if form == "pickle":
        try:
            data = pickle.dumps(content, protocol=2)
        except (AttributeError, pickle.PicklingError):  # a tensor that pickle alone cannot write
            data = saved(content, pickle_protocol=4)
    else:
        data = saved(content, _use_new_zipfile_serialization=form == "zip")
    for read in (load_plain, read_arrays):
        text = refused(read, data)
        assert text.startswith(REFUSED_BEGIN)
        assert text.endswith(REFUSED_END)
    assert not marker.exists()


def test_what_a_checkpoint_asks_for_is_named(tmp_path):
    data = saved({"a": attacks(tmp_path / "it ran")["posix.system"]})
    assert refused(load_plain, data) == f"{REFUSED_BEGIN}it asks for posix.system{REFUSED_END}"


@pytest.mark.parametrize("name", ["posix.system", "builtins.exec"])
def test_the_attacks_are_real(tmp_path, name):
    """What the tests above are worth: read by someone who trusts it, the code runs."""
    marker = tmp_path / "it ran"
    data = saved({"a": attacks(marker)[name]})
    torch.load(io.BytesIO(data), weights_only=False)
    assert marker.exists()


class Inert(dict):
    """A class of the tests' own."""


def test_a_class_that_is_allowed_is_allowed_once():
    data = saved({"a": Call(Inert)})
    assert type(load_plain(data, "w.ckpt", [Inert])["a"]) is Inert
    assert "it asks for " in refused(load_plain, data)


def test_allowing_a_class_allows_no_other(tmp_path):
    marker = tmp_path / "it ran"
    data = saved({"a": Call(Inert), "b": attacks(marker)["posix.system"]})
    assert "posix.system" in refused(lambda data, what: load_plain(data, what, [Inert]), data)
    assert not marker.exists()


# --- formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("as_path", [True, False])
def test_both_of_torchs_formats_are_read(tmp_path, zipped, as_path):
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7), "epochs": 3}
    data = saved(state, _use_new_zipfile_serialization=zipped)
    if as_path:
        (tmp_path / "w.ckpt").write_bytes(data)
        data = tmp_path / "w.ckpt"
    loaded = load_plain(data, "w.ckpt")
    assert loaded["epochs"] == 3
    assert torch.equal(loaded["a.weight"], state["a.weight"])
    assert torch.equal(loaded["n"], state["n"])


def test_torchs_oldest_format_is_refused(tmp_path):
    """A tar archive of 2016: torch reads it by pickle alone."""
    path = tmp_path / "old.pth"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(attacks(tmp_path / "it ran")["posix.system"], protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert refused(load_plain, path).startswith(REFUSED_BEGIN)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript archive")
def test_a_scripted_module_is_refused(tmp_path):
    """TorchScript's archives hold code, and need it."""
    path = tmp_path / "scripted.pt"
    with torch.jit.optimized_execution(False):
        torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), str(path))
    assert refused(load_plain, path).startswith(REFUSED_BEGIN)


def test_a_file_that_is_missing_or_no_file(tmp_path):
    missing = tmp_path / "none.pth"
    assert "(No such file or directory)" in refused(load_plain, missing)
    assert "(Is a directory)" in refused(load_plain, tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_checkpoint_that_is_cut(share, zipped):
    data = saved({"a": torch.zeros(5000)}, _use_new_zipfile_serialization=zipped)
    text = refused(load_plain, data[: int(len(data) * share)])
    assert text == f"{REFUSED_BEGIN}it is damaged{REFUSED_END}"


def test_bytes_that_are_no_checkpoint():
    data = np.random.default_rng(0).bytes(5000)
    assert refused(load_plain, data) == f"{REFUSED_BEGIN}it is damaged{REFUSED_END}"
    for junk in (b"", b"<html>404</html>", b"\x80", b"PK\x03\x04"):
        assert refused(load_plain, junk).startswith(REFUSED_BEGIN)


# --- state dicts ----------------------------------------------------------------------------


def test_floats_become_float32_and_integers_stay():
    values = torch.tensor([0.5, -1.25, 3.0])
    halves = (torch.float16, torch.bfloat16, torch.float64, torch.float32)
    state = {str(dtype): values.to(dtype) for dtype in halves}
    state["parameter"] = torch.nn.Parameter(values)
    state["count"] = torch.tensor(80_000)
    read = state_dict(load_plain(saved(state), "w.ckpt"), "w.ckpt")
    assert list(read) == list(state)
    assert read.pop("count").dtype == torch.int64
    for tensor in read.values():
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert torch.equal(tensor, values)


@pytest.mark.parametrize(
    ("loaded", "kind"),
    [([1], "list"), (None, "NoneType"), ({}, "dict"), (torch.zeros(1), "Tensor")],
)
def test_no_mapping(loaded, kind):
    assert refused(state_dict, loaded) == (
        f"'w.ckpt' holds no state dict (a {kind}); expected names and tensors."
    )


@pytest.mark.parametrize(
    ("loaded", "told"),
    [
        ({"a": 1.0}, "float under 'a'"),
        ({"a": {"b": torch.zeros(1)}}, "dict under 'a'"),
        ({"a": np.zeros(1, np.float32)}, "ndarray under 'a'"),
        ({1: torch.zeros(1)}, "Tensor under 1"),
    ],
)
def test_anything_but_tensors_by_name(loaded, told):
    assert refused(state_dict, loaded) == f"'w.ckpt' holds {told}; expected tensors by name."


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_values_that_are_not_finite(value, dtype):
    state = {"a": torch.zeros(3), "b.weight": torch.tensor([0.0, value], dtype=dtype)}
    assert refused(state_dict, state) == (
        "'w.ckpt' has NaN or infinity in 'b.weight'; its training failed, or the file is damaged."
    )


def test_a_value_that_float32_cannot_hold():
    state = {"a": torch.tensor([1e300], dtype=torch.float64)}
    assert "has NaN or infinity in 'a'" in refused(state_dict, state)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(1).expand(10**6, 10**6),  # a few bytes on disk, 4 TB once it is copied
    ],
    ids=["sparse", "without data", "complex", "of strides 0"],
)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_tensor_that_is_no_plain_array(tensor):
    text = refused(state_dict, load_plain(saved({"a": tensor}), "w.ckpt"))
    assert text == (
        f"'w.ckpt' holds no plain array of numbers under 'a' ({tensor.layout}, {tensor.dtype}); "
        "expected the dense tensors of a state dict."
    )


# --- arrays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_read_arrays(zipped):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b.c": np.zeros(1, np.float32)}
    read = read_arrays(saved(arrays, _use_new_zipfile_serialization=zipped), "w.ckpt")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize(
    "content",
    [
        [np.zeros(1, np.float32)],
        np.zeros(1, np.float32),
        {"a": torch.zeros(1)},
        {"a": 1.0},
        {1: np.zeros(1, np.float32)},
        {"a": np.array([np.nan], np.float32)},
        {"a": np.array([1, np.inf], np.float32)},
        {"a": {"b": np.zeros(1, np.float32)}},
    ],
    ids=str,
)
def test_anything_but_float32_arrays_by_name(content):
    assert refused(read_arrays, saved(content)) == (
        "'w.ckpt' holds something else than finite float32 arrays by name; expected the published "
        "weights."
    )


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.bool_, object])
def test_arrays_of_another_dtype(dtype):
    text = refused(read_arrays, saved({"a": np.zeros(3, dtype)}))
    assert text.startswith("'w.ckpt' ")
    assert "arrays" in text


def test_an_array_of_objects_that_would_run_code(tmp_path):
    marker = tmp_path / "it ran"
    array = np.empty(1, object)
    array[0] = attacks(marker)["posix.system"]
    assert refused(read_arrays, saved({"a": array})).startswith(REFUSED_BEGIN)
    assert not marker.exists()
