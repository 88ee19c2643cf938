"""The council's word: who sits on it, what it signs, what is published, and what a device believes of it."""
