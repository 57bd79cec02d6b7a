"""Through Inductor: Triton on GPUs, C++ on CPUs; in this process, or ahead of time."""
