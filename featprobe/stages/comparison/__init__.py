"""From scored heads to an answer."""
