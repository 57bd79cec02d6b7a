"""Targets: what turns a Program into something that runs."""
