"""One image, or a few, as the parameters: commands that train nothing."""
