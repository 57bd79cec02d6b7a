"""Rewritten programs kept between processes, and the key under which one is found again."""
