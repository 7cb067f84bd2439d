"""Data in other formats, both ways: each has one module with `read` and `write`, and one row in `formats`."""
