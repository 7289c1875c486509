"""Where steps run: real CUDA streams, the CPU inline, or a simulated device on a clock of its own."""
