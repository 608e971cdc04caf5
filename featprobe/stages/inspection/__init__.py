"""From records to an inspection's answer."""
