"""Plug-ins for mmscale, one file for each kind. docs/extending/ explains them."""
