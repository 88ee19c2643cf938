"""Checkpoints in, servable models out: import, quantise, manifest, content-addressed store."""
