"""What the passes that make weights sparse share: which layers, what they read, how factors are written."""
