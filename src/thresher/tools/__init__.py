"""What the command line and the search use: models, lengths, benchmarks, the doctor, the demo."""
