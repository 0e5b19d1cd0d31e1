"""Prometheus metrics of the client, in prometheus_client's default registry.

A service that uses the client exposes them with everything else that it measures; nothing listens
on a port by itself.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_MODEL: Final = ("model",)

CHUNK_SECONDS: Final = Histogram(
    "stemserve_client_chunk_seconds",
    "Seconds from sending a chunk to having its stems.",
    _MODEL,
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120),
)
TRACK_SECONDS: Final = Histogram(
    "stemserve_client_track_seconds",
    "Seconds from opening a track to having its files in place.",
    _MODEL,
    buckets=(0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600, 1800),
)
AUDIO_SECONDS: Final = Counter(
    "stemserve_client_audio_seconds", "Seconds of audio separated.", _MODEL
)
FAILURES: Final = Counter(
    "stemserve_client_track_failures", "Tracks that failed, by class of error.", ("model", "error")
)
IN_FLIGHT: Final = Gauge(
    "stemserve_client_chunks_in_flight", "Chunks sent and not answered yet.", _MODEL
)
