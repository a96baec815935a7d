"""What a text must look like, as llguidance reads it. Knows no request's life, no torch, no HTTP."""
