"""Merge-readiness: why a merge worked, or why it should not be done.

Measures are pure functions on arrays (connectivity, displacement, surface, perturbation, curvature, calibration,
gradient_map); `subject` brings models and rows to them, the `feed*` modules feed them, `run` keeps order, time and files.
"""
