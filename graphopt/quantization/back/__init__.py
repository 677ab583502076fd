"""From integers back to float32: what somebody quantised before, recognised and taken back."""
