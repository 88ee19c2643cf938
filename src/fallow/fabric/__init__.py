"""How processes reach each other: the control bus and the data links, each with an in-memory twin."""
