"""Shards of images and of triplets, to batches and back."""
