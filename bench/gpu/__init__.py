"""What only a GPU can show: speed, equal bits with the CPU, graphs, and steps that never wait."""
