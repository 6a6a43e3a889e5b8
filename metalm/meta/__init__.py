"""Unrolled sequences of losses and updates, and how to differentiate them."""
