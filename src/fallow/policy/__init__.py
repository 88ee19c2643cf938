"""Every decision, as a pure function: values in, values out, time and randomness passed in."""
