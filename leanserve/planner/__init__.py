"""Memory and time of a deployment before the GPUs are rented: arithmetic over config.json. No torch, no weights."""
