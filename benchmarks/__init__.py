"""How fast maskserve is beside its peers and beside one plain read of the same bytes: `python -m benchmarks`."""
