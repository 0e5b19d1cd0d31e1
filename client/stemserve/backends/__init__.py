"""Backends that the local Triton is given; each folder is named as the backend it stands in for."""
