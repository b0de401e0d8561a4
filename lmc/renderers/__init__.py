"""What renders images from parameters of its own: vector graphics."""
