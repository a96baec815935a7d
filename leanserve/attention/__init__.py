"""Attention over a KV cache that is sharded by position: this rank's keys, then everybody's."""
