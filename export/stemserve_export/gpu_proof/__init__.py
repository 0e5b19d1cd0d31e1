"""What the owner of a GPU runs once: engines, servers, parity in dB and throughput per batch size.

``python -m stemserve_export.gpu_proof --help``, or ``make prove-gpu``.

NOT RUN ON A GPU BY US: none was at hand. Everything that does not need one ran on a CPU, through
a real Triton (``--cpu``, tests/server/test_gpu_proof.py): staging, serving, sending, comparing,
statistics, tables. What has never run: Docker, KIND_GPU, ``tensorrt_plan``, both GPU providers.

Nothing is written to the model repository: each way to serve gets a staged copy of its own in a
temporary folder, which goes away at the end, like every server and container that was started.
"""
