"""Weight files of other tools: read, written, streamed."""
