"""What apps talk to: the OpenAI-compatible API, sampling, and the sessions that it drives through the fleet."""
