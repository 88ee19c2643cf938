"""Values that every part shares. Frozen; no I/O, no clocks, no imports of other parts."""
