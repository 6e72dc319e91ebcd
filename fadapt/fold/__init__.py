"""N adapters at once, in one pass over the base."""
