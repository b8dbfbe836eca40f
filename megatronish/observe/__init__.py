"""What a run says of itself: log, metrics, progress, curves, and the peak that MFU is measured against on a CPU."""
