"""Line searches against tuned optimizers on four kinds of task, and what a search costs."""
