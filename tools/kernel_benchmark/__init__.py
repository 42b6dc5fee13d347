"""The parts of `tools/bench_kernels.py`: workloads, formulations to compare, timing, reports."""
