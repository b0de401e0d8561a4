"""Anything with parameters that makes images: vector graphics, a 3D scene."""
