"""Computes stages: graphs built here from signed tensors, a bounded KV cache, continuous batching, a worker process."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
"""Since its release 1.29 the runtime makes an id for the machine, keeps it in the home folder and tells its maker of
models and sessions. It looks for this once, when it is imported."""
