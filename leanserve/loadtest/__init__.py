"""Load testing for long contexts, against any OpenAI-compatible server. Knows HTTP, and nothing of the engine."""
