"""Benchmarks of optimizer steps: what a step costs, what the memory allows, beside torch.optim."""
