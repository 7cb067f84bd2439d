"""Triton kernels: written once, from what each pass lifts, merges and finishes. Importing a module here needs triton.

The order of arithmetic is the plan's (docs/order.md): halves are added by splitting tiles, never by the reductions of
the language, whose order is the compiler's. So a row made of + - * / sqrt, compare and select has the bits of the
reference where the compiler contracts nothing, and `OPTIONS` says so.
"""
