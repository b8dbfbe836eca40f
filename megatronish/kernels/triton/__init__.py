"""Bodies of ops in Triton. Imported by the first call that runs one: triton is not needed where none does."""
