"""Backends that run a bundle's stages, and the checks that need both a backend and the original model."""
