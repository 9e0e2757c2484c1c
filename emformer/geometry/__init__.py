"""Geometry: pure functions on operators and clouds, one subject a file; they know no model."""
