"""Losses and emulations for training: NVFP4, and the density of MLPs."""
