"""Requests, scheduling, the KV cache, sampling and the thread that owns the device."""
