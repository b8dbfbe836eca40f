"""Bytes on disk -> Batch on the device. Import the modules; this package imports nothing, so that the command line stays quick."""
