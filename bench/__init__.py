"""Benchmarks: one file a question, peers measured side by side in the same run; results go to RESULTS.md."""
