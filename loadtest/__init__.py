"""Measures time, memory and quality of service, over HTTP but for `step` and `training`."""
