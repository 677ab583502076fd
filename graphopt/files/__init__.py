"""Model files and what is checked, read and written of them."""
