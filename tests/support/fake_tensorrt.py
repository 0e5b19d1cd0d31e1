"""A stand-in for the Python package ``tensorrt``: its names, its call order, no GPU.

Names, signatures and return values are those of TensorRT 10 (docs.nvidia.com/deeplearning/
tensorrt, Python API), the same that tests use of the real ``tensorrt_rtx`` where it is installed.
A "plan" is JSON of what was asked for, so that tests can read it.
"""

import enum
import json
from pathlib import Path
from types import SimpleNamespace

import onnx


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class ILogger:
    Severity = Severity

    def log(self, severity, message):
        raise NotImplementedError


class ParserError:
    def __init__(self, text, node, operator):
        self._fields = (text, node, operator)

    def desc(self):
        return self._fields[0]

    def node_name(self):
        return self._fields[1]

    def node_operator(self):
        return self._fields[2]


class Network:
    def __init__(self, flags):
        self.flags = flags
        self.num_layers = 0
        self.inputs, self.outputs = [], []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]


class TimingCache:
    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data + b"+"


class Profile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, name, minimum, optimum, maximum):
        self.shapes[name] = [list(minimum), list(optimum), list(maximum)]


class Config:
    def __init__(self):
        self.flags = {BuilderFlag.TF32}  # on by default, as in TensorRT
        self.limits, self.profiles, self.cache = {}, [], None

    def add_optimization_profile(self, profile):
        shapes = profile.shapes.values()
        if not all(low <= best <= high for low, best, high in shapes):
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool, size):
        self.limits[pool.name] = size

    def create_timing_cache(self, data):
        return TimingCache(data)

    def set_timing_cache(self, cache, ignore_mismatch):
        if cache.data.startswith(b"other GPU") and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


def make(version="10.5.0", refuses=(), fails=None):
    """Return the module.

    Args:
        version: its ``__version__``.
        refuses: operators that its parser does not take.
        fails: what its builder logs instead of building.
    """
    built = []

    class OnnxParser:
        def __init__(self, network, logger):
            self.network, self.errors = network, []

        num_errors = property(lambda self: len(self.errors))

        def get_error(self, index):
            return self.errors[index]

        def parse_from_file(self, path):
            assert isinstance(path, str)
            if not Path(path).is_file():
                return False
            graph = onnx.load(path).graph
            self.errors = [
                ParserError(f"no importer for {node.op_type}.", node.name, node.op_type)
                for node in graph.node
                if node.op_type in refuses
            ]
            self.network.num_layers = len(graph.node)
            self.network.inputs = [tensor(value) for value in graph.input]
            self.network.outputs = [tensor(value) for value in graph.output]
            return not self.errors

    class Builder:
        def __init__(self, logger):
            assert isinstance(logger, ILogger)
            self.logger = logger

        def create_network(self, flags):
            return Network(flags)

        def create_optimization_profile(self):
            return Profile()

        def create_builder_config(self):
            return Config()

        def build_serialized_network(self, network, config):
            if fails is not None:
                self.logger.log(Severity.WARNING, "a warning")
                self.logger.log(Severity.ERROR, fails)
                return None
            [profile] = config.profiles
            plan = {
                "strongly_typed": bool(network.flags & 2),
                "tf32": BuilderFlag.TF32 in config.flags,
                "profile": profile.shapes,
                "limits": config.limits,
                "cache": None if config.cache is None else config.cache.data.decode(),
                "build": len(built),
            }
            built.append(plan)
            return memoryview(json.dumps(plan).encode())

    return SimpleNamespace(
        __name__="tensorrt",
        __version__=version,
        Builder=Builder,
        BuilderFlag=BuilderFlag,
        ILogger=ILogger,
        MemoryPoolType=MemoryPoolType,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag,
        OnnxParser=OnnxParser,
        float32="float32",
        float16="float16",
        built=built,
    )


def tensor(value):
    dims = value.type.tensor_type.shape.dim
    shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in dims)
    dtype = {1: "float32", 10: "float16"}[value.type.tensor_type.elem_type]
    return SimpleNamespace(name=value.name, shape=shape, dtype=dtype)
