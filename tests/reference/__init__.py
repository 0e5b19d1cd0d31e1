"""Plain PyTorch versions of published separators: what parity is measured against."""
