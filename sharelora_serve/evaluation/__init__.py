"""Evaluation of served models on E2E, Banking77 and GSM8K, over HTTP."""
