"""Measurements, each against its reference and its limit."""
