"""Programs that measure and write a page each: see benchmarks/run.py."""
