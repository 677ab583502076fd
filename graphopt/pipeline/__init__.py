"""What surrounds a pass: options, recipes, presets, instruments, gates, reproducers."""
