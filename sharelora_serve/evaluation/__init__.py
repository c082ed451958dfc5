"""Evaluation on E2E, Banking77 and GSM8K: questions, scores and reports."""
