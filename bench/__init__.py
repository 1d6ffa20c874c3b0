"""Speed and memory: python -m bench lists the benchmarks. Their tables stand in docs/benchmarks.md."""
