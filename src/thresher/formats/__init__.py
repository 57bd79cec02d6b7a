"""How bytes and matrices are laid out: bit streams, NVFP4 blocks, Hadamard orders. No operator, no kernel."""
