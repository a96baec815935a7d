"""HTTP: an OpenAI-compatible face over one engine. Owns text, its own process, no torch."""
