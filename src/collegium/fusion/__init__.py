"""From K teachers' distributions to one target per token: weights, pools, calibration."""
