"""Computes stages: graphs built here from signed tensors, a bounded KV cache, continuous batching, a worker process."""
