"""Rewrites: each method recognises its waste in a Program and rewrites it away."""
