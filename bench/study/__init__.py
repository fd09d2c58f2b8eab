"""The study of optimizers and schedules: Joshi, "Empirical Study of Neural Network Optimizers and
Schedulers" (2023), run again with pyoptim, on more optimizers and more schedules."""
