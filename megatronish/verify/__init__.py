"""Is a layout the same mathematics as one process? For a user's own config, on a laptop."""
