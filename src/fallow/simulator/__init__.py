"""The real coordinator, agents and gateway on virtual time."""
