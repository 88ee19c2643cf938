"""The device's side: the agent that holds sessions, logs activations and keeps the owner in charge."""
