"""Geometry and traffic made from a seed: roads, actors, an expert driver, six rendered cameras."""
