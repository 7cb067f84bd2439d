"""Triton kernels: written once, from what each pass lifts, merges and finishes. Importing a module here needs triton.

The order of arithmetic is the plan's (docs/order.md): halves are added by splitting tiles, never by the reductions of
the language, whose order is the compiler's. So a row made of + - * / sqrt, compare and select has the bits of the
reference where the compiler contracts nothing, and `OPTIONS` says so.

Steps of reductions, in sums.py, extremes.py and powers.py: `lift(x, keep, at, OPTION)` takes cells (groups, n, lanes), int64,
float32 or float64, where they count, and their places in the slice; it gives parts (groups, lanes), in the order of
`ops/passes.py`. `merge(a, b)` joins states of neighbours. `finish(parts, OPTION)` gives float64, int64 or truth values, and
whether one of them has no number. The meaning, and the reason for each step, is the reference's; here are the same steps.
"""
