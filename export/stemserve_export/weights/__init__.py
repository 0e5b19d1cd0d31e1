"""Published checkpoint formats, read without running anything that a file contains."""
