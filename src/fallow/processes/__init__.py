"""The processes of Fallow, one module each: what `fallow up` starts, and what `fallow join` is."""
