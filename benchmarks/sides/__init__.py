"""What the benchmarks share: the task both sides train on, each side in a process of its own, and how results are kept."""
