"""The pipeline that makes the ARC controller: data generation, training, choice, comparison."""
