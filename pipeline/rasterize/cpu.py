"""CPU backend."""

from pipeline.rasterize.reference import rasterize as rasterize
