"""What ``nanovllm bench`` is made of: workloads, the engines it runs, and comparisons with other engines."""
