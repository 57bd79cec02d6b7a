"""What was done, kept and shown: certificates, the HTML page, the report of a quantization."""
