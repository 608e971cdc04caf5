"""Images of every kind: decoded, and brought into [0, 1]."""
