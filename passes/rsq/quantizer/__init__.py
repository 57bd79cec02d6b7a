"""What `thresher.quantize` runs: importance, Hessians, grids and codes, piece by piece."""
