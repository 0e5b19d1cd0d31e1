"""Stand-in for Triton's ONNX Runtime backend, where the server has the Python backend only.

The tritonserver of the wheel nvidia-pytriton has no ``libtriton_onnxruntime.so``. Put into a
backend directory as ``onnxruntime/model.py``, this file serves every model whose configuration
says ``platform: "onnxruntime_onnx"``, unchanged: batching, priorities, queue policies and warm-up
are the server's own work. Of the real backend's options it reads those that matter on a CPU:
thread counts, execution mode, memory planning and graph optimization level.

Differences: on a CPU the requests of a batch are run one after another, since batching does not
speed up a CPU and would copy every input; a request with a non-finite sample is refused by
itself, where the real backend would answer with garbage.

It runs inside Triton's Python stub, and imports nothing of stemserve.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

DEFAULT_FILE = "model.onnx"
# https://github.com/triton-inference-server/onnxruntime_backend#model-config-options
GRAPH_LEVELS = {
    -1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    1: onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    2: onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
EXECUTION_MODES = {
    "0": onnxruntime.ExecutionMode.ORT_SEQUENTIAL,
    "1": onnxruntime.ExecutionMode.ORT_PARALLEL,
}


class TritonPythonModel:
    def initialize(self, args):
        if int(np.__version__.split(".")[0]) >= 2:
            raise pb_utils.TritonModelException(
                f"numpy {np.__version__} makes this server answer with empty tensors; expected "
                "numpy < 2. Install the extra with `pip install 'stemserve[server]'`."
            )
        config = json.loads(args["model_config"])
        file = config.get("default_model_filename") or DEFAULT_FILE
        path = Path(args["model_repository"]) / args["model_version"] / file
        self._on_gpu = args["model_instance_kind"] == "GPU"
        self._session = onnxruntime.InferenceSession(
            path, session_options(config), providers=self._providers(args)
        )
        self._inputs = [entry["name"] for entry in config["input"]]
        self._outputs = [entry["name"] for entry in config["output"]]
        self._run_options = onnxruntime.RunOptions()
        # Nodes that lead to no requested stem are not computed.
        self._run_options.only_execute_path_to_fetches = True

    def _providers(self, args):
        if not self._on_gpu:
            return ["CPUExecutionProvider"]
        available = onnxruntime.get_available_providers()
        if "CUDAExecutionProvider" not in available:
            raise pb_utils.TritonModelException(
                "the server found a GPU and this ONNX Runtime cannot use one; install "
                "`stemserve[gpu]` instead of `stemserve[server]`, or hide the GPU with "
                "CUDA_VISIBLE_DEVICES=''."
            )
        # As the exporter's configuration says, and the real backend reads there.
        device = {"device_id": args["model_instance_device_id"], "use_tf32": "0"}
        return [("CUDAExecutionProvider", device), "CPUExecutionProvider"]

    def execute(self, requests):
        groups = [requests] if self._on_gpu else [[request] for request in requests]
        answers = {}
        for group in groups:
            feeds = []
            for request in group:
                feed = self._feed(request)
                if isinstance(feed, pb_utils.TritonError):
                    answers[id(request)] = pb_utils.InferenceResponse(error=feed)
                else:
                    feeds.append((request, feed))
            if feeds:
                answers.update(self._run(feeds))
        return [answers[id(request)] for request in requests]

    def _feed(self, request):
        """The request's inputs as views of shared memory, or the error to answer with."""
        feed = {}
        for name in self._inputs:
            array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            # The sum of squares is finite unless a sample is not (or squares overflow).
            if not np.isfinite(np.vdot(array, array)) and not np.isfinite(array).all():
                return pb_utils.TritonError(
                    f"input '{name}' has NaN or infinite samples; expected finite numbers",
                    pb_utils.TritonError.INVALID_ARG,
                )
            feed[name] = array
        return feed

    def _run(self, feeds):
        """Run the requests as one batch; each gets the outputs that it asked for."""
        wanted = [request.requested_output_names() for request, _ in feeds]
        fetches = [name for name in self._outputs if any(name in names for names in wanted)]
        arrays = [feed for _, feed in feeds]
        batch = (
            arrays[0]
            if len(arrays) == 1
            else {name: np.concatenate([feed[name] for feed in arrays]) for name in self._inputs}
        )
        try:
            outputs = self._session.run(fetches, batch, self._run_options)
        except Exception as error:  # whatever ONNX Runtime raises is this batch's answer
            failure = pb_utils.TritonError(f"ONNX Runtime failed: {error}")
            return {id(request): pb_utils.InferenceResponse(error=failure) for request, _ in feeds}
        results = dict(zip(fetches, outputs, strict=True))
        answers = {}
        start = 0
        for (request, feed), names in zip(feeds, wanted, strict=True):
            stop = start + len(feed[self._inputs[0]])
            answers[id(request)] = pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, results[name][start:stop])
                    for name in fetches
                    if name in names
                ]
            )
            start = stop
        return answers


def session_options(config):
    """ONNX Runtime's options as the model's configuration states them."""
    parameters = {
        key: value.get("string_value", "") for key, value in config.get("parameters", {}).items()
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", "0"))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", "0"))
    options.enable_mem_pattern = parameters.get("enable_mem_pattern", "1") != "0"
    options.execution_mode = EXECUTION_MODES[parameters.get("execution_mode", "0")]
    level = config.get("optimization", {}).get("graph", {}).get("level", 0)
    options.graph_optimization_level = GRAPH_LEVELS.get(
        level, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    )
    # Spinning threads take the cores from the server and its clients (2.7x slower on two cores).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options
