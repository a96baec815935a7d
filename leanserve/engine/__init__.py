"""What runs next: requests become batches, tokens become outputs. Knows token ids and pages; no text, no torch."""
