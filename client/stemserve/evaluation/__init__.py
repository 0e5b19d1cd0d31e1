"""Separation quality against reference stems: ``stemserve evaluate``. Needs the extra ``evaluate``.

dataset.py finds tracks and reads their audio, metrics.py measures one estimate, scoring.py one
track, run.py all of them in parallel; results.py holds what came out, baseline.py compares it with
an earlier run; report.py and plot.py show it.
"""
