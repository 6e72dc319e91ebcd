"""What makes a step of a sweep fast: flat buffers, chunks, compilation, graphs."""
