"""Measures a running server over HTTP; tests check results, this measures time and memory."""
