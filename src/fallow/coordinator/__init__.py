"""Membership, placement and routing for one cell. Sees no prompt and no activation."""
