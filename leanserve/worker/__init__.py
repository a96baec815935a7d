"""One rank's device: step messages in, sampled tokens out."""
