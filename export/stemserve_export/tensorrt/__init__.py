"""TensorRT: engines for machines with a GPU, and what can be known of them without one.

:mod:`builder` is the one place that talks to TensorRT's Python API. It is the same API in the
packages ``tensorrt``, which builds the engines that Triton serves on the GPU that they run on,
and ``tensorrt_rtx``, which builds ahead of time without a GPU and so proves that a graph parses
and builds. :mod:`configs` says how Triton is told of either.
"""
