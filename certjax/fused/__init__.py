"""Certified attention in a handful of kernels: the fast path of the `planes` codec with blocks of 128 tokens."""
