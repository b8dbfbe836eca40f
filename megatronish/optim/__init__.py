"""Gradients into flat buckets, reduced and clipped; AdamW on a slice of them (ZeRO); parameters gathered again."""
