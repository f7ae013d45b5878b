"""Bounds on the distance between what is returned and exact attention. One file a form."""
