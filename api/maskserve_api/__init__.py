"""The service: bytes in, bytes out. What it computes it asks of the op table; no op is named here."""
