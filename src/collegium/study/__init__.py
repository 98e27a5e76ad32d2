"""What a person reads: preflight and report."""
