"""float16 and bfloat16."""
